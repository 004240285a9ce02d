"""The writing of K and V, in Triton's interpreter against plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flexgen_triton.kernels.elementwise import (
    Fields,
    append_kv,
    append_kv_ref,
    write_prompt_kv,
    write_prompt_kv_ref,
)
from flexgen_triton.kernels.formats import dequantize_kv
from flexgen_triton.kernels.sizes import kv_width

UNTOUCHED = -77  # what the cache holds before a write; P16 and fp16 both keep it
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
KINDS = pytest.mark.parametrize("kind", ["16 bits", "4 bits"])
HEADS = {  # heads of K and V, head dim
    "one head of 64": (1, 64),
    "three of 80": (3, 80),
    "two of 128": (2, 128),
    "head dim 40": (2, 40),
    "head dim 160: a group of padding": (1, 160),
}


def fields(kind: str, dtype: torch.dtype, sequences: int, heads: int, dim: int) -> tuple[Fields, Fields]:
    """K's and V's share of three blocks of eight tokens, as the engine's cache has them: K and V side by side."""
    shape = (3, sequences, 2, heads, 8)

    def halves(width: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        cache = torch.full((*shape, *width), UNTOUCHED, dtype=dtype)
        return cache[:, :, 0], cache[:, :, 1]

    if kind == "16 bits":
        k, v = halves((dim,), dtype)
        return (k,), (v,)
    width = kv_width(dim)
    codes, scales = halves((width // 4,), torch.int16), halves((width // 64, 2), torch.float16)
    return (codes[0], scales[0]), (codes[1], scales[1])


def tokens(count: int, heads: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """k and v as views of a fused projection [N, (H + 2 Hkv) D], here with H = Hkv."""
    qkv = torch.randn(count, 3 * heads, dim, generator=torch.Generator().manual_seed(count)).to(dtype)
    return tuple(qkv.split(heads, 1))[1:]


def assert_same(got: tuple[Fields, Fields], want: tuple[Fields, Fields]) -> None:
    """Bit for bit, whatever was not to be written included."""
    for g, w in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=0)


@pytest.mark.grid
@DTYPES
@KINDS
@pytest.mark.parametrize("case", HEADS)
def test_append(case, kind, dtype):
    heads, dim = HEADS[case]
    positions = torch.tensor([0, 7, 8, 23, 15] * 4, dtype=torch.int32)  # 20 sequences: more than a program takes
    k, v = tokens(len(positions), heads, dim, dtype)
    got, want = (fields(kind, dtype, len(positions), heads, dim) for _ in range(2))
    append_kv(k, v, *got, positions)
    append_kv_ref(k, v, *want, positions)
    assert_same(got, want)


PROMPTS = {"one token": (1,), "odd": (9, 0, 24, 5), "no tokens": (), "only empty ones": (0, 0)}


@pytest.mark.grid
@DTYPES
@KINDS
@pytest.mark.parametrize("case", PROMPTS)
def test_prompts(case, kind, dtype):
    lens = PROMPTS[case]
    k, v = tokens(sum(lens), 2, 80, dtype)
    got, want = (fields(kind, dtype, max(1, len(lens)), 2, 80) for _ in range(2))
    write_prompt_kv(k, v, *got, lens)
    write_prompt_kv_ref(k, v, *want, lens)
    assert_same(got, want)


@DTYPES
def test_constant_and_huge_groups(dtype):
    """A constant group keeps its value in the minimum; a group from -60000 to 60000 has a step that fp16 holds."""
    k = torch.stack((torch.full((1, 64), 0.5), torch.linspace(-60000, 60000, 64)[None])).to(dtype)  # [2, 1, 64]
    (codes, scales), v_fields = fields("4 bits", dtype, 2, 1, 64)
    append_kv(k, k, (codes, scales), v_fields, torch.zeros(2, dtype=torch.int32))
    got = dequantize_kv(codes[0, :, :, 0], scales[0, :, :, 0], 64, torch.float32)
    torch.testing.assert_close(got[0], k[0].float(), rtol=0, atol=0)
    assert (got[1] - k[1].float()).abs().max() <= 120000 / 15 / 2 * 1.01


def test_a_full_sequence_is_refused():
    k, v = tokens(25, 2, 80, torch.float32)
    with pytest.raises(AssertionError):
        write_prompt_kv(k, v, *fields("16 bits", torch.float32, 1, 2, 80), (25,))
