"""Products with P16 weights on the CPU, in fp32: straight from the codes for few rows of x, by dequantising for many.

    x [M, K] fp32, a row dense; codes int16 [N/256, K/4, 256] and scales fp16 [N/256, K/G, 2, 256], a block dense
    out [M, N] fp32, a row dense

A group of the small kernel: `scale * sum(x * code) + minimum * sum(x)`. Per word row, 256 columns of words are unpacked
once for up to TILE rows of x; the sums of a tile, [TILE, 256] fp32, stay in the first-level cache. x is copied so that
the four numbers a word row meets lie side by side, each times its plane's weight.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numba import prange
from torch import Tensor

from ..formats import dequantize_weight
from ..sizes import BLOCK_ROWS, panel_blocks
from .jit import (
    PLANE_WEIGHTS,
    compiled,
    compiled_parallel,
    flat,
    launch,
    part,
    plane,
    plane0,
    plane1,
    plane2,
    plane3,
    vectorize_apart,
    widen,
)

# GFLOP/s on a 2.5 GHz Xeon with AVX-512, G = 64, M = 1, 2, 4, 8, 16, 32, 64, 128; one thread, then two on shared cores:
#   8192x2048  codes 20 34 52 57 62 63 64 56, panels 3 6 12 22 37 58 76 90, torch's fp32 5 11 11 14 24 39 61 86
#   2048x8192  codes 20 33 52 56 59 59 55 48, panels 3 5  9 15 28 46 70 85, torch's fp32 6 11 11 15 23 40 64 84
#   8192x2048  codes 19 32 52 58 61 64 65 60, panels 3 3  6 11 21 35 48 63, torch's fp32 5 11 11 14 23 38 62 83
CROSSOVER_ROWS = 96
TILE = 4
LINE = 16  # fp32 numbers of a cache line
ZERO = np.float32(0)


def _tile_kernel(num_rows: int) -> Callable:
    """The product of `num_rows` rows of x with one block of weights; their number is a constant, so unrolled."""

    @compiled
    def tile(x, sums, first, words, scales, acc, out):
        """x [K/4, M, 4], sums [K/G, M], words [K/4, 256], scales [K/G, 2, 256] -> out [num_rows, 256]."""
        vectorize_apart()
        groups = scales.shape[0]
        word_rows = words.shape[0] // groups
        for m in range(num_rows):
            for n in range(256):
                out[m, n] = ZERO
        for g in range(groups):
            for m in range(num_rows):
                for n in range(256):
                    acc[m, n] = ZERO
            for i in range(g * word_rows, (g + 1) * word_rows):
                for n in range(256):
                    q0 = plane0(words[i, n])
                    q1 = plane1(words[i, n])
                    q2 = plane2(words[i, n])
                    q3 = plane3(words[i, n])
                    for m in range(num_rows):
                        r = first + m
                        acc[m, n] += x[i, r, 0] * q0 + x[i, r, 1] * q1 + x[i, r, 2] * q2 + x[i, r, 3] * q3
            for m in range(num_rows):
                total = sums[g, first + m]
                for n in range(256):
                    out[m, n] += widen(scales[g, 0, n]) * acc[m, n] + widen(scales[g, 1, n]) * total

    return tile


_tile1, _tile2, _tile4 = _tile_kernel(1), _tile_kernel(2), _tile_kernel(TILE)


@compiled
def _aligned(rows):
    """[rows, 256] fp32 that begins at a cache line: loads across lines cost a tenth of the product."""
    buffer = np.empty(rows * 256 + LINE, np.float32)
    at = (-buffer.ctypes.data & 63) // 4
    return buffer[at : at + rows * 256].reshape(rows, 256)


@compiled
def _arrange(x, stride_xm, K, packed, sums):
    """x's rows as the tiles read them: packed [K/4, M, 4], zero behind K, and the sums of groups [K/G, M]."""
    word_rows, num_rows, _ = packed.shape
    size = word_rows // sums.shape[0]
    for m in range(num_rows):
        for g in range(sums.shape[0]):
            total = ZERO
            for j in range(4):
                weight = np.float32(PLANE_WEIGHTS[j])
                first = (4 * g + j) * size
                for i in range(size):
                    value = x[m * stride_xm + first + i] if first + i < K else ZERO
                    packed[g * size + i, m, j] = value * weight
                    total += value
            sums[g, m] = total


@compiled
def _multiply_block(block, packed, sums, codes, stride_cb, scales, stride_sb, out, stride_om, N):
    """All rows of x with one block of weights."""
    word_rows, M, _ = packed.shape
    groups = len(sums)
    words = codes[block * stride_cb : block * stride_cb + word_rows * 256].reshape(word_rows, 256)
    scale = scales[block * stride_sb : block * stride_sb + groups * 512].reshape(groups, 2, 256)
    acc, y = _aligned(TILE), _aligned(TILE)
    columns = min(256, N - block * 256)
    for m in range(0, M, TILE):
        left = min(TILE, M - m)
        if left == 4:
            _tile4(packed, sums, m, words, scale, acc, y)
        elif left == 1:
            _tile1(packed, sums, m, words, scale, acc, y)
        else:
            _tile2(packed, sums, m, words, scale, acc, y)
            if left == 3:
                _tile1(packed, sums, m + 2, words, scale, acc[2:], y[2:])
        for r in range(left):
            at = (m + r) * stride_om + block * 256
            for n in range(columns):
                out[at + n] = y[r, n]


