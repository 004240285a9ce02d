"""P16, the 4-bit format of weights and of K and V: its layout, and the plain torch functions that define it.

Every number is `code * scale + minimum`, code in 0..15, one scale and minimum (fp16) for a group of numbers: the
asymmetric min/max quantisation of FlexGen (Sheng et al., ICML 2023, section 5), but along the dimension that products
sum over. Four codes share a 16-bit word and lie far apart, in four *planes*, so that unpacking word i of a row gives
the i-th number of each plane and neighbours stay neighbours.

**Weights** W [N, K], groups of G along K. Rows come in blocks of 256 and K is padded to whole groups, so
`codes` int16 [N/256, K/4, 256] and `scales` fp16 [N/256, K/G, 2, 256] (scale, minimum). In block b, word row
g * G/4 + i, column n holds q[256 b + n, g * G + j * G/4 + i] in bits 4j..4j+3. Padding has code 0.

**K and V** x [..., D], D padded to a power of two P of at least 64, groups of 64 along it: `codes` int16 [..., P/4] and
`scales` fp16 [..., P/64, 2]. Word i holds q[..., j * P/4 + i] in bits 4j..4j+3. Padding has code 0 and a minimum of 0.

Knows torch only, and nothing of the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .sizes import BLOCK_ROWS, KV_GROUP, kv_width

LEVELS = 15
SMALLEST_SCALE = 2.0**-24  # of fp16's numbers: a constant group keeps its value in the minimum
WHOLE = (1.0,)
SEARCHED = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # ranges that are worth their time once, when a model is converted


class KVSegment(NamedTuple):
    """Cached tokens of B sequences, in pages of T tokens; a cache is the union of a few of them.

    In 16 or 32 bits `k` and `v` are a single tensor [pages, B, Hkv, T, D]; in P16 they are codes int16
    [pages, B, Hkv, T, P/4] and scales fp16 [pages, B, Hkv, T, P/64, 2]. Strided views: only the dimensions behind T
    are dense, and a token follows the one before it. `lens` int32 [B] counts each sequence's valid tokens, the first
    ones; what lies behind them is arbitrary.
    """

    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]
    lens: Tensor


def quantize_groups(
    x: Tensor, ranges: Sequence[float] = WHOLE, counts: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (uint8), scale and minimum (fp16) of groups along the last dimension: [..., G] -> [..., G], [...], [...].

    Scale and minimum are rounded to fp16 first and the codes taken against the rounded values. Of several `ranges`,
    shares of the group's own about its middle, each group takes the one of the least squared error, the first of
    equals: a group's few largest numbers are cut off where the others gain more by a finer step. `counts` [..., G] is
    0 for what only fills a group.
    """
    x = x.float()
    low, high = (t[..., None] for t in torch.aminmax(x, dim=-1))
    best = _quantize(x, low, high)
    if tuple(ranges) != WHOLE:
        least = _squared_error(x, counts, *best)
        for share in ranges[1:]:
            cut = (high - low) * ((1 - share) / 2)
            found = _quantize(x, low + cut, high - cut)
            error = _squared_error(x, counts, *found)
            better = error < least
            best = tuple(torch.where(better, new, old) for new, old in zip(found, best, strict=True))
            least = torch.minimum(error, least)
    codes, scale, minimum = best
    return codes.to(torch.uint8), scale[..., 0].half(), minimum[..., 0].half()


