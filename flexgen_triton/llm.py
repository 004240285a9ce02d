"""The library's front: `LLM`, which loads a model from a directory, the hub or nothing and generates text."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from .demo import DEMO_DIR
from .models.checkpoint import open_store
from .models.opt import OPT, ModelError, OPTConfig, config_by_name, model_spec
from .models.sampling import SamplingParams
from .plan.hardware import Hardware
from .plan.placement import PAGE
from .plan.policy import Policy, PolicyError
from .plan.search import Problem
from .plan.spec import DTYPE_BYTES, ModelSpec, stored_as
from .run.auto import choose, machine, typical_length
from .run.block import Request
from .run.engine import Engine, Limits, RunReport
from .sizes import parse_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DUMMY = "_DUMMY_"
DEMO = "demo"
AUTO = "auto"
BASE = Policy()
DEFAULT_OFFLOAD_DIR = Path("~/.cache/flexgen_triton")
HUB_PATTERNS = ["*.json", "*.txt", "*.model", "*.safetensors"]

Prompt = str | Sequence[int]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One completion: `finish_reason` is "stop" (end of text) or "length" (max_tokens)."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """The answer to one prompt, in vLLM's shape. `prompt` is None when token ids were given."""

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model found: its configuration, its name, and its directory (None: random weights)."""

    name: str
    config: OPTConfig
    directory: Path | None
    dtype: str  # of the checkpoint, by its own config

    @property
    def is_stored(self) -> bool:
        """Whether its weights can be read where they lie; else a store of our own takes as much of the disk again."""
        return self.directory is not None and any(self.directory.glob("*.safetensors"))


def find_model(model: str, path: str | None = None) -> ModelSource:
    """Find a model: the shipped demo, a directory, a hub id, or (`path` `_DUMMY_`) random weights of a known size.

    Raises ModelError or OSError with one sentence when there is no such model.
    """
    if path == DUMMY:
        config = config_by_name(model)
        if config is None and (Path(model) / "config.json").is_file():
            return replace(_from_directory(Path(model)), directory=None)
        if config is None:
            raise ModelError(f"{model!r} is no known OPT size, so no random weights can be made for it")
        return ModelSource(model.rsplit("/", 1)[-1], config, None, "float16")
    if model == DEMO and path is None:
        return _from_directory(DEMO_DIR)
    directory = Path(path or model).expanduser()
    if directory.exists() or path or model.startswith((".", "/", "~")) or model.count("/") != 1:
        return _from_directory(directory)
    return replace(_from_directory(_download(model)), name=model.rsplit("/", 1)[-1])


def _from_directory(directory: Path) -> ModelSource:
    if not directory.is_dir():
        raise ModelError(f"{directory} is not a directory; give a checkpoint's directory, a hub id or --path {DUMMY}")
    config_path = directory / "config.json"
    if not config_path.is_file():
        raise ModelError(f"{directory} has no config.json; a Hugging Face checkpoint directory has one")
    try:
        config = json.loads(config_path.read_text())
    except ValueError as error:
        raise ModelError(f"{config_path} is not valid JSON: {error}") from error
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    return ModelSource(directory.resolve().name, OPTConfig.from_json(config), directory, dtype)


def _download(model: str) -> Path:
    """Fetch a hub repository, honouring HF_HOME and HF_HUB_OFFLINE; safetensors where there are any, else `.bin`."""
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        try:
            safe = any(name.endswith(".safetensors") for name in list_repo_files(model))
        except (OfflineModeIsEnabled, OSError):
            return Path(snapshot_download(model, local_files_only=True))
        return Path(snapshot_download(model, allow_patterns=HUB_PATTERNS + ([] if safe else ["pytorch_model*.bin"])))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(f"{model} is neither a directory here nor to be had from the hub: {error}") from error


def choose_dtype(asked: str, source: ModelSource) -> str:
    """The dtype to run in: as asked, or ("auto") the checkpoint's own."""
    dtype = source.dtype if asked == "auto" else asked
    if dtype not in DTYPE_BYTES:
        raise ModelError(f"dtype {dtype!r} is not supported; choose one of {', '.join(DTYPE_BYTES)}")
    return dtype


def check_device(dtype: str, device: torch.device) -> None:
    """Raise ModelError where the device cannot compute in `dtype`."""
    if device.type != "cuda" or dtype != "bfloat16":
        return
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        name = torch.cuda.get_device_name(device)
        raise ModelError(
            f"bfloat16 needs a GPU of compute capability 8.0, {name} has {major}.{minor}; use --dtype float16"
        )


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
