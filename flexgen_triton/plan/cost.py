"""The only cost formula: how long an op takes on a machine."""

from __future__ import annotations

from .hardware import Hardware
from .schedule import Lane, Op


def seconds(op: Op, hardware: Hardware) -> float:
    """Time of one op alone on its lane: bytes over the link's rate; for compute the larger of arithmetic and reads."""
    if op.lane is Lane.COMPUTE:
        arithmetic = op.flops / hardware.matmul_rate(op.tokens)
        return hardware.op_seconds + max(arithmetic, op.bytes / hardware.device_read)
    rate = {
        Lane.DISK_IN: hardware.disk_read,
        Lane.DISK_OUT: hardware.disk_write,
        Lane.H2D: hardware.h2d,
        Lane.D2H: hardware.d2h,
    }[op.lane]
    return hardware.op_seconds + op.bytes / rate
