"""The GPU's dequantisation of matrices equals the format's plain function, bit for bit."""

from __future__ import annotations

import pytest
import torch

from flexgen_triton.kernels import formats, quant

SHAPES = [(256, 64, 64), (1, 1, 64), (257, 130, 64), (65, 127, 128), (300, 96, 32)]
IDS = ["one-block", "minimal", "one-past", "one-short", "group-32"]


def matrix(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Random numbers, with a row of constants and one of outliers."""
    torch.manual_seed(rows * 1000 + columns)
    weight = torch.randn(rows, columns)
    weight[:1] = 0.25
    weight[-1:] *= 1000
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("rows", "columns", "group"), SHAPES, ids=IDS)
def test_dequantising_equals_the_reference(rows, columns, group, dtype):
    codes, scales = formats.quantize_weight(matrix(rows, columns, torch.float32), group)
    out = torch.full((rows, columns + 3), torch.nan, dtype=dtype)
    found = quant.dequantize_weight(codes, scales, rows, columns, dtype, out=out[:, :columns])
    assert torch.equal(found, formats.dequantize_weight(codes, scales, rows, columns, dtype))
    assert out[:, columns:].isnan().all()
    assert torch.equal(quant.dequantize_weight(codes, scales, rows, columns, dtype), found)


def test_a_segment_of_whole_blocks_is_a_matrix():
    weight = matrix(700, 128, torch.float16)
    codes, scales = formats.quantize_weight(weight)
    whole = quant.dequantize_weight(codes, scales, 700, 128, torch.float16)
    assert torch.equal(quant.dequantize_weight(codes[1:], scales[1:], 444, 128, torch.float16), whole[256:])


def test_an_empty_matrix_is_no_launch():
    codes, scales = torch.empty(0, 16, 256, dtype=torch.int16), torch.empty(0, 1, 2, 256, dtype=torch.float16)
    assert quant.dequantize_weight(codes, scales, 0, 64, torch.float32).shape == (0, 64)
