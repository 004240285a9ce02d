"""The programs to begin from: each runs on the demo model, and its figures are what its table and answers give."""

from __future__ import annotations

import json

import click
import pytest
from click.testing import CliRunner

from flexgen_triton import LLM, Policy, SamplingParams
from flexgen_triton.apps import chatbot, completion, data_wrangle

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def llm(tmp_path_factory, one_thread):
    with LLM("demo", policy=Policy(4), offload_dir=tmp_path_factory.mktemp("offload")) as llm:
        yield llm


@pytest.fixture
def ran(tmp_path):
    """Runs a program as a command; returns what it writes."""

    def run(command: click.Command, *args: str, typed: str = "") -> str:
        arguments = [*args, "--offload-dir", str(tmp_path)]
        done = CliRunner().invoke(command, arguments, input=typed, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    return run


def test_completion_writes_each_prompt_and_one_line_more(ran, llm):
    written = ran(completion.command, "--temperature", "0", "--max-tokens", "6")
    outputs = llm.generate(completion.PROMPTS, SamplingParams(temperature=0, max_tokens=6, stop="\n"))
    assert written == "".join(f"{o.prompt}{o.outputs[0].text}\n\n" for o in outputs)


def test_the_chatbot_answers_line_by_line_until_an_empty_one(ran, llm):
    written = ran(chatbot.command, "--temperature", "0", "--max-tokens", "8", typed="Hello\nWhat is a file?\n\nmore\n")
    params = SamplingParams(temperature=0, max_tokens=8, stop=chatbot.END)
    messages: list[dict[str, str]] = []
    for question in ("Hello", "What is a file?"):
        messages.append({"role": "user", "content": question})
        text = llm.generate(chatbot.written(messages), params)[0].outputs[0].text
        assert text.strip() and f"Assistant: {text.lstrip()}" in written
        messages.append({"role": "assistant", "content": text.strip()})
    assert written.endswith("User: \n") and "more" not in written


def test_a_conversation_too_long_for_the_model_loses_its_oldest_turns(llm):
    turns = [{"role": role, "content": f"{n} " * 30} for n in range(9) for role in ("user", "assistant")]
    messages = [*turns, {"role": "user", "content": "last"}]
    kept = chatbot.shortened(llm, messages, 32)
    assert 1 < len(kept) < len(messages) and kept == messages[-len(kept) :] and kept[0]["role"] == "user"
    assert len(llm.token_ids(chatbot.written(kept))) + 32 <= 512


def test_a_models_own_chat_template_is_used(llm, monkeypatch):
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    monkeypatch.setattr(llm.tokenizer, "chat_template", template)
    ids = chatbot.rendered(llm, [{"role": "user", "content": "Hello"}])
    assert ids[0] == llm.tokenizer.bos_token_id and llm.tokenizer.decode(ids[1:]) == "[user] Hello"


@pytest.mark.parametrize("task", ["impute", "match"])
def test_all_rows_at_once_are_answered_as_one_by_one(ran, task):
    flags = ("--task", task, "--max-tokens", "3")
    single = ran(data_wrangle.command, *flags)
    assert single == ran(data_wrangle.command, *flags, "--batch") and "accuracy" in single
    assert ("f1" in single) == (task == "match")


def test_a_table_of_ones_own(ran, tmp_path):
    rows = [{"name": f"n{n}", "kind": "x", "size": n} for n in range(4)]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    (tmp_path / "t.csv").write_text("name,kind,size\n" + "".join(f"n{n},x,{n}\n" for n in range(4)))
    flags = ("--column", "kind", "--examples", "3", "--max-tokens", "1")
    written = [ran(data_wrangle.command, "--table", str(tmp_path / f"t.{kind}"), *flags) for kind in ("json", "csv")]
    assert written[0] == written[1] and written[0].startswith("name: n3; size: 3; kind: ")


def test_scores():
    assert data_wrangle.scores(["Bristol ", "Paris"], ["bristol", "Bristol"]) == {"accuracy": 0.5}
    found = data_wrangle.scores(["yes", "yes", "no", "", "yes"], ["yes", "no", "no", "yes", "yes"])
    assert found == {"accuracy": 0.6, "precision": 2 / 3, "recall": 2 / 3, "f1": pytest.approx(2 / 3)}


@pytest.mark.parametrize(
    ("text", "args", "words"),
    [("a,b\n1,2\n", ["--examples", "1"], "none is left"), ("a\n1\n2\n", ["--column", "c", "--examples", "1"], "'c'")],
)
def test_tables_that_cannot_be_asked_about(tmp_path, text, args, words):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=words):
        data_wrangle.command.main(["--table", str(tmp_path / "t.csv"), *args], standalone_mode=False)
    (tmp_path / "t.json").write_text('{"a": 1')
    with pytest.raises(ValueError, match=r"t\.json cannot be read as JSON"):
        data_wrangle.read_table(tmp_path / "t.json")
