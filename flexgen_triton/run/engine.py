"""The engine: holds a model's weights over three tiers and generates, round after round of sequences."""

from __future__ import annotations

import itertools
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from functools import cached_property, partial, reduce
from types import TracebackType

import torch
from torch import Tensor

from ..memory.arena import Resident, host_available, rss
from ..memory.buffers import Buffers, Sizes
from ..memory.device import gpu_memory
from ..memory.disk import DiskQueue
from ..memory.lanes import Check
from ..memory.store import Store
from ..memory.stripes import Folders
from ..memory.weights import Weights
from ..models import ops
from ..models.diagnosis import diagnose
from ..models.family import Model
from ..plan import fit
from ..plan.footprint import LIBRARY_BYTES, WORKSPACE
from ..plan.placement import Tier
from ..plan.plan import Plan, make_plan
from ..plan.policy import Policy, PolicyError
from ..plan.spec import Batch, ModelSpec, Workload
from ..sequences.batching import Batches, Pool, divide, make_batches, workload
from ..sequences.sequence import NOT_FINITE, TokenSequence
from .actions import Round
from .executor import execute, open_lanes
from .report import RoundReport, RunReport
from .running import CLOSED, Holdings, Run, check_process
from .totals import Totals
from .trace import Timeline

Progress = Callable[[int, int], None]  # token steps done, of how many
KeepLogits = Callable[[Sequence[TokenSequence], Tensor], None]

