"""Llama (Touvron et al., 2023): RMS norms, rotary positions, grouped queries, a gated MLP.

A layer is a function of hidden states and weights; it owns nothing, and takes its results from `scratch`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..memory.scratch import Scratch
from ..plan.json_file import kind_of
from ..plan.spec import EMBED, MLP, ModuleSpec, StageSpec, State
from . import config as checks
from . import ops, parts
from .config import Check, ModelConfig, ModelError, flag, tokens, whole, word
from .inputs import Ids, Positions, Rows
from .ops import Weight

REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
FIELDS: dict[str, tuple[str, Check]] = {  # config.json's name: ours and what it may be
    "hidden_size": ("hidden", whole(1, checks.MAX_WIDTH)),
    "num_hidden_layers": ("layers", whole(1, checks.MAX_LAYERS)),
    "num_attention_heads": ("heads", whole(1, checks.MAX_WIDTH)),
    "num_key_value_heads": ("kv_heads", whole(1, checks.MAX_WIDTH)),
    "head_dim": ("head_dim", whole(2, checks.MAX_WIDTH)),
    "intermediate_size": ("ffn", whole(1, checks.MAX_FFN)),
    "vocab_size": ("vocab", whole(1, checks.MAX_VOCAB)),
    "max_position_embeddings": ("positions", whole(1, checks.MAX_POSITIONS)),
    "rms_norm_eps": ("eps", checks.number(0, 1)),
    "rope_theta": ("rope_theta", checks.number(1, 1e12)),
    "hidden_act": ("activation", word(ops.ACTIVATIONS)),
    "tie_word_embeddings": ("tied", flag),
    "eos_token_id": ("eos_ids", tokens),
}
DEFAULTS = {"positions": 2048, "eps": 1e-6, "rope_theta": 1e4, "activation": "silu", "tied": False, "eos_ids": (2,)}


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face config; raises ModelError for a value that cannot be and for features of other models."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    biases = {name: config.get(name) for name in ("attention_bias", "mlp_bias")}
    for name, value in {"rope_type": kind, **biases}.items():
        if value not in ("default", False, None):
            raise ModelError(f"{name} is {kind_of(value)}; this version does not compute it")
    values = {"rope_theta": rope.get("rope_theta"), **config}
    found = checks.read_fields(values, {name: check for name, (_, check) in FIELDS.items()}, REQUIRED)
    fields = {**DEFAULTS, **{FIELDS[name][0]: value for name, value in found.items()}}
    fields = {"kv_heads": (heads := fields["heads"]), "head_dim": fields["hidden"] // heads, **fields}
    if heads % fields["kv_heads"] or fields["head_dim"] % 2:
        raise ModelError(
            f"num_attention_heads is {heads}, num_key_value_heads {fields['kv_heads']}, head_dim {fields['head_dim']}; "
            f"the second must divide the first and the third be even: {checks.WAY_OUT}"
        )
    read = ModelConfig("llama", biases=False, gated=True, **fields)
    checks.check_tokens({"eos_token_id": read.eos_ids}, read.vocab)
    checks.check_size(read.num_parameters)
    return read


def modules(config: ModelConfig, itemsize: int) -> list[ModuleSpec]:
    """All modules in order, in numbers of `itemsize` bytes."""
    found = [_embed(config, itemsize)]
    for n in range(config.layers):
        found += [_attention(config, n, itemsize), _mlp(config, n, itemsize)]
    first = [parts.vector("final_norm.weight", config.hidden, "norm.weight")]
    return found + parts.head(config, itemsize, first, "embed_tokens.weight")


def _embed(config: ModelConfig, itemsize: int) -> ModuleSpec:
    shape = (config.vocab, config.hidden)
    tensors = () if config.tied else (parts.table("tokens.weight", shape, "embed_tokens.weight"),)
    results = parts.result_numbers(tensors, 2 * config.hidden)
    stage = StageSpec(EMBED, tensors, 2 * config.hidden * itemsize, results, lookups=("tokens",))
    return parts.module(EMBED, 0, stage)


def _attention(config: ModelConfig, n: int, itemsize: int) -> ModuleSpec:
    hidden, dim, at = config.hidden, config.head_dim, f"layers.{n}"
    rows = (config.heads * dim, config.kv_heads * dim, config.kv_heads * dim)
    qkv = (f"{at}.self_attn.{p}_proj.weight" for p in "qkv")
    before = [
        parts.vector("attention_norm.weight", hidden, f"{at}.input_layernorm.weight"),
        parts.matrix("qkv.weight", (sum(rows), hidden), *qkv, rows=rows),
    ]
    after = [parts.matrix("out.weight", (hidden, rows[0]), f"{at}.self_attn.o_proj.weight")]
    passes = (3 * hidden + 4 * sum(rows)) * itemsize, 3 * hidden * itemsize
    state = State(config.kv_heads, dim)
    return parts.attention(n, before, after, passes=passes, hidden=hidden, state=state, positions=True)


def _mlp(config: ModelConfig, n: int, itemsize: int) -> ModuleSpec:
    hidden, ffn, at = config.hidden, config.ffn, f"layers.{n}.mlp"
    tensors = (
        parts.vector("mlp_norm.weight", hidden, f"layers.{n}.post_attention_layernorm.weight"),
        parts.matrix("gate_up.weight", (2 * ffn, hidden), f"{at}.gate_proj.weight", f"{at}.up_proj.weight"),
        parts.matrix("down.weight", (hidden, ffn), f"{at}.down_proj.weight"),
    )
    results = parts.result_numbers(tensors, 2 * hidden) + ffn
    return parts.module(MLP, n, StageSpec(MLP, tensors, (6 * hidden + 6 * ffn) * itemsize, results, widest=3 * ffn))


class Llama:
    """The forward functions of one Llama model. `w` maps a tensor's name to its weight."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._head_weight = parts.head_name(config)

    def embed(self, w: Mapping[str, Weight], rows: Rows, ids: Ids, positions: Positions, scratch: Scratch) -> Tensor:
        return rows("tokens.weight", ids)

    def project(self, w: Mapping[str, Weight], x: Tensor, positions: Positions, scratch: Scratch) -> Tensor:
        h = self._norm(w, "attention_norm", x, scratch)
        qkv = ops.linear(h, w["qkv.weight"], scratch=scratch).view(len(x), -1, self.config.head_dim)
        assert self.config.rope_theta is not None
        turned = qkv[:, : self.config.heads + self.config.kv_heads]
        ops.rotate(turned, positions.on_device, self.config.rope_theta, scratch)
        return qkv

    def output(self, w: Mapping[str, Weight], x: Tensor, attended: Tensor, scratch: Scratch) -> Tensor:
        return ops.linear(attended.reshape(len(x), -1), w["out.weight"], residual=x, scratch=scratch)

    def mlp(self, w: Mapping[str, Weight], x: Tensor, scratch: Scratch) -> Tensor:
        inner = ops.linear(self._norm(w, "mlp_norm", x, scratch), w["gate_up.weight"], scratch=scratch)
        inner = ops.gated(inner, self.config.activation, scratch)
        return ops.linear(inner, w["down.weight"], residual=x, scratch=scratch)

    def head_input(self, w: Mapping[str, Weight], x: Tensor, scratch: Scratch) -> Tensor:
        return self._norm(w, "final_norm", x, scratch)

    def head_columns(self, w: Mapping[str, Weight]) -> slice:
        return parts.head_columns(w, self._head_weight)

    def logits(self, w: Mapping[str, Weight], x: Tensor, out: Tensor, scratch: Scratch) -> None:
        parts.logits(w, self._head_weight, x, out, scratch)

    def _norm(self, w: Mapping[str, Weight], name: str, x: Tensor, scratch: Scratch) -> Tensor:
        return ops.rms_norm(x, parts.as_vector(w, f"{name}.weight", scratch), self.config.eps, scratch)
