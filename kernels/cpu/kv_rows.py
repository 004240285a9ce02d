"""Rows of K and V: widened to fp32, scored against a query, added up by weight. One thread, dense vectors.

A row is `width` numbers in fp16, bf16 or fp32, or P16's words and the tables of their groups (`lanes`). Widened rows
serve all query heads of a group; a single head reads 16 and 4 bits as they are. Knows no page, no segment and no
softmax.
"""

from __future__ import annotations

import numpy as np

from ..sizes import KV_GROUP
from .jit import compiled, part, prefetch, vectorize_apart, widen
from .lanes import LANES, load, load_wide, load_words, look_up, multiply_add, spread, store, sum_each, tabulate

ZERO = np.float32(0)


@compiled
def widen_numbers(source, wide):
    vectorize_apart()
    for i in range(len(source)):
        wide[i] = widen(source[i])


@compiled
def tabulate_groups(scales, count, wide, tables):
    """fp16 scales and minima of `count` groups -> tables [count * 16]; wide [2 * count] is scratch."""
    widen_numbers(scales, wide)
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
def widen_words(codes, tables, count, width, wide):
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
def score_words(q, codes, tables, count, width, sums, scores, ahead, at):
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
def add_words(weights, codes, tables, count, width, acc, ahead, at):
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


@compiled
def score(q, rows, count, scores):
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
def add_values(weights, rows, count, acc):
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
def score_rows(q, rows, count, width, sums, scores, ahead, at):
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
def add_rows(weights, rows, count, width, acc, ahead, at):
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