@compiled_parallel
def _matmul_kernel(x, stride_xm, M, K, codes, stride_cb, scales, stride_sb, groups, word_rows, out, stride_om, N):
    packed = np.empty((word_rows, M, 4), np.float32)
    sums = np.empty((groups, M), np.float32)
    _arrange(x, stride_xm, K, packed, sums)
    for block in prange((N + 255) // 256):
        _multiply_block(np.int64(block), packed, sums, codes, stride_cb, scales, stride_sb, out, stride_om, N)


def matmul_q4(x: Tensor, codes: Tensor, scales: Tensor, rows: int, out: Tensor) -> None:
    """`out = x @ W.T` straight from P16 weights: x [M, K] fp32 -> out [M, rows] fp32, a row dense in each.

    Non-finite numbers of x make their row of `out` non-finite, not always the same way as in fp32: a group's infinite
    sum meets its minimum.
    """
    if not len(x) or not rows:
        return
    _check(x, codes, scales, rows, out)
    sizes = (scales.shape[1], codes.shape[1])
    weight = (flat(codes), codes.stride(0), flat(scales), scales.stride(0), *sizes)
    launch(_matmul_kernel, flat(x), x.stride(0), *x.shape, *weight, flat(out), out.stride(0), rows)


def _check(x: Tensor, codes: Tensor, scales: Tensor, rows: int, out: Tensor) -> None:
    shapes = (x.shape, codes.shape, scales.shape, rows, out.shape)
    assert out.shape == (len(x), rows) and rows <= len(codes) * BLOCK_ROWS and len(codes) == len(scales), shapes
    assert 0 <= codes.shape[1] * 4 - x.shape[1] < codes.shape[1] * 4 // scales.shape[1], shapes
    assert x.dtype == out.dtype == torch.float32 and codes.dtype == torch.int16 and scales.dtype == torch.float16
    assert x.stride(1) == 1 and out.stride(1) == 1 and codes[0].is_contiguous() and scales[0].is_contiguous()


@compiled
def _dequantize_group(words, scales, scale, low, panel, stride):
    """words [G/4, 256], scales [2, 256] -> panel, G rows of 256, `stride` apart; scale and low [256] are scratch."""
    vectorize_apart()
    size = words.shape[0]
    for n in range(256):
        scale[n] = widen(scales[0, n])
        low[n] = widen(scales[1, n])
    for j in range(4):  # a plane at a time: writing four places at once is a third slower
        for i in range(size):
            row = part(panel, (j * size + i) * stride, 256)
            for n in range(256):
                row[n] = plane(words[i, n], j) * scale[n] + low[n]


@compiled
def _dequantize_one(item, codes, stride_cb, scales, stride_sb, blocks, size, panel):
    g, block = item // blocks, item % blocks
    scratch = _aligned(2)
    code_at = block * stride_cb + g * size * 64
    scale_at = block * stride_sb + g * 512
    words = codes[code_at : code_at + size * 64].reshape(size // 4, 256)
    scale = scales[scale_at : scale_at + 512].reshape(2, 256)
    stride = blocks * 256
    _dequantize_group(words, scale, scratch[0], scratch[1], panel[g * size * stride + block * 256 :], stride)


@compiled_parallel
def _dequantize_kernel(codes, stride_cb, scales, stride_sb, groups, blocks, size, panel):
    """`blocks` blocks, each `groups` groups of `size` codes, side by side in the panel."""
    for item in prange(groups * blocks):
        _dequantize_one(np.int64(item), codes, stride_cb, scales, stride_sb, blocks, size, panel)


def dequantize(codes: Tensor, scales: Tensor, panel: Tensor) -> None:
    """Blocks of P16 weights, transposed: [blocks, K/4, 256] and [blocks, K/G, 2, 256] -> panel [K, blocks * 256] fp32.

    The panel is dense and K counts the padding. A number is code * scale + minimum, rounded once.
    """
    blocks, groups = scales.shape[:2]
    assert panel.shape == (4 * codes.shape[1], blocks * BLOCK_ROWS) and panel.is_contiguous(), panel.shape
    sizes = (groups, blocks, len(panel) // groups)
    launch(_dequantize_kernel, flat(codes), codes.stride(0), flat(scales), scales.stride(0), *sizes, flat(panel))


def linear_q4(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    rows: int,
    out: Tensor,
    panel_of: Callable[[int], Tensor] = torch.empty,
) -> None:
    """`out = x @ W.T` from P16 weights by the faster way: x [M, K] fp32 -> out [M, rows] fp32, a row dense in each.

    `panel_of(numbers)` gives the fp32 memory that blocks are dequantised to, where that is the faster way.
    """
    if len(x) < CROSSOVER_ROWS:
        matmul_q4(x, codes, scales, rows, out)
    else:
        _dequantized_product(x, codes, scales, rows, out, panel_of)


def _dequantized_product(
    x: Tensor, codes: Tensor, scales: Tensor, rows: int, out: Tensor, panel_of: Callable[[int], Tensor]
) -> None:
    """A few blocks at a time through an fp32 panel that the product reads from the cache."""
    _check(x, codes, scales, rows, out)
    columns = 4 * codes.shape[1]
    blocks = min(panel_blocks(columns), len(codes))
    buffer = panel_of(columns * blocks * BLOCK_ROWS)
    for block in range(0, -(-rows // BLOCK_ROWS), blocks):
        some = slice(block, block + blocks)
        low, width = block * BLOCK_ROWS, len(codes[some]) * BLOCK_ROWS
        panel = buffer[: columns * width].view(columns, width)
        dequantize(codes[some], scales[some], panel)
        torch.mm(x, panel[: x.shape[1], : rows - low], out=out[:, low : low + width])


def matmul_q4_ref(x: Tensor, codes: Tensor, scales: Tensor, rows: int) -> Tensor:
    """The matrix dequantised by the format's own definition, then one product: [M, K] -> [M, rows] fp32."""
    return x.float() @ dequantize_weight(codes, scales, rows, x.shape[1], torch.float32).T
