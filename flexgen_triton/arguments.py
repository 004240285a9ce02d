"""The arguments of LLM, checked before anything is read: a mistake is one sentence that names the argument."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from .defaults import AUTO
from .memory.device import default_device, num_gpus
from .memory.stripes import Folders
from .plan.policy import LOSSY, Policy, PolicyError
from .sequences.params import SamplingParams
from .sequences.prompts import is_whole, shown

PARAMS_ARE = "sampling_params is a SamplingParams, or a list of one for each prompt"


class ArgumentError(ValueError):
    """An argument of a type or a value that it cannot have."""


def as_model(model: Any) -> str:
    """A model's name or path as a text."""
    if isinstance(model, str | os.PathLike):
        return os.fsdecode(model)
    raise ArgumentError(f'model is {shown(model)}; give a directory, a hub id or "demo"')


def check_policy(policy: Any, *, automatic: bool) -> None:
    """Raise PolicyError for what is neither a Policy nor, where that may be, the word for finding one."""
    if not isinstance(policy, Policy) and not (automatic and isinstance(policy, str) and policy == AUTO):
        shown_policy = repr(policy) if isinstance(policy, str) else shown(policy)
        raise PolicyError(f"policy is {shown_policy}; give a Policy" + (f", or {AUTO!r}" if automatic else ""))


def as_allowed(allow: Any) -> frozenset[str]:
    """The changes of the output that an automatic policy may make."""
    if isinstance(allow, str) or not isinstance(allow, Collection):
        raise ArgumentError(f"allow is {shown(allow)}; give a list of some of {', '.join(LOSSY)}")
    wrong = next((word for word in allow if word not in LOSSY), None)
    if wrong is not None:
        raise ArgumentError(f"allow holds {shown(wrong)}; it may hold {', '.join(LOSSY)}")
    return frozenset(allow)


def as_device(device: Any) -> torch.device:
    """The device to compute on; None is the GPU where there is one."""
    if device is None:
        return default_device()
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise ArgumentError(
            f"device is {shown(device)}; it must be one to compute on: use cpu, or cuda where there is a GPU"
        )
    if found.type == "cuda" and (found.index or 0) >= num_gpus():
        raise ArgumentError(f"device is {str(found)!r}, but there are {num_gpus()} GPUs here; use cpu")
    return found


def as_folders(offload_dir: Any) -> Folders:
    """The offload directory, or several, made where they are not there."""
    several = offload_dir if isinstance(offload_dir, list | tuple) else [offload_dir]
    if not all(isinstance(path, str | os.PathLike) for path in several):
        raise ArgumentError(f"offload_dir is {shown(offload_dir)}; give a directory, or a list of them")
    folders = Folders.of([Path(os.fsdecode(path)) for path in several])
    try:
        folders.make()
    except (FileExistsError, NotADirectoryError) as error:
        raise ArgumentError(f"offload_dir is {error.filename}, which is no directory; name another one") from error
    return folders


def check_others(*, base: Any, dtype: Any, seed: Any, copies: Any, verify: Any, progress: Any, check: Any) -> None:
    """Check the types of what has a type and no more."""
    if not isinstance(base, Policy):
        raise PolicyError(f"base is {shown(base)}; give a Policy")
    if not isinstance(dtype, str):
        raise ArgumentError(f'dtype is {shown(dtype)}; give a text such as "auto" or "bfloat16"')
    if not is_whole(seed):
        raise ArgumentError(f"seed is {shown(seed)}; it must be a whole number")
    if copies is not None and not isinstance(copies, bool):
        raise ArgumentError(f"copies is {shown(copies)}; it must be True, False or None")
    if not isinstance(verify, bool):
        raise ArgumentError(f"verify is {shown(verify)}; it must be True or False")
    for name, function in (("progress", progress), ("check", check)):
        if function is not None and not callable(function):
            raise ArgumentError(f"{name} is {shown(function)}; it must be a function, or None")


def as_params(given: Any, count: int) -> list[SamplingParams]:
    """The sampling parameters of each of `count` prompts, from one for all or from one each."""
    if given is None or isinstance(given, SamplingParams):
        return [given or SamplingParams()] * count
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        raise ArgumentError(f"sampling_params is {shown(given)}; {PARAMS_ARE}")
    params = list(given)
    wrong = [each for each in params if not isinstance(each, SamplingParams)]
    if wrong:
        raise ArgumentError(f"sampling_params holds {shown(wrong[0])}; {PARAMS_ARE}")
    if len(params) != count:
        raise ArgumentError(f"{count} prompts but {len(params)} sampling parameters; give one, or one each")
    return params


def as_pair(item: Any) -> tuple[Any, Any]:
    """A prompt and its sampling parameters, as a stream takes them."""
    if not isinstance(item, tuple) or len(item) != 2:
        raise ArgumentError(f"the stream was given {shown(item)}; it takes pairs of a prompt and a SamplingParams")
    return item
