"""Log-probabilities of tokens that are given, from logits that come a part of the vocabulary at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from .sampler import Logprob, Logprobs, ranks_among

_ABSENT = -1  # no token yet


class PromptScorer:
    """Log-probabilities of the tokens that stand at T positions, and of the `num` likeliest there.

    Logits of all positions and the whole vocabulary never exist at once: of what is added, a position keeps its largest
    logit, the sum of exponentials, its target's logit and the `num` largest with their ids (12 bytes each).
    """

    def __init__(self, targets: Tensor, num: int, device: torch.device) -> None:
        """targets [T] int64; num from 0."""
        shape = len(targets), num
        self._targets = targets.to(device)
        # From the lowest number up, so that a part that is -inf throughout adds exp(-inf) = 0, not exp(nan).
        self._largest = torch.full(shape[:1], torch.finfo(torch.float32).min, device=device)
        self._sum = torch.zeros(shape[:1], device=device)  # of exp(logit - largest)
        self._target = torch.full(shape[:1], torch.nan, device=device)
        self._top = torch.full(shape, -torch.inf, device=device)
        self._ids = torch.full(shape, _ABSENT, device=device)

    @torch.inference_mode()
    def add(self, logits: Tensor, *, position: int, token: int) -> None:
        """logits [t, v] fp32 at positions from `position` on, for tokens from `token` on; parts come in any order."""
        at = slice(position, position + len(logits))
        self._add_exponentials(logits, at)
        self._add_target(logits, at, token)
        if self._top.shape[1]:
            self._add_top(logits, at, token)

    @torch.inference_mode()
    def wrong(self) -> str | None:
        """Say where logits are no numbers; None if all are, as `result` needs it. Waits for the device."""
        count = int(self._sum.isfinite().logical_not_().sum())  # a NaN stays in a sum, an infinite logit makes one
        return f"at {count} of {len(self._sum)} positions" if count else None

    @torch.inference_mode()
    def result(self) -> list[Logprobs]:
        """A table for each position: its target first, then the likeliest by rank. Waits for the device.

        A target that is not among the likeliest has no rank: its logit is known only when its part has come, so that
        counting the larger ones in the parts before would take a second pass.
        """
        assert not self._target.isnan().any(), "a target's logit is nan or was never added"
        num = self._top.shape[1]
        logits = torch.cat([self._target[:, None], self._top], 1)  # [T, 1 + num]
        logprobs = logits - self._largest[:, None] - self._sum.log()[:, None]
        ids = torch.cat([self._targets[:, None], self._ids], 1)
        ranks = ranks_among(self._top, logits)
        return [
            {i: Logprob(p, r if r <= num else None) for i, p, r in zip(*row, strict=True) if i != _ABSENT}
            for row in zip(ids.tolist(), logprobs.tolist(), ranks.tolist(), strict=True)
        ]

    def _add_exponentials(self, logits: Tensor, at: slice) -> None:
        before = self._largest[at]
        largest = torch.maximum(before, logits.amax(1))
        added = (logits - largest[:, None]).exp_().sum(1)
        self._sum[at] = self._sum[at] * (before - largest).exp() + added
        self._largest[at] = largest

    def _add_target(self, logits: Tensor, at: slice, token: int) -> None:
        column = self._targets[at] - token
        inside = (column >= 0) & (column < logits.shape[1])
        found = logits.gather(1, column.clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1)
        self._target[at] = torch.where(inside, found, self._target[at])

    def _add_top(self, logits: Tensor, at: slice, token: int) -> None:
        num = self._top.shape[1]
        top, columns = logits.topk(min(num, logits.shape[1]))
        self._top[at], chosen = torch.cat([self._top[at], top], 1).topk(num)
        self._ids[at] = torch.cat([self._ids[at], columns + token], 1).gather(1, chosen)
