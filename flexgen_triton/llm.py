"""The library's front: `LLM`, which loads a model from a directory, the hub or nothing and generates text.

Owns the policy in use and the engine that has the weights loaded as it says. Prompts become sequences and those become
outputs in sequences/translator.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from .arguments import as_allowed, as_device, as_folders, as_model, as_pair, as_params, check_others, check_policy
from .defaults import AUTO as AUTO
from .defaults import DEFAULT_OFFLOAD_DIR as DEFAULT_OFFLOAD_DIR
from .machine.auto import choose, machine, settled, typical_length
from .memory.arena import Resident
from .models.checkpoint import open_store
from .models.family import make_model, model_spec
from .models.locate import check_device, choose_dtype, find_model
from .plan.hardware import Hardware
from .plan.placement import ALIGN, STORE_ALIGN
from .plan.policy import Policy, PolicyError
from .plan.problem import Problem
from .plan.spec import ModelSpec, stored_as
from .run.engine import MIN_WAITING, Engine, Limits
from .run.report import RunReport
from .run.running import CLOSED, ClosedError, check_process
from .run.totals import Choice, Totals
from .sequences.outputs import RequestOutput
from .sequences.params import SamplingParams
from .sequences.prompts import Prompt as Prompt
from .sequences.prompts import as_prompts
from .sequences.sequence import TokenSequence
from .sequences.translator import Answer, PreparedPrompt, Translator
from .sizes import parse_size

if TYPE_CHECKING:
    from .sequences.tokenizer import PreTrainedTokenizerBase

BASE = Policy()

REPLACED = "the weights were loaded anew, as use() was told, while this was generated; begin it again"

Prompts = Prompt | Sequence[Prompt] | NDArray[np.integer[Any]] | torch.Tensor
Progress = Callable[[int, int], None]
Report = Callable[[str, int, int], None]


def _checked(progress: Report | None, check: Callable[[], None] | None) -> Report:
    """Return a report for work on the caller's own thread, which calls `check` too."""

    def report(phase: str, done: int, total: int) -> None:
        if check:
            check()
        if progress:
            progress(phase, done, total)

    return report


