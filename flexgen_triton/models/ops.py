"""The operations models are made of, and the one place that picks an implementation by the tensor's device.

On a GPU they are the Triton kernels of `kernels/` and cuBLAS. On the CPU they are torch's own and, for 4-bit matrices,
norms, the cache and attention over it, compiled loops. There 16-bit matrices are multiplied in fp32 unless the
processor has bf16 arithmetic: without it torch emulates 16-bit products several times slower than it widens the
weights, a cache-sized panel of rows at a time.

Results and temporaries come from a `Scratch`: while tokens are decoded, from memory allocated before the run. Without
one they are torch's own. What an operation needs beside its result is back before it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, lru_cache, partial
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.formats import SEARCHED, KVSegment, quantize_kv
from ..kernels.formats import quantize_weight as quantize
from ..kernels.sizes import BLOCK_ROWS, widened_rows
from ..memory.cache import Fields, PromptTarget, Segment, TokenTarget
from ..memory.device import current_stream
from ..memory.scratch import Scratch
from ..plan.layout import Field
from ..plan.spec import ModelSpec

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # in place
    "relu": torch.relu_,
    "gelu": torch.ops.aten.gelu_,
    "gelu_new": partial(torch.ops.aten.gelu_, approximate="tanh"),
    "gelu_pytorch_tanh": partial(torch.ops.aten.gelu_, approximate="tanh"),
    "silu": partial(F.silu, inplace=True),
}
FUSED_ACTIVATIONS = {name: "gelu_tanh" if name in ("gelu_new", "gelu_pytorch_tanh") else name for name in ACTIVATIONS}
LAYER_NORM_EPS = 1e-5

Ids = npt.NDArray[np.int64]
Rows = Callable[[str, Ids], Tensor]  # table name, ids [T] -> [T, width], the caller's to overwrite
RowSegments = list[tuple[int, Tensor]]  # (first row, rows) of the segments of a tensor


class Positions:
    """The positions [T] of a computation's tokens: `ids` on the host, and on the device once they are asked for."""

    def __init__(self, ids: Ids, upload: Callable[[Ids], Tensor]) -> None:
        self.ids, self._upload = ids, upload

    @cached_property
    def on_device(self) -> Tensor:
        """[T] int32"""
        return self._upload(self.ids)


def uses_triton(x: Tensor) -> bool:
    """Whether operations on x run as Triton kernels."""
    return x.device.type == "cuda"


class Matrix:
    """Rows `[row, row + rows)` of a weight, in segments that may lie in different memories' buffers.

    `segments` are (first row, tensor [rows, K]); a vector is one segment of shape [1, n].
    """

    __slots__ = ("row", "rows", "segments")

    def __init__(self, segments: RowSegments) -> None:
        self.segments = sorted(segments, key=lambda s: s[0])
        self.row = self.segments[0][0]
        self.rows = sum(len(t) for _, t in self.segments)

    def vector(self, scratch: Scratch) -> Tensor:
        """The weight as a vector [n]; a concatenated one is several segments of one row each."""
        parts = [t.view(-1) for _, t in self.segments]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts, out=scratch.take(sum(map(len, parts)), dtype=parts[0].dtype))


