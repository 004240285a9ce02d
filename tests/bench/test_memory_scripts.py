"""The scripts that watch memory: growth is found, and a plan or limit that was exceeded is no success."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import memory_honesty
import pytest
import soak
from memory_honesty import Case
from rows import read_results, write_results

MIB = 1 << 20
FIRST = soak.Sample(0, 0, 0, 0, 0, 300 * MIB, 200 * MIB, 100 * MIB, 5, 7)


def samples(growth_per_s: float, warm: int = 50 * MIB) -> list[soak.Sample]:
    """An hour, of which the first half takes `warm` bytes more once."""
    return [
        replace(FIRST, at_s=t, anonymous=round(FIRST.anonymous + warm * (t > 600) + growth_per_s * t))
        for t in range(0, 3601, 30)
    ]


def test_only_growth_of_the_second_half_counts():
    assert soak.slope(samples(0)) == pytest.approx(0, abs=1e-6)
    assert soak.slope(samples(2 * MIB / 600)) == pytest.approx(2, rel=1e-3)
    assert soak.slope(samples(0)[:4]) is None


def test_a_soak_is_a_results_file(tmp_path):
    found = samples(0)
    write_results(tmp_path / "soak.json", soak.rows(found, soak.slope(found)), {"machine": {}})
    first, *others = read_results(tmp_path / "soak.json").rows
    assert first.name == "soak-slope" and len(others) == len(found)
    assert others[-1].details["anonymous"] == found[-1].anonymous


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33 or later")
def test_the_heap_is_told_apart_from_what_it_keeps_free():
    in_use, _ = soak.heap_bytes()
    held = ctypes.create_string_buffer(16 * MIB)
    assert soak.heap_bytes()[0] - in_use > 15 * MIB
    del held


FITS = Case("a", limit=100, planned=100, peak=95, group_peak=90, outcome="ok")


@pytest.mark.parametrize(
    ("case", "holds"),
    [
        (FITS, True),
        (replace(FITS, peak=101), False),
        (replace(FITS, outcome="killed for memory"), False),
        (replace(FITS, planned=None, peak=None, outcome="does not fit"), False),
    ],
    ids=["fits", "over its plan", "killed", "refused"],
)
def test_a_case_holds_within_plan_and_limit(case, holds):
    assert case.holds is holds
    row = memory_honesty.row(case)
    assert (row.note == "") is holds
    assert row.value == (case.planned / case.peak if case.outcome == "ok" else None)
    assert memory_honesty.verdict([case]).startswith(f"{int(holds)} of 1 ran")
