"""Prompts whose lengths differ are not padded: what is computed and moved is what is needed, nearly."""

from __future__ import annotations

import random

import pytest

from flexgen_triton.models.family import config_by_name, model_spec
from flexgen_triton.plan.generator import Generator
from flexgen_triton.plan.placement import Tier
from flexgen_triton.plan.plan import Plan, make_plan
from flexgen_triton.plan.policy import Policy
from flexgen_triton.sequences.batching import divide, workload
from flexgen_triton.sequences.params import SamplingParams
from flexgen_triton.sequences.sequence import TokenSequence

CONFIG = config_by_name("opt-125m")
assert CONFIG is not None
SPEC = model_spec(CONFIG, "opt-125m", "float16")
TIERS = {"host": (0, 100), "disk": (0, 0), "all three": (30, 40)}
CACHE_OPS = ("read_cache", "load_cache", "store_cache", "write_cache")


def requests(shortest: int, *, seed: int, most_tokens: tuple[int, int] = (8, 64)) -> list[TokenSequence]:
    """240 prompts whose lengths differ eightfold, asking for numbers of tokens that do."""
    draw = random.Random(seed)
    return [
        TokenSequence([0] * draw.randint(shortest, 8 * shortest), SamplingParams(max_tokens=draw.randint(*most_tokens)))
        for _ in range(240)
    ]


def plans(found: list[TokenSequence], cache: tuple[int, int]) -> list[Plan]:
    policy = Policy(16, 3, 0, 100, *cache, 100, 0)
    blocks = divide(found, policy.gpu_batch_size, policy.num_gpu_batches)
    return [make_plan(SPEC, policy, workload(batches), host_is_apart=True) for batches in blocks]


def moved(plan: Plan) -> dict[str, int]:
    """Bytes of K and V by op."""
    total = dict.fromkeys(CACHE_OPS, 0)
    for op in Generator(plan.program):
        if op.name in total:
            total[op.name] += op.bytes
    return total


def useful(plan: Plan) -> dict[str, int]:
    """The same if every token's K and V moved by themselves: all cached ones at each step, each new one once."""
    layers, token = len(plan.cached_stages), plan.cache_layout.token_bytes
    total = dict.fromkeys(CACHE_OPS, 0)
    for groups in plan.groups:
        for group in groups.cache.sent:
            for p, n in zip(group.prompt_lens, group.asked, strict=True):
                read = sum(p + step - 1 for step in range(1, n)) * layers * token
                new = (p + n - 2) * layers * token  # the last two tokens are nobody's past, or only their own
                total["load_cache"] += read
                total["store_cache"] += new
                if group.tier is Tier.DISK:
                    total["read_cache"] += read
                    total["write_cache"] += new
    return total


@pytest.mark.grid
@pytest.mark.parametrize("shortest", [25, 50, 120])
@pytest.mark.parametrize("cache", TIERS.values(), ids=TIERS)
def test_of_the_cache_little_moves_in_vain(cache, shortest):
    found = plans(requests(shortest, seed=shortest), cache)
    got = [sum(moved(p).values()) for p in found]
    want = [sum(useful(p).values()) for p in found]
    assert 0.8 < sum(got) / sum(want) <= 1.25, f"{sum(got) / sum(want):.3f}"


@pytest.mark.parametrize("shortest", [8, 50])
def test_prompts_are_computed_without_padding(shortest):
    asked = requests(shortest, seed=1)
    found = plans(asked, (0, 100))
    computed = sum(p.work(0, 0, k).rows for p in found for k in range(len(p.workload.batches)))
    assert computed == sum(len(r.prompt) for r in asked)


def test_a_gpu_batch_that_has_ended_costs_nothing():
    """Asking for 8 to 64 tokens in one block: each GPU batch computes no longer than its last sequence."""
    for plan in plans(requests(50, seed=2), (0, 100)):
        steps = {(op.i, op.k) for op in Generator(plan.program) if op.name == "compute"}
        for k, batch in enumerate(plan.workload.batches):
            assert {i for i, b in steps if b == k} == set(range(max(batch.new_tokens_each)))


def test_sequences_that_ask_for_as_many_tokens_share_a_gpu_batch():
    asked = requests(50, seed=4)
    batches = [batch for block in divide(asked, 16, 3) for batch in block]
    spread = [max(r.params.max_tokens for r in b) / min(r.params.max_tokens for r in b) for b in batches]
    assert sum(s <= 1.6 for s in spread) > 0.8 * len(batches), "but for those on a border"
    assert all(len(b[0].prompt) == max(len(r.prompt) for r in b) for b in batches)
