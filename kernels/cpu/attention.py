"""Attention of one new token per sequence over its cached tokens, on the CPU.

    q [B, H, D]; K and V as `KVSegment`s in fp16, bf16, fp32 or P16; query head h reads K and V head h // (H / Hkv)

A thread takes a (sequence, K and V head) and chunks of CHUNK tokens. A chunk is widened to fp32 in the first-level
cache, where every query head of the group uses it; a single head reads 16 and 4 bits as they are. Meanwhile the chunk
that comes next is asked for. Dense attention is an online softmax over chunks and segments; its state, (maximum, sum,
weighted V), lies in arrays between the segments' launches. Scores are base-2 logarithms throughout. All that is not
small is a part of one fp32 workspace, which the caller may own.

Sparse attention (FlexGen, Sheng et al., ICML 2023, section 5) scores all of K, keeps the scores, and reads only the
rows of V that weigh most.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from llvmlite import ir
from numba import get_thread_id, prange, types
from numba.extending import intrinsic, overload
from torch import Tensor

from ..formats import KVSegment
from ..sizes import (
    CHUNK,
    KV_GROUP,
    cpu_decode_bytes,
    cpu_sparse_bytes,
    decode_scratch,
    fp32_bytes,
    kv_width,
    line_aligned,
    sparse_scratch,
)
from .jit import compiled, compiled_parallel, flat, launch, nearest, num_threads, part, prefetch, vectorize_apart, widen
from .lanes import (
    EXP2_SERIES,
    LANES,
    add,
    exp2,
    larger,
    largest,
    load,
    load_wide,
    load_words,
    look_up,
    multiply_add,
    spread,
    store,
    subtract,
    sum_each,
    sum_of,
    tabulate,
)

AHEAD = 8  # rows of V that are on their way while one is added
LOG2E = math.log2(math.e)
LOWEST = np.float32(-3e38)
ZERO = np.float32(0)
TINY = np.finfo(np.float32).tiny


@intrinsic
def _power_of_two(typingctx, n):
    """2 ** n for a whole n of -126..127, made of exponent bits."""

    def codegen(context, builder, signature, args):
        word = ir.IntType(32)
        biased = builder.add(builder.fptosi(args[0], word), ir.Constant(word, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(word, 23)), ir.FloatType())

    return types.float32(types.float32), codegen


_ONE, _C1, _C2, _C3, _C4, _C5, _C6, _C7 = map(np.float32, EXP2_SERIES)


@compiled
def _exp2(x):
    """2 ** x for x <= 0 in arithmetic that vectorises; 0 below the normal numbers."""
    n = nearest(x)
    f = x - n
    series = _ONE + f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * (_C5 + f * (_C6 + f * _C7))))))
    return ZERO if x < np.float32(-126) else series * _power_of_two(n)


@compiled
def _widen_numbers(source, wide):
    vectorize_apart()
    for i in range(len(source)):
        wide[i] = widen(source[i])


@compiled
def _tabulate(scales, count, wide, tables):
    """fp16 scales and minima of `count` groups -> tables [count * 16]; wide [2 * count] is scratch."""
    _widen_numbers(scales, wide)
    for g in range(count):
        store(tabulate(wide[2 * g], wide[2 * g + 1]), tables, g * LANES)


@compiled
def _tables_of(i, quarter):
    """Offsets of the tables of word i's four codes, among its token's."""
    at = i // KV_GROUP * LANES
    return (
        at,
        at + quarter // KV_GROUP * LANES,
        at + 2 * quarter // KV_GROUP * LANES,
        at + 3 * quarter // KV_GROUP * LANES,
    )


@compiled
def _widen_words(codes, tables, count, width, wide):
    """codes [count * width/4], tables [count * width/64 * 16] -> wide [count * width]."""
    quarter, pitch = width // 4, width // KV_GROUP * LANES
    for i in range(0, quarter, LANES):
        at0, at1, at2, at3 = _tables_of(i, quarter)
        for t in range(count):
            packed, row, table = load_words(codes, t * quarter + i), t * width + i, t * pitch
            store(look_up(packed, 0, tables, at0 + table), wide, row)
            store(look_up(packed, 4, tables, at1 + table), wide, row + quarter)
            store(look_up(packed, 8, tables, at2 + table), wide, row + 2 * quarter)
            store(look_up(packed, 12, tables, at3 + table), wide, row + 3 * quarter)


@compiled
def _sum_rows(sums, count, scores):
    """The sums of `count` vectors of 16, sums [CHUNK * 16], which are overwritten -> scores [count]."""
    for t in range(0, count, LANES):
        store(sum_each(sums, t * LANES), sums, t)
    for t in range(count):
        scores[t] = sums[t]


@compiled
def _score_words(q, codes, tables, count, width, sums, scores, ahead, at):
    """q [width], K as codes [count * width/4] and tables -> scores [count]; sums [CHUNK * 16] is scratch.

    As many words ahead[at:] are asked for, evenly: all at once they hold up what comes behind them.
    """
    quarter, pitch = width // 4, width // KV_GROUP * LANES
    for n in range(count * LANES):
        sums[n] = ZERO
    for i in range(0, quarter, LANES):
        at0, at1, at2, at3 = _tables_of(i, quarter)
        q0, q1, q2, q3 = load(q, i), load(q, quarter + i), load(q, 2 * quarter + i), load(q, 3 * quarter + i)
        for t in range(count):
            prefetch(ahead, at + t * quarter + i)
            packed, table = load_words(codes, t * quarter + i), t * pitch
            total = multiply_add(q0, look_up(packed, 0, tables, at0 + table), load(sums, t * LANES))
            total = multiply_add(q1, look_up(packed, 4, tables, at1 + table), total)
            total = multiply_add(q2, look_up(packed, 8, tables, at2 + table), total)
            store(multiply_add(q3, look_up(packed, 12, tables, at3 + table), total), sums, t * LANES)
    _sum_rows(sums, count, scores)


@compiled
def _add_words(weights, codes, tables, count, width, acc, ahead, at):
    """acc [width] += weights [count] @ V as codes [count * width/4] and tables; words ahead[at:] are asked for."""
    quarter, pitch = width // 4, width // KV_GROUP * LANES
    for i in range(0, quarter, LANES):
        at0, at1, at2, at3 = _tables_of(i, quarter)
        acc0, acc1 = load(acc, i), load(acc, quarter + i)
        acc2, acc3 = load(acc, 2 * quarter + i), load(acc, 3 * quarter + i)
        for t in range(count):
            prefetch(ahead, at + t * quarter + i)
            packed, table, weight = load_words(codes, t * quarter + i), t * pitch, spread(weights[t])
            acc0 = multiply_add(weight, look_up(packed, 0, tables, at0 + table), acc0)
            acc1 = multiply_add(weight, look_up(packed, 4, tables, at1 + table), acc1)
            acc2 = multiply_add(weight, look_up(packed, 8, tables, at2 + table), acc2)
            acc3 = multiply_add(weight, look_up(packed, 12, tables, at3 + table), acc3)
        store(acc0, acc, i)
        store(acc1, acc, quarter + i)
        store(acc2, acc, 2 * quarter + i)
        store(acc3, acc, 3 * quarter + i)


# Offsets [2, 2, 4] of `_stores`: of K and V; of the numbers and the scales; strides of page, sequence, head and token.
@compiled
def _place(offsets, i, where, token):
    """Offsets of a token in the numbers and in the scales; `where` is its (page, sequence, head)."""
    at, scales_at = token * offsets[i, 0, 3], token * offsets[i, 1, 3]
    for n in range(3):
        at += where[n] * offsets[i, 0, n]
        scales_at += where[n] * offsets[i, 1, n]
    return at, scales_at


@compiled
def _coded_tokens(kv, at, count, width, wide):
    """Codes of tokens in P16, and their tables, which lie behind the first CHUNK * width numbers of `wide`."""
    groups = count * width // KV_GROUP
    tables = part(wide, CHUNK * width, groups * LANES)
    _tabulate(part(kv[1], at[1], groups * 2), groups, wide, tables)
    return part(kv[0], at[0], count * width // 4), tables


def _widen_tokens(kv, at, count, width, wide):
    """Tokens of K or V, from place `at` on, to fp32: wide [CHUNK * width], and as much room behind it."""


@overload(_widen_tokens)
def _(kv, at, count, width, wide):
    def numbers(kv, at, count, width, wide):
        _widen_numbers(part(kv[0], at[0], count * width), wide)

    def words(kv, at, count, width, wide):
        codes, tables = _coded_tokens(kv, at, count, width, wide)
        _widen_words(codes, tables, count, width, wide)

    return numbers if len(kv) == 1 else words


@compiled
def _prefetch(numbers, at, count):
    for n in range(0, count, 64 // numbers.itemsize):
        prefetch(numbers, at + n)


def _prefetch_tokens(kv, at, count, width):
    """Ask for what `_widen_tokens` will read; tokens that do not exist do no harm."""


@overload(_prefetch_tokens)
def _(kv, at, count, width):
    def numbers(kv, at, count, width):
        _prefetch(kv[0], at[0], count * width)

    def words(kv, at, count, width):
        _prefetch(kv[0], at[0], count * width // 4)
        _prefetch(kv[1], at[1], count * width // KV_GROUP * 2)

    return numbers if len(kv) == 1 else words


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
def _score_rows(q, rows, count, width, sums, scores, ahead, at):
    """q [width], rows [count * width] of K as they lie -> scores [count]; sums [CHUNK * 16] is scratch.

    `width` is a multiple of 16. As many numbers ahead[at:] are asked for, evenly.
    """
    whole = count - count % 4
    line = 64 // rows.itemsize
    for t in range(0, whole, 4):
        sum0 = sum1 = sum2 = sum3 = spread(ZERO)
        row = t * width
        for i in range(0, width, LANES):
            for n in range(0, 4 * LANES, line):
                prefetch(ahead, at + row + 4 * i + n)
            part_q = load(q, i)
            sum0 = multiply_add(part_q, load_wide(rows, row + i), sum0)
            sum1 = multiply_add(part_q, load_wide(rows, row + width + i), sum1)
            sum2 = multiply_add(part_q, load_wide(rows, row + 2 * width + i), sum2)
            sum3 = multiply_add(part_q, load_wide(rows, row + 3 * width + i), sum3)
        store(sum0, sums, t * LANES)
        store(sum1, sums, (t + 1) * LANES)
        store(sum2, sums, (t + 2) * LANES)
        store(sum3, sums, (t + 3) * LANES)
    for t in range(whole, count):
        total = spread(ZERO)
        for i in range(0, width, LANES):
            total = multiply_add(load(q, i), load_wide(rows, t * width + i), total)
        store(total, sums, t * LANES)
    _sum_rows(sums, count, scores)


@compiled
def _add_rows(weights, rows, count, width, acc, ahead, at):
    """acc [width] += weights [count] @ rows [count * width] of V as they lie; numbers ahead[at:] are asked for."""
    whole = width - width % (4 * LANES)
    line = 64 // rows.itemsize
    for i in range(0, whole, 4 * LANES):
        acc0, acc1 = load(acc, i), load(acc, i + LANES)
        acc2, acc3 = load(acc, i + 2 * LANES), load(acc, i + 3 * LANES)
        for t in range(count):
            row, weight = t * width + i, spread(weights[t])
            for n in range(0, 4 * LANES, line):
                prefetch(ahead, at + row + n)
            acc0 = multiply_add(weight, load_wide(rows, row), acc0)
            acc1 = multiply_add(weight, load_wide(rows, row + LANES), acc1)
            acc2 = multiply_add(weight, load_wide(rows, row + 2 * LANES), acc2)
            acc3 = multiply_add(weight, load_wide(rows, row + 3 * LANES), acc3)
        store(acc0, acc, i)
        store(acc1, acc, i + LANES)
        store(acc2, acc, i + 2 * LANES)
        store(acc3, acc, i + 3 * LANES)
    for i in range(whole, width, LANES):
        total = load(acc, i)
        for t in range(count):
            total = multiply_add(spread(weights[t]), load_wide(rows, t * width + i), total)
        store(total, acc, i)


def _score_alone(q, k, at, count, width, wide, scores, ahead, ahead_at):
    """Scores of tokens of K for one query head, read as they lie; as many tokens ahead are asked for."""


@overload(_score_alone)
def _(q, k, at, count, width, wide, scores, ahead, ahead_at):
    def numbers(q, k, at, count, width, wide, scores, ahead, ahead_at):
        rows = part(k[0], at[0], count * width)
        if width % LANES == 0:
            _score_rows(q, rows, count, width, wide, scores, ahead[0], ahead_at[0])
        else:
            _prefetch(ahead[0], ahead_at[0], count * width)
            _score(q, rows, count, scores)

    def words(q, k, at, count, width, wide, scores, ahead, ahead_at):
        _prefetch(ahead[1], ahead_at[1], count * width // KV_GROUP * 2)
        codes, tables = _coded_tokens(k, at, count, width, wide)
        _score_words(q, codes, tables, count, width, wide, scores, ahead[0], ahead_at[0])

    return numbers if len(k) == 1 else words


def _add_alone(weights, v, at, count, width, wide, acc, ahead, ahead_at):
    """Tokens of V, weighted, to one query head's sum, read as they lie; as many tokens ahead are asked for."""


