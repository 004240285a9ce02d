"""The README's two commands are what CI runs, its four ways in run as written, and its claims and links hold."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from machines import TWO_CORES

from flexgen_triton.machine.measure import profile_path, save_profile
from flexgen_triton.memory.stripes import Folders

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = ["README.md", "CONTRIBUTING.md", "kernels/README.md", "bench/results/README.md"]
PAGES += sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
WAYS = re.findall(r"```(python|sh)\n(.*?)```", README, re.DOTALL)


def test_the_two_commands_are_what_ci_runs():
    commands = [line for line in README.splitlines() if line.startswith("pip install")]
    assert len(commands) == 2
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert all(command in lines for command in commands)


def test_ci_runs_the_tests_that_they_leave_out():
    assert "python -m pytest -m slow" in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_links_to_exist(page):
    links = re.findall(r"\]\(((?!http)[^)]+)\)", (ROOT / page).read_text())
    assert page not in ("README.md", "docs/measured.md") or links
    missing = [link for link in links if not (ROOT / page).parent.joinpath(link.partition("#")[0]).exists()]
    assert not missing


def test_every_page_of_docs_is_linked_to():
    assert all(f"({page})" in README for page in PAGES if page.startswith("docs/"))


def test_the_third_line_says_what_was_not_run():
    """While no committed result is of a GPU."""
    headers = [json.loads(path.read_text())["header"] for path in (ROOT / "bench/results").glob("*/*.json")]
    has_gpu = any(header["machine"]["gpu"] for header in headers)
    assert headers and README.splitlines()[2].startswith("**Not yet run on a GPU**") == (not has_gpu)


def test_its_table_is_of_a_committed_result():
    """Speeds in the order of the file's rows, the first column behind the number of sequences."""
    (commit,) = re.findall(r"^Commit ([0-9a-f]{12})", README, re.MULTILINE)
    (path,) = (ROOT / "bench/results").glob(f"*/peers-{commit}*.json")
    rows = [row for row in json.loads(path.read_text())["rows"] if row["unit"] == "tok/s"]
    lines = re.findall(r"^\|[^|]+\| (\d+) \| \**([\d.]+)\** \|", README, re.MULTILINE)
    assert len(lines) == 3
    assert lines == [(str(row["details"]["sequences"]), f"{row['value']:.1f}") for row in rows]


def test_there_are_four_ways_in():
    starts = (
        "from flexgen_triton import LLM",
        "python -m flexgen_triton generate",
        "echo",
        "from flexgen_triton.flex_opt",
    )
    assert len(WAYS) == 4 and all(code.startswith(s) for (_, code), s in zip(WAYS, starts, strict=True))


@pytest.mark.parametrize("way", range(4))
def test_each_runs_as_written(way, tmp_path):
    """In an empty directory of a user whose machine was measured before."""
    language, code = WAYS[way]
    save_profile(TWO_CORES, profile_path(Folders.of(tmp_path / ".cache" / "flexgen_triton"), torch.device("cpu")))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "PATH": path}
    command = [sys.executable, "-c", code] if language == "python" else ["sh", "-ec", code]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    if code.startswith("echo"):
        (answer,) = (json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines())
        assert answer["custom_id"] == "a" and answer["response"]["body"]["choices"][0]["text"]
    else:
        assert len(done.stdout) > 40
    assert "Traceback" not in done.stderr
