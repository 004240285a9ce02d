"""Layer norm and RMS norm in Triton's interpreter against their specifications in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flexgen_triton.kernels import norm
from flexgen_triton.kernels.norm import layer_norm, layer_norm_ref, rms_norm, rms_norm_ref

SHAPES = {  # M, K, group
    "one number": (1, 1, 32),
    "one row": (1, 64, 64),
    "odd": (3, 77, 32),
    "one past a group": (5, 65, 64),
    "80 heads' worth": (2, 2560, 128),
    "no rows": (0, 48, 32),
}
NORMS = {"layer": (layer_norm, layer_norm_ref), "rms": (rms_norm, rms_norm_ref)}
EXTRAS = {"plain": (), "weight": ("weight",), "all": ("weight", "bias", "residual")}
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])


def plain(kind: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """A few lines of torch, every step rounded to x's precision."""
    x = x if residual is None else x + residual
    if kind == "layer":
        x = x - x.mean(1, keepdim=True)
    y = x * torch.rsqrt(x.square().mean(1, keepdim=True) + norm.EPS)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def error(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm().clamp_min(1e-30))


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Outputs start as NaN, so that an element nobody wrote is seen."""
    for name in ("empty", "empty_like"):
        made = getattr(torch, name)
        monkeypatch.setattr(norm.torch, name, lambda *a, made=made, **k: made(*a, **k).fill_(float("nan")))


@pytest.mark.grid
@DTYPES
@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_further_from_the_truth_than_twice_plain_torch(shape, kind, extras, dtype):
    rows, columns, group = SHAPES[shape]
    launch, ref = NORMS[kind]
    generator = torch.Generator().manual_seed(rows + columns)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    x = random(rows, columns + 16)[:, :columns]  # rows that are not dense
    given = {"weight": random(columns) + 1, "bias": random(columns), "residual": random(rows, columns)}
    given = {name: given[name] for name in EXTRAS[extras]}
    got = launch(x, **given, group_size=group)
    total = x + given["residual"] if "residual" in given else x
    parameters = {name: t.double() for name, t in given.items() if name != "residual"}
    truth = ref(total.double(), **parameters).y
    low = plain(kind, x, given.get("weight"), given.get("bias"), given.get("residual"))
    assert got.y.dtype == dtype and got.y.shape == x.shape and got.y.isfinite().all()
    assert error(got.y, truth) <= 2 * error(low, truth) + 1e-7
    torch.testing.assert_close(got.total, total, rtol=0, atol=0)
    want = F.pad(got.y.double(), (0, -columns % group)).unflatten(1, (-1, group)).sum(2)
    assert got.sums.dtype == torch.float32
    torch.testing.assert_close(got.sums.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", NORMS)
def test_without_a_group_size_there_are_no_sums_and_without_a_residual_no_copy(kind):
    x = torch.randn(2, 40)
    y, total, sums = NORMS[kind][0](x)
    assert total is x and sums is None and y.isfinite().all()


@pytest.mark.parametrize("kind", NORMS)
def test_a_row_far_from_zero(kind):
    """Mean and variance by two passes: a mean of 1000 standard deviations costs no digits but the input's own."""
    x = 1000 + torch.randn(2, 300, generator=torch.Generator().manual_seed(0))
    launch, ref = NORMS[kind]
    torch.testing.assert_close(launch(x).y.double(), ref(x.double()).y, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", NORMS)
def test_the_specification_is_torchs(kind):
    x, weight, bias = torch.randn(3, 50), torch.randn(50), torch.randn(50)
    if kind == "layer":
        want = F.layer_norm(x, (50,), weight, bias, norm.EPS)
    else:
        want = F.rms_norm(x, (50,), weight, norm.EPS) + bias
    torch.testing.assert_close(NORMS[kind][1](x, weight, bias).y, want)
