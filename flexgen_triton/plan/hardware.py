"""Capacities and speeds of a machine, in bytes, bytes per second and floating-point operations per second.

Measured by machine/measure.py, or read from one of the profiles that ship with the package (profiles/*.json), whose
figures come from data sheets and publications.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import median
from typing import Any

from .json_file import JsonError, parse_json, read_text

GIB = 1 << 30
MARGIN = 0.05  # of a tier's free memory, left alone unless a limit is given
PROFILE_DIR = Path(__file__).with_name("profiles")


class HardwareError(ValueError):
    """A profile that cannot be used; the message says which file and why."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A rate that depends on size: `points` are (size, units per second), sizes ascending.

    Between points *time* is linear in size, below the first it stays what it is there (latency), above the last the
    rate does. Time never falls as size grows: a point slower than a larger one's whole time counts as that, for what
    a larger size can do a smaller can too, and a measurement errs by being slow.
    """

    points: tuple[tuple[float, float], ...]
    times: tuple[tuple[float, float], ...] = field(init=False, repr=False, compare=False)  # (size, seconds)

    def __post_init__(self) -> None:
        sizes, rates = [s for s, _ in self.points], [r for _, r in self.points]
        numbers = all(math.isfinite(n) and n > 0 for n in (*sizes, *rates))
        if not self.points or not numbers or any(a >= b for a, b in pairwise(sizes)):
            raise HardwareError(f"a curve needs ascending sizes and rates above 0, not {self.points}")
        least = accumulate((s / r for s, r in reversed(self.points)), min)
        object.__setattr__(self, "times", tuple(zip(sizes, reversed(list(least)), strict=True)))

    @classmethod
    def flat(cls, rate: float) -> Curve:
        """The same rate at every size."""
        return cls(((1.0, rate),))

    def seconds(self, size: float) -> float:
        """Time to move or compute `size` units in one go."""
        n = bisect_left(self.times, (size, 0.0))
        if n == len(self.times) or len(self.times) == 1:
            return size / self.points[-1][1]
        high, at_high = self.times[n]
        if n == 0:
            return at_high
        low, at_low = self.times[n - 1]
        return at_low + (at_high - at_low) * (size - low) / (high - low)

    def rate(self, size: float) -> float:
        """Units per second at `size`."""
        return size / self.seconds(size)

    def scaled(self, factor: float) -> Curve:
        """The same curve with every rate times `factor`."""
        return Curve(tuple((size, rate * factor) for size, rate in self.points))


@dataclass(frozen=True, slots=True)
class Hardware:
    """Capacities and rates of one machine.

    `matmul` is by the matrix's format ("float32", "float16", "bfloat16", "4-bit"), FLOP/s by rows of the other factor;
    `decode_attention` and `host_attention` by the cache's format, bytes of K and V per second by bytes. Transfers are
    by the bytes of one operation, the disk's as the engine's own queue performs them.
    """

    name: str
    source: str  # where the figures come from
    host_is_apart: bool  # host memory is apart from the device's; else gpu_bytes is 0 and host bytes are used in place
    gpu_bytes: int
    host_bytes: int
    disk_bytes: int
    h2d: Curve
    d2h: Curve
    h2d_pageable: Curve
    d2h_pageable: Curve
    disk_read: Curve
    disk_write: Curve
    disk_rows: float  # rows of an embedding table per second, each read by itself
    device_read: float  # bytes/s that a kernel reads from the device's memory
    host_read: float  # bytes/s that the CPU reads from the host's
    matmul: Mapping[str, Curve]
    prefill_attention: Curve  # FLOP/s of causal attention, by prompt length
    decode_attention: Mapping[str, Curve]
    host_attention: Mapping[str, Curve]
    elementwise: Curve  # bytes/s of activations passed over by norms, biases and the like, by bytes
    dequantize_rows: int = 0  # from so many rows on a 4-bit matrix is dequantised once a load; 0: never
    disk_compute: float = 0.0  # seconds that a byte read from disk takes from computing, where the same cores do both
    overhead: Mapping[str, float] = field(default_factory=dict)  # seconds that any op costs its lane
    correction: Mapping[str, float] = field(default_factory=dict)  # measured over predicted seconds, by lane
    process_bytes: int = 0  # host memory of a process that has loaded no model
    context_bytes: int = 0  # GPU memory that the driver and the libraries take
    disk_table: Sequence[Sequence[float]] = ()  # to read: bytes of an extent, threads of a queue, bytes/s it reads

    def lane_overhead(self, lane: str) -> float:
        return self.overhead.get(lane, 0.0)

    def to_json(self) -> str:
        """A readable profile, a curve to a line; `from_json` reads it back."""
        return "{\n" + ",\n".join(f' "{f.name}": {_lines(getattr(self, f.name))}' for f in fields(self)) + "\n}\n"

    @classmethod
    def from_json(cls, text: str, origin: str = "profile") -> Hardware:
        """Read a profile; raises HardwareError naming `origin` and what is wrong with it."""
        try:
            found = parse_json(text, origin)
        except JsonError as error:
            raise HardwareError(str(error)) from error
        if not isinstance(found, dict):
            raise HardwareError(f"{origin} holds no profile")
        needed = [f.name for f in fields(cls) if f.name not in OPTIONAL]
        missing = [name for name in needed if name not in found]
        if missing:
            raise HardwareError(f"{origin} lacks {', '.join(missing)}; measure the machine anew")
        try:
            return cls(**{f.name: _typed(f.name, str(f.type), found[f.name]) for f in fields(cls) if f.name in found})
        except HardwareError as error:
            raise HardwareError(f"{origin}: {error}") from error

    @classmethod
    def from_file(cls, path: Path, origin: str | None = None) -> Hardware:
        """Read a profile's file; raises HardwareError."""
        try:
            return cls.from_json(read_text(path), origin or str(path))
        except JsonError as error:
            raise HardwareError(str(error)) from error

    def limited(self, gpu: int | None = None, host: int | None = None, disk: int | None = None) -> Hardware:
        """The same machine with other capacities, in bytes; None keeps one."""
        return replace(
            self,
            gpu_bytes=self.gpu_bytes if gpu is None else gpu,
            host_bytes=self.host_bytes if host is None else host,
            disk_bytes=self.disk_bytes if disk is None else disk,
        )

    def capped(self, gpu: int | None = None, host: int | None = None, disk: int | None = None) -> Hardware:
        """The same machine with these capacities, in bytes; None: its own, less a margin."""
        left = 1 - MARGIN
        return self.limited(
            int(self.gpu_bytes * left) if gpu is None else gpu,
            int(self.host_bytes * left) if host is None else host,
            int(self.disk_bytes * left) if disk is None else disk,
        )


