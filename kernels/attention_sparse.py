"""Sparse decode attention (FlexGen's): every head reads V of its highest-weighted tokens only.

    q [B, H, D]   segments (formats.py's KVSegment)   keep int32 [B]   out [B, H, D]

Scores are taken over all K and the softmax over all tokens; each sequence and query head then adds V of the `keep[b]`
highest-weighted earlier tokens and of the newest, with their weights in the whole softmax: they do not sum to 1
(Sheng et al., FlexGen, ICML 2023, section 5).

Three steps. A score pass over K, tiles and splits as in attention_decode.py, writes scores fp32 [B, H, S] of all S
places for tokens, segment behind segment, and each split's log-sum-exp. `torch.topk` picks. A gather pass reads the
picked rows of V by their places on the device, so V may also lie in pinned host memory, which the GPU reads over its
link: only the rows that count cross it. Not yet run on a GPU, V on the host least of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_decode import (
    LOG2E,
    MASKED,
    Empty,
    capacity_of,
    checked,
    decode_constants,
    dense_scores,
    is_q4,
    kernel_tensors,
    load_columns,
    load_planes,
    num_splits,
    place,
    plane_sums,
    q4_scores,
    softmax_step,
    split_of,
    store_lse,
    tokens_ref,
)
from .chips import Chip, chip_of
from .formats import KVSegment
from .sizes import kv_width
from .unpack import unpack

GATHER_ROWS = 32  # of V at a time: 8 KiB under way in a program, 16-bit, D 128
GATHER_WARPS = 4


@triton.jit
def _store_scores(ptr, s, start, end, stride_r, GROUP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr):
    offs_t = start + tl.arange(0, BLOCK_T)
    offs_r = tl.arange(0, BLOCK_R)
    mask = (offs_t < end)[:, None] & (offs_r < GROUP)[None, :]
    tl.store(ptr + offs_r[None, :] * stride_r + offs_t[:, None], s, mask=mask)


@triton.jit
def _scores_kernel(
    q_ptr, k_ptr, lens_ptr, scores_ptr, lse_ptr, scale, kv_heads, stride_qb, stride_qh, stride_kn, stride_kb,
    stride_kh, stride_sr, stride_ls, D: tl.constexpr, T: tl.constexpr, GROUP: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One split of one sequence and K/V head; rows of scores are `stride_sr` apart, and begin with this segment."""
    seq, head = place(kv_heads)
    start, end = split_of(tl.load(lens_ptr + seq), BLOCK_T)
    q = load_columns(q_ptr + seq * stride_qb + head * GROUP * stride_qh, stride_qh, 0, BLOCK_D, D, GROUP, BLOCK_R)
    k_ptr += seq * stride_kb + head * stride_kh
    row = (seq * kv_heads + head) * GROUP
    scores_ptr += row * stride_sr
    m = tl.full((BLOCK_R,), MASKED, tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    for t in range(start, end, BLOCK_T):
        s = dense_scores(q, k_ptr, stride_kn, t, end, D, T, BLOCK_D, BLOCK_T)
        _store_scores(scores_ptr, s * scale, t, end, stride_sr, GROUP, BLOCK_R, BLOCK_T)
        _, _, m, total = softmax_step(s, m, total, scale * LOG2E)
    store_lse(lse_ptr + tl.program_id(1) * stride_ls + row, m, total, GROUP, BLOCK_R)


@triton.jit
def _scores_q4_kernel(
    q_ptr, k_ptr, ks_ptr, lens_ptr, scores_ptr, lse_ptr, scale, kv_heads, stride_qb, stride_qh, stride_kn,
    stride_kb, stride_kh, stride_ksn, stride_ksb, stride_ksh, stride_sr, stride_ls, D: tl.constexpr,
    P: tl.constexpr, T: tl.constexpr, GROUP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """`_scores_kernel` over P16."""
    seq, head = place(kv_heads)
    start, end = split_of(tl.load(lens_ptr + seq), BLOCK_T)
    q = load_planes(q_ptr + seq * stride_qb + head * GROUP * stride_qh, stride_qh, D, P, GROUP, BLOCK_R)
    q_sums = plane_sums(q)
    k_ptr += seq * stride_kb + head * stride_kh
    ks_ptr += seq * stride_ksb + head * stride_ksh
    row = (seq * kv_heads + head) * GROUP
    scores_ptr += row * stride_sr
    m = tl.full((BLOCK_R,), MASKED, tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    for t in range(start, end, BLOCK_T):
        s = q4_scores(q, q_sums, k_ptr, ks_ptr, stride_kn, stride_ksn, t, end, P, T, BLOCK_T, ASM)
        _store_scores(scores_ptr, s * scale, t, end, stride_sr, GROUP, BLOCK_R, BLOCK_T)
        _, _, m, total = softmax_step(s, m, total, scale * LOG2E)
    store_lse(lse_ptr + tl.program_id(1) * stride_ls + row, m, total, GROUP, BLOCK_R)


@triton.jit
def _picked(places_ptr, scores_ptr, lse, rank, end, first, capacity, BLOCK_K: tl.constexpr):
    """Places in this segment, [BLOCK_K], of picks rank..end, their weights, and which of them it has."""
    offs = rank + tl.arange(0, BLOCK_K)
    score = tl.load(scores_ptr + offs, mask=offs < end, other=float("-inf"))
    at = tl.load(places_ptr + offs, mask=offs < end, other=-1) - first
    mine = (at >= 0) & (at < capacity) & (score > MASKED)
    return at, tl.where(mine, tl.exp2((score - lse) * LOG2E), 0.0), mine


@triton.jit
def _gather_kernel(
    places_ptr, scores_ptr, lse_ptr, keep_ptr, v_ptr, o_ptr, num_heads, num_picks, first, capacity, stride_vn,
    stride_vb, stride_vh, stride_os, stride_ob, stride_oh, D: tl.constexpr, T: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Weighted sum of the rows of V picked by one query head, or of one split of them: places [B, H, num_picks].

    The newest token is pick 0; those behind pick keep[b] are dropped.
    """
    row = tl.program_id(0).to(tl.int64)
    seq, head = row // num_heads, row % num_heads
    start, end = split_of(tl.minimum(tl.load(keep_ptr + seq) + 1, num_picks), BLOCK_K)
    lse = tl.load(lse_ptr + row)
    places_ptr += row * num_picks
    scores_ptr += row * num_picks
    v_ptr += seq * stride_vb + (head // GROUP) * stride_vh
    offs_d = tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for rank in range(start, end, BLOCK_K):
        at, weight, mine = _picked(places_ptr, scores_ptr, lse, rank, end, first, capacity, BLOCK_K)
        offs_v = at // T * stride_vn + at % T * D
        v = tl.load(v_ptr + offs_v[:, None] + offs_d[None, :], mask=mine[:, None] & (offs_d < D)[None, :], other=0.0)
        acc += v.to(tl.float32) * weight[:, None]
    o_ptr += tl.program_id(1).to(tl.int64) * stride_os + seq * stride_ob + head * stride_oh
    tl.store(o_ptr + offs_d, tl.sum(acc, 0), mask=offs_d < D)


@triton.jit
def _gather_q4_kernel(
    places_ptr, scores_ptr, lse_ptr, keep_ptr, v_ptr, vs_ptr, o_ptr, num_heads, num_picks, first, capacity,
    stride_vn, stride_vb, stride_vh, stride_vsn, stride_vsb, stride_vsh, stride_os, stride_ob, stride_oh,
    D: tl.constexpr, P: tl.constexpr, T: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """`_gather_kernel` over P16; scales and minima [..., P/64, 2] fp16."""
    W: tl.constexpr = P // 4
    row = tl.program_id(0).to(tl.int64)
    seq, head = row // num_heads, row % num_heads
    start, end = split_of(tl.minimum(tl.load(keep_ptr + seq) + 1, num_picks), BLOCK_K)
    lse = tl.load(lse_ptr + row)
    places_ptr += row * num_picks
    scores_ptr += row * num_picks
    v_ptr += seq * stride_vb + (head // GROUP) * stride_vh
    vs_ptr += seq * stride_vsb + (head // GROUP) * stride_vsh
    offs_w = tl.arange(0, W)
    none = tl.zeros((BLOCK_K, W), tl.float32)
    acc = (none, none, none, none)
    for rank in range(start, end, BLOCK_K):
        at, weight, mine = _picked(places_ptr, scores_ptr, lse, rank, end, first, capacity, BLOCK_K)
        offs_v = at // T * stride_vn + at % T * W
        words = tl.load(v_ptr + offs_v[:, None] + offs_w[None, :], mask=mine[:, None], other=0)
        scales = vs_ptr + at // T * stride_vsn + at % T * (P // 32)
        codes = unpack(words, tl.float16, ASM)
        acc = (
            _add_plane(acc[0], codes[0], weight, scales + 0 * P // 256 * 2, mine),
            _add_plane(acc[1], codes[1], weight, scales + 1 * P // 256 * 2, mine),
            _add_plane(acc[2], codes[2], weight, scales + 2 * P // 256 * 2, mine),
            _add_plane(acc[3], codes[3], weight, scales + 3 * P // 256 * 2, mine),
        )
    o_ptr += tl.program_id(1).to(tl.int64) * stride_os + seq * stride_ob + head * stride_oh
    for j in tl.static_range(4):
        offs_d = j * W + offs_w
        tl.store(o_ptr + offs_d, tl.sum(acc[j], 0), mask=offs_d < D)


@triton.jit
def _add_plane(acc, codes, weight, scales, mine):
    scale = tl.load(scales, mask=mine, other=0.0).to(tl.float32)
    minimum = tl.load(scales + 1, mask=mine, other=0.0).to(tl.float32)
    return acc + codes.to(tl.float32) * (weight * scale)[:, None] + (weight * minimum)[:, None]


def sparse_decode_attention(
    q: Tensor,
    segments: Sequence[KVSegment],
    keep: Tensor,
    *,
    scale: float | None = None,
    max_keep: int | None = None,
    out: Tensor | None = None,
    empty: Empty | None = None,
) -> Tensor:
    """Attention that reads few rows of V: q [B, H, D], keep [B] int32 -> [B, H, D] in q's dtype.

    q and segments as for `decode_attention`; which of equal scores are kept is left open. `max_keep` is a bound on
    `keep` that the host knows; without it this call waits for the device to hear it. V may lie on the CPU, in pinned
    memory, while q and K are on the GPU (not yet run on one). `out` may be any view with D dense; `empty` makes the
    temporaries, by default torch does: all but those inside of torch's own top-k and log-sum-exp.
    """
    empty = empty or partial(torch.empty, device=q.device)
    out = empty(*q.shape, dtype=q.dtype) if out is None else out
    if not q.numel():
        return out
    segments = checked(q, segments)
    assert keep.shape == q.shape[:1] and keep.dtype == torch.int32, (keep.shape, keep.dtype)
    for tensor in (t for segment in segments for t in segment.v):
        assert tensor.device == q.device or tensor.is_pinned(), "V on the CPU must lie in pinned memory"
    scores, lse = _score(q, segments, scale, empty)
    if max_keep is None:
        max_keep = int(keep.max())
    places, picked = _pick(scores, segments, min(max_keep, scores.shape[2]), empty)
    return _gather(out, segments, keep, places, picked, lse, empty)


def _score(q: Tensor, segments: Sequence[KVSegment], scale: float | None, empty: Empty) -> tuple[Tensor, Tensor]:
    """Scores [B, H, S] fp32, -inf where no token is, and their log-sum-exp [B, H]."""
    num_seqs, num_heads, head_dim = q.shape
    scale = head_dim**-0.5 if scale is None else scale
    assert scale > 0, scale
    chip = chip_of(q.device)
    splits = [num_splits(chip.num_sms, num_seqs * s.k[0].shape[2], capacity_of(s)) for s in segments]
    total = sum(map(capacity_of, segments))
    scores = empty(num_seqs, num_heads, total, dtype=torch.float32).fill_(float("-inf"))
    lses = empty(sum(splits), num_seqs, num_heads, dtype=torch.float32)
    first = 0
    for segment, lse in zip(segments, lses.split(splits), strict=True):
        _launch_scores(q, segment, scale, scores[:, :, first:], lse)
        first += capacity_of(segment)
    if len(lses) == 1:
        return scores, lses[0]
    return scores, torch.logsumexp(lses, 0, out=empty(num_seqs, num_heads, dtype=torch.float32))


def _launch_scores(q: Tensor, segment: KVSegment, scale: float, scores: Tensor, lse: Tensor) -> None:
    num_seqs, num_heads, head_dim = q.shape
    kv_heads, block_len = segment.k[0].shape[2:4]
    k = kernel_tensors(segment.k)
    q4 = is_q4(segment.k)
    constants = decode_constants(chip_of(q.device), q.dtype, head_dim, num_heads // kv_heads, block_len, q4=q4)
    (_scores_q4_kernel if q4 else _scores_kernel)[(num_seqs * kv_heads, len(lse))](
        q, *k, segment.lens, scores, lse, scale, kv_heads, *q.stride()[:2],
        *[stride for t in k for stride in t.stride()[:3]], scores.stride(1), lse.stride(0), **constants,
    )  # fmt: skip


def _pick(scores: Tensor, segments: Sequence[KVSegment], count: int, empty: Empty) -> tuple[Tensor, Tensor]:
    """Places and scores [B, H, 1 + count] of the newest token and of the best others; the newest leaves `scores`."""
    num_seqs, num_heads = scores.shape[:2]
    places = empty(num_seqs, num_heads, 1 + count, dtype=torch.int64)
    picked = empty(num_seqs, num_heads, 1 + count, dtype=torch.float32)
    places[:, :, 0] = _newest(segments, empty)[:, None]
    newest = empty(num_seqs, num_heads, 1, dtype=torch.int64).copy_(places[:, :, :1])
    picked[:, :, :1] = torch.gather(scores, 2, newest, out=empty(num_seqs, num_heads, 1, dtype=torch.float32))
    if count:
        shape = (num_seqs, num_heads, count)
        best, others = empty(*shape, dtype=torch.float32), empty(*shape, dtype=torch.int64)
        torch.topk(scores.scatter_(2, newest, float("-inf")), count, 2, out=(best, others))
        picked[:, :, 1:], places[:, :, 1:] = best, others
    return places, picked


def _newest(segments: Sequence[KVSegment], empty: Empty) -> Tensor:
    """Place of each sequence's newest token, the last one of its last segment that has any: int32 [B]."""
    shape = segments[0].lens.shape
    newest = empty(*shape, dtype=torch.int32).zero_()
    place, some = empty(*shape, dtype=torch.int32), empty(*shape, dtype=torch.bool)
    first = 0
    for segment in segments:
        torch.gt(segment.lens, 0, out=some)
        torch.add(segment.lens, first - 1, out=place)
        torch.where(some, place, newest, out=newest)
        first += capacity_of(segment)
    return newest


def gather_constants(chip: Chip, head_dim: int, group: int, block_len: int, *, q4: bool) -> dict[str, int]:
    """Compile time arguments and launch options of the gather kernels."""
    sizes = {"D": head_dim, "T": block_len, "GROUP": group, "BLOCK_K": GATHER_ROWS, "num_warps": GATHER_WARPS}
    return sizes | ({"P": kv_width(head_dim), "ASM": chip.asm} if q4 else {"BLOCK_D": kv_width(head_dim)})


def _gather(
    out: Tensor,
    segments: Sequence[KVSegment],
    keep: Tensor,
    places: Tensor,
    picked: Tensor,
    lse: Tensor,
    empty: Empty,
) -> Tensor:
    num_seqs, num_heads, head_dim = out.shape
    chip = chip_of(out.device)
    num_picks = places.shape[2]
    splits = num_splits(chip.num_sms, num_seqs * num_heads * GATHER_WARPS, num_picks)
    alone = splits * len(segments) == 1
    shape = (splits * len(segments), *out.shape)
    parts = out[None] if alone else empty(*shape, dtype=torch.float32)
    first = 0
    for segment, part in zip(segments, parts.split(splits), strict=True):
        kv_heads, block_len = segment.v[0].shape[2:4]
        q4 = is_q4(segment.v)
        (_gather_q4_kernel if q4 else _gather_kernel)[(num_seqs * num_heads, splits)](
            places, picked, lse, keep, *segment.v, part, num_heads, num_picks, first, capacity_of(segment),
            *[stride for t in segment.v for stride in t.stride()[:3]], *part.stride()[:3],
            **gather_constants(chip, head_dim, num_heads // kv_heads, block_len, q4=q4),
        )  # fmt: skip
        first += capacity_of(segment)
    return out if alone else out.copy_(torch.sum(parts, 0, out=empty(*out.shape, dtype=torch.float32)))


def sparse_decode_attention_ref(
    q: Tensor, segments: Sequence[KVSegment], keep: Tensor, *, scale: float | None = None
) -> Tensor:
    """Reference of `sparse_decode_attention`, in fp32, or in fp64 for q in fp64."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    num_heads, head_dim = q.shape[1:]
    out = torch.zeros(q.shape, dtype=dtype, device=q.device)
    for b, lens in enumerate(zip(*(s.lens.tolist() for s in segments), strict=True)):
        if not sum(lens):
            continue
        k, v = (
            torch.cat([tokens_ref(s[i], b, n, head_dim, dtype) for s, n in zip(segments, lens, strict=True)])
            for i in (0, 1)
        )
        k, v = (x.repeat_interleave(num_heads // x.shape[1], 1) for x in (k, v))  # [S, H, D]
        scores = torch.einsum("hd,shd->hs", q[b].to(dtype), k) * (head_dim**-0.5 if scale is None else scale)
        weights = scores.softmax(-1)
        best = scores[:, :-1].topk(min(int(keep[b]), sum(lens) - 1)).indices
        kept = torch.zeros_like(weights).scatter_(1, best, 1.0)
        kept[:, -1] = 1.0
        out[b] = torch.einsum("hs,shd->hd", weights * kept, v)
    return out.to(q.dtype)
