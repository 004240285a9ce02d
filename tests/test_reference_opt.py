"""The reference is transformers' model with its options off, and each option does what it says and no more."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from reference_opt import (
    LINEARS,
    Options,
    ReferenceOPT,
    attention,
    chosen,
    grouped_along_k,
    grouped_along_n,
    through_cache,
)
from tiny_models import MODELS, NEW_TOKENS
from torch import Tensor

TOLERANCE = 2e-5  # relative to the largest logit: fp32 rounding of sums over at most a few hundred terms
OPTIONS = {
    "weights": Options(weight_group=64),
    "weights along N": Options(transform=lambda w: grouped_along_n(w, 64)),
    "cache": Options(kv_quantised=True),
    "sparse V": Options(sparsity=0.2),
    "bf16": Options(dtype=torch.bfloat16),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On a busy machine, threads that wait for each other cost models this small more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def rounding_bound(x: Tensor) -> Tensor:
    """Largest error of P16 in groups along the last dimension: half a step, and scale and minimum as fp16 has them."""
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    return (high - low) / 30 + 2**-11 * (high - low + low.abs()) + 2**-23


def causal(num_tokens: int) -> Tensor:
    """Which tokens come before each: [T, T]."""
    return torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril(-1)


@pytest.mark.parametrize("name", MODELS)
def test_without_options_it_is_transformers(tiny_models, name):
    tiny = tiny_models[name]
    reference = ReferenceOPT.load(tiny.path)
    for prompt, tokens, logits in zip(tiny.prompts, tiny.tokens, tiny.logits, strict=True):
        got, got_logits = reference.generate(prompt, NEW_TOKENS)
        assert got == tokens
        assert relative_error(got_logits, logits) < TOLERANCE
        scored = reference.score(torch.tensor([*prompt, *tokens[:-1]]))[-NEW_TOKENS:]
        assert relative_error(scored, logits) < TOLERANCE


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_changes_decode_and_the_cache_and_v_leave_prefill_alone(tiny, name):
    prompt = tiny.prompts[0]
    references = [ReferenceOPT.load(tiny.path, options) for options in (None, OPTIONS[name])]
    plain, other = (reference.score(torch.tensor(prompt)) for reference in references)
    assert relative_error(other, plain) > 1e-4
    plain, other = (reference.generate(prompt, 2)[1] for reference in references)
    assert torch.equal(other[0], plain[0]) == (name in ("cache", "sparse V"))
    assert relative_error(other[1], plain[1]) > 1e-4


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("group", [64, 128])
def test_only_linear_matrices_are_quantised_and_on_average_within_half_a_step(tiny_models, name, group):
    path = tiny_models[name].path
    plain, other = ReferenceOPT.load(path).weights, ReferenceOPT.load(path, Options(weight_group=group)).weights
    changed = {name for name, weight in plain.items() if not torch.equal(weight, other[name])}
    assert changed == {n for n in plain if n.endswith("weight") and n.split(".")[-2] in LINEARS}
    assert any("project_in" in n for n in changed) == (name == "post-norm, projected")
    for n in changed:
        for want, got in zip(plain[n].split(group, dim=1), other[n].split(group, dim=1), strict=True):
            assert ((got - want).square().mean(1).sqrt() <= rounding_bound(want).amax(1)).all()


def test_the_other_grouping_is_that_of_the_transposed_matrix():
    weight = torch.randn(200, 96, generator=torch.Generator().manual_seed(0))
    got = grouped_along_n(weight, 64)
    assert torch.equal(got.t(), grouped_along_k(weight.t(), 64))
    for rows, want in zip(got.split(64), weight.split(64), strict=True):
        assert ((rows - want).square().mean(0).sqrt() <= rounding_bound(want.t()).amax(1)).all()


@pytest.mark.parametrize("dim", [1, 64, 80, 128])
def test_cache_error_is_within_half_a_step(dim):
    x = 3 * torch.randn(5, 2, dim, generator=torch.Generator().manual_seed(0)) + 1
    for want, got in zip(x.split(64, -1), through_cache(x).split(64, -1), strict=True):
        assert ((got - want).abs() <= rounding_bound(want)).all()


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (1, 30), (30, 30), (7, 30)], ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.35, 1.0])
def test_sparse_attention_is_the_loop_over_heads_and_queries(shape, sparsity):
    T, S = shape
    generator = torch.Generator().manual_seed(S)
    q, k, v = (torch.randn(n, 2, 16, generator=generator) for n in (T, S, S))
    got = attention(q, k, v, sparsity)
    for t in range(T):
        for h in range(2):
            s = S - T + t + 1
            weights = (k[:s, h] @ q[t, h] / 4).softmax(0)
            earlier = sorted(range(s - 1), key=weights.__getitem__, reverse=True)
            kept = [*earlier[: int(sparsity * (s - 1))], s - 1]
            torch.testing.assert_close(got[t, h], weights[kept] @ v[kept, h], rtol=1e-5, atol=1e-6)


def test_a_sparsity_of_one_keeps_every_earlier_token():
    scores = torch.randn(3, 20, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(chosen(scores, causal(20), 1.0), causal(20).expand(3, 20, 20))
    assert torch.equal(chosen(scores, causal(20), 0.5).sum(-1)[0], torch.arange(20) // 2)


@pytest.mark.parametrize("prompt", [0, 1], ids=["33 tokens", "1 token"])
def test_a_text_is_scored_as_it_is_generated(tiny, prompt):
    """In fp64: in fp32 one row's product and many rows' may fall on two sides of an edge between 4-bit codes."""
    options = Options(weight_group=64, kv_quantised=True, sparsity=0.2, dtype=torch.float64)
    reference = ReferenceOPT.load(tiny.path, options)
    ids = tiny.prompts[prompt]
    tokens, logits = reference.generate(ids, 20)
    scored = reference.score(torch.tensor([*ids, *tokens[:-1]]), num_prompt=len(ids))
    assert relative_error(scored[-20:], logits) < 1e-12


def test_group_and_transform_exclude_each_other():
    with pytest.raises(ValueError, match="one of the two"):
        Options(weight_group=64, transform=torch.clone)
