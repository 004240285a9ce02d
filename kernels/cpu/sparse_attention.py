"""Attention of one new token per sequence that reads few rows of V, on the CPU.

    q [B, H, D]; K and V as `KVSegment`s in fp16, bf16, fp32 or P16; query head h reads K and V head h // (H / Hkv)

It (FlexGen, Sheng et al., ICML 2023, section 5) scores all of K, keeps the scores, and reads only the rows of V that
weigh most. Scores are base-2 logarithms throughout. All that is not small is a part of one fp32 workspace, which the
caller may own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from llvmlite import ir
from numba import get_thread_id, prange, types
from numba.extending import intrinsic
from torch import Tensor

from ..formats import KVSegment
from ..sizes import CHUNK, cpu_sparse_bytes, line_aligned, sparse_scratch
from .attention_arrays import cut, pad_query, result, row_width, segment_sizes, segment_stores
from .jit import compiled, compiled_parallel, launch, num_threads, part, vectorize_apart
from .kv_chunks import after, place, prefetch_tokens, score_chunk, widen_tokens
from .kv_rows import add_values
from .softmax import LOG2E, exp2_number, log_sum

AHEAD = 8  # rows of V that are on their way while one is added


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
            here, then = (where, token), after(where, token, tokens)
            at = rows[0] * S + starts[seq] + page * tokens + token
            count = min(CHUNK, valid - token)
            score_chunk(k, k, offsets, here, count, 0, then, q, rows, width, wide, scores, at, S)


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
        lse[r] = log_sum(scores[r, :length])
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
            prefetch_tokens(v, place(offsets, 1, (t // tokens, seq, head), t % tokens), 1, width)
        t = picks[r, n] - starts[seq]
        if 0 <= t < lens[seq]:
            weight[0] = exp2_number(scores[r, picks[r, n]] - lse[r])
            widen_tokens(v, place(offsets, 1, (t // tokens, seq, head), t % tokens), 1, width, wide)
            add_values(weight, wide, 1, part(acc, r * width, width))


@compiled_parallel
def _gather_kernel(scratch, v, offsets, scores, lse, picks, num_picks, starts, lens, tokens, kv_heads, width, acc):
    """A segment's part of the weighted rows of V: acc [B * H * width] += 2 ** (score - lse) * v."""
    for r in prange(len(lse)):
        i = np.int64(r)
        _gather_head(i, scratch, v, offsets, scores, lse, picks, num_picks, starts, lens, tokens, kv_heads, width, acc)


def sparse_workspace_bytes(num_seqs: int, num_heads: int, head_dim: int, max_tokens: int, max_keep: int) -> int:
    """Return the same of `sparse_decode_attention`, as `cpu_sparse_bytes`."""
    return cpu_sparse_bytes(num_seqs, num_heads, head_dim, max_tokens, max_keep, num_threads())


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
    rows, width = num_seqs * num_heads, row_width(segments, dim)
    (counts,) = cut(workspace, num_seqs)
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
    query, acc, scores, picks, num_picks, lse, scratch = cut(workspace, *sizes)
    _scale_query(q, scale, query.view(rows, width))
    acc.zero_()
    work = scratch.view(threads, size).numpy()
    parts = [s for s in segments if s.k[0].numel()]
    stores = [segment_stores(s, width) for s in parts]
    for segment, (k, _, offsets) in zip(_starting(parts, counted), stores, strict=True):
        where = counted, *segment_sizes(segment), scores.numpy(), longest
        launch(_scores_kernel, work, query.numpy(), width, k, offsets, *where)
    matrix = scores.view(rows, longest).numpy()
    picked = picks.view(torch.int32).view(rows, most).numpy(), num_picks.view(torch.int32).numpy()
    launch(_select_kernel, work.view(np.int32), matrix, counted, keeps, *picked, lse.numpy())
    for segment, (_, v, offsets) in zip(_starting(parts, counted), stores, strict=True):
        chosen = (matrix, lse.numpy(), *picked, counted)
        launch(_gather_kernel, work, v, offsets, *chosen, *segment_sizes(segment), width, acc.numpy())
    return result(acc.view(rows, width), q, out)


def _starting(segments: Sequence[KVSegment], counted: np.ndarray) -> Iterator[KVSegment]:
    """The segments, one by one; `counted` int32 [B] is the tokens before each, and of all of them in the end."""
    counted[:] = 0
    for segment in segments:
        yield segment
        counted += segment.lens.numpy()


def _scale_query(q: Tensor, scale: float | None, query: Tensor) -> None:
    """q with scale and base in it, padded like the K it meets: query [B * H, width]."""
    pad_query(q, query)
    query.mul_((q.shape[-1] ** -0.5 if scale is None else scale) * LOG2E)
