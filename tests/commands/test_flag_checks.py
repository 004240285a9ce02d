"""No flag is ignored silently: each has an effect in every mode of its command, or one sentence says why not."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from machines import profile_file

from flexgen_triton.commands import bench
from flexgen_triton.commands.flag_checks import OUTPUTS, RULES, check_writable
from flexgen_triton.commands.main import COMMANDS, cli, main
from flexgen_triton.commands.progress import Display

MODEL = (
    "model path offload_dir policy gpu_batch_size num_gpu_batches percent sep_layer pin_weight cpu_cache_compute "
    "keep_open_pages attn_sparsity compress_weight compress_cache overlap dtype device copies verify"
)
SAMPLING = (
    "max_tokens min_tokens temperature repetition_penalty presence_penalty frequency_penalty n stop stop_token_id "
    "ignore_eos"
)
EFFECTIVE = {  # options that do something whatever stands beside them, or contradict it and are refused for that
    "bench": f"{MODEL} gen_len json_file dry_run no_log debug_mode",
    "generate": f"{MODEL} {SAMPLING} prompts file whole is_json log_json",
    "measure": "offload_dir profile_file run_file device",
    "plan": (
        "model path hardware prompt_len gen_len num_prompts allow max_latency gpu_mem cpu_mem disk_mem dtype "
        "offload_dir top json_file plot"
    ),
    "run-batch": f"{MODEL} source output log_json gpu_mem cpu_mem disk_mem",
}
AT = ("--offload-dir", "off", "--hardware", "machine.json")
BY_HAND = ("--percent", "100", "0", "100", "0", "100", "0")
RUN = ("bench", *AT, "--prompt-len", "4", "--gen-len", "2")
DRY = (*RUN, *BY_HAND, "--dry-run")
TEXT = ("generate", "--offload-dir", "off", "Return the")
JOB = ("run-batch", "--offload-dir", "off", "-i", "in.jsonl", "-o", "out.jsonl")
IGNORED = [  # a command line, and the flag in it that would be ignored
    ((*RUN, *BY_HAND, "--allow", "4bit"), "--allow has no effect on a policy given by flags"),
    ((*TEXT, *BY_HAND, "--allow", "4bit"), "--allow"),
    ((*JOB, "--gpu-batch-size", "2", "--allow", "4bit"), "--allow"),
    ((*RUN, "--policy", "manual", "--max-latency", "9"), "--max-latency"),
    ((*TEXT, *BY_HAND, "--hardware", "machine.json"), "--hardware has no effect on a policy given by flags"),
    ((*JOB, *BY_HAND, "--hardware", "machine.json"), "--hardware"),
    ((*DRY, "--gpu-mem", "1GiB"), "--gpu-mem"),
    ((*DRY, "--cpu-mem", "1GiB"), "--cpu-mem"),
    ((*DRY, "--disk-mem", "1GiB"), "--disk-mem"),
    (("bench", *BY_HAND, "--dry-run", "--prompts", "p.txt"), "--prompts"),
    ((*DRY, "--num-prompts", "4"), "--num-prompts"),
    ((*DRY, "--trace", "t.json"), "--trace has no effect with --dry-run: nothing is run"),
    ((*RUN, "--dry-run", "--trace", "t.json"), "--trace"),
    ((*DRY, "--log-file", "l"), "--log-file"),
    ((*DRY, "--verbose", "1"), "--verbose"),
    ((*DRY, "--verify"), "--verify"),
    ((*DRY, "--seed", "1"), "--seed"),
    (("bench", *AT, "--prompts", "p.txt", "--num-prompts", "3"), "--num-prompts has no effect with --prompts"),
    (("bench", *AT, "--prompts", "p.txt", "--prompt-len", "3"), "--prompt-len"),
    (("bench", *AT, "--prompts", "p.txt", "--seed", "3"), "--seed"),
    ((*RUN, "--no-log", "--log-file", "l"), "--log-file has no effect with --no-log"),
    ((*RUN, "--cut-gen-len", "2"), "--cut-gen-len has no effect where it is not below --gen-len"),
    ((*RUN, "--cpu-attention-percent", "50"), "--cpu-attention-percent has no effect without --cpu-cache-compute"),
    ((*TEXT, "--cpu-attention-percent", "50"), "--cpu-attention-percent"),
    ((*RUN, "--group-size", "32"), "--group-size"),
    ((*RUN, *BY_HAND, "--group-size", "32"), "--group-size"),
    ((*TEXT, "--temperature", "0", "--top-p", "0.9"), "--top-p has no effect with --temperature 0"),
    ((*TEXT, "--temperature", "0", "--top-k", "5"), "--top-k"),
    ((*TEXT, "--temperature", "0", "--min-p", "0.1"), "--min-p"),
    ((*TEXT, "--temperature", "0", "--sampling-seed", "1"), "--sampling-seed"),
    ((*TEXT, "--temperature", "0", "--seed", "1"), "--seed"),
    ((*TEXT, "--sampling-seed", "1", "--seed", "1"), "--seed"),
    (("measure", "--offload-dir", "off", "--quick", "--refine", "run.json"), "--quick has no effect with --refine"),
]


def options() -> list[tuple[str, str]]:
    """Every option of every command."""
    context = click.Context(cli)
    found = []
    for name in COMMANDS:
        command = cli.get_command(context, name)
        assert command is not None
        found += [(name, option.name) for option in command.params if option.name]
    return found


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys) -> Callable[..., str]:
    """Runs what must fail in a folder with files to name; returns its one sentence."""
    monkeypatch.chdir(tmp_path)
    profile_file(tmp_path)
    for name in ("in.jsonl", "p.txt", "run.json"):
        (tmp_path / name).write_text("{}\n")

    def refuse(*args: str) -> str:
        monkeypatch.setattr(sys, "argv", ["flexgen_triton", *args])
        with pytest.raises(SystemExit) as stopped:
            main()
        lines = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 1 and len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0].removeprefix("error: ")

    return refuse


def test_every_option_of_every_command_has_an_effect_or_a_check():
    checked = {name for rule in RULES for name in rule.options}
    pairs = options()
    assert len(pairs) > 100
    unknown = [(c, o) for c, o in pairs if o not in EFFECTIVE[c].split() and o not in checked]
    assert not unknown, "say in EFFECTIVE what always has an effect; add a Rule for what has not"
    gone = [(c, o) for c, found in EFFECTIVE.items() for o in found.split() if (c, o) not in pairs]
    assert not gone
    assert checked <= {o for _, o in pairs}


def test_every_check_is_tried():
    tried = " ".join(words.split()[0] for _, words in IGNORED)
    flags = {o.name: max(o.opts, key=len) for n in COMMANDS for o in cli.get_command(click.Context(cli), n).params}
    assert all(flags[name] in tried for rule in RULES for name in rule.options)


@pytest.mark.parametrize(("args", "words"), IGNORED, ids=[" ".join(a)[:70] for a, _ in IGNORED])
def test_a_flag_that_would_be_ignored_is_refused(refused, args, words):
    said = refused(*args)
    assert said.startswith(words) and "has no effect" in said and said.endswith("; leave it out")


@pytest.mark.parametrize(
    "args",
    [
        (*RUN, "--allow", "4bit", "--group-size", "32", "--dry-run", "--num-prompts", "1"),
        (*DRY, "--compress-weight", "--group-size", "32"),
        (*DRY, "--cpu-cache-compute", "--cpu-attention-percent", "50", "--no-log", "--copies"),
        (*RUN, "--dry-run", "--num-prompts", "1", "--cpu-mem", "8GiB", "--max-latency", "1000"),
    ],
    ids=" ".join,
)
def test_a_flag_that_has_an_effect_is_not(refused, args):
    done = CliRunner().invoke(cli, args, catch_exceptions=False)
    assert done.exit_code == 0 and "plan" in done.output


def test_a_dry_run_says_that_it_is_of_the_whole_run(refused):
    """FlexGen's published commands cut their runs, and are tried with --dry-run."""
    for flags in (("--debug-mode", "fewer_batch"), ("--cut-gen-len", "2", "--gen-len", "8")):
        done = CliRunner().invoke(cli, (*DRY, *flags), catch_exceptions=False)
        assert done.exit_code == 0 and "the plan is of the whole run" in done.output


