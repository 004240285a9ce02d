"""The command: what it prints and writes, and that every mistake ends in one sentence and a non-zero exit."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path

import pytest
from machines import profile_file

from flexgen_triton.bench import main

ROOT = Path(__file__).parents[1]
SMALL = (
    "--model",
    "opt-125m",
    "--path",
    "_DUMMY_",
    "--prompt-len",
    "4",
    "--gen-len",
    "2",
    "--gpu-batch-size",
    "4",
    "--no-log",
)
KEYS = (
    "model device policy prompt_len gen_len num_prompts prefill_s prefill_tok_s decode_s decode_tok_s total_s "
    "total_tok_s peak_gpu_bytes peak_host_bytes model_bytes cache_bytes hidden_bytes placement lanes makespan_s bound_s"
)


def bench(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "hub")}
    command = [sys.executable, "-m", "flexgen_triton.bench", *in_folder(cwd), *args]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=250, check=False)


def in_folder(cwd: Path) -> tuple[str, ...]:
    """What every run is told: where to work, and what machine this is."""
    if not (cwd / "machine.json").exists():
        profile_file(cwd)
    return "--offload-dir", str(cwd / "offload"), "--hardware", "machine.json"


def refused(*args: str, cwd: Path) -> str:
    """Run what must fail, in this process; returns its one sentence."""
    stderr = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(stderr):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["bench", *in_folder(cwd), *args])
        with pytest.raises(SystemExit) as stopped:
            main()
    assert stopped.value.code
    return sentence(stderr.getvalue())


def sentence(stderr: str) -> str:
    assert "Traceback" not in stderr, stderr
    lines = [line for line in stderr.splitlines() if line.lower().startswith("error")]
    assert len(lines) == 1, stderr
    return lines[0]


def test_figures_json_trace_and_log(tiny, tmp_path):
    shape = ("--prompt-len", "20", "--gen-len", "6", "--gpu-batch-size", "2", "--num-gpu-batches", "2")
    files = ("--json", "o.json", "--trace", "t.json", "--log-file", "run.log")
    done = bench("--model", str(tiny.path), *shape, "--percent", "0", "50", "0", "50", "0", "50", *files, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "o.json").read_text())
    assert set(KEYS.split()) <= set(result)
    assert result["num_prompts"] == 4 and result["prompt_len"] == 20 and result["gen_len"] == 6
    assert result["total_tok_s"] == pytest.approx(4 * 6 / result["total_s"])
    assert result["decode_tok_s"] == pytest.approx(4 * 5 / result["decode_s"])
    assert sum(result["placement"]["weights"].values()) == result["model_bytes"]
    assert result["makespan_s"] >= 0.999 * max(
        use["busy_s"] for lanes in result["lanes"].values() for use in lanes.values()
    )
    moved = result["lanes"]["decode"]["disk_in"]
    assert moved["bytes"] > 0 and moved["ops"] > 0 and moved["busy_s"] > 0
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert sum(e.get("name") == "compute" for e in events) == 6 * 2 * 8
    assert "decode throughput" in (tmp_path / "run.log").read_text()


def test_a_cut_run_projects_the_rest(tiny, tmp_path):
    shape = ("--prompt-len", "8", "--gen-len", "40", "--cut-gen-len", "5", "--gpu-batch-size", "4")
    assert bench("--model", str(tiny.path), *shape, "--no-log", "--json", "o.json", cwd=tmp_path).returncode == 0
    result = json.loads((tmp_path / "o.json").read_text())
    assert result["gen_len"] == 40
    assert result["total_s"] > 2 * result["makespan_s"]


def test_prompts_from_a_file(tmp_path):
    (tmp_path / "p.txt").write_text("Return the\nRaise an exception if the file\n\n")
    done = bench("--prompts", "p.txt", "--gen-len", "8", "--no-log", "--json", "o.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "o.json").read_text())["num_prompts"] == 2
    assert "Raise an exception if the file" in done.stdout


def test_a_dry_run_touches_nothing(tmp_path):
    shape = ("--gpu-batch-size", "32", "--num-gpu-batches", "8", "--percent", "0", "50", "0", "0", "0", "100")
    done = bench("--model", "facebook/opt-175b", "--path", "_DUMMY_", *shape, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "weights" in done.stdout and "32 x 8" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["machine.json"]


def test_random_weights_are_made_once(tmp_path):
    assert bench(*SMALL, cwd=tmp_path).returncode == 0
    stores = {p: p.stat().st_mtime_ns for p in (tmp_path / "offload").rglob("*") if p.is_file()}
    assert bench(*SMALL, cwd=tmp_path).returncode == 0
    assert stores == {p: p.stat().st_mtime_ns for p in (tmp_path / "offload").rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("percent", "words"),
    [
        ("100 1 100 0 100 0", "101 %"),
        ("50 -1 100 0 100 0", "between 0 and 100"),
        ("0 0 0 120 0 0", "between 0 and 100"),
        ("100 0 100 0", "6"),
    ],
)
def test_percentages(tiny, tmp_path, percent, words):
    assert words in refused("--model", str(tiny.path), "--percent", *percent.split(), cwd=tmp_path)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("--prompt-len 100 --gen-len 40", "128 positions"),
        ("--gpu-batch-size 0", "at least 1"),
        ("--cpu-cache-compute --cpu-attention-percent 101", "between 0 and 100"),
        ("--compress-weight --group-size 100", "group_size is 100; available is 32 or 64 or 128"),
        ("--attn-sparsity 0", "above 0 and at most 1"),
        ("--dtype int8", "dtype"),
    ],
)
def test_what_cannot_be_run(tiny, tmp_path, args, words):
    assert words in refused("--model", str(tiny.path), *args.split(), cwd=tmp_path)


def test_models_that_are_not_there(tiny, tmp_path):
    assert "not a directory" in refused("--model", str(tmp_path / "missing"), cwd=tmp_path)
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused("--model", str(tmp_path / "empty"), cwd=tmp_path)
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    assert "OPT models only" in refused("--model", str(tmp_path / "bert"), cwd=tmp_path)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((tiny.path / "config.json").read_text())
    assert "no model.safetensors" in refused("--model", str(tmp_path / "bare"), "--prompt-len", "8", cwd=tmp_path)
    assert "no known OPT size" in refused("--model", "opt-999b", "--path", "_DUMMY_", cwd=tmp_path)
    done = bench("--model", "nobody/nothing", cwd=tmp_path)  # offline, which is settled when a process starts
    assert done.returncode == 1 and "hub" in sentence(done.stderr)


def test_a_plan_that_exceeds_memory_names_one_that_fits(tmp_path):
    shape = ("--prompt-len", "2000", "--gen-len", "40", "--gpu-batch-size", "2000")
    sentence = refused("--model", "opt-125m", "--path", "_DUMMY_", *shape, cwd=tmp_path)
    assert "GiB" in sentence and "--gpu-batch-size" in sentence and "fits" in sentence


def test_a_damaged_store_is_refused_by_name(tmp_path):
    assert bench(*SMALL, cwd=tmp_path).returncode == 0
    damaged = max((tmp_path / "offload").rglob("*.safetensors"), key=lambda p: p.stat().st_size)
    with damaged.open("r+b") as file:
        file.seek(damaged.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 4]))
    for percent in ("0 0 100 0 100 0", "0 100 100 0 100 0"):
        assert damaged.name in refused(*SMALL, "--percent", *percent.split(), cwd=tmp_path)


def test_the_demo_runs_and_its_strategies_agree(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    command = [sys.executable, "-m", "flexgen_triton.bench"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    assert "three strategies agree on all" in done.stdout
