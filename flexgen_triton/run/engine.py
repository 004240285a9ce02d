"""The engine: holds a model's weights over three tiers and generates, block after block of sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from ..memory.arena import host_available, rss
from ..memory.buffers import Buffers
from ..memory.disk import DiskQueue, free_bytes
from ..memory.store import Store
from ..memory.weights import Weights
from ..models import ops
from ..models.opt import OPT
from ..plan import fit
from ..plan.link import Span
from ..plan.placement import Tier
from ..plan.plan import Plan, make_plan
from ..plan.policy import Policy
from ..plan.spec import Batch, ModelSpec, Workload
from .block import Block, Request
from .executor import execute
from .trace import Timeline

Progress = Callable[[int, int], None]  # token steps done, of how many


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes that this process may use of each tier, with all that it takes; None: what is free."""

    gpu: int | None = None
    host: int | None = None
    disk: int | None = None


NO_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class RunReport:
    """What a call of `generate` did: when, and in which blocks."""

    timeline: Timeline
    plans: tuple[Plan, ...]
    step_ends: tuple[tuple[float, ...], ...]  # by block: seconds at which each token step ended, from its start

    @property
    def prefill_s(self) -> float:
        return sum(ends[0] for ends in self.step_ends)

    @property
    def decode_s(self) -> float:
        return sum(ends[-1] - ends[0] for ends in self.step_ends)


class Engine:
    """One model on one machine under one policy. A context manager; `close` frees all memory, files and threads.

    `copies` says whether host memory is apart from the device's; on the CPU it is not, and True makes the engine move
    bytes as if it were. `limits` are the bytes that this process may use of a tier, with all that it takes already;
    without one it is what is free. Raises PolicyError before allocating when weights, or later a workload, do not fit.
    """

    def __init__(
        self,
        model: OPT,
        spec: ModelSpec,
        store: Store,
        policy: Policy,
        *,
        device: torch.device,
        offload_dir: Path,
        copies: bool | None = None,
        limits: Limits = NO_LIMITS,
        progress: Progress | None = None,
    ) -> None:
        self._limits = limits
        self.model, self.spec, self.store, self.policy, self.device = model, spec, store, policy, device
        self.copies = device.type == "cuda" if copies is None else copies
        self._offload_dir = offload_dir
        self._dtype = getattr(torch, spec.dtype)
        smallest = self.plan(Workload((Batch((1,), 2),)))
        fit.check(smallest, self._available())
        if device.type == "cpu":
            ops.prepare(spec, smallest.cache_layout.fields, sparse=policy.attn_sparsity < 1)
        self._disk = DiskQueue()
        try:
            self.weights = Weights(smallest, store, self._disk, device=device, dtype=self._dtype, progress=progress)
        except BaseException:
            self._disk.close()
            raise

    def plan(self, workload: Workload) -> Plan:
        """The plan of one block; pure."""
        return make_plan(
            self.spec,
            self.policy,
            workload,
            extents=self.store.extents,
            align=self.store.align,
            copies=self.copies,
        )

    def _available(self) -> dict[Tier, int]:
        """Bytes of each tier that are free, within the limits."""
        free = {Tier.HOST: host_available(), Tier.DISK: free_bytes(self._offload_dir)}
        used = {Tier.HOST: rss(), Tier.GPU: 0, Tier.DISK: 0}
        if self.device.type == "cuda":
            free[Tier.GPU], total = torch.cuda.mem_get_info(self.device)
            used[Tier.GPU] = total - free[Tier.GPU]
        elif self.copies:
            free[Tier.GPU] = free[Tier.HOST]
        allowed = {Tier.GPU: self._limits.gpu, Tier.HOST: self._limits.host, Tier.DISK: self._limits.disk}
        return {t: n if (a := allowed[t]) is None else max(min(n, a - used[t]), 0) for t, n in free.items()}

    def generate(
        self,
        requests: Sequence[Request],
        *,
        progress: Progress | None = None,
        keep_logits: Callable[[Sequence[Request], Tensor], None] | None = None,
    ) -> RunReport:
        """Generate every request, longest prompts first, and fill in its tokens and finish reason.

        `keep_logits(requests of a GPU batch, logits [B, V])` is called at every token step. Raises PolicyError when the
        prompts do not fit the model's positions or the memory there is; OSError when the disk cannot hold the cache.
        """
        blocks = self._divide(requests)
        plans = tuple(self.plan(_workload(batches)) for batches in blocks)
        for plan in plans:
            fit.check(plan, self._remaining())
        total = sum(p.workload.steps for p in plans)
        done = 0
        spans: list[Span] = []
        step_ends = []
        buffers = Buffers(plans, device=self.device, offload_dir=self._offload_dir)
        try:
            for plan, batches in zip(plans, blocks, strict=True):

                def on_step(i: int, k: int, before: int = done) -> None:
                    if progress:
                        progress(before + i + 1, total)

                start = max((s.end for s in spans), default=0.0)
                found = self._run_block(plan, batches, buffers, on_step, keep_logits)
                spans += [Span(s.op, s.start + start, s.end + start) for s in found]
                step_ends.append(_step_ends(found))
                done += plan.workload.steps
        finally:
            buffers.close()
        return RunReport(Timeline.of(spans), plans, tuple(step_ends))

    def _remaining(self) -> dict[Tier, int]:
        """Bytes there are for a plan, whose resident weights are already loaded."""
        free = self._available()
        free[Tier.HOST] += self.weights.host_bytes
        tier = Tier.GPU if self.copies else Tier.HOST
        free[tier] += self.weights.gpu_bytes
        return free

    def _divide(self, requests: Sequence[Request]) -> list[list[list[Request]]]:
        """Requests of similar length to the same GPU batch: blocks of GPU batches of requests."""
        ordered = sorted(requests, key=lambda r: (len(r.prompt), r.params.max_tokens), reverse=True)
        size = self.policy.gpu_batch_size
        batches = [ordered[n : n + size] for n in range(0, len(ordered), size)]
        count = self.policy.num_gpu_batches
        return [batches[n : n + count] for n in range(0, len(batches), count)]

    def _run_block(
        self,
        plan: Plan,
        batches: Sequence[Sequence[Request]],
        buffers: Buffers,
        on_step: Callable[[int, int], None],
        keep_logits: Callable[[Sequence[Request], Tensor], None] | None,
    ) -> list[Span]:
        buffers.reset()
        keep = (lambda k, logits: keep_logits(batches[k], logits)) if keep_logits else None
        block = Block(
            plan,
            batches,
            self.model,
            self.weights,
            buffers,
            self._disk,
            dtype=self._dtype,
            on_step=on_step,
            keep_logits=keep,
        )
        asked = {r.params.max_tokens for batch in batches for r in batch}
        fixed = len(asked) == 1 and all(r.params.ignore_eos for batch in batches for r in batch)
        return execute(plan.program, block.actions, device=self.device, alive=None if fixed else block.alive)

    def close(self) -> None:
        self.weights.close()
        self._disk.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _workload(batches: Sequence[Sequence[Request]]) -> Workload:
    return Workload(
        tuple(Batch(tuple(len(r.prompt) for r in batch), max(r.params.max_tokens for r in batch)) for batch in batches)
    )


def _step_ends(spans: Sequence[Span]) -> tuple[float, ...]:
    """When the last computation of each token step ended."""
    ends: dict[int, float] = {}
    for s in spans:
        if s.op.name == "compute":
            ends[s.op.i] = max(s.end, ends.get(s.op.i, 0.0))
    return tuple(end for _, end in sorted(ends.items()))
