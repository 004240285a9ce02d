"""OPT (Zhang et al., 2022): sizes 125M to 175B, post-norm and projected embeddings (350M), Galactica.

A layer is a function of hidden states and weights; it owns nothing, and takes its results from `scratch`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..memory.scratch import Scratch
from ..plan.spec import EMBED, MLP, ModuleSpec, StageSpec, State, TensorSpec
from . import ops, parts
from .config import (
    MAX_FFN,
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_VOCAB,
    MAX_WIDTH,
    WAY_OUT,
    Check,
    ModelConfig,
    ModelError,
    check_size,
    check_tokens,
    flag,
    read_fields,
    token,
    tokens,
    whole,
    word,
)
from .inputs import Ids, Positions, Rows
from .ops import Weight

POSITION_OFFSET = 2  # OPT's position table starts with two rows that are never used

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
    "eos_token_id": tokens,
    **dict.fromkeys(TOKENS[1:], token),
}
NAMES = {  # of fields that are taken as they are
    "hidden_size": "hidden",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "ffn_dim": "ffn",
    "vocab_size": "vocab",
    "word_embed_proj_dim": "embed_dim",
    "max_position_embeddings": "positions",
    "do_layer_norm_before": "norm_first",
    "enable_bias": "biases",
    "layer_norm_elementwise_affine": "norm_affine",
    "activation_function": "activation",
    "tie_word_embeddings": "tied",
    "eos_token_id": "eos_ids",
    "bos_token_id": "bos_id",
    "pad_token_id": "pad_id",
}


def opt_config(hidden: int, layers: int, heads: int, ffn: int, **more: Any) -> ModelConfig:
    """A model of these sizes, in all else like OPT-125M unless `more` fields say otherwise."""
    norm_first = more.get("norm_first", True)
    common: dict[str, Any] = {
        "vocab": 50272,
        "positions": 2048,
        "activation": "relu",
        "eos_ids": (2,),
        "bos_id": 2,
        "pad_id": 1,
        "final_norm": norm_first,
    }
    found = ModelConfig("opt", hidden, layers, heads, heads, hidden // heads, ffn, **{**common, **more})
    return replace(found, embed_dim=0) if found.embed_dim == hidden else found


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face config; raises ModelError for a value that cannot be."""
    found = read_fields(config, FIELDS, REQUIRED)
    removed = found.pop("_remove_final_layer_norm", False)
    if found["hidden_size"] % found["num_attention_heads"]:
        raise ModelError(
            f"hidden_size {found['hidden_size']} is not a multiple of {found['num_attention_heads']} heads: {WAY_OUT}"
        )
    known = opt_config(**{NAMES[name]: value for name, value in found.items()})
    known = replace(known, final_norm=known.final_norm and not removed)
    check_tokens({name: found[name] for name in TOKENS if name in found}, known.vocab)
    check_size(known.num_parameters)
    return known


def _size(hidden: int, layers: int, heads: int, **more: Any) -> ModelConfig:
    return opt_config(hidden, layers, heads, 4 * hidden, **more)


SIZES = {
    "opt-125m": _size(768, 12, 12),
    "opt-350m": _size(1024, 24, 16, embed_dim=512, norm_first=False),
    "opt-1.3b": _size(2048, 24, 32),
    "opt-2.7b": _size(2560, 32, 32),
    "opt-6.7b": _size(4096, 32, 32),
    "opt-13b": _size(5120, 40, 40),
    "opt-30b": _size(7168, 48, 56),
    "opt-66b": _size(9216, 64, 72),
    "opt-175b": _size(12288, 96, 96),
    "opt-175b-stage": _size(12288, 24, 96),  # a quarter of its layers, as one of four machines has them
    "galactica-30b": _size(7168, 48, 56, vocab=50000, activation="gelu", bos_id=0),
}

# Modules


def modules(config: ModelConfig, itemsize: int) -> list[ModuleSpec]:
    """All modules in order, in numbers of `itemsize` bytes."""
    found = [_embed(config, itemsize)]
    for n in range(config.layers):
        found += [_attention(config, n, itemsize), _mlp(config, n, itemsize)]
    first = _norm(config, "final_norm", "decoder.final_layer_norm") if config.final_norm else []
    if config.embed_dim:
        shape = (config.embed_dim, config.hidden)
        first.append(parts.matrix("project_out.weight", shape, "decoder.project_out.weight"))
    return found + parts.head(config, itemsize, first, "decoder.embed_tokens.weight")


def _linear(config: ModelConfig, name: str, shape: tuple[int, int], *sources: str) -> list[TensorSpec]:
    tensors = [parts.matrix(f"{name}.weight", shape, *(f"{s}.weight" for s in sources))]
    if config.biases:
        tensors.append(parts.vector(f"{name}.bias", shape[0], *(f"{s}.bias" for s in sources)))
    return tensors


def _norm(config: ModelConfig, name: str, source: str) -> list[TensorSpec]:
    if not config.norm_affine:
        return []
    return [parts.vector(f"{name}.{p}", config.hidden, f"{source}.{p}") for p in ("weight", "bias")]


