"""Attention over prompts and over the cache, and writing K and V to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.formats import KVSegment, quantize_kv
from ...memory.cache_homes import Fields
from ...memory.cache_places import PromptTarget, Segment, TokenTarget
from ...memory.scratch import Scratch
from . import implementation


def prefill_attention(q: Tensor, k: Tensor, v: Tensor, lens: Sequence[int]) -> Tensor:
    """Causal attention over packed sequences: q [T, H, D], k and v [T, Hkv, D], `lens` summing to T -> [T, H, D]."""
    if implementation.uses_triton(q) and not (q.is_cuda and q.dtype == torch.float32):
        from ...kernels.attention_prefill import prefill_attention as attend

        return attend(q, k, v, lens)  # type: ignore[no-any-return]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    at = 0
    for length, same in groupby(lens):
        n = len(list(same))
        end = at + n * length
        qs, ks, vs = (_batch(t[at:end], n, length) for t in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(qs, ks, vs, is_causal=True, enable_gqa=grouped)
        out[at:end] = y.transpose(1, 2).flatten(0, 1).to(q.dtype)
        at = end
    return out


def _batch(x: Tensor, n: int, length: int) -> Tensor:
    """Packed rows [n * L, H, D] -> [n, H, L, D]; in fp32 on the CPU, whose 16-bit products are slow."""
    x = x.reshape(n, length, *x.shape[1:]).transpose(1, 2)
    return x.float() if x.device.type == "cpu" else x


def write_tokens(k: Tensor, v: Tensor, target: TokenTarget) -> None:
    """Write one token of each of the target's sequences to the cache, in its format; k and v [B, Hkv, D]."""
    rows = slice(target.first, target.first + len(target.positions))
    if implementation.uses_triton(k):
        from ...kernels.elementwise import append_kv
    else:
        from ...kernels.cpu.append import append_kv
    append_kv(k[rows], v[rows], *_k_and_v(target.fields), target.at)


def write_prompt(k: Tensor, v: Tensor, target: PromptTarget) -> None:
    """Write packed k and v [T, Hkv, D] of prompts to the first positions of the cache, in its format."""
    first, last = target.rows[0], target.rows[-1] + target.counts[-1]
    if implementation.uses_triton(k) and sum(target.counts) == last - first:  # whole prompts, which follow one another
        from ...kernels.elementwise import write_prompt_kv

        write_prompt_kv(k[first:last], v[first:last], *_k_and_v(target.fields), target.counts)
        return
    for first, n, step in _runs(target.rows, target.counts):
        for c, x in enumerate((k, v)):
            shape, strides = (n, target.counts[first], *x.shape[1:]), (step * x.stride(0), *x.stride())
            new = x.as_strided(shape, strides, x.storage_offset() + target.rows[first] * x.stride(0))
            for field, new_field in zip(target.fields, _cached(new, target.fields), strict=True):
                _write_run(field[:, first : first + n, c], new_field)


def _runs(rows: Sequence[int], counts: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first sequence, how many, packed rows from one to the next) of neighbours alike in count and step."""
    steps = [b - a for a, b in pairwise(rows)]
    keys = list(zip(counts, [*steps, steps[-1] if steps else 0], strict=True))
    first = 0
    for (count, step), same in groupby(keys):
        n = len(list(same))
        if count:
            yield first, n, step
        first += n


def _write_run(field: Tensor, new: Tensor) -> None:
    """new [n, L, Hkv, width] to the first positions of field [pages, n, Hkv, tokens, width]."""
    tokens = field.shape[3]
    for low in range(0, new.shape[1], tokens):
        piece = new[:, low : low + tokens].transpose(1, 2)
        field[low // tokens, :, :, : piece.shape[2]] = piece


def _cached(x: Tensor, fields: Fields) -> tuple[Tensor, ...]:
    """K or V [..., D] as the cache holds it, by field [..., width]."""
    if len(fields) == 1:
        return (x,)
    codes, scales = quantize_kv(x)
    return codes, scales.flatten(-2)


def _k_and_v(fields: Fields) -> tuple[Fields, Fields]:
    """K's and V's fields [pages, n, Hkv, tokens, width], as the kernels take them."""
    return _for_kernels([f[:, :, 0] for f in fields]), _for_kernels([f[:, :, 1] for f in fields])


def _for_kernels(fields: Sequence[Tensor]) -> Fields:
    """K's or V's fields with scales and minima apart, [..., P/64, 2]."""
    if len(fields) == 1:
        return (fields[0],)
    codes, scales = fields
    return codes, scales.view(*scales.shape[:-1], -1, 2)


def _kv_segments(segments: Iterable[Segment]) -> list[KVSegment]:
    return [KVSegment(_for_kernels(s.k), _for_kernels(s.v), s.lens) for s in segments]


def decode_attention(
    q: Tensor, segments: Sequence[Segment], *, out: Tensor | None = None, scratch: Scratch | None = None
) -> Tensor:
    """Attention of one new token per sequence over its cached tokens, the union of the segments: [B, H, D] -> same."""
    scratch = scratch or Scratch(device=q.device)
    out = scratch.take(*q.shape, dtype=q.dtype) if out is None else out
    with scratch.frame():
        if implementation.uses_triton(q):
            from ...kernels.attention_decode import decode_attention as attend_on_gpu

            attend_on_gpu(q, _kv_segments(segments), out=out, empty=scratch.take)
        else:
            from ...kernels.cpu.attention import decode_attention as attend
            from ...kernels.cpu.attention import decode_workspace_bytes

            workspace = scratch.take(decode_workspace_bytes(*q.shape) // 4, dtype=torch.float32)
            attend(q, _kv_segments(segments), out=out, workspace=workspace)
    return out


def sparse_decode_attention(
    q: Tensor,
    segments: Sequence[Segment],
    keep: Tensor,
    max_keep: int,
    *,
    out: Tensor | None = None,
    scratch: Scratch | None = None,
) -> Tensor:
    """The same, reading V of the newest token and of the `keep` [B] earlier ones of largest weight per head.

    Weights are those of the whole softmax, not renormalised (FlexGen, section 5). `max_keep` is the largest of `keep`.
    """
    scratch = scratch or Scratch(device=q.device)
    out = scratch.take(*q.shape, dtype=q.dtype) if out is None else out
    with scratch.frame():
        if implementation.uses_triton(q):
            from ...kernels.attention_sparse import sparse_decode_attention as attend_on_gpu

            attend_on_gpu(q, _kv_segments(segments), keep, max_keep=max_keep, out=out, empty=scratch.take)
        else:
            from ...kernels.cpu.sparse_attention import sparse_decode_attention as attend
            from ...kernels.cpu.sparse_attention import sparse_workspace_bytes

            tokens = sum(len(s.k[0]) * s.k[0].shape[3] for s in segments)
            nbytes = sparse_workspace_bytes(*q.shape, tokens, max_keep)
            attend(q, _kv_segments(segments), keep, out=out, workspace=scratch.take(nbytes // 4, dtype=torch.float32))
    return out
