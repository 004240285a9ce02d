"""Attention of one new token per sequence over its cached tokens, on the CPU, at the speed memory is read.

    q [B, H, D]; K and V as `KVSegment`s in fp16, bf16, fp32 or P16; query head h reads K and V head h // (H / Hkv)

A thread takes a (sequence, K and V head). A chunk of CHUNK tokens is widened to fp32 in the first-level cache, where
every query head of the group uses it. Dense attention is an online softmax over chunks and segments; its state,
(maximum, sum, weighted V), lies in arrays between the segments' launches. Scores are base-2 logarithms throughout.

Sparse attention (FlexGen, Sheng et al., ICML 2023, section 5) scores all of K, keeps the scores, and reads only the
rows of V that weigh most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic, overload
from torch import Tensor

from .cpu_jit import compiled, compiled_parallel, flat, launch, plane, vectorize_apart, widen
from .formats import KV_GROUP, KVSegment, kv_width

CHUNK = 32  # tokens: 16 KiB of fp32 at D = 128
LOG2E = math.log2(math.e)
LOWEST = np.float32(-3e38)
ZERO = np.float32(0)


class _State(NamedTuple):
    """An online softmax between two segments: arrays over B * H query heads."""

    best: Tensor  # fp32, the highest score yet
    total: Tensor  # fp32, the sum of 2 ** (score - best)
    acc: Tensor  # [B * H, width] fp32, V weighted alike


@intrinsic
def _nearest(typingctx, x):
    """The nearest whole number."""

    def codegen(context, builder, signature, args):
        return builder.call(builder.module.declare_intrinsic("llvm.rint", [ir.FloatType()]), args)

    return types.float32(types.float32), codegen


@intrinsic
def _power_of_two(typingctx, n):
    """2 ** n for a whole n of -126..127, made of exponent bits."""

    def codegen(context, builder, signature, args):
        word = ir.IntType(32)
        biased = builder.add(builder.fptosi(args[0], word), ir.Constant(word, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(word, 23)), ir.FloatType())

    return types.float32(types.float32), codegen


# 2 ** f = exp(f ln 2) on -1/2..1/2 by its series, to the term below 2 ** -24
_C1, _C2, _C3, _C4, _C5, _C6, _C7 = (np.float32(math.log(2) ** n / math.factorial(n)) for n in range(1, 8))
_ONE = np.float32(1)


@compiled
def _exp2(x):
    """2 ** x for x <= 0 in arithmetic that vectorises; 0 below the normal numbers."""
    n = _nearest(x)
    f = x - n
    series = _ONE + f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * (_C5 + f * (_C6 + f * _C7))))))
    return ZERO if x < np.float32(-126) else series * _power_of_two(n)


@compiled
def _widen_numbers(source, wide):
    vectorize_apart()
    for i in range(len(source)):
        wide[i] = widen(source[i])


@compiled
def _widen_words(words, scales, tokens, width, wide):
    """words [tokens, width/4], scales [tokens, width/64, 2] -> wide [tokens, width], all as vectors."""
    vectorize_apart()
    size = width // 4
    for t in range(tokens):
        for first in range(0, width, min(size, KV_GROUP)):
            j = first // size
            source = t * size + first % size
            target = t * width + first
            at = 2 * (t * (width // KV_GROUP) + first // KV_GROUP)
            scale = widen(scales[at])
            low = widen(scales[at + 1])
            if size == 16:  # constant counts, so that whole vectors are what LLVM makes of them
                for i in range(16):
                    wide[target + i] = plane(words[source + i], j) * scale + low
            elif size == 32:
                for i in range(32):
                    wide[target + i] = plane(words[source + i], j) * scale + low
            else:
                for i in range(64):
                    wide[target + i] = plane(words[source + i], j) * scale + low


def _widen_tokens(store, strides, block, seq, head, token, count, width, wide):
    """Tokens `[token, token + count)` of a block's K or V, widened: wide [count * width] fp32."""


