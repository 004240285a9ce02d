"""OpenAI's batch format: what a line of the output answers. What was asked for is `batch_format`'s.

Owns the shapes of answers. Knows no tokenizer: it gets token texts through `TokenText`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from .format import ChatRequest, CompletionRequest

if TYPE_CHECKING:
    from ..sequences.outputs import CompletionOutput, RequestOutput
    from ..sequences.sampler import Logprob, Logprobs

LOWEST_LOGPROB = -9999.0  # JSON has no infinity
UNREADABLE = "\ufffd"  # what a part of a character decodes to
WINDOW = 16  # tokens that one character may need


class AnswerError(ValueError):
    """An answer that cannot be written as JSON; one sentence."""


class TokenText(Protocol):
    def __call__(self, ids: Sequence[int], *, special: bool) -> str:
        """The text of these tokens, with the special ones or without."""


def answer(custom_id: str, request_id: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """An output line of a request that was answered, but for its id."""
    response = {"status_code": 200, "request_id": request_id, "body": body}
    return {"custom_id": custom_id, "response": response, "error": None}


def failure(custom_id: str | None, line: int, code: str, message: str) -> dict[str, Any]:
    """An output line of a request that has no answer; without a custom_id its message names the input's line."""
    message = message if custom_id is not None else f"line {line}: {message}"
    return {"custom_id": custom_id, "response": None, "error": {"code": code, "message": message}}


def completion_body(
    request: CompletionRequest,
    outputs: Sequence[RequestOutput],
    *,
    request_id: str,
    created: int,
    model: str,
    text: TokenText,
) -> dict[str, Any]:
    """A `text_completion`: the choices of the first prompt, of the second...; `outputs` has one entry a prompt."""
    choices = [
        {
            "index": prompt * request.params.n + completion.index,
            "text": _echoed(request, prompt, output, text) + ("" if request.only_echo else completion.text),
            "logprobs": _completion_logprobs(request, prompt, output, completion, text),
            "finish_reason": "length" if request.only_echo else completion.finish_reason,
            **_prompt_logprobs(request.prompt_logprobs, output, text),
        }
        for prompt, output in enumerate(outputs)
        for completion in output.outputs
    ]
    return {
        "id": f"cmpl-{request_id}",
        "object": "text_completion",
        "created": created,
        "model": model,
        "choices": choices,
        "usage": _usage(outputs, counts_output=not request.only_echo),
    }


def chat_body(
    request: ChatRequest, output: RequestOutput, *, request_id: str, created: int, model: str, text: TokenText
) -> dict[str, Any]:
    """A `chat.completion`."""
    choices = [
        {
            "index": completion.index,
            "message": {"role": "assistant", "content": completion.text, "refusal": None},
            "logprobs": _chat_logprobs(request.params.logprobs, completion, text),
            "finish_reason": completion.finish_reason,
        }
        for completion in output.outputs
    ]
    return {
        "id": f"chatcmpl-{request_id}",
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": choices,
        "usage": _usage([output]),
        **_prompt_logprobs(request.params.prompt_logprobs, output, text),
    }


def _usage(outputs: Sequence[RequestOutput], *, counts_output: bool = True) -> dict[str, int]:
    prompt = sum(len(o.prompt_token_ids) for o in outputs)
    completion = sum(len(c.token_ids) for o in outputs for c in o.outputs) if counts_output else 0
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _echoed(request: CompletionRequest, prompt: int, output: RequestOutput, text: TokenText) -> str:
    given = request.prompts[prompt]
    if not request.echo or isinstance(given, str):
        return str(given) if request.echo else ""
    return text(output.prompt_token_ids, special=not request.params.skip_special_tokens)


