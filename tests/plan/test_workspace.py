"""The plan sets aside for computations exactly what they ask for, and memory that it counts as free is free."""

from __future__ import annotations

import pytest
import torch

from flexgen_triton.kernels import attention_decode, sizes
from flexgen_triton.kernels.cpu import attention as cpu_attention
from flexgen_triton.kernels.cpu import jit as cpu_jit
from flexgen_triton.kernels.cpu import sparse_attention as cpu_sparse_attention
from flexgen_triton.memory.arena import Arena, rss
from flexgen_triton.memory.store import CHUNK
from flexgen_triton.models.family import model_spec
from flexgen_triton.models.opt import opt_config
from flexgen_triton.plan.placement import STORE_ALIGN, Tier
from flexgen_triton.plan.plan import make_plan
from flexgen_triton.plan.policy import Policy
from flexgen_triton.plan.spec import Workload
from flexgen_triton.plan.temporaries import unfilled_bytes


def test_the_plan_counts_with_the_kernels_and_stores_own_sizes():
    assert cpu_attention.CHUNK is sizes.CHUNK and cpu_jit.MAX_THREADS is sizes.MAX_THREADS
    assert attention_decode.num_splits(sizes.MAX_SMS, 1, 1 << 20) == sizes.MAX_SPLITS
    assert STORE_ALIGN == CHUNK


@pytest.mark.parametrize("sparsity", [1.0, 0.1], ids=["dense", "sparse"])
@pytest.mark.parametrize(("hidden", "heads"), [(128, 2), (240, 3), (65 * 4, 4), (512, 2)])
@pytest.mark.parametrize(("prompt_len", "size"), [(1, 1), (200, 7)])
def test_attention_on_the_host_has_the_room_it_asks_for(hidden, heads, prompt_len, size, sparsity, monkeypatch):
    for module in (cpu_attention, cpu_sparse_attention):
        monkeypatch.setattr(module, "num_threads", lambda: cpu_jit.MAX_THREADS)
    spec = model_spec(opt_config(hidden, 2, heads, 64, vocab=99), "tiny", "float16")
    policy = Policy(size, 1, 100, 0, 0, 100, 100, 0, cpu_cache_compute=True, attn_sparsity=sparsity)
    plan = make_plan(spec, policy, Workload.uniform(prompt_len, 5, size, 1), host_is_apart=True)
    blocks = plan.cache_home_pages(0) * plan.cache_layout.page_tokens
    shape = (size, heads, spec.head_dim)
    asked = cpu_attention.decode_workspace_bytes(*shape)
    if sparsity < 1:
        asked = cpu_sparse_attention.sparse_workspace_bytes(*shape, blocks, plan.kept(blocks))
    assert asked <= plan.footprint.temporaries["hosted"]


@pytest.mark.parametrize(
    ("policy", "prompt_len", "gen_len"), [((8, 8), 64, 16), ((16, 1), 60, 4), ((64, 1), 32, 96)], ids=str
)
def test_cache_that_counts_as_unwritten_is_not_resident(policy, prompt_len, gen_len):
    """Written in an arena as prompts fill it: huge pages become resident whole, beyond what was written."""
    spec = model_spec(opt_config(512, 12, 4, 2048, vocab=99), "small", "float16")
    plan = make_plan(spec, Policy(*policy), Workload.uniform(prompt_len, gen_len, *policy), host_is_apart=False)
    layout, homes = plan.cache_layout, plan.footprint.homes[Tier.GPU]
    with Arena("homes", homes, torch.device("cpu")) as arena:
        before = rss()
        for k in range(policy[1]):
            for _ in range(12):
                home = arena.take(layout.dense(plan.cache_home_pages(k), policy[0]))
                home[: layout.dense(layout.pages(prompt_len), policy[0])].fill_(1)
        resident = rss() - before
    assert resident <= homes - unfilled_bytes(plan) + (1 << 20)
