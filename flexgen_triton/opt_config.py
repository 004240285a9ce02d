"""FlexGen's `opt_config`: an OPT model's sizes by its name, for scripts written for FlexGen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .models.config import ModelConfig, ModelError
from .models.family import config_by_name
from .models.locate import DEMO, find_model

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
    def of(cls, name: str, config: ModelConfig, dtype: str = "float16") -> OptConfig:
        """The same sizes under FlexGen's names."""
        return cls(
            name=name,
            num_hidden_layers=config.layers,
            max_seq_len=config.positions,
            hidden_size=config.hidden,
            n_head=config.heads,
            input_dim=config.embed_width,
            ffn_embed_dim=config.ffn,
            pad=config.pad_id or 0,
            activation_fn=config.activation,
            vocab_size=config.vocab,
            pad_token_id=config.pad_id or 0,
            dtype=NUMPY_DTYPES.get(dtype, np.float16),
        )

    @property
    def _itemsize(self) -> int:
        return int(np.dtype(self.dtype).itemsize)

    def model_bytes(self) -> int:
        """Bytes of all weights."""
        h, f, e = self.hidden_size, self.ffn_embed_dim, self.input_dim
        layer = 4 * h * (h + 1) + (2 * h * f + f + h) + 4 * h  # attention, MLP, two norms
        tables = self.vocab_size * e + (self.max_seq_len + 2) * h + (2 * e * h if e != h else 0)
        return (self.num_hidden_layers * layer + tables + 2 * h) * self._itemsize

    def cache_bytes(self, batch_size: int, seq_len: int) -> int:
        """Bytes of K and V of all layers."""
        return 2 * self.num_hidden_layers * self.hidden_bytes(batch_size, seq_len)

    def hidden_bytes(self, batch_size: int, seq_len: int) -> int:
        """Bytes of the hidden states between two layers."""
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
        raise ModelError(f"{name!r} is no known size, nor a checkpoint's directory")
    return replace(OptConfig.of(short, config), **fields)


def download_opt_weights(model_name: str, path: str) -> Path:
    """Fetch a model from the hub where neither `path` nor the hub's cache has it; returns the directory that has it.

    Nothing is converted: weights are read as the hub has them. Raises ModelError where the model cannot be had.
    """
    directory = find_model(model_name, path).directory
    if directory is None:
        raise ModelError(f"{model_name} with random weights ({path}) has no directory; there is nothing to fetch")
    return directory


def disable_torch_init() -> None:
    """Let torch's linear layers and layer norms be made without values, for those that are loaded next."""
    for kind in (torch.nn.Linear, torch.nn.LayerNorm):
        if not hasattr(kind.reset_parameters, "original"):
            kind.reset_parameters = _no_values(kind.reset_parameters)  # type: ignore[assignment]


def restore_torch_init() -> None:
    """Undo `disable_torch_init`."""
    for kind in (torch.nn.Linear, torch.nn.LayerNorm):
        kind.reset_parameters = getattr(kind.reset_parameters, "original", kind.reset_parameters)  # type: ignore[method-assign]


def _no_values(original: Callable[[Any], None]) -> Callable[[Any], None]:
    """A method that does nothing and remembers the one whose place it takes."""

    def skip(module: torch.nn.Module) -> None:
        pass

    skip.original = original  # type: ignore[attr-defined]
    return skip