class Matrix4:
    """A 4-bit matrix [N, K] (kernels/formats.py) in segments of whole 256-row blocks.

    `segments` are (first row, rows, codes int16 [blocks, K/4, 256], scales fp16 [blocks, K/G, 2, 256]). Codes and
    scales come in segments of their own, whose rows are blocks, and are cut where either is. `room` is where the matrix
    dequantised is kept.
    """

    __slots__ = ("_dense", "_room", "columns", "rows", "segments")

    def __init__(
        self,
        shape: tuple[int, int],
        group_size: int,
        codes: RowSegments,
        scales: RowSegments,
        room: Scratch | None = None,
    ) -> None:
        self.rows, self.columns = shape
        groups = scales[0][1].shape[1] // (2 * BLOCK_ROWS)
        cuts = sorted({at for at, _ in (*codes, *scales)} | {-(-self.rows // BLOCK_ROWS)})
        self.segments = [
            (
                low * BLOCK_ROWS,
                min(high * BLOCK_ROWS, self.rows) - low * BLOCK_ROWS,
                _rows_between(codes, low, high).view(high - low, groups * group_size // 4, BLOCK_ROWS),
                _rows_between(scales, low, high).view(high - low, groups, 2, BLOCK_ROWS),
            )
            for low, high in pairwise(cuts)
        ]
        self._dense: Tensor | None = None
        self._room = room or Scratch(device=codes[0][1].device)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix dequantised, [N, K]: made once and kept as long as this load of the weights is."""
        if self._dense is None:
            from ..kernels.quant import dequantize_weight

            self._dense = self._room.take(self.rows, self.columns, dtype=dtype)
            for row, rows, codes, scales in self.segments:
                dequantize_weight(codes, scales, rows, self.columns, dtype, out=self._dense[row : row + rows])
        return self._dense


Weight = Matrix | Matrix4


def quantize_weight(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """A matrix [N, K] to codes int16 [N/256, K/4, 256] and scales fp16 [N/256, K/G, 2, 256], ranges searched."""
    return quantize(weight, group_size, SEARCHED)  # type: ignore[no-any-return]


def _rows_between(segments: RowSegments, low: int, high: int) -> Tensor:
    return next(t[low - at : high - at] for at, t in segments if at <= low and high <= at + len(t))


@lru_cache(maxsize=1)
def _cpu_has_bf16() -> bool:
    """Whether this processor multiplies bf16 natively (AVX-512 BF16 or AMX); torch's own probes, where it has them."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name)() for name in probes if hasattr(torch.cpu, name))


def _widens(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.dtype == torch.float32:
        return False
    return weight.dtype == torch.float16 or not _cpu_has_bf16()


def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    scratch: Scratch | None = None,
) -> Tensor:
    """`activation(x @ W.T + bias) + residual`: [M, K] -> [M, N], in x's dtype, accumulated in fp32."""
    scratch = scratch or Scratch(device=x.device)
    out = scratch.take(len(x), weight.rows, dtype=x.dtype)
    if isinstance(weight, Matrix):
        linear_into(x, weight, out, bias, scratch=scratch)
        _finish(out, None, activation, residual)
        return out
    multiply = _linear4 if uses_triton(x) else _linear4_on_cpu
    with scratch.frame():
        multiply(x, weight, out, bias, activation, residual, scratch)
    return out


def _finish(out: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None) -> None:
    """All of one dtype: on the CPU torch would widen a narrower operand in memory of its own."""
    if bias is not None:
        out += bias
    if activation is not None:
        ACTIVATIONS[activation](out)
    if residual is not None:
        out += residual


def _linear4(
    x: Tensor,
    weight: Matrix4,
    out: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    scratch: Scratch,
) -> None:
    """Fused on 4 bits for few rows; for many, and in fp32, cuBLAS on a matrix dequantised once for all GPU batches."""
    from ..kernels.chips import chip_of
    from ..kernels.matmul_q4 import crossover, matmul_q4

    if (x.is_cuda and x.dtype == torch.float32) or len(x) >= crossover(chip_of(x.device)):
        _product(x, weight.dense(x.dtype), bias, out, scratch)
        _finish(out, None, activation, residual)
        return
    for row, rows, codes, scales in weight.segments:
        here = slice(row, row + rows)
        matmul_q4(
            x,
            codes,
            scales,
            rows,
            bias=None if bias is None else bias[here],
            activation=FUSED_ACTIVATIONS[activation] if activation else None,
            residual=None if residual is None else residual[:, here],
            out=out[:, here],
            workspace=_workspace(x.device, current_stream(x.device).cuda_stream if x.is_cuda else 0),
            empty=scratch.take,
        )


def crossover_rows(device: torch.device) -> int:
    """From so many rows of x on, 4-bit matrices on `device` are dequantised: on a GPU once a load, on the CPU anew."""
    if device.type == "cpu":
        from ..kernels.cpu.matmul_q4 import CROSSOVER_ROWS

        return int(CROSSOVER_ROWS)
    from ..kernels.chips import chip_of
    from ..kernels.matmul_q4 import crossover

    return int(crossover(chip_of(device)))


@lru_cache(maxsize=8)
def _workspace(device: torch.device, stream: int) -> Any:
    """What the 4-bit products of one stream share: they follow one another."""
    from ..kernels.matmul_q4 import Workspace

    return Workspace(device)


def _linear4_on_cpu(
    x: Tensor,
    weight: Matrix4,
    out: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    scratch: Scratch,
) -> None:
    from ..kernels.cpu.matmul_q4 import linear_q4

    wide = _widened(x, scratch)
    y = out if out.dtype == torch.float32 else scratch.take(*out.shape, dtype=torch.float32)
    for row, rows, codes, scales in weight.segments:
        linear_q4(wide, codes, scales, rows, y[:, row : row + rows], scratch.panel)
    bias, residual = (None if t is None else _widened(t, scratch) for t in (bias, residual))
    _finish(y, bias, activation, residual)
    if y is not out:
        out.copy_(y)


def _widened(x: Tensor, scratch: Scratch) -> Tensor:
    return x if x.dtype == torch.float32 else scratch.take(*x.shape, dtype=torch.float32).copy_(x)


def linear_into(
    x: Tensor, weight: Matrix, out: Tensor, bias: Tensor | None = None, *, scratch: Scratch | None = None
) -> None:
    """`out = x @ W.T + bias`, segment by segment: [M, K] -> out [M, N] of any float dtype."""
    scratch = scratch or Scratch(device=x.device)
    with scratch.frame():
        multiply = _product
        if _widens(weight.segments[0][1]):
            multiply = _widened_product
            x, bias = _widened(x, scratch), None if bias is None else _widened(bias, scratch)
        for row, segment in weight.segments:
            at = row - weight.row
            rows = slice(at, at + len(segment))
            with scratch.frame():
                multiply(x, segment, None if bias is None else bias[rows], out[:, rows], scratch)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, scratch: Scratch) -> None:
    y = out if out.dtype == x.dtype else scratch.take(*out.shape, dtype=x.dtype)
    _multiply(x, weight.t(), bias, y)
    if y is not out:
        out.copy_(y)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight, out=out)
    else:
        torch.addmm(bias, x, weight, out=out)


def _widened_product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, scratch: Scratch) -> None:
    """x [M, K] fp32, weight [N, K] 16-bit: a panel of rows at a time, its product in a dense buffer of its own."""
    size = min(widened_rows(weight.shape[1]), len(weight))
    panel = scratch.panel(size * weight.shape[1])
    buffer = scratch.take(len(x) * size, dtype=torch.float32)
    for low in range(0, len(weight), size):
        rows = weight[low : low + size]
        wide = panel[: rows.numel()].view(rows.shape).copy_(rows).t()
        y = buffer[: len(x) * len(rows)].view(len(x), len(rows))
        _multiply(x, wide, None if bias is None else bias[low : low + size], y)
        out[:, low : low + size] = y


def prepare(spec: ModelSpec, fields: Sequence[Field], *, sparse: bool) -> None:
    """Compile what generating on the CPU will call, for these formats: seconds the first time, then kept on disk."""
    from ..kernels.cpu.matmul_q4 import CROSSOVER_ROWS

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
    if spec.is_4bit:
        codes, scales = ([(0, t.flatten(1))] for t in quantize(torch.zeros(1, 32), 32))
        for rows in (1, CROSSOVER_ROWS):
            linear(torch.zeros(rows, 32), Matrix4((1, 32), 32, codes, scales))


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, scratch: Scratch | None = None) -> Tensor:
    """Layer normalisation of x [M, K] over K, in x's dtype."""
    out = (scratch or Scratch(device=x.device)).take(*x.shape, dtype=x.dtype)
    if uses_triton(x):
        from ..kernels.norm import layer_norm as normalise
    else:
        from ..kernels.cpu.norm import layer_norm as normalise
    normalise(x, weight, bias, eps=LAYER_NORM_EPS, out=out)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float, scratch: Scratch | None = None) -> Tensor:
    """Root mean square normalisation of x [M, K] over K, in x's dtype, computed in fp32."""
    scratch = scratch or Scratch(device=x.device)
    out = scratch.take(*x.shape, dtype=x.dtype)
    if uses_triton(x):
        from ..kernels.norm import rms_norm as normalise

        normalise(x, weight, eps=eps, out=out)
        return out
    with scratch.frame():
        wide, squares = _widened(x, scratch), scratch.take(*x.shape, dtype=torch.float32)
        scale = scratch.take(len(x), 1, dtype=torch.float32)
        torch.mean(torch.mul(wide, wide, out=squares), 1, keepdim=True, out=scale)
        out.copy_(torch.mul(wide, scale.add_(eps).rsqrt_(), out=squares))
    return out.mul_(weight)


