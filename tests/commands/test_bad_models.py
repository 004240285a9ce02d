"""Model directories that cannot be run end in one sentence that says what is wrong, in library and commands alike."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from bad_models import CASES, CONFIG, FIELDS, FORMS, TOKENIZERS, bad_model
from machines import profile_file

from flexgen_triton import LLM, Policy
from flexgen_triton.commands.bench import main as bench_main
from flexgen_triton.commands.main import main
from flexgen_triton.demo import DEMO_DIR
from flexgen_triton.models.config import ModelError
from flexgen_triton.models.family import read_config
from flexgen_triton.models.locate import choose_dtype, find_model
from flexgen_triton.models.opt import FIELDS as CHECKS
from flexgen_triton.models.opt import REQUIRED

SECONDS = 2  # in which a bad model is found out

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", [*FIELDS, *FORMS])
def test_a_bad_config_is_one_sentence_within_two_seconds(tmp_path, name):
    directory = bad_model(tmp_path, name)
    start = time.perf_counter()
    with pytest.raises(ModelError) as refused:
        choose_dtype("auto", find_model(str(directory)))
    assert time.perf_counter() - start < SECONDS
    said = str(refused.value)
    assert CASES[name][1] in said and "\n" not in said and len(said) < 400
    assert name == "dtype unknown" or str(directory) in said


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_bad_tokenizer_is_one_sentence_before_anything_runs(tmp_path, name):
    with (
        pytest.raises(ModelError) as refused,
        LLM(str(bad_model(tmp_path, name)), policy=Policy(), offload_dir=tmp_path / "off") as llm,
    ):
        llm.generate("Return the")
    said = str(refused.value)
    assert CASES[name][1] in said and "token ids" in said and "\n" not in said and len(said) < 500


def test_without_a_tokenizer_token_ids_can_be_given_as_the_sentence_says(tmp_path):
    with LLM(str(bad_model(tmp_path, "tokenizer gone")), policy=Policy(), offload_dir=tmp_path / "off") as llm:
        (output,) = llm.generate([[2, 5, 6]])
    assert output.outputs[0].token_ids and output.outputs[0].text == ""


@pytest.mark.parametrize("field", [f for f in CHECKS if f != "_remove_final_layer_norm"])
@pytest.mark.parametrize("value", [None, "x", [], {}, -1, 1.5, float("nan"), 1 << 62])
def test_any_wild_value_of_any_field_is_refused_by_name(field, value):
    changed = {**CONFIG, field: value}
    if value is None and field not in REQUIRED:
        without = {name: v for name, v in CONFIG.items() if name != field}
        assert read_config(changed) == read_config(without)
        return
    with pytest.raises(ModelError, match=f"{field} is "):
        read_config(changed)


def test_what_checkpoints_really_have_is_taken():
    assert read_config({**CONFIG, "eos_token_id": [2]}).eos_ids == (2,)
    assert read_config({**CONFIG, "eos_token_id": [2, 3]}).eos_ids == (2, 3)
    assert read_config({**CONFIG, "eos_token_id": None, "pad_token_id": None}).pad_id == 1
    assert read_config({**CONFIG, "quantization_config": None, "unheard_of": [1]}) == read_config(CONFIG)


# Commands


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys) -> Callable[..., str]:
    """Runs what must fail; returns its one sentence."""
    monkeypatch.chdir(tmp_path)

    def refuse(*args: str, run: Callable[[], object] = main) -> str:
        monkeypatch.setattr(sys, "argv", ["flexgen_triton", *args])
        with pytest.raises(SystemExit) as stopped:
            run()
        lines = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 1, lines
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0].removeprefix("error: ")

    return refuse


def commands(directory: Path, machine: Path, *, is_tokenizer: bool) -> dict[str, tuple[str, ...]]:
    """The arguments of every command that takes a model."""
    model = ("--model", str(directory))
    here = ("--offload-dir", "off", "--hardware", str(machine))
    found = {
        "generate": ("generate", *model, *here, "--max-tokens", "2", "Return the"),
        "run-batch": ("run-batch", *model, *here, "-i", "in.jsonl", "-o", "out.jsonl"),
        "bench": ("bench", *model, *here, "--prompt-len", "4", "--gen-len", "2", "--no-log"),
        "plan": ("plan", *model, *here, "--prompt-len", "4", "--gen-len", "2"),
        "python -m flexgen_triton.bench": (*model, *here, "--prompt-len", "4", "--gen-len", "2", "--dry-run"),
    }
    return {k: v for k, v in found.items() if not (is_tokenizer and k in ("plan", "python -m flexgen_triton.bench"))}


def sentences(root: Path, name: str, refuse: Callable[..., str]) -> dict[str, str]:
    """The sentence with which each command refuses a bad model."""
    directory, machine = bad_model(root, name), profile_file(root)
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Return", "max_tokens": 2}}
    (root / "in.jsonl").write_text(json.dumps(line) + "\n")
    each = commands(directory, machine, is_tokenizer=name in TOKENIZERS)
    return {
        command: refuse(*args, run=bench_main if command.startswith("python") else main)
        for command, args in each.items()
    }


@pytest.mark.parametrize("name", ["layers 1e9", "heads 0", "config deep", "config a pipe", "quantised"])
def test_every_command_ends_a_bad_config_in_the_same_sentence(tmp_path, refused, name):
    found = sentences(tmp_path, name, refused)
    assert len(found) == 5 and len(set(found.values())) == 1
    assert CASES[name][1] in found["generate"]


@pytest.mark.parametrize("name", ["tokenizer no JSON", "tokenizer's bad merges"])
def test_every_command_that_makes_text_ends_a_bad_tokenizer_in_a_sentence(tmp_path, refused, name):
    found = sentences(tmp_path, name, refused)
    assert len(found) == 3 and all(CASES[name][1] in said for said in found.values())
    assert not (tmp_path / "out.jsonl").exists() or (tmp_path / "out.jsonl").read_text() == ""


def test_text_for_a_model_without_a_tokenizer(tmp_path, refused):
    model = bad_model(tmp_path, "tokenizer gone")
    said = refused("generate", "--model", str(model), "--policy", "manual", "--offload-dir", "off", "Return the")
    assert CASES["tokenizer gone"][1] in said


# Other files and names


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        (b"\xff{}", "not UTF-8"),
        ("[]", "holds no profile"),
        ({"disk_rows": 0}, "disk_rows: 0 is not above 0"),
        ({"host_bytes": -1}, "host_bytes"),
        ({"host_bytes": True}, "host_bytes"),
        ({"host_read": 10**400}, "host_read"),
        ({"overhead": {"compute": "x"}}, "overhead"),
        ({"disk_table": [[1, 2]]}, "disk_table"),
        ({"matmul": [1]}, "matmul"),
    ],
    ids=str,
)
def test_a_machines_profile_that_is_none(tmp_path, refused, content, words):
    path = profile_file(tmp_path)
    if isinstance(content, dict):
        content = json.dumps({**json.loads(path.read_text()), **content})
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    said = refused("plan", "--model", "opt-125m", "--hardware", str(path))
    assert words in said and str(path) in said and len(said) < 600


@pytest.mark.parametrize("device", ["nonsense", "cuda:x", "mps", "cuda:99"])
def test_a_device_that_is_not_there(tmp_path, refused, device):
    for command in (("generate", "a"), ("bench", "--prompt-len", "4"), ("measure", "--quick")):
        said = refused(*command, "--device", device, "--offload-dir", "off")
        assert device in said and "use cpu" in said


def test_prompts_that_are_no_text(tmp_path, refused):
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\n")
    machine = str(profile_file(tmp_path))
    for option, command in (("--prompts", "bench"), ("-f", "generate")):
        said = refused(command, option, "p.txt", "--offload-dir", "off", "--hardware", machine)
        assert "p.txt is no UTF-8 text" in said


def test_the_demo_itself_is_no_bad_model():
    assert find_model(str(DEMO_DIR)).config.hidden == CONFIG["hidden_size"]
