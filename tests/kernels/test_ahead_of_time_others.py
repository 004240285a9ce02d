"""Prefill attention, norms and the small kernels, compiled for every chip with the configurations that launch there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from ahead_of_time import Case, Compiled

from flexgen_triton.kernels.attention_prefill import shape_of
from flexgen_triton.kernels.chips import CHIPS, Chip
from flexgen_triton.kernels.elementwise import BLOCK_N
from flexgen_triton.kernels.norm import warps_of
from flexgen_triton.kernels.sizes import kv_width

HEAD_DIMS = (64, 80, 128)
WIDEST = 12288  # OPT-175B
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def arguments(pointers: dict[str, str], integers: tuple[str, ...]) -> dict[str, str]:
    return {f"{name}_ptr": f"*{kind}" for name, kind in pointers.items()} | dict.fromkeys(integers, "i32")


def prefill(chip: Chip, dim: int, kind: str) -> Case:
    shape = shape_of(chip, DTYPES[kind], dim)
    strides = tuple(f"stride_{x}" for x in ("qt", "qh", "kt", "kh", "vt", "vh", "ot", "oh"))
    signature = arguments(dict.fromkeys(("q", "k", "v", "out"), kind) | {"tiles": "i32"}, strides)
    tile = {"BLOCK_M": shape.block_m, "BLOCK_N": shape.block_n, "BLOCK_D": power_of_two(dim)}
    return Case(
        f"prefill-{dim}-{kind}",
        "flexgen_triton.kernels.attention_prefill",
        "_prefill_attention_kernel",
        chip.name,
        signature | {"scale": "fp32"},
        {"H": 32, "HEADS_PER_KV": 1, "D": dim} | tile,
        shape.num_warps,
        shape.num_stages,
    )


def norm(chip: Chip, name: str, width: int, extras: bool) -> Case:
    """With everything a norm can have, or with nothing."""
    optional = ("weight", "bias") if name == "layer_norm" else ("weight",)
    pointers = dict.fromkeys(("x", "y", *(optional if extras else ())), "fp16")
    missing = {} if extras else {f"{x}_ptr": None for x in optional}
    block = power_of_two(width)
    return Case(
        f"{name}-{width}-{'all' if extras else 'plain'}",
        "flexgen_triton.kernels.norm",
        f"_{name}_kernel",
        chip.name,
        arguments(pointers, ("stride_xm", "K")) | {"eps": "fp32"},
        {"BLOCK_K": block} | missing,
        warps_of(block),
    )


def write_kv(chip: Chip, dim: int, four_bits: bool, prompt: bool) -> Case:
    missing = {} if prompt else {"sequences_ptr": None}
    pointers = dict.fromkeys(("k", "v"), "fp16") | dict.fromkeys(("positions", *(("sequences",) * prompt)), "i32")
    if four_bits:
        pointers |= dict.fromkeys(("k_codes", "v_codes"), "i16") | dict.fromkeys(("k_scales", "v_scales"), "fp16")
        strides, tile = ("ck", "cb", "ch", "sk", "sb", "sh"), {"P": kv_width(dim)}
    else:
        pointers |= dict.fromkeys(("k_values", "v_values"), "fp16")
        strides, tile = ("vk", "vb", "vh"), {"BLOCK_D": power_of_two(dim)}
    return Case(
        f"write-{dim}-{'4bit' if four_bits else '16bit'}-{'prompt' if prompt else 'token'}",
        "flexgen_triton.kernels.elementwise",
        "_write_kv_q4_kernel" if four_bits else "_write_kv_kernel",
        chip.name,
        arguments(pointers, (*(f"stride_{x}" for x in ("xn", "xh", *strides)), "N", "TOKENS")),
        {"D": dim, "BLOCK_N": BLOCK_N} | tile | missing,
    )


def cases() -> Iterator[Case]:
    """Every kernel on every chip; prefill in bf16 and fp32 on one each, for the same registers or far fewer."""
    for chip in CHIPS.values():
        if chip.has_mma:
            for dim in HEAD_DIMS:
                yield prefill(chip, dim, "fp16")
        yield norm(chip, "layer_norm", WIDEST, extras=True)
        yield norm(chip, "rms_norm", 2048, extras=False)
        yield write_kv(chip, 128, four_bits=False, prompt=False)
        yield write_kv(chip, 80, four_bits=True, prompt=False)
        yield write_kv(chip, 128, four_bits=True, prompt=True)
    yield write_kv(CHIPS["sm_90"], 64, four_bits=True, prompt=True)
    yield prefill(CHIPS["sm_90"], 128, "bf16")
    yield prefill(CHIPS["sm_80"], 128, "fp32")


CASES = list(cases())


@pytest.fixture(scope="module")
def compiled(compile_for) -> dict[str, Compiled]:
    return compile_for(CASES)


@pytest.mark.grid(cover=["case.kernel"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fits_its_chip(compiled, case):
    found = compiled[str(case)]
    assert (found.stack, found.spills) == (0, 0)
    assert found.shared <= CHIPS[case.chip].shared_bytes


@pytest.mark.grid(cover=["case.kernel"])
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.label.startswith("prefill") and "fp32" not in case.label], ids=str
)
def test_prefill_uses_matrix_instructions(compiled, case):
    assert compiled[str(case)].matrix
