"""Decode attention: one new token per sequence attends to its cached tokens, which lie in one to three segments.

    q [B, H, D]   segments (formats.py's KVSegment): K and V [pages, B, Hkv, T, D], or P16 codes and scales
    out [B, H, D]   log-sum-exp [B, H] fp32, natural logarithm, -inf where a sequence has no token

Each segment is a launch of its own, for its own page length and format: full pages in 4 bits, the open page and the
newest token in 16. A program takes one sequence, one K/V head with all its query heads, and one *split*, a run of the
sequence's tokens; it leaves a *partial* result, the attention over its run and that run's log-sum-exp. A second kernel
merges the partial results of all segments and splits; a lone one is written to `out` directly. Partial results from
elsewhere (the host's share of a sequence) merge the same way.

Everything is transposed, scores [tokens, rows] and accumulators [D, rows], rows being the query heads of one K/V head.
Matrix instructions are 16 x 8, and it is the tokens that fill the 16: a model without grouped queries wastes 7 of 8
columns instead of 15 of 16 rows, and the softmax's work and the accumulators' registers halve.

A program is one warp with a tile of 4096 numbers of K. More warps would exchange the softmax's maxima and the weights
through shared memory in every tile; one keeps them in registers. Instructions per element of K and V, counted in code
compiled for sm_80, P16, D 128: 3.0 so; 4.2 with four warps on a tile twice as large; 4.6 with four warps and rows and
columns the other way. Not yet timed on a GPU.

P16: K's codes go into the products as they are, four planes of them, and scores are `s * (Q . codes) + sum(Q) * min`
by group; V's scale goes into the weights, its minimum into a sum of its own. Codes are exact in 16 bits, so this rounds
less than dequantising would.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chips import Chip, chip_of
from .formats import KVSegment, dequantize_kv
from .sizes import MAX_SPLITS, MIN_SPLIT_TOKENS, WARPS_PER_SM, kv_width
from .unpack import unpack

MASKED = tl.constexpr(-1e30)  # finite: the difference of two masked scores is a number
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

TILE = 4096  # K elements, see above
NUM_STAGES = 2  # one tile under way while one is used; the 16 programs of a multiprocessor cover the rest
MERGE_CONSTANTS = {"BLOCK_S": 16, "num_warps": 1}  # partial results at a time


@triton.jit
def place(kv_heads):
    """The sequence and the K/V head of this program."""
    pid = tl.program_id(0)
    return (pid // kv_heads).to(tl.int64), (pid % kv_heads).to(tl.int64)


@triton.jit
def split_of(length, BLOCK_T: tl.constexpr):
    """The tokens of this program's split, from whole tiles: first, and one past the last."""
    per_split = tl.cdiv(tl.cdiv(length, tl.num_programs(1)), BLOCK_T) * BLOCK_T
    start = tl.program_id(1) * per_split
    return start, tl.minimum(start + per_split, length)


