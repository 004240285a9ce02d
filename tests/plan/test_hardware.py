"""Curves by hand and by property, profiles there and back, and the machines that ship with the package."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen_triton.models.family import SIZES, model_spec
from flexgen_triton.plan.cost import seconds
from flexgen_triton.plan.formats import FourBit
from flexgen_triton.plan.hardware import PROFILE_DIR, Curve, Hardware, HardwareError, load_profile, profile_names
from flexgen_triton.plan.link import simulate
from flexgen_triton.plan.plan import make_plan
from flexgen_triton.plan.policy import Policy
from flexgen_triton.plan.spec import Workload, pack

SHIPPED = ("a100", "h100", "h200", "rtx4090", "t4")
positive = st.floats(1e-3, 1e12)
curves = st.dictionaries(positive, positive, min_size=1, max_size=6).map(lambda d: Curve(tuple(sorted(d.items()))))


def test_a_curve_by_hand():
    """100 bytes in 10 s, 300 in 20 s: 15 s for 200."""
    curve = Curve(((100, 10), (300, 15)))
    assert curve.seconds(100) == 10 and curve.seconds(300) == 20
    assert curve.seconds(200) == 15 and curve.rate(200) == pytest.approx(200 / 15)
    assert curve.seconds(1) == 10  # latency
    assert curve.seconds(600) == 40  # the last rate
    assert curve.scaled(2).seconds(200) == 7.5


def test_a_flat_curve_has_no_latency():
    assert Curve.flat(50).seconds(0.5) == 0.01
    assert Curve.flat(50).seconds(100) == 2


def test_a_size_slower_than_a_larger_one_takes_the_larger_ones_time():
    curve = Curve(((10, 1), (20, 10), (40, 10)))  # 10 s, 2 s, 4 s
    assert [curve.seconds(n) for n in (5, 10, 15, 20, 30)] == [2, 2, 2, 2, 3]


@given(curves, positive, positive)
def test_time_never_falls_as_size_grows(curve, a, b):
    assert curve.seconds(min(a, b)) <= curve.seconds(max(a, b)) * (1 + 1e-12)


@given(curves, positive)
def test_scaling_divides_time(curve, size):
    assert curve.scaled(4).seconds(size) == pytest.approx(curve.seconds(size) / 4)


@pytest.mark.parametrize(
    "points",
    [(), ((1, 0),), ((0, 1),), ((1, 1), (1, 2)), ((2, 1), (1, 1)), ((1, math.nan),), ((1, math.inf),)],
    ids=str,
)
def test_what_is_no_curve(points):
    with pytest.raises(HardwareError, match="ascending sizes and rates above 0"):
        Curve(points)


def test_the_shipped_machines():
    assert tuple(profile_names()) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_a_profile_there_and_back(name):
    machine = load_profile(name)
    assert Hardware.from_json(machine.to_json()) == machine
    assert load_profile(PROFILE_DIR / f"{name}.json") == machine
    assert len(machine.source) > 100  # says where the figures are from


def test_every_curve_has_a_line():
    lines = load_profile("t4").to_json().splitlines()
    assert len(lines) < 60
    assert any(line.startswith('  "float16": [[1, ') for line in lines)


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize(("weights", "cache"), [(False, False), (True, False), (False, True), (True, True)])
def test_every_shipped_machine_can_cost_a_run(name, weights, cache):
    """OPT-30B in fp16, two token steps, weights and cache of either format."""
    machine = load_profile(name)
    spec = model_spec(SIZES["opt-30b"], "opt-30b", "float16")
    policy = Policy(48, 2, 20, 50, 0, 50, 0, 50, compress_weight=weights, compress_cache=cache)
    plan = make_plan(pack(spec, FourBit(64)) if weights else spec, policy, Workload.uniform(512, 2, 48, 2))
    spans = list(simulate(plan.generator, lambda op: seconds(op, machine)))
    assert {s.op.lane.value for s in spans} == {"disk_in", "disk_out", "h2d", "d2h", "compute"}
    assert all(0 < s.end - s.start < 600 for s in spans if s.op.bytes or s.op.work)


@pytest.mark.parametrize("name", [n for n in SHIPPED if n != "t4"])
def test_bf16_is_known_where_the_gpu_has_it(name):
    machine = load_profile(name)
    for rates in (machine.matmul, machine.decode_attention, machine.host_attention):
        assert set(rates) == {"float32", "float16", "bfloat16", "4-bit"}


def test_from_few_rows_to_many_a_gpus_product_goes_from_memory_to_arithmetic():
    """A100: 2 FLOP a weight of 2 bytes at 85 % of 2.039 TB/s, up to 60 % of 312 TFLOP/s."""
    product = load_profile("a100").matmul["float16"]
    assert product.rate(1) == pytest.approx(1.733e12, rel=1e-3)
    assert product.rate(16) == pytest.approx(16 * 1.733e12, rel=1e-2)
    assert product.rate(4096) == pytest.approx(187.2e12, rel=1e-3)


def broken(**fields: object) -> str:
    return json.dumps({**json.loads(load_profile("t4").to_json()), **fields})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "holds no profile"),
        ('{"name": "x"}', "lacks source, host_is_apart"),
        (broken(h2d=[[1, -1]]), "h2d: a curve needs"),
        (broken(h2d=[1, 2]), "h2d: "),
        (broken(matmul=[[1, 1]]), "matmul: "),
        (broken(gpu_bytes="16 GB"), "gpu_bytes: '16 GB' is no int"),
        (broken(overhead={"h2d": "fast"}), "overhead: "),
    ],
)
def test_a_bad_profile_is_named_in_one_sentence(tmp_path, text, words):
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(HardwareError) as error:
        load_profile(path)
    assert words in str(error.value) and "mine.json" in str(error.value) and "\n" not in str(error.value)


def test_no_such_machine():
    with pytest.raises(HardwareError, match="known are a100, h100, h200, rtx4090, t4"):
        load_profile("b300")


def test_fields_with_defaults_may_be_missing():
    found = json.loads(load_profile("t4").to_json())
    for name in ("disk_table", "correction", "process_bytes"):
        del found[name]
    assert Hardware.from_json(json.dumps(found)).correction == {}
