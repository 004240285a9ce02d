"""docs/measured.md is what bench/measured.py writes from the committed results."""

from __future__ import annotations

from pathlib import Path

import measured
import pytest
from rows import Row, write_results

CPU = {"cpu": "Some CPU", "cores": 2, "memory_bytes": 24 * 2**30, "gpu": None}
RUN = {
    "outcome": "ok", "total_tok_s": 8.0, "prefill_s": 1.0, "decode_s": 3.0, "peak_bytes": 1.5e9,
    "makespan_s": 4.0, "bound_s": 3.2, "load_before": 0.4,
}  # fmt: skip


def written(folder: Path, name: str, *rows: Row, machine: dict[str, object] = CPU) -> str:
    """The page of a folder with one more result file."""
    header = {
        "machine": machine,
        "commit": {"id": "abc", "dirty": True},
        "date": "2026-01-02T03:04",
        "command": ["x y"],
    }
    write_results(folder / "some-cpu" / name, list(rows), header)
    return measured.page(folder)


def test_the_committed_page_is_what_the_committed_results_give():
    assert measured.PAGE.read_text() == measured.page(), "run python bench/measured.py"


def test_every_committed_result_is_on_the_page():
    text = measured.PAGE.read_text()
    results = list(measured.RESULTS.glob("*/*.json"))
    assert results and all(f"bench/results/{path.parent.name}/{path.name}" in text for path in results)


def test_a_result_names_machine_commit_date_and_command(tmp_path):
    page = written(tmp_path, "other-abc.json", Row("a", 1.0, "s"))
    assert "## Some CPU, 2 cores, 24 GiB\n\n### other, commit abc-dirty" in page
    assert "2026-01-02\n\n```\npython 'x y'\n```" in page
    assert "| a | 1 | s |" in page


@pytest.mark.parametrize("gpu", [None, "NVIDIA H200"])
def test_a_page_without_a_gpu_says_so(tmp_path, gpu):
    page = written(tmp_path, "other-abc.json", Row("a", 1.0, "s"), machine={**CPU, "gpu": gpu})
    assert (measured.NO_GPU in page) == (gpu is None)
    assert f"## {gpu or 'Some CPU'}, 2 cores, 24 GiB" in page


def test_machines_of_one_kind_share_a_heading(tmp_path):
    written(tmp_path, "other-abc.json", Row("a", 1.0, "s"))
    page = written(tmp_path, "other-def.json", Row("b", 1.0, "s"))
    assert page.count("\n## ") == 1 and page.count("\n### ") == 2


def test_a_peer_that_ran_out_of_memory_stays_in_its_table(tmp_path):
    killed = {**dict.fromkeys(RUN), "outcome": "killed for memory"}
    rows = [
        Row("ours", 8.0, "tok/s", details={"sequences": 2, "runs": [RUN]}),
        Row("theirs", None, "tok/s", details={"sequences": 2, "runs": [killed]}),
        Row("ratio at the same batch of 2", None, "x", note="the peer did not finish"),
    ]
    page = written(tmp_path, "peers-abc.json", *rows)
    assert "| ours | 2 | 8.0 | 1.0 | 3.0 | 1.50 | 1.250 | 0.4 |" in page
    assert "| theirs | 2 | killed for memory |" in page
    assert "ratio at the same batch of 2: the peer did not finish" in page


def test_a_case_that_failed_says_why(tmp_path):
    rows = [Row("big: prediction off by", None, "share", note="no room", details={"model": "m"})]
    assert "| big | no room |" in written(tmp_path, "predictions-abc.json", *rows)


def test_a_limit_under_which_nothing_was_found_says_why(tmp_path):
    rows = [
        Row("automatic / best of the grid, limit 1.00 GB", None, "x", note="nothing fits", details={"limit_bytes": 1e9})
    ]
    assert "| 1.00 |  |  |  |  |  | nothing fits |" in written(tmp_path, "auto_policy-abc.json", *rows)


def test_a_soak_too_short_for_a_slope_says_so(tmp_path):
    sample = {"at_s": 0.1, "outputs": 3, "abandoned": 1, "refused": 2, "threads": 8, "files": 7}
    rows = [
        Row("soak-slope", None, "MiB in 10 min", note="too short a run"),
        Row("soak-0s", 313.9, "MiB", details=sample),
    ]
    page = written(tmp_path, "soak-abc.json", *rows)
    assert "Slope: too short a run." in page and "| 0.0 | 3 | 1 | 2 | 313.9 | 8 | 7 |" in page
