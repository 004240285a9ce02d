"""Prompts: each a text, or its token ids as a list, a tuple or an array of whole numbers.

Owns the ways to write prompts down. Knows no model: what its vocabulary and positions hold is checked elsewhere.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch

Prompt = str | Sequence[int]

PROMPT_IS = "a prompt is a text, or its token ids, a sequence of whole numbers"
_NO_PROMPTS = (bytes, bytearray, memoryview, Mapping, Set)


class PromptError(ValueError):
    """Something that is no prompt; the message says what one is."""


def as_prompts(given: Any) -> list[Prompt]:
    """One prompt or several -> a list of them; of a 2-D array of integers each row is one. Raises PromptError."""
    if isinstance(given, str):
        return [given]
    if isinstance(given, np.ndarray | torch.Tensor):
        if given.ndim not in (1, 2):
            raise PromptError(f"the prompts are {shown(given)}; give one of 1 dimension for a prompt, of 2 for several")
        given = given if given.ndim == 2 or _is_text(given) else [given]
    if isinstance(given, _NO_PROMPTS) or not isinstance(given, Iterable):
        raise PromptError(f"the prompts are {shown(given)}; {PROMPT_IS}, and several prompts are a list of them")
    found = list(given)
    if found and is_whole(found[0]):
        return [as_prompt(found, "the prompt")]
    return [as_prompt(each, f"prompt {n}") for n, each in enumerate(found)]


def as_prompt(given: Any, name: str) -> Prompt:
    """A text as it is, token ids as a list of ints. Raises PromptError, which calls the prompt by `name`."""
    if isinstance(given, str):
        return given
    if isinstance(given, np.ndarray | torch.Tensor):
        if given.ndim != 1:
            raise PromptError(f"{name} is {shown(given)}; {PROMPT_IS}")
        given = given.tolist()
    if isinstance(given, _NO_PROMPTS) or not isinstance(given, Sequence):
        raise PromptError(f"{name} is {shown(given)}; {PROMPT_IS}")
    for each in given:
        if not is_whole(each):
            raise PromptError(f"{name} holds {shown(each)}; {PROMPT_IS}")
    return [int(each) for each in given]


def is_whole(value: Any) -> bool:
    """Return True for a whole number of Python's or numpy's; True and False are none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """A value in a message: short, and with its type."""
    if isinstance(value, np.ndarray | torch.Tensor):
        return f"an array of {value.dtype} of shape {tuple(value.shape)}"
    return "None" if value is None else f"{reprlib.repr(value)} ({type(value).__name__})"


def _is_text(given: np.ndarray[Any, Any] | torch.Tensor) -> bool:
    return isinstance(given, np.ndarray) and given.dtype.kind in "UO"
