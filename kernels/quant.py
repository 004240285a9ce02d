"""Matrices out of P16 on the GPU (formats.py has the layout, and the reference that this equals to the bit).

Bound by memory: a program takes one group of some rows, four planes of G/4 columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chips import chip_of
from .sizes import BLOCK_ROWS, WEIGHT_GROUPS
from .unpack import unpack

ROWS = 64  # of one program: 32 to 128 numbers of each thread's own, and reads of whole 128-byte lines


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
