"""The code that a pickle asks to have run when it is loaded, found by reading it: nothing of it is run or imported.

Knows pickle's opcodes and where torch.save puts a pickle. Does not know tensors.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
import zlib
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from torch.serialization import get_unsafe_globals_in_checkpoint

from ..memory.disk_files import open_regular

MAX_BYTES = 64 << 20  # of a pickle that are looked at
MAX_PICKLES = 8  # one behind the other, as torch.save wrote them before 1.6

_UNREADABLE = (
    OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError,
    struct.error, zlib.error, zipfile.BadZipFile, pickle.PickleError,
)  # fmt: skip
_TENSORS = re.compile(  # what tensors are made from; anything else may be code
    r"collections\.(OrderedDict|Counter)|_codecs\.encode|builtins\.(set|bytearray|complex)"
    r"|torch\.(Size|Tensor|device|\w+Storage|u?int\d+|b?float\w+|quint\w+|qint\w+|complex\d+|bool|per_\w+)"
    r"|torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_from_type_v2|torch\.storage\.\w+Storage"
    r"|torch\.nn\.parameter\.Parameter|torch\.serialization\._get_layout"
)


def unsafe_globals(file: Path) -> list[str]:
    """The functions and classes ("os.system") that a .bin file names beyond what tensors are made from.

    As far as a damaged file can be read: an empty list says that nothing was found, not that the file is whole.
    """
    with suppress(*_UNREADABLE):
        return sorted(get_unsafe_globals_in_checkpoint(str(file)))
    found: set[str] = set()
    with suppress(*_UNREADABLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escape sequences, in what may be anything
        for stream in _pickles(file):
            with suppress(*_UNREADABLE):
                for name in _globals(stream):  # those before the damage count
                    found.add(name)
    return sorted(name for name in found if not _TENSORS.fullmatch(name))


def _pickles(file: Path) -> Iterator[io.BytesIO]:
    """The pickles of a file: those in a zip archive, or those that it begins with."""
    with open(open_regular(file), "rb") as opened:
        if zipfile.is_zipfile(opened):
            with zipfile.ZipFile(opened) as archive:
                for member in archive.infolist():
                    if member.filename.endswith("data.pkl"):
                        yield io.BytesIO(archive.open(member).read(MAX_BYTES))
            return
        opened.seek(0)
        if opened.read(2) == b"PK":  # a zip archive without its end
            return
        opened.seek(0)
        stream = io.BytesIO(opened.read(MAX_BYTES))
        for _ in range(MAX_PICKLES):  # the reader of one leaves the stream behind it
            yield stream


def _globals(stream: io.BytesIO) -> Iterator[str]:
    """List the names that one pickle imports; raises one of _UNREADABLE where it is damaged."""
    strings: deque[str] = deque(maxlen=2)  # the last on the stack: STACK_GLOBAL takes module and name from there
    memo: dict[int, str | None] = {}
    top: str | None = None  # of the stack, where it is a string
    for op, argument, _ in pickletools.genops(stream):
        if op.name in ("GLOBAL", "INST"):
            yield str(argument).replace(" ", ".", 1)
        elif op.name == "STACK_GLOBAL":
            yield ".".join(strings) or "a name that it computes"
        elif op.name in ("EXT1", "EXT2", "EXT4"):
            yield f"copyreg extension {argument}"
        if op.name == "MEMOIZE":
            memo[len(memo)] = top
        elif op.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[int(str(argument))] = top
        elif op.name in ("GET", "BINGET", "LONG_BINGET"):
            top = memo.get(int(str(argument)))
            strings.extend([top] if top is not None else [])
        elif op.stack_after and op.stack_after != [pickletools.markobject]:
            top = argument if isinstance(argument, str) and op.name not in ("GLOBAL", "INST", "PERSID") else None
            strings.extend([top] if top is not None else [])