@overload(_widen_tokens)
def _(store, strides, block, seq, head, token, count, width, wide):
    def numbers(store, strides, block, seq, head, token, count, width, wide):
        at = block * strides[0] + seq * strides[1] + head * strides[2] + token * width
        _widen_numbers(store[0][at : at + count * width], wide)

    def words(store, strides, block, seq, head, token, count, width, wide):
        size = width // 4
        at = block * strides[0] + seq * strides[1] + head * strides[2] + token * size
        pairs = 2 * (width // KV_GROUP)
        scale_at = block * strides[3] + seq * strides[4] + head * strides[5] + token * pairs
        codes = store[0][at : at + count * size]
        _widen_words(codes, store[1][scale_at : scale_at + count * pairs], count, width, wide)

    return numbers if len(store) == 1 else words


@compiled
def _score(q, wide, count, scores):
    """q [width], wide [count * width] -> scores [count]."""
    vectorize_apart()
    width = len(q)
    for t in range(count):
        total = ZERO
        for d in range(width):
            total += q[d] * wide[t * width + d]
        scores[t] = total


@compiled
def _add_values(weights, wide, count, acc):
    """acc [width] += weights [count] @ wide [count * width], four tokens at a time."""
    vectorize_apart()
    width = len(acc)
    whole = count - count % 4
    for t in range(0, whole, 4):
        w0, w1, w2, w3 = weights[t], weights[t + 1], weights[t + 2], weights[t + 3]
        at = t * width
        for d in range(width):
            acc[d] += (
                w0 * wide[at + d]
                + w1 * wide[at + width + d]
                + w2 * wide[at + 2 * width + d]
                + w3 * wide[at + 3 * width + d]
            )
    for t in range(whole, count):
        w0 = weights[t]
        for d in range(width):
            acc[d] += w0 * wide[t * width + d]


@compiled
def _soften(scores, count, best):
    """Scores to weights in place, 2 ** (score - the new highest) -> (the new highest, their sum)."""
    vectorize_apart()
    for t in range(count):
        best = max(best, scores[t])
    total = ZERO
    for t in range(count):
        scores[t] = _exp2(scores[t] - best)
        total += scores[t]
    return best, total


@compiled_parallel
def _decode_kernel(q, k, v, strides, lens, tokens, kv_heads, best, total, acc):
    """A segment's part of dense attention: q [B * H, width]; strides [2, 6] of K and of V."""
    heads = q.shape[0] // len(lens)
    group = heads // kv_heads
    width = q.shape[1]
    for item in prange(len(lens) * kv_heads):
        seq = item // kv_heads
        head = item % kv_heads
        first = seq * heads + head * group
        wide = np.empty(CHUNK * width, np.float32)
        wide_v = np.empty(CHUNK * width, np.float32)
        weights = np.empty(CHUNK, np.float32)
        for block in range((lens[seq] + tokens - 1) // tokens):
            valid = min(tokens, lens[seq] - block * tokens)
            for token in range(0, valid, CHUNK):
                count = min(CHUNK, valid - token)
                _widen_tokens(k, strides[0], block, seq, head, token, count, width, wide)
                _widen_tokens(v, strides[1], block, seq, head, token, count, width, wide_v)
                for r in range(first, first + group):
                    _score(q[r], wide, count, weights)
                    high, part = _soften(weights, count, best[r])
                    if high > best[r]:
                        shrink = _exp2(best[r] - high)
                        total[r] *= shrink
                        for d in range(width):
                            acc[r, d] *= shrink
                        best[r] = high
                    total[r] += part
                    _add_values(weights, wide_v, count, acc[r])


@compiled_parallel
def _scores_kernel(q, k, strides, starts, lens, tokens, kv_heads, scores):
    """A segment's scores, behind those of the segments before it: scores [B * H, S] from column starts[seq] on."""
    heads = q.shape[0] // len(lens)
    group = heads // kv_heads
    width = q.shape[1]
    for item in prange(len(lens) * kv_heads):
        seq = item // kv_heads
        head = item % kv_heads
        first = seq * heads + head * group
        wide = np.empty(CHUNK * width, np.float32)
        for block in range((lens[seq] + tokens - 1) // tokens):
            valid = min(tokens, lens[seq] - block * tokens)
            for token in range(0, valid, CHUNK):
                count = min(CHUNK, valid - token)
                _widen_tokens(k, strides[0], block, seq, head, token, count, width, wide)
                at = starts[seq] + block * tokens + token
                for r in range(first, first + group):
                    _score(q[r], wide, count, scores[r, at : at + count])


@compiled_parallel
def _select_kernel(scores, lens, keep, picks, num_picks, lse):
    """Per query head the positions to read, ascending, and the base-2 log-sum-exp of all its scores."""
    heads = scores.shape[0] // len(lens)
    for r in prange(scores.shape[0]):
        seq = r // heads
        length = lens[seq]
        num_picks[r] = 0
        lse[r] = -np.inf
        if length > 0:
            weights = scores[r, :length].copy()
            best, total = _soften(weights, length, LOWEST)
            lse[r] = best + np.float32(np.log2(total))
            num_picks[r] = _select(scores[r, : length - 1], max(keep[seq], 0), picks[r])


@compiled
def _select(scores, keep, picks):
    """The `keep` highest positions, the lower of equals, then the one behind the scores -> how many."""
    num = len(scores)
    if keep >= num:
        for t in range(num + 1):
            picks[t] = t
        return num + 1
    count = 0
    if keep > 0:
        threshold = np.partition(scores, num - keep)[num - keep]
        above = 0
        for t in range(num):
            above += scores[t] > threshold
        ties = keep - above
        for t in range(num):
            tie = scores[t] == threshold and ties > 0
            ties -= tie
            if (scores[t] > threshold or tie) and count < keep:
                picks[count] = t
                count += 1
    picks[count] = num
    return count + 1


@compiled_parallel
def _gather_kernel(v, strides, scores, lse, picks, num_picks, starts, lens, tokens, kv_heads, acc):
    """A segment's part of the weighted rows of V: acc [B * H, width] += 2 ** (score - lse) * v."""
    heads = acc.shape[0] // len(lens)
    group = heads // kv_heads
    width = acc.shape[1]
    for r in prange(acc.shape[0]):
        seq = r // heads
        head = r % heads // group
        row = np.empty(width, np.float32)
        weight = np.empty(1, np.float32)
        for n in range(num_picks[r]):
            t = picks[r, n] - starts[seq]
            if 0 <= t < lens[seq]:
                _widen_tokens(v, strides[1], t // tokens, seq, head, t % tokens, 1, width, row)
                weight[0] = _exp2(scores[r, picks[r, n]] - lse[r])
                _add_values(weight, row, 1, acc[r])


def decode_attention(q: Tensor, segments: Sequence[KVSegment], *, scale: float | None = None) -> Tensor:
    """Attention of one new token per sequence over the union of the segments: q [B, H, D] -> [B, H, D] in q's dtype.

    Computed in fp32. A sequence without a valid token gets zeros. `scale` is 1 / sqrt(D) unless given.
    """
    return decode_attention_lse(q, segments, scale=scale)[0]


def decode_attention_lse(
    q: Tensor, segments: Sequence[KVSegment], *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """`decode_attention`, and the log-sum-exp of the scores, [B, H] fp32: -inf for a sequence without a token."""
    num_seqs, num_heads, dim = q.shape
    query = _query(q, segments, scale)
    rows, width = query.shape
    state = _State(torch.full((rows,), float(LOWEST)), torch.zeros(rows), torch.zeros(rows, width))
    for segment in segments:
        if segment.k[0].numel() and num_seqs:
            k, v, strides = _stores(segment, width)
            launch(_decode_kernel, query.numpy(), k, v, strides, *_sizes(segment), *(t.numpy() for t in state))
    out = state.acc / state.total.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    lse = (state.best + torch.log2(state.total)) / LOG2E
    return _shaped(out, q), lse.view(num_seqs, num_heads)


def sparse_decode_attention(
    q: Tensor, segments: Sequence[KVSegment], keep: Tensor, *, scale: float | None = None
) -> Tensor:
    """Attention that reads few rows of V: q [B, H, D], keep [B] int32 -> [B, H, D] in q's dtype.

    Every query head scores all tokens, and adds V of the `keep[b]` highest of the earlier ones (the lower position of
    equals) and of the newest, the last segment's last valid token, with their weights in the softmax over all tokens:
    they do not sum to 1.
    """
    num_seqs, num_heads, _ = q.shape
    query = _query(q, segments, scale)
    rows, width = query.shape
    acc = torch.zeros(rows, width)
    lens = torch.stack([s.lens for s in segments]).to(torch.int32)
    starts = (lens.cumsum(0, dtype=torch.int32) - lens).contiguous()
    lengths = lens.sum(0, dtype=torch.int32)
    longest = int(lengths.max()) if num_seqs else 0
    if not longest:
        return _shaped(acc, q)
    scores = np.empty((rows, longest), np.float32)
    picks = np.empty((rows, min(longest, max(0, int(keep.max())) + 1)), np.int32)
    num_picks, lse = np.empty(rows, np.int32), np.empty(rows, np.float32)
    parts = [(s, _stores(s, width), start.numpy()) for s, start in zip(segments, starts, strict=True) if s.k[0].numel()]
    for segment, (k, _, strides), start in parts:
        launch(_scores_kernel, query.numpy(), k, strides, start, *_sizes(segment), scores)
    launch(_select_kernel, scores, lengths.numpy(), keep.to(torch.int32).contiguous().numpy(), picks, num_picks, lse)
    for segment, (_, v, strides), start in parts:
        picked = (scores, lse, picks, num_picks, start)
        launch(_gather_kernel, v, strides, *picked, *_sizes(segment), acc.numpy())
    return _shaped(acc, q)


def _query(q: Tensor, segments: Sequence[KVSegment], scale: float | None) -> Tensor:
    """q with scale and base in it, padded as the K it meets: [B * H, width] fp32."""
    dim = q.shape[-1]
    packed = {len(s.k) for s in segments} | {len(s.v) for s in segments}
    assert len(packed) <= 1, "segments of one format"
    width = kv_width(dim) if 2 in packed else dim
    query = torch.zeros(q.shape[0] * q.shape[1], width)
    query[:, :dim] = q.reshape(-1, dim)
    return query.mul_((dim**-0.5 if scale is None else scale) * LOG2E)


def _shaped(out: Tensor, q: Tensor) -> Tensor:
    """[B * H, width] to q's shape and dtype."""
    return out[:, : q.shape[-1]].to(q.dtype).view(q.shape)


def _sizes(segment: KVSegment) -> tuple[np.ndarray, int, int]:
    """Valid tokens, tokens of a block, K and V heads."""
    lens = segment.lens.to(torch.int32).contiguous().numpy()
    return lens, segment.k[0].shape[3], segment.k[0].shape[2]


def _stores(segment: KVSegment, width: int) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...], np.ndarray]:
    """K and V as dense vectors, and the strides of their blocks, sequences and heads: [2, 6]."""
    strides = np.zeros((2, 2, 3), np.int64)
    sizes = (width,) if len(segment.k) == 1 else (width // 4, width // KV_GROUP * 2)
    for i, store in enumerate((segment.k, segment.v)):
        for j, (part, size) in enumerate(zip(store, sizes, strict=True)):
            assert part[0, 0, 0].is_contiguous() and part[0, 0, 0, 0].numel() == size, (part.shape, part.stride())
            strides[i, j] = part.stride()[:3]
    return tuple(map(flat, segment.k)), tuple(map(flat, segment.v)), strides.reshape(2, 6)
