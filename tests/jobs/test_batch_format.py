"""OpenAI's batch format: what is understood, what is refused and how, and the shapes of answers."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen_triton.jobs import answers as batch_answers
from flexgen_triton.jobs import format as batch_format
from flexgen_triton.jobs.answers import AnswerError, chat_body, completion_body
from flexgen_triton.jobs.fields import LineError
from flexgen_triton.jobs.format import (
    CHAT,
    COMPLETIONS,
    ChatRequest,
    CompletionRequest,
    SeenIds,
    read_custom_id,
    read_object,
    read_request,
)
from flexgen_triton.sequences.outputs import CompletionOutput, RequestOutput
from flexgen_triton.sequences.params import SamplingParams
from flexgen_triton.sequences.sampler import Logprob, Logprobs

ROOT = Path(__file__).parents[2]
USER = {"role": "user", "content": "Hello"}


def request(url: str = COMPLETIONS, **body: object) -> CompletionRequest | ChatRequest:
    """Read a line with this body, sent through JSON."""
    line = {"custom_id": "a", "method": "POST", "url": url, "body": body}
    return read_request(read_object(json.dumps(line).encode()))


def refusal(url: str = COMPLETIONS, **body: object) -> LineError:
    with pytest.raises(LineError) as caught:
        request(url, **body)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
    return caught.value


def test_reading_lines_needs_no_torch():
    code = "import sys, flexgen_triton.jobs.format, flexgen_triton.jobs.journal; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# Requests


def test_a_completion_has_openais_defaults():
    found = request(prompt="Hello")
    assert found == CompletionRequest(
        ("Hello",), SamplingParams(max_tokens=16), None, None, echo=False, only_echo=False
    )


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("Hello", ("Hello",)),
        ("", ("",)),
        (["Hello"], ("Hello",)),
        (["Hello", "there"], ("Hello", "there")),
        ([5, 6], ((5, 6),)),
        ([[5, 6], [7]], ((5, 6), (7,))),
    ],
)
def test_a_prompt_is_text_or_ids_or_several(prompt, prompts):
    found = request(prompt=prompt)
    assert isinstance(found, CompletionRequest) and found.prompts == prompts


def test_every_sampling_parameter_arrives():
    fields = {
        "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "n": 3, "seed": 7, "presence_penalty": 0.1,
        "frequency_penalty": -0.2, "logprobs": 2, "top_k": 4, "min_p": 0.05, "repetition_penalty": 1.1, "min_tokens": 1,
        "ignore_eos": True, "include_stop_str_in_output": True, "prompt_logprobs": 3, "skip_special_tokens": False,
    }  # fmt: skip
    found = request(prompt="Hello", stop=["a", "b"], stop_token_ids=[3], best_of=3, **fields)
    assert found.params == SamplingParams(stop=("a", "b"), stop_token_ids=(3,), **fields)


def test_only_an_echo_draws_a_token_all_the_same():
    found = request(prompt="Hello", max_tokens=0, echo=True, logprobs=2)
    assert isinstance(found, CompletionRequest) and found.only_echo
    assert (found.params.max_tokens, found.params.logprobs, found.params.prompt_logprobs) == (1, 2, 2)
    assert found.prompt_logprobs is None  # the engine is asked for them, the answer's own field is not


def test_an_echo_and_the_prompts_own_logprobs_share_the_larger_number():
    found = request(prompt="Hello", echo=True, logprobs=2, prompt_logprobs=5)
    assert isinstance(found, CompletionRequest)
    assert (found.params.prompt_logprobs, found.logprobs, found.prompt_logprobs) == (5, 2, 5)


def test_null_is_as_if_left_out():
    nothing = dict.fromkeys([*batch_format.COMPLETION_FIELDS - {"prompt"}, *batch_format.COMPLETION_NEUTRAL, "model"])
    assert request(prompt="Hello", **nothing) == request(prompt="Hello")


@pytest.mark.parametrize(
    "field",
    [
        {"model": "another"},
        {"user": "me"},
        {"metadata": {"a": "b"}},
        {"store": True},
        {"service_tier": "auto"},
        {"stream": False},
        {"logit_bias": {}},
        {"suffix": ""},
        {"best_of": 1},
        {"response_format": {"type": "text"}},
        {"stop": []},
    ],
    ids=lambda field: next(iter(field)),
)
def test_what_asks_for_nothing_is_allowed(field):
    assert request(prompt="Hello", **field) == request(prompt="Hello")


def test_a_chat_fills_the_positions_unless_it_is_told_otherwise():
    found = request(CHAT, messages=[USER])
    assert isinstance(found, ChatRequest) and found.fills and found.messages == (USER,)
    for name in ("max_tokens", "max_completion_tokens"):
        limited = request(CHAT, messages=[USER], **{name: 7})
        assert isinstance(limited, ChatRequest) and not limited.fills and limited.params.max_tokens == 7
    assert request(CHAT, messages=[USER], max_tokens=7, max_completion_tokens=7).params.max_tokens == 7


def test_a_chats_logprobs_are_a_switch_and_a_number():
    assert request(CHAT, messages=[USER]).params.logprobs is None
    assert request(CHAT, messages=[USER], logprobs=False).params.logprobs is None
    assert request(CHAT, messages=[USER], logprobs=True).params.logprobs == 0
    assert request(CHAT, messages=[USER], logprobs=True, top_logprobs=4).params.logprobs == 4


def test_a_message_of_parts_is_their_texts():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    found = request(CHAT, messages=[{"role": "user", "content": parts, "name": "me"}])
    assert isinstance(found, ChatRequest)
    assert found.messages == ({"role": "user", "content": "one\ntwo", "name": "me"},)


# Refusals


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON: expecting property name"),
        (b'{"a": 1} x', "extra data at character 10"),
        (b"[1, 2]", "a list of 2"),
        (b"null", "null"),
        (b'"' + b"x" * 100_000 + b'"', '"xxx'),
        (b'{"a": "\xff"}', "byte 8 of the line is not UTF-8"),
        (b'{"a": "\x00"}', "invalid control character"),
        (b"\x00" * 10, "not valid JSON"),
        (b'{"a": NaN}', "NaN is not a number"),
        (b'{"a": -Infinity}', "-Infinity is not a number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "more than 4300 digits"),
        (b'{"a": 1, "b": 2, "a": 3}', "a is given twice"),
        (b'{"a": ' * 200_000, "nests JSON too deeply"),
        (b"[" * 200_000, "nests JSON too deeply"),
        ('{"a": 1}'.encode("utf-16"), "byte 1 of the line is not UTF-8"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_no_object_is_refused(raw, words):
    with pytest.raises(LineError, match=words) as caught:
        read_object(raw)
    assert caught.value.code == "invalid_json" and len(str(caught.value)) < 200


def test_a_file_of_windows_is_read():
    assert read_object(b'\xef\xbb\xbf{"a": 1}\r') == {"a": 1}


@pytest.mark.parametrize(
    ("custom_id", "words"), [(None, "missing"), (17, "17"), ("", '""'), (["a"], "a list of 1"), (True, "true")]
)
def test_a_custom_id_is_a_text(custom_id, words):
    with pytest.raises(LineError, match=words):
        read_custom_id({"custom_id": custom_id})
    with pytest.raises(LineError, match="missing"):
        read_custom_id({})


@pytest.mark.parametrize(
    ("change", "words", "code"),
    [
        ({"method": None}, "method is null", "invalid_request"),
        ({"method": "GET"}, 'method is "GET"', "invalid_request"),
        ({"url": "/v1/embeddings"}, 'url is "/v1/embeddings"', "unsupported_url"),
        ({"url": 3}, "url is 3", "unsupported_url"),
        ({"url": [COMPLETIONS]}, "url is a list of 1", "unsupported_url"),
        ({"body": None}, "body is null", "invalid_request"),
        ({"body": [1]}, "body is a list of 1", "invalid_request"),
        ({"priority": 1}, "priority is no field", "unknown_field"),
        ({"x" * 100_000: 1}, "is no field", "unknown_field"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_the_fields_of_a_line_are_checked(change, words, code):
    line = {"custom_id": "a", "method": "POST", "url": COMPLETIONS, "body": {"prompt": "Hello"}}
    with pytest.raises(LineError, match=words) as caught:
        read_request(line | change)
    assert caught.value.code == code and len(str(caught.value)) < 200


@pytest.mark.parametrize("name", ["method", "url", "body"])
def test_a_missing_field_is_named(name):
    line = {"custom_id": "a", "method": "POST", "url": COMPLETIONS, "body": {"prompt": "Hello"}}
    del line[name]
    with pytest.raises(LineError, match=f"{name} is missing"):
        read_request(line)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"prompt": None}, "body has no prompt"),
        ({"prompt": 5}, "prompt is 5"),
        ({"prompt": []}, "a list of 0"),
        ({"prompt": {}}, "an object"),
        ({"prompt": ["a", 5]}, "prompt 1 is 5"),
        ({"prompt": [5, "a"]}, 'prompt holds "a"'),
        ({"prompt": [5, None]}, "prompt holds null"),
        ({"prompt": [5, True]}, "prompt holds true"),
        ({"prompt": [5, 6.0]}, "prompt holds 6.0"),
        ({"prompt": [-1]}, "prompt holds -1"),
        ({"prompt": [10**30]}, "a number of 31 digits"),
        ({"prompt": [[5], 6]}, "prompt 1 is 6"),
        ({"prompt": [[5], [[6]]]}, "prompt 1 holds a list of 1"),
        ({"prompt": "a\ud800"}, "character 2 of prompt is half a surrogate pair"),
        ({"prompt": ["a"] * 5000}, "5000 completions; a line may have 4096"),
        ({"prompt": ["a"] * 500, "n": 10}, "500 prompts with n 10 are 5000"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": 1.5}, "max_tokens is 1.5"),
        ({"max_tokens": True}, "max_tokens is true"),
        ({"max_tokens": "5"}, 'max_tokens is "5"'),
        ({"max_tokens": 10**400}, "a number of 401 digits"),
        ({"min_tokens": 17}, "min_tokens is 17"),
        ({"min_tokens": 1, "max_tokens": 0, "echo": True}, "min_tokens is 1 and max_tokens 0"),
        ({"n": 0}, "n is 0"),
        ({"n": 5000}, "5000"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": "hot"}, 'temperature is "hot"'),
        ({"temperature": 10**400}, "a number of 401 digits"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_k": -7}, "top_k is -7"),
        ({"seed": 1.0}, "seed is 1.0"),
        ({"seed": 2**64}, "a number of 20 digits"),
        ({"logprobs": True}, "logprobs is true"),
        ({"logprobs": 1000}, "logprobs is 1000"),
        ({"echo": "yes"}, 'echo is "yes"'),
        ({"ignore_eos": 1}, "ignore_eos is 1"),
        ({"stop": 5}, "stop is 5"),
        ({"stop": ["a", None]}, "stop is null"),
        ({"stop": [""]}, "stop is"),
        ({"stop_token_ids": 5}, "stop_token_ids is 5"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids holds"),
        ({"presence_penalty": 3}, "presence_penalty is 3"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"model": 5}, "model is 5; it must be a text"),
        ({"stream": 0}, "stream is 0; it must be true or false"),
        ({"stream": 1}, "stream is 1; it must be true or false"),
        ({"stream": 0.0}, "stream is 0.0; it must be true or false"),
        ({"stream": "false"}, 'stream is "false"; it must be true or false'),
        ({"stream": []}, "stream is a list of 0; it must be true or false"),
        ({"echo": 0}, "echo is 0; it must be true or false"),
        ({"skip_special_tokens": 0}, "skip_special_tokens is 0; it must be true or false"),
        ({"store": 1}, "store is 1; it must be true or false"),
        ({"user": 5}, "user is 5; it must be a text"),
        ({"user": True}, "user is true; it must be a text"),
        ({"metadata": "a"}, 'metadata is "a"; it must be an object'),
        ({"service_tier": 0}, "service_tier is 0; it must be a text"),
        ({"best_of": True}, "best_of is true; it must be a whole number"),
        ({"n": 1.0}, "n is 1.0; it must be a whole number"),
        ({"temperature": False}, "temperature is false; it must be a number"),
        ({"best_of": 3}, "best_of is 3 and n 1"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_values_are_refused_with_what_they_are(body, words):
    assert words in str(refusal(**{"prompt": "Hello"} | body))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"stream": 0}, "stream is 0; it must be true or false"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls is 1; it must be true or false"),
        ({"parallel_tool_calls": 0.0}, "parallel_tool_calls is 0.0; it must be true or false"),
        ({"logprobs": 1}, "logprobs is 1; it must be true or false"),
        ({"logprobs": 0}, "logprobs is 0; it must be true or false"),
        ({"logprobs": True, "top_logprobs": True}, "top_logprobs is true; it must be a whole number"),
    ],
)
def test_a_chats_switches_are_true_or_false(body, words):
    assert words in str(refusal(CHAT, **{"messages": [USER]} | body))


def test_a_number_beyond_all_floats_is_refused():
    line = {"custom_id": "a", "method": "POST", "url": COMPLETIONS, "body": {"prompt": "Hello", "top_p": 7}}
    raw = json.dumps(line).replace("7", "1e999").encode()
    with pytest.raises(LineError, match="top_p is Infinity"):
        read_request(read_object(raw))


@pytest.mark.parametrize(
    ("url", "field"),
    [
        (COMPLETIONS, {"stream": True}),
        (COMPLETIONS, {"stream_options": {"include_usage": True}}),
        (COMPLETIONS, {"logit_bias": {"5": 1}}),
        (COMPLETIONS, {"suffix": "end"}),
        (COMPLETIONS, {"response_format": {"type": "json_object"}}),
        (CHAT, {"stream": True}),
        (CHAT, {"tools": [{"type": "function"}]}),
        (CHAT, {"tool_choice": "required"}),
        (CHAT, {"functions": [{}]}),
        (CHAT, {"response_format": {"type": "json_schema"}}),
        (CHAT, {"modalities": ["audio"]}),
        (CHAT, {"reasoning_effort": "high"}),
    ],
    ids=lambda value: str(value),
)
def test_what_is_not_done_here_is_refused_by_name(url, field):
    (name,) = field
    error = refusal(url, **({"prompt": "Hello"} if url == COMPLETIONS else {"messages": [USER]}) | field)
    assert error.code == "unsupported_parameter" and str(error).startswith(f"{name} is ")


@pytest.mark.parametrize(
    ("url", "name"),
    [
        (COMPLETIONS, "return_token_ids"),
        (COMPLETIONS, "max_completion_tokens"),
        (COMPLETIONS, "messages"),
        (COMPLETIONS, "temprature"),
        (CHAT, "prompt"),
        (CHAT, "echo"),
        (CHAT, "chat_template"),
    ],
)
def test_what_is_unknown_is_refused_by_name(url, name):
    error = refusal(url, **({"prompt": "Hello"} if url == COMPLETIONS else {"messages": [USER]}) | {name: "x"})
    assert error.code == "unknown_field" and str(error).startswith(f"{name} is no parameter of {url}")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"messages": None}, "body has no messages"),
        ({"messages": "Hello"}, 'messages is "Hello"'),
        ({"messages": []}, "a list of 0"),
        ({"messages": ["Hello"]}, 'message 0 is "Hello"'),
        ({"messages": [USER, {"role": "user"}]}, "message 1 has no content"),
        ({"messages": [{"content": "Hello"}]}, "message 0: role is missing"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 'message 0: role is "tool"'),
        ({"messages": [USER | {"tool_calls": [1]}]}, "message 0 has tool_calls"),
        ({"messages": [USER | {"content": 5}]}, "message 0: content is 5"),
        ({"messages": [USER | {"content": []}]}, "a list of 0"),
        ({"messages": [USER | {"content": [{"type": "image_url", "image_url": {}}]}]}, "only text is understood"),
        ({"messages": [USER | {"content": [{"type": "text", "text": 5}]}]}, "part 0 is 5"),
        ({"messages": [USER | {"content": "\udc00"}]}, "surrogate"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens is 4 and max_completion_tokens 5"),
        ({"logprobs": 3}, "logprobs is 3"),
        ({"top_logprobs": 3}, "needs logprobs true"),
        ({"logprobs": True, "top_logprobs": -1}, "logprobs is -1"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_conversations_are_refused(body, words):
    assert words in str(refusal(CHAT, **{"messages": [USER]} | body))


WORD = st.text("a0 \x00é\ud800", max_size=3)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | WORD,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORD, inner, max_size=3),
    max_leaves=6,
)
NAMES = [
    *batch_format.COMPLETION_FIELDS | batch_format.CHAT_FIELDS,
    *batch_format.COMPLETION_NEUTRAL | batch_format.CHAT_NEUTRAL,
]


@given(
    st.sampled_from([COMPLETIONS, CHAT]),
    st.dictionaries(st.sampled_from(NAMES), JSON, max_size=3),
)
def test_any_json_is_a_request_or_a_refusal(url, body):
    complete = {"prompt": "Hello"} if url == COMPLETIONS else {"messages": [USER]}
    with suppress(LineError):
        read_request({"custom_id": "a", "method": "POST", "url": url, "body": complete | body})


@given(st.lists(st.text("ab\ud800", max_size=3) | st.integers(0, 3000).map(str), max_size=400))
def test_seen_ids_are_the_lines_they_stood_on_first(ids):
    seen, expected = SeenIds(), {}
    for line, custom_id in enumerate(ids, 1):
        assert seen.add(custom_id, line) == expected.get(custom_id)
        expected.setdefault(custom_id, line)


def test_seen_ids_take_at_most_36_bytes_each():
    seen = SeenIds()
    for line in range(1, 100_001):
        assert seen.add(f"request-{line}", line) is None
    for line in (1, 77, 99_999):
        assert seen.add(f"request-{line}", 0) == line
    assert len(seen._hashes) * 12 <= 36 * 100_000


# Answers

WORDS = {0: "</s>", 1: "Hel", 2: "lo", 3: " there", 4: "\ufffd", 5: "\ufffd"}


def text(ids: Sequence[int], *, special: bool) -> str:
    """Tokens as a byte-level tokenizer reads them: 4 and 5 are the halves of one character."""
    shown = [t for t in ids if special or t]
    return "".join(WORDS[t] for t in shown).replace("\ufffd\ufffd", "é")


def entry(token: int, *others: int) -> Logprobs:
    """A table in which `token` is drawn and the others are likelier, the first the likeliest."""
    found = {t: Logprob(-1.0 - n, n + 1, text([t], special=True)) for n, t in enumerate(others)}
    return {token: found.get(token, Logprob(-5.0, 6, text([token], special=True))), **found}


def output(prompt: list[int], *tokens: list[int], finish: str = "length", **fields: Any) -> RequestOutput:
    done = [
        CompletionOutput(n, text(ids, special=False), ids, finish, logprobs=[entry(t, 3, 2) for t in ids])
        for n, ids in enumerate(tokens)
    ]
    return RequestOutput(0, None, prompt, done, **fields)


def completion(found: CompletionRequest | ChatRequest, *outputs: RequestOutput) -> dict[str, Any]:
    assert isinstance(found, CompletionRequest)
    body = completion_body(found, outputs, request_id="7", created=9, model="tiny", text=text)
    assert body == json.loads(json.dumps(body, allow_nan=False))
    return body


def test_a_text_completion_has_openais_shape():
    body = completion(request(prompt="Hello"), output([0, 1, 2], [3, 1], finish="stop"))
    assert body == {
        "id": "cmpl-7",
        "object": "text_completion",
        "created": 9,
        "model": "tiny",
        "choices": [{"index": 0, "text": " thereHel", "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }


def test_choices_are_numbered_prompt_by_prompt():
    body = completion(request(prompt=[[1], [2, 2]], n=2), output([1], [3], [2]), output([2, 2], [1], [1, 1]))
    assert [(c["index"], c["text"]) for c in body["choices"]] == [(0, " there"), (1, "lo"), (2, "Hel"), (3, "HelHel")]
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}


def test_logprobs_are_four_lists():
    body = completion(request(prompt="Hello", logprobs=1), output([1], [1, 3]))
    assert body["choices"][0]["logprobs"] == {
        "text_offset": [0, 3],
        "tokens": ["Hel", " there"],
        "token_logprobs": [-5.0, -1.0],
        "top_logprobs": [{" there": -1.0, "Hel": -5.0}, {" there": -1.0}],
    }


def test_logprobs_0_are_those_of_the_tokens_alone():
    body = completion(request(prompt="Hello", logprobs=0), output([1], [1]))
    assert body["choices"][0]["logprobs"]["top_logprobs"] == [{"Hel": -5.0}]


def test_an_echo_is_scored_but_for_its_first_token():
    scored = [None, entry(1, 3), entry(2, 3)]
    body = completion(request(prompt="Hello", echo=True, logprobs=1), output([0, 1, 2], [3], prompt_logprobs=scored))
    assert body["choices"][0]["text"] == "Hello there"
    assert body["choices"][0]["logprobs"] == {
        "text_offset": [0, 0, 3, 5],  # the first token is special, and no part of the text
        "tokens": ["</s>", "Hel", "lo", " there"],
        "token_logprobs": [None, -5.0, -5.0, -1.0],
        "top_logprobs": [None, {" there": -1.0, "Hel": -5.0}, {" there": -1.0, "lo": -5.0}, {" there": -1.0}],
    }
    assert "prompt_logprobs" not in body["choices"][0]


def test_nothing_but_an_echo():
    scored = [None, entry(2, 3)]
    found = request(prompt=[1, 2], echo=True, logprobs=0, max_tokens=0)
    body = completion(found, output([1, 2], [3], prompt_logprobs=scored))
    assert body["choices"][0]["text"] == "Hello" and body["choices"][0]["finish_reason"] == "length"
    assert body["choices"][0]["logprobs"]["tokens"] == ["Hel", "lo"]
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 0, "total_tokens": 2}


def test_tokens_that_share_a_character_start_with_it():
    body = completion(request(prompt="Hello", logprobs=0), output([1], [1, 4, 5, 2]))
    found = body["choices"][0]["logprobs"]
    assert body["choices"][0]["text"] == "Helélo" and found["text_offset"] == [0, 3, 3, 4]


def test_what_a_stop_string_cut_off_starts_at_the_texts_end():
    done = CompletionOutput(0, "Hel", [1, 3, 3], "stop", " there", logprobs=[entry(1), entry(3), entry(3)])
    body = completion(request(prompt="a", logprobs=0), RequestOutput(0, "a", [1], [done]))
    assert body["choices"][0]["logprobs"]["text_offset"] == [0, 3, 3]


def test_the_prompts_logprobs_have_vllms_shape():
    scored = [None, entry(2, 3, 1)]
    body = completion(request(prompt=[1, 2], prompt_logprobs=1), output([1, 2], [3], prompt_logprobs=scored))
    assert body["choices"][0]["prompt_logprobs"] == [
        None,
        {
            "3": {"logprob": -1.0, "rank": 1, "decoded_token": " there"},
            "2": {"logprob": -5.0, "rank": 6, "decoded_token": "lo"},
        },
    ]


def test_minus_infinity_is_a_number_in_json():
    done = CompletionOutput(0, "Hel", [1], "length", logprobs=[{1: Logprob(float("-inf"))}])
    body = completion(request(prompt="a", logprobs=0), RequestOutput(0, "a", [1], [done]))
    assert body["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["token", "top", "prompt", "chat"])
def test_no_number_that_is_none_is_made_into_one(value, place):
    """A model with damaged weights must not look like one that is very sure."""
    fine, wrong = Logprob(-1.0), Logprob(value)
    entry = {1: wrong, 2: fine} if place in ("token", "chat") else {1: fine, 2: wrong}
    done = CompletionOutput(0, "Hel", [1], "length", logprobs=[entry if place != "prompt" else {1: fine}])
    prompt_logprobs = [None, entry] if place == "prompt" else None
    answered = RequestOutput(0, "a", [1, 1], [done], prompt_logprobs)
    asked = request(prompt="a", logprobs=2, **({"prompt_logprobs": 2} if place == "prompt" else {}))
    make = partial(completion, asked)
    if place == "chat":
        asked = request(CHAT, messages=[USER], logprobs=True, top_logprobs=1)
        make = partial(chat_body, asked, request_id="7", created=9, model="tiny", text=text)
    with pytest.raises(AnswerError, match=r"a log-probability is (nan|inf), so the model's weights or its --dtype"):
        make(answered)


def test_a_chat_completion_has_openais_shape():
    found = request(CHAT, messages=[USER], logprobs=True, top_logprobs=2, n=2)
    assert isinstance(found, ChatRequest)
    body = chat_body(found, output([1, 2], [1], [4]), request_id="7", created=9, model="tiny", text=text)
    there = {"token": " there", "logprob": -1.0, "bytes": list(b" there")}
    lo = {"token": "lo", "logprob": -2.0, "bytes": list(b"lo")}
    own = {"token": "Hel", "logprob": -5.0, "bytes": list(b"Hel")}
    assert body["choices"][0] == {
        "index": 0,
        "message": {"role": "assistant", "content": "Hel", "refusal": None},
        "logprobs": {"content": [own | {"top_logprobs": [there, lo]}], "refusal": None},
        "finish_reason": "length",
    }
    assert body["choices"][1]["logprobs"]["content"][0]["bytes"] is None  # half a character has no text of its own
    assert (body["id"], body["object"], body["model"]) == ("chatcmpl-7", "chat.completion", "tiny")
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}


def test_an_error_without_a_custom_id_names_the_line():
    assert batch_answers.failure(None, 7, "invalid_json", "no object")["error"]["message"] == "line 7: no object"
    named = batch_answers.failure("a", 7, "invalid_json", "no object")
    assert named == {"custom_id": "a", "response": None, "error": {"code": "invalid_json", "message": "no object"}}
