"""Choosing the next token from logits, on the logits' device.

Penalties and filters are transformers' logits processors, in transformers' order; presence and frequency penalties,
which it lacks, are OpenAI's and vLLM's. Each works on the rows that ask for it, a few rows at a time, so that what it
needs beside the logits stays under `TEMPORARY_BYTES`.

The draw is an exponential race: of one arrival per token, at rates softmax(logits), the first is a draw from the
softmax. A row's arrivals are drawn for the whole vocabulary in token-id order, whatever the filters left in: so a seed
keeps its text as long as rounding in the logits does not change who wins, where a draw by cumulative probability moves
on when any token before it does.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from .params import SamplingParams

TEMPORARY_BYTES = 32 << 20
BYTES_PER_LOGIT = 32  # top_p's: logits, sorted logits and their places, probabilities, sums, masks


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token's log-probability and its rank (1: the likeliest; None where it was not counted), in vLLM's shape."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


Logprobs = dict[int, Logprob]  # by token id


@dataclass(frozen=True, slots=True)
class Drawn:
    """One token for each sequence and, for those that asked, log-probabilities at its position.

    `wrong` are the rows whose logits are not finite; their tokens mean nothing.
    """

    tokens: list[int]
    logprobs: list[Logprobs | None]
    wrong: list[int] = field(default_factory=list)


class Sampler:
    """Draws tokens for a set of sequences; a sequence's draws depend on its own seed and logits, not on its batch.

    The three sequences run over the batch; seeds are those that `SamplingParams` takes. A row with a repetition penalty
    costs V bytes on the device, one with a presence or frequency penalty 4 V, one with `logprobs` 4 V for the time of a
    call. Before `min_tokens` neither one of a row's `eos` nor a `stop_token_id` is drawn; `eos` not even under
    `ignore_eos`, as in vLLM.
    """

    def __init__(
        self,
        params: Sequence[SamplingParams],
        seeds: Sequence[int],
        prompts: Sequence[Sequence[int]],
        *,
        vocab: int,
        eos: Sequence[Collection[int]],
        device: torch.device,
    ) -> None:
        batch = list(enumerate(params))
        random = [(b, p) for b, p in batch if not p.is_greedy]
        repeating = [(b, float(p.repetition_penalty)) for b, p in batch if p.repetition_penalty != 1]
        counting = [
            (b, float(p.presence_penalty), float(p.frequency_penalty))
            for b, p in batch
            if p.presence_penalty or p.frequency_penalty
        ]
        seen = _seen([prompts[b] for b, _ in repeating], vocab, device)
        counts = torch.zeros(len(counting), vocab, dtype=torch.int32, device=device)

        self._num_drawn = 0
        self._tallies = [(_rows(repeating, device), seen), (_rows(counting, device), counts)]
        self._penalties = [
            *_steps(_repetition, repeating, device, seen),
            *_steps(_occurrence, counting, device, counts),
        ]
        forbidden = sorted(
            (-p.min_tokens, b, t) for b, p in batch if p.min_tokens for t in {*eos[b], *p.stop_token_ids} if t < vocab
        )
        self._forbidden_until = [until for until, _, _ in forbidden]  # negated: the longest first
        self._forbidden = _pairs([(b, t) for _, b, t in forbidden], device)
        self._warpers = list(_warpers(random, vocab, device))
        self._random = _rows(random, device)
        self._generators = [torch.Generator(device).manual_seed(_spread(seeds[b])) for b, _ in random]
        self._logged = [(b, p.logprobs) for b, p in batch if p.logprobs is not None]
        self._logged_rows = _rows(self._logged, device)
        self._found = _Found(len(batch), device)

    @torch.inference_mode()
    def sample(self, logits: Tensor) -> Drawn:
        """logits [B, V] fp32, which it overwrites -> a token each and, of the logits as they came, log-probabilities.

        Waits for the device, once unless log-probabilities are asked for.
        """
        self._found.note_range(logits)
        raw = logits[self._logged_rows] if self._logged else logits[:0]
        self.process(logits)
        self._race(logits)
        tokens = torch.argmax(logits, -1, out=self._found.tokens)
        self._note(tokens)
        logprobs: list[Logprobs | None] = [None] * len(logits)
        for (b, _), found in zip(self._logged, self._tables(raw, tokens), strict=True):
            logprobs[b] = found
        drawn, wrong = self._found.fetch()
        return Drawn(drawn, logprobs, wrong)

    def describe(self, row: int, logits: Tensor) -> str:
        """Say what was wrong with a row of the last step; logits [B, V] as `sample` left them."""
        return self._found.describe(row, logits[row])

    def process(self, logits: Tensor) -> Tensor:
        """logits [B, V] fp32, which it overwrites -> those that the next token is drawn from, -inf for excluded ones.

        A greedy row has its penalties and no more: temperature and filters leave its largest logit where it is.
        """
        for penalty in self._penalties:
            penalty(logits)
        if num_forbidden := bisect_left(self._forbidden_until, -self._num_drawn):
            rows, tokens = self._forbidden[:, :num_forbidden]
            logits[rows, tokens] -= torch.inf  # what is no number stays none
        for warper in self._warpers:
            warper(logits)
        return logits

    def _race(self, logits: Tensor) -> None:
        """Turn the rows that are not greedy into -log of their tokens' arrival times, up to a constant."""
        for part in _parts(len(self._random), logits.shape[1]):
            rows, generators = self._random[part], self._generators[part]
            arrivals = logits.new_empty(len(rows), logits.shape[1])  # at rate 1
            for row, generator in zip(arrivals, generators, strict=True):
                row.exponential_(generator=generator)
            logits[rows] -= arrivals.log_()  # index_add_ takes ten times as long on the CPU

    def _note(self, tokens: Tensor) -> None:
        self._num_drawn += 1
        for rows, tally in self._tallies:
            if len(rows):
                drawn = tokens[rows].unsqueeze(1)  # [n, 1]
                tally.scatter_(1, drawn, (tally.gather(1, drawn) + 1).to(tally.dtype))

    def _tables(self, raw: Tensor, tokens: Tensor) -> Iterator[Logprobs]:
        """Raw logits [n, V] of the rows that ask, tokens [B] -> their tables: first the one drawn, then by rank."""
        for part in _parts(len(raw), raw.shape[1]):
            logits, nums = raw[part], [num for _, num in self._logged[part]]
            drawn = tokens[self._logged_rows[part]].unsqueeze(1)  # [n, 1]
            own = logits.gather(1, drawn)
            top, ids = logits.topk(min(max(nums), logits.shape[1]))
            ids = torch.cat([drawn, ids], 1)
            ranks = torch.cat([1 + (logits > own).sum(1, keepdim=True), ranks_among(top, top)], 1)
            found = logits.log_softmax(1).gather(1, ids)
            for num, *row in zip(nums, ids.tolist(), found.tolist(), ranks.tolist(), strict=True):
                yield {t: Logprob(p, r) for t, p, r in zip(*(column[: 1 + num] for column in row), strict=True)}


