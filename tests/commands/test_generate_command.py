"""The generate command: where prompts come from, what is written where and in which order, and its mistakes."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from flexgen_triton import LLM, Policy, SamplingParams
from flexgen_triton.commands.generate import in_order, pieces
from flexgen_triton.commands.main import cli
from flexgen_triton.sequences.outputs import CompletionOutput, RequestOutput

ROOT = Path(__file__).parents[2]
PROMPTS = ["Return the", "Raise an exception if", "This"]
GREEDY = ("--temperature", "0", "--max-tokens", "8")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def offload(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("offload")


@pytest.fixture(scope="module")
def texts(offload, one_thread) -> list[str]:
    """The library's answers to the prompts."""
    with LLM("demo", policy=Policy(gpu_batch_size=4), offload_dir=offload) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=8))
    return [o.outputs[0].text for o in outputs]


@pytest.fixture
def generate(offload):
    """Runs the command under a policy of its own."""

    def run(*args: str, stdin: str | bytes = "") -> Result:
        shared = ("generate", "--gpu-batch-size", "4", "--offload-dir", str(offload))
        return CliRunner().invoke(cli, [*shared, *args], input=stdin)

    return run


def answer(number: int, text: str = "", reason: str | None = "stop") -> RequestOutput:
    return RequestOutput(number, "p", [1], [CompletionOutput(0, text, [], reason)])


def test_one_prompt_is_completed_alone(generate, texts):
    done = generate(PROMPTS[0], *GREEDY)
    assert done.exit_code == 0 and done.stdout == texts[0] + "\n"
    assert done.stderr.startswith("1 prompt, 8 tokens, ") and "tok/s, makespan / bound" in done.stderr
    assert "busiest lane compute" in done.stderr


@pytest.mark.parametrize("source", ["arguments", "file", "stdin"])
def test_several_prompts_each_before_its_completion(generate, texts, tmp_path, source):
    lines = "\n".join([PROMPTS[0], "", *PROMPTS[1:]])
    (tmp_path / "p.txt").write_text(lines + "\n")
    args = {"arguments": PROMPTS, "file": ["-f", str(tmp_path / "p.txt")], "stdin": []}[source]
    done = generate(*args, *GREEDY, stdin=lines.replace("\n", "\r\n"))
    assert done.exit_code == 0, done.stderr
    assert done.stdout == "".join(f"{p}{t}\n\n" for p, t in zip(PROMPTS, texts, strict=True))
    assert done.stderr.startswith("3 prompts, 24 tokens, ")


def test_json_is_a_line_for_each_completion(generate, texts):
    done = generate(*PROMPTS[:2], *GREEDY, "--json", "--n", "2")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    expected = [{"prompt": p, "text": t, "finish_reason": "length"} for p, t in zip(PROMPTS, texts, strict=True)][:2]
    assert found == [expected[0]] * 2 + [expected[1]] * 2


def test_all_of_the_input_can_be_one_prompt(generate):
    done = generate(*GREEDY, "--whole", "--json", stdin="Return the\n\nlist of é\n")
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["prompt"] == "Return the\n\nlist of é"


def test_the_sampling_options_are_obeyed(generate, texts):
    word = texts[0].split()[1]
    done = generate(PROMPTS[0], *GREEDY, "--stop", f" {word}")
    assert done.stdout == texts[0][: texts[0].index(f" {word}")] + "\n"
    sampled = [generate(PROMPTS[0], "--max-tokens", "8", "--sampling-seed", seed).stdout for seed in "334"]
    assert sampled[0] == sampled[1] != sampled[2]


def test_progress_for_programs(generate):
    done = generate(*PROMPTS, *GREEDY, "--log-json")
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert lines[-1]["done"] == lines[-1]["total"] == 3 and lines[-1]["output_tokens"] == 24
    assert set(lines[-1]["memory"]) <= {"gpu", "host", "disk"}


@pytest.mark.parametrize(
    ("args", "stdin", "words"),
    [
        ((), "", "there are no prompts"),
        ((), "\n \n", "there are no prompts"),
        (("a", "--whole"), "", "given as arguments"),
        (("a", "-f", __file__), "", "-f is for those that are not"),
        ((), b"\xff\xfe", "standard input is no UTF-8 text"),
        (("a", "--temperature", "-1"), "", "temperature is -1"),
        (("a", "--policy", "auto"), "", "leave out one or the other"),
    ],
)
def test_a_mistake_is_one_sentence(generate, args, stdin, words):
    done = generate(*args, stdin=stdin)
    assert isinstance(done.exception, ValueError) and words in str(done.exception)
    assert done.stdout == ""


def test_prompts_that_cannot_be_run_are_named_and_the_others_answered(generate):
    done = generate("short", "ab" * 600, "other")
    assert str(done.exception).startswith(f"prompt 2 ('{'ab' * 20}...'): the prompt has")
    assert done.stdout.startswith("short") and "\n\nother" in done.stdout


def test_nobody_reading_is_no_error_to_report(offload):
    command = [sys.executable, "-m", "flexgen_triton", "generate", "--gpu-batch-size", "4", *PROMPTS, *GREEDY]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        [*command, "--offload-dir", str(offload)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert run.stdout and run.stderr
    run.stdout.close()
    with run.stderr as stderr:
        assert stderr.read() == ""
    assert run.wait(100) == 128 + signal.SIGPIPE


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_finished_outputs_wait_for_their_turn(order):
    groups = list(in_order(answer(n) for n in order))
    assert [o.request_id for group in groups for o in group] == [0, 1, 2, 3]
    before = order[: order.index(0) + 1]  # all that has ended when the first one does
    assert len(groups[0]) == next((n for n in range(4) if n not in before), 4)


def test_pieces_hold_back_what_may_be_the_start_of_a_stop_string():
    texts = ["a", "a EN", "a END", "a ENDE", "a ENDE E"]
    outputs = [*(answer(0, text, None) for text in texts), answer(0, "a ENDE E.", "stop")]
    assert [piece for piece, _ in pieces(outputs, ("END!", "\n"))] == ["a", " ", "", "END", "E ", "E."]
    cut = [answer(0, "a EN", None), answer(0, "a ", "stop")]
    assert [piece for piece, _ in pieces(cut, ("END!",))] == ["a ", ""]


def test_an_error_is_told_after_the_rest(generate, monkeypatch):
    """One that does not fit is named; the others' answers are written."""
    failed = RequestOutput(1, "b", [1], [], error="it does not fit")
    monkeypatch.setattr(LLM, "stream", lambda self, prompts: iter([answer(0, "x"), failed, answer(2, "y")]))
    done = generate("a", "b", "c")
    assert done.stdout == "px\n\npy\n\n"
    assert str(done.exception) == "prompt 2: it does not fit"
    line = json.loads(generate("a", "b", "c", "--json").stdout.splitlines()[1])
    assert line == {"prompt": "b", "text": None, "finish_reason": "error", "error": "it does not fit"}
