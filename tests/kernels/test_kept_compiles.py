"""Machine code is compiled once, and anew as soon as anything that decides it has changed."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from ahead_of_time import ROOT, Case, Compiled
from kept_compiles import SOURCES, compiled_cases

CASES = [
    Case(f"tile-{n}", "module", "_kernel", "sm_80", {"x_ptr": "*fp16", "M": "i32"}, {"BLOCK": n, "bias_ptr": None})
    for n in (16, 32, 64)
]


class Compiler:
    """Answers with numbers of its own instead of machine code, and counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, cases: Sequence[Case]) -> list[Compiled]:
        self.asked += map(str, cases)
        return [Compiled(n, 0, 0, 1 << n, True, ("HMMA R0", "BRA L_1"), 1, n / 3) for n, _ in enumerate(cases)]


@pytest.fixture
def compiler() -> Compiler:
    return Compiler()


@pytest.fixture
def sources(tmp_path) -> list[Path]:
    """A kernel and the helper that it imports."""
    paths = [tmp_path / "matmul.py", tmp_path / "unpack.py"]
    for path in paths:
        path.write_text("def kernel(): ...\n")
    return paths


@pytest.fixture
def compiled(tmp_path, sources, compiler):
    folder = tmp_path / "kept"
    folder.mkdir()
    return lambda cases=CASES: compiled_cases(cases, folder, sources=sources, compile_anew=compiler)


def test_a_second_run_compiles_nothing_and_answers_the_same(compiled, compiler):
    first = compiled()
    assert compiler.asked == list(map(str, CASES))
    assert compiled() == first
    assert compiler.asked == list(map(str, CASES))


@pytest.mark.parametrize("changed", [0, 1], ids=["the kernel", "what it imports"])
def test_a_changed_source_compiles_all_anew(compiled, compiler, sources, changed):
    compiled()
    sources[changed].write_text("def kernel(): pass\n")
    compiled()
    assert compiler.asked == 2 * list(map(str, CASES))
    compiled()
    assert len(compiler.asked) == 2 * len(CASES)


@pytest.mark.parametrize(
    "change", [{"constexprs": {"BLOCK": 128, "bias_ptr": None}}, {"num_warps": 8}, {"unaligned": ("x_ptr",)}], ids=str
)
def test_a_changed_case_alone_is_compiled_anew(compiled, compiler, change):
    before = compiled()
    other = replace(CASES[1], **change)
    after = compiled([CASES[0], other, CASES[2]])
    assert compiler.asked == [*map(str, CASES), str(other)]
    assert [after[0], after[2]] == [before[0], before[2]]


def test_another_triton_compiles_all_anew(compiled, compiler, monkeypatch):
    compiled()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0")
    compiled()
    assert compiler.asked == 2 * list(map(str, CASES))


def test_other_settings_of_triton_compile_all_anew(compiled, compiler, monkeypatch):
    compiled()
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/opt/ptxas")
    compiled()
    assert compiler.asked == 2 * list(map(str, CASES))


def test_what_changes_takes_the_place_of_what_was_kept(compiled, sources, tmp_path):
    """So the folder does not grow with every change of a kernel."""
    for text in ("a = 1", "a = 2", "a = 3"):
        sources[0].write_text(text)
        compiled()
    assert len(list((tmp_path / "kept").iterdir())) == len(CASES)


def test_many_at_once_leave_whole_files(compiled, compiler, tmp_path):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: compiled(), range(32)))
    assert all(answer == answers[0] for answer in answers)
    assert [path.suffix for path in (tmp_path / "kept").iterdir()] == [".json"] * len(CASES)
    asked = len(compiler.asked)
    assert compiled() == answers[0]
    assert len(compiler.asked) == asked


def test_every_kernel_is_among_the_sources():
    assert set((ROOT / "kernels").glob("*.py")) < set(SOURCES)
    assert ROOT / "tests" / "kernels" / "ahead_of_time.py" in SOURCES
