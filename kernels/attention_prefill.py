"""Causal attention of whole prompts: flash attention over packed sequences.

q [T, H, D], k and v [T, Hkv, D], the tokens of all sequences one behind the other; strided views of one fused tensor
will do, only D must be dense. A program owns BLOCK_M rows of one sequence and head, walks over the keys before them in
tiles of BLOCK_N and keeps a running maximum and sum (Dao, FlashAttention-2, 2023): nothing of size s^2 exists.

Order of programs. All tiles of one sequence and head are neighbours, so that they find its keys and values in L2: with
heads innermost every tile would fetch them from memory again. Among themselves the longest, the last rows, go first;
so do the longest sequences. `packed.tiles` tells program n its sequence: a sequence of c tiles owns c * H programs in a
row, so n // H falls on one of its c entries.

The maximum is in units of log2, so that weights are exp2 of a difference; masked scores are -1e30, not infinity, which
would make NaN of a difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .chips import Chip, chip_of
from .packed import tiles

MASKED = tl.constexpr(-1.0e30)


class Shape(NamedTuple):
    """A launch configuration: rows and keys of a tile (rows a multiple of keys), warps, pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@triton.jit
def _rows(ptr, stride, offs_n, offs_d, length, D: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr):
    # [BLOCK_N, BLOCK_D] of K or V; WHOLE tiles lie inside the sequence and need no mask
    ptrs = ptr + offs_n[:, None] * stride + offs_d[None, :]
    if WHOLE and D == BLOCK_D:
        return tl.load(ptrs)
    elif WHOLE:
        return tl.load(ptrs, mask=(offs_d < D)[None, :], other=0.0)
    else:
        return tl.load(ptrs, mask=(offs_n < length)[:, None] & (offs_d < D)[None, :], other=0.0)


@triton.jit
def _attend(
    acc,
    m,
    total,
    q,
    k_ptr,
    v_ptr,
    stride_kt,
    stride_vt,
    scale,
    offs_m,
    first,
    end,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WHOLE: tl.constexpr,
):
    # Keys [first, end); k_ptr and v_ptr are at the key `first`.
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    for at in tl.range(first, end, BLOCK_N):
        k = _rows(k_ptr, stride_kt, offs_n, offs_d, end - at, D, BLOCK_D, WHOLE)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if not WHOLE:
            scores = tl.where(offs_m[:, None] >= at + offs_n[None, :], scores, MASKED)
        m_new = tl.maximum(m, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - m_new[:, None])  # scaled here: one fused multiply-add
        decay = tl.exp2(m - m_new)
        total = total * decay + tl.sum(weights, 1)
        v = _rows(v_ptr, stride_vt, offs_n, offs_d, end - at, D, BLOCK_D, WHOLE)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        m = m_new
        k_ptr += BLOCK_N * stride_kt  # steps, not products with `at`, which could pass 2^31
        v_ptr += BLOCK_N * stride_vt
    return acc, m, total


