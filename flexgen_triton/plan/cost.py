"""The only cost formula: how long an op takes on a machine."""

from __future__ import annotations

from collections.abc import Mapping

from .formats import WeightFormat
from .hardware import Curve, Hardware, HardwareError
from .schedule import Cost, Lane, Op, Work

DENSE_BYTES = 2  # of a weight that was dequantised


def seconds(op: Op, hardware: Hardware) -> float:
    """Time of one op alone on its lane: what any op costs there, and its bytes or its arithmetic at their rates."""
    lane = op.lane.value
    if op.kind.cost is Cost.WORK:
        assert op.work is not None, op
        cost = _compute_seconds(op.work, hardware, on_host=op.lane is Lane.HOST_ATTENTION)
    elif op.bytes:
        cost = _transfer(op, hardware).seconds(op.bytes)
    else:
        cost = 0.0
    return hardware.lane_overhead(lane) + cost * hardware.correction.get(lane, 1.0)


def _transfer(op: Op, hardware: Hardware) -> Curve:
    if op.pageable:
        return hardware.h2d_pageable
    return {
        Lane.DISK_IN: hardware.disk_read,
        Lane.DISK_OUT: hardware.disk_write,
        Lane.H2D: hardware.h2d,
        Lane.D2H: hardware.d2h,
    }[op.lane]


def _compute_seconds(work: Work, hardware: Hardware, *, on_host: bool) -> float:
    """Products, then attention, then all that passes over activations: a kernel each, one after another."""
    total = sum(_product_seconds(kind, flops, work, hardware) for kind, flops in work.products)
    total += hardware.elementwise.seconds(work.hidden_bytes)
    if work.prompt_flops:
        total += work.prompt_flops / hardware.prefill_attention.rate(work.prompt_len)
    if work.cache_bytes:
        rates = hardware.host_attention if on_host else hardware.decode_attention
        total += _of(rates, work.cache_format, hardware).seconds(work.cache_bytes)
    if work.gathered_bytes:
        total += work.gathered_bytes / hardware.h2d.rate(work.gathered_bytes)
    return total + work.lookups / hardware.disk_rows + work.streamed_bytes * hardware.disk_compute


def _product_seconds(form: WeightFormat, flops: float, work: Work, hardware: Hardware) -> float:
    """Seconds of a product, with dequantising where the format is dequantised: once for a load."""
    dense_from = form.dense_rows(hardware.dequantize_rows)
    if not 0 < dense_from <= work.rows:
        return flops / _of(hardware.matmul, form.rates, hardware).rate(work.rows)
    parameters = flops / (2 * work.rows)
    moved = parameters * (form.parameter_bytes + DENSE_BYTES)
    once = moved / hardware.device_read if work.first_of_load else 0.0
    return once + flops / _of(hardware.matmul, "float16", hardware).rate(work.rows)


def _of(curves: Mapping[str, Curve], kind: str, hardware: Hardware) -> Curve:
    """The curve of a format; raises HardwareError where the profile has none."""
    if kind not in curves:
        raise HardwareError(f"the profile of {hardware.name} has no figures for {kind}; it has {', '.join(curves)}")
    return curves[kind]