OPTIONAL = ("disk_compute", "dequantize_rows", "overhead", "correction", "process_bytes", "context_bytes", "disk_table")
CURVES = ("h2d", "d2h", "h2d_pageable", "d2h_pageable", "disk_read", "disk_write", "prefill_attention", "elementwise")
SCALARS: dict[str, tuple[type, ...]] = {"str": (str,), "bool": (bool,), "int": (int,), "float": (int, float)}
POSITIVE = ("disk_rows", "device_read", "host_read")
CURVES_BY_FORMAT = ("matmul", "decode_attention", "host_attention")
RATES = (
    *CURVES,
    *CURVES_BY_FORMAT,
    *("disk_rows", "device_read", "host_read", "disk_compute", "overhead", "correction"),
)


def _lines(value: Any) -> str:
    """JSON of a field: what a mapping or a table holds has a line each."""
    if isinstance(value, Mapping) and value:
        return "{\n  " + ",\n  ".join(f"{json.dumps(k)}: {json.dumps(_plain(v))}" for k, v in value.items()) + "\n }"
    if isinstance(value, tuple | list) and value:
        return "[\n  " + ",\n  ".join(json.dumps(_plain(v)) for v in value) + "\n ]"
    return json.dumps(_plain(value))


def _plain(value: Any) -> Any:
    """Numbers that are whole are written so."""
    if isinstance(value, Curve):
        return _plain(value.points)
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _typed(name: str, kind: str, value: Any) -> Any:
    """A field's value from JSON; raises HardwareError where it is of another kind."""
    try:
        if name in CURVES:
            return _curve(value)
        if name in CURVES_BY_FORMAT:
            return {key: _curve(points) for key, points in value.items()}
        if kind.startswith("Mapping"):
            return {key: float(_number(number)) for key, number in value.items()}
        if name == "disk_table":
            return tuple(_table_row(row) for row in value)
        if not isinstance(value, SCALARS[kind]):
            raise TypeError(f"{value!r} is no {kind}")
        if kind in ("int", "float"):
            return _number(value, kind, above_zero=name in POSITIVE)
    except (HardwareError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise HardwareError(f"{name}: {error}") from error
    return value


def _number(value: Any, kind: str = "float", *, above_zero: bool = False) -> Any:
    """A figure that is finite and not negative; raises TypeError or HardwareError."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no {kind}")
    if not math.isfinite(value) or value < 0 or (above_zero and value == 0):
        raise HardwareError(f"{value!r} is not {'above 0' if above_zero else 'a number from 0 on'}")
    return value


def _table_row(row: Any) -> tuple[float, ...]:
    found = tuple(float(_number(n, above_zero=True)) for n in row)
    if len(found) != 3:
        raise HardwareError(f"a row has {len(found)} numbers; it needs bytes, threads and bytes/s")
    return found


def _curve(points: Any) -> Curve:
    return Curve(tuple((float(size), float(rate)) for size, rate in points))


def median_of(profiles: Sequence[Hardware]) -> Hardware:
    """The last profile with the median of all of them for every rate: a machine that others use is not always alike.

    Of a curve the sizes stay that all profiles have.
    """

    def middle(name: str) -> Any:
        values = [getattr(p, name) for p in profiles]
        if name in CURVES:
            return _median_curve(values)
        if name in CURVES_BY_FORMAT:
            return {kind: _median_curve([v[kind] for v in values]) for kind in values[-1]}
        if name in ("overhead", "correction"):
            return {lane: median(v.get(lane, values[-1][lane]) for v in values) for lane in values[-1]}
        return median(values)

    return replace(profiles[-1], **{name: middle(name) for name in RATES})


def _median_curve(curves: Sequence[Curve]) -> Curve:
    rates = [dict(c.points) for c in curves]
    shared = sorted(set(rates[0]).intersection(*rates))
    return Curve(tuple((size, median(r[size] for r in rates)) for size in shared))


def profile_names() -> list[str]:
    """The profiles that ship with the package."""
    return sorted(p.stem for p in PROFILE_DIR.glob("*.json"))


def load_profile(name: str | Path) -> Hardware:
    """A shipped profile by name ("t4"), or the file of one; raises HardwareError when there is neither."""
    shipped = PROFILE_DIR / f"{str(name).lower()}.json"
    path = shipped if shipped.is_file() else Path(name).expanduser()
    if not path.is_file():
        raise HardwareError(f"{name} is no file and no known machine; known are {', '.join(profile_names())}")
    return Hardware.from_file(path, str(name))
