"""The drives under a directory, found in trees as /proc and /sys have them, and in this machine's own."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from flexgen_triton.memory.disk_files import DiskFile
from flexgen_triton.memory.drives import Drive, Storage, concern, storage, takes_direct

NVME = Drive("nvme1n1", "Amazon EC2 NVMe Instance Storage", False)


class Machine:
    """A tree of /proc and /sys, built mount by mount and device by device."""

    def __init__(self, root: Path) -> None:
        self.proc, self.sys = root / "proc", root / "sys"
        (self.proc / "self").mkdir(parents=True)
        for folder in ("dev/block", "class/block", "devices"):
            (self.sys / folder).mkdir(parents=True)
        self.rows = ""

    def mount(self, place: Path | str, filesystem: str, device: str = "0:50", source: str = "none") -> None:
        place = str(place).replace(" ", r"\040")
        self.rows += f"30 25 {device} / {place} rw,noatime shared:1 - {filesystem} {source} rw\n"
        (self.proc / "self" / "mountinfo").write_text(self.rows)

    def device(self, name: str, number: str, model: str = "", *, inside: str = "", rotational: str = "0") -> Path:
        node = self.sys / "devices" / inside / name
        (node / "queue").mkdir(parents=True)
        (node / "slaves").mkdir()
        (node / "queue" / "rotational").write_text(f"{rotational}\n")
        if model:
            (node / "device").mkdir()
            (node / "device" / "model").write_text(f"{model}   \n")
        (self.sys / "dev" / "block" / number).symlink_to(node)
        (self.sys / "class" / "block" / name).symlink_to(node)
        return node

    def storage(self, directory: Path) -> Storage:
        return storage(directory, proc=self.proc, sys=self.sys)


@pytest.fixture
def machine(tmp_path):
    made = Machine(tmp_path)
    made.mount("/", "ext4", "8:1")
    made.device("sda", "8:0", "QEMU HARDDISK", rotational="1")
    (made.device("sda1", "8:1", inside="sda") / "partition").write_text("1\n")
    made.device("nvme1n1", "259:1", NVME.model)
    return made


def test_the_innermost_and_latest_mount_counts(machine, tmp_path):
    assert machine.storage(Path("/nowhere/at/all")) == Storage("ext4", (Drive("sda", "QEMU HARDDISK", True),))
    machine.mount("/mnt/fast", "tmpfs")
    machine.mount("/mnt/fast", "xfs", "259:1")
    machine.mount("/mnt/fa", "nfs4")
    machine.mount("/mnt/with blank", "nfs4")
    assert machine.storage(Path("/mnt/fast/offload/new")) == Storage("xfs", (NVME,))
    assert machine.storage(Path("/mnt/fast2")).filesystem == "ext4"
    assert machine.storage(Path("/mnt/with blank/x")).filesystem == "nfs4"
    (tmp_path / "link").symlink_to("/mnt/fast")
    assert machine.storage(tmp_path / "link").drives == (NVME,)


def test_drives_are_found_through_volumes_raid_partitions_and_loops(machine):
    second = machine.device("nvme2n1", "259:2", NVME.model)
    part = machine.device("nvme2n1p1", "259:3", inside="nvme2n1")
    (part / "partition").write_text("1\n")
    assert part.parent == second
    array = machine.device("md0", "9:0")
    for slave in (machine.sys / "devices" / "nvme1n1", part):
        (array / "slaves" / slave.name).symlink_to(slave)
    volume = machine.device("dm-0", "253:0")
    (volume / "slaves" / "md0").symlink_to(array)
    machine.mount("/mnt/array", "xfs", "253:0")
    both = (NVME, Drive("nvme2n1", NVME.model, False))
    assert machine.storage(Path("/mnt/array")) == Storage("xfs", both)
    loop = machine.device("loop3", "7:3")
    (loop / "loop").mkdir()
    (loop / "loop" / "backing_file").write_text("/mnt/array/image\n")
    machine.mount("/mnt/loop", "ext4", "7:3")
    assert machine.storage(Path("/mnt/loop")) == Storage("ext4", both)


def test_a_filesystem_with_numbers_of_its_own_is_found_by_its_source(machine):
    machine.mount("/mnt/btrfs", "btrfs", "0:44", "/dev/nvme1n1")
    assert machine.storage(Path("/mnt/btrfs")) == Storage("btrfs", (NVME,))
    machine.mount("/mnt/zfs", "zfs", "0:45", "pool/data")
    assert machine.storage(Path("/mnt/zfs")) == Storage("zfs", ())


@pytest.mark.parametrize(
    ("found", "is_direct", "words"),
    [
        (Storage("xfs", (NVME,)), True, None),
        (Storage("zfs", ()), True, None),
        (Storage("tmpfs", ()), True, "takes the memory that it should save"),
        (Storage("overlay", ()), True, "layered filesystem"),
        (Storage("nfs4", ()), True, "over a network"),
        (Storage("fuse.sshfs", ()), True, "over a network"),
        (Storage("xfs", (Drive("nvme0n1", "Amazon Elastic Block Store", False),)), True, "over a network"),
        (Storage("ext4", (NVME, Drive("sda", "", True))), True, "is a rotating disk"),
        (Storage("ext4", (Drive("vda", "", False),)), False, "no NVMe drive, at whose rate"),
        (Storage("ext4", (Drive("vda", "", False),)), False, "refuses O_DIRECT as well"),
        (Storage("xfs", (NVME,)), False, "refuses O_DIRECT: reads pass through the page cache"),
    ],
)
def test_a_poor_place_is_told_of_in_one_sentence(found, is_direct, words):
    told = concern(Path("/here"), found, is_direct=is_direct)
    assert (told is None) == (words is None)
    if told is not None:
        assert words in told and told.startswith(f"/here ({found.filesystem}") and "\n" not in told


def test_this_machines_own(tmp_path):
    found = storage(tmp_path)
    done = subprocess.run(["df", "--output=fstype", tmp_path], capture_output=True, text=True, check=True)
    assert found.filesystem == done.stdout.split()[-1]
    assert all(Path("/sys/class/block", drive.name).exists() for drive in found.drives)
    with DiskFile.scratch(tmp_path, 4096) as file:
        assert takes_direct(tmp_path) == file.direct
    if Path("/dev/shm").is_mount():
        assert storage(Path("/dev/shm/x")) == Storage("tmpfs", ())
    with pytest.raises(OSError, match="nothing"):
        takes_direct(tmp_path / "nothing")


def test_a_real_loop_device_is_seen_through(tmp_path):
    if os.geteuid() or not shutil.which("losetup") or not shutil.which("mkfs.ext4"):
        pytest.skip("needs root and losetup")
    image, place = tmp_path / "image", tmp_path / "mnt"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    if subprocess.run(["mount", "-o", "loop", image, place], capture_output=True, check=False).returncode:
        pytest.skip("no loop devices here")
    try:
        assert storage(place) == Storage("ext4", storage(tmp_path).drives)
    finally:
        subprocess.run(["umount", place], check=True)
