"""The scripts that mount local NVMe drives: what they decide for drives as `lsblk` tells them, and on a real device."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
AWS, GCP = SCRIPTS / "mount_nvme_aws.sh", SCRIPTS / "mount_nvme_gcp.sh"
STORE = r"Amazon\x20EC2\x20NVMe\x20Instance\x20Storage"
TOOLS = {  # in place of the system's, reading the machine from files beside them
    "lsblk": """
        case $1 in
          -dnrpo) cat "$here/drives" ;;
          -nrpo) echo "$3 disk "; cat "$here/below-${3##*/}" 2>/dev/null ;;
          *) exit 1 ;;
        esac; true""",
    "wipefs": """cat "$here/kind-${last##*/}" 2>/dev/null; true""",
    "blkid": """cat "$here/label-${last##*/}" 2>/dev/null || exit 2""",
    "findmnt": "exit 1",
}


def said(script: Path, *args: str, path: str = os.environ["PATH"], ok: bool = True) -> list[str]:
    """Run a script; returns its lines, of its one error where it must fail."""
    done = subprocess.run(
        ["bash", script, *args], capture_output=True, text=True, env={**os.environ, "PATH": path}, check=False
    )
    assert (done.returncode == 0) == ok, done
    if ok:
        return done.stdout.splitlines()
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and not done.stdout, done
    return done.stderr.splitlines()


@pytest.fixture
def machine(tmp_path):
    """Makes a machine of drives ("nvme1n1 MODEL") and of what is on them (file name -> text); returns its PATH."""

    def make(drives: list[str], **files: str) -> str:
        for name, body in TOOLS.items():
            start = 'here=$(dirname "$0"); for last; do :; done'
            (tmp_path / name).write_text(f"#!/bin/bash\n{start}\n{body}\n")
            (tmp_path / name).chmod(0o755)
        rows = (drive.split(" ", 1) for drive in drives)
        (tmp_path / "drives").write_text("".join(f"/dev/{name} disk {model}\n" for name, model in rows))
        for name, text in files.items():
            (tmp_path / name.replace("_", "-")).write_text(text)
        return f"{tmp_path}:{os.environ['PATH']}"

    return make


def made(*drives: str, first: tuple[str, ...] = ()) -> list[str]:
    """The commands that make and mount a file system on drives."""
    volume = drives[0] if len(drives) == 1 else "/dev/md/flexgen"
    array = f"mdadm --create {volume} --name=flexgen --level=0 --raid-devices={len(drives)} --chunk=1M --run "
    return [
        *first,
        *([array + " ".join(drives)] if len(drives) > 1 else ()),
        f"mkfs.xfs -q -f -L flexgen {volume}",
        *mounted(volume),
    ]


def mounted(volume: str) -> list[str]:
    owner = f"{os.environ.get('SUDO_UID', os.geteuid())}:{os.environ.get('SUDO_GID', os.geteuid())}"
    return ["mkdir -p /mnt/x", f"mount -t xfs -o noatime {volume} /mnt/x", f"chown {owner} /mnt/x"]


def test_only_the_clouds_own_local_drives_are_found_and_all_are_striped(machine):
    drives = [r"nvme0n1 Amazon\x20Elastic\x20Block\x20Store", f"nvme10n1 {STORE}", f"nvme2n1 {STORE}", "sda QEMU"]
    path = machine([*drives, "nvme3n1 nvme_card", "nvme4n1 nvme_card-pd"])
    assert said(AWS, "--dry-run", "/mnt/x", path=path) == made("/dev/nvme2n1", "/dev/nvme10n1")
    assert said(AWS, "--dry-run", "--drives", "1", "/mnt/x", path=path) == made("/dev/nvme2n1")
    assert said(GCP, "--dry-run", "/mnt/x", path=path) == made("/dev/nvme3n1")
    path = machine(["nvme0n1 Other"])
    assert "no local NVMe drives" in said(AWS, "--dry-run", "/mnt/x", path=path, ok=False)[0]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("kind_nvme2n1", "ext4\n", "holds data (ext4); --erase /dev/nvme2n1 says that it may be lost"),
        ("kind_nvme2n1", "gpt\nPMBR\n", "holds data"),
        ("below_nvme2n1", "/dev/nvme2n1p1 part /home\n", "in use (mounted at /home)"),
        ("below_nvme2n1", "/dev/md127 raid5 \n", "in use (raid5 /dev/md127)"),
    ],
)
def test_a_drive_with_anything_on_it_is_refused_before_any_other_is_touched(machine, name, text, words):
    path = machine([f"nvme1n1 {STORE}", f"nvme2n1 {STORE}"], **{name: text})
    assert words in said(AWS, "--dry-run", "/mnt/x", path=path, ok=False)[0]
    erase = ("--erase", "/dev/nvme2n1", "--dry-run", "/mnt/x")
    if name.startswith("kind"):
        first = ("wipefs --all --quiet /dev/nvme2n1",)
        assert said(AWS, *erase, path=path) == made("/dev/nvme1n1", "/dev/nvme2n1", first=first)
    else:
        assert words in said(AWS, *erase, path=path, ok=False)[0]


def test_what_an_earlier_run_made_is_mounted_as_it_is(machine):
    label = {"kind_nvme1n1": "xfs\n", "label_nvme1n1": "flexgen\n"}
    lines = said(AWS, "--dry-run", "/mnt/x", path=machine([f"nvme1n1 {STORE}"], **label))
    assert "file system of an earlier run" in lines[0] and lines[1:] == mounted("/dev/nvme1n1")
    member = {"kind": "linux_raid_member\n", "label": "host:flexgen\n"}
    two = {f"{kind}_nvme{n}n1": text for n in (1, 2) for kind, text in member.items()}
    drives = [f"nvme1n1 {STORE}", f"nvme2n1 {STORE}"]
    assembled = said(AWS, "--dry-run", "/mnt/x", path=machine(drives, **two))[1:]
    assert assembled[0] == "mdadm --assemble /dev/md/flexgen /dev/nvme1n1 /dev/nvme2n1"
    assert assembled[1:] == mounted("/dev/md/flexgen")
    running = {f"below_nvme{n}n1": "/dev/md127 raid0 \n" for n in (1, 2)}
    assert said(AWS, "--dry-run", "/mnt/x", path=machine(drives, **two, **running))[1:] == mounted("/dev/md127")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("", "no directory"),
        ("--drives 0 /mnt/x", "at least 1"),
        ("--drives 3 --dry-run /mnt/x", "3 drives are asked for and 2 are here"),
        ("--drive", "needs a value"),
        ("--stripe /mnt/x", "--stripe is no option"),
        ("/mnt/x /mnt/y", "two directories"),
    ],
)
def test_mistakes_are_sentences(machine, args, words):
    path = machine([f"nvme1n1 {STORE}", f"nvme2n1 {STORE}"])
    assert words in said(AWS, *args.split(), path=path, ok=False)[0]


def test_help_says_what_may_be_lost():
    assert "A drive that holds anything is refused" in " ".join(said(AWS, "--help"))


@pytest.fixture
def loop(tmp_path) -> Iterator[str]:
    """A real block device, a file behind it."""
    tools = ("losetup", "mkfs.xfs", "mkfs.ext4", "wipefs", "findmnt", "blkid", "lsblk")
    if os.geteuid() or not all(map(shutil.which, tools)):
        pytest.skip("needs root and the tools of file systems")
    image = tmp_path / "drive"
    with image.open("wb") as file:
        file.truncate(320 << 20)
    done = subprocess.run(["losetup", "-f", "--show", image], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no loop devices here: {done.stderr}")
    device = done.stdout.strip()
    yield device
    subprocess.run(["losetup", "-d", device], check=True)


def test_on_a_real_device(loop, tmp_path):
    place = tmp_path / "mnt"
    subprocess.run(["mkfs.ext4", "-q", loop], check=True)
    assert f"{loop} holds data (ext4)" in said(AWS, "--drive", loop, str(place), ok=False)[0]
    try:
        said(AWS, "--drive", loop, "--erase", loop, str(place))
        (place / "kept").write_text("x")
        assert place.is_mount()
        again = said(AWS, "--drive", loop, str(place))
        assert again == [f"{place} is mounted from {loop} already; nothing was changed"]
        other = said(AWS, "--drive", loop, str(tmp_path / "other"), ok=False)[0]
        assert f"{loop} is in use (mounted at {place})" in other
        subprocess.run(["umount", place], check=True)
        assert "earlier run" in said(AWS, "--drive", loop, str(place))[0]
        assert (place / "kept").read_text() == "x"
    finally:
        subprocess.run(["umount", place], check=False)