class _Found:
    """The findings of a step about each row, in one stretch of memory, so that the host fetches them at once."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self._bytes = torch.empty(16 * rows, dtype=torch.uint8, device=device)
        self.tokens = self._bytes[: 8 * rows].view(torch.int64)
        self._low, self._high = self._bytes[8 * rows :].view(torch.float32).view(2, rows)

    def note_range(self, logits: Tensor) -> None:
        """Keep the smallest and the largest logit of each row: NaN where one is NaN."""
        torch.amin(logits, -1, out=self._low)
        torch.amax(logits, -1, out=self._high)

    def fetch(self) -> tuple[list[int], list[int]]:
        """Each row's token, and the rows whose logits are not finite. Waits for the device."""
        found = self._bytes.cpu().numpy()
        size = len(self.tokens) * self.tokens.itemsize
        finite = np.isfinite(found[size:].view(np.float32)).reshape(2, -1).all(0)
        return found[:size].view(np.int64).tolist(), np.flatnonzero(~finite).tolist()

    def describe(self, row: int, logits: Tensor) -> str:
        """Say in what way logits [V], which may have been processed since, are not finite."""
        if self._high[row].isnan():
            return f"{int(logits.isnan().sum())} of {len(logits)} are NaN"
        return f"the {len(logits)} reach from {float(self._low[row]):.3g} to {float(self._high[row]):.3g}"


def ranks_among(top: Tensor, values: Tensor) -> Tensor:
    """1 + how many of top [n, N], largest first, are larger than each of values [n, m] -> [n, m] int64."""
    return 1 + torch.searchsorted(-top, -values)


# The rows of a step


