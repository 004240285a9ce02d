"""What the plan sets aside for attention on the host is what its kernels ask for."""

from __future__ import annotations

import pytest

from flexgen_triton.kernels import cpu_attention, cpu_jit
from flexgen_triton.models.opt import OPTConfig, model_spec
from flexgen_triton.plan import workspace
from flexgen_triton.plan.plan import make_plan
from flexgen_triton.plan.policy import Policy
from flexgen_triton.plan.spec import Workload


def test_the_plan_counts_with_the_kernels_own_sizes():
    assert workspace.HOST_CHUNK == cpu_attention.CHUNK
    assert workspace.HOST_THREADS == cpu_jit.MAX_THREADS


@pytest.mark.parametrize("sparsity", [1.0, 0.1], ids=["dense", "sparse"])
@pytest.mark.parametrize(("hidden", "heads"), [(128, 2), (240, 3), (65 * 4, 4), (512, 2)])
@pytest.mark.parametrize(("prompt_len", "size"), [(1, 1), (200, 7)])
def test_attention_on_the_host_has_the_room_it_asks_for(hidden, heads, prompt_len, size, sparsity, monkeypatch):
    monkeypatch.setattr(cpu_attention, "num_threads", lambda: cpu_jit.MAX_THREADS)
    spec = model_spec(OPTConfig(hidden, 2, heads, 64, vocab_size=99), "tiny", "float16")
    policy = Policy(size, 1, 100, 0, 0, 100, 100, 0, cpu_cache_compute=True, attn_sparsity=sparsity)
    plan = make_plan(spec, policy, Workload.uniform(prompt_len, 5, size, 1), copies=True)
    blocks = plan.cache_home_blocks(0) * plan.cache_layout.block_tokens
    shape = (size, heads, spec.head_dim)
    asked = cpu_attention.decode_workspace_bytes(*shape)
    if sparsity < 1:
        asked = cpu_attention.sparse_workspace_bytes(*shape, blocks, plan.kept(blocks))
    assert asked <= plan.temporaries["hosted"]
