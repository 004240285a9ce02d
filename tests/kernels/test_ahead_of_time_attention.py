"""The machine code of decode attention, dense and sparse, for every chip: what it may use and cost.

Each chip compiles what its launchers pick for the shapes below. A compilation takes a second or two, so element type,
block length and, but for the 4-bit decode, shape alternate over the chips; EVERY_SHAPE=1 in the environment compiles
each chip's every shape. Where instructions per element are judged, all are compiled.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from ahead_of_time import Case, Compiled

from flexgen_triton.kernels.attention_decode import MERGE_CONSTANTS, decode_constants
from flexgen_triton.kernels.attention_sparse import gather_constants
from flexgen_triton.kernels.chips import CHIPS

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
SHAPES = [(64, 1), (128, 1), (80, 4), (128, 16)]  # head dim, query heads to a K/V head
BLOCKS = (64, 8, 1)  # tokens
COUNTED = ("sm_80", "sm_90")
EVERY = bool(os.environ.get("EVERY_SHAPE"))
MOST_INSTRUCTIONS = 4.5  # an element of K or V; an H200 at full bandwidth can issue 4.4, an A100 6.3


def attention(kernel: str, chip: str, dtype: str, dim: int, group: int, block_len: int) -> Case:
    """One of the four kernels that go over K: "decode" or "scores", "_q4" or not."""
    dense, q4 = kernel.startswith("decode"), kernel.endswith("_q4")
    constants = decode_constants(CHIPS[chip], DTYPES[dtype], dim, group, block_len, q4=q4)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    cached = "*i16" if q4 else f"*{dtype}"
    signature = {"q_ptr": f"*{dtype}", "k_ptr": cached, "lens_ptr": "*i32", "lse_ptr": "*fp32", "scale": "fp32"}
    strides = ["qb", "qh", "kn", "kb", "kh", "ls"]
    if q4:
        signature["ks_ptr"] = "*i32"
        strides += ["ksn", "ksb", "ksh"]
    if dense:
        signature |= {"v_ptr": cached, "o_ptr": "*fp32"} | ({"vs_ptr": "*i32"} if q4 else {})
        strides += ["vn", "vb", "vh", "os", "ob", "oh"] + (["vsn", "vsb", "vsh"] if q4 else [])
    else:
        signature["scores_ptr"] = "*fp32"
        strides.append("sr")
    return Case(
        label=f"{kernel}-{dtype}-D{dim}-group{group}-T{block_len}",
        module=f"flexgen_triton.kernels.attention_{'decode' if dense else 'sparse'}",
        kernel=f"_{kernel}_kernel",
        chip=chip,
        signature=signature | dict.fromkeys(["kv_heads", *(f"stride_{name}" for name in strides)], "i32"),
        constexprs=constants,
        elements=(2 if dense else 1) * dim * constants["BLOCK_T"],
        unaligned=("stride_ls", "stride_ksh", "stride_vsh"),  # as for odd counts of sequences and heads
        **options,
    )


def gather(chip: str, dtype: str, dim: int, group: int, block_len: int, *, q4: bool) -> Case:
    constants = gather_constants(CHIPS[chip], dim, group, block_len, q4=q4)
    num_warps = constants.pop("num_warps")
    pointers = {"places_ptr": "*i64", "scores_ptr": "*fp32", "lse_ptr": "*fp32", "keep_ptr": "*i32", "o_ptr": "*fp32"}
    pointers |= {"v_ptr": "*i16", "vs_ptr": "*fp16"} if q4 else {"v_ptr": f"*{dtype}"}
    strides = ["vn", "vb", "vh", "os", "ob", "oh"] + (["vsn", "vsb", "vsh"] if q4 else [])
    integers = ["num_heads", "num_picks", "first", "capacity", *(f"stride_{name}" for name in strides)]
    return Case(
        label=f"gather{'_q4' * q4}-{dtype}-D{dim}-T{block_len}",
        module="flexgen_triton.kernels.attention_sparse",
        kernel=f"_gather{'_q4' * q4}_kernel",
        chip=chip,
        signature=pointers | dict.fromkeys(integers, "i32"),
        constexprs=constants,
        num_warps=num_warps,
    )


def merge(chip: str, dtype: str, dim: int) -> Case:
    strides = ("stride_ob", "stride_oh", "stride_ps", "stride_ls")
    return Case(
        label=f"merge-{dtype}-D{dim}",
        module="flexgen_triton.kernels.attention_decode",
        kernel="_merge_kernel",
        chip=chip,
        signature={"parts_ptr": "*fp32", "lses_ptr": "*fp32", "o_ptr": f"*{dtype}", "lse_ptr": "*fp32"}
        | dict.fromkeys(("slots", "num_heads", *strides), "i32"),
        constexprs={"D": dim, "BLOCK_D": 1 << (dim - 1).bit_length(), "BLOCK_S": MERGE_CONSTANTS["BLOCK_S"]},
        num_warps=MERGE_CONSTANTS["num_warps"],
        unaligned=("stride_ls",),
    )


def shipped() -> Iterator[Case]:
    for at, chip in enumerate(CHIPS.values()):
        dtypes = [dtype for dtype in DTYPES if dtype == "fp16" or chip.has_bf16]
        for n, (dim, group) in enumerate(SHAPES):
            dtype, block_len = dtypes[(at + n) % len(dtypes)], BLOCKS[(at + n) % 3]
            mine = EVERY or n == at % 4
            if mine or group == 1:
                yield attention("decode_q4", chip.name, dtype, dim, group, block_len)
            if mine:
                yield attention("decode", chip.name, dtype, dim, group, block_len)
        dtype, dim, block_len = dtypes[at % len(dtypes)], (64, 128, 80)[at % 3], BLOCKS[at % 3]
        for q4 in (False, True):
            if EVERY or q4 == bool(at % 2):
                yield attention("scores" + "_q4" * q4, chip.name, dtype, dim, 1, block_len)
            if EVERY or q4 != bool(at % 2):
                yield gather(chip.name, dtype, dim, 1, block_len, q4=q4)
        if EVERY or at % 3 == 0:
            yield merge(chip.name, dtype, dim)


def counted() -> Iterator[Case]:
    for chip in COUNTED:
        for dtype in DTYPES:
            for dim in (64, 128):
                yield attention("decode_q4", chip, dtype, dim, 1, 64)


def greedy() -> Case:
    """A kernel that must not pass: a tile four times too large for a warp, its codes unpacked in portable Triton."""
    case = attention("decode_q4", "sm_80", "fp16", 128, 1, 64)
    return replace(case, label="greedy", constexprs={**case.constexprs, "BLOCK_T": 128, "ASM": False})


SHIPPED, COSTS = list(shipped()), list(counted())


@pytest.fixture(scope="module")
def compiled(compile_for) -> dict[str, Compiled]:
    return compile_for([*SHIPPED, *COSTS], [COSTS[0], greedy()])


def judge(case: Case, result: Compiled) -> list[str]:
    """List what is wrong with a kernel; empty if all is well."""
    chip = CHIPS[case.chip]
    wrong = []
    if result.stack or result.spills:
        wrong.append(f"{result.stack} bytes of stack, {result.spills} spills")
    if result.shared > chip.shared_bytes:
        wrong.append(f"{result.shared} bytes of shared memory of {chip.shared_bytes}")
    if case.elements and chip.has_mma and not result.matrix:
        wrong.append("no matrix instructions")
    if str(case) in map(str, [*COSTS, greedy()]) and result.per_element > MOST_INSTRUCTIONS:
        wrong.append(f"{result.per_element:.2f} instructions per element")
    return wrong


@pytest.mark.grid(cover=["case.kernel"])
@pytest.mark.parametrize("case", SHIPPED, ids=str)
def test_every_kernel_fits_its_chip(compiled, case):
    assert not judge(case, compiled[str(case)])


@pytest.mark.grid(cover=["case.chip"])
@pytest.mark.parametrize("case", COSTS, ids=str)
def test_4_bit_decode_costs_few_instructions(compiled, case):
    result = compiled[str(case)]
    assert result.per_element > 1  # the loop was found
    assert not judge(case, result)


def test_the_gates_can_fail(compiled):
    spills, slow = judge(greedy(), compiled[str(greedy())])
    assert "spills" in spills and "per element" in slow
    fine = compiled[str(COSTS[0])]
    assert judge(COSTS[0], replace(fine, matrix=False)) == ["no matrix instructions"]
    assert "shared memory" in judge(COSTS[0], replace(fine, shared=1 << 20))[0]
