"""A model's config.json, checked field by field, and what is made of it: one `ModelConfig` for every decoder.

Each family has a table of names and checks. Knows what a value may be. Does not know what a family computes with it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The sizes of a decoder-only model and the choices that decide its arithmetic; `family` is a key of FAMILIES."""

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    positions: int
    activation: str
    eos_ids: tuple[int, ...]
    bos_id: int | None = None
    pad_id: int | None = None
    embed_dim: int = 0  # of the token table where it is projected to `hidden`; else 0
    eps: float = 1e-5
    norm_first: bool = True
    final_norm: bool = True
    norm_affine: bool = True
    biases: bool = True
    gated: bool = False  # the MLP multiplies two projections
    rope_theta: float | None = None  # rotary positions, without a table
    tied: bool = True  # the output projection is the token table

    @property
    def embed_width(self) -> int:
        return self.embed_dim or self.hidden

    @property
    def num_parameters(self) -> int:
        """Elements of its matrices and tables; vectors are left out."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        mlp = (3 if self.gated else 2) * self.hidden * self.ffn
        tables = self.vocab * self.embed_width + (self.positions * self.hidden if self.rope_theta is None else 0)
        return self.layers * (attention + mlp) + tables


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


def number(low: float, high: float) -> Check:
    """A number between two others."""

    def check(value: Any) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            raise ModelError(f"it must be a number from {low:g} to {high:g}")
        return float(value)

    return check


def tokens(value: Any) -> tuple[int, ...]:
    """One token's id, or a list of some."""
    ids = value if isinstance(value, list) else [value]
    if not ids or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ModelError("it must be one token id, or a list of some")
    return tuple(ids)


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


def check_tokens(found: Mapping[str, int | tuple[int, ...]], vocab: int) -> None:
    """Raise ModelError where a token id is outside the vocabulary."""
    for name, value in ((name, i) for name, ids in found.items() for i in (ids if isinstance(ids, tuple) else (ids,))):
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
