"""Prefill attention in Triton's interpreter against its specification in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flexgen_triton.kernels import attention_prefill as prefill
from flexgen_triton.kernels.attention_prefill import Shape, prefill_attention, prefill_attention_ref
from flexgen_triton.kernels.chips import CHIPS

SMALL = Shape(32, 16, 4, 1)  # tiles that short sequences cross
LARGE = Shape(64, 64, 4, 1)
CASES = {  # lens, heads, heads of K and V, head dim, tile
    "one token": ((1,), 1, 1, 64, SMALL),
    "one whole tile": ((32,), 2, 2, 64, SMALL),
    "one past a tile": ((33, 1), 2, 2, 64, SMALL),
    "odd lengths, 80 of 128": ((7, 45, 0, 16, 31), 3, 3, 80, SMALL),
    "grouped heads, 128": ((50, 17), 4, 2, 128, SMALL),
    "one K for all heads": ((65,), 3, 1, 64, SMALL),
    "large tiles": ((70, 64), 1, 1, 64, LARGE),
    "head dim 8": ((19, 40), 2, 1, 8, SMALL),
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])


def fused(lens: tuple[int, ...], heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k and v as views of one tensor [T, (H + 2 Hkv) D], as a fused projection leaves them."""
    generator = torch.Generator().manual_seed(sum(lens) + dim)
    qkv = torch.randn(sum(lens), heads + 2 * kv_heads, dim, generator=generator).to(dtype)
    return qkv.split([heads, kv_heads, kv_heads], 1)


def plain(q: Tensor, k: Tensor, v: Tensor, lens: tuple[int, ...]) -> Tensor:
    """Attend by a few lines of torch in this precision: every product and the softmax rounded to it."""
    repeat = q.shape[1] // k.shape[1]
    parts = []
    for qs, ks, vs in zip(*(x.transpose(0, 1).split(list(lens), 1) for x in (q, k, v)), strict=True):
        ks, vs = ks.repeat_interleave(repeat, 0), vs.repeat_interleave(repeat, 0)  # [H, s, D]
        scores = qs @ ks.transpose(1, 2) * q.shape[2] ** -0.5
        future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        parts.append((scores.masked_fill(future, -torch.inf).softmax(-1) @ vs).transpose(0, 1))
    return torch.cat(parts)


def error(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm())


@pytest.fixture
def poison(monkeypatch):
    """Outputs start as NaN, so that an element nobody wrote is seen."""
    empty = torch.empty
    monkeypatch.setattr(prefill.torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))


@DTYPES
@pytest.mark.parametrize("case", CASES)
def test_no_further_from_the_truth_than_twice_plain_torch(monkeypatch, poison, case, dtype):
    lens, heads, kv_heads, dim, tile = CASES[case]
    monkeypatch.setattr(prefill, "shape_of", lambda *_: tile)
    q, k, v = fused(lens, heads, kv_heads, dim, dtype)
    got = prefill_attention(q, k, v, lens)
    truth = prefill_attention_ref(q.double(), k.double(), v.double(), lens)
    assert got.shape == q.shape and got.dtype == dtype and got.isfinite().all()
    assert error(got, truth) <= 2 * error(plain(q, k, v, lens), truth) + 1e-7


def test_no_tokens():
    q, k, v = fused((), 2, 2, 64, torch.float16)
    assert prefill_attention(q, k, v, ()).shape == (0, 2, 64)
    assert prefill_attention(q, k, v, (0, 0)).shape == (0, 2, 64)


def test_scale_and_large_scores():
    """Scores of some thousands: the maximum is subtracted before the exponential."""
    q, k, v = (100 * x for x in fused((40,), 1, 1, 64, torch.float32))
    truth = prefill_attention_ref(q.double(), k.double(), v.double(), (40,), scale=0.5)
    assert error(prefill_attention(q, k, v, (40,), scale=0.5), truth) < 1e-4


def test_a_sequence_never_sees_another():
    lens = (20, 35, 9)
    q, k, v = fused(lens, 2, 2, 64, torch.float32)
    got = prefill_attention(q, k, v, lens)
    at = 0
    for length in lens:
        part = slice(at, at + length)
        alone = prefill_attention(q[part], k[part], v[part], (length,))
        torch.testing.assert_close(got[part], alone, rtol=0, atol=0)
        at += length


def test_without_matrix_instructions_torch_does_it(monkeypatch):
    lens = (20, 0, 9)
    q, k, v = fused(lens, 4, 2, 64, torch.float32)
    want = prefill_attention_ref(q, k, v, lens)
    monkeypatch.setattr(prefill, "chip_of", lambda _: CHIPS["sm_75"])
    monkeypatch.setattr(prefill, "shape_of", None)
    torch.testing.assert_close(prefill_attention(q, k, v, lens), want)
