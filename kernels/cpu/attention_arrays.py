"""Tensors as the CPU's attention takes them: segments as dense vectors with offsets, queries, results, workspace.

Knows shapes and strides; computes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..formats import KVSegment
from ..sizes import KV_GROUP, fp32_bytes, kv_width, line_aligned
from .jit import flat


def cut(workspace: Tensor | None, *sizes: int) -> Sequence[Tensor]:
    """Vectors of these sizes, one behind the other in the workspace, each at a cache line if the workspace is."""
    if workspace is None:
        workspace = torch.empty(fp32_bytes(*sizes) // 4)
    assert workspace.dtype == torch.float32 and workspace.is_contiguous() and workspace.dim() == 1, workspace.shape
    assert workspace.nbytes >= fp32_bytes(*sizes), (workspace.nbytes, sizes)
    room = workspace[: fp32_bytes(*sizes) // 4].split([line_aligned(size) for size in sizes])
    return [vector[:size] for vector, size in zip(room, sizes, strict=True)]


def row_width(segments: Sequence[KVSegment], dim: int) -> int:
    """Numbers of a row of K and V as they are stored."""
    parts = {len(s.k) for s in segments} | {len(s.v) for s in segments}
    assert len(parts) <= 1, "segments of one format"
    return kv_width(dim) if 2 in parts else dim


def pad_query(q: Tensor, query: Tensor) -> None:
    """q [B, H, D], padded like the K it meets: query [B * H, width]."""
    dim = q.shape[-1]
    if dim < query.shape[1]:
        query[:, dim:].zero_()
    query[:, :dim].view(q.shape).copy_(q)


def result(acc: Tensor, q: Tensor, out: Tensor | None) -> Tensor:
    """[B * H, width] in q's shape, to `out` or in q's dtype."""
    out = torch.empty_like(q) if out is None else out
    return out.copy_(acc[:, : q.shape[-1]].view(q.shape))


def segment_sizes(segment: KVSegment) -> tuple[np.ndarray, int, int]:
    """Valid tokens, tokens of a page, K and V heads."""
    pages, _, kv_heads, tokens, *_ = segment.k[0].shape
    lens = segment.lens.to(torch.int32).contiguous().numpy()
    assert lens.max() <= pages * tokens, (lens, segment.k[0].shape)
    return lens, tokens, kv_heads


def segment_stores(segment: KVSegment, width: int) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...], np.ndarray]:
    """K and V as dense vectors, and the strides of their tokens, [2, 2, 4], as `place` reads them."""
    offsets = np.zeros((2, 2, 4), np.int64)
    sizes = (width,) if len(segment.k) == 1 else (width // 4, width // KV_GROUP * 2)
    for i, fields in enumerate((segment.k, segment.v)):
        for j, (numbers, size) in enumerate(zip(fields, sizes, strict=True)):
            token = numbers[0, 0, 0]
            assert token.is_contiguous() and token[0].numel() == size, (numbers.shape, numbers.stride())
            offsets[i, j] = *numbers.stride()[:3], size
    return tuple(map(flat, segment.k)), tuple(map(flat, segment.v)), offsets
