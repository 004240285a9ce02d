"""Weights by their format: what is read as one, multiplied, dequantised and encoded.

The arithmetic half of plan/formats.py: a format is a class here and a row of READERS and ENCODERS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ...kernels.formats import SEARCHED
from ...kernels.formats import quantize_weight as quantize
from ...kernels.sizes import BLOCK_ROWS, widened_rows
from ...memory.device import current_stream
from ...memory.scratch import Scratch
from ...plan.formats import STORED_BYTES, FourBit, Plain, WeightFormat
from ...plan.spec import TensorSpec
from . import implementation
from .elementwise import ACTIVATIONS, FUSED_ACTIVATIONS
from .implementation import cpu_has_bf16, widened

RowSegments = list[tuple[int, Tensor]]  # (first row, rows) of the segments of a tensor


class Epilogue(NamedTuple):
    """The end of a product: `activation(product + bias) + residual`."""

    bias: Tensor | None
    activation: str | None
    residual: Tensor | None


class Weight(Protocol):
    """A matrix [N, K] of any format, or a vector."""

    rows: int

    def multiply(self, x: Tensor, out: Tensor, end: Epilogue, scratch: Scratch) -> None:
        """Multiply, `out = end(x @ W.T)`: [M, K] -> out [M, N], in x's dtype, accumulated in fp32."""


class PlainWeight:
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

    def multiply(self, x: Tensor, out: Tensor, end: Epilogue, scratch: Scratch) -> None:
        linear_into(x, self, out, end.bias, scratch=scratch)
        _finish(out, end._replace(bias=None))


class FourBitWeight:
    """A 4-bit matrix [N, K] (kernels/formats.py) in segments of whole 256-row blocks.

    `segments` are (first row, rows, codes int16 [blocks, K/4, 256], scales fp16 [blocks, K/G, 2, 256]). Codes and
    scales come in segments of their own, whose rows are blocks, and are cut where either is. `room` is where the matrix
    dequantised is kept.
    """

    __slots__ = ("_dense", "_room", "columns", "group_size", "rows", "segments")

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
        self.group_size = group_size
        self._dense: Tensor | None = None
        self._room = room or Scratch(device=codes[0][1].device)

    def multiply(self, x: Tensor, out: Tensor, end: Epilogue, scratch: Scratch) -> None:
        multiply = self._on_gpu if implementation.uses_triton(x) else self._on_cpu
        with scratch.frame():
            multiply(x, out, end, scratch)

    def _on_gpu(self, x: Tensor, out: Tensor, end: Epilogue, scratch: Scratch) -> None:
        """Fused on 4 bits for few rows; for many, for small groups and in fp32, cuBLAS on what is dequantised once."""
        from ...kernels.chips import chip_of
        from ...kernels.matmul_q4 import crossover, matmul_q4

        if (x.is_cuda and x.dtype == torch.float32) or len(x) >= crossover(chip_of(x.device), self.group_size):
            _product(x, self._dequantised(x.dtype), end.bias, out, scratch)
            _finish(out, end._replace(bias=None))
            return
        for row, rows, codes, scales in self.segments:
            here = slice(row, row + rows)
            matmul_q4(
                x,
                codes,
                scales,
                rows,
                bias=None if end.bias is None else end.bias[here],
                activation=FUSED_ACTIVATIONS[end.activation] if end.activation else None,
                residual=None if end.residual is None else end.residual[:, here],
                out=out[:, here],
                workspace=_workspace(x.device, current_stream(x.device).cuda_stream if x.is_cuda else 0),
                empty=scratch.take,
            )

    def _on_cpu(self, x: Tensor, out: Tensor, end: Epilogue, scratch: Scratch) -> None:
        from ...kernels.cpu.matmul_q4 import linear_q4

        wide = widened(x, scratch)
        y = out if out.dtype == torch.float32 else scratch.take(*out.shape, dtype=torch.float32)
        for row, rows, codes, scales in self.segments:
            linear_q4(wide, codes, scales, rows, y[:, row : row + rows], scratch.panel)
        bias, residual = (None if t is None else widened(t, scratch) for t in (end.bias, end.residual))
        _finish(y, Epilogue(bias, end.activation, residual))
        if y is not out:
            out.copy_(y)

    def _dequantised(self, dtype: torch.dtype) -> Tensor:
        """The matrix dequantised, [N, K]: made once and kept as long as this load of the weights is."""
        if self._dense is None:
            from ...kernels.quant import dequantize_weight

            self._dense = self._room.take(self.rows, self.columns, dtype=dtype)
            for row, rows, codes, scales in self.segments:
                dequantize_weight(codes, scales, rows, self.columns, dtype, out=self._dense[row : row + rows])
        return self._dense