MIN_WAITING = 1024  # sequences read ahead, to run those alike together ...
WAITING_ROUNDS = 4  # ... or so many rounds of them


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes that this process may use of each tier, with all that it takes; None: what is free."""

    gpu: int | None = None
    host: int | None = None
    disk: int | None = None


NO_LIMITS = Limits()


class Engine:
    """One model on one machine under one policy. A context manager; `close` frees all memory, files and threads.

    So does whoever drops it without closing it. It serves the process that made it: a fork has none of its threads.

    `host_is_apart` says whether host memory must be copied to the device; on the CPU it need not, and True makes the
    engine move bytes as if it did. `limits` are the bytes that this process may use of a tier, with all that it has
    already; without one it is what is free. `taken` is what the process had of the host's memory when the policy was
    searched for; by default what it has when it first generates. `check` is called on the caller's thread whenever an
    op is issued, and what it raises ends the run. Raises PolicyError before allocating when weights, or later a
    workload, do not fit, and ForkedError in a fork of a process that has made an engine.
    """

    def __init__(
        self,
        model: Model,
        spec: ModelSpec,
        store: Store,
        policy: Policy,
        *,
        device: torch.device,
        folders: Folders,
        host_is_apart: bool | None = None,
        limits: Limits = NO_LIMITS,
        taken: Resident | None = None,
        progress: Progress | None = None,
        check: Check | None = None,
    ) -> None:
        check_process()
        self._limits, self._check = limits, check
        self.model, self.spec, self.store, self.policy, self.device = model, spec, store, policy, device
        self.host_is_apart = device.type == "cuda" if host_is_apart is None else host_is_apart
        self._folders = folders
        self._dtype = getattr(torch, spec.dtype)
        smallest = self.plan(Workload((Batch((1,), 2),)))
        self._taken = taken
        self._resident_bytes = 0  # of weights in this process's memory
        fit.check(smallest, self._available())
        if device.type == "cpu" or policy.cpu_cache_compute:
            ops.prepare(spec, smallest.cache_layout.fields, sparse=policy.attn_sparsity < 1)
            fit.check(smallest, self._available())  # a compiler and its kernels have joined the process
        self._disk = DiskQueue(folders.threads)
        try:
            self.weights = Weights(smallest, store, self._disk, device=device, dtype=self._dtype, progress=progress)
        except BaseException:
            self._disk.close()
            raise
        self._resident_bytes = self.weights.host_bytes + (self.weights.gpu_bytes if device.type == "cpu" else 0)
        self._holdings = Holdings(self.weights, self._disk)
        weakref.finalize(self, self._holdings.close)

    @property
    def is_busy(self) -> bool:
        """True while a run is under way, be it between two of its answers."""
        return self._holdings.is_busy

    def check_usable(self) -> None:
        """Raise ClosedError where it was closed, ForkedError in a fork of its process."""
        self._holdings.check()

    def _run(self) -> AbstractContextManager[Run]:
        return self._holdings.run(partial(open_lanes, self.device, host_is_apart=self.host_is_apart, check=self._check))

    def plan(self, workload: Workload) -> Plan:
        """The plan of one round; pure."""
        return make_plan(
            self.spec,
            self.policy,
            workload,
            extents=self.store.extents,
            align=self.store.align,
            host_is_apart=self.host_is_apart,
        )

    def _available(self) -> dict[Tier, int]:
        """Bytes of each tier that are free, within the limits."""
        used = {Tier.HOST: self._used(), Tier.GPU: 0, Tier.DISK: 0}
        free = {Tier.HOST: host_available() + rss() - used[Tier.HOST], Tier.DISK: self._folders.free_bytes()}
        if self.device.type == "cuda":
            free[Tier.GPU], total = gpu_memory(self.device)
            used[Tier.GPU] = total - free[Tier.GPU]
        elif self.host_is_apart:
            free[Tier.GPU] = free[Tier.HOST]
        allowed = {Tier.GPU: self._limits.gpu, Tier.HOST: self._limits.host, Tier.DISK: self._limits.disk}
        return {t: n if (a := allowed[t]) is None else max(min(n, a - used[t]), 0) for t, n in free.items()}

    def _used(self) -> int:
        """Bytes that this process has of the host's memory, without the libraries' share of every plan.

        Since `taken` libraries may have used that share; pages of files that came since then can go again.
        """
        if self._taken is None:
            return rss()
        grown = Resident.now().anonymous - self._resident_bytes - self._taken.anonymous
        return self._taken.total + self._resident_bytes + max(grown - LIBRARY_BYTES, 0)

    def _begin(self) -> None:
        """Note what the process has before its first run, its weights aside."""
        if self._taken is None:
            now, weights = Resident.now(), self._resident_bytes
            self._taken = Resident(now.total - weights, now.anonymous - weights)

    def generate(
        self,
        sequences: Sequence[TokenSequence],
        *,
        progress: Progress | None = None,
        keep_logits: KeepLogits | None = None,
    ) -> RunReport:
        """Generate every sequence and fill in its tokens and finish reason.

        `keep_logits(sequences of a GPU batch, logits [B, V])` is called at every token step. Raises PolicyError when
        the prompts do not fit the model's positions or the memory there is; OSError when the disk cannot hold the
        cache.
        """
        self._begin()
        rounds = divide(sequences, self.policy.gpu_batch_size, self.policy.num_gpu_batches)
        plans = [self.plan(workload(batches)) for batches in rounds]
        for plan in plans:
            fit.check(plan, self._remaining())
        total = sum(p.workload.steps for p in plans)
        reports: list[RoundReport] = []
        with self._run() as run, run.at_work():
            run.take(self._buffers(reduce(Sizes.__or__, map(Sizes.of, plans))))
            for plan, batches in zip(plans, rounds, strict=True):
                before = sum(p.workload.steps for p in plans[: len(reports)])

                def on_step(i: int, k: int, before: int = before) -> None:
                    if progress:
                        progress(before + i + 1, total)

                running = self._run_round(plan, batches, run, on_step=on_step, keep_logits=keep_logits)
                reports.append(_exhaust(running))
            for sequence in sequences:
                self._explained(sequence)
        return RunReport.of(reports)

    def stream(
        self,
        sequences: Iterable[TokenSequence],
        totals: Totals,
        *,
        partial: bool = False,
        progress: Progress | None = None,
    ) -> Generator[TokenSequence, None, None]:
        """Generate sequences as they come, each handed back when it has ended (`partial`: after every token step too).

        Reads a bounded number of them ahead and runs those alike together, in rounds no larger than the policy says and
        than memory holds; one that does not fit by itself is handed back with its `error`. `totals` is kept up to date,
        `progress` is told of each round's token steps. Raises OSError when the disk cannot hold the cache, ClosedError
        when the engine was closed since the last one was handed back.
        """
        self._begin()
        pool = Pool(sequences, size=max(MIN_WAITING, WAITING_ROUNDS * self.policy.round_size))
        with self._run() as run, closing(self._rounds(pool, run, totals, progress, partial=partial)) as ended:
            while True:
                with run.at_work():
                    sequence = next(ended, None)
                if sequence is None:
                    return
                yield sequence

    def _rounds(
        self, pool: Pool, run: Run, totals: Totals, progress: Progress | None, *, partial: bool
    ) -> Generator[TokenSequence, None, None]:
        """Run the pool's sequences round after round."""
        while waiting := pool.take(self.policy.round_size):
            try:
                plan, batches = self._fitting(waiting, run)
            except PolicyError as error:
                waiting[0].fail(str(error))
                pool.put_back(waiting[1:])
                yield waiting[0]
                continue
            pool.put_back(waiting[sum(map(len, batches)) :])
            totals.begin(plan)

            def on_step(i: int, steps: int = plan.workload.steps) -> None:
                if progress:
                    progress(i + 1, steps)

            totals.end((yield from self._stream_round(plan, batches, run, on_step, partial=partial)))

    def _stream_round(
        self,
        plan: Plan,
        batches: Batches,
        run: Run,
        stepped: Callable[[int], None],
        *,
        partial: bool,
    ) -> Generator[TokenSequence, None, Timeline]:
        """Run one round; its sequences are handed over as they end, by the thread that asks for the next one."""
        news: deque[TokenSequence] = deque()  # filled on the lane that computes
        ended: set[int] = set()

        def on_step(i: int, k: int) -> None:
            stepped(i)
            news.extend(r for r in batches[k] if (partial or r.finished) and id(r) not in ended)
            ended.update(id(r) for r in batches[k] if r.finished)

        running = self._run_round(plan, batches, run, on_step=on_step, watched=partial)
        while True:
            try:
                next(running)
            except StopIteration as end:
                report: RoundReport = end.value
                break
            while news:
                yield self._explained(news.popleft())
        yield from map(self._explained, news)
        return report.timeline

    def _explained(self, sequence: TokenSequence) -> TokenSequence:
        """The same; where what was computed is not finite its error tells the likely cause too."""
        if sequence.error_code == NOT_FINITE:
            sequence.error = f"{sequence.error}; {self._diagnosis}"
        return sequence

    @cached_property
    def _diagnosis(self) -> str:
        return diagnose(self.spec, self.store, self._check or (lambda: None))

    def _fitting(self, sequences: Sequence[TokenSequence], run: Run) -> tuple[Plan, Batches]:
        """The first of the sequences, as many as the policy lets and as fit; `run` gets buffers for them.

        Raises PolicyError when not even the first one fits.
        """
        for size, count in _smaller(self.policy.gpu_batch_size, self.policy.num_gpu_batches):
            batches = make_batches(sequences[: size * count], size)
            plan = self.plan(workload(batches))
            if run.holds(plan):
                return plan, batches
            run.drop()  # what it takes is free for other sizes
            if fit.fits(plan, self._remaining()):
                break
        else:
            fit.check(plan, self._remaining())
        run.take(self._buffers(Sizes.of(plan)), plan.footprint.of(WORKSPACE, Tier.GPU))
        return plan, batches

    def _buffers(self, sizes: Sizes) -> Buffers:
        return Buffers(sizes, device=self.device, folders=self._folders)

    def _remaining(self) -> dict[Tier, int]:
        """Bytes there are for a plan, whose resident weights are already loaded."""
        free = self._available()
        free[Tier.HOST] += self.weights.host_bytes
        tier = Tier.GPU if self.host_is_apart else Tier.HOST
        free[tier] += self.weights.gpu_bytes
        return free

    def _run_round(
        self,
        plan: Plan,
        batches: Batches,
        run: Run,
        *,
        on_step: Callable[[int, int], None],
        watched: bool = False,
        keep_logits: KeepLogits | None = None,
    ) -> Generator[None, None, RoundReport]:
        """Run one round, yielding as its ops are issued; `watched` keeps them from running ahead of its token steps."""
        self.weights.check()
        run.buffers.reset()
        started = time.time()
        for sequence in itertools.chain.from_iterable(batches):
            sequence.first_scheduled_time = started
        keep = (lambda k, logits: keep_logits(batches[k], logits)) if keep_logits else None
        running = Round(
            plan,
            batches,
            self.model,
            self.weights,
            run.buffers,
            self._disk,
            dtype=self._dtype,
            on_step=on_step,
            keep_logits=keep,
        )
        fixed = not watched and all(_runs_to_its_end(batch) for batch in batches)
        spans = yield from execute(plan.program, running.actions, run.lanes, alive=None if fixed else running.alive)
        return RoundReport.of(plan, spans)

    def close(self, why: str = CLOSED) -> None:
        """Free everything; runs that are under way raise ClosedError, which says why. Does nothing in a fork."""
        self._holdings.close(why)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _smaller(gpu_batch_size: int, num_gpu_batches: int) -> Iterator[tuple[int, int]]:
    """Sizes of a round, from the one asked for down to one sequence."""
    size = gpu_batch_size
    while size > 1:
        yield size, num_gpu_batches
        size = size * 3 // 4
    for count in range(num_gpu_batches, 0, -1):
        yield 1, count


def _runs_to_its_end(batch: Sequence[TokenSequence]) -> bool:
    """Return True if it is known beforehand at which token step the GPU batch ends."""
    return all(r.params.ignore_eos and not r.params.stop_token_ids and not r.watch for r in batch)


def _exhaust(running: Generator[None, None, RoundReport]) -> RoundReport:
    """Run a round to its end."""
    try:
        while True:
            next(running)
    except StopIteration as end:
        report: RoundReport = end.value
        return report
