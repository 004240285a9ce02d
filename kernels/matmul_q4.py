"""y = activation(x @ w' + bias) + residual for a matrix w [N, K] in P16 (formats.py): kernels, launcher, reference.

    x [M, K] fp16/bf16, codes int16 [N/256, K/4, 256], scales fp16 [N/256, K/G, 2, 256]  ->  y [M, N], fp32 inside

Three ways, by the number of rows M:

- up to 32, `_small_kernel`: x is the left operand. Instructions per weight decide here, so weights stay codes: a word
  is unpacked to four planes, each multiplied with its own quarter of the group's columns of x, and the group's scales
  multiply the accumulator. Codes are exact in 16 bits, so nothing is rounded on the way.
- up to the crossover, `_middle_kernel`: the same with the weight as the left operand, which stays in registers.
- from there on a weight is used so often that unpacking it once is cheaper: `dequantize_weight`, then torch.

The minimums' part of a group is minimum * sum of x over the group, so all of it is one thin product, `group sums of x @
minimums`, after the loop; in fp32's precision, because outliers in x would show.

K is split over programs until the GPU is full. A split's fp32 tile goes to the `Workspace` and the last program to
arrive at a tile adds them in order: deterministic, no second launch. That needs counters which are zero before and
after every call, hence a workspace that outlives it; a memset for each call would cost what it saves.

Tile sizes are closed forms of shape and chip; `configurations()` is all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .chips import Chip, chip_of
from .formats import dequantize_weight as dequantize_weight_ref
from .quant import dequantize_weight
from .sizes import BLOCK_ROWS, FUSED_GROUP, WEIGHT_GROUPS
from .unpack import unpack

SMALL_ROWS = 32
SPLIT_COLUMNS = 512  # of K that a split has at least: fewer do not fill the pipeline of loads
SUMMED = tl.constexpr(16)  # groups whose minimums are added by one product


@triton.jit
def _activate(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        return tl.maximum(y, 0.0)
    elif ACTIVATION == "gelu":
        return 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh z) / 2 is sigmoid(2 z)
        return y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    elif ACTIVATION == "silu":
        return y * tl.sigmoid(y)
    else:
        return y


@triton.jit
def _load_x(x_ptrs, mask_m, k, K, MASK_K: tl.constexpr):
    """One plane of x; a mask of rows alone is taken out of the loop by the compiler, one of columns is not."""
    if MASK_K:
        return tl.load(x_ptrs, mask=mask_m & (k < K), other=0.0)
    else:
        return tl.load(x_ptrs, mask=mask_m, other=0.0)


@triton.jit
def _load_scale(scale_ptr, offs_c):
    """Scales of one group, fp32. The minimums come along: scales alone are two bytes for a thread, and asynchronous
    copies, without which every iteration waits for memory, take at least four."""
    both = tl.load(scale_ptr + offs_c[:, None] + 256 * tl.arange(0, 2)[None, :])
    scale, _ = tl.split(both)
    return scale.to(tl.float32)


@triton.jit
def _group_sums(x_ptr, stride_xm, sums_ptr, offs_m, group, last, M, K, G: tl.constexpr):
    """Sums of x over each of SUMMED groups, fp32 [BLOCK_M, SUMMED]: read if the caller has them, else made here."""
    rows = offs_m.to(tl.int64)[:, None]
    mask = (offs_m < M)[:, None] & (group < last)[None, :]
    if sums_ptr is not None:
        return tl.load(sums_ptr + rows * tl.cdiv(K, G) + group[None, :], mask=mask, other=0.0)
    else:
        part = tl.arange(0, 16)[None, None, :]
        sums = tl.zeros((offs_m.shape[0], SUMMED), tl.float32)
        for start in range(0, G, 16):
            k = (group * G + start)[None, :, None] + part
            x = tl.load(x_ptr + (rows * stride_xm)[:, :, None] + k, mask=mask[:, :, None] & (k < K), other=0.0)
            sums += tl.sum(x.to(tl.float32), 2)
        return sums


@triton.jit
def _add_minimums(
    acc,
    x_ptr,
    stride_xm,
    sums_ptr,
    minimum_ptr,
    offs_m,
    offs_c,
    first,
    last,
    M,
    K,
    G: tl.constexpr,
    WEIGHT_LEFT: tl.constexpr,
):
    """acc + group sums of x @ minimums, over the groups from `first` to `last`.

    In fp32's precision though by matrix instructions: an fp16 minimum is a TF32 number, and a sum is split in two.
    """
    for start in range(first, last, SUMMED):
        group = start + tl.arange(0, SUMMED)
        sums = _group_sums(x_ptr, stride_xm, sums_ptr, offs_m, group, last, M, K, G)
        minimum = tl.load(minimum_ptr + group[:, None] * 512 + offs_c[None, :], mask=(group < last)[:, None], other=0.0)
        minimum = minimum.to(tl.float32)
        high = (sums.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)  # TF32 drops the last 13 bits
        if WEIGHT_LEFT:
            acc = tl.dot(tl.trans(minimum), tl.trans(high), acc, input_precision="tf32")
            acc = tl.dot(tl.trans(minimum), tl.trans(sums - high), acc, input_precision="tf32")
        else:
            acc = tl.dot(high, minimum, acc, input_precision="tf32")
            acc = tl.dot(sums - high, minimum, acc, input_precision="tf32")
    return acc


@triton.jit
def _finish(
    acc,
    bias_ptr,
    residual_ptr,
    out_ptr,
    partial_ptr,
    counter_ptr,
    offs_m,
    offs_n,
    mask_m,
    N,
    stride_rm,
    stride_om,
    tile,
    ACTIVATION: tl.constexpr,
):
    """Sum the splits' accumulators, then bias, activation, residual, and out; offs and masks broadcast to acc's shape.

    The program that arrives last at a tile sums all, in the order of the splits, so the result does not depend on who
    that is. It leaves the counter at zero, for the next call.
    """
    writes = True
    if partial_ptr is not None:
        splits = tl.num_programs(1)
        SIZE: tl.constexpr = acc.shape[0] * acc.shape[1]
        here = tl.arange(0, acc.shape[0])[:, None] * acc.shape[1] + tl.arange(0, acc.shape[1])[None, :]
        partial_ptr += tile.to(tl.int64) * splits * SIZE
        valid = mask_m & (here >= 0)
        tl.store(partial_ptr + tl.program_id(1) * SIZE + here, acc, mask=valid)
        tl.debug_barrier()  # every thread's part is written before one thread says so
        writes = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel") == splits - 1
        if writes:
            acc = tl.zeros_like(acc)
            for split in range(splits):
                acc += tl.load(partial_ptr + split * SIZE + here, mask=valid, other=0.0, cache_modifier=".cg")
            tl.store(counter_ptr + tile, 0)
    if writes:
        mask_n = offs_n < N
        rows = offs_m.to(tl.int64)
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        acc = _activate(acc, ACTIVATION)
        if residual_ptr is not None:
            acc += tl.load(residual_ptr + rows * stride_rm + offs_n, mask=mask_m & mask_n, other=0.0).to(tl.float32)
        tl.store(out_ptr + rows * stride_om + offs_n, acc.to(out_ptr.dtype.element_ty), mask=mask_m & mask_n)


@triton.jit(do_not_specialize=["M"])
def _small_kernel(
    x_ptr,
    code_ptr,
    scale_ptr,
    sums_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    partial_ptr,
    counter_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_rm,
    stride_om,
    G: tl.constexpr,
    GROUPS: tl.constexpr,
    MASK_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ASM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (columns of out / BLOCK_N, splits of K, rows of out / BLOCK_M): x @ w."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    P: tl.constexpr = G // 4
    start_n = tl.program_id(0) * BLOCK_N
    groups = tl.cdiv(K, G)
    steps = groups // GROUPS
    first = tl.program_id(1) * steps // tl.num_programs(1)
    last = (tl.program_id(1) + 1) * steps // tl.num_programs(1)

    offs_m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.multiple_of(start_n % 256, BLOCK_N) + tl.arange(0, BLOCK_N)  # columns of the block of codes
    offs_p = tl.arange(0, P)
    mask_m = (offs_m < M)[:, None]
    block = (start_n // 256).to(tl.int64) * groups
    scale_ptr += block * 512
    step_code_ptr = code_ptr + (block + first * GROUPS) * (P * 256)
    step_scale_ptr = scale_ptr + first * (GROUPS * 512)
    word_offs = offs_p[:, None] * 256 + offs_c[None, :]
    x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm + (first * GROUPS * G + offs_p)[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in tl.range(first, last, num_stages=STAGES):  # said here, the scales' loads run ahead too
        for i in tl.static_range(GROUPS):
            k = (step * GROUPS + i) * G + offs_p[None, :]
            w0, w1, w2, w3 = unpack(tl.load(step_code_ptr + i * P * 256 + word_offs), DTYPE, ASM)
            scale = _load_scale(step_scale_ptr + i * 512, offs_c)
            part = tl.dot(_load_x(x_ptrs + i * G, mask_m, k, K, MASK_K), w0)
            part = tl.dot(_load_x(x_ptrs + (i * G + P), mask_m, k + P, K, MASK_K), w1, part)
            part = tl.dot(_load_x(x_ptrs + (i * G + 2 * P), mask_m, k + 2 * P, K, MASK_K), w2, part)
            part = tl.dot(_load_x(x_ptrs + (i * G + 3 * P), mask_m, k + 3 * P, K, MASK_K), w3, part)
            acc += part * scale[None, :]
        step_code_ptr += GROUPS * P * 256
        step_scale_ptr += GROUPS * 512
        x_ptrs += GROUPS * G
    acc = _add_minimums(
        acc, x_ptr, stride_xm, sums_ptr, scale_ptr + 256, offs_m, offs_c, first * GROUPS, last * GROUPS, M, K,
        G, False,
    )  # fmt: skip
    tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    _finish(
        acc, bias_ptr, residual_ptr, out_ptr, partial_ptr, counter_ptr, offs_m[:, None], offs_n[None, :], mask_m, N,
        stride_rm, stride_om, tile, ACTIVATION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def _middle_kernel(
    x_ptr,
    code_ptr,
    scale_ptr,
    sums_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    partial_ptr,
    counter_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_rm,
    stride_om,
    G: tl.constexpr,
    GROUPS: tl.constexpr,
    MASK_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ASM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The same with the weight as the left operand, which matrix instructions take from registers: (w' @ x')'."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    P: tl.constexpr = G // 4
    start_n = tl.program_id(0) * BLOCK_N
    groups = tl.cdiv(K, G)
    steps = groups // GROUPS
    first = tl.program_id(1) * steps // tl.num_programs(1)
    last = (tl.program_id(1) + 1) * steps // tl.num_programs(1)

    offs_m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.multiple_of(start_n % 256, BLOCK_N) + tl.arange(0, BLOCK_N)
    offs_p = tl.arange(0, P)
    mask_m = (offs_m < M)[None, :]
    block = (start_n // 256).to(tl.int64) * groups
    scale_ptr += block * 512
    step_code_ptr = code_ptr + (block + first * GROUPS) * (P * 256)
    step_scale_ptr = scale_ptr + first * (GROUPS * 512)
    # Loaded the way they are used: a transposition after the load would keep it from being an asynchronous copy.
    word_offs = offs_p[None, :] * 256 + offs_c[:, None]
    x_ptrs = x_ptr + offs_m.to(tl.int64)[None, :] * stride_xm + (first * GROUPS * G + offs_p)[:, None]

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in tl.range(first, last, num_stages=STAGES):
        for i in tl.static_range(GROUPS):
            k = (step * GROUPS + i) * G + offs_p[:, None]
            w0, w1, w2, w3 = unpack(tl.load(step_code_ptr + i * P * 256 + word_offs), DTYPE, ASM)
            scale = _load_scale(step_scale_ptr + i * 512, offs_c)
            part = tl.dot(w0, _load_x(x_ptrs + i * G, mask_m, k, K, MASK_K))
            part = tl.dot(w1, _load_x(x_ptrs + (i * G + P), mask_m, k + P, K, MASK_K), part)
            part = tl.dot(w2, _load_x(x_ptrs + (i * G + 2 * P), mask_m, k + 2 * P, K, MASK_K), part)
            part = tl.dot(w3, _load_x(x_ptrs + (i * G + 3 * P), mask_m, k + 3 * P, K, MASK_K), part)
            acc += part * scale[:, None]
        step_code_ptr += GROUPS * P * 256
        step_scale_ptr += GROUPS * 512
        x_ptrs += GROUPS * G
    acc = _add_minimums(
        acc, x_ptr, stride_xm, sums_ptr, scale_ptr + 256, offs_m, offs_c, first * GROUPS, last * GROUPS, M, K,
        G, True,
    )  # fmt: skip
    tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    _finish(
        acc, bias_ptr, residual_ptr, out_ptr, partial_ptr, counter_ptr, offs_m[None, :], offs_n[:, None], mask_m, N,
        stride_rm, stride_om, tile, ACTIVATION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def _group_sums_kernel(x_ptr, sums_ptr, M, K, stride_xm, G: tl.constexpr, BLOCK_M: tl.constexpr):
    """Grid (groups / SUMMED, rows / BLOCK_M)."""
    groups = tl.cdiv(K, G)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    group = tl.program_id(0) * SUMMED + tl.arange(0, SUMMED)
    sums = _group_sums(x_ptr, stride_xm, None, offs_m, group, groups, M, K, G)
    mask = (offs_m < M)[:, None] & (group < groups)[None, :]
    tl.store(sums_ptr + offs_m.to(tl.int64)[:, None] * groups + group[None, :], sums, mask=mask)


@dataclass(frozen=True, slots=True)
class Tile:
    """A configuration: which kernel, and how much of y a program makes."""

    kernel: str
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    step: int  # columns of K in one iteration
    programs_per_sm: int  # that K is split for: what the registers allow


class Workspace:
    """Device memory that calls on one stream share: splits' tiles, and counters that are zero between calls.

    It grows to what the largest call needs. Calls that may overlap need one each.
    """

    def __init__(self, device: torch.device) -> None:
        self.partials = torch.empty(0, dtype=torch.float32, device=device)
        self.counters = torch.zeros(0, dtype=torch.int32, device=device)

    def reserve(self, tiles: int, numbers: int) -> None:
        """Room for the counters of `tiles` tiles of y and for `numbers` partial sums."""
        if len(self.counters) < tiles:
            self.counters = self.counters.new_zeros(tiles)
        if len(self.partials) < numbers:
            self.partials = self.partials.new_empty(numbers)


def crossover(chip: Chip, group_size: int = FUSED_GROUP) -> int:
    """The number of rows from which dequantising first is faster: by calculation, to be measured."""
    if group_size < FUSED_GROUP:  # a product of G/4 columns takes at least 16 of them
        return 1
    if not chip.has_mma:
        return 9
    return {"sm_90": 192, "sm_100": 65}.get(chip.name, 256)  # sm_100: see tile_of


def tile_of(chip: Chip, rows: int) -> Tile:
    """The configuration for x of M rows."""
    if not chip.has_mma:
        return Tile("_small_kernel", 8, 128, 4, 2, 128, 4)
    # gfx942 has no asynchronous copies to fill more stages with, and the chips with 99 KB hold two programs of three.
    stages = 2 if chip.backend == "hip" else 3 if chip.shared_bytes < 128 << 10 else 4
    if rows <= 16:
        return Tile("_small_kernel", 16, 128, 4, stages, 128, 4)
    # On sm_100 Triton 3.7.1 compiles a product whose left operand was unpacked to a trap, hence no middle kernel there.
    # A step of 128 spills a few registers in both: fp16 and G = 64, the smaller tile on sm_90, the larger on sm_86.
    if rows <= SMALL_ROWS or chip.name == "sm_100":
        return Tile("_small_kernel", 32, 128, 4, stages, 64, 2)
    return Tile("_middle_kernel", 64, 128, 4, min(stages, 3), 64, 2)


def configurations(chip: Chip) -> list[Tile]:
    """Every tile that a launch on this chip can choose."""
    return list(dict.fromkeys(tile_of(chip, rows) for rows in range(1, crossover(chip))))


def groups_per_step(tile: Tile, columns: int, group_size: int) -> int:
    """Groups in one iteration of the loop; a single one where K is not whole steps."""
    return max(1, tile.step // group_size) if columns % tile.step == 0 else 1


def splits_of(chip: Chip, tile: Tile, tiles: int, columns: int) -> int:
    """Into how many parts K is cut: enough to fill the GPU, none of them short."""
    return max(1, min(tile.programs_per_sm * chip.num_sms // tiles, columns // SPLIT_COLUMNS))


def sums_of_groups(x: Tensor, group_size: int, empty: Callable[..., Tensor] | None = None) -> Tensor:
    """Sums of x [M, K] over groups of columns, fp32 [M, K/G], which minimums are multiplied with."""
    rows, columns = x.shape
    sums = (empty or x.new_empty)(rows, triton.cdiv(columns, group_size), dtype=torch.float32)
    if sums.numel():
        grid = (triton.cdiv(sums.shape[1], SUMMED.value), triton.cdiv(rows, 16))
        _group_sums_kernel[grid](x, sums, rows, columns, x.stride(0), G=group_size, BLOCK_M=16)
    return sums


def matmul_q4(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    rows: int,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    workspace: Workspace | None = None,
    empty: Callable[..., Tensor] | None = None,
) -> Tensor:
    """activation(x @ w' + bias) + residual: x [M, K], w [N = rows, K] in P16 -> [M, N] in x's dtype.

    `codes` and `scales` may be whole blocks out of a larger matrix; x, residual and out need dense rows only. Without
    a `workspace` of the caller's each call that splits K clears counters of its own. `empty(*shape, dtype=)` makes
    temporaries on x's device, by default torch does; from the crossover on the matrix is dequantised in each call.
    """
    assert x.shape[0] == 0 or x.stride(1) == 1, x.stride()
    if out is None:
        out = x.new_empty(len(x), rows)
    assert out.shape == (len(x), rows) and out.stride(1) == 1, (out.shape, out.stride())
    assert residual is None or (residual.shape == out.shape and residual.stride(1) == 1)
    if not out.numel():
        return out
    group_size = _group_size(x, codes, scales, rows)
    chip = chip_of(x.device)
    if len(x) >= crossover(chip, group_size):
        dense = dequantize_weight(codes, scales, rows, x.shape[1], x.dtype)
        return dense_linear(x, dense, bias, activation, residual, out)
    tile = tile_of(chip, len(x))
    is_middle = tile.kernel == "_middle_kernel"
    sums = sums_of_groups(x, group_size, empty) if is_middle else None  # once: too large a part of a tile's work there
    _launch(tile, chip, group_size, x, codes, scales, rows, bias, activation, residual, out, sums, workspace)
    return out


def _group_size(x: Tensor, codes: Tensor, scales: Tensor, rows: int) -> int:
    group_size = 4 * codes.shape[1] // scales.shape[1]
    given = (x.shape, codes.shape, scales.shape, rows)
    assert codes.is_contiguous() and scales.is_contiguous() and len(codes) == len(scales), given
    assert group_size in WEIGHT_GROUPS and scales.shape[1] == triton.cdiv(x.shape[1], group_size), given
    assert len(codes) == triton.cdiv(rows, BLOCK_ROWS), given
    return group_size


def _launch(
    tile: Tile,
    chip: Chip,
    group_size: int,
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    rows: int,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    out: Tensor,
    group_sums: Tensor | None,
    workspace: Workspace | None,
) -> None:
    m, columns = x.shape
    grid_n, grid_m = triton.cdiv(rows, tile.block_n), triton.cdiv(m, tile.block_m)
    splits = splits_of(chip, tile, grid_n * grid_m, columns)
    partials = counters = None
    if splits > 1:
        workspace = workspace or Workspace(x.device)
        workspace.reserve(grid_n * grid_m, grid_n * grid_m * splits * tile.block_m * tile.block_n)
        partials, counters = workspace.partials, workspace.counters
    kernel = _middle_kernel if tile.kernel == "_middle_kernel" else _small_kernel
    kernel[grid_n, splits, grid_m](
        x,
        codes,
        scales,
        group_sums,
        bias,
        residual,
        out,
        partials,
        counters,
        m,
        rows,
        columns,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        out.stride(0),
        G=group_size,
        GROUPS=groups_per_step(tile, columns, group_size),
        MASK_K=columns % group_size != 0,
        ACTIVATION=activation,
        ASM=chip.asm,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


ACTIVATIONS = {
    None: lambda y: y,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}


def dense_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None, out: Tensor
) -> Tensor:
    """activation(x @ weight' + bias) + residual into `out`, by torch: rounded to x's dtype after each of the three."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)
    if activation is not None:
        out.copy_(ACTIVATIONS[activation](out))
    return out if residual is None else out.add_(residual)


def matmul_q4_ref(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    rows: int,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The specification: the same in the precision of fp64 (codes are dequantised to fp32), unrounded."""
    weight = dequantize_weight_ref(codes, scales, rows, x.shape[1], torch.float32).double()
    y = ACTIVATIONS[activation](F.linear(x.double(), weight, None if bias is None else bias.double()))
    return y if residual is None else y + residual.double()
