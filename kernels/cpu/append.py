"""Writing one new token of every sequence into the cache, on the CPU.

    k, v [B, Hkv, D] in fp16, bf16 or fp32; positions int32 [B]
    fields (values [pages, B, Hkv, T, D],) of k's dtype, or P16: codes int16 [pages, B, Hkv, T, P/4] and scales fp16
    [pages, B, Hkv, T, P/64, 2], of any strides as far as T

A token at position p goes to page p // T, place p % T. A thread takes a sequence. What 16 or 32 bits hold is copied as
bytes; P16 is made group by group, its bits those of `formats.quantize_kv`, but for the sign of a minimum of zero. The
specification is `elementwise.append_kv_ref`.
"""

from __future__ import annotations

import numpy as np
import torch
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic
from torch import Tensor

from ..formats import LEVELS, SMALLEST_SCALE
from ..sizes import KV_GROUP, kv_width
from .jit import compiled, compiled_parallel, flat, launch, nearest, part, vectorize_apart, widen

_ZERO, _LEVELS, _SMALLEST, _INFINITY = (np.float32(x) for x in (0, LEVELS, SMALLEST_SCALE, np.inf))


def _either(name: str):
    @intrinsic
    def either(typingctx, a, b):
        """The lower or the higher of two, NaN if one is; LLVM vectorises its reductions as Python's it cannot."""

        def codegen(context, builder, signature, args):
            kind = ir.FunctionType(ir.FloatType(), [ir.FloatType()] * 2)
            return builder.call(builder.module.declare_intrinsic(name, [ir.FloatType()], kind), args)

        return types.float32(types.float32, types.float32), codegen

    return either


_lower, _higher = _either("llvm.minimum"), _either("llvm.maximum")


@intrinsic
def _to_half(typingctx, x):
    """The bits of x rounded to fp16."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.int16(types.float32), codegen


@intrinsic
def _to_bits(typingctx, x):
    """The low 16 bits of a whole number."""

    def codegen(context, builder, signature, args):
        return builder.trunc(builder.fptosi(args[0], ir.IntType(32)), ir.IntType(16))

    return types.int16(types.float32), codegen


@compiled
def _range(x):
    """The lowest and the highest of a group."""
    vectorize_apart()
    low, high = _INFINITY, -_INFINITY
    for i in range(len(x)):
        low, high = _lower(low, widen(x[i])), _higher(high, widen(x[i]))
    return low, high


@compiled
def _encode(x, low, scale, weight, words):
    """The codes of a run of x, times `weight`, a power of 16, into words; the first plane's begin the words."""
    vectorize_apart()
    for i in range(len(x)):
        code = nearest((widen(x[i]) - low) / scale)
        code = code if code > _ZERO else _ZERO
        code = code if code < _LEVELS else _LEVELS
        words[i] |= _to_bits(code * weight)


