"""Answers of a model, in vLLM's shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .sampler import Logprobs


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One completion of a prompt.

    `finish_reason` is "stop" (end of text, a stop token or string: `stop_reason` says which, None for end of text),
    "length" (max_tokens) or None (not finished yet). `logprobs` has one entry per token where they were asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: str | int | None = None
    cumulative_logprob: float | None = None
    logprobs: list[Logprobs] | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """The times of a request's events, in seconds of `time.time()`."""

    arrival_time: float
    first_scheduled_time: float | None
    first_token_time: float | None
    finished_time: float | None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """The answer to one prompt. `prompt` is None when token ids were given.

    `request_id` is the prompt's number in the call. `prompt_logprobs`, where asked for, has an entry for each token of
    the prompt, None for the first. `error` says, in one sentence, why there is no answer; `outputs` is then empty, and
    `error_code` is "not_run" (it does not fit) or "not_finite" (what was computed is no number).
    """

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[Logprobs | None] | None = None
    metrics: RequestMetrics | None = None
    error: str | None = None
    error_code: str | None = None

    @property
    def finished(self) -> bool:
        return all(o.finished for o in self.outputs)


class OutputError(ValueError):
    """A prompt that got no answer, where one is needed."""


def answered(outputs: Sequence[RequestOutput]) -> Sequence[RequestOutput]:
    """The same outputs; raises OutputError, in one sentence, when a prompt has no answer."""
    failed = [o for o in outputs if o.error]
    if failed:
        more = f" (and {len(failed) - 1} of the other prompts have no answer)" if len(failed) > 1 else ""
        raise OutputError(f"prompt {failed[0].request_id}: {failed[0].error}{more}")
    return outputs
