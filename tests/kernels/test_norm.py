"""Layer norm and RMS norm in Triton's interpreter against their specifications in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flexgen_triton.kernels import norm
from flexgen_triton.kernels.norm import layer_norm, layer_norm_ref, rms_norm, rms_norm_ref

SHAPES = {  # M, K
    "one number": (1, 1),
    "one row": (1, 64),
    "odd": (3, 77),
    "one past a power of two": (5, 65),
    "80 heads' worth": (2, 2560),
    "no rows": (0, 48),
}
NORMS = {"layer": (layer_norm, layer_norm_ref), "rms": (rms_norm, rms_norm_ref)}
EXTRAS = {"plain": (), "weight": ("weight",), "all": ("weight", "bias")}
CASES = [(kind, extras) for kind in NORMS for extras in EXTRAS if (kind, extras) != ("rms", "all")]  # it has no bias
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])


def plain(kind: str, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """A few lines of torch, every step rounded to x's precision."""
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
    empty = torch.empty
    monkeypatch.setattr(norm.torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))


@pytest.mark.grid
@DTYPES
@pytest.mark.parametrize(("kind", "extras"), CASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_further_from_the_truth_than_twice_plain_torch(shape, kind, extras, dtype):
    rows, columns = SHAPES[shape]
    launch, ref = NORMS[kind]
    generator = torch.Generator().manual_seed(rows + columns)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    x = random(rows, columns + 16)[:, :columns]  # rows that are not dense
    given = {"weight": random(columns) + 1, "bias": random(columns)}
    given = {name: given[name] for name in EXTRAS[extras]}
    got = launch(x, **given)
    truth = ref(x.double(), **{name: t.double() for name, t in given.items()})
    assert got.dtype == dtype and got.shape == x.shape and got.isfinite().all()
    assert error(got, truth) <= 2 * error(plain(kind, x, **given), truth) + 1e-7


@pytest.mark.parametrize("kind", NORMS)
def test_the_result_is_written_where_it_is_asked_for(kind):
    x, out = torch.randn(2, 40), torch.full((2, 40), torch.nan)
    assert NORMS[kind][0](x, out=out) is out and torch.equal(out, NORMS[kind][0](x))


@pytest.mark.parametrize("kind", NORMS)
def test_a_row_far_from_zero(kind):
    """Mean and variance by two passes: a mean of 1000 standard deviations costs no digits but the input's own."""
    x = 1000 + torch.randn(2, 300, generator=torch.Generator().manual_seed(0))
    launch, ref = NORMS[kind]
    torch.testing.assert_close(launch(x).double(), ref(x.double()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", NORMS)
def test_the_specification_is_torchs(kind):
    x, weight, bias = torch.randn(3, 50), torch.randn(50), torch.randn(50)
    if kind == "layer":
        torch.testing.assert_close(layer_norm_ref(x, weight, bias), F.layer_norm(x, (50,), weight, bias, norm.EPS))
    else:
        torch.testing.assert_close(rms_norm_ref(x, weight), F.rms_norm(x, (50,), weight, norm.EPS))
