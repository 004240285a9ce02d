"""Logits are processed as transformers does, and a draw depends on its own seed and logits only."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from flexgen_triton.sequences import sampler as sampling
from flexgen_triton.sequences.params import SamplingParams
from flexgen_triton.sequences.sampler import Drawn, Sampler

VOCAB, EOS = 37, 2
CPU = torch.device("cpu")
EVERYTHING: dict[str, Any] = {
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.8,
    "min_p": 0.05,
    "repetition_penalty": 1.3,
    "presence_penalty": 0.4,
    "frequency_penalty": -0.3,
    "min_tokens": 2,
    "stop_token_ids": [5, 6],
    "logprobs": 3,
}


def sampler(params: list[SamplingParams], prompts: list[list[int]] | None = None, **over: Any) -> Sampler:
    prompts = prompts or [[b % VOCAB] for b in range(len(params))]
    seeds = over.pop("seeds", range(len(params)))
    return Sampler(params, seeds, prompts, **{"vocab": VOCAB, "eos": [{EOS}] * len(params), "device": CPU, **over})


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 4


def transformers_logits(p: SamplingParams, prompt: list[int], output: list[int], logits: Tensor) -> Tensor:
    """One row as transformers processes it, with vLLM's two penalties where vLLM has them; logits [V] -> [V]."""
    ids = torch.tensor([prompt + output])
    row = logits[None].clone()
    if p.repetition_penalty != 1:
        row = RepetitionPenaltyLogitsProcessor(float(p.repetition_penalty))(ids, row)
    counts = torch.zeros(len(logits))
    for token in output:
        counts[token] += 1
    row = row - (p.frequency_penalty * counts + p.presence_penalty * (counts > 0))
    rest = LogitsProcessorList()
    rest.append(MinNewTokensLengthLogitsProcessor(len(prompt), p.min_tokens, [EOS, *p.stop_token_ids]))
    if not p.is_greedy:
        rest.append(TemperatureLogitsWarper(float(p.temperature)))
        if p.top_k > 0:
            rest.append(TopKLogitsWarper(p.top_k))
        if p.top_p < 1:
            rest.append(TopPLogitsWarper(p.top_p))
        rest.append(MinPLogitsWarper(p.min_p))
    return rest(ids, row)[0]


def check_against_transformers(
    params: list[SamplingParams], prompts: list[list[int]], *, steps: int, coarse: bool = False
) -> None:
    """Whole batches at every step; coarse logits have many ties, and some are -inf."""
    batch = sampler(params, prompts)
    outputs: list[list[int]] = [[] for _ in params]
    for step in range(steps):
        logits = random_logits(len(params), VOCAB, seed=step)
        if coarse:
            logits = logits.round()
            logits[:, step :: VOCAB // 4] = -math.inf
        processed = batch.process(logits.clone())
        for row, p, prompt, output, found in zip(logits, params, prompts, outputs, processed, strict=True):
            torch.testing.assert_close(found, transformers_logits(p, prompt, output, row), rtol=1e-6, atol=1e-6)
        for output, token in zip(outputs, batch.sample(logits).tokens, strict=True):
            output.append(token)


ONE_EACH = [
    {"temperature": 0.3},
    {"temperature": 7},
    {"temperature": 1e-5},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": -1},
    {"top_k": VOCAB},
    {"top_k": VOCAB + 1},
    {"top_k": 1 << 70},
    {"top_p": 0.9},
    {"top_p": 0.3},
    {"top_p": 1e-9},
    {"top_p": 1 - 1e-9},
    {"min_p": 0.1},
    {"min_p": 1},
    {"repetition_penalty": 1.5},
    {"repetition_penalty": 0.5},
    {"repetition_penalty": 2},
    {"presence_penalty": 1.5},
    {"frequency_penalty": -2},
    {"presence_penalty": -1, "frequency_penalty": 0.5},
    {"min_tokens": 3},
    {"min_tokens": 2, "stop_token_ids": [0, 1, VOCAB - 1]},
    {"min_tokens": 2, "temperature": 0},
    {"repetition_penalty": 1.5, "frequency_penalty": 1, "top_k": 3, "temperature": 0},
    {},
    EVERYTHING,
]


@pytest.mark.parametrize("coarse", [False, True], ids=["distinct", "ties and -inf"])
@pytest.mark.parametrize("fields", ONE_EACH, ids=lambda f: " ".join(f) if len(f) < 4 else "everything")
def test_a_processor_equals_transformers(fields, coarse):
    params = [SamplingParams(**fields)] * 3
    check_against_transformers(params, [[1, 2, 3, 3], [EOS] * 3, [30]], steps=4, coarse=coarse)


@pytest.mark.parametrize("temporary_bytes", [0, 2 * 32 * VOCAB, 1 << 25], ids=["a row", "two rows", "all"])
@pytest.mark.parametrize("coarse", [False, True], ids=["distinct", "ties and -inf"])
def test_rows_with_different_parameters_stand_side_by_side(monkeypatch, temporary_bytes, coarse):
    monkeypatch.setattr(sampling, "TEMPORARY_BYTES", temporary_bytes)
    params = [SamplingParams(**fields) for fields in ONE_EACH]
    check_against_transformers(params, [[b, b + 1] for b in range(len(params))], steps=4, coarse=coarse)


REQUESTS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0, 1]) | st.floats(0.05, 5),
    top_k=st.integers(-1, VOCAB + 2),
    top_p=st.just(1) | st.floats(1e-3, 1),
    min_p=st.just(0) | st.floats(0, 1),
    repetition_penalty=st.just(1) | st.floats(0.1, 3),
    presence_penalty=st.just(0) | st.floats(-2, 2),
    frequency_penalty=st.just(0) | st.floats(-2, 2),
    min_tokens=st.integers(0, 4),
    stop_token_ids=st.lists(st.integers(0, VOCAB - 1), max_size=3),
)
PROMPTS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6)


