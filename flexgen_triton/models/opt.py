"""OPT (Zhang et al., 2022): sizes 125M to 175B, post-norm and projected embeddings (350M), Galactica.

A layer is a function of (hidden states, weights, attention); it owns nothing, and takes its results from `scratch`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..memory.scratch import Scratch
from ..plan.json_file import kind_of
from ..plan.spec import DTYPE_BYTES, ModelSpec, ModuleSpec, TensorSpec
from . import ops
from .config import (
    MAX_FFN,
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_VOCAB,
    MAX_WIDTH,
    WAY_OUT,
    Check,
    check_size,
    check_tokens,
    check_unquantised,
    flag,
    read_fields,
    token,
    whole,
    word,
)
from .config import ModelError as ModelError
from .ops import Matrix, Weight

POSITION_OFFSET = 2  # OPT's position table starts with two rows that are never used
MIN_HEAD_PART_BYTES = 32 << 20

Ids = npt.NDArray[np.int64]
Rows = Callable[[str, Ids], Tensor]  # table name, ids [T] -> [T, width], the caller's to overwrite


REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "ffn_dim")
TOKENS = ("eos_token_id", "bos_token_id", "pad_token_id")
FIELDS: dict[str, Check] = {
    "hidden_size": whole(1, MAX_WIDTH),
    "num_hidden_layers": whole(1, MAX_LAYERS),
    "num_attention_heads": whole(1, MAX_WIDTH),
    "ffn_dim": whole(1, MAX_FFN),
    "vocab_size": whole(1, MAX_VOCAB),
    "word_embed_proj_dim": whole(1, MAX_WIDTH),
    "max_position_embeddings": whole(1, MAX_POSITIONS),
    "do_layer_norm_before": flag,
    "_remove_final_layer_norm": flag,
    "enable_bias": flag,
    "layer_norm_elementwise_affine": flag,
    "activation_function": word(ops.ACTIVATIONS),
    "tie_word_embeddings": flag,
    **dict.fromkeys(TOKENS, token),
}


@dataclass(frozen=True, slots=True)
class OPTConfig:
    """The fields of OPT's config.json that decide shapes and arithmetic, under their Hugging Face names."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    ffn_dim: int
    vocab_size: int = 50272
    word_embed_proj_dim: int = 0  # 0: hidden_size
    max_position_embeddings: int = 2048
    do_layer_norm_before: bool = True
    final_layer_norm: bool = True
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    activation_function: str = "relu"
    tie_word_embeddings: bool = True
    eos_token_id: int = 2
    bos_token_id: int = 2
    pad_token_id: int = 1

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def embed_dim(self) -> int:
        return self.word_embed_proj_dim or self.hidden_size

    @property
    def num_parameters(self) -> int:
        """Elements of its matrices and tables; vectors are left out."""
        layer = 4 * self.hidden_size**2 + 2 * self.hidden_size * self.ffn_dim
        tables = self.vocab_size * self.embed_dim + self.max_position_embeddings * self.hidden_size
        return self.num_hidden_layers * layer + tables

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> OPTConfig:
        """Read a Hugging Face config; raises ModelError for another family or a feature we do not compute."""
        if config.get("model_type") != "opt":
            raise ModelError(f"model_type is {kind_of(config.get('model_type'))}; this version runs OPT models only")
        check_unquantised(config)
        found = read_fields(config, FIELDS, REQUIRED)
        removed = found.pop("_remove_final_layer_norm", False)
        known = cls(**found, final_layer_norm=found.get("do_layer_norm_before", True) and not removed)
        if known.hidden_size % known.num_attention_heads:
            raise ModelError(
                f"hidden_size {known.hidden_size} is not a multiple of {known.num_attention_heads} heads: {WAY_OUT}"
            )
        check_tokens({name: found[name] for name in TOKENS if name in found}, known.vocab_size)
        check_size(known.num_parameters)
        return known


def _size(hidden: int, layers: int, heads: int, **more: Any) -> OPTConfig:
    return OPTConfig(hidden, layers, heads, 4 * hidden, **more)


SIZES = {
    "opt-125m": _size(768, 12, 12),
    "opt-350m": _size(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False, final_layer_norm=False),
    "opt-1.3b": _size(2048, 24, 32),
    "opt-2.7b": _size(2560, 32, 32),
    "opt-6.7b": _size(4096, 32, 32),
    "opt-13b": _size(5120, 40, 40),
    "opt-30b": _size(7168, 48, 56),
    "opt-66b": _size(9216, 64, 72),
    "opt-175b": _size(12288, 96, 96),
    "opt-175b-stage": _size(12288, 24, 96),  # a quarter of its layers, as one of four machines has them
    "galactica-30b": _size(7168, 48, 56, vocab_size=50000, activation_function="gelu", bos_token_id=0),
}


