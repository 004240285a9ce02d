"""The system's errors as sentences: which file, why, and what to do about it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

FULL = {errno.ENOSPC: "its disk is full", errno.EDQUOT: "its user's quota is used up"}
ADVICE = {  # of a file, by what the system says of it
    errno.ENOTDIR: "cannot be there: a part of its path is a file and no directory; check the path",
    errno.EISDIR: "is a directory; name a file",
    errno.EEXIST: "is there already; name another one, or move it away",
    errno.EACCES: "may not be used by this user; change its permissions or its directory's, or name another place",
    errno.EPERM: "may not be used by this user; change its owner or attributes, or name another place",
    errno.EROFS: "lies on a file system that can only be read; name another place",
    errno.ELOOP: "is a symbolic link that leads nowhere or may not be followed here; name the file itself",
    errno.ENAMETOOLONG: "has a longer name than the file system takes (most take 255 bytes); give it a shorter one",
    errno.ENOSPC: f"cannot be written: {FULL[errno.ENOSPC]}; make room, or name another place",
    errno.EDQUOT: f"cannot be written: {FULL[errno.EDQUOT]}; remove some files, or name another place",
    errno.EFBIG: "cannot grow further: file too large for the file system or for the limit that `ulimit -f` shows; "
    "raise it, or name another place",
    errno.EIO: "cannot be read or written: its disk fails (input/output error); see the system's log, and use another",
    errno.ESTALE: "is gone from the server that held it (stale file handle); mount it anew",
    errno.ENXIO: "is a device or a pipe with nothing behind it; name a file",
    errno.ENODEV: "is on a device that cannot do this; name another place",
    errno.ETXTBSY: "is a program that is running; name another file",
    errno.EBUSY: "is in use by the system; wait, or name another",
}
OWN_ADVICE = {  # of the process
    errno.EMFILE: "too many files are open in this process; raise the limit that `ulimit -n` shows",
    errno.ENFILE: "too many files are open on this machine; close other programs",
    errno.ENOMEM: "the system has no memory left; close other programs, or set --cpu-mem lower",
    errno.EAGAIN: "the system has no threads or memory left; close other programs, or raise what `ulimit -u` shows",
}
SHOWN = 120  # characters of a name


def sentence(error: OSError) -> str:
    """An error in one sentence with a way out. One that this program raised in words of its own keeps them."""
    number = error.errno
    if number is None:
        return str(error)
    if error.strerror != os.strerror(number):
        return str(error.strerror or error)
    if number in OWN_ADVICE:
        return OWN_ADVICE[number]
    name = _name(error)
    if number == errno.ENOENT:
        return _missing(name)
    if number in ADVICE:
        return f"{_shown(name)} {ADVICE[number]}"
    return f"{_shown(name)} cannot be used: {reason(error)} (error {number}); name another place"


def reason(error: OSError) -> str:
    """The reason that something could not be written, to stand inside a sentence."""
    return FULL.get(error.errno or 0, (error.strerror or "it failed").lower())


def _missing(name: str) -> str:
    """A file or, if that is what is missing, its directory."""
    parent = Path(name).parent
    if name and not parent.exists():
        return (
            f"{_shown(name)} cannot be there: there is no directory {_shown(str(parent))}; make it, or check the path"
        )
    return f"{_shown(name)} is not there; check the path"


def _name(error: OSError) -> str:
    """The file that the error is about, "" where the system did not say."""
    found = error.filename
    return os.fsdecode(found) if isinstance(found, str | bytes | os.PathLike) else ""


def _shown(name: str) -> str:
    """A name that is printable and fits a line: of a long one, its end."""
    if not name:
        return "a file"
    printable = name if name.isprintable() else ascii(name)[1:-1]
    return printable if len(printable) <= SHOWN else f"...{printable[-SHOWN:]}"
