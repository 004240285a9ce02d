"""The filesystem of a directory and the drives under it, read from /proc and /sys.

Reads only, but for `takes_direct`, which opens a file of no name. Knows no speeds; `machine/measure.py` measures them.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MEMORY = frozenset(("tmpfs", "ramfs", "devtmpfs"))
LAYERED = frozenset(("overlay", "aufs"))
NETWORK = re.compile(
    r"nfs\d?|cifs|smb\d|smbfs|9p|ceph|lustre|glusterfs|gpfs|beegfs|afs|virtiofs|gcsfuse|fuse\.(?!fuseblk)\S+"
)
REMOTE_MODELS = ("Amazon Elastic Block Store", "nvme_card-pd")  # NVMe to look at, and a network away
PROC, SYS = Path("/proc"), Path("/sys")


@dataclass(frozen=True, slots=True)
class Drive:
    """A block device that is no layer over another."""

    name: str
    model: str
    is_rotating: bool

    @property
    def is_remote(self) -> bool:
        return self.model.startswith(REMOTE_MODELS)

    @property
    def is_nvme(self) -> bool:
        return self.name.startswith("nvme") and not self.is_remote


@dataclass(frozen=True, slots=True)
class Storage:
    """A filesystem and the drives under it, through partitions, RAID, volumes and loop devices; none where unknown."""

    filesystem: str
    drives: tuple[Drive, ...]


@dataclass(frozen=True, slots=True)
class _Mount:
    place: Path
    filesystem: str
    device: str  # "major:minor"
    source: str


def storage(directory: Path, *, proc: Path = PROC, sys: Path = SYS) -> Storage:
    """The storage under a directory, or under the place where it would be made."""
    mount = _mount_of(directory, proc)
    node = _node(mount, sys)
    drives = () if node is None else tuple(dict.fromkeys(_drives(node, proc, sys)))
    return Storage(mount.filesystem, drives)


def _mount_of(path: Path, proc: Path) -> _Mount:
    """The mount that has the path: the one of the longest place, of several at one place the last."""
    path = path.expanduser().resolve()
    holding = (m for m in _mounts(proc) if path.is_relative_to(m.place))
    return max(enumerate(holding), key=lambda found: (len(found[1].place.parts), found[0]))[1]


def _mounts(proc: Path) -> Iterator[_Mount]:
    for line in (proc / "self" / "mountinfo").read_text().splitlines():
        where, _, what = line.partition(" - ")
        fields, (filesystem, source, *_) = where.split(), what.split()
        yield _Mount(Path(_unescaped(fields[4])), filesystem, fields[2], _unescaped(source))


def _unescaped(text: str) -> str:
    """Text in which blanks and the like are written as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def _node(mount: _Mount, sys: Path) -> Path | None:
    """The directory of a mount's block device; None where it has none, as of a network's or memory's filesystem."""
    if mount.filesystem in MEMORY | LAYERED or NETWORK.fullmatch(mount.filesystem):
        return None
    by_source = sys / "class" / "block" / Path(os.path.realpath(mount.source)).name  # btrfs has numbers of its own
    found = (node for node in (sys / "dev" / "block" / mount.device, by_source) if node.exists())
    return next((node.resolve() for node in found), None)


def _drives(node: Path, proc: Path, sys: Path) -> Iterator[Drive]:
    """The drives under a block device."""
    backing = node / "loop" / "backing_file"
    slaves = sorted((node / "slaves").glob("*"))
    if (node / "partition").exists():
        yield from _drives(node.parent, proc, sys)
    elif slaves:
        for slave in slaves:
            yield from _drives(slave.resolve(), proc, sys)
    elif backing.exists():
        yield from storage(Path(backing.read_text().strip()), proc=proc, sys=sys).drives
    else:
        yield Drive(node.name, _text(node / "device" / "model"), _text(node / "queue" / "rotational") == "1")


def _text(file: Path) -> str:
    return file.read_text().strip() if file.is_file() else ""


def takes_direct(directory: Path) -> bool:
    """Return True if a directory's files can be read past the page cache; raises OSError if none can be made there."""
    with tempfile.NamedTemporaryFile(dir=directory) as file:
        try:
            os.close(os.open(file.name, os.O_RDONLY | os.O_DIRECT))
        except OSError:
            return False
    return True


def concern(directory: Path, found: Storage, *, is_direct: bool) -> str | None:
    """The sentence to tell of a directory that is a poor place to offload to; None of a good one."""
    advice = "give --offload-dir a directory on a local NVMe drive"
    names = ", ".join(d.name for d in found.drives)
    where = f"{directory} ({found.filesystem}{f' on {names}' if names else ''})"
    if found.filesystem in MEMORY:
        return f"{where} is in memory: what is offloaded to it takes the memory that it should save; {advice}"
    if found.filesystem in LAYERED:
        return f"{where} is a container's own layered filesystem, kept with its image and slower than a drive; {advice}"
    if NETWORK.fullmatch(found.filesystem) or any(d.is_remote for d in found.drives):
        return f"{where} is reached over a network, at whose rate every token step reads what is offloaded; {advice}"
    if found.drives and not all(d.is_nvme for d in found.drives):
        kind = "a rotating disk" if any(d.is_rotating for d in found.drives) else "no NVMe drive"
        rate = f"is {kind}, at whose rate every token step reads what is offloaded"
        return f"{where} {rate}{'' if is_direct else '; it refuses O_DIRECT as well'}; {advice}"
    if not is_direct:
        return (
            f"{where} refuses O_DIRECT: reads pass through the page cache, take memory beside what is planned and seem "
            "as fast as it; XFS and ext4 take it"
        )
    return None
