"""Attention of one new token per sequence over its cached tokens, on the CPU.

    q [B, H, D]; K and V as `KVSegment`s in fp16, bf16, fp32 or P16; query head h reads K and V head h // (H / Hkv)

A thread takes a (sequence, K and V head) and chunks of CHUNK tokens (`kv_chunks`). Attention is an online softmax over
chunks and segments; its state, (maximum, sum, weighted V), lies in arrays between the segments' launches. Scores are
base-2 logarithms throughout. All that is not small is a part of one fp32 workspace, which the caller may own. Reads all
of V: `sparse_attention` does not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numba import get_thread_id, prange
from torch import Tensor

from ..formats import KVSegment
from ..sizes import CHUNK, cpu_decode_bytes, decode_scratch
from .attention_arrays import cut, pad_query, result, row_width, segment_sizes, segment_stores
from .jit import compiled, compiled_parallel, launch, num_threads, part, vectorize_apart
from .kv_chunks import add_chunk, after, score_chunk
from .softmax import LOG2E, LOWEST, exp2_number, soften

ZERO, ONE = np.float32(0), np.float32(1)
TINY = np.finfo(np.float32).tiny


@compiled
def _soften_chunk(weights, rows, count, width, best, total, acc):
    """Scores of a chunk to weights in place, and the heads' state to their new maxima."""
    for r in range(rows[0], rows[1]):
        high, chunk_total = soften(part(weights, (r - rows[0]) * CHUNK, count), best[r])
        if high > best[r]:
            shrink = exp2_number(best[r] - high)
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
    whole = ONE / max(total, TINY)
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
            here, then = (where, token), after(where, token, tokens)
            count = min(CHUNK, valid - token)
            score_chunk(k, v, offsets, here, count, 1, here, q, rows, width, wide, weights, 0, CHUNK)
            _soften_chunk(weights, rows, count, width, best, total, acc)
            add_chunk(v, k, offsets, here, count, then, weights, rows, width, wide, acc)
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


def decode_workspace_bytes(num_seqs: int, num_heads: int, head_dim: int) -> int:
    """Bytes of workspace with which `decode_attention` allocates no more, on as many threads as there are here."""
    return cpu_decode_bytes(num_seqs, num_heads, head_dim, num_threads())


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
    return result(_attend(q, segments, scale, workspace)[0], q, out)


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
    return result(acc, q, out), lse


def _attend(
    q: Tensor, segments: Sequence[KVSegment], scale: float | None, workspace: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attend for every query head, [B * H]: the result, the highest score, the sum of weights; and scratch."""
    num_seqs, num_heads, dim = q.shape
    rows, width = num_seqs * num_heads, row_width(segments, dim)
    threads, size = num_threads(), decode_scratch(width, num_heads)
    query, acc, best, total, scratch = cut(workspace, rows * width, rows * width, rows, rows, threads * size)
    pad_query(q, query.view(rows, width))
    factor = np.float32((dim**-0.5 if scale is None else scale) * LOG2E)
    filled = [s for s in segments if s.k[0].numel() and num_seqs]
    work = scratch.view(threads, size).numpy(), query.numpy(), width
    state = best.numpy(), total.numpy(), acc.numpy()
    for n, segment in enumerate(filled):
        ends = n == 0, n + 1 == len(filled)
        launch(_decode_kernel, *work, *segment_stores(segment, width), *segment_sizes(segment), *state, factor, ends)
    if not filled:
        best.fill_(float(LOWEST))
        total.zero_()
        acc.zero_()
    return acc.view(rows, width), best, total, query[:rows]
