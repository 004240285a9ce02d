"""Sampling parameters of one request, under vLLM's names and with its defaults."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_LOGPROBS = 100  # alternatives a position; a table of the whole vocabulary is not what they are for
MAX_SEED = 1 << 64
MIN_TEMPERATURE = 1e-5  # below it there is no chance left to speak of, and logits divided by it may overflow


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Settings for generating one request. Immutable; numpy's numbers become Python's. Raises ValueError, in one
    sentence, for values of another type or out of range.

    `n` completions of at most `max_tokens` tokens each. temperature 0 (any below 1e-5) is greedy. `top_k` 0 (or -1),
    `top_p` 1 and `min_p` 0 leave all tokens in. `repetition_penalty` counts prompt and output, the other two penalties
    output alone. A completion ends at the end of text (unless `ignore_eos`), at one of `stop_token_ids` or at a `stop`
    string, which its text then leaves out (unless `include_stop_str_in_output`), but not before `min_tokens`. A request
    with a `seed` gives the same text whatever else is computed beside it; without one, the seed comes from the model's
    own. `logprobs`, `prompt_logprobs`: so many of the likeliest tokens at every position, and the one that is there.
    """

    n: int = 1
    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        for name, low, high in _WHOLE:
            value = _plain(getattr(self, name))
            if value is None and name in ("seed", "logprobs", "prompt_logprobs"):
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be a whole number")
            self._settle(name, value, low, high)
        for name, low, high in _REAL:
            value = _plain(getattr(self, name))
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not abs(value) <= sys.float_info.max:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be a finite number")
            self._settle(name, value, low, high)
        for name in _YES_OR_NO:
            value = _plain(getattr(self, name))
            if not isinstance(value, bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be True or False")
            object.__setattr__(self, name, value)
        for name in ("top_p", "repetition_penalty"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name} is 0; it must be above 0")
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens is {self.min_tokens} and max_tokens {self.max_tokens}; it may not be above it"
            )
        self._settle_stops()

    def _settle(self, name: str, value: float, low: float, high: float) -> None:
        """Check a number's range, and keep it as Python's own, so that equal parameters are equal."""
        _check_range(name, value, low, high)
        object.__setattr__(self, name, value)

    def _settle_stops(self) -> None:
        """Make tuples of `stop` and `stop_token_ids`, so that they cannot change and do compare."""
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, Iterable) or isinstance(value, bytes | Mapping)):
                raise ValueError(f"{name} is {value!r}; it must be a sequence")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(() if self.stop is None else self.stop)
        if not all(isinstance(s, str) and s for s in stop):
            raise ValueError(f"stop is {self.stop!r}; it must be a text, or several, none of them empty")
        ids = tuple(map(_plain, () if self.stop_token_ids is None else self.stop_token_ids))
        if not all(isinstance(t, int) and not isinstance(t, bool) and t >= 0 for t in ids):
            raise ValueError(f"stop_token_ids is {self.stop_token_ids!r}; it must be token ids")
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", ids)

    @property
    def is_greedy(self) -> bool:
        return self.temperature < MIN_TEMPERATURE


_WHOLE = (
    ("n", 1, 1024),
    ("max_tokens", 1, math.inf),
    ("min_tokens", 0, math.inf),
    ("top_k", -1, math.inf),
    ("seed", -MAX_SEED // 2, MAX_SEED - 1),
    ("logprobs", 0, MAX_LOGPROBS),
    ("prompt_logprobs", 0, MAX_LOGPROBS),
)
_YES_OR_NO = ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens")
_REAL = (
    ("temperature", 0, math.inf),
    ("top_p", 0, 1),
    ("min_p", 0, 1),
    ("repetition_penalty", 0, math.inf),
    ("presence_penalty", -2, 2),
    ("frequency_penalty", -2, 2),
)


def _plain(value: Any) -> Any:
    """Python's own value for one of numpy's, told by what it can do: importing numpy takes help too long."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        allowed = f"between {low} and {high}" if high < math.inf else f"at least {low}"
        raise ValueError(f"{name} is {value}; it must be {allowed}")
