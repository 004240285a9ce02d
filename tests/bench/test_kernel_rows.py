"""The kernels' GPU bench as far as a CPU can show it: what is timed, the arithmetic of rows, and every call it makes.

The calls run in Triton's interpreter at tiny shapes; only their times mean nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import kernel_speed as ks
import pytest
import torch

CPU, DTYPE = torch.device("cpu"), torch.float16
TINY = ks.Model("tiny", 64, 2, 32)
ROOFS = ks.Roofs(copy_bytes_s=4e12, product_flops_s=8e14)


def once(call: Callable[[], object]) -> float:
    """A timer that only runs the call."""
    call()
    return 1e-3


def problem(num_bytes: int, flops: int, **targets: float) -> ks.Problem:
    return ks.Problem("p", num_bytes, flops, 0, lambda *_: ks.Setup(lambda: None), targets)


def test_a_row_of_bytes_has_its_share_ratios_and_targets():
    row = ks.make_row(problem(8 * 10**9, 10**9, roof=0.75, cuBLAS=2.9, int4pack=1.0), 4e-3, {"cuBLAS": 8e-3}, ROOFS)
    assert (row.value, row.unit, row.roof, row.share) == (pytest.approx(2000), "GB/s", pytest.approx(4000), 0.5)
    assert row.note == "4000.0 us, 2.00x cuBLAS, target 0.75 of roof: missed, target 2.9 of cuBLAS: missed"
    assert row.details["targets"]["int4pack"] == 1.0 and row.details["ratios"] == {"cuBLAS": 2.0}


def test_a_row_of_arithmetic():
    row = ks.make_row(problem(10**6, 8 * 10**12, torch=0.9), 2e-2, {"torch": 1.9e-2}, ROOFS)
    assert (row.unit, row.value, row.share) == ("TFLOP/s", pytest.approx(400), pytest.approx(0.5))
    assert row.note.endswith("target 0.9 of torch: met")


def test_the_list_covers_what_was_asked_for():
    groups = ks.problems()
    names = {p.name for group in groups.values() for p in group}
    assert len(names) == sum(map(len, groups.values()))
    for name in (
        "4-bit linear opt-30b fc1 28672x7168 M=1",
        "4-bit linear opt-175b fc2 12288x49152 M=2048",
        "decode 4-bit opt-1.3b 256x2048",
        "decode sparse opt-175b 1x128",
        "prefill opt-30b 4x1024",
    ):
        assert name in names
    assert groups.keys() < ks.BUDGET_S.keys() and sum(ks.BUDGET_S.values()) < 480
    assert all(p.num_bytes > 0 and p.memory_bytes >= p.num_bytes / 2 for group in groups.values() for p in group)


def test_targets_stand_where_they_apply():
    targets = {p.name: p.targets for group in ks.problems().values() for p in group}
    assert targets["4-bit linear opt-30b out 7168x7168 M=16"] == {"roof": 0.75, "cuBLAS": 2.9}
    assert targets["4-bit linear opt-30b out 7168x7168 M=32"] == {"cuBLAS": 1.0}
    assert targets["decode 16-bit opt-30b 64x1024"] == {"roof": 0.85}
    assert targets["decode 16-bit opt-1.3b 1x128"] == {}


def test_the_bytes_are_those_of_the_tensors():
    codes, scales, _ = ks._weight(300, 200, CPU, DTYPE)
    assert ks.weight_bytes(300, 200) == codes.nbytes + scales.nbytes
    model = ks.Model("m", 160, 2, 80)
    for four_bits, cache in (
        (True, ks._cache_q4(3, 2, 80, 128, CPU)),
        (False, ks._cache(3, 2, 80, 128, CPU, dtype=DTYPE)),
    ):
        assert ks.kv_bytes(model, 3, 128, four_bits=four_bits) == sum(
            math.prod(t.shape) * t.element_size() for t in (*cache.k, *cache.v)
        )


def test_a_group_ends_in_time_and_says_what_it_left_out():
    now = iter(range(100))
    rows = list(
        ks.timed(
            [problem(1, 1)] * 2 + [ks.Problem("large", 1, 1, 10**12, lambda *_: None)] + [problem(1, 1)] * 3,
            3.5,
            once,
            ROOFS,
            CPU,
            DTYPE,
            memory_bytes=10**9,
            clock=lambda: next(now),
        )
    )
    assert [row.value is None for row in rows] == [False, False, True, True, True, True]
    assert "1000.0 GB" in rows[2].note and "3.5 s are spent" in rows[5].note


def test_what_a_kernel_raises_is_a_row_that_counts_as_wrong():
    def broken(*_):
        raise RuntimeError("out of memory in /some/folder/file.py")

    (row,) = ks.timed([ks.Problem("bad", 1, 1, 0, broken)], 9, once, ROOFS, CPU, DTYPE, memory_bytes=1)
    assert (row.name, row.unit, row.share) == ("runs: bad", "share", 0.0)
    assert row.note == "RuntimeError: out of memory in file.py"


TIMED = {p.name: p for group in ks.problems([TINY], (1, 2), (1, 2), (3, 64)).values() for p in group}


@pytest.mark.parametrize("name", TIMED)
def test_every_call_runs(name):
    torch.manual_seed(0)
    row = ks.measure(TIMED[name], once, ROOFS, CPU, DTYPE)
    assert row.value > 0 and row.details["seconds"] == 1e-3


@pytest.mark.parametrize("check", ["linear", "attention", "norm"])
def test_correctness_holds_in_the_interpreter(check):
    torch.manual_seed(0)
    given = {"linear": ("fc1", (1, 33)), "attention": ((20, 1, 9),), "norm": ()}[check]
    rows = list(getattr(ks, f"check_{check}")(TINY, *given, CPU, DTYPE))
    assert rows and {row.name: row.note for row in rows if row.share != 1.0} == {}


def test_nan_is_never_right():
    assert ks._verdict("x", float("nan"), 1.0).share == 0.0


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (row,) = ks.rows()
    assert row.value is None and "no GPU" in row.note


def test_roofs_are_rates():
    roofs = ks.measure_roofs(once, CPU, torch.float32, size=16)
    assert roofs == ks.Roofs(2 * 16 * 16 * 16 / 1e-3, 2 * 16**3 / 1e-3)
