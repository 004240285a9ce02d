"""Attention of one new token per sequence over its cached tokens, on the CPU.

    q [B, H, D]; K and V as `KVSegment`s in fp16, bf16, fp32 or P16; query head h reads K and V head h // (H / Hkv)

A thread takes a (sequence, K and V head) and chunks of CHUNK tokens. A few tokens at a time are widened to fp32 in the
first-level cache, where every query head of the group uses them; a single head reads 16 bits as they are. Meanwhile
the chunk that comes next is asked for. Dense attention is an online softmax over chunks and segments; its state,
(maximum, sum, weighted V), lies in arrays between the segments' launches. Scores are base-2 logarithms throughout.

Sparse attention (FlexGen, Sheng et al., ICML 2023, section 5) scores all of K, keeps the scores, and reads only the
rows of V that weigh most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic, overload
from torch import Tensor

from .cpu_jit import compiled, compiled_parallel, flat, launch, part, prefetch, vectorize_apart, widen
from .formats import KV_GROUP, KVSegment, kv_width

CHUNK = 32  # tokens between two looks at the softmax's state
STEP = 8  # tokens at a time; of P16, a quarter of the bytes, a whole chunk
AHEAD = 8  # rows of V that are on their way while one is added
LOG2E = math.log2(math.e)
LOWEST = np.float32(-3e38)
ZERO = np.float32(0)


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


def _widen_plane(j: int):
    @intrinsic
    def widen_plane(typingctx, words, source, scales, at, wide, target):
        """wide[target:][:16] = scales[at] * plane j of words[source:][:16] + scales[at + 1].

        One vector, made by hand: LLVM unrolls loops of 16 and 32 into single numbers.
        """

        def codegen(context, builder, signature, args):
            words, source, scales, at, wide, target = args
            number, lanes = ir.IntType(32), ir.VectorType(ir.IntType(32), 16)

            def address(array, kind, at):
                return builder.gep(context.make_array(kind)(context, builder, array).data, [at])

            def spread(value):
                empty = ir.Constant(ir.VectorType(value.type, 16), ir.Undefined)
                first = builder.insert_element(empty, value, number(0))
                return builder.shuffle_vector(first, empty, ir.Constant(lanes, [0] * 16))

            def vectors(pointer):
                return builder.bitcast(pointer, ir.VectorType(pointer.type.pointee, 16).as_pointer())

            packed = builder.zext(builder.load(vectors(address(words, signature.args[0], source)), align=2), lanes)
            codes = builder.lshr(packed, ir.Constant(lanes, [4 * j] * 16))
            codes = builder.and_(codes, ir.Constant(lanes, [15] * 16))
            numbers = builder.sitofp(codes, ir.VectorType(ir.FloatType(), 16))
            scale = address(scales, signature.args[2], at)
            low = builder.gep(scale, [number(1)])
            scaled = builder.fmul(numbers, spread(builder.load(scale)), flags=("contract",))
            result = builder.fadd(scaled, spread(builder.load(low)), flags=("contract",))
            builder.store(result, vectors(address(wide, signature.args[4], target)), align=4)
            return context.get_dummy_value()

        return types.void(words, types.intp, scales, types.intp, wide, types.intp), codegen

    return widen_plane


_widen_plane0, _widen_plane1, _widen_plane2, _widen_plane3 = (_widen_plane(j) for j in range(4))


@compiled
def _widen_words(words, scales, tokens, width, wide):
    """words [tokens * width/4], scales [tokens * width/64 * 2] fp32 -> wide [tokens * width]."""
    vectorize_apart()
    size = width // 4
    pairs = width // KV_GROUP * 2
    for t in range(tokens):
        row = t * width
        for i in range(0, size, 16):
            source = t * size + i
            _widen_plane0(words, source, scales, t * pairs + i // 64 * 2, wide, row + i)
            _widen_plane1(words, source, scales, t * pairs + (size + i) // 64 * 2, wide, row + size + i)
            _widen_plane2(words, source, scales, t * pairs + (2 * size + i) // 64 * 2, wide, row + 2 * size + i)
            _widen_plane3(words, source, scales, t * pairs + (3 * size + i) // 64 * 2, wide, row + 3 * size + i)


# Offsets [2, 2, 4] of `_stores`: of K and V; of the numbers and the scales; strides of block, sequence, head and token.
@compiled
def _offset(offsets, i, j, where, token):
    """Where a token of `where`, (block, sequence, head), begins."""
    start = where[0] * offsets[i, j, 0] + where[1] * offsets[i, j, 1] + where[2] * offsets[i, j, 2]
    return start + token * offsets[i, j, 3]


def _widen_tokens(store, offsets, i, where, token, count, width, wide):
    """Tokens `[token, token + count)` of a block to fp32: wide [CHUNK * width], and room for the scales behind it."""


@overload(_widen_tokens)
def _(store, offsets, i, where, token, count, width, wide):
    def numbers(store, offsets, i, where, token, count, width, wide):
        _widen_numbers(part(store[0], _offset(offsets, i, 0, where, token), count * width), wide)

    def words(store, offsets, i, where, token, count, width, wide):
        num_scales = count * offsets[i, 1, 3]
        scales = part(wide, CHUNK * width, num_scales)
        _widen_numbers(part(store[1], _offset(offsets, i, 1, where, token), num_scales), scales)
        codes = part(store[0], _offset(offsets, i, 0, where, token), count * width // 4)
        _widen_words(codes, scales, count, width, part(wide, 0, CHUNK * width))

    return numbers if len(store) == 1 else words


def _prefetch_tokens(store, offsets, i, where, token, count):
    """Ask for what `_widen_tokens` will read; tokens that do not exist do no harm."""


@overload(_prefetch_tokens)
def _(store, offsets, i, where, token, count):
    def numbers(store, offsets, i, where, token, count):
        at = _offset(offsets, i, 0, where, token)
        for n in range(0, count * offsets[i, 0, 3], 64 // store[0].itemsize):
            prefetch(store[0], at + n)

    def words(store, offsets, i, where, token, count):
        at = _offset(offsets, i, 0, where, token)
        for n in range(0, count * offsets[i, 0, 3], 32):
            prefetch(store[0], at + n)
        at = _offset(offsets, i, 1, where, token)
        for n in range(0, count * offsets[i, 1, 3], 32):
            prefetch(store[1], at + n)

    return numbers if len(store) == 1 else words


@compiled
def _score(q, rows, count, scores):
    """q [width], rows [count * width] of K, widened or not -> scores [count], four tokens at a time."""
    vectorize_apart()
    width = len(q)
    whole = count - count % 4
    for t in range(0, whole, 4):
        row0, row1 = part(rows, t * width, width), part(rows, (t + 1) * width, width)
        row2, row3 = part(rows, (t + 2) * width, width), part(rows, (t + 3) * width, width)
        total0 = total1 = total2 = total3 = ZERO
        for d in range(width):
            total0 += q[d] * widen(row0[d])
            total1 += q[d] * widen(row1[d])
            total2 += q[d] * widen(row2[d])
            total3 += q[d] * widen(row3[d])
        scores[t], scores[t + 1], scores[t + 2], scores[t + 3] = total0, total1, total2, total3
    for t in range(whole, count):
        row0 = part(rows, t * width, width)
        total0 = ZERO
        for d in range(width):
            total0 += q[d] * widen(row0[d])
        scores[t] = total0


@compiled
def _add_values(weights, rows, count, acc):
    """acc [width] += weights [count] @ rows [count * width] of V, widened or not, four tokens at a time."""
    vectorize_apart()
    width = len(acc)
    whole = count - count % 4
    for t in range(0, whole, 4):
        row0, row1 = part(rows, t * width, width), part(rows, (t + 1) * width, width)
        row2, row3 = part(rows, (t + 2) * width, width), part(rows, (t + 3) * width, width)
        w0, w1, w2, w3 = weights[t], weights[t + 1], weights[t + 2], weights[t + 3]
        for d in range(width):
            low = w0 * widen(row0[d]) + w1 * widen(row1[d])
            acc[d] += low + (w2 * widen(row2[d]) + w3 * widen(row3[d]))
    for t in range(whole, count):
        row0 = part(rows, t * width, width)
        w0 = weights[t]
        for d in range(width):
            acc[d] += w0 * widen(row0[d])


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


@compiled
def _after(where, token, tokens):
    """The chunk behind this one: its block, sequence and head, and its first token."""
    if token + CHUNK < tokens:
        return where, token + CHUNK
    return (where[0] + 1, where[1], where[2]), 0


@compiled
def _score_chunk(
    k, ahead, offsets, where, token, count, j, next_where, next_token, q, rows, width, wide, scores, at, S
):
    """Scores of a chunk of K for query heads `rows`, to scores[at:], a head's S apart; the chunk ahead is asked for.

    That is K's (j = 0) or V's (j = 1), at next_where and next_token. Asked for all at once it would hold up the rest.
    """
    step = STEP if len(k) == 1 else CHUNK
    for t in range(0, count, step):
        num = min(step, count - t)
        _prefetch_tokens(ahead, offsets, j, next_where, next_token + t, num)
        if rows[1] - rows[0] == 1 and len(k) == 1:
            raw = part(k[0], _offset(offsets, 0, 0, where, token + t), num * width)
            _score(part(q, rows[0] * width, width), raw, num, part(scores, at + t, num))
            continue
        _widen_tokens(k, offsets, 0, where, token + t, num, width, wide)
        for r in range(rows[0], rows[1]):
            _score(part(q, r * width, width), wide, num, part(scores, at + (r - rows[0]) * S + t, num))


@compiled
def _add_chunk(v, ahead, offsets, where, token, count, next_where, next_token, weights, rows, width, wide, acc):
    """A chunk of V, weighted, to the sums of query heads `rows`; the chunk of K ahead is asked for."""
    step = STEP if len(v) == 1 else CHUNK
    for t in range(0, count, step):
        num = min(step, count - t)
        _prefetch_tokens(ahead, offsets, 0, next_where, next_token + t, num)
        if rows[1] - rows[0] == 1 and len(v) == 1:
            raw = part(v[0], _offset(offsets, 1, 0, where, token + t), num * width)
            _add_values(part(weights, t, num), raw, num, part(acc, rows[0] * width, width))
            continue
        _widen_tokens(v, offsets, 1, where, token + t, num, width, wide)
        for r in range(rows[0], rows[1]):
            _add_values(part(weights, (r - rows[0]) * CHUNK + t, num), wide, num, part(acc, r * width, width))


@compiled
def _soften_chunk(weights, rows, count, width, best, total, acc):
    """Scores of a chunk to weights in place, and the heads' state to their new maxima."""
    for r in range(rows[0], rows[1]):
        high, chunk_total = _soften(part(weights, (r - rows[0]) * CHUNK, count), count, best[r])
        if high > best[r]:
            shrink = _exp2(best[r] - high)
            total[r] *= shrink
            row = part(acc, r * width, width)
            for d in range(width):
                row[d] *= shrink
            best[r] = high
        total[r] += chunk_total


