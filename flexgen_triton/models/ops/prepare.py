"""Compiling ahead of a run what it will call."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...memory.cache_places import Segment, TokenTarget
from ...plan.formats import Field, WeightFormat
from ...plan.spec import ModelSpec
from .attention import decode_attention, sparse_decode_attention, write_tokens
from .elementwise import layer_norm
from .weight import crossover_rows, encode, linear, weight_of

COLUMNS = 32  # of the smallest group


def prepare(spec: ModelSpec, fields: Sequence[Field], *, sparse: bool) -> None:
    """Compile what generating on the CPU will call, for these formats: seconds the first time, then kept on disk."""
    q = torch.zeros(1, spec.num_heads, spec.head_dim, dtype=getattr(torch, spec.dtype))
    shapes = [(1, 1, 2, spec.num_kv_heads, 1, f.width) for f in fields]
    kv = [torch.zeros(shape, dtype=getattr(torch, f.dtype)) for shape, f in zip(shapes, fields, strict=True)]
    k, v = (tuple(x[:, :, c] for x in kv) for c in (0, 1))
    segment = Segment(k, v, torch.ones(1, dtype=torch.int32))
    new = q[:, : spec.num_kv_heads]
    write_tokens(new, new, TokenTarget(tuple(kv), 0, (0,), torch.zeros(1, dtype=torch.int32)))
    ones = torch.ones(1, dtype=q.dtype)
    layer_norm(ones[None], ones, ones)
    if sparse:
        sparse_decode_attention(q, [segment], torch.zeros(1, dtype=torch.int32), 0)
    else:
        decode_attention(q, [segment])
    if spec.is_packed:
        _prepare_products(spec.format)


def _prepare_products(form: WeightFormat) -> None:
    parts = [[(0, part.flatten(1))] for part in encode(form, torch.zeros(1, COLUMNS))]
    for rows in (1, crossover_rows(torch.device("cpu"))):
        linear(torch.zeros(rows, COLUMNS), weight_of(form, (1, COLUMNS), parts))
