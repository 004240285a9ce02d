"""Tiny random checkpoints, and what transformers generates from them one prompt at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
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
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(4, config.vocab_size, (n,), generator=generator).tolist() for n in PROMPT_LENS]
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
