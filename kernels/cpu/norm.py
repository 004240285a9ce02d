"""Layer norm of rows, on the CPU, into memory that is given.

    x [M, K], rows of any stride; weight, bias [K], of one dtype; out [M, K] of x's; all fp16, bf16 or fp32

A thread takes a row, which its caches hold: mean and variance take two passes over it and a third writes. Sums are of
many lanes, in fp32. torch's layer norm makes its result, means and deviations anew, `out` or not. The
specification is `norm.layer_norm_ref`.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic
from torch import Tensor

from .jit import compiled, compiled_parallel, flat, launch, part, vectorize_apart, widen

EPS = 1e-5
_ZERO, _ONE = np.float32(0), np.float32(1)


@intrinsic
def _narrow(typingctx, x, row):
    """x rounded to the float that `row` holds, in the type its bits travel in: `widen`'s inverse."""

    def codegen(context, builder, signature, args):
        value, word, short = args[0], ir.IntType(32), ir.IntType(16)
        if row.dtype == types.int16:
            return builder.bitcast(builder.fptrunc(value, ir.HalfType()), short)
        if row.dtype == types.uint16:
            bits = builder.bitcast(value, word)
            odd = builder.and_(builder.lshr(bits, word(16)), word(1))
            rounded = builder.add(builder.add(bits, word(0x7FFF)), odd)  # to the nearest, of two the even one
            quiet = builder.or_(bits, word(0x400000))  # of a NaN the bits above would carry away
            kept = builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded)
            return builder.trunc(builder.lshr(kept, word(16)), short)
        return value

    return row.dtype(types.float32, row), codegen


@compiled
def _moments(x):
    """Mean and variance of x [K]."""
    vectorize_apart()
    total = squares = _ZERO
    for i in range(len(x)):
        total += widen(x[i])
    mean = total / np.float32(len(x))
    for i in range(len(x)):
        centred = widen(x[i]) - mean
        squares += centred * centred
    return mean, squares / np.float32(len(x))


@compiled
def _norm_row(x, weight, bias, eps, y):
    """x [K], weight and bias [K] or empty -> y [K]."""
    vectorize_apart()
    mean, variance = _moments(x)
    scale = _ONE / np.sqrt(variance + eps)
    weighted, biased = len(weight) > 0, len(bias) > 0
    for i in range(len(y)):
        number = (widen(x[i]) - mean) * scale
        if weighted:
            number *= widen(weight[i])
        if biased:
            number += widen(bias[i])
        y[i] = _narrow(number, y)


@compiled
def _norm_part(row, x, stride, weight, bias, eps, y, stride_y, width):
    _norm_row(part(x, row * stride, width), weight, bias, eps, part(y, row * stride_y, width))


@compiled_parallel
def _norm_kernel(x, stride, weight, bias, eps, y, stride_y, width, rows):
    for row in prange(rows):
        _norm_part(np.int64(row), x, stride, weight, bias, eps, y, stride_y, width)


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = EPS, out: Tensor
) -> Tensor:
    """Layer norm of x [M, K], weight and bias [K] or None, computed in fp32, to `out` [M, K], which it returns."""
    rows, width = x.shape
    assert x.shape == out.shape and x.dtype == out.dtype, (x.shape, x.dtype, out.shape, out.dtype)
    assert x.stride(1) == 1 == out.stride(1), (x.stride(), out.stride())
    given = [p for p in (weight, bias) if p is not None]
    assert all(p.shape == (width,) and p.is_contiguous() and p.dtype == given[0].dtype for p in given), given
    if rows:
        source, target = flat(x), flat(out)
        missing = flat(given[0])[:0] if given else source[:0]
        scale, shift = (missing if p is None else flat(p) for p in (weight, bias))
        launch(_norm_kernel, source, x.stride(0), scale, shift, np.float32(eps), target, out.stride(0), width, rows)
    return out
