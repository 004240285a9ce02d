"""The library's front: `LLM`, which loads a model from a directory, the hub or nothing and generates text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from .model_source import check_device, choose_dtype, find_model
from .models.checkpoint import open_store
from .models.opt import OPT, ModelError, model_spec
from .models.sampling_params import SamplingParams
from .outputs import CompletionOutput, RequestOutput
from .plan.hardware import Hardware
from .plan.placement import PAGE
from .plan.policy import Policy, PolicyError
from .plan.search import Problem
from .plan.spec import ModelSpec, stored_as
from .run.auto import choose, machine, typical_length
from .run.block import Request
from .run.engine import Engine, Limits, RunReport
from .sizes import parse_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AUTO = "auto"
BASE = Policy()
DEFAULT_OFFLOAD_DIR = Path("~/.cache/flexgen_triton")

Prompt = str | Sequence[int]
Progress = Callable[[int, int], None]


class LLM:
    """A model ready to generate. Use as a context manager, or `close()` it.

    `model`: a checkpoint's directory, a hub id, or "demo". `policy`: where its bytes live; "auto" finds the fastest for
    the prompts of the first `generate`, and loads the weights then. `allow`: what "auto" may do that changes the
    output, of "4bit", "4bit-cache" and "sparse". `gpu_memory`, `cpu_memory`, `disk_memory`: bytes (or "16GiB") that may
    be used in all; by default what is free. `hardware`: a machine's profile, its file or its name, in place of this
    machine's own, which "auto" measures on first use. `dtype`: "auto" (the checkpoint's), "float32", "bfloat16" or
    "float16". `offload_dir`: where converted weights and the disk's share of cache and activations go. `path`:
    FlexGen's second argument, a directory or "_DUMMY_" for random weights. `progress(phase, done, total)` is told of
    measuring ("measure"), conversion ("convert"), loading ("load") and token steps ("generate"). Raises ModelError,
    PolicyError, HardwareError, CheckpointError (all ValueError) or OSError, each in one sentence.
    """

    def __init__(
        self,
        model: str,
        *,
        policy: Policy | str = AUTO,
        allow: Collection[str] = (),
        gpu_memory: int | str | None = None,
        cpu_memory: int | str | None = None,
        disk_memory: int | str | None = None,
        hardware: Hardware | str | Path | None = None,
        dtype: str = "auto",
        offload_dir: str | Path = DEFAULT_OFFLOAD_DIR,
        path: str | None = None,
        device: str | None = None,
        copies: bool | None = None,
        seed: int = 0,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self.source = find_model(model, path)
        if isinstance(policy, str) and policy != AUTO:
            raise PolicyError(f"policy is {policy!r}; give a Policy, or {AUTO!r}")
        self.offload_dir = Path(offload_dir).expanduser()
        self.spec: ModelSpec = model_spec(self.source.config, self.source.name, choose_dtype(dtype, self.source))
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        check_device(self.spec.dtype, self._device)
        self._allow, self._profile, self._copies, self._seed = frozenset(allow), hardware, copies, seed
        self._limits = Limits(*(None if m is None else parse_size(m) for m in (gpu_memory, cpu_memory, disk_memory)))
        self._progress = progress
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self.offload_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.last_report: RunReport | None = None
        self._engine: Engine | None = None
        self._automatic = isinstance(policy, str)
        if isinstance(policy, Policy):
            self.use(policy)

    @property
    def engine(self) -> Engine:
        """The engine with its weights loaded; with an automatic policy there is none before the first `generate`."""
        if self._engine is None:
            raise PolicyError("the policy is automatic and no prompts were seen yet; generate first, or give a Policy")
        return self._engine

    @property
    def policy(self) -> Policy:
        """The policy in use."""
        return self.engine.policy

    def use(self, policy: Policy) -> None:
        """Load the weights as `policy` says, in place of what is loaded. Raises PolicyError when they do not fit."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        spec = stored_as(self.spec, policy)
        progress = self._phase("convert")
        self._engine = Engine(
            OPT(self.source.config),
            spec,
            open_store(spec, self.source.directory, self.offload_dir, progress=progress, seed=self._seed),
            policy,
            device=self._device,
            offload_dir=self.offload_dir,
            copies=self._copies,
            limits=self._limits,
            progress=self._phase("load"),
        )

    @cached_property
    def hardware(self) -> Hardware:
        """The machine that is planned for: as given, or measured on first use; within the memory limits."""
        return machine(
            self._device,
            self.offload_dir,
            self._limits,
            profile=self._profile,
            copies=self._copies,
            progress=self._progress,
        )

    def problem(
        self,
        prompt_lens: Sequence[int],
        gen_len: int,
        num_prompts: int | None,
        *,
        base: Policy = BASE,
        max_latency: float | None = None,
    ) -> Problem:
        """What a search for a policy (plan.search.search, on `hardware`) is asked.

        `num_prompts` of these lengths, or (None) as many as pay; `base` gives what the search does not choose.
        """
        mixed = num_prompts is not None and len(set(prompt_lens)) > 1
        lens = tuple(prompt_lens) if mixed else ()
        room = self.spec.max_positions - max(prompt_lens)  # the longest prompt need not ask for most
        return Problem(
            self.spec,
            typical_length(prompt_lens),
            min(gen_len, room) if mixed else gen_len,
            num_prompts,
            self._allow,
            max_latency,
            stored=self.source.is_stored and "4bit" not in self._allow and not base.compress_weight,
            prompt_lens=lens,
            base=base,
            alignment=2 * PAGE * len(self.spec.modules),
        )

    def _settle(self, requests: Sequence[Request]) -> None:
        """With an automatic policy: find the one for these requests and load the weights as it says."""
        if not self._automatic:
            return
        lens = [len(r.prompt) for r in requests]
        problem = self.problem(lens, max(r.params.max_tokens for r in requests), len(lens))
        current = self._engine.policy if self._engine else None
        policy = choose(problem, self.hardware, current)
        if policy != current:
            self.use(policy)

    def _phase(self, name: str) -> Progress | None:
        progress = self._progress
        return (lambda done, total: progress(name, done, total)) if progress else None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own tokenizer, loaded on first use."""
        if self._tokenizer is None:
            if self.source.directory is None:
                raise ModelError(f"{self.source.name} has random weights and no tokenizer; give prompts as token ids")
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(self.source.directory)
        return self._tokenizer

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete every prompt (text or token ids), in the order given, whatever order they were computed in.

        Raises ValueError for an empty prompt, a token id outside the vocabulary, or one that leaves no position.
        """
        params = sampling_params or SamplingParams()
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(each)} sampling parameters; give one, or one each")
        requests = [self._request(n, p, s) for n, (p, s) in enumerate(zip(prompts, each, strict=True))]
        if requests:
            self._settle(requests)
            self.last_report = self.engine.generate(requests, progress=self._phase("generate"))
        return [self._output(n, p, r) for n, (p, r) in enumerate(zip(prompts, requests, strict=True))]

    def token_ids(self, prompt: Prompt) -> list[int]:
        """A prompt's token ids, by the model's own tokenizer where it is text."""
        return list(self.tokenizer(prompt)["input_ids"]) if isinstance(prompt, str) else [int(t) for t in prompt]

    def _request(self, number: int, prompt: Prompt, params: SamplingParams) -> Request:
        ids = self.token_ids(prompt)
        if not ids:
            raise ValueError(f"prompt {number} is empty; give it at least one token")
        bad = next((t for t in ids if not 0 <= t < self.spec.vocab), None)
        if bad is not None:
            raise ValueError(f"prompt {number} has token id {bad}; the vocabulary has {self.spec.vocab}")
        room = self.spec.max_positions - len(ids)
        if params.max_tokens > room:
            raise PolicyError(
                f"prompt {number} has {len(ids)} tokens and asks for {params.max_tokens} more; "
                f"{self.spec.name} has {self.spec.max_positions} positions, so at most {max(room, 0)} fit"
            )
        return Request(ids, params)

    def _output(self, number: int, prompt: Prompt, request: Request) -> RequestOutput:
        text = ""
        if self.source.directory is not None and self._has_tokenizer():
            text = str(self.tokenizer.decode(request.tokens, skip_special_tokens=True))
        completion = CompletionOutput(0, text, request.tokens, request.finish_reason)
        return RequestOutput(number, prompt if isinstance(prompt, str) else None, request.prompt, [completion])

    def _has_tokenizer(self) -> bool:
        directory = self.source.directory
        assert directory is not None
        return any((directory / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json"))

    def close(self) -> None:
        """Free the model's memory, files and threads."""
        if self._engine is not None:
            self._engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
