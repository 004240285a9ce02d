"""Amounts of memory as people write them: "16GiB", "208GB", "1600MB", or a number of bytes."""

from __future__ import annotations

import re

UNITS = {"": 1, "b": 1} | {
    f"{prefix}{binary}b": (1024 if binary else 1000) ** power
    for power, prefix in enumerate("kmgt", 1)
    for binary in ("", "i")
}


def parse_size(size: int | str) -> int:
    """Bytes of "16GiB", "208 GB" or a plain number; raises ValueError in one sentence."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(size).lower())
    if not found or found[2] not in UNITS or len(found[1]) > 30:
        raise ValueError(f"{size!r} is no amount of memory; write it as 16GiB, 208GB, 1600MB or in bytes")
    return int(float(found[1]) * UNITS[found[2]])