def _embed(config: ModelConfig, itemsize: int) -> ModuleSpec:
    hidden, width = config.hidden, config.embed_width
    rows = config.positions + POSITION_OFFSET
    tensors = [parts.table("positions.weight", (rows, hidden), "decoder.embed_positions.weight")]
    if not config.tied:
        tensors.append(parts.table("tokens.weight", (config.vocab, width), "decoder.embed_tokens.weight"))
    if config.embed_dim:
        tensors.append(parts.matrix("project_in.weight", (hidden, width), "decoder.project_in.weight"))
    results = parts.result_numbers(tensors, 2 * hidden)
    stage = StageSpec(EMBED, tuple(tensors), 6 * hidden * itemsize, results, lookups=("positions", "tokens"))
    return parts.module(EMBED, 0, stage)


def _attention(config: ModelConfig, n: int, itemsize: int) -> ModuleSpec:
    hidden, at = config.hidden, f"decoder.layers.{n}"
    before = [
        *_norm(config, "attention_norm", f"{at}.self_attn_layer_norm"),
        *_linear(config, "qkv", (3 * hidden, hidden), *(f"{at}.self_attn.{p}_proj" for p in "qkv")),
    ]
    after = _linear(config, "out", (hidden, hidden), f"{at}.self_attn.out_proj")
    passes = 8 * hidden * itemsize, 4 * hidden * itemsize
    state = State(config.kv_heads, config.head_dim)
    return parts.attention(n, before, after, passes=passes, hidden=hidden, state=state)


def _mlp(config: ModelConfig, n: int, itemsize: int) -> ModuleSpec:
    hidden, ffn, at = config.hidden, config.ffn, f"decoder.layers.{n}"
    tensors = (
        *_norm(config, "mlp_norm", f"{at}.final_layer_norm"),
        *_linear(config, "fc1", (ffn, hidden), f"{at}.fc1"),
        *_linear(config, "fc2", (hidden, ffn), f"{at}.fc2"),
    )
    passes = (6 * hidden + 4 * ffn) * itemsize
    return parts.module(MLP, n, StageSpec(MLP, tensors, passes, parts.result_numbers(tensors, 2 * hidden), widest=ffn))


class OPT:
    """The forward functions of one OPT model. `w` maps a tensor's name to its weight."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._head_weight = parts.head_name(config)

    def embed(self, w: Mapping[str, Weight], rows: Rows, ids: Ids, positions: Positions, scratch: Scratch) -> Tensor:
        """Token and position embeddings: ids [T], positions [T] -> [T, E]."""
        x = rows("tokens.weight", ids)
        if self.config.embed_dim:
            x = ops.linear(x, w["project_in.weight"], scratch=scratch)
        return x.add_(rows("positions.weight", positions.ids + POSITION_OFFSET))

    def project(self, w: Mapping[str, Weight], x: Tensor, positions: Positions, scratch: Scratch) -> Tensor:
        """Q, K and V of all heads one after the other: [T, E] -> [T, 3 H, D]."""
        h = self._norm(w, "attention_norm", x, scratch) if self.config.norm_first else x
        return self._linear(w, "qkv", h, scratch).view(len(x), -1, self.config.head_dim)

    def output(self, w: Mapping[str, Weight], x: Tensor, attended: Tensor, scratch: Scratch) -> Tensor:
        """Attention's projection and the residual x: attended [T, H, D], [T, E] -> [T, E]."""
        y = self._linear(w, "out", attended.reshape(len(x), -1), scratch, residual=x)
        return y if self.config.norm_first else self._norm(w, "attention_norm", y, scratch)

    def mlp(self, w: Mapping[str, Weight], x: Tensor, scratch: Scratch) -> Tensor:
        """Feed-forward network with its residual: [T, E] -> [T, E]."""
        before = self.config.norm_first
        h = self._norm(w, "mlp_norm", x, scratch) if before else x
        inner = self._linear(w, "fc1", h, scratch, activation=self.config.activation)
        y = self._linear(w, "fc2", inner, scratch, residual=x)
        return y if before else self._norm(w, "mlp_norm", y, scratch)

    def head_input(self, w: Mapping[str, Weight], x: Tensor, scratch: Scratch) -> Tensor:
        """The input of every part of the head, by final norm and projection: [B, E] -> [B, width]."""
        if self.config.final_norm:
            x = self._norm(w, "final_norm", x, scratch)
        return ops.linear(x, w["project_out.weight"], scratch=scratch) if self.config.embed_dim else x

    def head_columns(self, w: Mapping[str, Weight]) -> slice:
        """The part of the vocabulary that this part of the head makes the logits of."""
        return parts.head_columns(w, self._head_weight)

    def logits(self, w: Mapping[str, Weight], x: Tensor, out: Tensor, scratch: Scratch) -> None:
        """Write the logits of this part of the vocabulary: [T, width] -> out [T, columns] fp32."""
        parts.logits(w, self._head_weight, x, out, scratch)

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
        bias = parts.as_vector(w, f"{name}.bias", scratch) if self.config.biases else None
        weight = w[f"{name}.weight"]
        return ops.linear(x, weight, bias, activation=activation, residual=residual, scratch=scratch)

    def _norm(self, w: Mapping[str, Weight], name: str, x: Tensor, scratch: Scratch) -> Tensor:
        if not self.config.norm_affine:
            return ops.layer_norm(x, None, None, scratch)
        weight, bias = (parts.as_vector(w, f"{name}.{part}", scratch) for part in ("weight", "bias"))
        return ops.layer_norm(x, weight, bias, scratch)