@triton.jit
def _prefill_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    tiles_ptr,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_ot,
    stride_oh,
    scale,
    H: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    entry = tiles_ptr + (pid // H) * 3
    start = tl.load(entry).to(tl.int64)
    length = tl.load(entry + 1)
    place = pid - tl.load(entry + 2) * H
    count = tl.cdiv(length, BLOCK_M)
    head = place // count
    first = (count - 1 - place % count) * BLOCK_M

    offs_m = first + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = (offs_m < length)[:, None] & (offs_d < D)[None, :]
    token = start + offs_m
    q_ptrs = q_ptr + token[:, None] * stride_qt + head.to(tl.int64) * stride_qh + offs_d[None, :]
    q = tl.load(q_ptrs, mask=mask_m, other=0.0)
    kv_head = (head // HEADS_PER_KV).to(tl.int64)
    k_ptr += start * stride_kt + kv_head * stride_kh
    v_ptr += start * stride_vt + kv_head * stride_vh

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m = tl.full([BLOCK_M], MASKED, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc, m, total = _attend(
        acc, m, total, q, k_ptr, v_ptr, stride_kt, stride_vt, scale, offs_m, 0, first, D, BLOCK_D, BLOCK_N, True
    )
    k_ptr += first.to(tl.int64) * stride_kt
    v_ptr += first.to(tl.int64) * stride_vt
    end = tl.minimum(first + BLOCK_M, length)
    acc, m, total = _attend(
        acc, m, total, q, k_ptr, v_ptr, stride_kt, stride_vt, scale, offs_m, first, end, D, BLOCK_D, BLOCK_N, False
    )
    out_ptrs = out_ptr + token[:, None] * stride_ot + head.to(tl.int64) * stride_oh + offs_d[None, :]
    tl.store(out_ptrs, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask_m)


def shape_of(chip: Chip, dtype: torch.dtype, head_dim: int) -> Shape:
    """The launch configuration of a chip; priors from published kernels, not yet timed."""
    if dtype == torch.float32:  # not a speed case: tiles that fit everywhere
        return Shape(32, 16, 4, 1)
    narrow = head_dim <= 64
    if chip.backend == "hip":  # 64 KiB for K and V, which are not copied asynchronously
        return Shape(128, 64, 4, 1) if narrow else Shape(128, 32, 4, 1)
    if chip.name in ("sm_90", "sm_100"):  # a warp group multiplies 64 rows; 128 keys of 128 spill 20 registers
        return Shape(128, 128, 8, 2) if narrow else Shape(128, 64, 8, 3)
    if chip.name == "sm_80" or narrow:  # four warps spill 16 to 38 registers
        return Shape(128, 64, 8, 3)
    return Shape(128, 32, 8, 3)  # 64 KiB of 99; 64 keys spill


def prefill_attention(q: Tensor, k: Tensor, v: Tensor, lens: Sequence[int], *, scale: float | None = None) -> Tensor:
    """Causal attention over packed sequences: q [T, H, D], k and v [T, Hkv, D], `lens` summing to T -> [T, H, D].

    fp16, bf16 or fp32, accumulated in fp32; `scale` (> 0) is D^-0.5 unless given. Waits for nothing on the device.
    """
    num_tokens, heads, dim = q.shape
    kv_heads = k.shape[1]
    assert sum(lens) == num_tokens == len(k) == len(v), (sum(lens), q.shape, k.shape, v.shape)
    assert k.shape == v.shape and k.shape[2] == dim and heads % kv_heads == 0, (q.shape, k.shape, v.shape)
    assert q.stride(2) == k.stride(2) == v.stride(2) == 1, (q.stride(), k.stride(), v.stride())
    chip = chip_of(q.device)
    scale = dim**-0.5 if scale is None else scale
    assert scale > 0, scale  # the maximum is taken before it
    if not chip.has_mma:  # Triton would multiply without tensor cores there
        return _prefill_attention_torch(q, k, v, lens, scale)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_tokens == 0:
        return out
    shape = shape_of(chip, q.dtype, dim)
    table = tiles(lens, shape.block_m, q.device)
    _prefill_attention_kernel[(len(table) * heads,)](
        q,
        k,
        v,
        out,
        table,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        out.stride(0),
        out.stride(1),
        scale * math.log2(math.e),
        H=heads,
        HEADS_PER_KV=heads // kv_heads,
        D=dim,
        BLOCK_M=shape.block_m,
        BLOCK_N=shape.block_n,
        BLOCK_D=max(16, triton.next_power_of_2(dim)),
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
    )
    return out


def _prefill_attention_torch(q: Tensor, k: Tensor, v: Tensor, lens: Sequence[int], scale: float) -> Tensor:
    """torch's own attention, a sequence at a time."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    at = 0
    for length in lens:
        part = slice(at, at + length)
        at += length
        if length:
            qs, ks, vs = (x[part].transpose(0, 1)[None] for x in (q, k, v))  # [1, H, s, D]
            grouped = q.shape[1] != k.shape[1]
            y = F.scaled_dot_product_attention(qs, ks, vs, is_causal=True, scale=scale, enable_gqa=grouped)
            out[part] = y[0].transpose(0, 1)
    return out


def prefill_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, lens: Sequence[int], *, scale: float | None = None
) -> Tensor:
    """The specification: a softmax over every sequence's whole score matrix, in fp32 or fp64."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    repeat = q.shape[1] // k.shape[1]
    parts = []
    for qs, ks, vs in zip(*(x.to(wide).split(list(lens)) for x in (q, k, v)), strict=True):
        ks, vs = ks.repeat_interleave(repeat, 1), vs.repeat_interleave(repeat, 1)
        scores = torch.einsum("mhd,nhd->hmn", qs, ks) * scale
        future = torch.ones(len(qs), len(qs), dtype=torch.bool, device=q.device).triu(1)
        parts.append(torch.einsum("hmn,nhd->mhd", scores.masked_fill(future, -torch.inf).softmax(-1), vs))
    return torch.cat(parts).to(q.dtype) if parts else torch.empty_like(q)
