"""Choosing the next token from logits, on the logits' device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is generated, under vLLM's names. temperature 0 is greedy.

    Raises ValueError for values out of range.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    seed: int = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature:g}; it must be 0 (greedy) or more")


class Sampler:
    """Draws tokens for a set of sequences; a sequence's draws depend on its own seed only, not on its batch."""

    def __init__(self, params: Sequence[SamplingParams], device: torch.device) -> None:
        self._temperatures = [p.temperature for p in params]
        self._generators = [torch.Generator(device).manual_seed(p.seed) if p.temperature else None for p in params]

    def sample(self, logits: Tensor) -> Tensor:
        """logits [B, V] fp32 -> token ids [B]; the exponential-race form of sampling from softmax(logits / T)."""
        for row, (temperature, generator) in enumerate(zip(self._temperatures, self._generators, strict=True)):
            if generator is not None:
                noise = torch.empty_like(logits[row]).exponential_(generator=generator)
                logits[row] = logits[row] / temperature - noise.log()
        return logits.argmax(-1)
