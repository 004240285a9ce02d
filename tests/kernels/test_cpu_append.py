"""The CPU writes new tokens into the cache as the reference does, and nothing beside them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flexgen_triton.kernels.cpu.append import append_kv
from flexgen_triton.kernels.elementwise import append_kv_ref
from flexgen_triton.kernels.sizes import kv_width

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SHAPES = {  # sequences, heads, D, tokens of a block, positions
    "minimal": (1, 1, 1, 1, (0,)),
    "no sequences": (0, 2, 64, 8, ()),
    "unequal positions": (3, 2, 64, 8, (0, 15, 7)),
    "two planes in a group": (2, 3, 128, 8, (9, 2)),
    "odd heads": (2, 2, 65, 33, (40, 0)),
    "a half filled group": (2, 2, 80, 8, (3, 11)),
    "groups without a column": (2, 1, 320, 5, (6, 4)),
}


def fields_of(sequences: int, heads: int, dim: int, tokens: int, dtype: torch.dtype | None) -> list[tuple[Tensor, ...]]:
    """K's and V's fields, views of one array [blocks, B, K and V, Hkv, T, ...] that something is in."""
    sizes = 2, sequences, 2, heads, tokens
    whole = (torch.full((*sizes, dim), 7, dtype=dtype),)
    if dtype is None:
        width = kv_width(dim)
        codes = torch.full((*sizes, width // 4), 7, dtype=torch.int16)
        whole = codes, torch.full((*sizes, width // 64, 2), 7, dtype=torch.float16)
    return [tuple(field[:, :, i] for field in whole) for i in range(2)]


def check(k: Tensor, v: Tensor, tokens: int, positions: tuple[int, ...], dtype: torch.dtype | None) -> None:
    at = torch.tensor(positions, dtype=torch.int32)
    got, want = (fields_of(*k.shape, tokens, dtype) for _ in range(2))
    append_kv(k, v, *got, at)
    append_kv_ref(k, v, *want, at)
    for a, b in zip(sum(got, ()), sum(want, ()), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("is_4bit", [False, True], ids=["as it is", "4 bits"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_tokens_are_the_reference_s(shape, dtype, is_4bit):
    """K and V are columns of one product, so a sequence's heads lie far from the next one's."""
    sequences, heads, dim, tokens, positions = shape
    torch.manual_seed(0)
    qkv = torch.randn(sequences, 3, heads, dim).to(dtype)
    check(qkv[:, 1], qkv[:, 2], tokens, positions, None if is_4bit else dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_are_the_reference_s_for_many_numbers(dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 64, 32, 128) * torch.logspace(-9, 4, 64)[:, None, None]
    check(*x.to(dtype), 4, tuple(n % 8 for n in range(64)), None)


@pytest.mark.parametrize("value", [0.0, 3.0, 1e-7, 7e4, float("inf"), float("nan")])
def test_groups_that_have_no_proper_range(value):
    """Constant, subnormal, beyond fp16, not a number."""
    x = torch.randn(2, 2, 1, 128)
    x[0, 0, 0, :64] = value
    x[1, 1, 0, 70] = value
    check(*x, 8, (1, 2), None)


def test_a_position_outside_the_cache_is_refused():
    k = torch.randn(1, 1, 64)
    with pytest.raises(AssertionError):
        check(k, k, 8, (16,), torch.float32)