@overload(_add_alone)
def _(weights, v, at, count, width, wide, acc, ahead, ahead_at):
    def numbers(weights, v, at, count, width, wide, acc, ahead, ahead_at):
        rows = part(v[0], at[0], count * width)
        if width % LANES == 0:
            _add_rows(weights, rows, count, width, acc, ahead[0], ahead_at[0])
        else:
            _prefetch(ahead[0], ahead_at[0], count * width)
            _add_values(weights, rows, count, acc)

    def words(weights, v, at, count, width, wide, acc, ahead, ahead_at):
        _prefetch(ahead[1], ahead_at[1], count * width // KV_GROUP * 2)
        codes, tables = _coded_tokens(v, at, count, width, wide)
        _add_words(weights, codes, tables, count, width, acc, ahead[0], ahead_at[0])

    return numbers if len(v) == 1 else words


@compiled
def _highest(scores, best):
    """The highest of the scores and `best`, whatever NaN there is."""
    whole = len(scores) - len(scores) % LANES
    high = spread(best)
    for t in range(0, whole, LANES):
        high = larger(high, load(scores, t))
    best = largest(high)
    for t in range(whole, len(scores)):
        best = max(best, scores[t])
    return best


@compiled
def _soften(scores, best):
    """Scores to weights in place, 2 ** (score - the new highest) -> (the new highest, their sum)."""
    best = _highest(scores, best)
    whole = len(scores) - len(scores) % LANES
    high, sums = spread(best), spread(ZERO)
    for t in range(0, whole, LANES):
        weights = exp2(subtract(load(scores, t), high))
        store(weights, scores, t)
        sums = add(sums, weights)
    total = sum_of(sums)
    for t in range(whole, len(scores)):
        scores[t] = _exp2(scores[t] - best)
        total += scores[t]
    return best, total


@compiled
def _log_sum(scores):
    """The base-2 log-sum-exp of scores."""
    vectorize_apart()
    best = _highest(scores, LOWEST)
    total = ZERO
    for t in range(len(scores)):
        total += _exp2(scores[t] - best)
    return best + np.float32(np.log2(total))


@compiled
def _after(where, token, tokens):
    """The chunk behind this one: its page, sequence and head, and its first token."""
    if token + CHUNK < tokens:
        return where, token + CHUNK
    return (where[0] + 1, where[1], where[2]), 0


@compiled
def _score_chunk(k, ahead, offsets, here, count, j, then, q, rows, width, wide, scores, at, S):
    """Scores of a chunk of K for query heads `rows`, to scores[at:], a head's S apart; the chunk ahead is asked for.

    The chunks begin at `here` and `then`, (page, sequence, head) and token; the one ahead is K's (j = 0) or V's (1).
    """
    now, next_at = _place(offsets, 0, *here), _place(offsets, j, *then)
    if rows[1] - rows[0] == 1:
        alone, scores = part(q, rows[0] * width, width), part(scores, at, count)
        _score_alone(alone, k, now, count, width, wide, scores, ahead, next_at)
        return
    _prefetch_tokens(ahead, next_at, count, width)
    _widen_tokens(k, now, count, width, wide)
    for r in range(rows[0], rows[1]):
        _score(part(q, r * width, width), wide, count, part(scores, at + (r - rows[0]) * S, count))


@compiled
def _add_chunk(v, ahead, offsets, here, count, then, weights, rows, width, wide, acc):
    """A chunk of V, weighted, to the sums of query heads `rows`; the chunk of K ahead is asked for."""
    now, next_at = _place(offsets, 1, *here), _place(offsets, 0, *then)
    if rows[1] - rows[0] == 1:
        _add_alone(weights, v, now, count, width, wide, part(acc, rows[0] * width, width), ahead, next_at)
        return
    _prefetch_tokens(ahead, next_at, count, width)
    _widen_tokens(v, now, count, width, wide)
    for r in range(rows[0], rows[1]):
        _add_values(part(weights, (r - rows[0]) * CHUNK, count), wide, count, part(acc, r * width, width))


@compiled
def _soften_chunk(weights, rows, count, width, best, total, acc):
    """Scores of a chunk to weights in place, and the heads' state to their new maxima."""
    for r in range(rows[0], rows[1]):
        high, chunk_total = _soften(part(weights, (r - rows[0]) * CHUNK, count), best[r])
        if high > best[r]:
            shrink = _exp2(best[r] - high)
            total[r] *= shrink
            row = part(acc, r * width, width)
            for d in range(width):
                row[d] *= shrink
            best[r] = high
        total[r] += chunk_total


@compiled
def _begin_row(q, scale, acc):
    """A query head's sum, empty, and its query with scale and base in it."""
    vectorize_apart()
    for d in range(len(q)):
        q[d] *= scale
        acc[d] = ZERO


@compiled
def _end_row(total, acc):
    vectorize_apart()
    whole = _ONE / max(total, TINY)
    for d in range(len(acc)):
        acc[d] *= whole


@compiled
def _decode_head(item, scratch, q, width, k, v, offsets, lens, tokens, kv_heads, best, total, acc, scale, ends):
    """One K and V head of one sequence, for the query heads that share it."""
    group = len(best) // (len(lens) * kv_heads)
    seq, head, length = item // kv_heads, item % kv_heads, lens[item // kv_heads]
    rows = item * group, (item + 1) * group
    own = scratch[get_thread_id()]
    wide, weights = part(own, 0, CHUNK * width * 2), part(own, CHUNK * width * 2, group * CHUNK)
    if ends[0]:
        for r in range(rows[0], rows[1]):
            best[r], total[r] = LOWEST, ZERO
            _begin_row(part(q, r * width, width), scale, part(acc, r * width, width))
    for page in range((length + tokens - 1) // tokens):
        where = (page, seq, head)
        valid = min(tokens, length - page * tokens)
        for token in range(0, valid, CHUNK):
            here, then = (where, token), _after(where, token, tokens)
            count = min(CHUNK, valid - token)
            _score_chunk(k, v, offsets, here, count, 1, here, q, rows, width, wide, weights, 0, CHUNK)
            _soften_chunk(weights, rows, count, width, best, total, acc)
            _add_chunk(v, k, offsets, here, count, then, weights, rows, width, wide, acc)
    if ends[1]:
        for r in range(rows[0], rows[1]):
            _end_row(total[r], part(acc, r * width, width))


@compiled_parallel
def _decode_kernel(scratch, q, width, k, v, offsets, lens, tokens, kv_heads, best, total, acc, scale, ends):
    """A segment's part of dense attention: q, acc [B * H * width]; best, total [B * H]; scratch [threads, N].

    `ends` says whether it is the first, which sets state and query up, and the last one, which divides by the sums.
    """
    for item in prange(len(lens) * kv_heads):
        i = np.int64(item)
        _decode_head(i, scratch, q, width, k, v, offsets, lens, tokens, kv_heads, best, total, acc, scale, ends)


@compiled
def _score_head(item, scratch, q, width, k, offsets, starts, lens, tokens, kv_heads, scores, S):
    """One K head of one sequence, for the query heads that share it."""
    group = len(q) // width // (len(lens) * kv_heads)
    seq, head, length = item // kv_heads, item % kv_heads, lens[item // kv_heads]
    rows = item * group, (item + 1) * group
    wide = scratch[get_thread_id()]
    for page in range((length + tokens - 1) // tokens):
        where = (page, seq, head)
        valid = min(tokens, length - page * tokens)
        for token in range(0, valid, CHUNK):
            here, then = (where, token), _after(where, token, tokens)
            at = rows[0] * S + starts[seq] + page * tokens + token
            count = min(CHUNK, valid - token)
            _score_chunk(k, k, offsets, here, count, 0, then, q, rows, width, wide, scores, at, S)


@compiled_parallel
def _scores_kernel(scratch, q, width, k, offsets, starts, lens, tokens, kv_heads, scores, S):
    """A segment's scores, behind those of the segments before it: scores [B * H * S], of S from starts[seq] on."""
    for item in prange(len(lens) * kv_heads):
        _score_head(np.int64(item), scratch, q, width, k, offsets, starts, lens, tokens, kv_heads, scores, S)


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
def _select(scores, keep, keys, picks):
    """The `keep` highest positions, the lower of equals, then the one behind the scores -> how many."""
    num = len(scores)
    if keep >= num:
        for t in range(num + 1):
            picks[t] = t
        return num + 1
    count = 0
    if keep > 0:
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
def _select_head(r, scratch, scores, lens, keep, picks, num_picks, lse):
    """One query head's positions to read, ascending, and the base-2 log-sum-exp of all its scores."""
    seq = r // (len(scores) // len(lens))
    length = lens[seq]
    num_picks[r] = 0
    if length:
        lse[r] = _log_sum(scores[r, :length])
        num_picks[r] = _select(scores[r, : length - 1], max(keep[seq], 0), scratch[get_thread_id()], picks[r])


@compiled_parallel
def _select_kernel(scratch, scores, lens, keep, picks, num_picks, lse):
    """Scores [B * H, S] -> picks, num_picks and lse [B * H]; scratch int32 [threads, S]."""
    for r in prange(len(scores)):
        _select_head(np.int64(r), scratch, scores, lens, keep, picks, num_picks, lse)


@compiled
def _gather_head(r, scratch, v, offsets, scores, lse, picks, num_picks, starts, lens, tokens, kv_heads, width, acc):
    """One query head's picks that lie in this segment."""
    heads = len(lse) // len(lens)
    seq, head = r // heads, r % heads // (heads // kv_heads)
    wide = scratch[get_thread_id()]
    weight = part(wide, CHUNK * width * 2 - 1, 1)
    for n in range(num_picks[r]):
        if n + AHEAD < num_picks[r]:
            t = picks[r, n + AHEAD] - starts[seq]
            _prefetch_tokens(v, _place(offsets, 1, (t // tokens, seq, head), t % tokens), 1, width)
        t = picks[r, n] - starts[seq]
        if 0 <= t < lens[seq]:
            weight[0] = _exp2(scores[r, picks[r, n]] - lse[r])
            _widen_tokens(v, _place(offsets, 1, (t // tokens, seq, head), t % tokens), 1, width, wide)
            _add_values(weight, wide, 1, part(acc, r * width, width))


@compiled_parallel
def _gather_kernel(scratch, v, offsets, scores, lse, picks, num_picks, starts, lens, tokens, kv_heads, width, acc):
    """A segment's part of the weighted rows of V: acc [B * H * width] += 2 ** (score - lse) * v."""
    for r in prange(len(lse)):
        i = np.int64(r)
        _gather_head(i, scratch, v, offsets, scores, lse, picks, num_picks, starts, lens, tokens, kv_heads, width, acc)


def decode_workspace_bytes(num_seqs: int, num_heads: int, head_dim: int) -> int:
    """Bytes of workspace with which `decode_attention` allocates no more, on as many threads as there are here."""
    return cpu_decode_bytes(num_seqs, num_heads, head_dim, num_threads())


def sparse_workspace_bytes(num_seqs: int, num_heads: int, head_dim: int, max_tokens: int, max_keep: int) -> int:
    """Return the same of `sparse_decode_attention`, as `cpu_sparse_bytes`."""
    return cpu_sparse_bytes(num_seqs, num_heads, head_dim, max_tokens, max_keep, num_threads())


def decode_attention(
    q: Tensor,
    segments: Sequence[KVSegment],
    *,
    scale: float | None = None,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """Attention of one new token per sequence over the union of the segments: q [B, H, D] -> out [B, H, D].

    Computed in fp32. A sequence without a valid token gets zeros. `scale` is 1 / sqrt(D) unless given. `out`, of any
    float dtype, is new and of q's unless given. `workspace` is a dense fp32 vector of `decode_workspace_bytes`, best at
    the beginning of a cache line; without one it is allocated.
    """
    return _result(_attend(q, segments, scale, workspace)[0], q, out)


def decode_attention_lse(
    q: Tensor,
    segments: Sequence[KVSegment],
    *,
    scale: float | None = None,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`decode_attention`, and the log-sum-exp of the scores, [B, H] fp32: -inf for a sequence without a token.

    The log-sum-exp is a part of the workspace.
    """
    acc, best, total, scratch = _attend(q, segments, scale, workspace)
    lse = best.add_(torch.log2(total, out=scratch)).div_(LOG2E).view(q.shape[:2])
    return _result(acc, q, out), lse


def _attend(
    q: Tensor, segments: Sequence[KVSegment], scale: float | None, workspace: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attend for every query head, [B * H]: the result, the highest score, the sum of weights; and scratch."""
    num_seqs, num_heads, dim = q.shape
    rows, width = num_seqs * num_heads, _width(segments, dim)
    threads, size = num_threads(), decode_scratch(width, num_heads)
    query, acc, best, total, scratch = _cut(workspace, rows * width, rows * width, rows, rows, threads * size)
    _pad_query(q, query.view(rows, width))
    factor = np.float32((dim**-0.5 if scale is None else scale) * LOG2E)
    filled = [s for s in segments if s.k[0].numel() and num_seqs]
    work = scratch.view(threads, size).numpy(), query.numpy(), width
    state = best.numpy(), total.numpy(), acc.numpy()
    for n, segment in enumerate(filled):
        ends = n == 0, n + 1 == len(filled)
        launch(_decode_kernel, *work, *_stores(segment, width), *_sizes(segment), *state, factor, ends)
    if not filled:
        best.fill_(float(LOWEST))
        total.zero_()
        acc.zero_()
    return acc.view(rows, width), best, total, query[:rows]


def sparse_decode_attention(
    q: Tensor,
    segments: Sequence[KVSegment],
    keep: Tensor,
    *,
    scale: float | None = None,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """Attention that reads few rows of V: q [B, H, D], keep [B] int32 -> out [B, H, D].

    Every query head scores all tokens, and adds V of the `keep[b]` highest of the earlier ones (the lower position of
    equals) and of the newest, the last segment's last valid token, with their weights in the softmax over all tokens:
    they do not sum to 1. `scale`, `out` and `workspace`, of `sparse_workspace_bytes`, as in `decode_attention`.
    """
    num_seqs, num_heads, dim = q.shape
    rows, width = num_seqs * num_heads, _width(segments, dim)
    (counts,) = _cut(workspace, num_seqs)
    workspace = None if workspace is None else workspace[line_aligned(num_seqs) :]
    counted, keeps = counts.view(torch.int32).numpy(), keep.to(torch.int32).contiguous().numpy()
    for _ in _starting(segments, counted):
        pass
    longest = int(counted.max(initial=0))
    if not longest:
        return torch.zeros_like(q) if out is None else out.zero_()
    most = min(longest, max(0, int(keeps.max())) + 1)
    threads, size = num_threads(), sparse_scratch(width, longest)
    sizes = rows * width, rows * width, rows * longest, rows * most, rows, rows, threads * size
    query, acc, scores, picks, num_picks, lse, scratch = _cut(workspace, *sizes)
    _scale_query(q, scale, query.view(rows, width))
    acc.zero_()
    work = scratch.view(threads, size).numpy()
    parts = [s for s in segments if s.k[0].numel()]
    stores = [_stores(s, width) for s in parts]
    for segment, (k, _, offsets) in zip(_starting(parts, counted), stores, strict=True):
        where = counted, *_sizes(segment), scores.numpy(), longest
        launch(_scores_kernel, work, query.numpy(), width, k, offsets, *where)
    matrix = scores.view(rows, longest).numpy()
    picked = picks.view(torch.int32).view(rows, most).numpy(), num_picks.view(torch.int32).numpy()
    launch(_select_kernel, work.view(np.int32), matrix, counted, keeps, *picked, lse.numpy())
    for segment, (_, v, offsets) in zip(_starting(parts, counted), stores, strict=True):
        chosen = (matrix, lse.numpy(), *picked, counted)
        launch(_gather_kernel, work, v, offsets, *chosen, *_sizes(segment), width, acc.numpy())
    return _result(acc.view(rows, width), q, out)


def _starting(segments: Sequence[KVSegment], counted: np.ndarray) -> Iterator[KVSegment]:
    """The segments, one by one; `counted` int32 [B] is the tokens before each, and of all of them in the end."""
    counted[:] = 0
    for segment in segments:
        yield segment
        counted += segment.lens.numpy()


def _cut(workspace: Tensor | None, *sizes: int) -> Sequence[Tensor]:
    """Vectors of these sizes, one behind the other in the workspace, each at a cache line if the workspace is."""
    if workspace is None:
        workspace = torch.empty(fp32_bytes(*sizes) // 4)
    assert workspace.dtype == torch.float32 and workspace.is_contiguous() and workspace.dim() == 1, workspace.shape
    assert workspace.nbytes >= fp32_bytes(*sizes), (workspace.nbytes, sizes)
    room = workspace[: fp32_bytes(*sizes) // 4].split([line_aligned(size) for size in sizes])
    return [vector[:size] for vector, size in zip(room, sizes, strict=True)]


def _width(segments: Sequence[KVSegment], dim: int) -> int:
    """Numbers of a row of K and V as they are stored."""
    parts = {len(s.k) for s in segments} | {len(s.v) for s in segments}
    assert len(parts) <= 1, "segments of one format"
    return kv_width(dim) if 2 in parts else dim


def _scale_query(q: Tensor, scale: float | None, query: Tensor) -> None:
    """q with scale and base in it, padded like the K it meets: query [B * H, width]."""
    _pad_query(q, query)
    query.mul_((q.shape[-1] ** -0.5 if scale is None else scale) * LOG2E)


def _pad_query(q: Tensor, query: Tensor) -> None:
    """q [B, H, D], padded like the K it meets: query [B * H, width]."""
    dim = q.shape[-1]
    if dim < query.shape[1]:
        query[:, dim:].zero_()
    query[:, :dim].view(q.shape).copy_(q)


def _result(acc: Tensor, q: Tensor, out: Tensor | None) -> Tensor:
    """[B * H, width] in q's shape, to `out` or in q's dtype."""
    out = torch.empty_like(q) if out is None else out
    return out.copy_(acc[:, : q.shape[-1]].view(q.shape))


def _sizes(segment: KVSegment) -> tuple[np.ndarray, int, int]:
    """Valid tokens, tokens of a page, K and V heads."""
    pages, _, kv_heads, tokens, *_ = segment.k[0].shape
    lens = segment.lens.to(torch.int32).contiguous().numpy()
    assert lens.max() <= pages * tokens, (lens, segment.k[0].shape)
    return lens, tokens, kv_heads


def _stores(segment: KVSegment, width: int) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...], np.ndarray]:
    """K and V as dense vectors, and the strides of their tokens, [2, 2, 4], as `_place` reads them."""
    offsets = np.zeros((2, 2, 4), np.int64)
    sizes = (width,) if len(segment.k) == 1 else (width // 4, width // KV_GROUP * 2)
    for i, fields in enumerate((segment.k, segment.v)):
        for j, (numbers, size) in enumerate(zip(fields, sizes, strict=True)):
            token = numbers[0, 0, 0]
            assert token.is_contiguous() and token[0].numel() == size, (numbers.shape, numbers.stride())
            offsets[i, j] = *numbers.stride()[:3], size
    return tuple(map(flat, segment.k)), tuple(map(flat, segment.v)), offsets
