"""A request on its way through the engine: one sequence, from a prompt's token ids to why it ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from .params import SamplingParams
from .sampler import Logprobs

NOT_RUN = "not_run"  # it does not fit
NOT_FINITE = "not_finite"  # what was computed is not finite


@dataclass(slots=True, eq=False)
class TokenSequence:
    """Token ids in, token ids out, and why it ended: "stop", "length", "error" or not yet.

    `watch`, asked with each new token, returns the stop string that the text now holds, if any.
    """

    prompt: Sequence[int]
    params: SamplingParams
    seed: int = 0
    eos: Collection[int] = ()  # token ids that end the text
    watch: Callable[[int], str | None] | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    prompt_logprobs: list[Logprobs] = field(default_factory=list)  # of the second token of the prompt and those after
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    error_code: str | None = None
    first_scheduled_time: float | None = None  # seconds of time.time()
    first_token_time: float | None = None
    finished_time: float | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def append(self, token: int, logprobs: Logprobs | None) -> None:
        """Take one more token, unless the sequence has ended."""
        if self.finished:
            return
        if not self.tokens:
            self.first_token_time = time.time()
        self.tokens.append(token)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        found = self.watch(token) if self.watch else None
        params = self.params
        if len(self.tokens) >= params.min_tokens:
            if token in self.eos and not params.ignore_eos:
                self._finish("stop")
            elif token in params.stop_token_ids:
                self._finish("stop", token)
        if not self.finished and found is not None:
            self._finish("stop", found)
        if not self.finished and len(self.tokens) >= params.max_tokens:
            self._finish("length")

    def fail(self, error: str, code: str = NOT_RUN) -> None:
        """End without an answer, unless it has ended; `error` says why."""
        if not self.finished:
            self.error, self.error_code = error, code
            self._finish("error")

    def _finish(self, reason: str, stop_reason: str | int | None = None) -> None:
        self.finish_reason, self.stop_reason = reason, stop_reason
        self.finished_time = time.time()
