"""The accuracy table: its fp32 row is transformers' perplexity, and the other rows depart from it as they should."""

from __future__ import annotations

import math

import accuracy
import measured
import pytest
import rows
import torch
from test_demo import perplexity
from transformers import OPTForCausalLM

from flexgen_triton.demo import DEMO_DIR

NUM_TOKENS = 700  # two windows of the demo model and a bit

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def stream(model: OPTForCausalLM) -> torch.Tensor:
    return accuracy.token_stream(DEMO_DIR, model.config.bos_token_id, None)[:NUM_TOKENS]


@pytest.fixture(scope="module")
def results(model: OPTForCausalLM, stream: torch.Tensor) -> dict[str, rows.Row]:
    return {row.name: row for row in accuracy.measure(model, stream)}


def test_fp32_is_transformers_perplexity(model, stream, results):
    assert results["fp32"].value == pytest.approx(perplexity(model, stream, model.config.bos_token_id), rel=1e-5)


def test_rows_are_complete_and_judged_by_fp32(results):
    assert list(results) == [case.name for case in accuracy.CASES]
    plain = results["fp32"]
    assert (plain.share, plain.details["change"], plain.details["same_top1"]) == (1.0, 0.0, 1.0)
    for row in results.values():
        assert row.value is not None and math.isfinite(row.value)
        assert (row.better, row.roof) == ("lower", plain.value)
        assert row.share == pytest.approx(plain.value / row.value)
        assert 0.5 < row.details["same_top1"] <= 1


def test_every_row_is_another_and_fp16_is_nearest_to_fp32(results):
    """Nearest by the likeliest tokens: the perplexity of so few may well fall by a rounding error."""
    same = {name: row.details["same_top1"] for name, row in results.items() if name != "fp32"}
    assert max(same.values()) == same["fp16"]
    assert min(same.values()) < 1
    values = {row.value for name, row in results.items() if name != "fp16"}  # weights saved in fp16 are unchanged by it
    assert len(values) == len(results) - 1


@pytest.mark.parametrize("length", [1, 7, 8, 11, 12, 40])
def test_windows_judge_every_token_once_within_a_context(length):
    context = 8
    found = list(accuracy.windows(length, context))
    assert [n for _, judged, end in found for n in range(judged, end)] == list(range(length))
    assert all(end - begin <= context - 1 for begin, _, end in found)
    assert all(judged - begin >= context // 2 - 1 for begin, judged, _ in found[1:])


def test_a_table_row_for_each_case_beside_what_flexgen_published(results):
    head, rule, *lines = measured.accuracy(list(results.values())).splitlines()
    assert len(lines) == len(accuracy.CASES)
    assert {line.count("|") for line in (head, rule, *lines)} == {7}
    (line,) = [line for line in lines if line.startswith("| 4-bit weights, G=64, and cache |")]
    assert line.endswith("| 12.90 (+1.4%) | 10.94 (+1.1%) |")


def test_too_short_a_slice_says_how_much_the_first_document_takes(capsys):
    assert accuracy.main(["--slice", "1"]) == 2
    assert "--slice" in capsys.readouterr().err
