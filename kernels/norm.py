"""Layer norm and RMS norm of rows, with the sum before it and the group sums behind it.

x [M, K], rows of any stride. With a residual the row is x + residual, rounded to x's dtype as the sum kernel by itself
would, and is returned too: it is the next residual. With a group size G (a power of two) the output's sums over each G
columns come along, fp32 [M, K/G], of the elements as rounded: what a 4-bit product multiplies its minima with
(matmul_q4.py), read from registers instead of from memory.

A program owns one row and holds it in registers, 32 numbers in a thread (K = 12288 is padded to 16384), so mean and
variance take two passes and memory is read once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

EPS = 1e-5


class Normed(NamedTuple):
    """`y` [M, K]; `total` [M, K] is x + residual, or x; `sums` fp32 [M, K/G] of y, or None without a group size."""

    y: Tensor
    total: Tensor
    sums: Tensor | None


@triton.jit
def _load_row(x_ptr, residual_ptr, total_ptr, stride_xm, stride_rm, stride_tm, row, offs, K):
    # fp32 [BLOCK_K]; what lies behind K is 0
    x = tl.load(x_ptr + row * stride_xm + offs, mask=offs < K, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row * stride_rm + offs, mask=offs < K, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + row * stride_tm + offs, x, mask=offs < K)
    return x.to(tl.float32)


@triton.jit
def _store_row(y, y_ptr, sums_ptr, weight_ptr, bias_ptr, row, offs, K, BLOCK_K: tl.constexpr, GROUP: tl.constexpr):
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + offs, mask=offs < K, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs, mask=offs < K, other=0.0).to(tl.float32)
    y = tl.where(offs < K, y, 0.0).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row * K + offs, y, mask=offs < K)
    if sums_ptr is not None:
        sums = tl.sum(y.to(tl.float32).reshape([BLOCK_K // GROUP, GROUP]), 1)
        offs_g = tl.arange(0, BLOCK_K // GROUP)
        groups = tl.cdiv(K, GROUP)
        tl.store(sums_ptr + row * groups + offs_g, sums, mask=offs_g < groups)


@triton.jit
def _layer_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    total_ptr,
    sums_ptr,
    stride_xm,
    stride_rm,
    stride_tm,
    K,
    eps,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_K)
    x = _load_row(x_ptr, residual_ptr, total_ptr, stride_xm, stride_rm, stride_tm, row, offs, K)
    centred = tl.where(offs < K, x - tl.sum(x, 0) / K, 0.0)
    y = centred * tl.rsqrt(tl.sum(centred * centred, 0) / K + eps)
    _store_row(y, y_ptr, sums_ptr, weight_ptr, bias_ptr, row, offs, K, BLOCK_K, GROUP)


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    total_ptr,
    sums_ptr,
    stride_xm,
    stride_rm,
    stride_tm,
    K,
    eps,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_K)
    x = _load_row(x_ptr, residual_ptr, total_ptr, stride_xm, stride_rm, stride_tm, row, offs, K)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / K + eps)
    _store_row(y, y_ptr, sums_ptr, weight_ptr, bias_ptr, row, offs, K, BLOCK_K, GROUP)


def warps_of(block_k: int) -> int:
    """A thread holds 32 numbers of a row (16 where warps have 64 threads): several loads of 16 bytes at once."""
    return min(16, max(1, block_k // 1024))


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    eps: float = EPS,
    group_size: int | None = None,
    out: Tensor | None = None,
) -> Normed:
    """Layer norm of x + residual, [M, K] each, weight and bias [K]; fp16, bf16 or fp32, computed in fp32.

    `out` [M, K], dense, becomes `y`.
    """
    return _launch(_layer_norm_kernel, x, weight, bias, residual, eps, group_size, out)


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    eps: float = EPS,
    group_size: int | None = None,
    out: Tensor | None = None,
) -> Normed:
    """RMS norm of x + residual, [M, K] each, weight and bias [K]; fp16, bf16 or fp32, computed in fp32.

    `out` [M, K], dense, becomes `y`.
    """
    return _launch(_rms_norm_kernel, x, weight, bias, residual, eps, group_size, out)


def _launch(
    kernel: triton.JITFunction,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    group_size: int | None,
    out: Tensor | None,
) -> Normed:
    rows, columns = x.shape
    assert x.stride(1) == 1 and (residual is None or (residual.shape == x.shape and residual.stride(1) == 1))
    assert all(p is None or (p.shape == (columns,) and p.is_contiguous()) for p in (weight, bias)), columns
    group = group_size or 1
    y = torch.empty(rows, columns, dtype=x.dtype, device=x.device) if out is None else out
    assert y.shape == x.shape and y.dtype == x.dtype and y.is_contiguous(), (y.shape, y.dtype, y.stride())
    total = x if residual is None else torch.empty_like(y)
    sums = torch.empty(rows, -(-columns // group), dtype=torch.float32, device=x.device) if group_size else None
    block_k = max(group, triton.next_power_of_2(columns))
    if rows:
        kernel[(rows,)](
            x,
            residual,
            weight,
            bias,
            y,
            total,
            sums,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            total.stride(0),
            columns,
            eps,
            BLOCK_K=block_k,
            GROUP=group,
            num_warps=warps_of(block_k),
        )
    return Normed(y, total, sums)


def layer_norm_ref(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    eps: float = EPS,
    group_size: int | None = None,
) -> Normed:
    """The specification of `layer_norm`, in fp32 or fp64."""
    total = x if residual is None else x + residual
    wide = _wide(total)
    centred = wide - wide.mean(1, keepdim=True)
    return _finish(centred / (centred.square().mean(1, keepdim=True) + eps).sqrt(), weight, bias, total, group_size)


def rms_norm_ref(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    eps: float = EPS,
    group_size: int | None = None,
) -> Normed:
    """The specification of `rms_norm`, in fp32 or fp64."""
    total = x if residual is None else x + residual
    wide = _wide(total)
    return _finish(wide / (wide.square().mean(1, keepdim=True) + eps).sqrt(), weight, bias, total, group_size)


def _finish(y: Tensor, weight: Tensor | None, bias: Tensor | None, total: Tensor, group_size: int | None) -> Normed:
    y = y if weight is None else y * _wide(weight)
    y = (y if bias is None else y + _wide(bias)).to(total.dtype)
    if group_size is None:
        return Normed(y, total, None)
    padded = torch.nn.functional.pad(_wide(y), (0, -y.shape[1] % group_size))
    return Normed(y, total, padded.unflatten(1, (-1, group_size)).sum(2).float())


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
