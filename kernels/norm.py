"""Layer norm and RMS norm of rows: x [M, K], rows of any stride.

A program owns one row and holds it in registers, 32 numbers in a thread (K = 12288 is padded to 16384), so mean and
variance take two passes and memory is read once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

EPS = 1e-5


@triton.jit
def _store_row(y, y_ptr, weight_ptr, bias_ptr, row, offs, K):
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + offs, mask=offs < K, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs, mask=offs < K, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * K + offs, y.to(y_ptr.dtype.element_ty), mask=offs < K)


@triton.jit
def _layer_norm_kernel(x_ptr, weight_ptr, bias_ptr, y_ptr, stride_xm, K, eps, BLOCK_K: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_K)
    x = tl.load(x_ptr + row * stride_xm + offs, mask=offs < K, other=0.0).to(tl.float32)
    centred = tl.where(offs < K, x - tl.sum(x, 0) / K, 0.0)
    y = centred * tl.rsqrt(tl.sum(centred * centred, 0) / K + eps)
    _store_row(y, y_ptr, weight_ptr, bias_ptr, row, offs, K)


@triton.jit
def _rms_norm_kernel(x_ptr, weight_ptr, y_ptr, stride_xm, K, eps, BLOCK_K: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_K)
    x = tl.load(x_ptr + row * stride_xm + offs, mask=offs < K, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / K + eps)
    _store_row(y, y_ptr, weight_ptr, None, row, offs, K)


def warps_of(block_k: int) -> int:
    """A thread holds 32 numbers of a row (16 where warps have 64 threads): several loads of 16 bytes at once."""
    return min(16, max(1, block_k // 1024))


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = EPS,
    out: Tensor | None = None,
) -> Tensor:
    """Layer norm of x [M, K], weight and bias [K]; fp16, bf16 or fp32, computed in fp32, into `out` [M, K], dense."""
    return _launch(_layer_norm_kernel, x, (weight, bias), eps, out)


def rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float = EPS, out: Tensor | None = None) -> Tensor:
    """RMS norm of x [M, K], weight [K]; fp16, bf16 or fp32, computed in fp32, into `out` [M, K], dense."""
    return _launch(_rms_norm_kernel, x, (weight,), eps, out)


def _launch(
    kernel: triton.JITFunction, x: Tensor, parameters: Sequence[Tensor | None], eps: float, out: Tensor | None
) -> Tensor:
    rows, columns = x.shape
    assert x.stride(1) == 1, x.stride()
    assert all(p is None or (p.shape == (columns,) and p.is_contiguous()) for p in parameters), columns
    y = torch.empty(rows, columns, dtype=x.dtype, device=x.device) if out is None else out
    assert y.shape == x.shape and y.dtype == x.dtype and y.is_contiguous(), (y.shape, y.dtype, y.stride())
    block_k = triton.next_power_of_2(columns)
    if rows:
        kernel[(rows,)](x, *parameters, y, x.stride(0), columns, eps, BLOCK_K=block_k, num_warps=warps_of(block_k))
    return y


def layer_norm_ref(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = EPS) -> Tensor:
    """The specification of `layer_norm`, in fp32 or fp64."""
    wide = _wide(x)
    centred = wide - wide.mean(1, keepdim=True)
    return _finish(centred / (centred.square().mean(1, keepdim=True) + eps).sqrt(), weight, bias, x.dtype)


def rms_norm_ref(x: Tensor, weight: Tensor | None = None, *, eps: float = EPS) -> Tensor:
    """The specification of `rms_norm`, in fp32 or fp64."""
    wide = _wide(x)
    return _finish(wide / (wide.square().mean(1, keepdim=True) + eps).sqrt(), weight, None, x.dtype)


def _finish(y: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = y if weight is None else y * _wide(weight)
    return (y if bias is None else y + _wide(bias)).to(dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
