"""The head of a round: the output projection part after part, the tokens drawn from it, the scores of prompts.

Owns logits, samplers and each GPU batch's next tokens. Does not know where weights and hidden state come from: both are
handed to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..memory.scratch import Scratch
from ..models.family import Model
from ..models.ops import Weight
from ..plan.plan import Plan
from ..plan.schedule import Op
from ..plan.temporaries import SCORED_ROWS
from ..sequences.sampler import Sampler
from ..sequences.scorer import PromptScorer
from ..sequences.sequence import NOT_FINITE, TokenSequence


class Head:
    """Output projection and sampling of the GPU batches of one plan, on the lane that computes.

    `on_step(i, k)` is called when GPU batch k has its tokens of token step i; `keep_logits(k, logits [B, V])` before
    they are drawn.
    """

    def __init__(
        self,
        plan: Plan,
        batches: Sequence[Sequence[TokenSequence]],
        model: Model,
        work: Scratch,
        *,
        device: torch.device,
        on_step: Callable[[int, int], None],
        keep_logits: Callable[[int, Tensor], None] | None = None,
    ) -> None:
        self._plan, self._batches, self._model, self._work, self._device = plan, batches, model, work, device
        self._on_step, self._keep_logits = on_step, keep_logits
        self._samplers = [self._sampler(batch) for batch in batches]
        self._next: list[list[int]] = [[t for s in batch for t in s.prompt] for batch in batches]
        self._head_input: dict[int, Tensor] = {}
        self._logits: dict[int, Tensor] = {}
        self._scorers: dict[int, list[_Scored]] = {}

    def _sampler(self, batch: Sequence[TokenSequence]) -> Sampler:
        return Sampler(
            [s.params for s in batch],
            [s.seed for s in batch],
            [s.prompt for s in batch],
            vocab=self._plan.model.vocab,
            eos=[s.eos for s in batch],
            device=self._device,
        )

    def next_tokens(self, k: int) -> Sequence[int]:
        """The token ids that GPU batch k's next token step computes: its prompts, later the tokens drawn last."""
        return self._next[k]

    def compute(self, op: Op, w: Mapping[str, Weight], x: Tensor, *, part: int) -> None:
        """Logits of one part of the vocabulary; the first part takes the hidden state x, the last draws the tokens."""
        batch = self._plan.workload.batches[op.k]
        columns = self._model.head_columns(w)
        if part == 0:
            if op.i == 0:
                last = torch.tensor(batch.prompt_lens).cumsum(0) - 1
                self._scorers[op.k] = self._score_inputs(op.k, w, x)
                self._head_input[op.k] = self._model.head_input(w, x[last.to(x.device)], self._work)
                shape = (batch.size, self._plan.model.vocab)
                self._logits[op.k] = torch.empty(shape, dtype=torch.float32, device=self._device)
            else:
                self._head_input[op.k].copy_(self._model.head_input(w, x, self._work))
        self._model.logits(w, self._head_input[op.k], self._logits[op.k][:, columns], self._work)
        for scored in self._scorers[op.k] if op.i == 0 else ():
            self._score(scored, w, columns)
        if op.last + 1 == len(self._plan.stages):
            self._finish_step(op)

    def _finish_step(self, op: Op) -> None:
        logits = self._logits[op.k]
        if self._keep_logits:
            self._keep_logits(op.k, logits.clone())
        for scored in self._scorers.pop(op.k, ()):
            scored.finish()
        drawn = self._samplers[op.k].sample(logits)
        self._next[op.k] = drawn.tokens
        for row in drawn.wrong:
            self._fail(op, row, logits)
        for sequence, token, logprobs in zip(self._batches[op.k], drawn.tokens, drawn.logprobs, strict=True):
            sequence.append(token, logprobs)
        self._on_step(op.i, op.k)

    def _fail(self, op: Op, row: int, logits: Tensor) -> None:
        """End a sequence whose logits are not finite, if it has not ended."""
        sequence = self._batches[op.k][row]
        if not sequence.finished:
            wrong = self._samplers[op.k].describe(row, logits)
            where = f"the output projection's logits at token step {op.i}"
            sequence.fail(f"{where} are not all numbers: {wrong}", NOT_FINITE)

    # Log-probabilities of prompts

    def _score_inputs(self, k: int, w: Mapping[str, Weight], x: Tensor) -> list[_Scored]:
        """Compute the head's input for prompts that ask for scores: packed rows [T, E] -> a part for each prompt."""
        found, first = [], 0
        for sequence in self._batches[k]:
            stop = first + len(sequence.prompt)
            num = sequence.params.prompt_logprobs
            if num is not None and stop - first > 1:
                targets = torch.tensor(sequence.prompt[1:], device=x.device)
                scorer = PromptScorer(targets, num, x.device)
                found.append(_Scored(sequence, scorer, self._model.head_input(w, x[first : stop - 1], self._work)))
            first = stop
        return found

    def _score(self, scored: _Scored, w: Mapping[str, Weight], columns: slice) -> None:
        """Add this part of the vocabulary, a few positions at a time."""
        for low in range(0, len(scored.rows), SCORED_ROWS):
            rows = scored.rows[low : low + SCORED_ROWS]
            shape = (len(rows), columns.stop - columns.start)
            logits = torch.empty(shape, dtype=torch.float32, device=rows.device)
            self._model.logits(w, rows, logits, self._work)
            scored.scorer.add(logits, position=low, token=columns.start)


class _Scored(NamedTuple):
    """A sequence whose prompt is scored, and what the head multiplies for it: [T - 1, width]."""

    sequence: TokenSequence
    scorer: PromptScorer
    rows: Tensor

    def finish(self) -> None:
        """Hand the sequence its prompt's log-probabilities, or have it fail where there are none."""
        if wrong := self.scorer.wrong():
            self.sequence.fail(f"the output projection's logits of the prompt are not all numbers: {wrong}", NOT_FINITE)
        else:
            self.sequence.prompt_logprobs = self.scorer.result()