def _quantize(x: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., G] over the range from `low` to `high` [..., 1]: codes, scale and minimum, all fp32."""
    scale = ((high - low) / LEVELS).clamp_min(SMALLEST_SCALE).half().float()
    low = low.half().float()
    return (x - low).div_(scale).round_().clamp_(0, LEVELS), scale, low


def _squared_error(x: Tensor, counts: Tensor | None, codes: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    squares = (codes * scale).add_(minimum).sub_(x).square_()
    return (squares if counts is None else squares.mul_(counts)).sum(-1, keepdim=True)


def _pack(codes: Tensor) -> Tensor:
    """Four planes of codes to words: uint8 [..., 4, n] -> int16 [..., n]."""
    low, high = (codes[..., j, :] | (codes[..., j + 1, :] << 4) for j in (0, 2))
    return (low.to(torch.int16) | (high.to(torch.int16) << 8)).contiguous()


def _unpack(words: Tensor) -> Tensor:
    """Words to four planes of codes: int16 [..., n] -> int32 [..., 4, n]."""
    shifts = torch.tensor([0, 4, 8, 12], dtype=torch.int32, device=words.device).view(4, 1)
    return (words.int()[..., None, :] >> shifts) & LEVELS


def quantize_weight(weight: Tensor, group_size: int = 64, ranges: Sequence[float] = WHOLE) -> tuple[Tensor, Tensor]:
    """A matrix [N, K] of any float dtype to P16: codes int16 [N/256, K/4, 256], scales fp16 [N/256, K/G, 2, 256]."""
    rows, columns = weight.shape
    real = torch.arange(-(-columns // group_size) * group_size, device=weight.device).view(-1, group_size) < columns
    counts = None if columns % group_size == 0 else real
    codes, scale, low = quantize_groups(_grouped(weight, group_size), ranges, counts)  # [N, K/G, G], [N, K/G]
    codes *= real
    blocks, groups = -(-rows // BLOCK_ROWS), codes.shape[1]
    extra = blocks * BLOCK_ROWS - rows
    words = _pack(codes.view(rows, groups, 4, group_size // 4)).flatten(1)  # [N, K/4]
    words = F.pad(words, (0, 0, 0, extra)).view(blocks, BLOCK_ROWS, words.shape[1])
    scales = F.pad(torch.stack((scale, low), -1), (0, 0, 0, 0, 0, extra)).view(blocks, BLOCK_ROWS, groups, 2)
    return words.transpose(1, 2).contiguous(), scales.permute(0, 2, 3, 1).contiguous()


def _grouped(weight: Tensor, group_size: int) -> Tensor:
    """[N, K] as [N, K/G, G]; the last group is filled with a value that it has."""
    extra = -weight.shape[1] % group_size
    if extra:
        weight = torch.cat((weight, weight[:, -1:].expand(-1, extra)), 1)
    return weight.reshape(weight.shape[0], weight.shape[1] // group_size, group_size)


def dequantize_weight(codes: Tensor, scales: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """The matrix [N, K] that P16 codes and scales stand for, rounded once, to `dtype`."""
    groups = scales.shape[1]
    planes = _unpack(codes.transpose(1, 2))  # [blocks, 256, 4, K/4]
    size = planes.shape[-1] * 4 // groups
    q = planes.unflatten(-1, (groups, size // 4)).transpose(2, 3).flatten(3).float()  # [blocks, 256, K/G, G]
    scale, low = scales.float().permute(2, 0, 3, 1)[..., None]  # [blocks, 256, K/G, 1] each
    return (q * scale + low).flatten(2).flatten(0, 1)[:rows, :columns].to(dtype)


def quantize_kv(x: Tensor) -> tuple[Tensor, Tensor]:
    """K or V [..., D] to P16: codes int16 [..., P/4] and scales fp16 [..., P/64, 2]."""
    dim = x.shape[-1]
    width = kv_width(dim)
    codes, scales = [], []
    for at in range(0, width, KV_GROUP):
        part = x[..., at : min(at + KV_GROUP, dim)]
        if not part.shape[-1]:
            codes.append(torch.zeros(*x.shape[:-1], KV_GROUP, dtype=torch.uint8, device=x.device))
            scales.append(torch.zeros(*x.shape[:-1], 2, dtype=torch.float16, device=x.device))
            continue
        q, scale, low = quantize_groups(part)
        codes.append(F.pad(q, (0, KV_GROUP - part.shape[-1])))
        scales.append(torch.stack((scale, low), -1))
    planes = torch.cat(codes, -1).unflatten(-1, (4, width // 4))
    return _pack(planes), torch.stack(scales, -2)


def dequantize_kv(codes: Tensor, scales: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
    """K or V [..., D] that P16 codes and scales stand for, rounded once, to `dtype`."""
    q = _unpack(codes).flatten(-2).float().unflatten(-1, (-1, KV_GROUP))  # [..., P/64, 64]
    x = q * scales[..., :1].float() + scales[..., 1:].float()
    return x.flatten(-2)[..., :head_dim].to(dtype)
