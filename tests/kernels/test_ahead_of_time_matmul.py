"""The machine code of every shipped configuration of the 4-bit products, for every chip: what it may use and cost.

A configuration is compiled with all an epilogue can have. Element type and group size alternate over chips and tiles,
so that each meets each; on sm_90, and where instructions per weight are judged, all are compiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from ahead_of_time import Case, Compiled

from flexgen_triton.kernels.chips import CHIPS
from flexgen_triton.kernels.matmul_q4 import Tile, configurations, groups_per_step

pytestmark = pytest.mark.timeout(900)  # the first test compiles for all: a minute of two free cores, more of busy ones

KINDS = [("fp16", 64), ("bf16", 128), ("bf16", 64), ("fp16", 128)]
COUNTED = ("sm_80", "sm_90")
MOST_INSTRUCTIONS = 3.0  # a weight; an H200 at full bandwidth can issue 4.4, an A100 6.3


def product(chip: str, tile: Tile, dtype: str, group: int, columns: int = 128) -> Case:
    """A product's kernel as `matmul_q4` launches it for K of `columns`, split, with bias, activation and residual."""
    pointers = dict.fromkeys(("x_ptr", "bias_ptr", "residual_ptr", "out_ptr"), f"*{dtype}")
    pointers |= {"code_ptr": "*i16", "scale_ptr": "*fp16", "partial_ptr": "*fp32", "counter_ptr": "*i32"}
    sums = {"sums_ptr": "*fp32"} if tile.kernel == "_middle_kernel" else {}
    integers = dict.fromkeys(("M", "N", "K", "stride_xm", "stride_rm", "stride_om"), "i32")
    groups = groups_per_step(tile, columns, group)
    return Case(
        label=f"{tile.kernel[1:-7]}-{tile.block_m}x{tile.block_n}-{dtype}-{group}" + "-masked" * (columns != 128),
        module="flexgen_triton.kernels.matmul_q4",
        kernel=tile.kernel,
        chip=chip,
        signature=pointers | sums | integers,
        constexprs={
            **({} if sums else {"sums_ptr": None}),
            "G": group,
            "GROUPS": groups,
            "MASK_K": columns % group != 0,
            "ACTIVATION": "gelu" if chip == "sm_90" else "relu",  # the error function alone is a fifth of compiling
            "ASM": CHIPS[chip].asm,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "STAGES": tile.num_stages,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        elements=tile.block_n * group * groups,
        unaligned=() if columns == 128 else ("stride_xm",),
    )


def shipped() -> Iterator[Case]:
    for at, chip in enumerate(CHIPS.values()):
        kinds = [kind for kind in KINDS if chip.has_bf16 or kind[0] == "fp16"]
        for n, tile in enumerate(configurations(chip)):
            every = chip.name == "sm_90" or (chip.name in COUNTED and tile.block_m <= 16)
            for dtype, group in kinds if every else [kinds[(at + n) % len(kinds)]]:
                yield product(chip.name, tile, dtype, group)
    for tile in configurations(CHIPS["sm_80"])[::2]:
        yield product("sm_80", tile, "bf16", 64, columns=129)


def helper(
    label: str, chip: str, kernel: str, pointers: dict[str, str], integers: tuple[str, ...], **constexprs
) -> Case:
    """One of the kernels that only move memory."""
    module = "matmul_q4" if kernel == "_group_sums_kernel" else "quant"
    signature = pointers | dict.fromkeys(integers, "i32")
    return Case(label, f"flexgen_triton.kernels.{module}", kernel, chip, signature, {"G": 64, **constexprs})


def helpers() -> Iterator[Case]:
    p16 = {"code_ptr": "*i16", "scale_ptr": "*fp16"}
    for name, chip in CHIPS.items():
        out = {"out_ptr": "*bf16" if chip.has_bf16 else "*fp16"}
        yield helper(
            "dequantize", name, "_dequantize_kernel", p16 | out, ("N", "K", "stride_on"), ROWS=64, ASM=chip.asm
        )
    for name in ("sm_75", "sm_90", "gfx942"):
        pointers = {"x_ptr": "*fp16", "sums_ptr": "*fp32"}
        yield helper("group-sums", name, "_group_sums_kernel", pointers, ("M", "K", "stride_xm"), BLOCK_M=16)


PRODUCTS = list(shipped())
HELPERS = list(helpers())
SMALL, *_, MIDDLE = configurations(CHIPS["sm_80"])
FAT = replace(product("sm_86", replace(MIDDLE, num_warps=2, num_stages=6), "bf16", 128), label="fat")
SLOW = product("sm_80", SMALL, "fp16", 64)
SLOW = replace(SLOW, label="portable", constexprs={**SLOW.constexprs, "ASM": False})


@pytest.fixture(scope="module")
def compiled(compile_for) -> dict[str, Compiled]:
    return compile_for([*PRODUCTS, *HELPERS], [FAT, SLOW])


@pytest.mark.grid(cover=["case.kernel"])
@pytest.mark.parametrize("case", PRODUCTS + HELPERS, ids=str)
def test_no_spills_and_shared_memory_within_the_chip(case, compiled):
    code = compiled[str(case)]
    assert not code.stack and not code.spills
    assert code.shared <= CHIPS[case.chip].shared_bytes


@pytest.mark.grid(cover=["case.kernel"])
@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_products_use_matrix_instructions(case, compiled):
    """In the loop; and what the chip's own table says of those without is so."""
    assert bool(compiled[str(case)].loop_matrix) == CHIPS[case.chip].has_mma


@pytest.mark.grid(cover=["case.kernel"])
@pytest.mark.parametrize(
    "case", [c for c in PRODUCTS if c.chip in COUNTED and c.constexprs["BLOCK_M"] == 16 and not c.unaligned], ids=str
)
def test_instructions_per_weight(case, compiled):
    assert 1.5 < compiled[str(case)].per_element <= MOST_INSTRUCTIONS


def test_the_gates_notice_what_they_forbid(compiled):
    fat, slow = compiled[str(FAT)], compiled[str(SLOW)]
    assert fat.stack and fat.spills
    assert fat.shared > CHIPS[FAT.chip].shared_bytes
    assert slow.per_element > MOST_INSTRUCTIONS
