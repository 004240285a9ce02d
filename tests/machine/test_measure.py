"""A machine's profile: measured for real but quickly, kept per machine, corrected by a run's figures."""

from __future__ import annotations

import json
import math
import os
from dataclasses import fields, replace

import pytest
import torch

from flexgen_triton.machine import measure as module
from flexgen_triton.machine.measure import (
    MEASURING_BYTES,
    cached_profile,
    load_or_measure,
    measure,
    profile_path,
    read_run,
    refine,
    save_profile,
)
from flexgen_triton.memory.arena import peak_rss, reset_peak_rss, rss
from flexgen_triton.memory.stripes import Folders
from flexgen_triton.plan.cost import seconds
from flexgen_triton.plan.hardware import Curve, HardwareError, load_profile
from flexgen_triton.plan.link import Span
from flexgen_triton.plan.schedule import LOAD_WEIGHT, Op

CPU = torch.device("cpu")
MIB = 1 << 20
FORMATS = {"float32", "float16", "bfloat16", "4-bit"}
LANES = {"disk_in", "disk_out", "h2d", "d2h", "host_attention", "compute"}


@pytest.fixture(scope="module")
def told() -> list[tuple[str, int, int]]:
    return []


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("offload")


@pytest.fixture(scope="module")
def took() -> list[int]:
    """Bytes that measuring added to the process at its peak."""
    return []


@pytest.fixture(scope="module")
def machine(directory, told, took):
    reset_peak_rss()
    before = rss()
    found = measure(CPU, Folders.of(directory), quick=True, progress=lambda *args: told.append(args))
    took.append(peak_rss() - before)
    return found


def curves(machine) -> dict[str, Curve]:
    found = {}
    for f in fields(machine):
        value = getattr(machine, f.name)
        if isinstance(value, Curve):
            found[f.name] = value
        elif isinstance(value, dict) and any(isinstance(v, Curve) for v in value.values()):
            found |= {f"{f.name}, {kind}": curve for kind, curve in value.items()}
    return found


def test_every_rate_is_measured(machine):
    assert len(curves(machine)) == 8 + 3 * len(FORMATS)
    rates = [rate for curve in curves(machine).values() for _, rate in curve.points]
    rates += [machine.disk_rows, machine.device_read, machine.host_read]
    assert all(math.isfinite(rate) and rate > 0 for rate in rates)
    for by_format in (machine.matmul, machine.decode_attention, machine.host_attention):
        assert set(by_format) == FORMATS


def test_rates_are_of_a_computer(machine):
    """Between a slow laptop's and the fastest server's."""
    for curve in machine.matmul.values():
        assert 1e8 < curve.rate(64) < 1e15
        assert curve.rate(64) > curve.rate(1)  # a matrix read once for 64 rows
    assert 1e8 < machine.device_read < 1e13
    assert 1e6 < machine.disk_read.points[-1][1] < 1e11
    assert {row[:2] for row in machine.disk_table} == {(n << 20, t) for n in (1, 4, 8) for t in (1, 2, 4, 8)}


def test_what_is_no_rate(machine, directory):
    assert not machine.host_is_apart and machine.gpu_bytes == machine.context_bytes == machine.dequantize_rows == 0
    assert 0 < machine.host_bytes < 1 << 50 and 0 < machine.disk_bytes < 1 << 60
    assert 50 << 20 < machine.process_bytes < 16 << 30
    assert set(machine.overhead) == LANES
    assert all(0 <= s < 1 for s in machine.overhead.values())  # 0 where others slowed what it is compared with
    assert machine.correction == {}


def test_an_overhead_is_what_an_op_takes_beyond_its_bytes():
    """The median of them, for now and then something else comes between; never below nothing."""
    hardware = replace(load_profile("t4"), overhead={}, correction={})
    ops = [Op(LOAD_WEIGHT, 1, 0, n, bytes=n << 20) for n in (1, 2, 4)]
    more = (3e-5, 5e-5, 4e-3)
    spans = [Span(op, 2.0, 2.0 + seconds(op, hardware) + extra) for op, extra in zip(ops, more, strict=True)]
    assert module._excess(spans, hardware) == pytest.approx(5e-5, rel=1e-6)
    quick = [Span(op, 2.0, 2.0 + seconds(op, hardware) / 2) for op in ops]
    assert module._excess(quick, hardware) == 0