@dataclass(frozen=True, slots=True)
class _Step:
    """A change of some rows [n, V] of the logits, which it may overwrite; parameters [n, 1] or [n, V]."""

    function: Callable[..., Tensor]
    rows: Tensor
    parameters: tuple[Tensor, ...]

    def __call__(self, logits: Tensor) -> None:
        for part in _parts(len(self.rows), logits.shape[1]):
            rows = self.rows[part]
            logits[rows] = self.function(logits[rows], *(p[part] for p in self.parameters))


_Asking = Sequence[tuple[int, *tuple[object, ...]]]  # a row and what it asks for


def _steps(function: Callable[..., Tensor], asking: _Asking, device: torch.device, *tables: Tensor) -> Iterator[_Step]:
    """The step for the rows that ask for it, none if none does."""
    if asking:
        values = torch.tensor([values for _, *values in asking], device=device)  # [n, m]
        yield _Step(function, _rows(asking, device), (*values.unsqueeze(1).unbind(2), *tables))


def _warpers(random: Sequence[tuple[int, SamplingParams]], vocab: int, device: torch.device) -> Iterator[_Step]:
    """The steps of sampling: transformers' `_get_logits_processor` has them in this order."""
    yield from _steps(_temperature, [(b, float(p.temperature)) for b, p in random if p.temperature != 1], device)
    top_k = [(b, p.top_k) for b, p in random if 0 < p.top_k < vocab]
    yield from _steps(partial(_top_k, largest=max((k for _, k in top_k), default=0)), top_k, device)
    yield from _steps(_top_p, [(b, 1.0 - p.top_p) for b, p in random if p.top_p < 1], device)
    yield from _steps(_min_p, [(b, float(p.min_p)) for b, p in random if p.min_p > 0], device)


def _rows(asking: _Asking, device: torch.device) -> Tensor:
    return torch.tensor([b for b, *_ in asking], dtype=torch.int64, device=device)


def _pairs(places: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """(row, token) of each place -> [2, n] int64."""
    return torch.tensor(places, dtype=torch.int64, device=device).view(-1, 2).T


def _parts(num_rows: int, vocab: int) -> Iterator[slice]:
    """Slices of the rows, as many of them at a time as `TEMPORARY_BYTES` allow."""
    size = max(1, TEMPORARY_BYTES // (BYTES_PER_LOGIT * vocab))
    return (slice(first, first + size) for first in range(0, num_rows, size))


def _seen(prompts: Sequence[Sequence[int]], vocab: int, device: torch.device) -> Tensor:
    """Mark the tokens that each prompt holds -> [n, V] bool."""
    places = [(row, token) for row, prompt in enumerate(prompts) for token in set(prompt)]
    seen = torch.zeros(len(prompts), vocab, dtype=torch.bool, device=device)
    rows, tokens = _pairs(places, device)
    seen[rows, tokens] = True
    return seen


def _spread(seed: int) -> int:
    """Bring the upper half of a seed into the lower, one to one: the CPU's generator looks at 32 bits only."""
    seed %= 1 << 64
    return seed ^ ((seed >> 32) * 0x9E3779B97F4A7C15 >> 32) % (1 << 32)  # Fibonacci hashing (Knuth, TAOCP 3, 6.4)


# The steps: x [n, V] fp32 -> [n, V]


def _repetition(x: Tensor, penalty: Tensor, seen: Tensor) -> Tensor:
    return torch.where(seen, torch.where(x < 0, x * penalty, x / penalty), x)


def _occurrence(x: Tensor, presence: Tensor, frequency: Tensor, counts: Tensor) -> Tensor:
    return x.sub_(frequency * counts + presence * (counts > 0))


def _temperature(x: Tensor, temperature: Tensor) -> Tensor:
    return x.div_(temperature)


def _top_k(x: Tensor, k: Tensor, *, largest: int) -> Tensor:
    """Tokens level with the k-th stay."""
    last = x.topk(largest).values.gather(1, k - 1)
    return x.masked_fill_(x < last, -torch.inf)


def _top_p(x: Tensor, excluded: Tensor) -> Tensor:
    """excluded = 1 - top_p: the least likely tokens that together have no more than that go, but not the likeliest."""
    logits, order = x.sort(1)
    goes = logits.softmax(1).cumsum(1) <= excluded
    goes[:, -1] = False
    return x.masked_fill_(goes.scatter(1, order, goes), -torch.inf)


def _min_p(x: Tensor, share: Tensor) -> Tensor:
    """The likeliest stays: no share is above 1."""
    probabilities = x.softmax(1)
    return x.masked_fill_(probabilities < share * probabilities.amax(1, keepdim=True), -torch.inf)
