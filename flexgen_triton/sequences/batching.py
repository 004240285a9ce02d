"""The choice of sequences that run together: those alike in tokens asked for and in length share a round."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from ..plan.spec import Batch, Workload
from .params import SamplingParams
from .sequence import TokenSequence

Batches = list[list[TokenSequence]]  # the GPU batches of one round

STEP_RATIO = 1.25  # sequences whose max_tokens differ by less count as asking for the same
MAX_WAITING_TOKENS = 1 << 22  # of prompts read ahead


def likeness(sequence: TokenSequence) -> tuple[int, int]:
    """Neighbours in this order run together: they end at about the same token step, then they are of similar length.

    Token steps come first: a round goes on until its last sequence ends, while prompts are packed, never padded.
    """
    return math.floor(math.log(sequence.params.max_tokens, STEP_RATIO)), len(sequence.prompt)


def divide(sequences: Sequence[TokenSequence], gpu_batch_size: int, num_gpu_batches: int) -> list[Batches]:
    """Divide all sequences into rounds, those that ask for most first."""
    ordered = sorted(sequences, key=likeness, reverse=True)
    size = gpu_batch_size * num_gpu_batches
    return [make_batches(ordered[n : n + size], gpu_batch_size) for n in range(0, len(ordered), size)]


def make_batches(sequences: Sequence[TokenSequence], gpu_batch_size: int) -> Batches:
    """One round's GPU batches, each with its longest prompt first."""
    batches = [list(sequences[n : n + gpu_batch_size]) for n in range(0, len(sequences), gpu_batch_size)]
    return [sorted(batch, key=lambda r: len(r.prompt), reverse=True) for batch in batches]


def workload(batches: Batches) -> Workload:
    """The workload of one round, for the planner."""
    return Workload(tuple(_batch(batch) for batch in batches))


def _batch(batch: Sequence[TokenSequence]) -> Batch:
    asked = tuple(r.params.max_tokens for r in batch)
    scored = sum(len(r.prompt) - 1 for r in batch if r.params.prompt_logprobs is not None)
    kept = sum(_sampler_bytes(r.params) for r in batch)
    lens = tuple(len(r.prompt) for r in batch)
    return Batch(lens, max(asked), asked if len(set(asked)) > 1 else (), scored, kept)


def _sampler_bytes(params: SamplingParams) -> int:
    """Bytes that `sampler.Sampler` keeps of a sequence, per entry of the vocabulary."""
    seen = params.repetition_penalty != 1
    counted = bool(params.presence_penalty or params.frequency_penalty)
    return seen + 4 * counted + 4 * (params.logprobs is not None)


class Pool:
    """Sequences that wait: read ahead from where they come, as far as `size` of them, and handed out round by round."""

    def __init__(self, sequences: Iterable[TokenSequence], size: int) -> None:
        self._source: Iterator[TokenSequence] = iter(sequences)
        self._size = size
        self._waiting: list[TokenSequence] = []  # oldest first

    def take(self, count: int) -> list[TokenSequence]:
        """Up to `count` sequences alike, the oldest that waits among them; none when all are handed out."""
        self._fill()
        if not self._waiting:
            return []
        ordered = sorted(self._waiting, key=likeness, reverse=True)
        oldest = ordered.index(self._waiting[0])
        low = min(oldest // count * count, max(len(ordered) - count, 0))
        chosen = ordered[low : low + count]
        gone = set(map(id, chosen))
        self._waiting = [r for r in self._waiting if id(r) not in gone]
        return chosen

    def put_back(self, sequences: Sequence[TokenSequence]) -> None:
        """Let sequences that were taken wait again, before all others."""
        self._waiting[:0] = sequences

    def _fill(self) -> None:
        tokens = sum(len(r.prompt) for r in self._waiting)
        while len(self._waiting) < self._size and tokens < MAX_WAITING_TOKENS:
            found = list(islice(self._source, 1))
            if not found:
                return
            self._waiting += found
            tokens += len(found[0].prompt)
