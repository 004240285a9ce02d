"""Sequences that the host attends to itself, open blocks that stay on the device: invisible, and little moves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_compression import FORMATS, make_policy
from test_compression import check as check_format
from test_policies import STRATEGIES, check
from tiny_models import MODELS

from flexgen_triton import LLM, Policy, SamplingParams
from flexgen_triton.memory.cache_places import CachePlaces
from flexgen_triton.plan.schedule import Lane

PERCENTS = {
    "all on the host": (0, 100, 0, 100, 0, 100),
    "a bit of each": (20, 30, 25, 50, 40, 30),
    "host and disk": (100, 0, 0, 60, 100, 0),
}
SHARES = [0, 30, 100]  # of the host's sequences


def attending(policy: Policy, share: float) -> Policy:
    return replace(policy, cpu_cache_compute=True, cpu_attention_percent=share)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One folder for all: a model is converted once."""
    return tmp_path_factory.mktemp("offload")


@pytest.mark.grid
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("percent", PERCENTS)
def test_tokens_are_transformers_tokens(tiny, tmp_path, percent, strategy, share):
    num_batches, overlap = STRATEGIES[strategy]
    policy = Policy(2, num_batches, *PERCENTS[percent], overlap=overlap)
    check(tiny, attending(policy, share), tmp_path, copies=True)


@pytest.mark.grid
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("percent", PERCENTS)
def test_every_format(tiny, store, percent, fmt, share):
    check_format(tiny, attending(make_policy((2, 2, *PERCENTS[percent]), fmt), share), store, copies=True)


@pytest.mark.grid(cover=["attended"])
@pytest.mark.parametrize("attended", [False, True], ids=["sent", "a share attended"])
@pytest.mark.parametrize("fmt", ["plain", "cache", "sparse", "all"])
@pytest.mark.parametrize("percent", PERCENTS)
def test_open_blocks_may_stay_on_the_device(tiny, store, percent, fmt, attended):
    """40 tokens: every sequence fills several blocks."""
    shape = (3, 2, *PERCENTS[percent])
    policy = Policy(*shape) if fmt == "plain" else make_policy(shape, fmt)
    policy = replace(policy, keep_open_pages=True)
    check_format(tiny, attending(policy, 40) if attended else policy, store, copies=True, new_tokens=40)


@pytest.mark.grid
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sep_layer", [True, False])
def test_every_architecture(tiny_models, tmp_path, name, sep_layer):
    policy = Policy(3, 2, *PERCENTS["a bit of each"], sep_layer=sep_layer)
    check(tiny_models[name], attending(policy, 60), tmp_path, copies=True)


def test_where_host_memory_is_the_device_s_nothing_changes(tiny, tmp_path):
    """Every sequence is attended to in place there, whatever the policy says."""
    policy = Policy(2, 2, *PERCENTS["a bit of each"])
    check(tiny, attending(policy, 100), tmp_path, copies=False)


def run(tiny, tmp_path, policy):
    with LLM(str(tiny.path), policy=policy, dtype="float32", offload_dir=tmp_path, copies=True) as llm:
        llm.generate(tiny.prompts, SamplingParams(max_tokens=6, ignore_eos=True, temperature=0))
        return llm.last_report


def test_a_query_goes_down_and_an_answer_up_and_no_cache_moves(tiny, tmp_path):
    report = run(tiny, tmp_path, attending(Policy(4, 2, 100, 0, 0, 100, 100, 0), 100))
    (plan,) = report.plans
    model = plan.model
    row = model.hidden * model.itemsize
    steps, layers = 5, len(plan.cached_stages)
    decode = [s.op for s in report.timeline.spans if s.op.i]
    down, up = (sum(op.bytes for op in decode if op.lane is lane) for lane in (Lane.D2H, Lane.H2D))
    assert (down, up) == tuple(steps * layers * len(tiny.prompts) * n * row for n in (3, 1))
    attended = [op for op in decode if op.lane is Lane.HOST_ATTENTION]
    assert len(attended) == steps * layers * 2
    tokens = sum(len(p) + step for p in tiny.prompts for step in range(1, steps + 1))
    assert sum(op.bytes for op in attended) == layers * tokens * plan.cache_layout.token_bytes


@pytest.mark.parametrize("percent", [(0, 100), (0, 0), (20, 40)], ids=["host", "disk", "each"])
def test_decode_stores_only_whole_blocks(tiny, tmp_path, percent):
    policy = replace(Policy(7, 1, 100, 0, *percent, 100, 0), keep_open_pages=True)
    report = run(tiny, tmp_path, policy)
    (plan,) = report.plans
    layout, groups = plan.cache_layout, plan.groups[0].cache
    layers = len(plan.cached_stages)
    away = [len(p) for p in sorted(tiny.prompts, key=len, reverse=True)][groups.sent.first :]
    filled = {i: sum((n + i) % layout.page_tokens == 0 for n in away) for i in range(1, 5)}  # the sixth token's is not
    stored = [s.op for s in report.timeline.spans if s.op.i and s.op.lane is Lane.D2H]
    assert sum(filled.values()) > 0
    assert {op.i for op in stored} == {i for i, n in filled.items() if n}
    assert sum(op.bytes for op in stored) == layers * sum(filled.values()) * 2 * layout.half


def test_of_the_hosts_sequences_the_share_is_attended_there(tiny, tmp_path):
    report = run(tiny, tmp_path, attending(Policy(7, 1, 100, 0, 0, 100, 100, 0), 43))
    assert report.plans[0].groups[0].cache.attended_by_host.size == 3
    decode = [s.op for s in report.timeline.spans if s.op.i]
    assert {"attend_host", "load_cache", "load_attended"} <= {op.name for op in decode}
    attends = {op.j for op in decode if op.name == "compute" and op.stages == 1} & set(report.plans[0].cached_stages)
    assert attends == set(report.plans[0].cached_stages), "the device attends to the others, apart"


def test_the_home_is_what_the_host_attends_to(tiny, tmp_path, monkeypatch):
    """With the home wiped before each use, tokens are no longer the reference's: no other copy is read."""
    whole = CachePlaces.attended

    def wipe(self, op):
        (group,) = self._plan.groups[op.k].cache.attended_by_host
        self._homes[op, group].memory.zero_()
        return whole(self, op)

    monkeypatch.setattr(CachePlaces, "attended", wipe)
    with pytest.raises(AssertionError):
        check(tiny, attending(Policy(2, 2, 100, 0, 0, 100, 100, 0), 100), tmp_path, copies=True)


def test_sequences_that_end_sooner_than_planned_are_no_longer_read(tiny, tmp_path, monkeypatch):
    lens: list[torch.Tensor] = []
    whole = CachePlaces.attended

    def watched(self, op):
        found = whole(self, op)
        lens.append(found[0].segments[0].lens.clone())
        return found

    monkeypatch.setattr(CachePlaces, "attended", watched)
    policy = attending(Policy(7, 1, 100, 0, 0, 100, 100, 0), 100)
    stop = tiny.tokens[3][2]
    with LLM(str(tiny.path), policy=policy, dtype="float32", offload_dir=tmp_path, copies=True) as llm:
        params = SamplingParams(max_tokens=8, stop_token_ids=[stop], temperature=0)
        outputs = llm.generate(tiny.prompts, params)
    assert outputs[3].outputs[0].token_ids[-1] == stop
    longest = max(range(len(tiny.prompts)), key=lambda n: len(tiny.prompts[n]))
    assert longest == 3, "the longest prompt stands first"
    assert lens[-1][0] == 1 and lens[0][0] == len(tiny.prompts[3]) + 1