def _completion_logprobs(
    request: CompletionRequest, prompt: int, output: RequestOutput, completion: CompletionOutput, text: TokenText
) -> dict[str, Any] | None:
    """Four lists with an entry a token: of the prompt where it is echoed, then of the completion."""
    if request.logprobs is None:
        return None
    special = not request.params.skip_special_tokens
    tokens: list[int] = []
    entries: list[Logprobs | None] = []
    offsets: list[int] = []
    start, end = 0, len(completion.text)
    if request.echo:
        tokens += output.prompt_token_ids
        entries += output.prompt_logprobs or []
        start = len(_echoed(request, prompt, output, text))
        offsets += [min(at, start) for at in _offsets(tokens, text, special=special)]
    if not request.only_echo:
        tokens += completion.token_ids
        entries += completion.logprobs or []
        offsets += [start + min(at, end) for at in _offsets(completion.token_ids, text, special=special)]
    pairs = list(zip(tokens, entries, strict=True))
    return {
        "text_offset": offsets,
        "tokens": [_token_text(token, None if entry is None else entry[token], text) for token, entry in pairs],
        "token_logprobs": [None if entry is None else _number(entry[token]) for token, entry in pairs],
        "top_logprobs": [
            None if entry is None else _by_text(entry, token, request.logprobs, text) for token, entry in pairs
        ],
    }


def _offsets(ids: Sequence[int], text: TokenText, *, special: bool) -> list[int]:
    """Find where each token's text starts in the whole text; tokens that share a character start with it.

    A token's text may depend on those before it, so each is read with the tokens of the character before.
    """
    found, at, before, read = [], 0, 0, 0
    for end in range(1, len(ids) + 1):
        found.append(at)
        known, seen = text(ids[before:read], special=special), text(ids[before:end], special=special)
        if (len(seen) > len(known) and not seen.endswith(UNREADABLE)) or end - read >= WINDOW:
            at += max(len(seen) - len(known), 0)
            before, read = read, end
    return found


def _top(entry: Logprobs, limit: int) -> list[tuple[int, Logprob]]:
    """The likeliest tokens at a position."""
    return sorted(entry.items(), key=lambda item: -_number(item[1]))[:limit]


def _by_text(entry: Logprobs, token: int, limit: int, text: TokenText) -> dict[str, float]:
    """The likeliest tokens and the one that stands there; of tokens that read alike, the likeliest."""
    found: dict[str, float] = {}
    for each, logprob in [*_top(entry, limit), (token, entry[token])]:
        found.setdefault(_token_text(each, logprob, text), _number(logprob))
    return found


def _chat_logprobs(limit: int | None, completion: CompletionOutput, text: TokenText) -> dict[str, Any] | None:
    if limit is None:
        return None
    content = [
        {
            **_token(token, entry[token], text),
            "top_logprobs": [_token(each, logprob, text) for each, logprob in _top(entry, limit)],
        }
        for token, entry in zip(completion.token_ids, completion.logprobs or [], strict=True)
    ]
    return {"content": content, "refusal": None}


def _token(token: int, logprob: Logprob, text: TokenText) -> dict[str, Any]:
    shown = _token_text(token, logprob, text)
    return {
        "token": shown,
        "logprob": _number(logprob),
        "bytes": None if UNREADABLE in shown else list(shown.encode()),
    }


def _prompt_logprobs(limit: int | None, output: RequestOutput, text: TokenText) -> dict[str, Any]:
    """The field `prompt_logprobs`, in vLLM's shape, where it was asked for."""
    if limit is None:
        return {}
    pairs = zip(output.prompt_token_ids, output.prompt_logprobs or [], strict=True)
    return {"prompt_logprobs": [None if entry is None else _by_id(entry, token, limit, text) for token, entry in pairs]}


def _by_id(entry: Logprobs, token: int, limit: int, text: TokenText) -> dict[str, Any]:
    chosen = dict([*_top(entry, limit), (token, entry[token])])
    return {
        str(each): {"logprob": _number(p), "rank": p.rank, "decoded_token": _token_text(each, p, text)}
        for each, p in chosen.items()
    }


def _token_text(token: int, logprob: Logprob | None, text: TokenText) -> str:
    known = None if logprob is None else logprob.decoded_token
    return text([token], special=True) if known is None else known


def _number(logprob: Logprob) -> float:
    """A log-probability as JSON has it. Raises AnswerError for one that no probability has."""
    value = logprob.logprob
    if math.isnan(value) or value == math.inf:
        raise AnswerError(f"a log-probability is {value}, so the model's weights or its --dtype do not fit it")
    return max(value, LOWEST_LOGPROB)