def test_nothing_is_left_in_the_directory(machine, directory):
    assert list(directory.iterdir()) == []


def test_it_takes_no_more_memory_than_limits_are_checked_for(machine, took):
    """Measured quickly it takes 330 MiB, at length 530."""
    assert took[0] < MEASURING_BYTES - 160 * MIB


def test_progress_ends_where_it_said(machine, told):
    assert told[0] == ("measure", 0, 9) and told[-1] == ("measure", 9, 9)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


def test_a_kept_profile_is_the_same_but_for_what_is_free_now(machine, directory):
    path = profile_path(Folders.of(directory), CPU)
    save_profile(replace(machine, host_bytes=1, disk_bytes=2), path)
    found = cached_profile(Folders.of(directory), CPU)
    assert found.host_bytes > 1 << 20 and found.disk_bytes > 1 << 20
    assert replace(found, host_bytes=0, disk_bytes=0) == replace(machine, host_bytes=0, disk_bytes=0)
    assert [p.name for p in directory.iterdir()] == [path.name]  # written whole, then renamed


def test_a_machine_is_measured_once(machine, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "measure", lambda *args, **more: calls.append(args) or machine)
    folders = Folders.of(tmp_path)
    first, second = load_or_measure(CPU, folders), load_or_measure(CPU, folders)
    assert len(calls) == 1 and first.matmul == second.matmul
    profile_path(folders, CPU).write_text('{"name": "of an older version"}')
    load_or_measure(CPU, folders)
    assert len(calls) == 2


def test_each_machine_has_its_file(tmp_path, monkeypatch):
    here = profile_path(Folders.of(tmp_path), CPU)
    assert here.parent == tmp_path and here.name.startswith("machine-") and here.suffix == ".json"
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(1000))
    assert profile_path(Folders.of(tmp_path), CPU) != here


# Corrections


def lanes(**busy_s: float) -> dict[str, dict[str, dict[str, float]]]:
    """Half of each lane's busy seconds in prefill and half in decode."""
    return {phase: {lane: {"busy_s": s / 2} for lane, s in busy_s.items()} for phase in ("prefill", "decode")}


def test_corrections_by_hand():
    """compute took 30 s of 20 predicted, d2h 0.5 s of 100 s in all, disk_in nothing was predicted of."""
    machine = replace(load_profile("t4"), correction={"compute": 2.0, "h2d": 3.0})
    run = {
        "makespan_s": 100.0,
        "lanes": lanes(compute=30, h2d=10, d2h=0.5, disk_in=20),
        "predicted": {"lanes": lanes(compute=20, h2d=40, d2h=5, disk_in=0)},
    }
    corrected = refine(machine, run)
    assert corrected.correction == {"compute": 3.0, "h2d": 0.75}
    assert replace(corrected, correction=machine.correction) == machine


def test_a_run_as_predicted_corrects_nothing():
    run = {"makespan_s": 1.0, "lanes": lanes(compute=1), "predicted": {"lanes": lanes(compute=1)}}
    assert refine(load_profile("t4"), run).correction == {"compute": 1.0}


@pytest.mark.parametrize(
    "run",
    [
        {},
        {"makespan_s": 1.0, "lanes": lanes(compute=1)},
        {"makespan_s": 1.0, "lanes": lanes(compute=1), "predicted": None},
        {"makespan_s": 1.0, "lanes": [], "predicted": {"lanes": {}}},
        {"makespan_s": 1.0, "lanes": {"prefill": {"compute": 1}}, "predicted": {"lanes": {}}},
        {"makespan_s": "long", "lanes": lanes(compute=1), "predicted": {"lanes": lanes(compute=1)}},
    ],
    ids=["empty", "no prediction", "null", "a list", "no busy_s", "no number"],
)
def test_figures_that_say_nothing_are_refused(run):
    with pytest.raises(HardwareError, match=r"bench --json") as error:
        refine(load_profile("t4"), run)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["{", "[1]", "\x00"])
def test_files_that_hold_no_run(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(HardwareError, match=r"run\.json"):
        read_run(tmp_path / "run.json")


def test_a_run_is_read_as_written(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"makespan_s": 1.5}))
    assert read_run(tmp_path / "run.json") == {"makespan_s": 1.5}
