"""OpenAI's batch format: what a line of the input asks for. Answers are `answers`'s.

Owns the fields of a request and their rules; the checks of a single value are `fields`'s. Knows no file, no model and
no tokenizer. Every refusal is a `LineError`, one sentence; nothing that a line asks for is ignored silently.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import xxhash

from ..sequences.params import SamplingParams
from .fields import (
    LineError,
    check_neutral,
    check_type,
    read_flag,
    read_real,
    read_text,
    read_token_ids,
    read_whole,
    shown,
    shown_field,
    shown_name,
)

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MAX_CHOICES = 4096  # completions that one line may ask for: they are held until its last one is done

LINE_FIELDS = ("custom_id", "method", "url", "body")
WHOLE = ("n", "seed", "top_k", "min_tokens", "prompt_logprobs")
REAL = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
FLAGS = ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens")
SAMPLING = frozenset((*WHOLE, *REAL, *FLAGS, "stop", "stop_token_ids"))
HARMLESS: dict[str, type] = {  # what changes no answer, and its type
    "model": str,
    "user": str,
    "metadata": dict,
    "store": bool,
    "service_tier": str,
    "safety_identifier": str,
    "prompt_cache_key": str,
    "prompt_cache_retention": str,
}
NEUTRAL: dict[str, tuple[object, ...]] = {  # known but not done here, and the values that ask for nothing
    "stream": (False,),
    "stream_options": (),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
}
COMPLETION_NEUTRAL = NEUTRAL | {"suffix": ("",)}
CHAT_NEUTRAL = NEUTRAL | {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
COMPLETION_FIELDS = SAMPLING | {"prompt", "max_tokens", "logprobs", "echo", "best_of"}
CHAT_FIELDS = SAMPLING | {"messages", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs"}
ROLES = ("system", "developer", "user", "assistant")


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """A line for /v1/completions. `only_echo`: max_tokens was 0; one token is drawn all the same, and dropped."""

    prompts: tuple[str | tuple[int, ...], ...]
    params: SamplingParams
    logprobs: int | None
    prompt_logprobs: int | None
    echo: bool
    only_echo: bool


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A line for /v1/chat/completions. `fills`: no max_tokens was given, so it may use every position there is."""

    messages: tuple[dict[str, str], ...]
    params: SamplingParams
    fills: bool


class SeenIds:
    """The custom_ids of a batch and the lines they stand on, at 18 to 36 bytes each.

    Open addressing over 64-bit hashes: two different ids among a million pass for one with a probability of 3e-8.
    """

    def __init__(self) -> None:
        self._slots = 1 << 10
        self._hashes, self._lines = self._empty()
        self._count = 0

    def _empty(self) -> tuple[array[int], array[int]]:
        return array("Q", bytes(8 * self._slots)), array("I", bytes(4 * self._slots))

    def add(self, custom_id: str, line: int) -> int | None:
        """Note that the id stands on this line; the line where it stood first, if it did."""
        key = xxhash.xxh3_64_intdigest(custom_id.encode("utf-8", "surrogatepass")) or 1
        slot = self._slot(key)
        if self._hashes[slot]:
            return self._lines[slot]
        self._hashes[slot], self._lines[slot] = key, min(line, (1 << 32) - 1)
        self._count += 1
        if 3 * self._count > 2 * self._slots:
            self._grow()
        return None

    def _slot(self, key: int) -> int:
        """Find the slot of a hash, or the empty one that it would take."""
        hashes, mask = self._hashes, self._slots - 1
        slot = key & mask
        while hashes[slot] and hashes[slot] != key:
            slot = (slot + 1) & mask
        return slot

    def _grow(self) -> None:
        hashes, lines = self._hashes, self._lines
        self._slots *= 2
        self._hashes, self._lines = self._empty()
        for key, line in zip(hashes, lines, strict=True):
            if key:
                slot = self._slot(key)
                self._hashes[slot], self._lines[slot] = key, line


