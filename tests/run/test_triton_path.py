"""The engine on the Triton kernels, run by Triton's interpreter on the CPU: the tokens of the plain model."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from test_compression import FORMATS, check, make_policy

from flexgen_triton.models.ops import implementation

PERCENT = (20, 30, 30, 40, 40, 30)
SHORT = [[5, 9, 17, 4, 33, 8, 100, 2, 61, 7, 12], [44, 21], [77]]  # the interpreter takes milliseconds a program


@pytest.fixture(autouse=True)
def on_triton(monkeypatch):
    """All but what the host attends to itself."""
    monkeypatch.setattr(implementation, "uses_triton", lambda x: "HOST" not in threading.current_thread().name)


@pytest.mark.grid(cover=[])
@pytest.mark.parametrize("fmt", sorted(FORMATS, key="sparse".__ne__))  # the quickest is first
def test_the_kernels_give_the_plain_models_tokens(tiny, tmp_path, fmt):
    check(replace(tiny, prompts=SHORT), make_policy((3, 1, *PERCENT), fmt), tmp_path, copies=True, new_tokens=3)


@pytest.mark.grid(cover=[])
@pytest.mark.parametrize("fmt", ["cache", "weights"])
def test_they_and_the_hosts_own_kernels_give_them_together(tiny, tmp_path, fmt):
    """Sequences on the GPU, attended on the host, sent from there and from disk; open blocks on the GPU."""
    long = [[n % 90 + 5 for n in range(22)], *SHORT]
    policy = make_policy((4, 1, 50, 50, 25, 50, 100, 0), fmt)
    policy = replace(policy, cpu_cache_compute=True, cpu_attention_percent=50, keep_open_pages=True)
    check(replace(tiny, prompts=long), policy, tmp_path, copies=True, new_tokens=4)


def test_the_kernels_give_them_for_heads_of_80(tiny_models, tmp_path):
    short = replace(tiny_models["heads of 80, gelu"], prompts=SHORT[:2])
    check(short, make_policy((2, 1, *PERCENT), "all"), tmp_path, copies=True, new_tokens=2)
