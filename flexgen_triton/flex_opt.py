"""FlexGen's Python interface over this engine: a script written for FlexGen runs when its imports name this module.

Owns FlexGen's conventions: prompts padded to one length, token ids out, a stop token but no end of text. As a command,
`python -m flexgen_triton.flex_opt`, it is the benchmark.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from rich.console import Console

from .commands import figures
from .commands.bench import DEBUG_MODES, FEWER_STEPS, log_name
from .commands.options import flags_policy
from .llm import DEFAULT_OFFLOAD_DIR, LLM
from .models.locate import DUMMY
from .opt_config import OptConfig, download_opt_weights, get_opt_config
from .plan.policy import CompressionConfig, Policy
from .sequences.outputs import answered
from .sequences.params import SamplingParams
from .utils import ExecutionEnv, Task, TorchDevice, TorchDisk, TorchMixedDevice, str2bool

__all__ = [
    "DUMMY_WEIGHT",
    "CompressionConfig",
    "Env",
    "ExecutionEnv",
    "OptConfig",
    "OptLM",
    "Policy",
    "Task",
    "TorchDevice",
    "TorchDisk",
    "TorchMixedDevice",
    "add_parser_arguments",
    "download_opt_weights",
    "get_filename",
    "get_opt_config",
    "get_test_inputs",
    "str2bool",
]

DUMMY_WEIGHT = DUMMY
Env = ExecutionEnv


class OptLM:
    """A model under a policy. Freed with its environment, or when nothing refers to it any more.

    `config` is the model's name or its sizes. `path` is "_DUMMY_" for random weights, a checkpoint's directory, or one
    that has the model in a directory of its name; otherwise the model's name itself says where it is, as a directory or
    on the hub. Raises ValueError for a model or policy that cannot be run.
    """

    def __init__(self, config: str | OptConfig, env: ExecutionEnv, path: str, policy: Policy) -> None:
        self._name = config if isinstance(config, str) else config.name
        self.env, self.path, self.policy = env, path, policy
        self.num_gpu_batches = policy.num_gpu_batches
        self._load()
        llm = self._llm
        self.config = OptConfig.of(self._name, llm.source.config, llm.spec.dtype) if isinstance(config, str) else config

    def _load(self) -> None:
        llm = LLM(self._name, path=self.path, policy=self.policy, offload_dir=self.env.disk.path)
        self._llm = llm
        self._free = weakref.finalize(self, llm.close)
        self.env.disk.adopt(self._free)

    def init_all_weights(self) -> None:
        """Load the weights where they are not loaded: the constructor has done so, `delete_all_weights` undoes it."""
        if not self._free.alive:
            self._load()

    def delete_all_weights(self) -> None:
        """Free the model's memory, files and threads."""
        self._free()

    def generate(
        self,
        inputs: Sequence[Sequence[int]] | ArrayLike,
        max_new_tokens: int = 32,
        do_sample: bool = False,
        temperature: float = 1.0,
        stop: int | str | None = None,
        debug_mode: str | None = None,
        cut_gen_len: int | None = None,
        verbose: int = 0,
    ) -> NDArray[np.int32]:
        """Prompts [N, S] of token ids, padded to one length -> [N, S + max_new_tokens]: the same, and what follows.

        A row ends with the `stop` token, or with the token that completes the text `stop`; after it, and after
        `cut_gen_len` tokens, there is padding. Padding in a prompt is not computed; a row of nothing else stays one.
        With `do_sample`, random choices come from torch's own generator. `debug_mode` "fewer_batch" cuts the run to a
        few tokens, "breakdown" runs those without overlap and prints what each lane did. `verbose` is taken and says
        nothing. Raises ValueError for rows of different lengths, another `debug_mode`, a text as `stop` where there is
        no tokenizer, a model whose weights were freed, or a prompt that has no answer.
        """
        if not self._free.alive:
            raise ValueError(
                "the model's environment was closed, or its weights deleted; init_all_weights() loads them again"
            )
        if debug_mode not in (None, *DEBUG_MODES):
            raise ValueError(f"debug_mode is {debug_mode!r}; it is None or one of {', '.join(DEBUG_MODES)}")
        given = _rectangle(inputs)
        pad, width = self.config.pad_token_id, given.shape[1]
        output = np.full((len(given), width + max_new_tokens), pad, dtype=np.int32)
        output[:, :width] = given
        rows = np.flatnonzero((given != pad).any(axis=1))
        prompts = [row[row != pad].tolist() for row in given[rows]]
        cut = cut_gen_len or (FEWER_STEPS if debug_mode else max_new_tokens)
        params = replace(
            self._ending(stop),
            max_tokens=min(cut, max_new_tokens),
            temperature=float(temperature) if do_sample else 0,
            ignore_eos=True,
        )
        seeds = torch.randint(1 << 62, (len(prompts),)).tolist() if do_sample else [0] * len(prompts)
        each = [replace(params, seed=seed) for seed in seeds]
        with self._broken_down() if debug_mode == "breakdown" else nullcontext():
            answers = answered(self._llm.generate(prompts, each))
        for row, answer in zip(rows, answers, strict=True):
            tokens = answer.outputs[0].token_ids
            output[row, width : width + len(tokens)] = tokens
        return output

    def _ending(self, stop: int | str | None) -> SamplingParams:
        """The sampling parameters under which a row ends with `stop`, a token id or a text."""
        if isinstance(stop, str) and not self._llm.has_tokenizer:
            raise ValueError(f"stop {stop!r} is a text, and {self._name} has no tokenizer to find it; give a token id")
        if isinstance(stop, str):
            return SamplingParams(stop=stop)
        return SamplingParams(stop_token_ids=() if stop is None else (int(stop),))

    @contextmanager
    def _broken_down(self) -> Iterator[None]:
        """Run without overlap meanwhile, and print then what each lane did."""
        if self.policy.overlap:
            self._llm.use(replace(self.policy, overlap=False))
        try:
            yield
            if self._llm.last_report is not None:
                figures.print_lanes(Console(), self._llm.last_report.timeline)
        finally:
            if self.policy.overlap:
                self._llm.use(self.policy)