def rotate(x: Tensor, positions: Tensor, theta: float, scratch: Scratch) -> None:
    """Turn each head's pairs (i, i + D/2) by its position times theta ** (-2 i / D), in place: [T, H, D].

    `positions` are [T] int32 (Su et al., RoFormer, 2021, section 3.2, with a head's halves as the pairs).
    """
    half = x.shape[2] // 2
    with scratch.frame():
        angles = scratch.take(len(x), 1, half, dtype=torch.float32)
        torch.mul(positions[:, None, None], _frequencies(half, theta, x.device), out=angles)
        cos, sin = (scratch.take(*angles.shape, dtype=x.dtype).copy_(f(angles)) for f in (torch.cos, torch.sin))
        left, right, turned = x[..., :half], x[..., half:], scratch.take(*x.shape[:2], half, dtype=x.dtype)
        torch.mul(left, cos, out=turned).addcmul_(right, sin, value=-1)
        right.mul_(cos).addcmul_(left, sin)
        left.copy_(turned)


@lru_cache(maxsize=8)
def _frequencies(half: int, theta: float, device: torch.device) -> Tensor:
    """[D/2] fp32"""
    return 1.0 / theta ** (torch.arange(half, dtype=torch.float32, device=device) / half)


def gated(x: Tensor, activation: str, scratch: Scratch) -> Tensor:
    """`activation(gate) * up` of x [M, 2 F], gate beside up -> [M, F]."""
    width = x.shape[1] // 2
    out = scratch.take(len(x), width, dtype=x.dtype).copy_(x[:, :width])
    ACTIVATIONS[activation](out)
    return out.mul_(x[:, width:])


