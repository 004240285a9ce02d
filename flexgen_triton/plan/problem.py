"""The problem that a policy is sought for: a model, prompts, and the liberties that may be taken.

Owns the sizes and formats to try, the plan of a policy and the memory there is for it. Does not know how a policy is
found.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import product

from .hardware import Hardware
from .placement import ALIGN, STORE_ALIGN, Tier
from .plan import Plan, make_plan
from .policy import LOSSY, Policy, PolicyError
from .spec import Batch, ModelSpec, Workload, stored_as

GPU_BATCH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
GPU_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
SPARSITY = 0.1  # FlexGen's: V of a tenth of the tokens


@dataclass(frozen=True)
class Problem:
    """The generation that a policy is sought for, and the liberties it may take for speed.

    `num_prompts` None means as many as there are. `allow` names what changes the output, of LOSSY. All prompts have
    `prompt_len` tokens, unless `prompt_lens` says otherwise.
    """

    model: ModelSpec
    prompt_len: int
    gen_len: int
    num_prompts: int | None = None
    allow: frozenset[str] = frozenset()
    max_latency: float | None = None  # seconds for one round, prefill and decode
    stored: bool = True  # the weights are on the disk already, in every format that may be chosen
    prompt_lens: tuple[int, ...] = ()  # all of them, where they differ
    base: Policy = field(default_factory=Policy)  # what the search does not choose
    alignment: int = 0  # bytes more than planned that a store of another layout may take of a tier
    in_place: bool = True  # weights of the model's own dtype are read where they lie; others from a store of our own
    gpu_batch_sizes: tuple[int, ...] = GPU_BATCH_SIZES  # to try
    gpu_batches: tuple[int, ...] = GPU_BATCHES  # numbers of them to try

    def __post_init__(self) -> None:
        unknown = sorted(self.allow - set(LOSSY))
        if unknown:
            raise PolicyError(f"{', '.join(unknown)} cannot be allowed; what can is {', '.join(LOSSY)}")
        longest = max((self.prompt_len, *self.prompt_lens))
        if longest + self.gen_len > self.model.max_positions:
            raise PolicyError(
                f"a prompt of {longest} tokens and {self.gen_len} new ones exceed the {self.model.max_positions} "
                f"positions of {self.model.name}; at most {max(self.model.max_positions - longest, 0)} new tokens fit"
            )

    def formats(self) -> list[Policy]:
        """The base policy in its own format and in every allowed one."""
        base = self.base
        weight = {base.compress_weight, base.compress_weight or "4bit" in self.allow}
        cache = {base.compress_cache, base.compress_cache or "4bit-cache" in self.allow}
        sparsity = {base.attn_sparsity, SPARSITY if "sparse" in self.allow else base.attn_sparsity}
        return [
            replace(base, compress_weight=w, compress_cache=c, attn_sparsity=s)
            for w, c, s in product(sorted(weight), sorted(cache), sorted(sparsity, reverse=True))
        ]

    def workload(self, gpu_batch_size: int, num_gpu_batches: int) -> Workload:
        """The first round: all prompts alike, or the longest ones."""
        if not self.prompt_lens:
            return Workload.uniform(self.prompt_len, self.gen_len, gpu_batch_size, num_gpu_batches)
        longest = sorted(self.prompt_lens, reverse=True)[: gpu_batch_size * num_gpu_batches]
        cuts = range(0, len(longest), gpu_batch_size)
        return Workload(tuple(Batch(tuple(longest[n : n + gpu_batch_size]), self.gen_len) for n in cuts))

    def plan(self, policy: Policy, *, host_is_apart: bool) -> Plan:
        workload = self.workload(policy.gpu_batch_size, policy.num_gpu_batches)
        model = stored_as(self.model, policy)
        align = ALIGN if self.in_place and not model.is_packed else STORE_ALIGN
        return make_plan(model, policy, workload, align=align, host_is_apart=host_is_apart)

    def throughput(self, policy: Policy, round_seconds: float) -> float:
        """Generated tokens per second over one round or, where their number is given, over all prompts."""
        size = policy.round_size
        prompts, rounds = (size, 1) if self.num_prompts is None else (self.num_prompts, -(-self.num_prompts // size))
        return prompts * self.gen_len / (rounds * round_seconds)


def available(hardware: Hardware, problem: Problem) -> dict[Tier, float]:
    """Bytes a plan may need of each tier: the machine's, less the process's own and the weights' store."""
    store = 0 if problem.stored else max(stored_as(problem.model, p).weight_bytes for p in problem.formats())
    host = hardware.host_bytes - hardware.process_bytes - problem.alignment
    free = {Tier.HOST: host, Tier.DISK: hardware.disk_bytes - store}
    if hardware.host_is_apart:
        free[Tier.GPU] = hardware.gpu_bytes - hardware.context_bytes - problem.alignment
    return {tier: float(nbytes) for tier, nbytes in free.items()}