@compiled
def _quantize_row(x, codes, scales):
    """x [D] -> codes [P/4], scales [P/64 * 2]."""
    quarter, dim = len(codes), len(x)
    run = min(KV_GROUP, quarter)  # of a group in one plane
    for i in range(quarter):
        codes[i] = 0
    for g in range(len(scales) // 2):
        first, end = g * KV_GROUP, min((g + 1) * KV_GROUP, dim)
        if first >= dim:
            scales[2 * g], scales[2 * g + 1] = 0, 0
            continue
        low, high = _range(part(x, first, end - first))
        scale = (high - low) / _LEVELS
        scales[2 * g] = _to_half(_SMALLEST if scale < _SMALLEST else scale)
        scales[2 * g + 1] = _to_half(low)
        for at in range(first, end, run):
            words = part(codes, at % quarter, run)
            weight = np.float32(1 << (at // quarter * 4))
            some = part(x, at, min(run, end - at))
            _encode(some, widen(scales[2 * g + 1]), widen(scales[2 * g]), weight, words)


# Places [3, 4] of `_places`: strides of page (none of x), sequence, head and token of x and of the two fields.
@compiled
def _token(numbers, place, page, seq, head, slot):
    """One head's row of one token."""
    at = page * place[0] + seq * place[1] + head * place[2] + slot * place[3]
    return part(numbers, at, place[3])


@compiled
def _copy_row(source, target):
    vectorize_apart()
    for i in range(len(source)):
        target[i] = source[i]


@compiled
def _copy_heads(seq, x, values, places, position, tokens, heads):
    for head in range(heads):
        row = _token(x, places[0], 0, seq, head, 0)
        _copy_row(row, _token(values, places[1], position // tokens, seq, head, position % tokens))


@compiled_parallel
def _copy_kernel(k, v, k_values, v_values, places, positions, tokens, heads):
    """Copy K and V of new tokens to their places, all as bytes."""
    for b in prange(len(positions)):
        seq = np.int64(b)
        _copy_heads(seq, k, k_values, places[0], positions[seq], tokens, heads)
        _copy_heads(seq, v, v_values, places[1], positions[seq], tokens, heads)


@compiled
def _quantize_heads(seq, x, codes, scales, places, position, tokens, heads):
    for head in range(heads):
        row = _token(x, places[0], 0, seq, head, 0)
        where = position // tokens, seq, head, position % tokens
        _quantize_row(row, _token(codes, places[1], *where), _token(scales, places[2], *where))


@compiled_parallel
def _quantize_kernel(k, v, k_codes, v_codes, k_scales, v_scales, places, positions, tokens, heads):
    for b in prange(len(positions)):
        seq = np.int64(b)
        _quantize_heads(seq, k, k_codes, k_scales, places[0], positions[seq], tokens, heads)
        _quantize_heads(seq, v, v_codes, v_scales, places[1], positions[seq], tokens, heads)


Fields = tuple[Tensor, ...]


def append_kv(k: Tensor, v: Tensor, k_fields: Fields, v_fields: Fields, positions: Tensor) -> None:
    """Write one token of every sequence, k and v [B, Hkv, D], a head dense, at `positions` int32 [B] of the cache."""
    num_seqs, heads, dim = k.shape
    tokens = k_fields[0].shape[3]
    assert positions.dtype == torch.int32 and positions.shape == (num_seqs,) and positions.is_contiguous()
    if not num_seqs:
        return
    at = positions.numpy()
    assert 0 <= at.min() <= at.max() < len(k_fields[0]) * tokens, (at, k_fields[0].shape)
    kernel, sources = _quantize_kernel, (k, v)
    if len(k_fields) == 1:
        assert k.dtype == v.dtype == k_fields[0].dtype == v_fields[0].dtype, (k.dtype, k_fields[0].dtype)
        kernel, sources = _copy_kernel, (k.view(torch.uint8), v.view(torch.uint8))
        k_fields, v_fields = (tuple(f.view(torch.uint8) for f in fields) for fields in (k_fields, v_fields))
    places = np.stack([_places(x, fields, dim) for x, fields in zip(sources, (k_fields, v_fields), strict=True)])
    fields = (flat(field) for pair in zip(k_fields, v_fields, strict=True) for field in pair)
    launch(kernel, *map(flat, sources), *fields, places, at, tokens, heads)


def _places(x: Tensor, fields: Fields, dim: int) -> np.ndarray:
    """Strides [3, 4] of x and its fields, as `_token` reads them."""
    places = np.zeros((3, 4), np.int64)
    assert x.stride(2) == 1, x.stride()
    places[0] = 0, *x.stride()[:2], x.shape[2]
    sizes = (x.shape[2],) if len(fields) == 1 else (kv_width(dim) // 4, kv_width(dim) // KV_GROUP * 2)
    for i, (field, size) in enumerate(zip(fields, sizes, strict=True)):
        row = field[0, 0, 0]
        assert field.shape[1:3] == x.shape[:2] and row[0].numel() == size, (field.shape, x.shape)
        assert row.is_contiguous(), field.stride()
        places[1 + i] = *field.stride()[:3], size
    return places