def _rows_between(segments: RowSegments, low: int, high: int) -> Tensor:
    return next(t[low - at : high - at] for at, t in segments if at <= low and high <= at + len(t))


# By format


def _plain_weight(form: Plain, shape: tuple[int, int], parts: Sequence[RowSegments], room: Scratch | None) -> Weight:
    return PlainWeight(parts[0])


def _four_bit_weight(
    form: FourBit, shape: tuple[int, int], parts: Sequence[RowSegments], room: Scratch | None
) -> Weight:
    codes, scales = parts
    return FourBitWeight(shape, form.group_size, codes, scales, room)


def _encode_four_bit(form: FourBit, matrix: Tensor) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = quantize(matrix, form.group_size, SEARCHED)
    return found


READERS: Mapping[type, Callable[..., Weight]] = {Plain: _plain_weight, FourBit: _four_bit_weight}
ENCODERS: Mapping[type, Callable[..., tuple[Tensor, ...]]] = {FourBit: _encode_four_bit}


def weight_of(
    form: WeightFormat, shape: tuple[int, int], parts: Sequence[RowSegments], room: Scratch | None = None
) -> Weight:
    """A matrix of a format out of the segments of each of its parts; `room` keeps it dequantised."""
    return READERS[type(form)](form, shape, parts, room)


def read_weight(
    tensors: Sequence[TensorSpec], segments: Mapping[str, RowSegments], room: Scratch | None = None
) -> Weight:
    """A weight out of the segments of the tensors that it is stored as, in their order."""
    first = tensors[0]
    shape = (first.source_shape[0], prod(first.source_shape[1:]))
    return weight_of(first.format, shape, [segments[t.name] for t in tensors], room)


def from_bytes(form: WeightFormat, shape: tuple[int, int], buffer: Tensor) -> Weight:
    """A matrix whose parts lie one behind the other in `buffer`, uint8."""
    parts: list[RowSegments] = []
    at = 0
    for part in form.parts(shape):
        nbytes = prod(part.shape) * STORED_BYTES[part.dtype]
        numbers = buffer[at : at + nbytes].view(getattr(torch, part.dtype))
        parts.append([(0, numbers.view(part.shape[0], -1))])
        at += nbytes
    return weight_of(form, shape, parts)


def encode(form: WeightFormat, matrix: Tensor) -> tuple[Tensor, ...]:
    """The parts of a matrix [N, K] in a format; of a 4-bit one ranges are searched."""
    return ENCODERS[type(form)](form, matrix)


# Products


def _widens(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.dtype == torch.float32:
        return False
    return weight.dtype == torch.float16 or not cpu_has_bf16()


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
    weight.multiply(x, out, Epilogue(bias, activation, residual), scratch)
    return out


def _finish(out: Tensor, end: Epilogue) -> None:
    """Apply the end in place, all of one dtype: on the CPU torch would widen a narrower operand in its own memory."""
    if end.bias is not None:
        out += end.bias
    if end.activation is not None:
        ACTIVATIONS[end.activation](out)
    if end.residual is not None:
        out += end.residual


def crossover_rows(device: torch.device) -> int:
    """From so many rows of x on, 4-bit matrices on `device` are dequantised: on a GPU once a load, on the CPU anew."""
    if device.type == "cpu":
        from ...kernels.cpu.matmul_q4 import CROSSOVER_ROWS

        return int(CROSSOVER_ROWS)
    from ...kernels.chips import chip_of
    from ...kernels.matmul_q4 import crossover

    return int(crossover(chip_of(device)))


@lru_cache(maxsize=8)
def _workspace(device: torch.device, stream: int) -> Any:
    """The workspace that the 4-bit products of one stream share: they follow one another."""
    from ...kernels.matmul_q4 import Workspace

    return Workspace(device)


def linear_into(
    x: Tensor, weight: PlainWeight, out: Tensor, bias: Tensor | None = None, *, scratch: Scratch | None = None
) -> None:
    """`out = x @ W.T + bias`, segment by segment: [M, K] -> out [M, N] of any float dtype."""
    scratch = scratch or Scratch(device=x.device)
    with scratch.frame():
        multiply = _product
        if _widens(weight.segments[0][1]):
            multiply = _widened_product
            x, bias = widened(x, scratch), None if bias is None else widened(bias, scratch)
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
