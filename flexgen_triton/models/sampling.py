"""Choosing the next token from logits, on the logits' device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token's log-probability and its rank (1: the likeliest; None where it was not counted), in vLLM's shape."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


Logprobs = dict[int, Logprob]  # by token id


@dataclass(frozen=True, slots=True)
class Drawn:
    """One token for each sequence and, for those that asked, log-probabilities at its position."""

    tokens: list[int]
    logprobs: list[Logprobs | None]


class Sampler:
    """Draws tokens for a set of sequences; a sequence's draws depend on its own seed only, not on its batch."""

    def __init__(
        self,
        params: Sequence[SamplingParams],
        seeds: Sequence[int],
        prompts: Sequence[Sequence[int]],
        *,
        vocab: int,
        eos: int,
        device: torch.device,
    ) -> None:
        self._temperatures = [p.temperature for p in params]
        self._generators = [
            torch.Generator(device).manual_seed(s) if p.temperature else None
            for p, s in zip(params, seeds, strict=True)
        ]

    def sample(self, logits: Tensor) -> Drawn:
        """logits [B, V] fp32, which it may overwrite -> a token each; the exponential race for softmax(logits / T)."""
        for row, (temperature, generator) in enumerate(zip(self._temperatures, self._generators, strict=True)):
            if generator is not None:
                noise = torch.empty_like(logits[row]).exponential_(generator=generator)
                logits[row] = logits[row] / temperature - noise.log()
        tokens: list[int] = logits.argmax(-1).tolist()
        return Drawn(tokens, [None] * len(tokens))
