"""`python -m flexgen_triton`: its commands, the files they write, and mistakes in one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from flexgen_triton.commands import bench
from flexgen_triton.commands.main import cli, main
from flexgen_triton.memory.drives import concern, storage, takes_direct
from flexgen_triton.plan.hardware import load_profile

ROOT = Path(__file__).parents[2]


def run(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "flexgen_triton", *args]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=250, check=False)


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys) -> Callable[..., str]:
    """Runs what must fail in `tmp_path`; returns its one sentence."""
    monkeypatch.chdir(tmp_path)

    def refuse(*args: str) -> str:
        monkeypatch.setattr(sys, "argv", ["flexgen_triton", *args])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]

    return refuse


@pytest.mark.slow
def test_measured_kept_and_corrected(tmp_path, refused):
    """`measure` writes the profile that `--refine` corrects in place."""
    at = ("--offload-dir", str(tmp_path / "offload"), "--device", "cpu")
    done = run("measure", "--quick", *at, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "offload").glob("machine-*.json")
    assert str(path) in done.stdout and "product, 4-bit" in done.stdout
    told = concern(tmp_path / "offload", storage(tmp_path), is_direct=takes_direct(tmp_path))
    assert (told is None) == ("warning: " not in done.stderr) and (told or "") in done.stderr
    assert load_profile(path).correction == {}

    lanes = {"decode": {"compute": {"busy_s": 3.0}}}
    predicted = {"decode": {"compute": {"busy_s": 2.0}}}
    figures = {"makespan_s": 4.0, "lanes": lanes, "predicted": {"lanes": predicted}}
    (tmp_path / "run.json").write_text(json.dumps(figures))
    assert CliRunner().invoke(cli, ["measure", *at, "--refine", str(tmp_path / "run.json")]).exit_code == 0
    assert load_profile(path).correction == {"compute": 1.5}

    (tmp_path / "run.json").write_text("{}")
    assert "bench --json" in refused("measure", *at, "--refine", "run.json")
    assert load_profile(path).correction == {"compute": 1.5}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("--device tpu9", "tpu9"),
        ("--device meta", "one to compute on: use cpu"),
        ("--refine run.json --device cpu", "no profile of this machine"),
        ("--offload-dir file --quick --device cpu", "file"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, refused, args, words):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "file").write_text("")
    options = args.split()
    where = () if "--offload-dir" in options else ("--offload-dir", "offload")
    assert words in refused("measure", *options, *where)


def test_bench_is_a_command_too(tmp_path, refused):
    done = run("bench", "--help", cwd=tmp_path)
    assert done.returncode == 0 and "--gpu-batch-size" in done.stdout
    assert "missing" in refused("bench", "--model", "./missing", "--offload-dir", "offload")


def test_bench_without_flags_is_the_demo(tmp_path, monkeypatch):
    """By either way in, and whatever the caller's own arguments are."""
    calls = []
    monkeypatch.setattr(bench, "run_demo", lambda console, offload_dir: calls.append("demo"))
    monkeypatch.setattr(bench, "run", lambda console, **options: calls.append(options["prompt_len"]))
    for command, args in ((bench.command, []), (cli, ["bench"])):
        assert CliRunner().invoke(command, args, catch_exceptions=False).exit_code == 0
        flags = [*args, "--prompt-len", "512"]  # a default, but asked for
        assert CliRunner().invoke(command, flags, catch_exceptions=False).exit_code == 0
    assert calls == ["demo", 512, "demo", 512]