def _rectangle(inputs: Sequence[Sequence[int]] | ArrayLike) -> NDArray[np.int32]:
    """Prompts as an array [N, S]; raises ValueError where they are of different lengths."""
    try:
        found = np.asarray(inputs, dtype=np.int32)
    except ValueError as error:
        raise ValueError("the prompts are of different lengths; pad them on the left to one length") from error
    if found.ndim != 2:
        raise ValueError(f"the prompts are an array of {found.ndim} dimensions; give rows of token ids")
    return found


def get_test_inputs(prompt_len: int, num_prompts: int, tokenizer: Callable[..., Any]) -> list[list[int]]:
    """The same short prompt `num_prompts` times, padded to `prompt_len` tokens."""
    ids = tokenizer("The longest river in the world is", padding="max_length", max_length=prompt_len)["input_ids"]
    return [list(ids)] * num_prompts


def add_parser_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of FlexGen's benchmark, under its names and with its defaults."""
    flag: Callable[..., Any] = parser.add_argument
    flag("--model", default="facebook/opt-6.7b", help="the model's name")
    flag("--path", default="~/opt_weights", help="the weights' directory; without them there, the hub's are taken")
    flag("--offload-dir", default=str(DEFAULT_OFFLOAD_DIR), help="where the disk's share goes")
    flag("--debug-mode", choices=DEBUG_MODES, help="a few tokens; breakdown: without overlap, and lane by lane")
    flag("--percent", nargs="+", type=int, default=[100, 0, 100, 0, 100, 0], help="six percentages, GPU and CPU each")
    flag("--attn-sparsity", type=float, default=1.0, help="share of V that decode reads")
    flag("--log-file", default="auto", help="where the figures are appended")
    for name, default in (("prompt-len", 512), ("gen-len", 32), ("gpu-batch-size", 4), ("num-gpu-batches", 1)):
        flag(f"--{name}", type=int, default=default)
    flag("--cut-gen-len", type=int, help="run as many token steps, and project the rest")
    flag("--verbose", type=int, default=2)
    for name in ("sep-layer", "pin-weight", "overlap"):
        flag(f"--{name}", type=str2bool, nargs="?", const=True, default=True)
    for name in ("cpu-cache-compute", "compress-weight", "compress-cache", "no-log"):
        flag(f"--{name}", action="store_true")


def get_filename(args: argparse.Namespace) -> str:
    """The log's automatic name, without its ending, for the flags of `add_parser_arguments`."""
    return log_name(args.model, flags_policy(vars(args)), prompt_len=args.prompt_len, gen_len=args.gen_len)


if __name__ == "__main__":
    from .commands.bench import main

    main()
