"""The operations models are made of, and the one place that picks an implementation by the tensor's device.

On the CPU, 16-bit matrices are multiplied in fp32 unless the processor has bf16 arithmetic: without it torch emulates
16-bit products several times slower than it widens the weights, a cache-sized panel of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from ..plan.plan import WIDEN_BYTES

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}
LAYER_NORM_EPS = 1e-5
ATTENTION_CHUNK_BYTES = 8 << 20  # of fp32 K and V that decode attention on the CPU widens at a time


class Matrix:
    """Rows `[row, row + rows)` of a weight, in segments that may lie in different memories' buffers.

    `segments` are (first row, tensor [rows, K]); a vector is one segment of shape [1, n].
    """

    __slots__ = ("row", "rows", "segments")

    def __init__(self, segments: Sequence[tuple[int, Tensor]]) -> None:
        self.segments = sorted(segments, key=lambda s: s[0])
        self.row = self.segments[0][0]
        self.rows = sum(len(t) for _, t in self.segments)

    def vector(self) -> Tensor:
        """The weight as a vector [n]; a concatenated one is several segments of one row each."""
        if len(self.segments) == 1:
            return self.segments[0][1].view(-1)
        return torch.cat([t.view(-1) for _, t in self.segments])


@lru_cache(maxsize=1)
def _cpu_has_bf16() -> bool:
    """Whether this processor multiplies bf16 natively (AVX-512 BF16 or AMX); torch's own probes, where it has them."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name)() for name in probes if hasattr(torch.cpu, name))


def _widens(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.dtype == torch.float32:
        return False
    return weight.dtype == torch.float16 or not _cpu_has_bf16()


def linear(x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
    """`x @ W.T + bias`: [M, K] -> [M, N], in x's dtype, accumulated in fp32."""
    out = torch.empty(len(x), weight.rows, dtype=x.dtype, device=x.device)
    linear_into(x, weight, out, bias)
    return out


def linear_into(x: Tensor, weight: Matrix, out: Tensor, bias: Tensor | None = None) -> None:
    """`out = x @ W.T + bias`, segment by segment: [M, K] -> out [M, N] of any float dtype."""
    widens = _widens(weight.segments[0][1])
    if widens:
        x, bias = x.float(), None if bias is None else bias.float()
    multiply = _widened_product if widens else _product
    for row, segment in weight.segments:
        at = row - weight.row
        rows = slice(at, at + len(segment))
        multiply(x, segment, None if bias is None else bias[rows], out[:, rows])


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    out.copy_(F.linear(x, weight, bias))


def _widened_product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """x [M, K] fp32, weight [N, K] 16-bit: a panel of rows at a time, its product in a dense buffer of its own."""
    size = max(1, WIDEN_BYTES // (4 * weight.shape[1]))
    panel = torch.empty(min(size, len(weight)), weight.shape[1])
    buffer = torch.empty(len(x) * len(panel))
    for low in range(0, len(weight), size):
        rows = weight[low : low + size]
        wide = panel[: len(rows)].copy_(rows).t()
        y = buffer[: len(x) * len(rows)].view(len(x), len(rows))
        if bias is None:
            torch.mm(x, wide, out=y)
        else:
            torch.addmm(bias[low : low + size], x, wide, out=y)
        out[:, low : low + size] = y


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Layer normalisation over the last dimension, in x's dtype."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, LAYER_NORM_EPS)


def prefill_attention(q: Tensor, k: Tensor, v: Tensor, lens: Sequence[int]) -> Tensor:
    """Causal attention over packed sequences: q [T, H, D], k and v [T, Hkv, D], `lens` summing to T -> [T, H, D]."""
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


CacheSegment = tuple[Tensor, Tensor]  # K and V [blocks, B, 2, Hkv, tokens, D], valid tokens of each sequence [B]


def decode_attention(q: Tensor, segments: Sequence[CacheSegment]) -> Tensor:
    """Attention of one new token per sequence over its cached tokens, the union of the segments.

    q [B, H, D] -> [B, H, D]. Tokens past a sequence's valid count are masked; they must be finite.
    """
    return _decode_attention_on_cpu(q, segments) if q.device.type == "cpu" else _decode_attention(q, segments)


def _decode_attention_on_cpu(q: Tensor, segments: Sequence[CacheSegment]) -> Tensor:
    """A few sequences at a time: their K and V widened into one dense workspace, then torch's own attention."""
    num_seqs, num_heads, dim = q.shape
    kv_heads = segments[0][0].shape[3]
    counts = [kv.shape[0] * kv.shape[4] for kv, _ in segments]
    valid = torch.cat([torch.arange(c) < n[:, None] for c, (_, n) in zip(counts, segments, strict=True)], 1)
    mask = torch.zeros(num_seqs, 1, 1, sum(counts)).masked_fill_(~valid[:, None, None], float("-inf"))
    chunk = max(1, min(num_seqs, ATTENTION_CHUNK_BYTES // (8 * kv_heads * sum(counts) * dim)))
    workspace = torch.empty(2, chunk, kv_heads, sum(counts), dim)
    out = torch.empty_like(q)
    for low in range(0, num_seqs, chunk):
        rows = slice(low, min(low + chunk, num_seqs))
        wide = workspace[:, : rows.stop - low]
        at = 0
        for (kv, _), count in zip(segments, counts, strict=True):
            blocks, _, _, _, tokens, _ = kv.shape
            target = wide[:, :, :, at : at + count].view(2, rows.stop - low, kv_heads, blocks, tokens, dim)
            target.copy_(kv[:, rows].permute(2, 1, 3, 0, 4, 5))
            at += count
        query = q[rows, :, None].float()
        grouped = num_heads != kv_heads
        y = F.scaled_dot_product_attention(query, wide[0], wide[1], attn_mask=mask[rows], enable_gqa=grouped)
        out[rows] = y[:, :, 0]
    return out


def _decode_attention(q: Tensor, segments: Sequence[CacheSegment]) -> Tensor:
    num_seqs, num_heads, dim = q.shape
    kv_heads = segments[0][0].shape[3]
    query = (q * dim**-0.5).view(num_seqs, kv_heads, num_heads // kv_heads, dim)  # [B, Hkv, R, D]
    scores, values = [], []
    for kv, lens in segments:
        blocks, _, _, _, tokens, _ = kv.shape
        wide = kv.to(q.dtype)
        s = torch.matmul(query, wide[:, :, 0].transpose(-1, -2)).float()  # [blocks, B, Hkv, R, tokens]
        position = torch.arange(blocks * tokens, device=q.device).view(blocks, 1, tokens)
        s.masked_fill_((position >= lens[:, None])[:, :, None, None], float("-inf"))
        scores.append(s.permute(1, 2, 3, 0, 4).flatten(3))  # [B, Hkv, R, blocks * tokens]
        values.append(wide[:, :, 1].permute(1, 2, 0, 3, 4).flatten(2, 3))  # [B, Hkv, blocks * tokens, D]
    weights = torch.cat(scores, -1).softmax(-1).to(q.dtype)
    out = torch.zeros_like(query)
    at = 0
    for value in values:
        out += torch.matmul(weights[..., at : at + value.shape[2]], value)
        at += value.shape[2]
    return out.view(num_seqs, num_heads, dim)