@given(st.lists(st.tuples(REQUESTS, PROMPTS), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_any_batch_equals_transformers(batch):
    check_against_transformers([p for p, _ in batch], [prompt for _, prompt in batch], steps=3)


def test_top_k_keeps_all_that_are_level_with_the_last():
    logits = torch.tensor([[3.0, 1, 2, 2, 2, 0]])
    (found,) = sampler([SamplingParams(top_k=2)], vocab=6).process(logits)
    assert found.tolist() == [3, -math.inf, 2, 2, 2, -math.inf]


def test_top_p_keeps_one_token_at_least():
    (found,) = sampler([SamplingParams(top_p=1e-30)]).process(random_logits(1, VOCAB))
    assert found.isfinite().sum() == 1 and found.argmax() == random_logits(1, VOCAB).argmax()


def test_neither_end_of_text_nor_stop_tokens_come_before_min_tokens():
    fields = {"min_tokens": 3, "max_tokens": 9, "stop_token_ids": [5, VOCAB + 40]}
    params = [SamplingParams(temperature=0, **fields), SamplingParams(ignore_eos=True, **fields), SamplingParams()]
    batch = sampler(params)
    for step in range(5):
        logits = torch.zeros(3, VOCAB)
        logits[:, [EOS, 5]] = 100.0
        tokens = batch.sample(logits).tokens
        assert [t in (EOS, 5) for t in tokens] == [step >= 3, step >= 3, True], step


def test_greedy_takes_the_first_of_the_largest_and_does_nothing_else():
    batch = sampler([SamplingParams(temperature=0, top_k=3, top_p=0.5, min_p=0.5)] * 4)
    logits = random_logits(4, VOCAB).round()
    before = logits.clone()
    assert batch.sample(logits) == Drawn(before.argmax(1).tolist(), [None] * 4)
    assert torch.equal(logits, before)


def test_a_temperature_too_small_to_divide_by_is_greedy():
    batch = sampler([SamplingParams(temperature=1e-45), SamplingParams(temperature=1e-6)])
    logits = random_logits(2, VOCAB)
    assert batch.sample(logits.clone()).tokens == logits.argmax(1).tolist()


def test_an_empty_batch():
    assert sampler([]).sample(torch.empty(0, VOCAB)) == Drawn([], [])


# Draws


def draws(
    params: list[SamplingParams], seeds: list[int], logits: Tensor, prompts: list[list[int]], *, steps: int = 12
) -> list[list[int]]:
    """The tokens of each sequence; row b's logits at step i are logits[b], moved on by i tokens."""
    batch = sampler(params, prompts, seeds=seeds)
    tokens = [batch.sample(logits.roll(i, 1)).tokens for i in range(steps)]
    return [list(row) for row in zip(*tokens, strict=True)]


@pytest.mark.parametrize("temporary_bytes", [0, 1 << 25], ids=["a row at a time", "all at once"])
def test_draws_are_the_same_alone_in_any_batch_and_in_any_order(monkeypatch, temporary_bytes):
    several = [EVERYTHING, {}, {"temperature": 0}, {"top_p": 0.9}, {"top_k": 4}, {"repetition_penalty": 2}, {}, {}]
    params = [SamplingParams(**fields) for fields in several]
    seeds, prompts = [11, 12, 13, 14, 15, 16, -1, 12], [[b, 2 * b] for b in range(8)]
    logits = random_logits(8, VOCAB)
    together = draws(params, seeds, logits, prompts)
    monkeypatch.setattr(sampling, "TEMPORARY_BYTES", temporary_bytes)
    order = [5, 2, 7, 0, 3, 1, 6, 4]
    shuffled = draws([params[b] for b in order], [seeds[b] for b in order], logits[order], [prompts[b] for b in order])
    assert [shuffled[order.index(b)] for b in range(8)] == together
    for b in range(8):
        assert draws([params[b]], [seeds[b]], logits[b : b + 1], [prompts[b]]) == [together[b]], b
    again = draws([params[1], SamplingParams(**EVERYTHING)], [12, 99], logits[[1, 0]], [prompts[1], [1]])
    assert again[0] == together[1]


def test_every_seed_draws_differently():
    seeds = [0, 1, -1, 1 << 31, 1 << 32, (1 << 32) + 1, 1 << 63, -(1 << 63) + 1, (1 << 64) - 2, 5, 5 + (1 << 40)]
    logits = torch.zeros(len(seeds), VOCAB)
    tokens = draws([SamplingParams()] * len(seeds), seeds, logits, [[0]] * len(seeds))
    assert len({tuple(row) for row in tokens}) == len(seeds)


def test_the_ends_of_the_range_of_seeds_are_taken():
    ends = [-(1 << 63), (1 << 64) - 1]
    assert len(draws([SamplingParams()] * 2, ends, torch.zeros(2, VOCAB), [[0]] * 2)) == 2


@pytest.mark.parametrize("fields", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}], ids=str)
def test_frequencies_are_those_of_the_softmax(fields):
    """A chi-square test at one in 10⁵, over many sequences that each draw a few times."""
    num, steps = 500, 20
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5, -2.0])
    batch = sampler([SamplingParams(**fields)] * num, vocab=6)
    tokens = Counter(t for _ in range(steps) for t in batch.sample(logits.repeat(num, 1)).tokens)
    expected = transformers_logits(SamplingParams(**fields), [0], [], logits).softmax(0).double()
    kept = expected.nonzero().squeeze(1).tolist()
    assert set(tokens) <= set(kept)
    share = expected[kept] / expected[kept].sum()
    assert chisquare([tokens[t] for t in kept], (num * steps * share).tolist()).pvalue > 1e-5


