"""Policies are invisible with 4-bit weights, a 4-bit cache and sparse attention too: the reference is a plain model.

Its weights and its K and V went through the format's references; it knows no tiers and no schedule.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference_opt import Options, ReferenceOPT
from test_policies import PERCENTS, STRATEGIES, generated, shares
from tiny_models import MODELS, NEW_TOKENS, Tiny, make_tiny

from flexgen_triton import Policy

FORMATS = {  # 4-bit weights, 4-bit cache, share of V
    "weights": (True, False, 1.0),
    "cache": (False, True, 1.0),
    "sparse": (False, False, 0.2),
    "weights and cache": (True, True, 1.0),
    "all": (True, True, 0.1),
}
ROUNDING = 2e-5  # relative, of fp32 sums over a few hundred terms
# A number of K or V between two codes, or a scale between two fp16 numbers, may fall to either: one scale in a thousand
# at an error of 1e-6. It stays in the cache, and a sparse choice may tip. An error of ours would spare no sequence.
EXACT = 0.25  # the share of sequences that are within ROUNDING throughout, at least
NEAR = 5e-2  # what dense attention makes of one such number


@lru_cache(maxsize=64)
def expected(
    path: Path, prompts: tuple[tuple[int, ...], ...], new_tokens: int, *fmt: float
) -> list[tuple[list[int], torch.Tensor]]:
    weights, cache, sparsity = fmt
    options = Options(weight_group=64 if weights else None, kv_quantised=bool(cache), sparsity=sparsity)
    model = ReferenceOPT.load(path, options)
    return [model.generate(list(p), new_tokens) for p in prompts]


def check(tiny: Tiny, policy: Policy, offload_dir: Path, *, copies: bool, new_tokens: int = NEW_TOKENS) -> None:
    """Tokens equal and logits within rounding: of all sequences but, after prefill, for what a 4-bit cache rounds."""
    fmt = policy.compress_weight, policy.compress_cache, policy.attn_sparsity
    want = expected(tiny.path, tuple(map(tuple, tiny.prompts)), new_tokens, *fmt)
    found = generated(tiny, policy, offload_dir, copies=copies, new_tokens=new_tokens)
    errors = torch.stack(
        [(got - logits).abs().amax(1) / logits.abs().amax() for (_, got), (_, logits) in zip(found, want, strict=True)]
    )  # [prompts, new_tokens]
    assert errors[:, 0].max() < ROUNDING, "prefill reads no cache"
    worst = errors.amax(1)
    same = [tokens == wanted for (tokens, _), (wanted, _) in zip(found, want, strict=True)]
    exact = [s and bool(w < ROUNDING) for s, w in zip(same, worst, strict=True)]
    assert sum(exact) >= (EXACT if policy.compress_cache else 1) * len(exact), errors
    assert policy.attn_sparsity < 1 or worst.max() < NEAR, errors


def make_policy(shape: tuple[object, ...], fmt: str, **fields: bool) -> Policy:
    weights, cache, sparsity = FORMATS[fmt]
    return Policy(*shape, compress_weight=weights, compress_cache=cache, attn_sparsity=sparsity, **fields)  # type: ignore


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One folder for all: a model is converted once."""
    return tmp_path_factory.mktemp("offload")


@pytest.mark.grid
@pytest.mark.parametrize("copies", [False, True], ids=["in place", "copied"])
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("percent", PERCENTS)
def test_every_tier(tiny, store, percent, fmt, copies):
    check(tiny, make_policy((2, 2, *PERCENTS[percent]), fmt), store, copies=copies)


@pytest.mark.grid
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("fmt", ["weights and cache", "all"])
def test_every_strategy(tiny, store, strategy, fmt):
    num_batches, overlap = STRATEGIES[strategy]
    check(tiny, make_policy((2, num_batches, *PERCENTS["a bit of each"]), fmt, overlap=overlap), store, copies=True)


@pytest.mark.grid
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("sep_layer", "copies"), list(itertools.product([True, False], repeat=2)))
def test_every_architecture(tiny_models, store, name, sep_layer, copies):
    policy = make_policy((3, 2, 20, 30, 25, 30, 40, 30), "all", sep_layer=sep_layer)
    check(tiny_models[name], policy, store, copies=copies)


def test_heads_narrower_than_a_group_are_padded(tmp_path):
    """32 numbers a head, where a group of the 4-bit cache has 64."""
    fields = {"hidden_size": 64, "num_attention_heads": 2, "ffn_dim": 96, "vocab_size": 203}
    check(
        make_tiny(tmp_path / "narrow", fields), make_policy((3, 2, 0, 50, 20, 40, 50, 0), "all"), tmp_path, copies=True
    )


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    weights=shares(),
    cache=shares(),
    activations=shares(),
    size=st.integers(1, 7),
    num_batches=st.integers(1, 4),
    fmt=st.sampled_from(sorted(FORMATS)),
    flags=st.tuples(*[st.booleans()] * 3),
    attended=st.sampled_from([0, 30, 100]),
    keep_open=st.booleans(),
)
def test_any_policy_is_invisible(
    tiny, store, weights, cache, activations, size, num_batches, fmt, flags, attended, keep_open
):
    overlap, sep_layer, copies = flags
    policy = make_policy((size, num_batches, *weights, *cache, *activations), fmt, overlap=overlap, sep_layer=sep_layer)
    way = {"cpu_cache_compute": attended > 0, "cpu_attention_percent": attended, "keep_open_pages": keep_open}
    policy = replace(policy, **way)
    check(tiny, policy, store, copies=copies)
