"""A policy says what it is asked for, and refuses in one sentence what does not exist."""

from __future__ import annotations

import pytest

from flexgen_triton import CompressionConfig, Policy
from flexgen_triton.plan.formats import FourBit, FourBitCache, PlainCache
from flexgen_triton.plan.policy import PolicyError

WEIGHTS, CACHE = "comp_weight_config", "comp_cache_config"

REFUSED = {
    "8-bit weights": ({"compress_weight": True, WEIGHTS: CompressionConfig(num_bits=8)}, "num_bits is 8; only 4"),
    "2-bit cache": ({"compress_cache": True, CACHE: CompressionConfig(2, group_dim=2)}, "num_bits is 2; only 4"),
    "groups of 48": ({"compress_weight": True, WEIGHTS: CompressionConfig(4, 48)}, "48; available is 32 or 64 or 128"),
    "cache groups of 32": ({"compress_cache": True, CACHE: CompressionConfig(4, 32, 2)}, "is 32; available is 64"),
    "symmetric": ({"compress_weight": True, WEIGHTS: CompressionConfig(symmetric=True)}, "symmetric .* not available"),
    "weights along the cache's dimension": (
        {"compress_weight": True, WEIGHTS: CompressionConfig(4, 64, 2)},
        "group_dim is 2; available is 0 or 1",
    ),
    "cache along tokens": ({"compress_cache": True, CACHE: CompressionConfig(4, 64, 0)}, "dim is 0; available is 2"),
    "no V": ({"attn_sparsity": 0.0}, "attn_sparsity is 0; .* above 0 and at most 1"),
    "more than all V": ({"attn_sparsity": 1.5}, "attn_sparsity is 1.5; .* above 0 and at most 1"),
}


@pytest.mark.parametrize(("fields", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_exist_is_refused_in_one_sentence(fields, sentence):
    with pytest.raises(PolicyError, match=sentence) as error:
        Policy(**fields)
    assert "\n" not in str(error.value)


def test_flexgens_own_script_is_understood():
    """Its fields in its order, with the group dimensions that its scripts write."""
    weights, cache = CompressionConfig(4, 64, 0, False), CompressionConfig(4, 64, 2, False)
    policy = Policy(4, 1, 100, 0, 100, 0, 100, 0, True, True, True, False, 1.0, True, weights, True, cache)
    assert policy.weight_format == FourBit(64) and policy.cache_format == FourBitCache()


def test_a_format_counts_only_when_it_is_asked_for():
    config = CompressionConfig(num_bits=8)
    policy = Policy(comp_weight_config=config, comp_cache_config=config)
    assert policy.weight_format is None and policy.cache_format == PlainCache()
    switched_off = CompressionConfig(enabled=False)
    assert Policy(compress_weight=True, comp_weight_config=switched_off).weight_format is None
