"""Families of models: how each reads its config.json, which modules it is made of, and its forward functions.

The one place that names them. All others see a `ModelConfig`, a `ModelSpec` and a `Model`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ..memory.scratch import Scratch
from ..plan.formats import DTYPE_BYTES
from ..plan.json_file import kind_of
from ..plan.spec import ModelSpec, ModuleSpec
from . import llama, opt
from .config import ModelConfig, ModelError, check_unquantised
from .inputs import Ids, Positions, Rows
from .ops import Weight


class Model(Protocol):
    """The forward functions of one model. T rows of packed tokens, E wide; `w` maps a tensor's name to its weight."""

    config: ModelConfig

    def embed(self, w: Mapping[str, Weight], rows: Rows, ids: Ids, positions: Positions, scratch: Scratch) -> Tensor:
        """Ids [T], positions [T] -> hidden states [T, E]."""

    def project(self, w: Mapping[str, Weight], x: Tensor, positions: Positions, scratch: Scratch) -> Tensor:
        """[T, E] -> Q, K and V of all heads one after the other, [T, H + 2 Hkv, D]."""

    def output(self, w: Mapping[str, Weight], x: Tensor, attended: Tensor, scratch: Scratch) -> Tensor:
        """Attention's projection and the residual x: attended [T, H, D], [T, E] -> [T, E]."""

    def mlp(self, w: Mapping[str, Weight], x: Tensor, scratch: Scratch) -> Tensor:
        """Feed-forward network with its residual: [T, E] -> [T, E]."""

    def head_input(self, w: Mapping[str, Weight], x: Tensor, scratch: Scratch) -> Tensor:
        """The input of every part of the head: [B, E] -> [B, width]."""

    def head_columns(self, w: Mapping[str, Weight]) -> slice:
        """The part of the vocabulary that this part of the head makes the logits of."""

    def logits(self, w: Mapping[str, Weight], x: Tensor, out: Tensor, scratch: Scratch) -> None:
        """Write the logits of this part of the vocabulary: [T, width] -> out [T, columns] fp32."""


class Family(NamedTuple):
    """One family; `modules` is given the bytes of a number, `sizes` are published models by name."""

    read_config: Callable[[Mapping[str, Any]], ModelConfig]
    modules: Callable[[ModelConfig, int], list[ModuleSpec]]
    model: Callable[[ModelConfig], Model]
    sizes: Mapping[str, ModelConfig]


FAMILIES: Mapping[str, Family] = {  # by config.json's model_type
    "opt": Family(opt.read_config, opt.modules, opt.OPT, opt.SIZES),
    "llama": Family(llama.read_config, llama.modules, llama.Llama, {}),
}
SIZES = {name: config for family in FAMILIES.values() for name, config in family.sizes.items()}


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face config; raises ModelError for another family or a feature that is not computed here."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ModelError(f"model_type is {kind_of(kind)}; this version runs {', '.join(FAMILIES)} models only")
    check_unquantised(config)
    return FAMILIES[kind].read_config(config)


def config_by_name(name: str) -> ModelConfig | None:
    """The published configuration of "facebook/opt-30b", "opt-30b" and the like; None for an unknown name."""
    return SIZES.get(name.rsplit("/", 1)[-1].lower())


def make_model(config: ModelConfig) -> Model:
    """The forward functions of a model."""
    return FAMILIES[config.family].model(config)


def model_spec(config: ModelConfig, name: str, dtype: str) -> ModelSpec:
    """Everything the planner asks about a model."""
    return ModelSpec(
        name=name,
        family=config.family,
        dtype=dtype,
        hidden=config.hidden,
        num_decoder_layers=config.layers,
        num_heads=config.heads,
        vocab=config.vocab,
        max_positions=config.positions,
        modules=tuple(m.stored_as(dtype) for m in FAMILIES[config.family].modules(config, DTYPE_BYTES[dtype])),
    )


def probe_config(hidden: int, layers: int, heads: int, ffn: int, *, vocab: int, positions: int) -> ModelConfig:
    """A plain decoder of these sizes, for measuring what a machine does with any."""
    return opt.opt_config(hidden, layers, heads, ffn, vocab=vocab, positions=positions)