def test_a_filter_does_not_move_the_draw_to_another_token_that_it_keeps():
    """A filtered row draws the token that an unfiltered one draws, if that one survives the filter."""
    num = 200
    logits = (random_logits(1, VOCAB) / 4).repeat(num, 1)
    free = sampler([SamplingParams()] * num).sample(logits.clone()).tokens
    filtered = sampler([SamplingParams(top_k=4)] * num).sample(logits.clone()).tokens
    kept = set(logits[0].topk(4).indices.tolist())
    survivors = [b for b in range(num) if free[b] in kept]
    assert 0 < len(survivors) < num
    assert [filtered[b] for b in survivors] == [free[b] for b in survivors]


# Log-probabilities


@pytest.mark.parametrize("temporary_bytes", [0, 1 << 25], ids=["a row at a time", "all at once"])
def test_logprobs_are_those_of_the_model(monkeypatch, temporary_bytes):
    monkeypatch.setattr(sampling, "TEMPORARY_BYTES", temporary_bytes)
    nums = [3, None, 0, 100, 1]
    params = [SamplingParams(**{**EVERYTHING, "temperature": 3.0, "top_k": 0, "logprobs": n}) for n in nums]
    batch = sampler(params)
    for step in range(6):
        logits = random_logits(5, VOCAB, seed=step)
        reference = logits.log_softmax(1)
        drawn = batch.sample(logits.clone())
        for row, num, token, table in zip(reference, nums, drawn.tokens, drawn.logprobs, strict=True):
            if num is None:
                assert table is None
                continue
            likeliest = row.topk(min(num, VOCAB)).indices.tolist()
            assert list(table) == [token, *(t for t in likeliest if t != token)]
            for t, found in table.items():
                assert found.logprob == pytest.approx(row[t].item(), abs=1e-5)
                assert found.rank == 1 + (row > row[t]).sum()
                assert found.decoded_token is None


def test_tokens_that_are_level_share_a_rank():
    logits = torch.tensor([[1.0, 3, 2, 3, -math.inf, 2, 0]])
    (table,) = sampler([SamplingParams(temperature=0, logprobs=7)], vocab=7).sample(logits).logprobs
    assert table is not None and next(iter(table)) == 1
    assert {t: found.rank for t, found in table.items()} == {1: 1, 3: 1, 2: 3, 5: 3, 0: 5, 6: 6, 4: 7}
    assert table[4].logprob == -math.inf
