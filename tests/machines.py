"""Machines to plan for in tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from flexgen_triton.plan.hardware import GIB, Curve, Hardware

TWO_CORES = Hardware(
    name="two slow cores",
    source="made up",
    host_is_apart=False,
    gpu_bytes=0,
    host_bytes=16 * GIB,
    disk_bytes=40 * GIB,
    h2d=Curve.flat(5e9),
    d2h=Curve.flat(5e9),
    h2d_pageable=Curve.flat(5e9),
    d2h_pageable=Curve.flat(5e9),
    disk_read=Curve(((65536, 3e8), (1 << 20, 1.2e9), (16 << 20, 2e9))),
    disk_write=Curve(((65536, 2e8), (1 << 20, 0.8e9), (16 << 20, 1e9))),
    disk_rows=20000,
    device_read=2e10,
    host_read=2e10,
    matmul={
        kind: Curve(((1, rate), (16, 8 * rate), (256, 20 * rate)))
        for kind, rate in (("float32", 5e9), ("bfloat16", 4e9), ("float16", 4e9), ("4-bit", 12e9))
    },
    prefill_attention=Curve.flat(2e10),
    decode_attention={kind: Curve.flat(1e10) for kind in ("float32", "bfloat16", "float16", "4-bit")},
    host_attention={kind: Curve.flat(1e10) for kind in ("float32", "bfloat16", "float16", "4-bit")},
    elementwise=Curve.flat(5e9),
    overhead={"compute": 3e-4, "disk_in": 1e-4, "disk_out": 1e-4, "h2d": 5e-5, "d2h": 5e-5},
    process_bytes=GIB // 2,
)

SMALL_GPU = replace(
    TWO_CORES,
    name="a small GPU",
    host_is_apart=True,
    gpu_bytes=8 * GIB,
    h2d=Curve(((65536, 2e9), (4 << 20, 1.2e10))),
    d2h=Curve(((65536, 2e9), (4 << 20, 1.2e10))),
    matmul={
        kind: Curve(((1, 1e11), (128, 8e12), (2048, 2e13))) for kind in ("float32", "bfloat16", "float16", "4-bit")
    },
    prefill_attention=Curve.flat(5e12),
    decode_attention={kind: Curve.flat(1e11) for kind in ("float32", "bfloat16", "float16", "4-bit")},
    elementwise=Curve.flat(1e11),
    device_read=2e11,
    dequantize_rows=64,
    overhead={"compute": 5e-5, "disk_in": 1e-4, "disk_out": 1e-4, "h2d": 2e-5, "d2h": 2e-5},
    context_bytes=300 << 20,
)


def profile_file(directory: Path, hardware: Hardware = TWO_CORES) -> Path:
    """The machine as a file that `--hardware` takes."""
    path = directory / "machine.json"
    path.write_text(hardware.to_json())
    return path
