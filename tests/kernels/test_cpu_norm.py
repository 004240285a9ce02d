"""Layer norm on the CPU against its specification in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flexgen_triton.kernels.cpu.norm import EPS, layer_norm
from flexgen_triton.kernels.norm import layer_norm_ref

SHAPES = {  # M, K
    "one number": (1, 1),
    "one row": (1, 64),
    "odd": (3, 77),
    "one past the lanes": (5, 65),
    "many rows": (130, 33),
    "80 heads' worth": (2, 2560),
    "no rows": (0, 48),
}
EXTRAS = {"plain": (), "weight": ("weight",), "bias": ("bias",), "both": ("weight", "bias")}
DTYPES = {  # of x, of weight and bias
    "fp16": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp32": (torch.float32, torch.float32),
    "bf16, fp32 weights": (torch.bfloat16, torch.float32),
}


def room(x: Tensor) -> Tensor:
    """For a result, its rows apart; an element nobody wrote is seen."""
    return torch.full((len(x), x.shape[1] + 3), float("nan"), dtype=x.dtype)[:, : x.shape[1]]


def plain(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """A few lines of torch in fp32, rounded to x's precision at the end."""
    wide = x.float()
    centred = wide - wide.mean(1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(1, keepdim=True) + EPS)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype)


def error(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm().clamp_min(1e-30))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_further_from_the_truth_than_twice_plain_fp32(shape, extras, dtype):
    rows, columns = SHAPES[shape]
    kind, parameters = DTYPES[dtype]
    generator = torch.Generator().manual_seed(rows + columns)
    x = torch.randn(rows, columns + 16, generator=generator).to(kind)[:, :columns]  # rows that are not dense
    given = {name: torch.randn(columns, generator=generator).to(parameters) for name in EXTRAS[extras]}
    got = layer_norm(x, **given, out=room(x))
    truth = layer_norm_ref(x.double(), **{name: t.double() for name, t in given.items()})
    assert got.dtype == kind and got.isfinite().all()
    assert error(got, truth) <= 2 * error(plain(x, **given), truth) + 1e-7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_results_are_rounded_to_nearest(dtype):
    """A weight of 0 leaves the bias: numbers halfway between two, of either sign, and those that have no neighbour."""
    step = torch.finfo(dtype).eps
    ones = 1 + step * torch.tensor([0.5, 1.5, 0.49, 0.51, 1.49, 0.0])
    odd = torch.tensor([0.0, 1e-41, 1e30, 3.4028e38, float("inf"), float("nan")])
    bias = torch.cat((ones, -ones, odd, -odd))
    x = torch.randn(1, len(bias)).to(dtype)
    got = layer_norm(x, torch.zeros(len(bias)), bias, out=room(x))
    torch.testing.assert_close(got[0], bias.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_a_row_far_from_zero():
    """Mean and variance by two passes: a mean of 1000 deviations costs no digits but the input's own."""
    x = 1000 + torch.randn(2, 300, generator=torch.Generator().manual_seed(0))
    truth = layer_norm_ref(x.double())
    assert error(layer_norm(x, out=room(x)), truth) <= 2 * error(plain(x), truth) + 1e-7


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_number_that_is_none_spoils_its_own_row(value):
    x = torch.randn(3, 40)
    x[1, 7] = value
    finite = layer_norm(x, out=room(x)).isfinite()
    assert finite[[0, 2]].all() and not finite[1].any()


def test_other_memory_than_asked_for_is_refused():
    x = torch.randn(2, 8)
    with pytest.raises(AssertionError):
        layer_norm(x, out=torch.empty(2, 8, dtype=torch.float16))
    with pytest.raises(AssertionError):
        layer_norm(x, torch.ones(7), out=torch.empty(2, 8))