def prefill_attention(q: Tensor, k: Tensor, v: Tensor, lens: Sequence[int]) -> Tensor:
    """Causal attention over packed sequences: q [T, H, D], k and v [T, Hkv, D], `lens` summing to T -> [T, H, D]."""
    if uses_triton(q) and not (q.is_cuda and q.dtype == torch.float32):
        from ..kernels.attention_prefill import prefill_attention as attend

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


# The cache


def write_tokens(k: Tensor, v: Tensor, target: TokenTarget) -> None:
    """Write one token of each of the target's sequences to the cache, in its format; k and v [B, Hkv, D]."""
    rows = slice(target.first, target.first + len(target.positions))
    if uses_triton(k):
        from ..kernels.elementwise import append_kv
    else:
        from ..kernels.cpu.append import append_kv
    append_kv(k[rows], v[rows], *_k_and_v(target.fields), target.at)


def write_prompt(k: Tensor, v: Tensor, target: PromptTarget) -> None:
    """Write packed k and v [T, Hkv, D] of prompts to the first positions of the cache, in its format."""
    first, last = target.rows[0], target.rows[-1] + target.counts[-1]
    if uses_triton(k) and sum(target.counts) == last - first:  # whole prompts, which follow one another
        from ..kernels.elementwise import write_prompt_kv

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
        if uses_triton(q):
            from ..kernels.attention_decode import decode_attention as attend_on_gpu

            attend_on_gpu(q, _kv_segments(segments), out=out, empty=scratch.take)
        else:
            from ..kernels.cpu.attention import decode_attention as attend
            from ..kernels.cpu.attention import decode_workspace_bytes

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
        if uses_triton(q):
            from ..kernels.attention_sparse import sparse_decode_attention as attend_on_gpu

            attend_on_gpu(q, _kv_segments(segments), keep, max_keep=max_keep, out=out, empty=scratch.take)
        else:
            from ..kernels.cpu.attention import sparse_decode_attention as attend
            from ..kernels.cpu.attention import sparse_workspace_bytes

            tokens = sum(len(s.k[0]) * s.k[0].shape[3] for s in segments)
            nbytes = sparse_workspace_bytes(*q.shape, tokens, max_keep)
            attend(q, _kv_segments(segments), keep, out=out, workspace=scratch.take(nbytes // 4, dtype=torch.float32))
    return out
