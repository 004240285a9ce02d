"""Policies are invisible: whatever lies where and whatever overlaps, the tokens are transformers' tokens."""

from __future__ import annotations

import itertools
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import MODELS, NEW_TOKENS, Tiny

from flexgen_triton import LLM, Policy, SamplingParams
from flexgen_triton.sequences.sequence import TokenSequence

PERCENTS = {
    "all on the GPU": (100, 0, 100, 0, 100, 0),
    "all on the host": (0, 100, 0, 100, 0, 100),
    "all on disk": (0, 0, 0, 0, 0, 0),
    "a bit of each": (20, 30, 25, 30, 40, 30),
    "weights on disk": (0, 0, 0, 100, 100, 0),
    "cache on disk": (50, 50, 0, 0, 0, 100),
}
STRATEGIES = {"sequential": (2, False), "single batch": (1, True), "multi-batch": (2, True)}
GREEDY = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, temperature=0)


def generated(
    tiny: Tiny, policy: Policy, offload_dir: Path, *, copies: bool, new_tokens: int = NEW_TOKENS
) -> list[tuple[list[int], torch.Tensor]]:
    """Greedy tokens of every prompt and their logits [new_tokens, V], in fp32."""
    greedy = SamplingParams(max_tokens=new_tokens, ignore_eos=True, temperature=0)
    with LLM(str(tiny.path), policy=policy, dtype="float32", offload_dir=offload_dir, copies=copies) as llm:
        requests = [TokenSequence(list(p), greedy) for p in tiny.prompts]
        numbers = {id(r): n for n, r in enumerate(requests)}
        seen: dict[int, list[torch.Tensor]] = {n: [] for n in range(len(requests))}

        def keep(batch, logits):
            for request, row in zip(batch, logits, strict=True):
                seen[numbers[id(request)]].append(row)

        llm.engine.generate(requests, keep_logits=keep)
    return [(r.tokens, torch.stack(seen[n])) for n, r in enumerate(requests)]


def check(tiny: Tiny, policy: Policy, offload_dir: Path, *, copies: bool) -> None:
    """Tokens equal, and logits within fp32 rounding of sums over at most a few hundred terms."""
    found = generated(tiny, policy, offload_dir, copies=copies)
    assert [tokens for tokens, _ in found] == tiny.tokens
    for n, ((_, got), want) in enumerate(zip(found, tiny.logits, strict=True)):
        error = (got - want).abs().max() / want.abs().max()
        assert error < 2e-5, f"prompt {n}: relative error {error:.1e}"


@pytest.mark.grid
@pytest.mark.parametrize("copies", [False, True], ids=["in place", "copied"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("percent", PERCENTS)
def test_tokens_are_transformers_tokens(tiny, tmp_path, percent, strategy, copies):
    num_batches, overlap = STRATEGIES[strategy]
    check(tiny, Policy(2, num_batches, *PERCENTS[percent], overlap=overlap), tmp_path, copies=copies)


@pytest.mark.grid
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("sep_layer", "copies"), list(itertools.product([True, False], repeat=2)))
def test_every_architecture(tiny_models, tmp_path, name, sep_layer, copies):
    policy = Policy(3, 2, 20, 30, 25, 30, 40, 30, sep_layer=sep_layer, pin_weight=copies)
    check(tiny_models[name], policy, tmp_path, copies=copies)


def shares() -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(0, 100), st.integers(0, 100)).filter(lambda p: sum(p) <= 100)


@pytest.mark.slow
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    weights=shares(),
    cache=shares(),
    activations=shares(),
    size=st.integers(1, 7),
    num_batches=st.integers(1, 4),
    flags=st.tuples(*[st.booleans()] * 4),
    attended=st.sampled_from([0, 30, 100]),
    keep_open=st.booleans(),
)
def test_any_policy_is_invisible(
    tiny, tmp_path, weights, cache, activations, size, num_batches, flags, attended, keep_open
):
    overlap, sep_layer, pin_weight, copies = flags
    policy = Policy(
        size, num_batches, *weights, *cache, *activations, overlap=overlap, sep_layer=sep_layer, pin_weight=pin_weight
    )
    way = {"cpu_cache_compute": attended > 0, "cpu_attention_percent": attended, "keep_open_pages": keep_open}
    policy = replace(policy, **way)
    check(tiny, policy, tmp_path, copies=copies)


def test_a_sequence_ends_at_its_end_of_text_and_the_others_go_on(tiny, tmp_path):
    """Give each prompt's third token the role of EOS: tokens up to it are the reference's, and it is the last."""
    eos = tiny.tokens[3][2]
    for num_batches in (1, 3):
        with LLM(
            str(tiny.path), policy=Policy(3, num_batches, 0, 50, 0, 50), dtype="float32", offload_dir=tmp_path
        ) as llm:
            llm.eos_ids = frozenset({eos})
            outputs = llm.generate(tiny.prompts, SamplingParams(max_tokens=NEW_TOKENS, temperature=0))
        for output, want in zip(outputs, tiny.tokens, strict=True):
            end = want.index(eos) + 1 if eos in want else NEW_TOKENS
            assert output.outputs[0].token_ids == want[:end]
            assert output.outputs[0].finish_reason == ("stop" if eos in want else "length")
        assert len(outputs[3].outputs[0].token_ids) <= 3


def test_each_request_has_its_own_length(tiny, tmp_path):
    params = [SamplingParams(max_tokens=n + 1, ignore_eos=True, temperature=0) for n in range(len(tiny.prompts))]
    with LLM(str(tiny.path), policy=Policy(2, 2, 0, 0, 0, 0, 0, 0), dtype="float32", offload_dir=tmp_path) as llm:
        outputs = llm.generate(tiny.prompts, params)
    for n, (output, want) in enumerate(zip(outputs, tiny.tokens, strict=True)):
        assert output.outputs[0].token_ids == want[: n + 1]


def test_a_seed_gives_the_same_sample_alone_in_any_batch_and_in_any_order(tiny, tmp_path):
    params = [
        SamplingParams(max_tokens=8, temperature=0.9, top_p=0.95, seed=n, n=1 + n % 2, ignore_eos=True)
        for n in range(len(tiny.prompts))
    ]
    pairs = list(zip(tiny.prompts, params, strict=True))
    answers = []
    for policy in (Policy(7, 1), Policy(2, 2, 0, 0, 0, 0, 0, 0), Policy(1, 1, 0, 100)):
        with LLM(str(tiny.path), policy=policy, dtype="float32", offload_dir=tmp_path) as llm:
            answers.append([[c.token_ids for c in o.outputs] for o in llm.generate(tiny.prompts, params)])
            alone = [llm.generate([p], s)[0] for p, s in pairs]
            answers.append([[c.token_ids for c in o.outputs] for o in alone])
            backwards = {len(pairs) - 1 - o.request_id: o.outputs for o in llm.stream(pairs[::-1])}
            answers.append([[c.token_ids for c in backwards[n]] for n in range(len(pairs))])
    assert all(answer == answers[0] for answer in answers)
    assert len({str(c) for answer in answers[0] for c in answer}) == sum(p.n for p in params), "all differ"


def test_nothing_is_left_behind(tiny, tmp_path):
    before = threading.active_count()
    for _ in range(3):
        with LLM(str(tiny.path), policy=Policy(2, 2, 0, 0, 0, 0, 0, 0), dtype="float32", offload_dir=tmp_path) as llm:
            llm.generate(tiny.prompts, GREEDY)
    assert threading.active_count() == before
    assert not list(tmp_path.rglob("*")), "a checkpoint read in place leaves no files"
