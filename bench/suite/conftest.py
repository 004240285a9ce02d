"""The regression suite: `python -m pytest -n 0 bench/suite --benchmark-enable --benchmark-json FILE`.

Every benchmark measures the roof it is judged by in the same run and keeps it, with its share, in `extra_info`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

import flexgen_triton.environment  # noqa: F401  before torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rows


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, object]) -> None:
    """Name the machine as our other results do."""
    machine_info["bench_machine"] = rows.machine()


Judge = Callable[..., None]
NO_RIVALS: Mapping[str, float] = MappingProxyType({})


@pytest.fixture
def judge(benchmark) -> Judge:
    """`judge(value, unit, roof, rivals)`: keep a rate beside its roof, and how many times each rival's speed it is."""

    def keep(value: float, unit: str, roof: float, rivals: Mapping[str, float] = NO_RIVALS) -> None:
        share = value / roof
        benchmark.extra_info.update(
            value=value, unit=unit, better="higher", roof=roof, share=share, rivals=dict(rivals)
        )
        beside = "".join(f", {times:.2f} x {name}" for name, times in rivals.items())
        print(f"\n{benchmark.name}: {value:.3g} {unit}, roof {roof:.3g}, share {share:.0%}{beside}")

    return keep
