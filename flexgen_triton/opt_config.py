"""FlexGen's `opt_config`: an OPT model's sizes by its name, for scripts written for FlexGen."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .model_source import DEMO, find_model
from .models.opt import ModelError, OPTConfig, config_by_name

NUMPY_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.float16}  # of bfloat16, the size


@dataclass(frozen=True)
class OptConfig:
    """The sizes of an OPT model, with FlexGen's fields. Bytes are those of `dtype`."""

    name: str = "opt-125m"
    num_hidden_layers: int = 12
    max_seq_len: int = 2048
    hidden_size: int = 768
    n_head: int = 12
    input_dim: int = 768
    ffn_embed_dim: int = 3072
    pad: int = 1
    activation_fn: str = "relu"
    vocab_size: int = 50272
    layer_norm_eps: float = 0.00001
    pad_token_id: int = 1
    dtype: type = np.float16

    @classmethod
    def of(cls, name: str, config: OPTConfig, dtype: str = "float16") -> OptConfig:
        """The same sizes under FlexGen's names."""
        return cls(
            name=name,
            num_hidden_layers=config.num_hidden_layers,
            max_seq_len=config.max_position_embeddings,
            hidden_size=config.hidden_size,
            n_head=config.num_attention_heads,
            input_dim=config.embed_dim,
            ffn_embed_dim=config.ffn_dim,
            pad=config.pad_token_id,
            activation_fn=config.activation_function,
            vocab_size=config.vocab_size,
            pad_token_id=config.pad_token_id,
            dtype=NUMPY_DTYPES.get(dtype, np.float16),
        )

    @property
    def _itemsize(self) -> int:
        return int(np.dtype(self.dtype).itemsize)

    def model_bytes(self) -> int:
        """Of all weights."""
        h, f, e = self.hidden_size, self.ffn_embed_dim, self.input_dim
        block = 4 * h * (h + 1) + (2 * h * f + f + h) + 4 * h  # attention, MLP, two norms
        tables = self.vocab_size * e + (self.max_seq_len + 2) * h + (2 * e * h if e != h else 0)
        return (self.num_hidden_layers * block + tables + 2 * h) * self._itemsize

    def cache_bytes(self, batch_size: int, seq_len: int) -> int:
        """Of K and V of all layers."""
        return 2 * self.num_hidden_layers * self.hidden_bytes(batch_size, seq_len)

    def hidden_bytes(self, batch_size: int, seq_len: int) -> int:
        """Of the hidden states between two layers."""
        return batch_size * seq_len * self.hidden_size * self._itemsize


def get_opt_config(name: str, **fields: Any) -> OptConfig:
    """The sizes of "facebook/opt-30b", "opt-30b" and the like, or of a checkpoint's directory; `fields` replace some.

    Raises ModelError for a name that is neither.
    """
    if name == DEMO or (Path(name).expanduser() / "config.json").is_file():
        source = find_model(name)
        return replace(OptConfig.of(name, source.config, source.dtype), **fields)
    short = name.rsplit("/", 1)[-1].lower()
    config = config_by_name(short.replace("-iml-max", "").replace("-iml", ""))  # fine-tuned, of the same sizes
    if config is None:
        raise ModelError(f"{name!r} is no known OPT size, nor a checkpoint's directory")
    return replace(OptConfig.of(short, config), **fields)