def config_by_name(name: str) -> OPTConfig | None:
    """The published configuration of "facebook/opt-30b", "opt-30b" and the like; None for an unknown name."""
    return SIZES.get(name.rsplit("/", 1)[-1].lower())


def model_spec(config: OPTConfig, name: str, dtype: str) -> ModelSpec:
    """Everything the planner asks about an OPT model."""
    modules = [_embed(config)]
    for n in range(config.num_hidden_layers):
        modules += [_attention(config, n), _mlp(config, n)]
    modules += _head(config, DTYPE_BYTES[dtype])
    return ModelSpec(
        name=name,
        family="opt",
        dtype=dtype,
        hidden=config.hidden_size,
        num_decoder_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        ffn=config.ffn_dim,
        vocab=config.vocab_size,
        max_positions=config.max_position_embeddings,
        modules=tuple(m.stored_as(dtype) for m in modules),
    )


def _matrix(name: str, shape: tuple[int, int], *sources: str) -> TensorSpec:
    rows = (shape[0] // len(sources),) * len(sources)
    return TensorSpec(name, shape, sources, rows)


def _table(name: str, shape: tuple[int, int], source: str) -> TensorSpec:
    return TensorSpec(name, shape, (source,), shape[:1], gathered=True, exact=True)


def _linear(config: OPTConfig, name: str, shape: tuple[int, int], *sources: str) -> list[TensorSpec]:
    tensors = [_matrix(f"{name}.weight", shape, *(f"{s}.weight" for s in sources))]
    if config.enable_bias:
        rows = (shape[0] // len(sources),) * len(sources)
        tensors.append(TensorSpec(f"{name}.bias", (shape[0],), tuple(f"{s}.bias" for s in sources), rows))
    return tensors


def _norm(config: OPTConfig, name: str, source: str) -> list[TensorSpec]:
    if not config.layer_norm_elementwise_affine:
        return []
    shape = (config.hidden_size,)
    return [TensorSpec(f"{name}.{p}", shape, (f"{source}.{p}",), shape) for p in ("weight", "bias")]


def _embed(config: OPTConfig) -> ModuleSpec:
    hidden, width = config.hidden_size, config.embed_dim
    rows = config.max_position_embeddings + POSITION_OFFSET
    tensors = [_table("positions.weight", (rows, hidden), "decoder.embed_positions.weight")]
    if not config.tie_word_embeddings:
        tensors.append(_table("tokens.weight", (config.vocab_size, width), "decoder.embed_tokens.weight"))
    if width != hidden:
        tensors.append(_matrix("project_in.weight", (hidden, width), "decoder.project_in.weight"))
    return ModuleSpec("embed", 0, tuple(tensors))


def _attention(config: OPTConfig, n: int) -> ModuleSpec:
    hidden, at = config.hidden_size, f"decoder.layers.{n}"
    before = [
        *_norm(config, "attention_norm", f"{at}.self_attn_layer_norm"),
        *_linear(config, "qkv", (3 * hidden, hidden), *(f"{at}.self_attn.{p}_proj" for p in "qkv")),
    ]
    after = _linear(config, "out", (hidden, hidden), f"{at}.self_attn.out_proj")
    return ModuleSpec("attention", n, (*(replace(t, projects=True) for t in before), *after))


def _mlp(config: OPTConfig, n: int) -> ModuleSpec:
    hidden, ffn, at = config.hidden_size, config.ffn_dim, f"decoder.layers.{n}"
    tensors = [
        *_norm(config, "mlp_norm", f"{at}.final_layer_norm"),
        *_linear(config, "fc1", (ffn, hidden), f"{at}.fc1"),
        *_linear(config, "fc2", (hidden, ffn), f"{at}.fc2"),
    ]
    return ModuleSpec("mlp", n, tuple(tensors))


def _head(config: OPTConfig, itemsize: int) -> list[ModuleSpec]:
    """The output projection, in parts no larger than a decoder layer's MLP, so that the ring need not hold it whole."""
    width, vocab = config.embed_dim, config.vocab_size
    tied = config.tie_word_embeddings
    name, source = ("tokens.weight", "decoder.embed_tokens.weight") if tied else ("lm_head.weight", "lm_head.weight")
    limit = max(2 * config.hidden_size * config.ffn_dim * itemsize, MIN_HEAD_PART_BYTES)
    count = -(-vocab * width * itemsize // limit)
    cuts = [vocab * n // count for n in range(count + 1)]
    modules = []
    for n, (low, high) in enumerate(pairwise(cuts)):
        first: list[TensorSpec] = []
        if n == 0 and config.final_layer_norm:
            first += _norm(config, "final_norm", "decoder.final_layer_norm")
        if n == 0 and width != config.hidden_size:
            first.append(_matrix("project_out.weight", (width, config.hidden_size), "decoder.project_out.weight"))
        rows = TensorSpec(name, (high - low, width), (source,), (high - low,), row=low, exact=True)
        modules.append(ModuleSpec("head", n, (*first, rows)))
    return modules


class OPT:
    """The forward functions of one OPT model. `w` maps a tensor's name to a Matrix or to a vector."""

    def __init__(self, config: OPTConfig) -> None:
        self.config = config
        self._projected = config.embed_dim != config.hidden_size
        self._head_weight = "tokens.weight" if config.tie_word_embeddings else "lm_head.weight"

    def embed(self, w: Mapping[str, Weight], rows: Rows, tokens: Ids, positions: Ids, scratch: Scratch) -> Tensor:
        """Token and position embeddings: ids [T], positions [T] -> [T, E]."""
        x = rows("tokens.weight", tokens)
        if self._projected:
            x = ops.linear(x, w["project_in.weight"], scratch=scratch)
        return x.add_(rows("positions.weight", positions + POSITION_OFFSET))

    def project(self, w: Mapping[str, Weight], x: Tensor, scratch: Scratch) -> Tensor:
        """What attention is made from: [T, E] -> Q, K and V of all heads one after the other, [T, 3 H, D]."""
        h = self._norm(w, "attention_norm", x, scratch) if self.config.do_layer_norm_before else x
        return self._linear(w, "qkv", h, scratch).view(len(x), -1, self.config.head_dim)

    def output(self, w: Mapping[str, Weight], x: Tensor, attended: Tensor, scratch: Scratch) -> Tensor:
        """What follows attention, and the residual x: attended [T, H, D], [T, E] -> [T, E]."""
        y = self._linear(w, "out", attended.reshape(len(x), -1), scratch, residual=x)
        return y if self.config.do_layer_norm_before else self._norm(w, "attention_norm", y, scratch)

    def mlp(self, w: Mapping[str, Weight], x: Tensor, scratch: Scratch) -> Tensor:
        """Feed-forward network with its residual: [T, E] -> [T, E]."""
        before = self.config.do_layer_norm_before
        h = self._norm(w, "mlp_norm", x, scratch) if before else x
        inner = self._linear(w, "fc1", h, scratch, activation=self.config.activation_function)
        y = self._linear(w, "fc2", inner, scratch, residual=x)
        return y if before else self._norm(w, "mlp_norm", y, scratch)

    def head_input(self, w: Mapping[str, Weight], x: Tensor, scratch: Scratch) -> Tensor:
        """What every part of the head multiplies: final norm and projection, [B, E] -> [B, width]."""
        if self.config.final_layer_norm:
            x = self._norm(w, "final_norm", x, scratch)
        return ops.linear(x, w["project_out.weight"], scratch=scratch) if self._projected else x

    def head_columns(self, w: Mapping[str, Weight]) -> slice:
        """The part of the vocabulary that this part of the head makes the logits of."""
        weight = self._head(w)
        return slice(weight.row, weight.row + weight.rows)

    def logits(self, w: Mapping[str, Weight], x: Tensor, out: Tensor, scratch: Scratch) -> None:
        """Write the logits of this part of the vocabulary: [T, width] -> out [T, columns] fp32."""
        ops.linear_into(x, self._head(w), out, scratch=scratch)

    def _head(self, w: Mapping[str, Weight]) -> Matrix:
        weight = w[self._head_weight]
        assert isinstance(weight, Matrix), self._head_weight
        return weight

    def _linear(
        self,
        w: Mapping[str, Weight],
        name: str,
        x: Tensor,
        scratch: Scratch,
        *,
        activation: str | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        bias = _vector(w, f"{name}.bias", scratch) if self.config.enable_bias else None
        weight = w[f"{name}.weight"]
        return ops.linear(x, weight, bias, activation=activation, residual=residual, scratch=scratch)

    def _norm(self, w: Mapping[str, Weight], name: str, x: Tensor, scratch: Scratch) -> Tensor:
        if not self.config.layer_norm_elementwise_affine:
            return ops.layer_norm(x, None, None, scratch)
        weight, bias = (_vector(w, f"{name}.{part}", scratch) for part in ("weight", "bias"))
        return ops.layer_norm(x, weight, bias, scratch)


def _vector(w: Mapping[str, Weight], name: str, scratch: Scratch) -> Tensor:
    weight = w[name]
    assert isinstance(weight, Matrix), name
    return weight.vector(scratch)
