"""Chunks of CHUNK tokens of K and V, in whichever format a segment holds: scored and added for a group of query heads.

A chunk is widened to fp32 in the first-level cache, where every query head of the group uses it; a single head reads 16
and 4 bits as they are. Meanwhile the chunk that comes next is asked for. A number's format is told by how many vectors
K and V consist of. Knows pages, sequences and heads; no softmax.
"""

from __future__ import annotations

from numba.extending import overload

from ..sizes import CHUNK, KV_GROUP
from .jit import compiled, part, prefetch
from .kv_rows import (
    add_rows,
    add_values,
    add_words,
    score,
    score_rows,
    score_words,
    tabulate_groups,
    widen_numbers,
    widen_words,
)
from .lanes import LANES


# Offsets [2, 2, 4] of `segment_stores`: of K and V; of the numbers and the scales; strides of page, sequence, head and
# token.
@compiled
def place(offsets, i, where, token):
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
    tabulate_groups(part(kv[1], at[1], groups * 2), groups, wide, tables)
    return part(kv[0], at[0], count * width // 4), tables


def widen_tokens(kv, at, count, width, wide):
    """Tokens of K or V, from place `at` on, to fp32: wide [CHUNK * width], and as much room behind it."""


@overload(widen_tokens)
def _(kv, at, count, width, wide):
    def numbers(kv, at, count, width, wide):
        widen_numbers(part(kv[0], at[0], count * width), wide)

    def words(kv, at, count, width, wide):
        codes, tables = _coded_tokens(kv, at, count, width, wide)
        widen_words(codes, tables, count, width, wide)

    return numbers if len(kv) == 1 else words


@compiled
def _prefetch(numbers, at, count):
    for n in range(0, count, 64 // numbers.itemsize):
        prefetch(numbers, at + n)


def prefetch_tokens(kv, at, count, width):
    """Ask for what `widen_tokens` will read; tokens that do not exist do no harm."""


@overload(prefetch_tokens)
def _(kv, at, count, width):
    def numbers(kv, at, count, width):
        _prefetch(kv[0], at[0], count * width)

    def words(kv, at, count, width):
        _prefetch(kv[0], at[0], count * width // 4)
        _prefetch(kv[1], at[1], count * width // KV_GROUP * 2)

    return numbers if len(kv) == 1 else words


def _score_alone(q, k, at, count, width, wide, scores, ahead, ahead_at):
    """Scores of tokens of K for one query head, read as they lie; as many tokens ahead are asked for."""


@overload(_score_alone)
def _(q, k, at, count, width, wide, scores, ahead, ahead_at):
    def numbers(q, k, at, count, width, wide, scores, ahead, ahead_at):
        rows = part(k[0], at[0], count * width)
        if width % LANES == 0:
            score_rows(q, rows, count, width, wide, scores, ahead[0], ahead_at[0])
        else:
            _prefetch(ahead[0], ahead_at[0], count * width)
            score(q, rows, count, scores)

    def words(q, k, at, count, width, wide, scores, ahead, ahead_at):
        _prefetch(ahead[1], ahead_at[1], count * width // KV_GROUP * 2)
        codes, tables = _coded_tokens(k, at, count, width, wide)
        score_words(q, codes, tables, count, width, wide, scores, ahead[0], ahead_at[0])

    return numbers if len(k) == 1 else words


def _add_alone(weights, v, at, count, width, wide, acc, ahead, ahead_at):
    """Tokens of V, weighted, to one query head's sum, read as they lie; as many tokens ahead are asked for."""


@overload(_add_alone)
def _(weights, v, at, count, width, wide, acc, ahead, ahead_at):
    def numbers(weights, v, at, count, width, wide, acc, ahead, ahead_at):
        rows = part(v[0], at[0], count * width)
        if width % LANES == 0:
            add_rows(weights, rows, count, width, acc, ahead[0], ahead_at[0])
        else:
            _prefetch(ahead[0], ahead_at[0], count * width)
            add_values(weights, rows, count, acc)

    def words(weights, v, at, count, width, wide, acc, ahead, ahead_at):
        _prefetch(ahead[1], ahead_at[1], count * width // KV_GROUP * 2)
        codes, tables = _coded_tokens(v, at, count, width, wide)
        add_words(weights, codes, tables, count, width, acc, ahead[0], ahead_at[0])

    return numbers if len(v) == 1 else words


@compiled
def after(where, token, tokens):
    """The chunk behind this one: its page, sequence and head, and its first token."""
    if token + CHUNK < tokens:
        return where, token + CHUNK
    return (where[0] + 1, where[1], where[2]), 0


@compiled
def score_chunk(k, ahead, offsets, here, count, j, then, q, rows, width, wide, scores, at, S):
    """Scores of a chunk of K for query heads `rows`, to scores[at:], a head's S apart; the chunk ahead is asked for.

    The chunks begin at `here` and `then`, (page, sequence, head) and token; the one ahead is K's (j = 0) or V's (1).
    """
    now, next_at = place(offsets, 0, *here), place(offsets, j, *then)
    if rows[1] - rows[0] == 1:
        alone, scores = part(q, rows[0] * width, width), part(scores, at, count)
        _score_alone(alone, k, now, count, width, wide, scores, ahead, next_at)
        return
    prefetch_tokens(ahead, next_at, count, width)
    widen_tokens(k, now, count, width, wide)
    for r in range(rows[0], rows[1]):
        score(part(q, r * width, width), wide, count, part(scores, at + (r - rows[0]) * S, count))


@compiled
def add_chunk(v, ahead, offsets, here, count, then, weights, rows, width, wide, acc):
    """A chunk of V, weighted, to the sums of query heads `rows`; the chunk of K ahead is asked for."""
    now, next_at = place(offsets, 1, *here), place(offsets, 0, *then)
    if rows[1] - rows[0] == 1:
        _add_alone(weights, v, now, count, width, wide, part(acc, rows[0] * width, width), ahead, next_at)
        return
    prefetch_tokens(ahead, next_at, count, width)
    widen_tokens(v, now, count, width, wide)
    for r in range(rows[0], rows[1]):
        add_values(part(weights, (r - rows[0]) * CHUNK, count), wide, count, part(acc, r * width, width))
