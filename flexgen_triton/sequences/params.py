"""Sampling parameters of one request, under vLLM's names and with its defaults."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ..flags import Range, allowed, flag, within

MAX_LOGPROBS = 100  # alternatives a position; a table of the whole vocabulary is not what they are for
MAX_SEED = 1 << 64
MIN_TEMPERATURE = 1e-5  # below it there is no chance left to speak of, and logits divided by it may overflow


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Settings for generating one request; a field's metadata is its flag on the command line, and its range.

    Immutable; numpy's numbers become Python's. Raises ValueError, in one sentence, for values of another type or out
    of range.

    `n` completions of at most `max_tokens` tokens each. temperature 0 (any below 1e-5) is greedy. `top_k` 0 (or -1),
    `top_p` 1 and `min_p` 0 leave all tokens in. `repetition_penalty` counts prompt and output, the other two penalties
    output alone. A completion ends at the end of text (unless `ignore_eos`), at one of `stop_token_ids` or at a `stop`
    string, which its text then leaves out (unless `include_stop_str_in_output`), but not before `min_tokens`. A request
    with a `seed` gives the same text whatever else is computed beside it; without one, the seed comes from the model's
    own. `logprobs`, `prompt_logprobs`: so many of the likeliest tokens at every position, and the one that is there.
    """

    n: int = field(
        default=1, metadata=flag("Completions of each prompt.", after="frequency_penalty") | within(1, 1024, whole=True)
    )
    max_tokens: int = field(  # a command's default is a paragraph
        default=16, metadata=flag("New tokens at most.", default=128) | within(1, whole=True)
    )
    min_tokens: int = field(default=0, metadata=flag("New tokens at least.") | within(0, whole=True))
    temperature: float = field(default=1.0, metadata=flag("0 is greedy.") | within(0))
    top_p: float = field(
        default=1.0, metadata=flag("Choose among the likeliest tokens that add up to this probability.") | within(0, 1)
    )
    top_k: int = field(default=0, metadata=flag("Choose among so many; 0: among all.") | within(-1, whole=True))
    min_p: float = field(
        default=0.0,
        metadata=flag("Choose among tokens with at least this share of the likeliest one's probability.")
        | within(0, 1),
    )
    repetition_penalty: float = field(default=1.0, metadata=flag() | within(0))
    presence_penalty: float = field(default=0.0, metadata=flag() | within(-2, 2))
    frequency_penalty: float = field(default=0.0, metadata=flag() | within(-2, 2))
    seed: int | None = field(
        default=None,
        metadata=flag(
            "Of a prompt's random choices; by default it comes from --seed.", name="sampling_seed", after="ignore_eos"
        )
        | within(-MAX_SEED // 2, MAX_SEED - 1, whole=True),
    )
    stop: str | Sequence[str] = field(
        default=(), metadata=flag("A text that ends a completion; may be given several times.")
    )
    stop_token_ids: Sequence[int] = field(
        default=(), metadata=flag("A token that ends one; may be given several times.", name="stop_token_id")
    )
    include_stop_str_in_output: bool = False
    ignore_eos: bool = field(default=False, metadata=flag("Go on after the end of the text."))
    logprobs: int | None = field(default=None, metadata=within(0, MAX_LOGPROBS, whole=True))
    prompt_logprobs: int | None = field(default=None, metadata=within(0, MAX_LOGPROBS, whole=True))
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        for f in fields(self):
            given, numbers = getattr(self, f.name), allowed(f)
            value = _plain(given)
            if numbers and not (value is None and f.default is None):
                _check_number(f.name, given, numbers)
            if isinstance(f.default, bool) and not isinstance(value, bool):
                raise ValueError(f"{f.name} is {given!r}; it must be True or False")
            object.__setattr__(self, f.name, value)  # Python's own, so that equal parameters are equal
        for name in ("top_p", "repetition_penalty"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name} is 0; it must be above 0")
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens is {self.min_tokens} and max_tokens {self.max_tokens}; it may not be above it"
            )
        self._settle_stops()

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


def _plain(value: Any) -> Any:
    """Python's own value for one of numpy's, told by what it can do: importing numpy takes help too long."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _check_number(name: str, given: Any, numbers: Range) -> None:
    value = _plain(given)
    kinds, what = (int, "a whole") if numbers.whole else (int | float, "a finite")
    is_number = isinstance(value, kinds) and not isinstance(value, bool)
    if not is_number or not (numbers.whole or abs(value) <= sys.float_info.max):
        raise ValueError(f"{name} is {given!r}; it must be {what} number")
    if not numbers.has(value):
        low, high = numbers.low, numbers.high
        within = f"between {low} and {high}" if high < math.inf else f"at least {low}"
        raise ValueError(f"{name} is {value}; it must be {within}")
