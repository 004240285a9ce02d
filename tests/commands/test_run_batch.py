"""`run-batch`: every line its answer or its error, whatever the lines hold and whatever interrupts the job.

Slower and harder: FLEXGEN_KILLS=50 FLEXGEN_KILL_LINES=500 python -m pytest -n 0 -s THIS_FILE -k any_instant
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import xxhash
from batch_jobs import CHAT, COMPLETIONS, POLICY, PROMPTS, Job, line, sampled, timeless
from click.testing import CliRunner
from machines import profile_file

from flexgen_triton import LLM, Policy, SamplingParams
from flexgen_triton.commands.run_batch import command
from flexgen_triton.demo import DEMO_DIR
from flexgen_triton.jobs.job import files_digest
from flexgen_triton.jobs.journal import Passing
from flexgen_triton.sequences.outputs import CompletionOutput, RequestOutput
from flexgen_triton.sequences.sampler import Logprob
from flexgen_triton.sequences.translator import PreparedPrompt
from flexgen_triton.stopping import SAID

KILLS = int(os.environ.get("FLEXGEN_KILLS", "4"))
KILL_LINES = int(os.environ.get("FLEXGEN_KILL_LINES", "120"))
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.content == 'raise' %}{{ raise_exception('no such message') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def offload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("offload")


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with a chat template."""
    directory = tmp_path_factory.mktemp("models") / "chatty"
    shutil.copytree(DEMO_DIR, directory, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    return directory


@pytest.fixture(scope="module")
def llm(offload: Path) -> Iterator[LLM]:
    """The demo model under the policy of the command line."""
    with LLM("demo", policy=Policy(16, 2), dtype="float32", device="cpu", offload_dir=offload) as found:
        yield found


@pytest.fixture
def make(tmp_path: Path, offload: Path):
    """Makes a job of these lines."""

    def job(lines: Sequence[bytes], model: str | Path = "demo") -> Job:
        return Job(tmp_path, lines, offload, model)

    return job


def body(record: dict[str, Any]) -> dict[str, Any]:
    assert record["error"] is None, record
    assert record["response"]["status_code"] == 200 and record["response"]["request_id"]
    return record["response"]["body"]


# Answers


def test_completions_are_the_librarys(make, llm):
    prompt, ids = PROMPTS[0][:40], llm.token_ids(PROMPTS[1][:40])
    stop = llm.generate([prompt], SamplingParams(max_tokens=12, temperature=0))[0].outputs[0].text.split()[2]
    found = make(
        [
            line("text", prompt=prompt, max_tokens=8, temperature=0),
            line("default", prompt=prompt, temperature=0),
            line("ids", prompt=ids, max_tokens=8, temperature=0),
            line("several", prompt=[prompt, PROMPTS[1][:40]], max_tokens=8, temperature=0.9, seed=5, n=2),
            line("several ids", prompt=[ids, ids[:3]], max_tokens=4, temperature=0),
            line("stop", prompt=prompt, max_tokens=12, temperature=0, stop=stop),
            line("kept", prompt=prompt, max_tokens=12, temperature=0, stop=[stop], include_stop_str_in_output=True),
            line("logprobs", prompt=prompt, max_tokens=5, temperature=0, logprobs=3),
            line("echo", prompt=prompt, max_tokens=3, temperature=0, echo=True, logprobs=1),
            line("echo ids", prompt=ids, max_tokens=3, temperature=0, echo=True),
            line("only echo", prompt=prompt, max_tokens=0, echo=True, logprobs=0),
            line("scored", prompt=prompt, max_tokens=2, prompt_logprobs=1),
            line("unseeded", prompt=prompt, max_tokens=8, temperature=1.2),
        ]
    ).done()
    bodies = {name: body(record) for name, record in found.items()}
    texts = {name: [c["text"] for c in b["choices"]] for name, b in bodies.items()}

    def expected(prompt: Any, **params: Any) -> list[str]:
        return [o.text for o in llm.generate([prompt], SamplingParams(**params))[0].outputs]

    greedy = expected(prompt, max_tokens=16, temperature=0)
    assert texts["text"] == expected(prompt, max_tokens=8, temperature=0) and texts["default"] == greedy
    assert texts["ids"] == expected(ids, max_tokens=8, temperature=0)
    assert texts["several ids"] == [expected(p, max_tokens=4, temperature=0)[0] for p in (ids, ids[:3])]
    pairs = [expected(p, max_tokens=8, temperature=0.9, seed=5, n=2) for p in (prompt, PROMPTS[1][:40])]
    assert texts["several"] == pairs[0] + pairs[1]
    assert [c["index"] for c in bodies["several"]["choices"]] == [0, 1, 2, 3]

    cut = greedy[0][: greedy[0].index(stop)]
    assert texts["stop"] == [cut] and texts["kept"] == [cut + stop]
    assert bodies["stop"]["choices"][0]["finish_reason"] == "stop"
    assert bodies["text"]["choices"][0]["finish_reason"] == "length"

    length = len(llm.token_ids(prompt))
    assert bodies["text"]["usage"] == {"prompt_tokens": length, "completion_tokens": 8, "total_tokens": length + 8}
    assert bodies["several"]["usage"]["completion_tokens"] == 32
    assert bodies["text"]["model"] == "demo" and bodies["text"]["object"] == "text_completion"

    seed = xxhash.xxh3_64_intdigest(b"0 13 0")
    assert texts["unseeded"] == expected(prompt, max_tokens=8, temperature=1.2, seed=seed)
    check_logprobs(bodies, prompt, length)


def check_logprobs(bodies: dict[str, Any], prompt: str, length: int) -> None:
    """The tables of the requests above that asked for them."""
    (choice,) = bodies["logprobs"]["choices"]
    table = choice["logprobs"]
    assert "".join(table["tokens"]) == choice["text"]
    assert all(choice["text"][at:].startswith(t) for at, t in zip(table["text_offset"], table["tokens"], strict=True))
    for token, logprob, top in zip(table["tokens"], table["token_logprobs"], table["top_logprobs"], strict=True):
        assert len(top) == 3 and max(top.values()) == top[token] == pytest.approx(logprob)  # greedy: the likeliest

    (choice,) = bodies["echo"]["choices"]
    table = choice["logprobs"]
    assert choice["text"].startswith(prompt) and len(table["tokens"]) == length + 3
    assert table["token_logprobs"][0] is None and table["top_logprobs"][0] is None
    assert all(p <= 0 for p in table["token_logprobs"][1:])
    assert "".join(table["tokens"][1:]) == choice["text"] and table["text_offset"][:2] == [0, 0]
    assert bodies["echo ids"]["choices"][0]["text"].startswith(PROMPTS[1][:40])

    (choice,) = bodies["only echo"]["choices"]
    assert choice["text"] == prompt and len(choice["logprobs"]["tokens"]) == length
    assert bodies["only echo"]["usage"]["completion_tokens"] == 0
    (scores,) = (c["prompt_logprobs"] for c in bodies["scored"]["choices"])
    assert len(scores) == length and scores[0] is None and all(1 <= len(s) <= 2 for s in scores[1:])


def test_chats_are_rendered_by_the_models_template(make, chatty, llm):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPTS[0][:40]}]
    parts = [messages[0], {"role": "user", "content": [{"type": "text", "text": PROMPTS[0][:40]}]}]
    rendered = f"system: Be brief.\nuser: {PROMPTS[0][:40]}\nassistant:"
    found = make(
        [
            line("short", CHAT, messages=messages, max_tokens=6, temperature=0),
            line("parts", CHAT, messages=parts, max_completion_tokens=6, temperature=0),
            line("long", CHAT, messages=[{"role": "user", "content": "word " * 480}], temperature=0, ignore_eos=True),
            line("logprobs", CHAT, messages=messages, max_tokens=4, n=2, seed=1, logprobs=True, top_logprobs=2),
            line("refused", CHAT, messages=[{"role": "user", "content": "raise"}]),
            line("too long", CHAT, messages=[{"role": "user", "content": "word " * 600}]),
            line("completion", prompt=rendered, max_tokens=3),
        ],
        chatty,
    ).done()
    ids = llm.tokenizer(rendered, add_special_tokens=False)["input_ids"]
    (expected,) = llm.generate([ids], SamplingParams(max_tokens=6, temperature=0))
    for name in ("short", "parts"):
        answer = body(found[name])
        (choice,) = answer["choices"]
        assert answer["object"] == "chat.completion" and answer["model"] == "chatty"
        assert choice["message"] == {"role": "assistant", "content": expected.outputs[0].text, "refusal": None}
        assert answer["usage"] == {"prompt_tokens": len(ids), "completion_tokens": 6, "total_tokens": len(ids) + 6}
    assert body(found["long"])["usage"]["total_tokens"] == llm.spec.max_positions
    first, second = body(found["logprobs"])["choices"]
    assert first["message"]["content"] != second["message"]["content"]
    for choice in (first, second):
        content = choice["logprobs"]["content"]
        assert "".join(c["token"] for c in content) == choice["message"]["content"] and len(content) == 4
        assert all(bytes(c["bytes"]).decode() == c["token"] and len(c["top_logprobs"]) == 2 for c in content)
        assert all(c["top_logprobs"][0]["logprob"] >= c["top_logprobs"][1]["logprob"] for c in content)
    assert "no such message" in found["refused"]["error"]["message"]
    assert "512 positions" in found["too long"]["error"]["message"]
    assert body(found["completion"])["object"] == "text_completion"