@compiled
def _decode_head(item, q, width, k, v, offsets, lens, tokens, kv_heads, best, total, acc):
    """One K and V head of one sequence, for the query heads that share it."""
    group = len(best) // (len(lens) * kv_heads)
    seq, head, length = item // kv_heads, item % kv_heads, lens[item // kv_heads]
    rows = item * group, (item + 1) * group
    wide = np.empty(CHUNK * width * 2, np.float32)
    weights = np.empty(group * CHUNK, np.float32)
    for block in range((length + tokens - 1) // tokens):
        where = (block, seq, head)
        valid = min(tokens, length - block * tokens)
        for token in range(0, valid, CHUNK):
            count = min(CHUNK, valid - token)
            _score_chunk(k, v, offsets, where, token, count, 1, where, token, q, rows, width, wide, weights, 0, CHUNK)
            _soften_chunk(weights, rows, count, width, best, total, acc)
            then, at = _after(where, token, tokens)
            _add_chunk(v, k, offsets, where, token, count, then, at, weights, rows, width, wide, acc)


@compiled_parallel
def _decode_kernel(q, width, k, v, offsets, lens, tokens, kv_heads, best, total, acc):
    """A segment's part of dense attention: q and acc [B * H * width], best and total [B * H]."""
    for item in prange(len(lens) * kv_heads):
        _decode_head(np.int64(item), q, width, k, v, offsets, lens, tokens, kv_heads, best, total, acc)


@compiled
def _score_head(item, q, width, k, offsets, starts, lens, tokens, kv_heads, scores, S):
    """One K head of one sequence, for the query heads that share it."""
    group = len(q) // width // (len(lens) * kv_heads)
    seq, head, length = item // kv_heads, item % kv_heads, lens[item // kv_heads]
    rows = item * group, (item + 1) * group
    wide = np.empty(CHUNK * width * 2, np.float32)
    for block in range((length + tokens - 1) // tokens):
        where = (block, seq, head)
        valid = min(tokens, length - block * tokens)
        for token in range(0, valid, CHUNK):
            then, ahead = _after(where, token, tokens)
            at = rows[0] * S + starts[seq] + block * tokens + token
            count = min(CHUNK, valid - token)
            _score_chunk(k, k, offsets, where, token, count, 0, then, ahead, q, rows, width, wide, scores, at, S)


@compiled_parallel
def _scores_kernel(q, width, k, offsets, starts, lens, tokens, kv_heads, scores, S):
    """A segment's scores, behind those of the segments before it: scores [B * H * S], of S from starts[seq] on."""
    for item in prange(len(lens) * kv_heads):
        _score_head(np.int64(item), q, width, k, offsets, starts, lens, tokens, kv_heads, scores, S)


@intrinsic
def _order(typingctx, x):
    """An int32 that orders as x does, both zeros alike."""

    def codegen(context, builder, signature, args):
        word = ir.IntType(32)
        bits = builder.bitcast(args[0], word)
        flip = builder.and_(builder.ashr(bits, word(31)), word(0x7FFFFFFF))
        zero = builder.fcmp_ordered("==", args[0], ir.FloatType()(0))
        return builder.select(zero, word(0), builder.xor(bits, flip))

    return types.int32(types.float32), codegen


@compiled
def _rank(scores, keep, keys):
    """The key of the `keep`-th highest score, by halving its 32 bits; a pass is a vectorised count."""
    vectorize_apart()
    num = len(scores)
    for t in range(num):
        keys[t] = _order(scores[t])
    low, high = -(1 << 31), (1 << 31) - 1
    while low < high:
        middle = (low + high) >> 1
        above = 0
        for t in range(num):
            above += keys[t] > middle
        if above >= keep:
            low = middle + 1
        else:
            high = middle
    return low


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
        keys = np.empty(num, np.int32)
        threshold = _rank(scores, keep, keys)
        ties = keep
        for t in range(num):
            ties -= keys[t] > threshold
        for t in range(num):
            tie = keys[t] == threshold and ties > 0
            ties -= tie
            if keys[t] > threshold or tie:
                picks[count] = t
                count += 1
    picks[count] = num
    return count + 1


@compiled
def _select_head(r, scores, lens, keep, picks, num_picks, lse):
    """One query head's positions to read, ascending, and the base-2 log-sum-exp of all its scores."""
    seq = r // (len(scores) // len(lens))
    length = lens[seq]
    num_picks[r] = 0
    if length:
        best, total = _soften(scores[r, :length].copy(), length, LOWEST)
        lse[r] = best + np.float32(np.log2(total))
        num_picks[r] = _select(scores[r, : length - 1], max(keep[seq], 0), picks[r])


@compiled_parallel
def _select_kernel(scores, lens, keep, picks, num_picks, lse):
    for r in prange(len(scores)):
        _select_head(np.int64(r), scores, lens, keep, picks, num_picks, lse)


@compiled
def _gather_head(r, v, offsets, scores, lse, picks, num_picks, starts, lens, tokens, kv_heads, width, acc):
    """One query head's picks that lie in this segment."""
    heads = len(lse) // len(lens)
    seq, head = r // heads, r % heads // (heads // kv_heads)
    wide = np.empty(CHUNK * width * 2, np.float32)
    weight = np.empty(1, np.float32)
    for n in range(num_picks[r]):
        if n + AHEAD < num_picks[r]:
            t = picks[r, n + AHEAD] - starts[seq]
            _prefetch_tokens(v, offsets, 1, (t // tokens, seq, head), t % tokens, 1)
        t = picks[r, n] - starts[seq]
        if 0 <= t < lens[seq]:
            weight[0] = _exp2(scores[r, picks[r, n]] - lse[r])
            _widen_tokens(v, offsets, 1, (t // tokens, seq, head), t % tokens, 1, width, wide)
            _add_values(weight, wide, 1, part(acc, r * width, width))


@compiled_parallel
def _gather_kernel(v, offsets, scores, lse, picks, num_picks, starts, lens, tokens, kv_heads, width, acc):
    """A segment's part of the weighted rows of V: acc [B * H * width] += 2 ** (score - lse) * v."""
    for r in prange(len(lse)):
        i = np.int64(r)
        _gather_head(i, v, offsets, scores, lse, picks, num_picks, starts, lens, tokens, kv_heads, width, acc)


def decode_attention(q: Tensor, segments: Sequence[KVSegment], *, scale: float | None = None) -> Tensor:
    """Attention of one new token per sequence over the union of the segments: q [B, H, D] -> [B, H, D] in q's dtype.

    Computed in fp32. A sequence without a valid token gets zeros. `scale` is 1 / sqrt(D) unless given.
    """
    return decode_attention_lse(q, segments, scale=scale)[0]


def decode_attention_lse(
    q: Tensor, segments: Sequence[KVSegment], *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """`decode_attention`, and the log-sum-exp of the scores, [B, H] fp32: -inf for a sequence without a token."""
    num_seqs, num_heads, _ = q.shape
    query = _query(q, segments, scale)
    state = torch.full((len(query),), float(LOWEST)), torch.zeros(len(query)), torch.zeros(query.shape)
    for segment in segments:
        if segment.k[0].numel() and num_seqs:
            stores = _stores(segment, query.shape[1])
            launch(_decode_kernel, flat(query), query.shape[1], *stores, *_sizes(segment), *map(flat, state))
    best, total, acc = state
    out = acc / total.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    lse = (best + torch.log2(total)) / LOG2E
    return _shaped(out, q), lse.view(num_seqs, num_heads)


def sparse_decode_attention(
    q: Tensor, segments: Sequence[KVSegment], keep: Tensor, *, scale: float | None = None
) -> Tensor:
    """Attention that reads few rows of V: q [B, H, D], keep [B] int32 -> [B, H, D] in q's dtype.

    Every query head scores all tokens, and adds V of the `keep[b]` highest of the earlier ones (the lower position of
    equals) and of the newest, the last segment's last valid token, with their weights in the softmax over all tokens:
    they do not sum to 1.
    """
    num_seqs = len(q)
    query = _query(q, segments, scale)
    rows, width = query.shape
    acc = torch.zeros(rows, width)
    lens = torch.stack([s.lens for s in segments]).to(torch.int32)
    starts = (lens.cumsum(0, dtype=torch.int32) - lens).contiguous()
    lengths = lens.sum(0, dtype=torch.int32)
    longest = int(lengths.max()) if num_seqs else 0
    if not longest:
        return torch.zeros_like(q)
    scores = np.empty((rows, longest), np.float32)
    picks = np.empty((rows, min(longest, max(0, int(keep.max())) + 1)), np.int32)
    num_picks, lse = np.empty(rows, np.int32), np.empty(rows, np.float32)
    parts = [(s, _stores(s, width), start.numpy()) for s, start in zip(segments, starts, strict=True) if s.k[0].numel()]
    for segment, (k, _, offsets), start in parts:
        launch(_scores_kernel, flat(query), width, k, offsets, start, *_sizes(segment), scores.reshape(-1), longest)
    launch(_select_kernel, scores, lengths.numpy(), keep.to(torch.int32).contiguous().numpy(), picks, num_picks, lse)
    for segment, (_, v, offsets), start in parts:
        picked = (scores, lse, picks, num_picks, start)
        launch(_gather_kernel, v, offsets, *picked, *_sizes(segment), width, flat(acc))
    return _shaped(acc, q)


def _query(q: Tensor, segments: Sequence[KVSegment], scale: float | None) -> Tensor:
    """q with scale and base in it, padded like the K it meets: [B * H, width] fp32."""
    dim = q.shape[-1]
    parts = {len(s.k) for s in segments} | {len(s.v) for s in segments}
    assert len(parts) <= 1, "segments of one format"
    width = kv_width(dim) if 2 in parts else dim
    query = F.pad(q.reshape(-1, dim).float(), (0, width - dim))
    return query * ((dim**-0.5 if scale is None else scale) * LOG2E)


def _shaped(out: Tensor, q: Tensor) -> Tensor:
    """[B * H, width] to q's shape and dtype."""
    return out[:, : q.shape[-1]].to(q.dtype).view(q.shape)


def _sizes(segment: KVSegment) -> tuple[np.ndarray, int, int]:
    """Valid tokens, tokens of a block, K and V heads."""
    blocks, _, kv_heads, tokens, *_ = segment.k[0].shape
    lens = segment.lens.to(torch.int32).contiguous()
    assert int(lens.max()) <= blocks * tokens, (lens, segment.k[0].shape)
    return lens.numpy(), tokens, kv_heads


def _stores(segment: KVSegment, width: int) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...], np.ndarray]:
    """K and V as dense vectors, and where their tokens are: strides [2, 2, 4], as `_offset` reads them."""
    offsets = np.zeros((2, 2, 4), np.int64)
    sizes = (width,) if len(segment.k) == 1 else (width // 4, width // KV_GROUP * 2)
    for i, store in enumerate((segment.k, segment.v)):
        for j, (numbers, size) in enumerate(zip(store, sizes, strict=True)):
            token = numbers[0, 0, 0]
            assert token.is_contiguous() and token[0].numel() == size, (numbers.shape, numbers.stride())
            offsets[i, j] = *numbers.stride()[:3], size
    return tuple(map(flat, segment.k)), tuple(map(flat, segment.v)), offsets
