"""Tiny random checkpoints, and what transformers generates from them one prompt at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from made_once import made_once
from safetensors.torch import load_file, save_file
from transformers import OPTConfig, OPTForCausalLM, PreTrainedModel

PROMPT_LENS = (33, 1, 17, 70, 5, 12, 9)
NEW_TOKENS = 10

MODELS = {
    "pre-norm, 3 heads of 64": {"hidden_size": 192, "num_attention_heads": 3, "ffn_dim": 320, "vocab_size": 1003},
    "post-norm, projected": {
        "hidden_size": 128,
        "num_attention_heads": 2,
        "ffn_dim": 200,
        "vocab_size": 517,
        "word_embed_proj_dim": 72,
        "do_layer_norm_before": False,
    },
    "heads of 80, gelu": {
        "hidden_size": 240,
        "num_attention_heads": 3,
        "ffn_dim": 256,
        "vocab_size": 301,
        "activation_function": "gelu",
    },
    "heads of 128, untied": {
        "hidden_size": 128,
        "num_attention_heads": 1,
        "ffn_dim": 512,
        "vocab_size": 999,
        "tie_word_embeddings": False,
    },
    "no biases, plain norms": {
        "hidden_size": 128,
        "num_attention_heads": 2,
        "ffn_dim": 128,
        "vocab_size": 401,
        "enable_bias": False,
        "layer_norm_elementwise_affine": False,
    },
}


@dataclass(frozen=True)
class Tiny:
    """A checkpoint on disk, prompts for it, and the reference's greedy tokens and logits."""

    path: Path
    prompts: list[list[int]]
    tokens: list[list[int]]
    logits: list[torch.Tensor]  # [NEW_TOKENS, V] of each prompt


def make_prompts(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(4, vocab_size, (n,), generator=generator).tolist() for n in PROMPT_LENS]


def make_tiny(path: Path, fields: dict[str, object]) -> Tiny:
    torch.manual_seed(7)
    base = {"num_hidden_layers": 3, "max_position_embeddings": 128, "word_embed_proj_dim": fields["hidden_size"]}
    config = OPTConfig(**{**base, **fields}, init_std=0.15, dropout=0.0)
    model = OPTForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
    model.save_pretrained(path)
    prompts = make_prompts(config.vocab_size)
    return Tiny(path, prompts, *answers(model, prompts))


def answers(model: PreTrainedModel, prompts: list[list[int]]) -> tuple[list[list[int]], list[torch.Tensor]]:
    """The greedy tokens of each prompt, and their logits [NEW_TOKENS, V]."""
    tokens, logits = [], []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens.append(out.sequences[0, len(prompt) :].tolist())
        logits.append(torch.cat(out.logits).float())
    return tokens, logits


class TinyModels(Mapping[str, Tiny]):
    """Every architecture of MODELS, made when first asked for, in a folder that other processes may share."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._found: dict[str, Tiny] = {}

    def __getitem__(self, name: str) -> Tiny:
        if name not in self._found:
            self._found[name] = self._find(name)
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(MODELS)

    def __len__(self) -> int:
        return len(MODELS)

    def _find(self, name: str) -> Tiny:
        number, fields = list(MODELS).index(name), MODELS[name]

        def make(folder: Path) -> None:
            tiny = make_tiny(folder / f"opt-{number}", fields)
            reference = {"tokens": torch.tensor(tiny.tokens), "logits": torch.stack(tiny.logits)}
            save_file(reference, folder / "reference.safetensors")

        folder = made_once(self._root / f"tiny-{number}", make)
        reference = load_file(folder / "reference.safetensors")
        prompts = make_prompts(fields["vocab_size"])
        return Tiny(folder / f"opt-{number}", prompts, reference["tokens"].tolist(), list(reference["logits"]))