def read_object(raw: bytes) -> dict[str, Any]:
    """The JSON object that a line holds. Raises LineError for anything else."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise LineError(f"byte {error.start + 1} of the line is not UTF-8", "invalid_json") from error
    try:
        found = json.loads(
            text.removeprefix("\ufeff"), object_pairs_hook=_without_repeats, parse_constant=_refuse_constant
        )
    except json.JSONDecodeError as error:
        reason = f"{error.msg[0].lower()}{error.msg[1:]} at character {error.pos + 1}"
        raise LineError(f"the line is not valid JSON: {reason}", "invalid_json") from error
    except RecursionError as error:
        raise LineError("the line nests JSON too deeply; a request needs a few levels", "invalid_json") from error
    except LineError:
        raise
    except ValueError as error:
        raise LineError("the line holds a number of more than 4300 digits", "invalid_json") from error
    if not isinstance(found, dict):
        raise LineError(f"the line is {shown(found)}; it must be a JSON object", "invalid_json")
    return found


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's fields; json would keep the last of two that have one name."""
    found = dict(pairs)
    if len(found) < len(pairs):
        (repeated, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise LineError(f"{shown_name(repeated)} is given twice in one object", "invalid_json")
    return found


def _refuse_constant(name: str) -> float:
    raise LineError(f"{name} is not a number in JSON", "invalid_json")


def read_custom_id(fields: Mapping[str, Any]) -> str:
    """The line's custom_id. Raises LineError where there is none."""
    found = fields.get("custom_id")
    if found is None:
        raise LineError("custom_id is missing")
    if not isinstance(found, str) or not found:
        raise LineError(f"custom_id is {shown(found)}; it must be a text that is not empty")
    return found


def read_request(fields: Mapping[str, Any]) -> CompletionRequest | ChatRequest:
    """Read the request of a line. Raises LineError for what is missing, wrong, unknown, or not done here.

    `model` must be a text where it is given, but is not compared: the answer names the model that ran.
    """
    unknown = next((name for name in fields if name not in LINE_FIELDS), None)
    if unknown is not None:
        raise LineError(
            f"{shown_name(unknown)} is no field of a line; those are {', '.join(LINE_FIELDS)}", "unknown_field"
        )
    if fields.get("method") != "POST":
        raise LineError(f'method is {shown_field(fields, "method")}; it must be "POST"')
    url = fields.get("url")
    if url not in (COMPLETIONS, CHAT):
        raise LineError(
            f'url is {shown_field(fields, "url")}; it must be "{COMPLETIONS}" or "{CHAT}"', "unsupported_url"
        )
    body = fields.get("body")
    if not isinstance(body, dict):
        raise LineError(f"body is {shown_field(fields, 'body')}; it must be an object")
    given = {name: value for name, value in body.items() if value is not None}  # null: as if left out
    return _completion_request(given) if url == COMPLETIONS else _chat_request(given)


def _completion_request(body: Mapping[str, Any]) -> CompletionRequest:
    _check_fields(body, COMPLETION_FIELDS, COMPLETION_NEUTRAL, COMPLETIONS)
    prompts = _prompts(body)
    params = _sampling(body)
    n = params.get("n", 1)
    if "best_of" in body and read_whole("best_of", body["best_of"]) != n:
        raise LineError(f"best_of is {body['best_of']} and n {n}; only as many as are returned are made")
    if n * len(prompts) > MAX_CHOICES:
        raise LineError(
            f"{len(prompts)} prompts with n {n} are {n * len(prompts)} completions; a line may have {MAX_CHOICES}"
        )
    max_tokens = read_whole("max_tokens", body.get("max_tokens", 16))
    echo = read_flag("echo", body.get("echo", False))
    if max_tokens == 0 and not echo:
        raise LineError("max_tokens is 0; it must be at least 1, or echo true")
    if max_tokens == 0 and params.get("min_tokens", 0) > 0:
        raise LineError(f"min_tokens is {params['min_tokens']} and max_tokens 0; it may not be above it")
    logprobs = read_whole("logprobs", body["logprobs"]) if "logprobs" in body else None
    asked = params.pop("prompt_logprobs", None)
    scored = max((k for k in (asked, logprobs if echo else None) if k is not None), default=None)
    made = _params(params | {"max_tokens": max_tokens or 1, "logprobs": logprobs, "prompt_logprobs": scored})
    return CompletionRequest(prompts, made, logprobs, asked, echo, only_echo=max_tokens == 0)


def _prompts(body: Mapping[str, Any]) -> tuple[str | tuple[int, ...], ...]:
    """One prompt or several, each a text or token ids."""
    if "prompt" not in body:
        raise LineError("body has no prompt")
    given = body["prompt"]
    if isinstance(given, str):
        return (read_text("prompt", given),)
    if not isinstance(given, list) or not given:
        raise LineError(f"prompt is {shown(given)}; it must be a text, token ids, or a list of one or the other")
    if isinstance(given[0], int):
        return (read_token_ids("prompt", given),)
    if isinstance(given[0], str):
        return tuple(read_text(f"prompt {n}", p) for n, p in enumerate(given))
    return tuple(read_token_ids(f"prompt {n}", p) for n, p in enumerate(given))


def _chat_request(body: Mapping[str, Any]) -> ChatRequest:
    _check_fields(body, CHAT_FIELDS, CHAT_NEUTRAL, CHAT)
    params = _sampling(body)
    limits = {read_whole(name, body[name]) for name in ("max_tokens", "max_completion_tokens") if name in body}
    if len(limits) > 1:
        raise LineError(
            f"max_tokens is {body['max_tokens']} and max_completion_tokens {body['max_completion_tokens']}; give one"
        )
    wants = read_flag("logprobs", body.get("logprobs", False))
    if "top_logprobs" in body and not wants:
        raise LineError("top_logprobs is given without logprobs; it needs logprobs true")
    logprobs = read_whole("top_logprobs", body.get("top_logprobs", 0)) if wants else None
    messages = _messages(body)
    max_tokens = limits.pop() if limits else None
    room = max(params.get("min_tokens", 0), 1)  # stands in until the prompt's length is known
    made = _params(params | {"max_tokens": room if max_tokens is None else max_tokens, "logprobs": logprobs})
    return ChatRequest(messages, made, fills=max_tokens is None)


def _messages(body: Mapping[str, Any]) -> tuple[dict[str, str], ...]:
    if "messages" not in body:
        raise LineError("body has no messages")
    given = body["messages"]
    if not isinstance(given, list) or not given:
        raise LineError(f"messages is {shown(given)}; it must be a list of at least one message")
    return tuple(_message(f"message {n}", m) for n, m in enumerate(given))


def _message(what: str, given: object) -> dict[str, str]:
    if not isinstance(given, dict):
        raise LineError(f"{what} is {shown(given)}; it must be an object")
    found = {name: value for name, value in given.items() if value is not None}
    unknown = next((name for name in found if name not in ("role", "content", "name")), None)
    if unknown is not None:
        raise LineError(
            f"{what} has {shown_name(unknown)}; role, content and name are understood", "unsupported_parameter"
        )
    if found.get("role") not in ROLES:
        raise LineError(f"{what}: role is {shown_field(found, 'role')}; it must be one of {', '.join(ROLES)}")
    if "content" not in found:
        raise LineError(f"{what} has no content")
    name = {"name": read_text(f"{what}: name", found["name"])} if "name" in found else {}
    return {"role": found["role"], "content": _content(f"{what}: content", found["content"]), **name}


def _content(what: str, given: object) -> str:
    """A message's text; of several parts, each on lines of its own, as vLLM joins them."""
    if not isinstance(given, list):
        return read_text(what, given)
    if not given:
        raise LineError(f"{what} is {shown(given)}; it must be a text or a list of at least one part")
    texts = []
    for n, part in enumerate(given):
        if not isinstance(part, dict) or part.get("type") != "text" or set(part) != {"type", "text"}:
            raise LineError(
                f'{what}: part {n} must be {{"type": "text", "text": ...}}; only text is understood',
                "unsupported_parameter",
            )
        texts.append(read_text(f"{what}: part {n}", part["text"]))
    return "\n".join(texts)


def _check_fields(
    body: Mapping[str, Any], known: frozenset[str], neutral: Mapping[str, tuple[object, ...]], url: str
) -> None:
    """Raise LineError for the first field that is unknown, of a wrong type, or asks for what is not done here."""
    for name, value in body.items():
        if name in HARMLESS:
            check_type(name, value, HARMLESS[name])
        elif name in neutral:
            check_neutral(name, value, neutral[name])
        elif name not in known:
            raise LineError(f"{shown_name(name)} is no parameter of {url} here; leave it out", "unknown_field")


def _sampling(body: Mapping[str, Any]) -> dict[str, Any]:
    """Read the body's fields that both urls have and that say how tokens are drawn, with their types checked."""
    found: dict[str, Any] = {name: read_whole(name, body[name]) for name in WHOLE if name in body}
    found |= {name: read_real(name, body[name]) for name in REAL if name in body}
    found |= {name: read_flag(name, body[name]) for name in FLAGS if name in body}
    if "stop" in body:
        stop = body["stop"]
        found["stop"] = tuple(read_text("stop", s) for s in (stop if isinstance(stop, list) else [stop]))
    if "stop_token_ids" in body:
        found["stop_token_ids"] = read_token_ids("stop_token_ids", body["stop_token_ids"])
    return found


def _params(fields: Mapping[str, Any]) -> SamplingParams:
    try:
        return SamplingParams(**fields)
    except ValueError as error:
        raise LineError(str(error)) from error
