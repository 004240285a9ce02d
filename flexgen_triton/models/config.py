"""A model's config.json, checked field by field: a table of names and checks, which each family has one of.

Knows what a value may be. Does not know what a family computes with it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from ..plan.json_file import kind_of

# Far above any model, far below what would keep the planner busy for minutes or overflow an offset.
MAX_LAYERS = 10_000
MAX_WIDTH = 1 << 20
MAX_FFN = 1 << 22
MAX_VOCAB = 1 << 24
MAX_POSITIONS = 1 << 24
MAX_PARAMETERS = 10**14

WAY_OUT = "correct config.json or download it again"

Check = Callable[[Any], Any]  # returns the value to use, or raises ModelError with the end of a sentence


class ModelError(ValueError):
    """A model that this engine cannot run; the message says why."""


def whole(low: int, high: int) -> Check:
    """A whole number between two others."""

    def check(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ModelError(f"it must be a whole number from {low} to {high}")
        return value

    return check


def flag(value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ModelError("it must be true or false")
    return value


def word(known: Collection[str]) -> Check:
    """One of some words."""

    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in known:
            raise ModelError(f"that is unknown; known are {', '.join(known)}")
        return value

    return check


def token(value: Any) -> int:
    """A token's id, by itself or as the only one of a list."""
    ids = value if isinstance(value, list) else [value]
    if len(ids) != 1 or not isinstance(ids[0], int) or isinstance(ids[0], bool):
        raise ModelError("it must be one token id")
    return ids[0]


def read_fields(config: Mapping[str, Any], checks: Mapping[str, Check], required: Collection[str]) -> dict[str, Any]:
    """The checked fields of a config.json that are there and not null; raises ModelError for the first wrong one."""
    missing = [name for name in required if name not in config]
    if missing:
        raise ModelError(f"config.json lacks {', '.join(missing)}; is it a complete checkpoint?")
    found = {}
    for name, check in checks.items():
        value = config.get(name)
        if value is None and name not in required:
            continue
        try:
            found[name] = check(value)
        except ModelError as error:
            raise ModelError(f"{name} is {kind_of(value)}; {error}: {WAY_OUT}") from error
    return found


def check_tokens(tokens: Mapping[str, int], vocab: int) -> None:
    """Raise ModelError where a token id is outside the vocabulary."""
    for name, value in tokens.items():
        if not 0 <= value < vocab:
            raise ModelError(f"{name} is {value}; it must be in the vocabulary, from 0 to {vocab - 1}: {WAY_OUT}")


def check_size(parameters: int) -> None:
    """Raise ModelError for a model larger than any."""
    if parameters > MAX_PARAMETERS:
        raise ModelError(
            f"its sizes make a model of {parameters:.1e} parameters; at most {MAX_PARAMETERS:.0e} can be planned for: "
            f"{WAY_OUT}"
        )


def check_unquantised(config: Mapping[str, Any]) -> None:
    """Raise ModelError for weights in a format of which only the original can be read."""
    quantised = config.get("quantization_config")
    if quantised is None:
        return
    method = quantised.get("quant_method") if isinstance(quantised, dict) else None
    raise ModelError(
        f"quantization_config says that its weights are quantised by {kind_of(method or quantised)}, which cannot be "
        "read; use the unquantised checkpoint, which --compress-weight stores in 4 bits"
    )


def checkpoint_dtype(config: Mapping[str, Any]) -> str:
    """The dtype that a config.json names; float32 where it names none. Raises ModelError."""
    for name in ("dtype", "torch_dtype"):
        value = config.get(name)
        if value is not None and not isinstance(value, str):
            raise ModelError(f"{name} is {kind_of(value)}; it must be a name such as float16: {WAY_OUT}")
        if value:
            return value.removeprefix("torch.")
    return "float32"
