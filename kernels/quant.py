"""Matrices to P16 and back on the GPU (formats.py has the layout, and the references that these equal to the bit).

`quantize_weight`: [N, K] -> codes int16 [N/256, K/4, 256], scales fp16 [N/256, K/G, 2, 256]. `dequantize_weight` is its
inverse but for rounding. Both are bound by memory: a program takes one group of some rows, four planes of G/4 columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chips import chip_of
from .formats import SMALLEST_SCALE
from .sizes import BLOCK_ROWS, WEIGHT_GROUPS
from .unpack import unpack

ROWS = 64  # of one program: 32 to 128 numbers of each thread's own, and reads of whole 128-byte lines
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)


@triton.jit
def _load_plane(w_ptr, stride_wn, offs_n, k, N, K):
    # Beyond K the last number is repeated, which changes neither minimum nor maximum.
    w = tl.load(w_ptr + offs_n.to(tl.int64)[:, None] * stride_wn + tl.minimum(k, K - 1)[None, :], (offs_n < N)[:, None])
    return w.to(tl.float32)


@triton.jit
def _code(w, low, scale, k, K):
    x = tl.div_rn(w - low[:, None], scale[:, None])
    x = (tl.minimum(tl.maximum(x, 0.0), 15.0) + 12582912.0) - 12582912.0  # 1.5 * 2^23: rounds half to even
    return tl.where((k < K)[None, :], x.to(tl.int32), 0)


@triton.jit
def _quantize_kernel(w_ptr, code_ptr, scale_ptr, N, K, stride_wn, G: tl.constexpr, ROWS: tl.constexpr):
    """Grid (groups, padded rows / ROWS)."""
    P: tl.constexpr = G // 4
    group = tl.program_id(0)
    groups = tl.num_programs(0)
    start_n = tl.program_id(1) * ROWS
    offs_n = start_n + tl.arange(0, ROWS)
    offs_p = tl.arange(0, P)
    k = group * G + offs_p
    w0 = _load_plane(w_ptr, stride_wn, offs_n, k, N, K)
    w1 = _load_plane(w_ptr, stride_wn, offs_n, k + P, N, K)
    w2 = _load_plane(w_ptr, stride_wn, offs_n, k + 2 * P, N, K)
    w3 = _load_plane(w_ptr, stride_wn, offs_n, k + 3 * P, N, K)
    low = tl.min(tl.minimum(tl.minimum(w0, w1), tl.minimum(w2, w3)), 1)
    high = tl.max(tl.maximum(tl.maximum(w0, w1), tl.maximum(w2, w3)), 1)
    scale = tl.maximum(tl.div_rn(high - low, 15.0), _SMALLEST_SCALE).to(tl.float16)
    minimum = low.to(tl.float16)
    s = scale.to(tl.float32)
    low = minimum.to(tl.float32)
    word = _code(w0, low, s, k, K) | (_code(w1, low, s, k + P, K) << 4)
    word |= (_code(w2, low, s, k + 2 * P, K) << 8) | (_code(w3, low, s, k + 3 * P, K) << 12)

    block = (start_n // 256).to(tl.int64) * groups + group
    offs_c = tl.multiple_of(start_n % 256, ROWS) + tl.arange(0, ROWS)
    real = offs_n < N
    code_ptrs = code_ptr + block * (P * 256) + offs_p[:, None] * 256 + offs_c[None, :]
    tl.store(code_ptrs, tl.trans(tl.where(real[:, None], word, 0)).to(tl.int16))
    scale_ptr += block * 512
    tl.store(scale_ptr + offs_c, tl.where(real, scale, 0.0))
    tl.store(scale_ptr + 256 + offs_c, tl.where(real, minimum, 0.0))


@triton.jit
def _store_plane(out_ptrs, code, scale, minimum, k, mask_n, K):
    w = tl.trans(code.to(tl.float32) * scale[None, :] + minimum[None, :])
    tl.store(out_ptrs, w.to(out_ptrs.dtype.element_ty), mask=mask_n[:, None] & (k < K)[None, :])


@triton.jit
def _dequantize_kernel(
    code_ptr, scale_ptr, out_ptr, N, K, stride_on, G: tl.constexpr, ROWS: tl.constexpr, ASM: tl.constexpr
):
    """Grid (groups, rows / ROWS)."""
    P: tl.constexpr = G // 4
    group = tl.program_id(0)
    start_n = tl.program_id(1) * ROWS
    offs_n = start_n + tl.arange(0, ROWS)
    offs_c = tl.multiple_of(start_n % 256, ROWS) + tl.arange(0, ROWS)
    offs_p = tl.arange(0, P)
    block = (start_n // 256).to(tl.int64) * tl.num_programs(0) + group
    words = tl.load(code_ptr + block * (P * 256) + offs_p[:, None] * 256 + offs_c[None, :])
    scale = tl.load(scale_ptr + block * 512 + offs_c).to(tl.float32)
    minimum = tl.load(scale_ptr + block * 512 + 256 + offs_c).to(tl.float32)
    q0, q1, q2, q3 = unpack(words, tl.float16, ASM)
    k = group * G + offs_p
    mask_n = offs_n < N
    out_ptrs = out_ptr + offs_n.to(tl.int64)[:, None] * stride_on + k[None, :]
    _store_plane(out_ptrs, q0, scale, minimum, k, mask_n, K)
    _store_plane(out_ptrs + P, q1, scale, minimum, k + P, mask_n, K)
    _store_plane(out_ptrs + 2 * P, q2, scale, minimum, k + 2 * P, mask_n, K)
    _store_plane(out_ptrs + 3 * P, q3, scale, minimum, k + 3 * P, mask_n, K)


def quantize_weight(weight: Tensor, group_size: int = 64) -> tuple[Tensor, Tensor]:
    """[N, K] with dense rows -> codes int16 [N/256, K/4, 256], scales fp16 [N/256, K/G, 2, 256]."""
    rows, columns = weight.shape
    assert group_size in WEIGHT_GROUPS and weight.stride(1) == 1, (group_size, weight.stride())
    blocks, groups = triton.cdiv(rows, BLOCK_ROWS), triton.cdiv(columns, group_size)
    codes = weight.new_empty(blocks, groups * group_size // 4, BLOCK_ROWS, dtype=torch.int16)
    scales = weight.new_empty(blocks, groups, 2, BLOCK_ROWS, dtype=torch.float16)
    if codes.numel():
        grid = (groups, blocks * BLOCK_ROWS // ROWS)
        _quantize_kernel[grid](
            weight, codes, scales, rows, columns, weight.stride(0), G=group_size, ROWS=ROWS, num_warps=4
        )
    return codes, scales


def dequantize_weight(
    codes: Tensor, scales: Tensor, rows: int, columns: int, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Codes and scales of whole blocks -> the matrix [N, K] they stand for, in `out` (dense rows) if it is given."""
    group_size = 4 * codes.shape[1] // scales.shape[1]
    assert codes.is_contiguous() and scales.is_contiguous() and rows <= BLOCK_ROWS * len(codes), (codes.shape, rows)
    assert group_size in WEIGHT_GROUPS and scales.shape[1] == triton.cdiv(columns, group_size), (codes.shape, columns)
    if out is None:
        out = codes.new_empty(rows, columns, dtype=dtype)
    assert out.shape == (rows, columns) and out.dtype == dtype and out.stride(1) == 1, (out.shape, out.stride())
    if out.numel():
        grid = (scales.shape[1], triton.cdiv(rows, ROWS))
        asm = chip_of(codes.device).asm
        _dequantize_kernel[grid](
            codes, scales, out, rows, columns, out.stride(0), G=group_size, ROWS=ROWS, ASM=asm, num_warps=4
        )
    return out
