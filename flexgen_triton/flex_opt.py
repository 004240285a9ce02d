"""FlexGen's Python interface over this engine: a script written for FlexGen runs when its imports name this module.

Owns FlexGen's conventions: prompts padded to one length, token ids out, a stop token but no end of text.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from .llm import LLM
from .model_source import DUMMY
from .models.opt import config_by_name
from .models.sampling_params import SamplingParams
from .opt_config import OptConfig, get_opt_config
from .outputs import answered
from .plan.policy import CompressionConfig, Policy

__all__ = ["CompressionConfig", "ExecutionEnv", "OptConfig", "OptLM", "Policy", "get_opt_config", "str2bool"]


class ExecutionEnv:
    """Where the disk's share of weights, cache and activations goes, and the models that were loaded with it."""

    def __init__(self, offload_dir: str | Path) -> None:
        self.offload_dir = offload_dir
        self._models: list[weakref.finalize[Any, OptLM]] = []

    @classmethod
    def create(cls, offload_dir: str | Path) -> ExecutionEnv:
        return cls(offload_dir)

    def adopt(self, free: weakref.finalize[Any, OptLM]) -> None:
        """Call `free` when this is closed, if it was not called before."""
        self._models.append(free)

    def close_copy_threads(self) -> None:
        """Free the memory, files and threads of all models that were loaded with this."""
        for free in self._models:
            free()
        self._models.clear()


class OptLM:
    """A model under a policy. Freed with its environment, or when nothing refers to it any more.

    `path` is "_DUMMY_" for random weights, a checkpoint's directory, or one that has the model in a directory of its
    name; otherwise the model's name itself says where it is, as a directory or on the hub. Raises ValueError for a
    model or policy that cannot be run.
    """

    def __init__(self, config: str | OptConfig, env: ExecutionEnv, path: str, policy: Policy) -> None:
        name = config if isinstance(config, str) else config.name
        model, directory = _find(name, path)
        llm = LLM(model, path=directory, policy=policy, offload_dir=env.offload_dir)
        self._llm = llm
        self._free = weakref.finalize(self, llm.close)
        env.adopt(self._free)
        self.config = OptConfig.of(name, llm.source.config, llm.spec.dtype) if isinstance(config, str) else config
        self.env, self.path, self.policy = env, path, policy

    def generate(
        self,
        inputs: Sequence[Sequence[int]] | ArrayLike,
        max_new_tokens: int = 32,
        do_sample: bool = False,
        temperature: float = 1.0,
        stop: int | None = None,
        debug_mode: str | None = None,
        cut_gen_len: int | None = None,
        verbose: int = 0,
    ) -> NDArray[np.int32]:
        """Prompts [N, S] of token ids, padded to one length -> [N, S + max_new_tokens]: the same, and what follows.

        After the `stop` token, and after `cut_gen_len` tokens, there is padding. Padding in a prompt is not computed; a
        row of nothing else stays one. With `do_sample`, random choices come from torch's own generator. `verbose` is
        taken and says nothing. Raises ValueError for rows of different lengths, a `debug_mode`, or a closed model.
        """
        if not self._free.alive:
            raise ValueError("the model's environment was closed; load the model in another one")
        if debug_mode is not None:
            raise ValueError(f"debug_mode {debug_mode!r} is FlexGen's own; `bench --trace` shows where time goes here")
        given = _rectangle(inputs)
        pad, width = self.config.pad_token_id, given.shape[1]
        output = np.full((len(given), width + max_new_tokens), pad, dtype=np.int32)
        output[:, :width] = given
        rows = np.flatnonzero((given != pad).any(axis=1))
        prompts = [row[row != pad].tolist() for row in given[rows]]
        params = SamplingParams(
            max_tokens=min(cut_gen_len or max_new_tokens, max_new_tokens),
            temperature=temperature if do_sample else 0,
            stop_token_ids=() if stop is None else (stop,),
            ignore_eos=True,
        )
        seeds = torch.randint(1 << 62, (len(prompts),)).tolist() if do_sample else [0] * len(prompts)
        each = [replace(params, seed=seed) for seed in seeds]
        for row, answer in zip(rows, answered(self._llm.generate(prompts, each)), strict=True):
            tokens = answer.outputs[0].token_ids
            output[row, width : width + len(tokens)] = tokens
        return output


def _find(name: str, path: str) -> tuple[str, str | None]:
    """What LLM is given as model and path."""
    if path == DUMMY:
        return name, DUMMY
    for directory in (Path(path).expanduser(), Path(path).expanduser() / name.rsplit("/", 1)[-1]):
        if (directory / "config.json").is_file():
            return name, str(directory)
    is_bare = "/" not in name and config_by_name(name) is not None and not Path(name).exists()
    return f"facebook/{name}" if is_bare else name, None


def _rectangle(inputs: Sequence[Sequence[int]] | ArrayLike) -> NDArray[np.int32]:
    """Prompts as an array [N, S]; raises ValueError where they are of different lengths."""
    try:
        found = np.asarray(inputs, dtype=np.int32)
    except ValueError as error:
        raise ValueError("the prompts are of different lengths; pad them on the left to one length") from error
    if found.ndim != 2:
        raise ValueError(f"the prompts are an array of {found.ndim} dimensions; give rows of token ids")
    return found


def str2bool(value: str | bool) -> bool:
    """For argparse: "true", "yes", "1" and the like, or the contrary."""
    if isinstance(value, bool):
        return value
    if value.lower() in ("true", "t", "yes", "y", "1"):
        return True
    if value.lower() in ("false", "f", "no", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{value!r} is neither true nor false")
