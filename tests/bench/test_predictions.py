"""The scripts that judge predictions and the automatic policy, on made-up runs; and one real run of their worker."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import auto_policy
import predictions
import pytest
from auto_policy import Comparison, Measured
from machines import TWO_CORES, profile_file
from predictions import CPU_CASES, GPU_CASES, Case, Job, Outcome
from rows import read_results, write_results

from flexgen_triton.plan.hardware import Curve, load_profile
from flexgen_triton.plan.policy import CompressionConfig, Policy

CASE = Case("a", "opt-125m", Policy(2, 2, 0, 50, 0, 100), 16, 4)


def figures(total: float = 2.0, predicted: float = 1.8, planned: int = 105, peak: int = 100) -> dict[str, Any]:
    """A run as the worker writes it, prefill and decode each half of it."""
    half = {"compute": {"busy_s": total / 2}, "disk_in": {"busy_s": total / 100}}
    expected = {"compute": {"busy_s": predicted / 2}, "disk_in": {"busy_s": predicted / 4}}
    return {
        **dict.fromkeys(predictions.KEPT, 1.0),
        "prefill_s": total / 2,
        "decode_s": total / 2,
        "total_s": total,
        "total_tok_s": 100 / total,
        "num_prompts": 25,
        "gen_len": 4,
        "planned_host_bytes": planned,
        "peak_host_bytes": peak,
        "lanes": {"prefill": half, "decode": half},
        "predicted": {
            "prefill_s": predicted / 2,
            "decode_s": predicted / 2,
            "total_s": predicted,
            "lanes": {"prefill": expected, "decode": expected},
        },
        "need": {"host": planned, "disk": 0},
    }


def outcome(*runs: dict[str, Any]) -> Outcome:
    return Outcome(CASE, runs)


@pytest.mark.parametrize("cases", [CPU_CASES, GPU_CASES], ids=["cpu", "gpu"])
def test_default_cases_are_many_and_varied(cases: tuple[Case, ...]) -> None:
    assert len(cases) >= 12 and len({c.name for c in cases}) == len(cases)
    policies = [c.policy for c in cases]
    assert len({c.model for c in cases}) == 2 and len({p.num_gpu_batches for p in policies}) >= 3
    assert len({p.w_disk_percent for p in policies}) >= 3 and any(p.cache_disk_percent for p in policies)
    assert {p.overlap for p in policies} == {p.compress_weight for p in policies} == {True, False}


def test_cases_are_chosen_by_name() -> None:
    assert [c.name for c in predictions.chosen(CPU_CASES, "6.7b-disk,1.3b-4bit")] == ["6.7b-disk", "1.3b-4bit"]
    assert predictions.chosen(CPU_CASES, "") == list(CPU_CASES)
    with pytest.raises(ValueError, match="there is no case"):
        predictions.chosen(CPU_CASES, "1.3b-tape")


def test_models_have_directories(tmp_path: Path) -> None:
    assert predictions.models([f"opt-1.3b={tmp_path}"]) == {"opt-1.3b": tmp_path}
    with pytest.raises(ValueError, match="is not NAME=DIRECTORY"):
        predictions.models(["opt-1.3b"])


def test_a_job_survives_its_file() -> None:
    policy = Policy(3, compress_weight=True, comp_weight_config=CompressionConfig(group_size=128), attn_sparsity=0.1)
    job = Job("opt-125m", policy, 16, 4, num_prompts=7, hardware="machine.json")
    assert Job.from_json(job.to_json()) == job
    assert predictions.policy_from(asdict(policy)) == policy


def test_a_prediction_is_judged_by_the_median_and_memory_by_the_worst_run() -> None:
    judged = outcome(figures(total=2.0), figures(total=9.0, peak=104), figures(total=1.9, peak=90))
    assert judged.ratio("total_s") == pytest.approx(1.8 / 2.0)
    assert judged.memory_ratio == pytest.approx(105 / 104)
    assert judged.is_close and judged.is_within_plan
    assert not outcome(figures(total=2.2)).is_close
    assert not outcome(figures(peak=106)).is_within_plan  # under the peak
    assert not outcome(figures(peak=90)).is_within_plan  # far above it


def test_lanes_that_are_hardly_busy_are_not_judged() -> None:
    assert predictions.lane_ratios(figures()) == {
        phase: {"compute": pytest.approx(0.9)} for phase in ("prefill", "decode")
    }


def test_the_table_and_the_verdict_name_what_fails() -> None:
    outcomes = [outcome(figures()), outcome(figures(peak=110)), Outcome(CASE, error="killed")]
    lines = predictions.table(outcomes).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "| 0.90 | 0.90 | 0.90 |" in lines[2] and "killed" in lines[4]
    verdict = predictions.verdict(outcomes)
    assert verdict.startswith("2 of 2 times within 15%; 1 of 2 needs of memory within 10%")
    assert "1 below it (a)" in verdict and "1 cases failed" in verdict


def test_rows_are_result_rows(tmp_path: Path) -> None:
    header = {"machine": {}, "commit": {}}
    write_results(tmp_path / "r.json", [predictions.row(outcome(figures())), predictions.row(Outcome(CASE))], header)
    first, second = read_results(tmp_path / "r.json").rows
    assert first.value == pytest.approx(0.1) and first.better == "lower"
    assert first.details["ratio"]["total_s"] == pytest.approx(0.9) and len(first.details["runs"]) == 1
    assert second.value is None


def test_cases_are_predicted_from_the_median_of_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter((1e9, 5e9, 2e9))

    def measure(file: Path, offload_dir: Path, *, quick: bool) -> None:
        file.write_text(replace(TWO_CORES, disk_read=Curve.flat(next(rates))).to_json())

    monkeypatch.setattr(predictions, "measure_machine", measure)
    args = argparse.Namespace(hardware=None, offload_dir=tmp_path, quick=False)
    file, measured = predictions.profile(tmp_path, args)
    assert len(measured) == 3 and load_profile(file).disk_read == Curve.flat(2e9)
    args.hardware = tmp_path / "given.json"
    assert predictions.profile(tmp_path, args) == (args.hardware, [])


def test_the_worker_runs_a_model_and_says_what_was_predicted(tiny: Any, tmp_path: Path) -> None:
    policy = Policy(2, 2, 0, 50, 0, 50, 100, 0)
    job = Job(
        str(tiny.path),
        policy,
        12,
        3,
        hardware=str(profile_file(tmp_path)),
        device="cpu",
        offload_dir=str(tmp_path / "offload"),
    )
    found = predictions.run(job)
    assert found["num_prompts"] == 4 and found["total_s"] > 0 and found["load_before"] >= 0
    assert found["need"]["host"] > 0 and found["need"]["disk"] > 0
    judged = Outcome(Case("tiny", "tiny", policy, 12, 3), (found,))
    assert judged.ratio("total_s") is not None and judged.memory_ratio is not None
    assert set(found["predicted"]["lanes"]["decode"]) >= {"compute", "disk_in"}


def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    job = Job(str(tmp_path / "nothing"), Policy(), 4, 2, offload_dir=str(tmp_path))
    with pytest.raises(predictions.RunError, match="is not a directory"):
        predictions.run(job)


# The automatic policy against a grid


def test_the_grid_has_no_policy_that_the_prompts_do_not_fill() -> None:
    found = auto_policy.grid([4, 16, 64], [1, 4], 32, host_is_apart=False)
    assert {(p.gpu_batch_size, p.num_gpu_batches) for p in found} == {(4, 1), (4, 4), (16, 1)}
    assert len(found) == 3 * 3 * 2 and len(set(found)) == len(found)
    assert all(p.w_disk_percent == 100 - p.w_gpu_percent for p in found)
    assert all(p.w_disk_percent == p.cache_disk_percent == 0 for p in auto_policy.grid([4], [1], 4, host_is_apart=True))


def test_without_a_gpu_policies_that_differ_only_in_gpu_and_host_are_one() -> None:
    a, b = Policy(4, 1, 20, 30, 0, 100, 100, 0), Policy(4, 1, 50, 0, 60, 40, 0, 100, pin_weight=False)
    assert auto_policy.in_place(a, host_is_apart=False) == auto_policy.in_place(b, host_is_apart=False)
    assert auto_policy.in_place(a, host_is_apart=True) != auto_policy.in_place(b, host_is_apart=True)


def test_the_best_is_the_fastest_that_fits() -> None:
    slow = Measured(Policy(1), (figures(total=4.0, planned=10),))
    fast = Measured(Policy(2), (figures(total=2.0, planned=50),))
    assert auto_policy.best_within([slow, fast], "host", 50) is fast
    assert auto_policy.best_within([slow, fast], "host", 49) is slow
    assert auto_policy.best_within([slow, fast], "host", 9) is None
    limits = auto_policy.spread([slow, fast], "host", 100)
    assert limits == [110, 131, 151]
    assert fast.predicted_tokens_per_s == pytest.approx(100 / 1.8)


def test_sides_take_turns() -> None:
    asked: list[Policy] = []
    totals = cycle([1.0, 2.0])

    def runner(policy: Policy) -> dict[str, Any]:
        asked.append(policy)
        return figures(total=next(totals))

    a, b = auto_policy.in_turn([Policy(1), Policy(2)], runner, 3)
    assert [p.gpu_batch_size for p in asked] == [1, 2, 1, 2, 1, 2]
    comparison = Comparison(10**9, a, b)
    assert comparison.ratio == pytest.approx(2.0)
    lines = auto_policy.table([comparison, Comparison(10**9, None, b, "nothing fits")]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "2.000" in lines[2] and "nothing fits" in lines[3]
    (grid_row, ratio_row) = auto_policy.result_rows([a], [comparison])
    assert grid_row.unit == "tok/s" and ratio_row.value == pytest.approx(2.0)
