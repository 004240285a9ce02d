"""OPT in plain torch, slow and obvious: what the engine must compute with 4-bit weights, a 4-bit cache and sparse V.

Built from the state dict of transformers' OPTForCausalLM, one sequence at a time, in fp32. It shares the 4-bit format
with the engine and nothing else. With no option set it is transformers' model (tests/test_reference_opt.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM
from transformers.activations import ACT2FN

from flexgen_triton.kernels.formats import (
    SEARCHED,
    dequantize_kv,
    dequantize_weight,
    quantize_kv,
    quantize_weight,
)

POSITION_OFFSET = 2  # the position table's first two rows are never used
LINEARS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "project_in", "project_out")

Transform = Callable[[Tensor], Tensor]  # a matrix [N, K] -> [N, K]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer, q, k, v [T, H, D] -> [T, H, D]


@dataclass(frozen=True, slots=True)
class Options:
    """Departures from plain fp32.

    The matrices of LINEARS are quantised to P16 in groups of `weight_group` along K, or go through `transform`;
    embeddings and output projection stay. `sparsity` is the share of earlier tokens whose V counts in decode. With a
    `dtype` of 16 bits all weights and every operation's result are rounded to it, while sums stay in fp32: the
    arithmetic of 16-bit kernels. In fp64 a result does not depend, even on the edge between two 4-bit codes, on how
    many rows a product has and in which order this processor adds.
    """

    weight_group: int | None = None
    transform: Transform | None = None
    kv_quantised: bool = False
    sparsity: float = 1.0
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.weight_group and self.transform:
            raise ValueError("weight_group is a transform already; give one of the two")

    @property
    def sums(self) -> torch.dtype:
        """The dtype that sums are made and results held in."""
        return torch.promote_types(self.dtype, torch.float32)


def grouped_along_k(weight: Tensor, group_size: int, ranges: Sequence[float] = SEARCHED) -> Tensor:
    """Quantise a matrix to P16 and back: [N, K] -> [N, K] fp32."""
    return dequantize_weight(*quantize_weight(weight, group_size, ranges), *weight.shape, torch.float32)


def grouped_along_n(weight: Tensor, group_size: int) -> Tensor:
    """The same codes and scales with groups of output rows, a column each, as FlexGen has them: [N, K] -> [N, K]."""
    return grouped_along_k(weight.t(), group_size).t().contiguous()


def through_cache(x: Tensor) -> Tensor:
    """Quantise K or V to P16 and back: [..., D] -> [..., D] fp32."""
    return dequantize_kv(*quantize_kv(x), x.shape[-1], torch.float32)


def chosen(scores: Tensor, earlier: Tensor, sparsity: float) -> Tensor:
    """The earlier tokens whose V counts, per head the int(sparsity * n) likeliest of n: [H, T, S], [T, S] -> [H, T, S].

    By score, which orders as the softmax weights do and does not underflow.
    """
    counts = torch.tensor([int(sparsity * n) for n in earlier.sum(-1).tolist()])
    best = scores.masked_fill(~earlier, -torch.inf).topk(max(counts.tolist(), default=0), dim=-1).indices
    wanted = torch.arange(best.shape[-1]) < counts[:, None]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, wanted.expand_as(best))


def attention(q: Tensor, k: Tensor, v: Tensor, sparsity: float = 1.0) -> Tensor:
    """Causal attention of the last T of S tokens: q [T, H, D], k and v [S, H, D] -> [T, H, D].

    The softmax runs over all tokens up to the query's own; below a sparsity of 1 the V of the `chosen` and of the own
    token are summed with these weights, not renormalised (FlexGen, section 5).
    """
    T, S = len(q), len(k)
    scores = torch.einsum("thd,shd->hts", q, k) * q.shape[-1] ** -0.5
    ahead = torch.arange(S) - torch.arange(S - T, S)[:, None]  # [T, S]
    weights = scores.masked_fill(ahead > 0, -torch.inf).softmax(-1)
    if sparsity < 1:
        weights = weights * (chosen(scores, ahead < 0, sparsity) | (ahead == 0))
    return torch.einsum("hts,shd->thd", weights, v)


class ReferenceOPT:
    """One model under one set of options."""

    def __init__(self, state: Mapping[str, Tensor], config: OPTConfig, options: Options | None = None) -> None:
        self.config = config
        self.options = options or Options()
        self.weights = {name.removeprefix("model."): self._stored(name, w) for name, w in state.items()}
        self._activation = ACT2FN[config.activation_function]

    @classmethod
    def load(cls, path: Path | str, options: Options | None = None) -> ReferenceOPT:
        """From a checkpoint directory."""
        model = OPTForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
        return cls(model.state_dict(), model.config, options)

    @torch.inference_mode()
    def generate(self, prompt: list[int], num_tokens: int) -> tuple[list[int], Tensor]:
        """Greedy tokens, whatever ends a text, and their logits [num_tokens, V], as the engine computes them.

        Prefill attends to K and V as they are and to all of V; every decode step to what the cache keeps, the newest
        token's included.
        """
        cache: list[tuple[Tensor, Tensor]] = []

        def prefill(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache.append((self._cached(k), self._cached(v)))
            return attention(q, k, v)

        def decode(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = cache[layer]
            cache[layer] = torch.cat((keys, self._cached(k))), torch.cat((values, self._cached(v)))
            return attention(q, *cache[layer], self.options.sparsity)

        logits = [self._forward(torch.tensor(prompt), 0, prefill)[-1]]
        tokens = [int(logits[0].argmax())]
        for position in range(len(prompt), len(prompt) + num_tokens - 1):
            logits.append(self._forward(torch.tensor(tokens[-1:]), position, decode)[-1])
            tokens.append(int(logits[-1].argmax()))
        return tokens, torch.stack(logits)

    @torch.inference_mode()
    def score(self, ids: Tensor, num_prompt: int = 0) -> Tensor:
        """Logits [T, V] of given tokens [T]: the first `num_prompt` as a prompt, every other as if it were decoded."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            prompt = attention(*(x[:num_prompt] for x in (q, k, v)))
            decoded = attention(q[num_prompt:], self._cached(k), self._cached(v), self.options.sparsity)
            return torch.cat((prompt, decoded))

        return self._forward(ids, 0, attend)

    def _stored(self, name: str, weight: Tensor) -> Tensor:
        if name.split(".")[-2] in LINEARS and weight.dim() == 2:
            if self.options.weight_group:
                weight = grouped_along_k(weight, self.options.weight_group)
            elif self.options.transform:
                weight = self.options.transform(weight)
        return self._rounded(weight)

    def _cached(self, x: Tensor) -> Tensor:
        return through_cache(x).to(x.dtype) if self.options.kv_quantised else x

    def _rounded(self, x: Tensor) -> Tensor:
        return x.to(self.options.dtype).to(self.options.sums)

    def _forward(self, ids: Tensor, position: int, attend: Attend) -> Tensor:
        """Tokens [T] from `position` on -> logits [T, V]."""
        before = self.config.do_layer_norm_before
        x = self.weights["decoder.embed_tokens.weight"][ids]
        if self._projected:
            x = self._linear("decoder.project_in", x)
        x = self._rounded(x + self.weights["decoder.embed_positions.weight"][POSITION_OFFSET + position :][: len(ids)])
        for n in range(self.config.num_hidden_layers):
            at = f"decoder.layers.{n}"
            for norm, block in (("self_attn_layer_norm", self._attention), ("final_layer_norm", self._mlp)):
                h = self._norm(f"{at}.{norm}", x) if before else x
                x = self._rounded(x + block(n, at, h, attend))
                x = x if before else self._norm(f"{at}.{norm}", x)
        if before and not getattr(self.config, "_remove_final_layer_norm", False):
            x = self._norm("decoder.final_layer_norm", x)
        if self._projected:
            x = self._linear("decoder.project_out", x)
        return x @ self.weights["lm_head.weight"].t()

    @property
    def _projected(self) -> bool:
        return self.config.word_embed_proj_dim != self.config.hidden_size

    def _attention(self, layer: int, at: str, h: Tensor, attend: Attend) -> Tensor:
        heads = self.config.num_attention_heads
        q, k, v = (self._linear(f"{at}.self_attn.{p}_proj", h).view(len(h), heads, -1) for p in "qkv")
        return self._linear(f"{at}.self_attn.out_proj", self._rounded(attend(layer, q, k, v)).flatten(1))

    def _mlp(self, layer: int, at: str, h: Tensor, attend: Attend) -> Tensor:
        return self._linear(f"{at}.fc2", self._rounded(self._activation(self._linear(f"{at}.fc1", h))))

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return self._rounded(F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = (self.weights.get(f"{name}.{p}") for p in ("weight", "bias"))
        return self._rounded(F.layer_norm(x, x.shape[-1:], weight, bias))