# Lines that cannot be answered


def bad_lines() -> list[tuple[bytes, str | None, str]]:
    """Lines of every wrong kind: the line, its custom_id as it is to come back, words of its error."""
    good = {"custom_id": "x", "method": "POST", "url": COMPLETIONS, "body": {"prompt": "Hello"}}
    unreadable = [
        (b"not json", "not valid JSON"),
        (b'{"custom_id": "cut", "method": "PO', "not valid JSON"),
        (b"[1, 2, 3]", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b"17", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b"{}", "custom_id is missing"),
        (b"\x00" * 64, "not valid JSON"),
        (b'{"custom_id": "a\x00b"}', "not valid JSON"),
        (b'{"custom_id": "\xff\xfe"}', "not UTF-8"),
        (b"\xe2\x82", "not UTF-8"),
        (b"[" * 100_000, "too deeply"),
        (b'{"a":' * 100_000, "too deeply"),
        (b'{"custom_id": "x", "body": {"temperature": NaN}}', "NaN"),
        (b'{"custom_id": "x", "body": {"seed": ' + b"1" * 5000 + b"}}", "4300 digits"),
        (b'{"custom_id": "x", "custom_id": "y"}', "given twice"),
        (b'{"custom_id": "x"} {"custom_id": "y"}', "not valid JSON"),
        (b'{"custom_id": "' + b"x" * (10 << 20) + b'"}', "10485777 bytes; at most 8388608 are read"),
        (json.dumps(good | {"custom_id": None}).encode(), "custom_id is missing"),
        (json.dumps(good | {"custom_id": 5}).encode(), "custom_id is 5"),
        (json.dumps(good | {"custom_id": ""}).encode(), "custom_id is"),
        (json.dumps(good | {"custom_id": ["x"]}).encode(), "custom_id is a list"),
    ]
    outside = [
        ({"method": "GET"}, "method is"),
        ({"method": None}, "method is"),
        ({"url": "/v1/embeddings"}, "url is"),
        ({"url": None}, "url is"),
        ({"url": 7}, "url is 7"),
        ({"body": None}, "body is"),
        ({"body": "text"}, "body is"),
        ({"body": []}, "body is"),
        ({"extra": 1}, "extra is no field"),
    ]
    inside = [
        ({"prompt": None}, "no prompt"),
        ({"prompt": 5}, "prompt is 5"),
        ({"prompt": []}, "prompt is a list of 0"),
        ({"prompt": [[]]}, "prompt is empty"),
        ({"prompt": ["a", 1]}, "prompt 1 is 1"),
        ({"prompt": [1, 99_999]}, "token id 99999; the vocabulary has 4096"),
        ({"prompt": [[1], [4096]]}, "prompt 1: the prompt has token id 4096"),
        ({"prompt": [1, -1]}, "prompt holds -1"),
        ({"prompt": [1, 10**40]}, "a number of 41 digits"),
        ({"prompt": "word " * 600}, "512 positions"),
        ({"prompt": [7] * 512}, "512 positions"),
        ({"prompt": "\ud800"}, "surrogate"),
        ({"max_tokens": 10_000}, "512 positions"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": 2.5}, "max_tokens is 2.5"),
        ({"max_tokens": 10**300}, "a number of 301 digits"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": "0"}, "temperature is"),
        ({"temperature": 10**400}, "a number of 401 digits"),
        ({"top_p": 2}, "top_p is 2"),
        ({"n": 0}, "n is 0"),
        ({"n": True}, "n is true"),
        ({"seed": "one"}, "seed is"),
        ({"stop": {}}, "stop is an object"),
        ({"stop": ""}, "stop is"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"min_tokens": 99}, "min_tokens is 99"),
        ({"presence_penalty": 9}, "presence_penalty is 9"),
        ({"frequency_penalty": None, "frequency": 1}, "frequency is no parameter"),
        ({"logit_bias": {"5": 100}}, "logit_bias"),
        ({"best_of": 4}, "best_of is 4"),
        ({"suffix": "end"}, "suffix"),
        ({"stream": True}, "stream is true"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": []}, "tools is no parameter"),
        ({"return_token_ids": True}, "return_token_ids is no parameter"),
        ({"model": ["demo"]}, "model is"),
        ({"stop_token_ids": [-3]}, "stop_token_ids holds -3"),
    ]
    chats = [
        ({"messages": "Hello"}, "messages is"),
        ({"messages": [{"role": "user"}]}, "no content"),
        ({"messages": [{"role": "user", "content": "Hello"}]}, "demo has no chat template"),
        ({"messages": [{"role": "user", "content": "Hello"}], "tools": [{"type": "function"}]}, "tools"),
        ({"messages": [{"role": "user", "content": "Hello"}], "response_format": {"type": "json_schema"}}, "response_"),
    ]
    found: list[tuple[bytes, str | None, str]] = [(raw, None, words) for raw, words in unreadable]
    for change, words in outside:
        name = f"outside {len(found)}"
        found.append((json.dumps(good | {"custom_id": name} | change).encode(), name, words))
    for change, words in inside:
        name = f"inside {len(found)}"
        found.append((line(name, **({"prompt": "Hello"} | change)), name, words))
    for change, words in chats:
        name = f"chat {len(found)}"
        found.append((line(name, CHAT, **change), name, words))
    return found


def test_a_hundred_malformed_lines_stop_no_good_one(make, llm):
    bad = bad_lines()
    good = [line(f"good {n}", prompt=PROMPTS[n % len(PROMPTS)][:30], max_tokens=3, temperature=0) for n in range(40)]
    twice = [line(f"good {n}", prompt="again", max_tokens=3) for n in range(25)]
    blank = [b"", b"   ", b"\t\r"]
    shuffled = (
        [("bad", n) for n in range(len(bad))] + [("good", n) for n in range(40)] + [("blank", n) for n in range(3)]
    )
    random.Random(1).shuffle(shuffled)
    shuffled += [("twice", n) for n in range(25)]
    lines = {"bad": [raw for raw, _, _ in bad], "good": good, "twice": twice, "blank": blank}
    job = make([lines[kind][n] for kind, n in shuffled])
    result = job.run()
    assert result.exit_code == 0, (result.output, result.exception)

    records = {int(r["id"].split("_")[2]): r for r in map(json.loads, job.output.read_bytes().splitlines())}
    assert len(records) == len(shuffled) - 3 and len(bad) + 25 == 100
    for number, (kind, n) in enumerate(shuffled, 1):
        if kind == "blank":
            assert number not in records
            continue
        record, message = records[number], (records[number]["error"] or {}).get("message", "")
        if kind == "good":
            assert record["custom_id"] == f"good {n}" and body(record)["usage"]["completion_tokens"] == 3
            continue
        assert record["response"] is None and record["error"]["code"] and len(message) < 250, record
        if kind == "twice":
            first = shuffled.index(("good", n)) + 1
            assert record["custom_id"] == f"good {n}" and f"line {first} has the same custom_id" in message
            continue
        _, custom_id, words = bad[n]
        assert record["custom_id"] == custom_id and words in message, (record, words)
        assert (custom_id is None) == message.startswith(f"line {number}: ")
    texts = [
        o.outputs[0].text
        for o in llm.generate([p[:30] for p in PROMPTS[:3]], SamplingParams(max_tokens=3, temperature=0))
    ]
    by_id = {r["custom_id"]: r for r in records.values() if r["response"]}
    assert [body(by_id[f"good {n}"])["choices"][0]["text"] for n in range(3)] == texts
    assert "100 of them with an error" in result.output


def test_a_line_that_fits_no_memory_is_an_error_of_its_own(make):
    lines = [line("short", prompt="Hello", max_tokens=2), line("both", prompt=[[5] * 400, [6]], max_tokens=100)]
    found = make([*lines, line("other", prompt="there", max_tokens=2)]).done(
        "--percent", "100", "0", "0", "0", "100", "0", "--disk-mem", "1MiB"
    )  # a token's cache is 9 KiB
    assert body(found["short"]) and body(found["other"])
    assert found["both"]["response"] is None and found["both"]["error"]["code"] == "not_run"
    assert "disk" in found["both"]["error"]["message"].lower()


def test_an_input_of_nothing_is_done(make):
    job = make([b""])
    result = job.run()
    assert result.exit_code == 0 and "all 0 lines" in result.output and job.output.read_bytes() == b""


# Going on


def test_a_finished_job_is_done_and_a_grown_one_goes_on(make):
    lines = sampled(5)
    job = make(lines[:3])
    first = job.done()
    again = job.run()
    assert again.exit_code == 0 and again.output == f"all 3 lines of {job.source} are done: {job.output}\n"
    assert job.records() == first
    job.source.write_bytes(b"\n".join([*lines, lines[0]]))  # its last line, a repeated one, has no line end
    grown = job.done()
    assert len(job.output.read_bytes().splitlines()) == 6 and len(grown) == 5
    (repeated,) = (r for r in map(json.loads, job.output.read_bytes().splitlines()) if "000000006" in r["id"])
    assert "line 1 has the same custom_id" in repeated["error"]["message"]
    assert {name: grown[name] for name in first} == first


def test_another_job_on_the_same_output_is_refused(make, chatty):
    job = make(sampled(4))
    job.done()
    assert "begun with model demo, this is chatty" in job.refused("--model", str(chatty))
    assert "begun with dtype float32, this is float16" in job.refused("--dtype", "float16")
    assert "begun with seed 0, this is 3" in job.refused("--seed", "3")
    assert "begun with weights uncompressed, this is in 4 bits, groups of 64" in job.refused("--compress-weight")
    assert "begun with cache uncompressed, this is in 4 bits" in job.refused("--compress-cache")
    assert "begun with attn_sparsity 1.0, this is 0.5" in job.refused("--attn-sparsity", "0.5")
    assert job.run("--gpu-batch-size", "3").exit_code == 0  # changes no number

    lines = sampled(4)
    job.source.write_bytes(b"\n".join([lines[0], lines[2], lines[1], lines[3]]))
    assert "line 2 of the input is not the one" in job.refused()
    job.source.write_bytes(b"\n".join(lines[:2]))
    assert "answers line 4, the input has 2 lines" in job.refused()
    job.source.write_bytes(b"\n".join(lines))
    job.output.write_bytes(job.output.read_bytes().replace(b'"custom_id": "request-1"', b"", 1))
    assert "is not as this job wrote it" in job.refused()


def test_formats_that_an_automatic_policy_is_told_are_part_of_the_job(make, tmp_path):
    job = make(sampled(4))
    job.args = [a for a in job.args if a not in POLICY] + ["--hardware", profile_file(tmp_path), "--device", "cpu"]
    job.done("--compress-cache")
    assert "begun with cache in 4 bits, this is uncompressed" in job.refused()
    job.args = [a for a in job.args if a not in ("--hardware", profile_file(tmp_path))]
    assert job.run("--compress-cache", "--gpu-batch-size", "2").exit_code == 0  # by hand, of the same formats


def test_files_that_are_not_the_jobs_are_left_alone(make):
    job = make(sampled(2))
    job.output.write_text("mine\n")
    assert "no batch wrote it" in job.refused()
    assert "is the input too" in job.refused("-o", str(job.source))
    job.output.unlink()
    os.mkfifo(job.source.with_name("pipe"))
    assert "no ordinary file" in job.refused("-i", str(job.source.with_name("pipe")))
    assert "no ordinary file" in job.refused("-o", str(job.source.with_name("pipe")))


def test_a_models_digest_is_of_its_bytes_not_of_its_place(chatty, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(chatty, copy)
    assert files_digest(copy) == files_digest(chatty) != files_digest(DEMO_DIR)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-100] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert files_digest(copy) != files_digest(chatty)


@pytest.mark.slow
def test_killed_at_any_instant_it_ends_as_if_it_never_was(tmp_path, offload):
    """SIGKILL at random instants of start, work and end, and a SIGINT and a SIGTERM among them."""
    lines = sampled(KILL_LINES)
    lines[7::20] = [line("request-3", prompt="again")] * len(lines[7::20])  # repeated ids, and what is no JSON
    lines[9::20] = [b"not json"] * len(lines[9::20])
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole, job = (Job(tmp_path / name, lines, offload) for name in ("whole", "killed"))
    job.args += ["--gpu-batch-size", "2"]  # few at a time: the job is to last, and a policy is invisible
    whole.done()
    chance, kinds = random.Random(2), [signal.SIGINT, *[signal.SIGKILL] * (KILLS // 2), signal.SIGTERM]
    kinds += [signal.SIGKILL] * (KILLS - KILLS // 2)
    seen: list[int] = []
    for n, kind in enumerate(kinds):
        before = job.written()
        share = (KILL_LINES - before) // (len(kinds) - n + 1)
        wanted = before + (chance.randint(0, 2 * share) if kind == signal.SIGKILL else max(share, 1))
        process = job.start()
        if n % 5 == 4:  # somewhere in its start
            wanted = 0
            time.sleep(chance.uniform(0, 4))
        while job.written() < wanted and process.poll() is None:
            time.sleep(0.003)
        if n == 0:
            process.send_signal(signal.SIGSTOP)
            assert "is being written by another process" in job.refused()
            process.send_signal(signal.SIGCONT)
        time.sleep(chance.uniform(0, 0.03) if kind == signal.SIGKILL else 0)
        process.send_signal(kind)
        output, errors = process.communicate(timeout=100)
        seen.append(job.written())
        if process.returncode == 0:
            break
        assert output == ""
        if kind == signal.SIGKILL:
            assert process.returncode == -kind, errors
        else:
            assert process.returncode == 128 + kind, errors
            said = f"stopped: {seen[-1]} of {KILL_LINES} lines are done; the same command goes on"
            assert errors.splitlines() == [SAID.decode().strip(), said]
            assert job.output.read_bytes().endswith(b"\n")
    assert len(seen) > 0.8 * len(kinds), f"it was done after {len(seen)} of {len(kinds)} signals"
    print(f"lines done after each signal: {seen}")
    result = job.run()
    assert result.exit_code == 0, (result.output, result.exception)

    assert job.answers() == whole.answers()
    assert len(job.output.read_bytes().splitlines()) == KILL_LINES


def test_a_full_disk_stops_the_job_and_it_goes_on(make):
    job = make(sampled(60))
    process = job.start(limit=10_000)
    output, errors = process.communicate(timeout=100)
    done = job.written()
    assert process.returncode == 1 and output == "" and errors.count("\n") == 1, errors
    assert errors.startswith("error: ") and f"the {done} lines done are kept" in errors and "file too large" in errors
    assert 0 < done < 60 and len(job.records()) == done
    assert len(job.done()) == 60


# Standard input and output


def test_answers_go_to_standard_output_and_leave_nothing_behind(make):
    job = make([*sampled(3), b"not json"])
    result = job.run("-o", "-")
    assert result.exit_code == 0, (result.output, result.exception)
    passed = timeless(map(json.loads, result.stdout.splitlines()))
    notice, *_, last = result.stderr.splitlines()
    assert "not kept: a job that is stopped begins anew" in notice
    assert last == f"all 4 lines of {job.source} are done, 4 in this run, 1 of them with an error"
    assert not job.output.exists() and [p.name for p in job.source.parent.iterdir()] == ["in.jsonl"]
    job.done()
    assert job.answers() == passed
    again = job.run("-o", "-")  # nothing is gone on with
    assert timeless(map(json.loads, again.stdout.splitlines())) == passed


def test_requests_come_on_standard_input_and_the_job_goes_on(make, monkeypatch):
    lines, whole = sampled(4), make(sampled(4))
    whole.done()
    expected = whole.answers()
    whole.output.unlink()
    args = ["-i", "-", *map(str, whole.args[2:])]
    for count in (2, 4, 4):
        given = b"\n".join(lines[:count]) + b"\n"
        result = CliRunner().invoke(command, args, input=given)
        assert result.exit_code == 0, (result.output, result.exception)
        assert f"all {count} lines of standard input are done" in result.stderr and not result.stdout
    assert whole.answers() == expected and whole.written() == 4
    both = CliRunner().invoke(command, [*args, "-o", "-"], input=given)
    assert timeless(map(json.loads, both.stdout.splitlines())) == expected


def test_a_stopped_job_on_standard_output_says_that_it_begins_anew(make, monkeypatch, capfd):
    append, seen = Passing.append, []

    def stopping(self: Passing, *args: Any) -> None:
        append(self, *args)
        seen.append(args)
        if len(seen) == 3:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Passing, "append", stopping)
    result = make(sampled(40)).run("-o", "-", "--gpu-batch-size", "2")
    done = len(result.stdout.splitlines())
    assert result.exit_code == 143 and 3 <= done < 40 and SAID.decode() == capfd.readouterr().err
    assert result.stderr.splitlines()[-1] == f"stopped: {done} of 40 lines are done; the same command begins anew"


def test_nobody_reading_ends_the_job_without_a_word(make, monkeypatch, capfd):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as nobody:
        monkeypatch.setattr(sys, "stdout", nobody)
        with pytest.raises(SystemExit) as ended:
            command.main([*map(str, make(sampled(3)).args), "-o", "-"], standalone_mode=False)
        monkeypatch.undo()
        with suppress(BrokenPipeError):
            nobody.close()
    assert ended.value.code == 128 + signal.SIGPIPE
    assert capfd.readouterr().err.splitlines() == [
        "answers go to standard output and are not kept: a job that is stopped begins anew"
    ]


def test_answers_are_not_added_to_the_requests(make, capfd):
    job = make(sampled(2))
    keep = os.dup(1)
    try:
        with job.source.open("ab") as file:
            os.dup2(file.fileno(), 1)
        assert "standard output is the input too; name another output" in job.refused("-o", "-")
    finally:
        os.dup2(keep, 1)
        os.close(keep)


def test_a_log_probability_that_is_no_number_is_an_error_of_its_line(make, monkeypatch):
    def stream(self: LLM, prompts: Iterable[PreparedPrompt]) -> Iterator[RequestOutput]:
        for n, _ in enumerate(prompts):
            done = CompletionOutput(0, "x", [5], "length", logprobs=[{5: Logprob([math.nan, -1.0][n])}])
            yield RequestOutput(n, "a", [5], [done])

    monkeypatch.setattr(LLM, "stream", stream)
    found = make([line(name, prompt="a", max_tokens=1, logprobs=0) for name in ("broken", "fine")]).done()
    assert found["broken"]["response"] is None and found["broken"]["error"]["code"] == "no_number"
    assert found["broken"]["error"]["message"].startswith("a log-probability is nan")
    assert body(found["fine"])["choices"][0]["logprobs"]["token_logprobs"] == [-1.0]


def test_an_answer_that_was_edited_is_noticed_before_the_job_goes_on(make):
    job = make(sampled(4))
    job.done()
    whole = job.output.read_bytes()
    job.output.write_bytes(whole.replace(b'"text": "', b'"text": "well, ', 1))
    assert "line 1 of " in (said := job.refused()) and "keep the 0 lines before it" in said
    job.output.write_bytes(whole.split(b"\n", 1)[1])  # without the edited line: it is answered anew
    job.done()
    assert sorted(job.answers()) == sorted(timeless(map(json.loads, whole.splitlines())))


def test_a_line_of_more_prompts_than_a_block_has_one_answer(make):
    found = make([line("many", prompt=[[n + 4] for n in range(70)], max_tokens=2, temperature=0.5)]).done()
    assert [c["index"] for c in body(found["many"])["choices"]] == list(range(70))
