"""The planning command: what it prints and writes, that its command runs what it found, and its one-sentence errors."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from flexgen_triton.commands import bench, plan_report
from flexgen_triton.commands import plan as plan_command
from flexgen_triton.commands.options import flags_policy, is_by_hand
from flexgen_triton.plan.policy import CompressionConfig, Policy
from flexgen_triton.plan.problem import Problem

ROOT = Path(__file__).parents[2]
T4 = ("--hardware", "t4", "--model", "opt-125m", "--prompt-len", "64", "--gen-len", "8")
SMALL = (*T4, "--num-prompts", "16")


def planned(*args: str) -> str:
    """Standard output of a run that must succeed."""
    done = CliRunner().invoke(plan_command.command, args, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def refused(*args: str, cwd: Path) -> str:
    """The one sentence of a run, in a process of its own, that must fail."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "hub")}
    command = [sys.executable, "-m", "flexgen_triton", "plan", *args]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1, done.stdout
    assert "Traceback" not in done.stderr, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def printed_command(output: str) -> list[str]:
    """The words of the command that ends the output."""
    lines = output[output.index("python -m flexgen_triton.bench") :]
    return shlex.split(lines.replace("\\\n", " "))


def parsed(command: list[str]) -> dict[str, object]:
    """The options as the benchmark itself reads them."""
    assert command[:3] == ["python", "-m", "flexgen_triton.bench"]
    context = bench.command.make_context("bench", command[3:])
    assert is_by_hand(context, context.params["policy"])
    return context.params


def test_a_known_size_on_a_shipped_machine_needs_no_checkpoint_and_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    output = planned("--model", "facebook/opt-6.7b", "--hardware", "t4", "--json", "plan.json")
    assert "prediction" in output and "nothing was run" in output
    assert "The machine's figures: As FlexGen published it" in " ".join(output.split())
    assert max(map(len, output.splitlines())) <= plan_command.WIDTH
    found = json.loads((tmp_path / "plan.json").read_text())
    best = found["policies"][0]
    assert best["simulated"] and best["tokens_per_s"] <= found["bound_tokens_per_s"]
    assert found["gap"] == pytest.approx(1 - best["tokens_per_s"] / found["bound_tokens_per_s"])
    assert f"{best['tokens_per_s']:.4g}" in output
    assert set(found["worth"]) == set(plan_report.RESOURCES)
    assert {"name", "source", "gpu_bytes"} <= set(found["hardware"])
    assert {"prefill_s", "decode_s", "lanes", "busiest", "latency_s", "memory"} <= set(best)
    assert found["frontier"][0]["latency_s"] < found["frontier"][-1]["latency_s"]
    assert found["command"] == printed_command(output)


def test_memory_adds_up_and_fits(tmp_path):
    planned(*T4, "--gpu-mem", "1200MiB", "--cpu-mem", "3GiB", "--json", str(tmp_path / "plan.json"))
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["hardware"]["gpu_bytes"] == 1200 << 20  # taken exactly
    assert found["hardware"]["disk_bytes"] < 1.5e12  # a machine's own, less a margin
    for choice in found["policies"]:
        for tier in choice["memory"].values():
            parts = [tier[kind] for kind in ("weights", "cache", "activations", "other")]
            assert min(parts) >= 0 and sum(parts) == tier["need"] <= tier["available"]


@pytest.mark.grid(cover=[])
@pytest.mark.parametrize("args", [(), ("--allow", "4bit,4bit-cache,sparse", "--dtype", "float32")])
def test_the_printed_command_runs_the_best_policy(tmp_path, args):
    file = tmp_path / "plan.json"
    output = planned(*SMALL, *args, "--gpu-mem", "1GiB", "--json", str(file))
    options = parsed(printed_command(output))
    policy = flags_policy(options)
    best = json.loads(file.read_text())["policies"][0]["policy"]
    assert plan_report.policy_json(policy) == best
    assert options["prompt_len"] == 64 and options["gen_len"] == 8 and options["num_prompts"] == 16
    assert options["model"] == "opt-125m" and options["path"] == "_DUMMY_"
    assert options["dtype"] == ("float32" if args else "auto")


@pytest.mark.parametrize(
    "policy",
    [
        Policy(),
        Policy(48, 3, 20, 79, 0, 100, 50, 25),
        Policy(2, 2, 0, 0, 0, 0, 0, 0, overlap=False, sep_layer=False, pin_weight=False, attn_sparsity=0.1),
        Policy(compress_weight=True, comp_weight_config=CompressionConfig(group_size=128), compress_cache=True),
    ],
)
def test_every_field_of_a_policy_survives_the_command(policy, tmp_path):
    model = plan_command.Model.find("opt-30b", None, "auto")
    problem = Problem(plan_command.model_spec(model.source.config, "opt-30b", "float16"), 512, 32)
    command = plan_command.bench_command(model, problem, policy, [tmp_path / "a folder", tmp_path / "b"])
    text = plan_command.shell_lines(command)
    assert all(len(line) <= plan_command.WIDTH for line in text.splitlines())
    options = parsed(shlex.split(text.replace("\\\n", " ")))
    assert flags_policy(options) == policy
    assert options["offload_dir"] == (tmp_path / "a folder", tmp_path / "b")


def test_a_checkpoint_directory_is_planned_by_its_config_alone(tiny, tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((tiny.path / "config.json").read_text())
    output = planned("--model", str(tmp_path / "bare"), "--hardware", "t4", "--prompt-len", "20", "--gen-len", "1")
    options = parsed(printed_command(output))
    assert options["model"] == str(tmp_path / "bare") and options["path"] is None


def test_a_latency_limit_holds(tmp_path):
    file = tmp_path / "plan.json"
    planned(*T4, "--json", str(file))
    free = json.loads(file.read_text())["policies"][0]
    planned(*T4, "--json", str(file), "--max-latency", str(free["latency_s"] / 3))
    found = json.loads(file.read_text())["policies"]
    assert all(choice["latency_s"] <= free["latency_s"] / 3 for choice in found)
    assert found[0]["tokens_per_s"] <= free["tokens_per_s"]


def test_the_plot_is_a_small_png(tmp_path):
    planned(*SMALL, "--plot", str(tmp_path / "plan.png"))
    data = (tmp_path / "plan.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and 10_000 < len(data) < 300_000


def test_without_matplotlib_the_plot_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("flexgen_triton.commands.plan_plot.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'flexgen_triton\[plot\]'"):
        planned(*SMALL, "--plot", str(tmp_path / "plan.png"))


@pytest.mark.grid(cover=[])
@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--gpu-mem", "300MiB"), "--gpu-mem"),
        (("--max-latency", "1e-6"), "1e-06 s or less"),
        (("--prompt-len", "2048"), "positions"),
        (("--allow", "3bit"), "what can is 4bit, 4bit-cache, sparse"),
        (("--hardware", "t5"), "known are"),
        (("--dtype", "bfloat16"), "bfloat16"),
        (("--dtype", "int8"), "dtype 'int8'"),
        (("--model", "opt-999b"), "not a directory"),
        (("--model", "nobody/nothing"), "nor to be had from the hub"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_planned_is_one_sentence(args, words, tmp_path):
    assert words in refused(*T4, *args, cwd=tmp_path)


def test_a_size_that_is_none_is_refused_at_once():
    done = CliRunner().invoke(plan_command.command, [*T4, "--gpu-mem", "16 apples"])
    assert done.exit_code == 2 and "16GiB" in done.output
