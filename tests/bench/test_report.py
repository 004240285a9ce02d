"""Result files: written, read, compared; and the figures that peers.py puts in them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import peers
import pytest
import report
import rows
from limits import LimitedRun
from make_checkpoint import Recipe, make_checkpoint
from peers import Case, Figures
from rows import Row, read_results, write_results

HERE = {"cpu": "Some CPU @ 2.50GHz", "cores": 2, "memory_bytes": 24 * 2**30, "gpu": None}
THERE = {"cpu": "Some CPU @ 2.50GHz", "cores": 16, "memory_bytes": 128 * 2**30, "gpu": "NVIDIA H200"}


def result_file(path: Path, *given: Row, machine: dict[str, Any] = HERE) -> Path:
    write_results(path, list(given), {"machine": machine, "commit": {"id": "abc", "dirty": False}})
    return path


def judge(tmp_path: Path, old: Row, new: Row, machine: dict[str, Any] = HERE) -> int:
    files = result_file(tmp_path / "old.json", old), result_file(tmp_path / "new.json", new, machine=machine)
    return report.main([str(file) for file in files])


@pytest.mark.parametrize(
    ("better", "new", "code"),
    [("higher", 89, 1), ("higher", 91, 0), ("lower", 111, 1), ("lower", 109, 0), ("higher", 150, 0), ("lower", 50, 0)],
)
def test_an_11_percent_loss_is_flagged_and_a_9_percent_one_is_not(
    tmp_path: Path, better: str, new: float, code: int
) -> None:
    assert judge(tmp_path, Row("a", 100, "x", better), Row("a", new, "x", better)) == code


@pytest.mark.parametrize(("share", "code"), [(0.70, 1), (0.73, 0)], ids=["11 %", "9 %"])
def test_a_row_with_a_roof_is_judged_by_its_share(tmp_path: Path, share: float, code: int) -> None:
    """The value halves, as on a busy machine: the roof of the same run fell with it."""
    old = Row("read", 2e9, "B/s", roof=2.5e9, share=0.8)
    assert judge(tmp_path, old, Row("read", 1e9, "B/s", roof=1e9 / share, share=share)) == code


def test_a_times_share_is_better_when_higher(tmp_path: Path) -> None:
    old, new = Row("a", 1.0, "s", "lower", roof=0.8, share=0.8), Row("a", 1.0, "s", "lower", roof=0.5, share=0.5)
    assert judge(tmp_path, old, new) == 1
    assert judge(tmp_path, new, old) == 0


def test_on_another_machine_only_shares_are_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert judge(tmp_path, Row("a", 100, "x"), Row("a", 1, "x"), machine=THERE) == 0
    assert "not judged" in capsys.readouterr().out
    assert judge(tmp_path, Row("a", 100, "x", share=0.9), Row("a", 1, "x", share=0.5), machine=THERE) == 1


def test_a_row_that_no_longer_finishes_is_a_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    killed = Row("a", None, "tok/s", note="killed for memory")
    assert judge(tmp_path, Row("a", 100, "tok/s"), killed) == 1
    assert "killed for memory" in capsys.readouterr().out
    assert judge(tmp_path, killed, Row("a", 100, "tok/s")) == 0
    assert judge(tmp_path, killed, killed) == 0


def test_missing_and_new_rows_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert judge(tmp_path, Row("gone", 1, "x"), Row("fresh", 1, "x")) == 0
    verdicts = {line.split()[0]: line.split()[-1] for line in capsys.readouterr().out.splitlines() if line}
    assert (verdicts["gone"], verdicts["fresh"]) == ("missing", "new")


def test_nothing_to_lose_is_not_judged(tmp_path: Path) -> None:
    assert judge(tmp_path, Row("a", 0, "B", "lower"), Row("a", 5, "B", "lower")) == 0


def test_the_limit_can_be_set(tmp_path: Path) -> None:
    files = [str(result_file(tmp_path / f"{value}.json", Row("a", value, "x"))) for value in (100, 80)]
    assert report.main(files) == 1
    assert report.main([*files, "--max-loss", "25"]) == 0


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"header": {}, "rows": [{"name": "a"}]}'])
def test_what_is_no_result_file_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    bad, good = tmp_path / "bad.json", result_file(tmp_path / "good.json")
    bad.write_text(text)
    assert report.main([str(good), str(bad)]) == 2
    error = capsys.readouterr().err
    assert "bad.json is not a result file" in error and error.count("\n") == 1


def test_rows_survive_writing_and_keep_what_others_added(tmp_path: Path) -> None:
    row = Row("a", 1.5, "x", "lower", roof=1.0, share=0.7, note="n", details={"runs": [1, 2]})
    path = result_file(tmp_path / "deep" / "a.json", row)
    assert read_results(path).rows == (row,)
    data = json.loads(path.read_text())
    data["rows"][0]["bytes"] = 7
    path.write_text(json.dumps(data))
    assert read_results(path).rows[0].details == {"runs": [1, 2], "bytes": 7}


def benchmark_json(path: Path, median: float, **extra_info: object) -> str:
    benchmark = {"name": "test_read", "stats": {"median": median}, "extra_info": extra_info}
    machine = {"cpu": {"brand_raw": "Some CPU", "count": 2}}
    path.write_text(json.dumps({"machine_info": machine, "commit_info": {"id": "f" * 40}, "benchmarks": [benchmark]}))
    return str(path)


def test_pytest_benchmarks_json_is_understood(tmp_path: Path) -> None:
    old = benchmark_json(tmp_path / "old.json", 1.0)
    assert report.main([old, benchmark_json(tmp_path / "slow.json", 1.11)]) == 1
    assert report.main([old, benchmark_json(tmp_path / "same.json", 1.09)]) == 0
    roofed = benchmark_json(tmp_path / "roofed.json", 1.0, roof=0.8, share=0.8)
    assert report.main([roofed, benchmark_json(tmp_path / "busy.json", 3.0, roof=2.3, share=0.77)]) == 0
    assert report.main([roofed, benchmark_json(tmp_path / "lost.json", 1.0, roof=0.5, share=0.5)]) == 1
    rate = read_results(Path(benchmark_json(tmp_path / "rate.json", 1.0, value=3.0, unit="B/s", better="higher")))
    assert (rate.rows[0].value, rate.rows[0].unit, rate.rows[0].better) == (3.0, "B/s", "higher")


def test_a_file_that_pytest_benchmark_wrote_is_read(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    code = (
        "def test_sum(benchmark):\n    benchmark.extra_info.update(roof=1.0, share=0.5)\n    benchmark(sum, [1, 2])\n"
    )
    (tmp_path / "test_it.py").write_text(code)
    cmd = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-json=out.json", "test_it.py"]
    env = {name: value for name, value in os.environ.items() if "XDIST" not in name}  # a worker keeps no figures
    subprocess.run(cmd, cwd=tmp_path, env=env, check=True, capture_output=True, timeout=120)
    results = read_results(tmp_path / "out.json")
    assert (results.rows[0].name, results.rows[0].unit, results.rows[0].share) == ("test_sum", "s", 0.5)


def test_the_table_is_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = Row("a", 12.345, "tok/s", roof=20, share=0.617), Row("b", None, "tok/s", note="killed for memory")
    assert report.main(["--table", str(result_file(tmp_path / "a.json", *given))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| a | 12.35 | tok/s | 20 | 61.7% |"
    assert lines[3] == "| b | killed for memory | tok/s |  |  |"
    assert {line.count("|") for line in lines[:4]} == {6}


def test_results_are_named_by_machine_and_commit() -> None:
    header = {"machine": THERE, "commit": {"id": "abc123", "dirty": True}}
    path = rows.results_path("gpu", header)
    assert path.relative_to(rows.ROOT).as_posix() == "bench/results/nvidia-h200/gpu-abc123-dirty.json"
    assert rows.machine_name(HERE) == "some-2.50ghz-2c-24g"


def test_a_header_says_where_and_from_what() -> None:
    header = rows.make_header(["bench/peers.py", "--model", "/data/models/opt-1.3b"])
    assert header["machine"]["cores"] >= 1 and header["machine"]["memory_bytes"] > 2**28 and header["machine"]["cpu"]
    assert header["commit"]["id"] and header["versions"]["torch"]
    assert header["command"] == ["bench/peers.py", "--model", "opt-1.3b"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No such file: '/data/a b.json'", "No such file: 'a b.json'"),
        ("/home/me/x/y.py:3: oops", "y.py:3: oops"),
        ("bench/peers.py, 3 tok/s and/or https://a.org/b/c", "bench/peers.py, 3 tok/s and/or https://a.org/b/c"),
    ],
)
def test_results_name_no_folder_of_the_machine(text: str, expected: str) -> None:
    assert rows.without_folders(text) == expected


def peers_args(*extra: str) -> Any:
    return peers.parse_args(["--model", "/data/opt", "--prompt-len", "8", "--gen-len", "32", *extra])


@pytest.mark.parametrize("cross", ["x", "\u00d7"], ids=["letter", "sign"])
def test_our_cases_are_read_from_one_argument(cross: str) -> None:
    case = peers.ours_case(f"64{cross}3:0 0 0 50 0 100:--sep-layer 0", peers_args(), Path("/scratch"))
    assert (case.sequences, case.name) == (192, "flexgen_triton 64x3 0 0 0 50 0 100 --sep-layer 0")
    text = " ".join(case.command)
    assert "--gpu-batch-size 64 --num-gpu-batches 3 --percent 0 0 0 50 0 100 " in text
    assert text.endswith("--sep-layer 0") and "--prompt-len 8 --gen-len 32 " in text


@pytest.mark.parametrize("text", ["", "64", "64x2", "64x2:0 0 0 100 0", "axb:0 0 0 100 0 100", "64x2x2:0 0 0 1 0 1"])
def test_a_case_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="six percentages"):
        peers.ours_case(text, peers_args(), Path("/scratch"))


def case(side: str, sequences: int) -> Case:
    return Case(side, f"{side} {sequences}", sequences, ())


def test_the_sides_take_turns() -> None:
    a, b, c = case("accelerate", 1), case("accelerate", 2), case(peers.OURS, 1)
    assert list(peers.in_turn([a, b], [c], 2)) == [a, c, b, a, c, b]


def ok(tok_s: float) -> Figures:
    return Figures("ok", total_tok_s=tok_s)


def test_ratios_are_at_the_same_batch_and_each_at_its_best() -> None:
    killed = Figures(peers.OUT_OF_MEMORY)
    results = {
        case("accelerate", 64): [ok(10), ok(14), ok(11)],
        case("accelerate", 128): [killed, killed, killed],
        case(peers.OURS, 64): [ok(20), ok(22), ok(90)],
        case(peers.OURS, 128): [ok(40), ok(40), ok(40)],
        case(peers.OURS, 512): [ok(55), ok(55), ok(55)],
    }
    found = {row.name: (row.value, row.note) for row in peers.ratios(results)}
    assert found == {
        "ratio at the same batch of 64": (2.0, ""),
        "ratio at the same batch of 128": (None, "the peer did not finish"),
        "ratio, each at its best": (5.0, ""),
    }


def test_a_case_with_one_killed_run_has_no_speed() -> None:
    assert peers.speed([ok(10), Figures(peers.OUT_OF_MEMORY)]) is None


def ended(returncode: int, *, stderr: str = "", oom_killed: bool = False) -> LimitedRun:
    return LimitedRun(returncode, "", stderr, 12.0, 10**9, oom_killed, True)


@pytest.mark.parametrize(
    ("run", "outcome"),
    [
        (ended(137, oom_killed=True), "killed for memory"),
        (ended(1, stderr="torch.OutOfMemoryError: CUDA out of memory"), "out of GPU memory"),
        (ended(2, stderr="a\nGPU needs 17.2 GiB, has 15.6\n"), "exit code 2: GPU needs 17.2 GiB, has 15.6"),
        (ended(124, stderr="loading"), "timed out after 12 s"),
        (ended(1), "exit code 1: no output"),
    ],
    ids=["killed", "gpu", "refused", "slow", "silent"],
)
def test_a_run_without_figures_says_why(run: LimitedRun, outcome: str) -> None:
    figures = peers.figures_of(run, None)
    assert (figures.outcome, figures.total_tok_s, figures.peak_bytes) == (outcome, None, 10**9)


def test_start_is_what_generation_does_not_take() -> None:
    result = {"total_tok_s": 5.0, "prefill_s": 1.0, "decode_s": 6.0, "total_s": 7.0, "makespan_s": 7.0, "bound_s": 6.4}
    figures = peers.figures_of(ended(0), result)
    assert (figures.outcome, figures.start_s, figures.overlap) == ("ok", 5.0, pytest.approx(1.094, abs=1e-3))


def test_a_peer_really_runs_and_its_results_are_read(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    make_checkpoint(tmp_path / "opt", Recipe("125m", 1, "float32", "safetensors", 0, 10**9))
    out = tmp_path / "out.json"
    shape = ["--prompt-len", "4", "--gen-len", "3", "--batches", "2"]
    assert peers.main(["--model", str(tmp_path / "opt"), *shape, "--out", str(out)]) == 0
    row = read_results(out).rows[0]
    run = row.details["runs"][0]
    assert row.name == "accelerate 2" and row.value == pytest.approx(6 / (run["prefill_s"] + run["decode_s"]))
    assert run["start_s"] > 0 and str(tmp_path) not in out.read_text()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("peers-")] == []
