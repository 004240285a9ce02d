"""Sparse decode attention in Triton's interpreter against its specification in fp64."""

from __future__ import annotations

import pytest
import torch
from test_attention_decode import NAN, RUNS, error, made, plain
from torch import Tensor

from flexgen_triton.kernels import attention_sparse
from flexgen_triton.kernels.attention_decode import decode_attention_ref, tokens_ref
from flexgen_triton.kernels.attention_sparse import sparse_decode_attention, sparse_decode_attention_ref

CASES = {  # heads, K/V heads, head dim, segments as in test_attention_decode; keep
    "one token": ((1, 1, 64, [(1, False, [1])]), [3]),
    "newest only": ((2, 2, 64, [(8, False, [9, 12])]), [0, 0]),
    "unequal lengths and keeps": ((1, 1, 64, [(64, False, [1, 64, 65, 130])]), [5, 0, 13, 40]),
    "unequal, 4-bit": ((1, 1, 64, [(64, True, [1, 64, 65, 130])]), [5, 0, 13, 40]),
    "3 heads of 80": ((3, 3, 80, [(8, False, [30, 9])]), [3, 1]),
    "3 heads of 80, 4-bit": ((3, 3, 80, [(8, True, [30, 9])]), [3, 1]),
    "grouped 8:2, 4-bit": ((8, 2, 64, [(64, True, [100]), (1, False, [1])]), [10]),
    "128, 4-bit": ((2, 1, 128, [(64, True, [70, 64]), (8, True, [7, 0])]), [7, 2]),
    "256, 4-bit": ((1, 1, 256, [(8, True, [25])]), [4]),
    "three segments": (
        (2, 2, 64, [(64, True, [0, 130, 64]), (8, False, [5, 0, 3]), (1, False, [1, 1, 0])]),
        [2, 13, 6],
    ),
}


def plain_sparse(q: Tensor, segments: list, keep: Tensor) -> Tensor:
    """Plain torch's error, on top of the specification's choice of tokens: that of attention to all."""
    exact = sparse_decode_attention_ref(q.double(), segments, keep)
    return exact + (plain(q, segments).double() - decode_attention_ref(q.double(), segments))


def spoilt(x: torch.Tensor) -> torch.Tensor:
    """Filled with what shows where it is read."""
    return x.fill_(NAN if x.is_floating_point() else True if x.dtype == torch.bool else 1 << 30)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Outputs start as NaN, so that an element nobody wrote is seen."""
    empty = torch.empty
    monkeypatch.setattr(attention_sparse.torch, "empty", lambda *a, **k: spoilt(empty(*a, **k)))


@pytest.mark.grid
@RUNS
@pytest.mark.parametrize("case", CASES)
def test_no_further_from_the_truth_than_twice_plain_torch(monkeypatch, case, splits, dtype):
    monkeypatch.setattr(attention_sparse, "num_splits", lambda *_: splits)
    shape, keep = CASES[case]
    q, segments = made(shape, dtype)
    keep = torch.tensor(keep, dtype=torch.int32)
    truth = sparse_decode_attention_ref(q.double(), segments, keep)
    allowed = 2 * float((plain_sparse(q, segments, keep) - truth).norm() / truth.norm())
    assert allowed < 0.02
    got = sparse_decode_attention(q, segments, keep)
    assert got.dtype == dtype and error(got, truth) <= allowed


def test_the_hosts_bound_changes_nothing():
    shape, keep = CASES["unequal lengths and keeps"]
    q, segments = made(shape, torch.float32)
    keep = torch.tensor(keep, dtype=torch.int32)
    wanted = sparse_decode_attention(q, segments, keep)
    torch.testing.assert_close(sparse_decode_attention(q, segments, keep, max_keep=200), wanted)


@pytest.mark.parametrize("q4", [False, True], ids=["fp32", "4-bit"])
def test_keeping_all_is_dense_attention(q4):
    q, segments = made((2, 1, 64, [(8, q4, [20, 3]), (1, False, [1, 1])]), torch.float32)
    keep = torch.tensor([20, 50], dtype=torch.int32)
    torch.testing.assert_close(
        sparse_decode_attention(q, segments, keep), decode_attention_ref(q, segments), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("q4", [False, True], ids=["fp32", "4-bit"])
def test_v_of_other_tokens_is_not_read(q4):
    q, [segment] = made((1, 1, 64, [(64, q4, [100])]), torch.float32)
    keep = torch.tensor([9], dtype=torch.int32)
    wanted = sparse_decode_attention(q, [segment], keep)
    k = tokens_ref(segment.k, 0, 99, 64, torch.float64)[:, 0]
    best = (k @ q[0, 0].double()).topk(9).indices
    read = torch.zeros(3, 1, 1, 64, dtype=torch.bool)  # a token's place, of 3 blocks
    read.view(-1)[best] = read.view(-1)[99] = True
    for field in segment.v:
        field[~read] = NAN if field.is_floating_point() else -1
    assert torch.equal(sparse_decode_attention(q, [segment], keep), wanted)


def test_the_newest_token_counts_though_it_weighs_least():
    q, [segment] = made((1, 1, 64, [(8, False, [6])]), torch.float32)
    segment.k[0][0, 0, 0, 5] = -10 * q[0, 0]
    segment.v[0][0, 0, 0, 5] = 1e30
    keep = torch.tensor([2], dtype=torch.int32)
    torch.testing.assert_close(
        sparse_decode_attention(q, [segment], keep), sparse_decode_attention_ref(q, [segment], keep), rtol=1e-3, atol=0
    )
    assert not sparse_decode_attention_ref(q, [segment._replace(lens=segment.lens - 1)], keep).equal(
        sparse_decode_attention_ref(q, [segment], keep)
    )


def test_v_on_the_cpu_must_be_pinned():
    q, [segment] = made((1, 1, 64, [(8, False, [6])]), torch.float32)
    keep = torch.tensor([2], dtype=torch.int32)
    with pytest.raises(AssertionError, match="pinned"):
        sparse_decode_attention(q.to("meta"), [segment], keep.to("meta"))
