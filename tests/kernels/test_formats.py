"""The 4-bit format: every number within half a step, where the layout says, and nothing lost to constant groups."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from flexgen_triton.kernels import formats, sizes
from flexgen_triton.kernels.sizes import BLOCK_ROWS
from flexgen_triton.plan.formats import FourBitCache

WEIGHTS = {
    "one block, one group": (256, 64, 64),
    "off every block size": (300, 200, 64),
    "narrow, groups of 32": (7, 33, 32),
    "groups of 128": (512, 384, 128),
    "one number": (1, 1, 32),
}


@pytest.mark.parametrize("shape", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_weight_is_within_half_a_step(shape, dtype):
    rows, columns, group = shape
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    codes, scales = formats.quantize_weight(weight, group)
    blocks, groups = -(-rows // 256), -(-columns // group)
    assert codes.shape == (blocks, groups * group // 4, 256) and codes.dtype == torch.int16
    assert scales.shape == (blocks, groups, 2, 256) and scales.dtype == torch.float16
    back = formats.dequantize_weight(codes, scales, rows, columns, torch.float32)
    step = scales[:, :, 0].float().transpose(1, 2).flatten(0, 1)[:rows].repeat_interleave(group, 1)[:, :columns]
    slack = 2.0**-11 * 4 + 16 * 2.0**-11 * step  # scale and minimum are rounded to fp16
    assert ((back - weight.float()).abs() <= 0.5 * step + slack).all()


@pytest.mark.parametrize("group", sizes.WEIGHT_GROUPS)
def test_words_lie_where_the_layout_says(group):
    """Decoded by hand, number by number, from the documented layout."""
    rows, columns = 260, group * 2 + 3
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(2))
    codes, scales = formats.quantize_weight(weight, group)
    back = formats.dequantize_weight(codes, scales, rows, columns, torch.float32)
    for n, k in ((0, 0), (5, columns - 1), (259, group), (100, group - 1), (256, 2 * group)):
        (b, column), (g, r) = divmod(n, 256), divmod(k, group)
        j, i = divmod(r, group // 4)
        code = (int(codes[b, g * group // 4 + i, column]) >> (4 * j)) & 15
        assert float(code * scales[b, g, 0, column].float() + scales[b, g, 1, column].float()) == float(back[n, k])


@pytest.mark.parametrize("value", [0.0, 3.0, -0.007, 6e-8, 60000.0])
def test_a_constant_group_keeps_its_value(value):
    weight = torch.full((3, 64), value)
    back = formats.dequantize_weight(*formats.quantize_weight(weight, 64), 3, 64, torch.float32)
    assert torch.equal(back, weight.half().float())
    x = torch.full((2, 5, 80), value)
    assert torch.equal(formats.dequantize_kv(*formats.quantize_kv(x), 80, torch.float32), x.half().float())


@pytest.mark.parametrize("dim", [1, 40, 64, 80, 128, 200, 256])
def test_k_and_v_are_within_half_a_step(dim):
    x = torch.randn(3, 5, dim, generator=torch.Generator().manual_seed(3))
    codes, scales = formats.quantize_kv(x)
    width = sizes.kv_width(dim)
    assert codes.shape == (3, 5, width // 4) and scales.shape == (3, 5, width // 64, 2)
    back = formats.dequantize_kv(codes, scales, dim, torch.float32)
    step = scales[..., 0].float().repeat_interleave(64, -1)[..., :dim]
    assert ((back - x).abs() <= 0.5 * step + 2.0**-11 * 4 + 16 * 2.0**-11 * step).all()
    j, i = divmod(dim - 1, width // 4)
    code = (int(codes[1, 2, i]) >> (4 * j)) & 15
    scale, low = scales[1, 2, (dim - 1) // 64].float()
    assert float(code * scale + low) == float(back[1, 2, dim - 1])


def test_a_searched_range_is_never_worse():
    weight = torch.randn(300, 200, generator=torch.Generator().manual_seed(4)) ** 3
    errors = []
    for ranges in (formats.WHOLE, formats.SEARCHED):
        back = formats.dequantize_weight(*formats.quantize_weight(weight, 64, ranges), 300, 200, torch.float32)
        errors.append(F.pad((back - weight).square(), (0, 56)).view(300, 4, 64).sum(-1)[:, :3])  # whole groups
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
    assert errors[1].sum() < 0.9 * errors[0].sum()


def test_nothing_is_quantised_to_nothing():
    assert [t.shape for t in formats.quantize_kv(torch.zeros(0, 3, 80))] == [(0, 3, 32), (0, 3, 2, 2)]
    assert [t.shape for t in formats.quantize_weight(torch.zeros(0, 64))] == [(0, 16, 256), (0, 1, 2, 256)]


@pytest.mark.parametrize("dim", [33, 64, 80, 128, 130])
def test_the_plan_counts_what_the_format_takes(dim):
    codes, scales = formats.quantize_kv(torch.zeros(1, dim))
    widths = [field.width for field in FourBitCache().fields("float16", dim)]
    assert widths == [codes.shape[-1], scales[0].numel()]
    assert BLOCK_ROWS == sizes.BLOCK_ROWS
