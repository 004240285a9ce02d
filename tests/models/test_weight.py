"""A weight is the same matrix in whatever way it is multiplied, and is dequantised no oftener than its format says."""

from __future__ import annotations

import pytest
import torch

from flexgen_triton.kernels import matmul_q4, quant
from flexgen_triton.kernels.formats import dequantize_weight
from flexgen_triton.memory.scratch import Scratch
from flexgen_triton.models import ops
from flexgen_triton.models.ops import implementation
from flexgen_triton.plan.formats import FourBit, Plain


def random_weight(form: FourBit, rows: int = 300, columns: int = 128) -> tuple[ops.Weight, torch.Tensor]:
    """A matrix in a format, its parts one behind the other, and what it stands for."""
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))
    parts = ops.encode(form, matrix)
    buffer = torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in parts])
    return ops.from_bytes(form, (rows, columns), buffer), dequantize_weight(*parts, rows, columns, torch.float32)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_the_parts_are_those_that_the_format_names(group):
    form = FourBit(group)
    parts = ops.encode(form, torch.randn(300, 200))
    assert [tuple(p.shape) for p in parts] == [p.shape for p in form.parts((300, 200))]
    assert [str(p.dtype) for p in parts] == [f"torch.{p.dtype}" for p in form.parts((300, 200))]
    size = sum(p.nbytes for p in ops.encode(form, torch.randn(1024, 1024)))
    assert size == pytest.approx(1024 * 1024 * form.parameter_bytes)


def test_a_plain_matrix_is_a_view_of_its_bytes():
    matrix = torch.randn(5, 7)
    weight = ops.from_bytes(Plain("float32"), (5, 7), matrix.view(-1).view(torch.uint8))
    x = torch.randn(3, 7)
    assert torch.equal(ops.linear(x, weight), x @ matrix.T)


@pytest.mark.parametrize(("group", "times"), [(32, 1), (64, 0), (128, 0)])
def test_on_a_gpu_small_groups_are_dequantised_once_a_load_and_others_not_at_all(monkeypatch, group, times):
    """Three products of two rows, as three GPU batches make with one load of the weights."""
    monkeypatch.setattr(implementation, "uses_triton", lambda x: True)
    made = []
    for module in (quant, matmul_q4):
        plain = module.dequantize_weight
        monkeypatch.setattr(module, "dequantize_weight", lambda *a, f=plain, **k: made.append(1) or f(*a, **k))
    weight, exact = random_weight(FourBit(group))
    x = torch.randn(2, 128, dtype=torch.float16, generator=torch.Generator().manual_seed(4))
    for _ in range(3):
        out = ops.linear(x, weight, scratch=Scratch())
        torch.testing.assert_close(out.float(), x.float() @ exact.T, rtol=2e-2, atol=5e-2)
    assert len(made) == times
