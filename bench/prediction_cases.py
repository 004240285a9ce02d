"""The rounds that are predicted and measured: models under policies, on a CPU and on a GPU."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

from rows import ROOT

sys.path.insert(0, str(ROOT))

from flexgen_triton.plan.policy import Policy


@dataclass(frozen=True, slots=True)
class Case:
    """One round of a model under a policy."""

    name: str
    model: str
    policy: Policy
    prompt_len: int
    gen_len: int


def _cases(model: str, prompt_len: int, gen_len: int, policies: Mapping[str, Policy]) -> tuple[Case, ...]:
    short = model.removeprefix("opt-")
    return tuple(Case(f"{short}-{name}", model, policy, prompt_len, gen_len) for name, policy in policies.items())


# Percentages: weights on GPU and host, cache on GPU and host, activations on GPU and host. Without a GPU, GPU and host
# are one.
CPU_CASES = (
    *_cases(
        "opt-1.3b", 32, 8,
        {
            "resident": Policy(8, 1, 100, 0, 100, 0, 100, 0),
            "half": Policy(8, 1, 0, 50, 0, 100, 100, 0),
            "disk": Policy(8, 1, 0, 0, 0, 100, 100, 0),
            "disk-32": Policy(32, 1, 0, 0, 0, 100, 100, 0),
            "cache-disk": Policy(16, 1, 0, 0, 0, 0, 100, 0),
            "all-disk": Policy(8, 2, 0, 0, 0, 0, 0, 0),
            "4bit": Policy(8, 1, 0, 0, 0, 100, 100, 0, compress_weight=True),
            "4bit-both": Policy(8, 2, 0, 0, 0, 100, 100, 0, compress_weight=True, compress_cache=True),
            "4bit-cache-disk": Policy(16, 1, 0, 100, 0, 0, 100, 0, compress_cache=True),
        },
    ),
    *_cases(
        "opt-1.3b", 16, 3,
        {
            "disk-4-batches": Policy(4, 4, 0, 0, 0, 100, 100, 0),
            "disk-sequential": Policy(4, 4, 0, 0, 0, 100, 100, 0, overlap=False),
            "cache-half-8-batches": Policy(2, 8, 0, 50, 0, 50, 100, 0),
        },
    ),
    *_cases(
        "opt-6.7b", 16, 3,
        {
            "resident": Policy(8, 1, 100, 0, 100, 0, 100, 0),
            "half-2-batches": Policy(4, 2, 0, 50, 0, 100, 100, 0),
            "disk": Policy(8, 1, 0, 0, 0, 100, 100, 0),
            "all-disk-2-batches": Policy(4, 2, 0, 0, 0, 0, 0, 0),
            "4bit": Policy(8, 1, 0, 0, 0, 100, 100, 0, compress_weight=True),
            "4bit-both-2-batches": Policy(8, 2, 0, 100, 0, 100, 100, 0, compress_weight=True, compress_cache=True),
        },
    ),
)  # fmt: skip

GPU_CASES = (
    *_cases(
        "opt-1.3b", 128, 32,
        {
            "resident": Policy(64, 1, 100, 0, 100, 0, 100, 0),
            "weights-host": Policy(64, 4, 0, 100, 100, 0, 100, 0),
            "all-host": Policy(64, 4, 0, 100, 0, 100, 0, 100),
            "weights-disk": Policy(64, 4, 0, 0, 0, 100, 0, 100),
        },
    ),
    *_cases(
        "opt-6.7b", 512, 32,
        {
            "resident": Policy(16, 1, 100, 0, 100, 0, 100, 0),
            "weights-host": Policy(64, 4, 0, 100, 100, 0, 100, 0),
            "mixed": Policy(48, 3, 20, 80, 0, 100, 0, 100),
            "mixed-sequential": Policy(48, 3, 20, 80, 0, 100, 0, 100, overlap=False),
            "mixed-pageable": Policy(48, 3, 20, 80, 0, 100, 0, 100, pin_weight=False),
            "half-disk": Policy(48, 3, 0, 50, 0, 100, 100, 0),
            "cache-disk": Policy(32, 2, 50, 50, 0, 50, 100, 0),
            "4bit": Policy(48, 3, 20, 80, 0, 100, 0, 100, compress_weight=True),
            "4bit-both": Policy(48, 3, 20, 80, 0, 100, 0, 100, compress_weight=True, compress_cache=True),
            "sparse": Policy(48, 3, 20, 80, 0, 100, 0, 100, attn_sparsity=0.1),
        },
    ),
)  # fmt: skip