@triton.jit
def token_offsets(start, stride_n, ROW: tl.constexpr, T: tl.constexpr, BLOCK_T: tl.constexpr):
    """Offsets of the tokens from `start` on, [BLOCK_T] int64; `start` is a multiple of BLOCK_T, a token ROW numbers."""
    offs_t = tl.arange(0, BLOCK_T)
    if T % BLOCK_T == 0:  # the tile lies in one page
        return tl.cast(start // T, tl.int64) * stride_n + (start % T + offs_t) * ROW
    else:
        return ((start + offs_t) // T).to(tl.int64) * stride_n + (start + offs_t) % T * ROW


@triton.jit
def load_columns(
    ptr, stride_h, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, BLOCK_R: tl.constexpr
):
    """Numbers FIRST.. of GROUP query heads: [WIDTH, BLOCK_R], zero where there are none."""
    offs_d = FIRST + tl.arange(0, WIDTH)
    offs_r = tl.arange(0, BLOCK_R)
    mask = (offs_d < D)[:, None] & (offs_r < GROUP)[None, :]
    return tl.load(ptr + offs_r[None, :] * stride_h + offs_d[:, None], mask=mask, other=0.0)


@triton.jit
def _store_columns(
    ptr,
    x,
    stride_h,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    offs_d = FIRST + tl.arange(0, WIDTH)
    offs_r = tl.arange(0, BLOCK_R)
    mask = (offs_d < D)[:, None] & (offs_r < GROUP)[None, :]
    tl.store(ptr + offs_r[None, :] * stride_h + offs_d[:, None], x, mask=mask)


@triton.jit
def store_lse(ptr, m, total, GROUP: tl.constexpr, BLOCK_R: tl.constexpr):
    """The natural logarithm of `total * 2**m`, [BLOCK_R], of GROUP neighbouring heads."""
    offs_r = tl.arange(0, BLOCK_R)
    lse = tl.where(total > 0.0, (m + tl.log2(tl.maximum(total, 1e-30))) * LN2, float("-inf"))
    tl.store(ptr + offs_r, lse, mask=offs_r < GROUP)


@triton.jit
def dense_scores(
    q, k_ptr, stride_kn, start, end, D: tl.constexpr, T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr
):
    """K . q of tokens start..end: q [BLOCK_D, BLOCK_R] -> [BLOCK_T, BLOCK_R] fp32."""
    offs_d = tl.arange(0, BLOCK_D)
    valid = start + tl.arange(0, BLOCK_T) < end
    offs_k = token_offsets(start, stride_kn, D, T, BLOCK_T)[:, None] + offs_d[None, :]
    k = tl.load(k_ptr + offs_k, mask=valid[:, None] & (offs_d < D)[None, :], other=0.0)
    return tl.where(valid[:, None], tl.dot(k, q, input_precision="ieee"), MASKED)


@triton.jit
def _scale(word):
    return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _minimum(word):
    return (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def load_planes(q_ptr, stride_qh, D: tl.constexpr, P: tl.constexpr, GROUP: tl.constexpr, BLOCK_R: tl.constexpr):
    """Query heads as the four planes of P16, each [P/4, BLOCK_R]."""
    W: tl.constexpr = P // 4
    return (
        load_columns(q_ptr, stride_qh, 0 * W, W, D, GROUP, BLOCK_R),
        load_columns(q_ptr, stride_qh, 1 * W, W, D, GROUP, BLOCK_R),
        load_columns(q_ptr, stride_qh, 2 * W, W, D, GROUP, BLOCK_R),
        load_columns(q_ptr, stride_qh, 3 * W, W, D, GROUP, BLOCK_R),
    )


@triton.jit
def plane_sums(q):
    """Sums along D of the four planes, each [BLOCK_R] fp32."""
    return (
        tl.sum(q[0].to(tl.float32), 0),
        tl.sum(q[1].to(tl.float32), 0),
        tl.sum(q[2].to(tl.float32), 0),
        tl.sum(q[3].to(tl.float32), 0),
    )


@triton.jit
def q4_scores(
    q, q_sums, k_ptr, scales_ptr, stride_kn, stride_sn, start, end, P: tl.constexpr, T: tl.constexpr,
    BLOCK_T: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """K . q of tokens start..end of P16's K: four planes of q -> [BLOCK_T, BLOCK_R] fp32.

    `scales_ptr` points to a scale and its minimum as one 32-bit word.
    """
    W: tl.constexpr = P // 4
    PLANES: tl.constexpr = 256 // P  # of one group
    valid = start + tl.arange(0, BLOCK_T) < end
    offs_w = tl.arange(0, W)
    offs_k = token_offsets(start, stride_kn, W, T, BLOCK_T)[:, None] + offs_w[None, :]
    codes = unpack(tl.load(k_ptr + offs_k, mask=valid[:, None], other=0), q[0].dtype, ASM)
    scales_ptr += token_offsets(start, stride_sn, P // 64, T, BLOCK_T)
    s = tl.zeros((BLOCK_T, q[0].shape[1]), tl.float32)
    for g in tl.static_range(P // 64):
        word = tl.load(scales_ptr + g, mask=valid, other=0)
        part = tl.dot(codes[g * PLANES], q[g * PLANES], input_precision="ieee")
        q_sum = q_sums[g * PLANES]
        for j in tl.static_range(g * PLANES + 1, (g + 1) * PLANES):
            part = tl.dot(codes[j], q[j], part, input_precision="ieee")
            q_sum += q_sums[j]
        s += part * _scale(word)[:, None] + q_sum[None, :] * _minimum(word)[:, None]
    return tl.where(valid[:, None], s, MASKED)


@triton.jit
def softmax_step(s, m, total, scale):
    """Fold a tile's scores into the running maximum and sum; both and the weights count in powers of two.

    s [BLOCK_T, BLOCK_R] -> weights p [BLOCK_T, BLOCK_R], what older results shrink by [BLOCK_R], new m, new sum.
    """
    m_new = tl.maximum(m, tl.max(s, 0) * scale)
    shrink = tl.exp2(m - m_new)
    p = tl.exp2(s * scale - m_new[None, :])
    return p, shrink, m_new, total * shrink + tl.sum(p, 0)


@triton.jit
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, lens_ptr, o_ptr, lse_ptr, scale, kv_heads, stride_qb, stride_qh, stride_kn, stride_kb,
    stride_kh, stride_vn, stride_vb, stride_vh, stride_os, stride_ob, stride_oh, stride_ls, D: tl.constexpr,
    T: tl.constexpr, GROUP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One split of one sequence and K/V head; scale is the softmax's times log2(e)."""
    seq, head = place(kv_heads)
    start, end = split_of(tl.load(lens_ptr + seq), BLOCK_T)
    offs_d = tl.arange(0, BLOCK_D)
    q = load_columns(q_ptr + seq * stride_qb + head * GROUP * stride_qh, stride_qh, 0, BLOCK_D, D, GROUP, BLOCK_R)
    k_ptr += seq * stride_kb + head * stride_kh
    v_ptr += seq * stride_vb + head * stride_vh
    m = tl.full((BLOCK_R,), MASKED, tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    acc = tl.zeros((BLOCK_D, BLOCK_R), tl.float32)
    for t in range(start, end, BLOCK_T):
        s = dense_scores(q, k_ptr, stride_kn, t, end, D, T, BLOCK_D, BLOCK_T)
        p, shrink, m, total = softmax_step(s, m, total, scale)
        valid = t + tl.arange(0, BLOCK_T) < end
        offs_v = token_offsets(t, stride_vn, D, T, BLOCK_T)[None, :] + offs_d[:, None]
        v = tl.load(v_ptr + offs_v, mask=valid[None, :] & (offs_d < D)[:, None], other=0.0)
        acc = tl.dot(v, p.to(v.dtype), acc * shrink[None, :], input_precision="ieee")
    split = tl.program_id(1).to(tl.int64)
    o_ptr += split * stride_os + seq * stride_ob + head * GROUP * stride_oh
    lse_ptr += split * stride_ls + (seq * kv_heads + head) * GROUP
    acc = acc / tl.maximum(total, 1e-30)[None, :]
    _store_columns(o_ptr, acc, stride_oh, 0, BLOCK_D, D, GROUP, BLOCK_R)
    store_lse(lse_ptr, m, total, GROUP, BLOCK_R)


@triton.jit
def _decode_q4_kernel(
    q_ptr, k_ptr, ks_ptr, v_ptr, vs_ptr, lens_ptr, o_ptr, lse_ptr, scale, kv_heads, stride_qb, stride_qh,
    stride_kn, stride_kb, stride_kh, stride_ksn, stride_ksb, stride_ksh, stride_vn, stride_vb, stride_vh,
    stride_vsn, stride_vsb, stride_vsh, stride_os, stride_ob, stride_oh, stride_ls, D: tl.constexpr,
    P: tl.constexpr, T: tl.constexpr, GROUP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """`_decode_kernel` over P16. Scales and minima are 32-bit words; V's planes 0..3 and groups as K's."""
    W: tl.constexpr = P // 4
    PLANES: tl.constexpr = 256 // P  # of one group
    seq, head = place(kv_heads)
    start, end = split_of(tl.load(lens_ptr + seq), BLOCK_T)
    offs_w = tl.arange(0, W)
    q = load_planes(q_ptr + seq * stride_qb + head * GROUP * stride_qh, stride_qh, D, P, GROUP, BLOCK_R)
    q_sums = plane_sums(q)
    k_ptr += seq * stride_kb + head * stride_kh
    ks_ptr += seq * stride_ksb + head * stride_ksh
    v_ptr += seq * stride_vb + head * stride_vh
    vs_ptr += seq * stride_vsb + head * stride_vsh
    m = tl.full((BLOCK_R,), MASKED, tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    none = tl.zeros((W, BLOCK_R), tl.float32)
    acc = (none, none, none, none)  # of p * scale * code
    minima = (total, total, total, total)  # of p * minimum, by plane
    for t in range(start, end, BLOCK_T):
        s = q4_scores(q, q_sums, k_ptr, ks_ptr, stride_kn, stride_ksn, t, end, P, T, BLOCK_T, ASM)
        p, shrink, m, total = softmax_step(s, m, total, scale)
        valid = t + tl.arange(0, BLOCK_T) < end
        offs_v = token_offsets(t, stride_vn, W, T, BLOCK_T)[None, :] + offs_w[:, None]
        codes = unpack(tl.load(v_ptr + offs_v, mask=valid[None, :], other=0), q[0].dtype, ASM)
        words = vs_ptr + token_offsets(t, stride_vsn, P // 64, T, BLOCK_T)
        acc, minima = _accumulate_q4(acc, minima, p, shrink, codes, words, valid, PLANES)
    split = tl.program_id(1).to(tl.int64)
    o_ptr += split * stride_os + seq * stride_ob + head * GROUP * stride_oh
    lse_ptr += split * stride_ls + (seq * kv_heads + head) * GROUP
    norm = tl.maximum(total, 1e-30)[None, :]
    for j in tl.static_range(4):
        x = (acc[j] + minima[j][None, :]) / norm
        _store_columns(o_ptr, x, stride_oh, j * W, W, D, GROUP, BLOCK_R)
    store_lse(lse_ptr, m, total, GROUP, BLOCK_R)


@triton.jit
def _weigh(p, ptr, valid, DTYPE: tl.constexpr):
    """Weights times a group's scale, as an operand, and the sum over tokens of weights times its minimum."""
    word = tl.load(ptr, mask=valid, other=0)
    return (p * _scale(word)[:, None]).to(DTYPE), tl.sum(p * _minimum(word)[:, None], 0)


@triton.jit
def _accumulate_q4(acc, minima, p, shrink, codes, words, valid, PLANES: tl.constexpr):
    """Fold a tile of V into four planes' accumulators [P/4, BLOCK_R] and sums [BLOCK_R]."""
    DTYPE: tl.constexpr = codes[0].dtype
    p0, z0 = _weigh(p, words, valid, DTYPE)
    p1, z1, p2, z2, p3, z3 = p0, z0, p0, z0, p0, z0
    if PLANES == 2:
        p2, z2 = _weigh(p, words + 1, valid, DTYPE)
        p3, z3 = p2, z2
    if PLANES == 1:
        p1, z1 = _weigh(p, words + 1, valid, DTYPE)
        p2, z2 = _weigh(p, words + 2, valid, DTYPE)
        p3, z3 = _weigh(p, words + 3, valid, DTYPE)
    acc = (
        tl.dot(codes[0], p0, acc[0] * shrink[None, :], input_precision="ieee"),
        tl.dot(codes[1], p1, acc[1] * shrink[None, :], input_precision="ieee"),
        tl.dot(codes[2], p2, acc[2] * shrink[None, :], input_precision="ieee"),
        tl.dot(codes[3], p3, acc[3] * shrink[None, :], input_precision="ieee"),
    )
    minima = (minima[0] * shrink + z0, minima[1] * shrink + z1, minima[2] * shrink + z2, minima[3] * shrink + z3)
    return acc, minima


@triton.jit
def _merge_kernel(
    parts_ptr, lses_ptr, o_ptr, lse_ptr, slots, num_heads, stride_ob, stride_oh, stride_ps, stride_ls,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Partial results [slots, B, H, D] and [slots, B, H] of one sequence and head, weighted by their sums."""
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    m = MASKED
    total = 0.0
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, slots, BLOCK_S):
        offs_s = first + tl.arange(0, BLOCK_S).to(tl.int64)
        lse = tl.load(lses_ptr + offs_s * stride_ls + row, mask=offs_s < slots, other=float("-inf")) * LOG2E
        m_new = tl.maximum(m, tl.max(lse, 0))
        weight = tl.exp2(lse - m_new)
        mask = (weight > 0.0)[:, None] & (offs_d < D)[None, :]  # an empty part may hold anything
        part = tl.load(parts_ptr + offs_s[:, None] * stride_ps + row * D + offs_d[None, :], mask=mask, other=0.0)
        shrink = tl.exp2(m - m_new)
        acc = acc * shrink + tl.sum(part * weight[:, None], 0)
        total = total * shrink + tl.sum(weight, 0)
        m = m_new
    o_ptr += (row // num_heads) * stride_ob + (row % num_heads) * stride_oh
    tl.store(o_ptr + offs_d, acc / tl.maximum(total, 1e-30), mask=offs_d < D)
    tl.store(lse_ptr + row, tl.where(total > 0.0, (m + tl.log2(tl.maximum(total, 1e-30))) * LN2, float("-inf")))


def decode_constants(
    chip: Chip, dtype: torch.dtype, head_dim: int, group: int, block_len: int, *, q4: bool
) -> dict[str, int]:
    """Compile time arguments and launch options of the kernels that go over K, for q of `dtype`.

    `group` query heads share a K/V head. Every chip's own are compiled in the tests.
    """
    width, rows, tile, num_warps = kv_width(head_dim), triton.next_power_of_2(group), TILE, 1
    if not chip.has_mma:  # products go through a thread's registers
        rows, tile, num_warps = rows if rows == 1 else max(rows, 8), TILE // 2, 1 if rows <= 8 else 4
    elif chip.backend == "hip":
        rows = max(rows, 16)
    else:
        rows = max(rows, 8)
        tile = TILE // 2 if rows > 8 and not q4 else TILE  # whole, it spills where tokens' places are computed singly
    sizes = {"D": head_dim, "T": block_len, "GROUP": group, "BLOCK_R": rows, "BLOCK_T": max(16, tile // width)}
    special = {"P": width, "ASM": chip.asm and dtype != torch.float32} if q4 else {"BLOCK_D": width}
    return {**sizes, **special, "num_warps": num_warps, "num_stages": NUM_STAGES}


def num_splits(num_sms: int, programs: int, capacity: int) -> int:
    """Splits of each sequence: enough programs for the whole GPU, none with only a few tokens. Not yet tuned on one."""
    return max(1, min(WARPS_PER_SM * num_sms // programs, capacity // MIN_SPLIT_TOKENS, MAX_SPLITS))


def capacity_of(segment: KVSegment) -> int:
    """Tokens that a sequence of this segment may have at most."""
    return segment.k[0].shape[0] * segment.k[0].shape[3]


def is_q4(tensors: tuple[Tensor, ...]) -> bool:
    return len(tensors) == 2


def kernel_tensors(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """K or V as the kernels read it: P16's scale and minimum as one 32-bit word, [pages, B, Hkv, T, P/64]."""
    if not is_q4(tensors):
        return list(tensors)
    codes, scales = tensors
    return [codes, scales.view(torch.int32)[..., 0]]


def checked(q: Tensor, segments: Sequence[KVSegment]) -> list[KVSegment]:
    """The segments that can hold tokens; a layout that the kernels cannot read is a bug."""
    num_seqs, num_heads, head_dim = q.shape
    assert q.stride(2) == 1 or head_dim == 1, q.stride()
    for k, v, lens in segments:
        assert lens.shape == (num_seqs,) and lens.dtype == torch.int32 and lens.is_contiguous(), (
            lens.shape,
            lens.dtype,
        )
        for tensors in (k, v):
            width = kv_width(head_dim) // 4 if is_q4(tensors) else head_dim
            first = tensors[0]
            assert first.shape[1] == num_seqs and num_heads % first.shape[2] == 0, (q.shape, first.shape)
            assert first.shape[4] == width, (head_dim, first.shape)
            assert first.dtype == (torch.int16 if is_q4(tensors) else q.dtype), (q.dtype, first.dtype)
            assert all(t[0, 0, 0].is_contiguous() for t in tensors if t.numel()), [t.stride() for t in tensors]
    return [segment for segment in segments if capacity_of(segment)]


Empty = Callable[..., Tensor]  # (*shape, dtype=): makes a temporary on q's device


def decode_attention(
    q: Tensor,
    segments: Sequence[KVSegment],
    *,
    scale: float | None = None,
    out: Tensor | None = None,
    empty: Empty | None = None,
) -> Tensor:
    """Softmax attention of one new token per sequence over the union of its segments: q [B, H, D] -> [B, H, D].

    q is fp16, bf16 or fp32 with D dense, and K and V of its dtype or P16. Hkv divides H, and heads h * H/Hkv.. share
    K/V head h. Every sequence has a token in at least one segment. `scale` (> 0) is D**-0.5 unless given. `out` may be
    any view with D dense; `empty` makes the temporaries, by default torch does.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    if q.numel():
        _attend(q, segments, scale, out, empty or partial(torch.empty, device=q.device))
    return out


def decode_attention_lse(
    q: Tensor, segments: Sequence[KVSegment], *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The partial attention over these segments, to be merged: q [B, H, D] -> [B, H, D] fp32, log-sum-exp [B, H] fp32.

    As `decode_attention`, but a sequence may have no token at all: its rows are 0 and its log-sum-exp is -inf.
    """
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    if not q.numel() or not any(map(capacity_of, segments)):
        return out, torch.full(q.shape[:2], float("-inf"), device=q.device)
    return out, _attend(q, segments, scale, out, partial(torch.empty, device=q.device))


def _attend(q: Tensor, segments: Sequence[KVSegment], scale: float | None, out: Tensor, empty: Empty) -> Tensor:
    segments = checked(q, segments)
    num_seqs, num_heads, head_dim = q.shape
    scale = head_dim**-0.5 if scale is None else scale
    assert scale > 0, scale
    chip = chip_of(q.device)
    splits = [num_splits(chip.num_sms, num_seqs * s.k[0].shape[2], capacity_of(s)) for s in segments]
    slots = sum(splits)
    lses = empty(slots, num_seqs, num_heads, dtype=torch.float32)
    if slots == 1:
        _launch(q, segments[0], scale, out[None], lses)
        return lses[0]
    parts = empty(slots, *q.shape, dtype=torch.float32)
    for segment, part, lse in zip(segments, parts.split(splits), lses.split(splits), strict=True):
        _launch(q, segment, scale, part, lse)
    return _merge(parts, lses, out, empty)


def _launch(q: Tensor, segment: KVSegment, scale: float, out: Tensor, lse: Tensor) -> None:
    """One segment, in as many splits as out [splits, B, H, D] and lse [splits, B, H] have."""
    num_seqs, num_heads, head_dim = q.shape
    kv_heads, block_len = segment.k[0].shape[2:4]
    k, v = kernel_tensors(segment.k), kernel_tensors(segment.v)
    q4 = is_q4(segment.k)
    constants = decode_constants(chip_of(q.device), q.dtype, head_dim, num_heads // kv_heads, block_len, q4=q4)
    (_decode_q4_kernel if q4 else _decode_kernel)[(num_seqs * kv_heads, len(out))](
        q, *k, *v, segment.lens, out, lse, scale * LOG2E.value, kv_heads, *q.stride()[:2],
        *[stride for t in k + v for stride in t.stride()[:3]], *out.stride()[:3], lse.stride(0), **constants,
    )  # fmt: skip


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor], *, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention over a union from that over its parts: [B, H, D] and log-sum-exps [B, H] fp32 to the same.

    All parts on one device, in any float dtype. `out` is a view with D dense, fp32 and new unless given. A part whose
    log-sum-exp is -inf counts for nothing, whatever it holds.
    """
    parts = torch.stack([part.float() for part in outs])
    out = torch.empty(outs[0].shape, dtype=torch.float32, device=parts.device) if out is None else out
    return out, _merge(parts, torch.stack(list(lses)), out, partial(torch.empty, device=parts.device))


def _merge(parts: Tensor, lses: Tensor, out: Tensor, empty: Empty) -> Tensor:
    slots, num_seqs, num_heads, head_dim = parts.shape
    lse = empty(num_seqs, num_heads, dtype=torch.float32)
    if out.numel():
        _merge_kernel[(num_seqs * num_heads,)](
            parts, lses, out, lse, slots, num_heads, *out.stride()[:2], parts.stride(0), lses.stride(0),
            D=head_dim, BLOCK_D=triton.next_power_of_2(head_dim), **MERGE_CONSTANTS,
        )  # fmt: skip
    return lse


def decode_attention_ref(q: Tensor, segments: Sequence[KVSegment], *, scale: float | None = None) -> Tensor:
    """Reference of `decode_attention`, in fp32, or in fp64 for q in fp64: [B, H, D] -> [B, H, D] in q's dtype."""
    return decode_attention_lse_ref(q, segments, scale=scale)[0].to(q.dtype)


def decode_attention_lse_ref(
    q: Tensor, segments: Sequence[KVSegment], *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Reference of `decode_attention_lse`, in fp32, or in fp64 for q in fp64."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    num_heads, head_dim = q.shape[1:]
    out = torch.zeros(q.shape, dtype=dtype, device=q.device)
    lse = torch.full(q.shape[:2], float("-inf"), dtype=dtype, device=q.device)
    for b, (row, lens) in enumerate(zip(q, zip(*(s.lens.tolist() for s in segments), strict=True), strict=True)):
        if sum(lens):
            k, v = (
                torch.cat([tokens_ref(s[i], b, n, head_dim, dtype) for s, n in zip(segments, lens, strict=True)])
                for i in (0, 1)
            )
            k, v = (x.repeat_interleave(num_heads // x.shape[1], 1) for x in (k, v))  # [S, H, D]
            scores = torch.einsum("hd,shd->hs", row.to(dtype), k) * (head_dim**-0.5 if scale is None else scale)
            lse[b] = scores.logsumexp(-1)
            out[b] = torch.einsum("hs,shd->hd", scores.softmax(-1), v)
    return out, lse


def tokens_ref(tensors: tuple[Tensor, ...], seq: int, length: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """K or V of one sequence's first tokens in a segment: [length, Hkv, D]."""
    mine = [t[:, seq].transpose(1, 2).flatten(0, 1)[:length] for t in tensors]
    return dequantize_kv(*mine, head_dim, dtype) if is_q4(tensors) else mine[0].to(dtype)