class LLM:
    """A model ready to generate. Use as a context manager, or `close()` it; one that is dropped is closed too.

    It may be used from several threads, and several streams may be under way at once. It cannot be used in a fork of
    the process that loaded it, nor can another be made there: fork before the first model is loaded, or use spawn.

    `model`: a checkpoint's directory, a hub id, or "demo". `policy`: where its bytes live; "auto" finds the fastest for
    the prompts of the first `generate`, and loads the weights then; what it does not choose (neither round size nor
    percentages) it takes from `base`. `allow`: what "auto" may do that changes the output, of "4bit", "4bit-cache" and
    "sparse". `gpu_memory`, `cpu_memory`, `disk_memory`: bytes (or "16GiB") that may be used in all; by default what is
    free. `hardware`: a machine's profile, its file or its name, in place of this machine's own, which "auto" measures
    on first use. `dtype`: "auto" (the checkpoint's), "float32", "bfloat16" or "float16". `offload_dir`: where converted
    weights and the disk's share of cache and activations go; of several, on a drive each, all are read and written at
    once. `path`: FlexGen's second argument, a directory or "_DUMMY_" for random weights. `verify`: check every byte of
    a checkpoint that is read in place against checksums, which are made the first time and kept in `offload_dir`;
    converted weights always are. `progress(phase, done, total)` is told of measuring ("measure"), conversion and
    checksums ("convert"), loading ("load") and token steps ("generate"). `check` is asked whether to go on: it is
    called all the time while weights are loaded and text is generated, on the thread that asked for it, and what it
    raises ends that. Raises ModelError, PolicyError, HardwareError, CheckpointError, StoreError (all ValueError) or
    OSError, each in one sentence.
    """

    def __init__(
        self,
        model: str,
        *,
        policy: Policy | str = AUTO,
        base: Policy = BASE,
        allow: Collection[str] = (),
        gpu_memory: int | str | None = None,
        cpu_memory: int | str | None = None,
        disk_memory: int | str | None = None,
        hardware: Hardware | str | Path | None = None,
        dtype: str = "auto",
        offload_dir: str | Path | Sequence[str | Path] = DEFAULT_OFFLOAD_DIR,
        path: str | None = None,
        device: str | None = None,
        copies: bool | None = None,
        seed: int = 0,
        verify: bool = False,
        progress: Report | None = None,
        check: Callable[[], None] | None = None,
    ) -> None:
        check_policy(policy, automatic=True)
        check_others(base=base, dtype=dtype, seed=seed, copies=copies, verify=verify, progress=progress, check=check)
        self._allow, self._device = as_allowed(allow), as_device(device)
        self._limits = Limits(*(None if m is None else parse_size(m) for m in (gpu_memory, cpu_memory, disk_memory)))
        self.source = find_model(as_model(model), path)
        self.spec: ModelSpec = model_spec(self.source.config, self.source.name, choose_dtype(dtype, self.source))
        check_device(self.spec.dtype, self._device)
        self.eos_ids = frozenset(self.source.config.eos_ids)  # any of which ends a text
        self._base, self._profile, self._copies = base, hardware, copies
        self._seed, self._verify = seed, verify
        self._progress, self._check = progress, check
        self._prepared = _checked(progress, check)
        self._translator = Translator(self.spec, self.source.directory, seed=seed)  # fails before weights are loaded
        self.folders = as_folders(offload_dir)
        self.last_report: RunReport | None = None  # of the last `generate`
        self.totals = Totals()  # of the last `stream`
        self._taken: Resident | None = None  # what this process had when it searched for a policy
        self._engine: Engine | None = None
        self._closed = False
        self._automatic = isinstance(policy, str)
        if isinstance(policy, Policy):
            self.use(policy)

    @property
    def engine(self) -> Engine:
        """The engine with its weights loaded; with an automatic policy there is none before the first `generate`."""
        self._check_usable()
        if self._engine is None:
            raise PolicyError("the policy is automatic and no prompts were seen yet; generate first, or give a Policy")
        return self._engine

    @property
    def policy(self) -> Policy:
        """The policy in use."""
        return self.engine.policy

    def _check_usable(self) -> None:
        """Raise ClosedError after `close`, ForkedError in a fork of the process that loaded the weights."""
        if self._closed:
            raise ClosedError(CLOSED)
        if self._engine is not None:
            self._engine.check_usable()

    def use(self, policy: Policy) -> None:
        """Load the weights as `policy` says, in place of what is loaded; ends what is being generated.

        Raises PolicyError when they do not fit.
        """
        self._check_usable()
        check_policy(policy, automatic=False)
        check_process()
        if self._engine is not None:
            self._engine.close(REPLACED)
            self._engine = None
        spec = stored_as(self.spec, policy)
        store = open_store(
            spec,
            self.source.directory,
            self.folders.paths,
            progress=partial(self._prepared, "convert"),
            seed=self._seed,
            verify=self._verify,
            streamed=policy.w_gpu_percent + policy.w_cpu_percent < 100,
        )
        self._engine = Engine(
            make_model(self.source.config),
            spec,
            store,
            policy,
            device=self._device,
            folders=self.folders,
            host_is_apart=self._copies,
            limits=self._limits,
            taken=self._taken,
            progress=partial(self._prepared, "load"),
            check=self._check,
        )
        if self._closed:  # by another thread, while they were loaded
            self._engine.close()
            raise ClosedError(CLOSED)

    @cached_property
    def hardware(self) -> Hardware:
        """The machine that is planned for: as given, or measured on first use; within the memory limits.

        With what this process had taken of the host's memory when it was first asked for.
        """
        found = machine(
            self._device,
            self.folders,
            self._limits,
            profile=self._profile,
            copies=self._copies,
            progress=self._prepared,
        )
        self._taken = settled(self.spec, self._base, self._device)
        return replace(found, process_bytes=self._taken.total)

    def problem(
        self,
        prompt_lens: Sequence[int],
        gen_len: int,
        num_prompts: int | None,
        *,
        max_latency: float | None = None,
    ) -> Problem:
        """Build the problem that a search for a policy (plan.search.search, on `hardware`) solves.

        `num_prompts` of these lengths, or (None) as many as pay.
        """
        base, typical, differ = self._base, typical_length(prompt_lens), len(set(prompt_lens)) > 1
        lens = tuple(prompt_lens) if differ and num_prompts is not None else ()
        room = self.spec.max_positions - max((typical, *lens))  # the longest prompt need not ask for most
        in_place = self._is_read_in_place
        return Problem(
            self.spec,
            typical,
            min(gen_len, room) if differ else gen_len,
            num_prompts,
            self._allow,
            max_latency,
            stored=in_place and "4bit" not in self._allow and not base.compress_weight,
            prompt_lens=lens,
            base=base,
            alignment=2 * (STORE_ALIGN if in_place and self._verify else ALIGN) * len(self.spec.modules),
            in_place=in_place and not self._verify,
        )

    @property
    def _is_read_in_place(self) -> bool:
        """True if weights that are not in 4 bits are read where they lie, whatever the policy."""
        return self.source.is_stored and self.spec.dtype == self.source.dtype and len(self.folders.paths) == 1

    def _settle(self, waiting: Sequence[PreparedPrompt], num_prompts: int | None, gen_len: int) -> Choice | None:
        """Find the automatic policy for these prompts and load the weights as it says; a policy by hand stays.

        `num_prompts` is how many sequences there are, None where more will follow. Returns what is predicted. While
        something else is being generated its policy stays.
        """
        if not self._automatic or (self._engine is not None and self._engine.is_busy):
            return None
        problem = self.problem([len(p.token_ids) for p in waiting], gen_len, num_prompts)
        current = self._engine.policy if self._engine else None
        choice = choose(problem, self.hardware, current)
        if choice.policy != current:
            self.use(choice.policy)
        return choice

    def _phase(self, name: str) -> Progress | None:
        return partial(self._progress, name) if self._progress else None

    def generate(
        self,
        prompts: Prompts,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete every prompt (text or token ids), in the order given, whatever order they were computed in.

        Raises ValueError for an empty prompt, a token id outside the vocabulary, or one that leaves no position, and
        ClosedError (a ValueError) when the model is closed.
        """
        self._check_usable()
        each = as_prompts(prompts)
        pairs = zip(each, as_params(sampling_params, len(each)), strict=True)
        prepared = [self._translator.prepare(prompt, p, f"prompt {n}") for n, (prompt, p) in enumerate(pairs)]
        answers = [self._translator.answer(n, p, self.eos_ids) for n, p in enumerate(prepared)]
        sequences = [s for a in answers for s in a.sequences]
        if sequences:
            self._settle(prepared, len(sequences), max(s.params.max_tokens for s in sequences))
            self.last_report = self.engine.generate(sequences, progress=self._phase("generate"))
        return [self._translator.output(a) for a in answers]

    def request(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> PreparedPrompt:
        """Check that a prompt can be run, and turn it into token ids; raises ValueError where it cannot."""
        (params,) = as_params(sampling_params, 1)
        return self._translator.prepare(prompt, params, "the prompt")

    def stream(
        self, prompts: Iterable[PreparedPrompt | tuple[Prompt, SamplingParams]], *, partial: bool = False
    ) -> Generator[RequestOutput, None, None]:
        """Complete prompts as they come, each handed back when it has ended, in whatever order that is.

        A bounded number of them is read ahead, so there may be any number; `request_id` counts them from 0. One that
        does not fit the memory comes back with its `error`. With `partial`, what there is so far comes back after every
        token step too. `totals` is kept up to date. Raises what `request` raises, and ClosedError (a ValueError) when
        the model was closed.
        """
        self._check_usable()
        return self._stream(prompts, partial=partial)

    def _stream(
        self, prompts: Iterable[PreparedPrompt | tuple[Prompt, SamplingParams]], *, partial: bool
    ) -> Generator[RequestOutput, None, None]:
        self._check_usable()
        self.totals = totals = Totals()
        owners: dict[int, Answer] = {}  # by the identity of a sequence that has not been handed back

        def answers() -> Iterator[Answer]:
            for number, item in enumerate(prompts):
                prepared = item if isinstance(item, PreparedPrompt) else self.request(*as_pair(item))
                yield self._translator.answer(number, prepared, self.eos_ids, partial=partial)

        def sequences(source: Iterable[Answer]) -> Iterator[TokenSequence]:
            for answer in source:
                owners.update((id(s), answer) for s in answer.sequences)
                yield from answer.sequences

        source = answers()
        first = list(itertools.islice(source, MIN_WAITING + 1))
        if not first:
            return
        count = sum(len(a.sequences) for a in first) if len(first) <= MIN_WAITING else None
        asked = typical_length([a.prepared.params.max_tokens for a in first])
        totals.choice = self._settle([a.prepared for a in first], count, asked)
        waiting = sequences(itertools.chain(first, source))
        first = []
        for sequence in self.engine.stream(waiting, totals, partial=partial, progress=self._phase("generate")):
            answer = owners.get(id(sequence))
            if answer is None:  # it has ended since this step
                continue
            if sequence.finished:
                del owners[id(sequence)]
                totals.answer(len(sequence.prompt), len(sequence.tokens))
            has_failed = any(s.error for s in answer.sequences)  # which is told once, when the others have ended too
            if (partial and not has_failed) or not any(id(s) in owners for s in answer.sequences):
                yield self._translator.output(answer)

    def token_ids(self, prompt: Prompt, name: str = "the prompt") -> list[int]:
        """A prompt's token ids, by the model's own tokenizer where it is text.

        Raises PromptError (a ValueError), which calls it by `name`, for what is no prompt.
        """
        return self._translator.token_ids(prompt, name)

    @property
    def has_tokenizer(self) -> bool:
        """True if the model came with a tokenizer; without one, prompts are token ids and answers have no text."""
        return self._translator.has_tokenizer

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own tokenizer, loaded on first use; raises ModelError where there is none that works."""
        return self._translator.tokenizer

    def close(self) -> None:
        """Free the model's memory, files and threads; what is being generated then raises ClosedError."""
        self._closed = True
        if self._engine is not None:
            self._engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