def test_the_demo_runs_where_it_is_told_to(tmp_path, monkeypatch):
    places = []
    monkeypatch.setattr(bench, "run_demo", lambda console, offload_dir: places.append(offload_dir))
    done = CliRunner().invoke(cli, ["bench", "--offload-dir", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0 and places == [(tmp_path,)]


# Files that are written in the end


@pytest.mark.parametrize("by_hand", [BY_HAND, ("--num-prompts", "1")], ids=["by hand", "automatic"])
def test_a_dry_run_writes_its_plan(refused, by_hand, tmp_path):
    args = (*RUN, *by_hand, "--dry-run", "--json", "plan.json")
    done = CliRunner().invoke(cli, args, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["model"] == "demo" and found["prompt_len"] == 4 and found["gen_len"] == 2
    assert sum(found["placement"]["weights"].values()) == found["model_bytes"] > 0
    assert found["predicted"]["hardware"] == "two slow cores" and found["predicted"]["total_s"] > 0
    assert f"total {found['predicted']['total_s']:.3f} s" in " ".join(done.output.split())


@pytest.mark.parametrize("option", ["--json", "--trace", "--log-file"])
@pytest.mark.parametrize("where", ["missing/file", "folder", "machine.json/file"])
def test_a_file_that_cannot_be_written_is_found_out_before_the_run(refused, monkeypatch, option, where, tmp_path):
    monkeypatch.setattr(bench, "run", lambda *_, **__: pytest.fail("it was run"))
    (tmp_path / "folder").mkdir()
    said = refused(*RUN, option, where)
    assert said.startswith(f"{option} {where} cannot be written: ") and said.endswith("; name another file")


def test_other_commands_look_at_their_files_too(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(Display, "__enter__", lambda self: pytest.fail("it was begun"))
    plan = ("plan", "--model", "opt-125m", "--hardware", "machine.json")
    assert "--json missing/p.json" in refused(*plan, "--json", "missing/p.json")
    assert "--plot missing/p.png" in refused(*plan, "--plot", "missing/p.png")
    assert "both name" in refused(*RUN, "--json", "a", "--trace", "./a")
    assert "--output missing/m.json" in refused("measure", "--offload-dir", "off", "--output", "missing/m.json")
    assert set(OUTPUTS) <= {o for _, o in options()}


def test_looking_leaves_nothing_behind(tmp_path):
    check_writable(tmp_path / "new")
    assert not list(tmp_path.iterdir())
    (tmp_path / "old").write_text("kept")
    check_writable(tmp_path / "old")
    os.mkfifo(tmp_path / "pipe")
    check_writable(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    check_writable(tmp_path / "link")
    assert (tmp_path / "old").read_text() == "kept" and (tmp_path / "link").is_symlink()
    assert not (tmp_path / "target").exists()
    with pytest.raises(NotADirectoryError):
        check_writable(tmp_path / "old" / "file")
    check_writable(Path("/dev/null"))
