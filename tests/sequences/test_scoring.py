"""Log-probabilities from parts of the vocabulary are those of the whole."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexgen_triton.sequences.sampler import Logprobs
from flexgen_triton.sequences.scorer import PromptScorer

CPU = torch.device("cpu")


def score(logits: Tensor, targets: Tensor, num: int, *, rows: int, columns: int, order: int = 0) -> list[Logprobs]:
    """The scorer's tables, from pieces of so many rows and columns in an order of their own."""
    scorer = PromptScorer(targets, num, CPU)
    T, V = logits.shape
    pieces = [(p, t) for p in range(0, T, rows) for t in range(0, V, columns)]
    random.Random(order).shuffle(pieces)
    for p, t in pieces:
        scorer.add(logits[p : p + rows, t : t + columns], position=p, token=t)
    return scorer.result()


def check(logits: Tensor, targets: Tensor, num: int, tables: list[Logprobs]) -> None:
    """fp32 rounding: log_softmax in fp32 errs as much from fp64's, give or take a few units in the last place."""
    reference = logits.double().log_softmax(1)
    assert len(tables) == len(targets)
    for row, raw, target, table in zip(reference, logits, targets.tolist(), tables, strict=True):
        top = raw.topk(min(num, len(raw)))
        assert next(iter(table)) == target
        rest = [t for t in table if t != target]
        expected = [t for t in top.indices.tolist() if t != target]
        assert raw[rest].tolist() == raw[expected[: len(rest)]].tolist()
        assert len(table) == len({target, *rest}) and len(expected) - len(rest) in (0, 1)
        for t, found in table.items():
            scale = max(1.0, row[t].abs().item(), raw.abs().max().item())
            assert found.logprob == pytest.approx(row[t].item(), abs=4 * torch.finfo(torch.float32).eps * scale)
            rank = 1 + int((raw > raw[t]).sum())
            assert found.rank == (rank if rank <= num else None)


SHAPES = [(1, 1), (1, 50), (7, 33), (17, 257), (3, 1000)]


@pytest.mark.parametrize("num", [0, 1, 5, 100])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parts_equal_the_whole(shape, num):
    T, V = shape
    logits = torch.randn(T, V, generator=torch.Generator().manual_seed(T)) * 5
    targets = torch.randint(V, (T,), generator=torch.Generator().manual_seed(V))
    for rows, columns in ((T, V), (3, 17), (1, 64)):
        check(logits, targets, num, score(logits, targets, num, rows=rows, columns=columns))


SIZES = st.tuples(st.integers(1, 6), st.integers(1, 40))


@given(SIZES, SIZES, st.integers(0, 12), st.integers(0, 1 << 32))
@settings(max_examples=60, deadline=None)
def test_any_pieces_in_any_order_equal_the_whole(shape, piece, num, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator) * 10
    targets = torch.randint(shape[1], shape[:1], generator=generator)
    check(logits, targets, num, score(logits, targets, num, rows=piece[0], columns=piece[1], order=seed))


def test_large_logits_neither_overflow_nor_lose_the_difference():
    logits = torch.tensor([[-3e4, 2e4, 2e4 - 1, 1e4], [-90.0, -91.0, -1e4, -95.0]])
    targets = torch.tensor([2, 1])
    for columns in (1, 2, 4):
        tables = score(logits, targets, 2, rows=1, columns=columns, order=columns)
        whole = logits.log_softmax(1)
        assert tables[0][2].logprob == pytest.approx(whole[0, 2].item(), rel=1e-6)
        assert tables[1][1].logprob == pytest.approx(whole[1, 1].item(), rel=1e-6)


def test_a_part_that_is_minus_infinity_throughout():
    logits = torch.full((2, 6), -torch.inf)
    logits[:, 4:] = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    tables = score(logits, torch.tensor([5, 0]), 2, rows=2, columns=2)
    assert tables[0][5].logprob == pytest.approx(logits[0].log_softmax(0)[5].item())
    assert tables[0][5].rank == 1 and list(tables[0]) == [5, 4]
    assert tables[1][0].logprob == -torch.inf and tables[1][0].rank is None


def test_logits_are_left_as_they_are():
    logits = torch.randn(3, 8)
    before = logits.clone()
    score(logits, torch.tensor([1, 2, 3]), 3, rows=2, columns=5)
    assert torch.equal(logits, before)


def test_no_positions():
    assert PromptScorer(torch.empty(0, dtype=torch.int64), 3, CPU).result() == []


def test_a_missing_part_is_found():
    scorer = PromptScorer(torch.tensor([7]), 1, CPU)
    scorer.add(torch.zeros(1, 4), position=0, token=0)
    with pytest.raises(AssertionError, match="never added"):
        scorer.result()
