"""The writing of K and V into the cache.

Quantisation to P16 (formats.py) and the scatter into pages are one pass over k and v [N, Hkv, D]. `fields` are a cache
segment's `k` or `v`: (values [pages, B, Hkv, T, D],), or P16's codes int16 [pages, B, Hkv, T, P/4] and scales fp16
[pages, B, Hkv, T, P/64, 2]. Token n of sequence b at position p goes to page p // T, place p % T. A program takes
BLOCK_N tokens of one head, because a head's tokens lie one behind the other in the cache: a prompt's writes become
whole lines.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .formats import LEVELS, SMALLEST_SCALE, quantize_kv
from .packed import slots
from .sizes import KV_GROUP, kv_width

_GROUP = tl.constexpr(KV_GROUP)
_LEVELS = tl.constexpr(LEVELS)
_SMALLEST = tl.constexpr(SMALLEST_SCALE)
_TWO_23 = tl.constexpr(2.0**23)
BLOCK_N = 16  # tokens of one head in a program: 4 KiB read with D = 128; not yet timed


@triton.jit
def _tokens(sequences_ptr, positions_ptr, N, TOKENS, BLOCK_N: tl.constexpr):
    # The program's tokens, and where each goes: (mask, token, page, sequence, place in the page)
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = token < N
    position = tl.load(positions_ptr + token, mask=mask, other=0)
    sequence = token
    if sequences_ptr is not None:
        sequence = tl.load(sequences_ptr + token, mask=mask, other=0)
    page = (position // TOKENS).to(tl.int64)
    return mask, token.to(tl.int64), page, sequence.to(tl.int64), position % TOKENS


@triton.jit
def _load_tokens(x_ptr, stride_xn, stride_xh, token, mask, offs_d, D: tl.constexpr):
    # [BLOCK_N, BLOCK_D] of one head; what lies behind D is 0
    ptrs = x_ptr + token[:, None] * stride_xn + tl.program_id(1).to(tl.int64) * stride_xh + offs_d[None, :]
    return tl.load(ptrs, mask=mask[:, None] & (offs_d < D)[None, :], other=0.0)


@triton.jit
def _quantize(x, offs_d, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    # fp32 [BLOCK_N, P] -> words int16 [BLOCK_N, P/4], scale and minimum fp16 [BLOCK_N, P/64]; formats.quantize_kv
    grouped: tl.constexpr = [BLOCK_N, BLOCK_D // _GROUP, _GROUP]
    real = (offs_d < D)[None, :]
    low = tl.min(tl.where(real, x, float("inf")).reshape(grouped), 2)  # [BLOCK_N, P/64]
    high = tl.max(tl.where(real, x, float("-inf")).reshape(grouped), 2)
    if D <= BLOCK_D - _GROUP:  # a group without a single real column has scale and minimum 0
        some = (tl.arange(0, BLOCK_D // _GROUP) * _GROUP < D)[None, :]
        low = tl.where(some, low, 0.0)
        scale = tl.where(some, tl.maximum(tl.div_rn(tl.where(some, high, 0.0) - low, 1.0 * _LEVELS), _SMALLEST), 0.0)
    else:
        scale = tl.maximum(tl.div_rn(high - low, 1.0 * _LEVELS), _SMALLEST)
    scale, low = scale.to(tl.float16), low.to(tl.float16)
    step = tl.maximum(scale.to(tl.float32), _SMALLEST)
    codes = (x.reshape(grouped) - low.to(tl.float32)[:, :, None]) / step[:, :, None]
    # 2^23 + c, c in 0..15, has c rounded to even in its low bits: no conversion instruction
    bits = (tl.minimum(tl.maximum(codes, 0.0), 1.0 * _LEVELS) + _TWO_23).to(tl.int32, bitcast=True) & 15
    bits = tl.where(real, bits.reshape([BLOCK_N, BLOCK_D]), 0).reshape([BLOCK_N, 4, BLOCK_D // 4])
    words = tl.sum(bits << (4 * tl.arange(0, 4))[None, :, None], 1)
    return words.to(tl.int16), scale, low


@triton.jit
def _write_kv_kernel(
    k_ptr,
    v_ptr,
    k_values_ptr,
    v_values_ptr,
    sequences_ptr,
    positions_ptr,
    stride_xn,
    stride_xh,
    stride_vk,
    stride_vb,
    stride_vh,
    N,
    TOKENS,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    mask, token, page, sequence, place = _tokens(sequences_ptr, positions_ptr, N, TOKENS, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    row = page * stride_vk + sequence * stride_vb + tl.program_id(1).to(tl.int64) * stride_vh + place * D
    offs = row[:, None] + offs_d[None, :]
    mask_d = mask[:, None] & (offs_d < D)[None, :]
    if tl.program_id(2) == 0:
        x = _load_tokens(k_ptr, stride_xn, stride_xh, token, mask, offs_d, D)
        tl.store(k_values_ptr + offs, x.to(k_values_ptr.dtype.element_ty), mask=mask_d)
    else:
        x = _load_tokens(v_ptr, stride_xn, stride_xh, token, mask, offs_d, D)
        tl.store(v_values_ptr + offs, x.to(v_values_ptr.dtype.element_ty), mask=mask_d)


@triton.jit
def _store_q4(
    x, codes_ptr, scales_ptr, code, scale, mask, offs_d, D: tl.constexpr, BLOCK_N: tl.constexpr, P: tl.constexpr
):
    # `code` and `scale` are the offsets of each token's words and scales
    words, step, low = _quantize(x.to(tl.float32), offs_d, D, BLOCK_N, P)
    tl.store(codes_ptr + code[:, None] + tl.arange(0, P // 4)[None, :], words, mask=mask[:, None])
    pairs = scales_ptr + scale[:, None] + 2 * tl.arange(0, P // _GROUP)[None, :]
    tl.store(pairs, step, mask=mask[:, None])
    tl.store(pairs + 1, low, mask=mask[:, None])


@triton.jit
def _write_kv_q4_kernel(
    k_ptr,
    v_ptr,
    k_codes_ptr,
    v_codes_ptr,
    k_scales_ptr,
    v_scales_ptr,
    sequences_ptr,
    positions_ptr,
    stride_xn,
    stride_xh,
    stride_ck,
    stride_cb,
    stride_ch,
    stride_sk,
    stride_sb,
    stride_sh,
    N,
    TOKENS,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    P: tl.constexpr,
):
    mask, token, page, sequence, place = _tokens(sequences_ptr, positions_ptr, N, TOKENS, BLOCK_N)
    offs_d = tl.arange(0, P)
    head = tl.program_id(1).to(tl.int64)
    code = page * stride_ck + sequence * stride_cb + head * stride_ch + place * (P // 4)
    scale = page * stride_sk + sequence * stride_sb + head * stride_sh + place * (P // _GROUP * 2)
    if tl.program_id(2) == 0:
        x = _load_tokens(k_ptr, stride_xn, stride_xh, token, mask, offs_d, D)
        _store_q4(x, k_codes_ptr, k_scales_ptr, code, scale, mask, offs_d, D, BLOCK_N, P)
    else:
        x = _load_tokens(v_ptr, stride_xn, stride_xh, token, mask, offs_d, D)
        _store_q4(x, v_codes_ptr, v_scales_ptr, code, scale, mask, offs_d, D, BLOCK_N, P)


Fields = tuple[Tensor, ...]


def append_kv(
    k: Tensor,
    v: Tensor,
    k_fields: Fields,
    v_fields: Fields,
    positions: Tensor,
) -> None:
    """Write one token of every sequence, k and v [B, Hkv, D], at `positions` int32 [B] (on the device) of the cache.

    K and V are laid out alike: their strides, and those of their fields, are equal.
    """
    assert positions.dtype == torch.int32 and positions.shape == (len(k),) and positions.is_contiguous()
    _write_kv(k, v, k_fields, v_fields, None, positions)


def write_prompt_kv(
    k: Tensor,
    v: Tensor,
    k_fields: Fields,
    v_fields: Fields,
    lens: Sequence[int],
) -> None:
    """Write whole prompts, packed: k and v [T, Hkv, D], `lens` summing to T; sequence s from position 0 of the cache.

    Layouts as in `append_kv`. Waits for nothing on the device.
    """
    assert sum(lens) == len(k) and len(lens) <= k_fields[0].shape[1], (sum(lens), k.shape, k_fields[0].shape)
    assert max(lens, default=0) <= k_fields[0].shape[0] * k_fields[0].shape[3], (max(lens), k_fields[0].shape)
    sequences, positions = slots(lens, k.device)
    _write_kv(k, v, k_fields, v_fields, sequences, positions)


def _write_kv(
    k: Tensor,
    v: Tensor,
    k_fields: Fields,
    v_fields: Fields,
    sequences: Tensor | None,
    positions: Tensor,
) -> None:
    num_tokens, heads, dim = k.shape
    if num_tokens == 0:
        return
    assert _alike(k, v) and k.stride(2) == 1, (k.shape, v.shape, k.stride(), v.stride())
    for a, b in zip(k_fields, v_fields, strict=True):
        assert _alike(a, b), (a.shape, b.shape, a.stride(), b.stride())
        assert a.shape[2] == heads and a[0, 0, 0].is_contiguous(), (a.shape, a.stride())
    grid = (triton.cdiv(num_tokens, BLOCK_N), heads, 2)
    shared = (sequences, positions, k.stride(0), k.stride(1))
    tokens = k_fields[0].shape[3]
    if len(k_fields) == 1:
        (k_values,), (v_values,) = k_fields, v_fields
        assert k_values.shape[4] == dim, (k_values.shape, k.shape)
        block_d = triton.next_power_of_2(dim)
        strides = k_values.stride()[:3]
        outputs = (k_values, v_values)
        _write_kv_kernel[grid](
            k,
            v,
            *outputs,
            *shared,
            *strides,
            num_tokens,
            tokens,
            D=dim,
            BLOCK_N=BLOCK_N,
            BLOCK_D=block_d,
        )
    else:
        (k_codes, k_scales), (v_codes, v_scales) = k_fields, v_fields
        assert k_codes.shape[4] * 4 == kv_width(dim), (k_codes.shape, k.shape)
        strides = (*k_codes.stride()[:3], *k_scales.stride()[:3])
        outputs = (k_codes, v_codes, k_scales, v_scales)
        _write_kv_q4_kernel[grid](
            k,
            v,
            *outputs,
            *shared,
            *strides,
            num_tokens,
            tokens,
            D=dim,
            BLOCK_N=BLOCK_N,
            P=kv_width(dim),
        )


def _alike(a: Tensor, b: Tensor) -> bool:
    """Return True if one offset finds the same element of both."""
    return a.shape == b.shape and all(n == 1 or x == y for n, x, y in zip(a.shape, a.stride(), b.stride(), strict=True))


def append_kv_ref(
    k: Tensor,
    v: Tensor,
    k_fields: Fields,
    v_fields: Fields,
    positions: Tensor,
) -> None:
    """The specification of `append_kv`."""
    sequences = torch.arange(len(k), device=k.device)
    _write_ref(k, k_fields, sequences, positions)
    _write_ref(v, v_fields, sequences, positions)


def write_prompt_kv_ref(
    k: Tensor,
    v: Tensor,
    k_fields: Fields,
    v_fields: Fields,
    lens: Sequence[int],
) -> None:
    """The specification of `write_prompt_kv`."""
    at = 0
    for sequence, length in enumerate(lens):
        part = slice(at, at + length)
        positions = torch.arange(length, device=k.device)
        sequences = torch.full_like(positions, sequence)
        _write_ref(k[part], k_fields, sequences, positions)
        _write_ref(v[part], v_fields, sequences, positions)
        at += length


def _write_ref(x: Tensor, fields: Fields, sequences: Tensor, positions: Tensor) -> None:
    if not len(x):
        return
    tokens = fields[0].shape[3]
    page, place = positions.long() // tokens, positions.long() % tokens
    for field, value in zip(fields, quantize_kv(x) if len(fields) == 2 else (x,), strict=True):
        field[page, sequences, :, place] = value.to(field.dtype)
