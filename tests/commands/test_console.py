"""Nothing printed is cut: every cell of every table is there whole, at any width, on a terminal or off it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace

import pytest
from machines import SMALL_GPU
from rich.console import Console
from rich.table import Table

from flexgen_triton.commands import bench, console, figures, plan_report
from flexgen_triton.commands import measure as measure_command
from flexgen_triton.commands.progress import COLUMNS, PHASES
from flexgen_triton.models.family import SIZES, model_spec
from flexgen_triton.plan.plan import Plan, make_plan
from flexgen_triton.plan.policy import Policy
from flexgen_triton.plan.predict import predict
from flexgen_triton.plan.problem import Problem
from flexgen_triton.plan.search import Searched, search
from flexgen_triton.plan.spec import Workload
from flexgen_triton.plan.worth import worth
from flexgen_triton.run.trace import LaneUse

NAME = "a-model-of-a-long-name-[with-brackets]-" + "x" * 80
MACHINE = replace(SMALL_GPU, name="a machine [/of] a long name, " + "y" * 90, source="made up [/too]")
WIDTHS = [(80, True), (60, True), (80, False), (20, True)]


class Cells:
    """Stands in for the console of a command; keeps the cells of the tables that are printed."""

    def __init__(self, width: int, *, is_terminal: bool) -> None:
        self.file = io.StringIO()
        self.console = Console(file=self.file, width=width, force_terminal=is_terminal, color_system=None)

    @property
    def text(self) -> str:
        return self.file.getvalue()


@pytest.fixture(scope="module")
def plan() -> Plan:
    spec = replace(model_spec(replace(SIZES["opt-175b"], layers=2), "opt", "float16"), name=NAME)
    policy = Policy(
        48, 2, 13, 37, 11, 29, 17, 31, cpu_cache_compute=True, cpu_attention_percent=73, compress_weight=True
    )
    return make_plan(spec, policy, Workload.uniform(512, 3, 48, 2), host_is_apart=True)


@pytest.fixture(scope="module")
def found() -> tuple[Searched, list[plan_report.Choice], Mapping[str, float]]:
    """A search, the policies to tell about, and what more of the machine would bring."""
    spec = replace(model_spec(replace(SIZES["opt-6.7b"], layers=4), "opt", "float16"), name=NAME)
    searched = search(Problem(spec, 512, 4, 24), MACHINE)
    return searched, list(plan_report.choices(searched)), worth(searched)


@pytest.fixture
def kept(monkeypatch) -> list[str]:
    """The cells of all tables that are printed from here on."""
    cells: list[str] = []
    real = console.print_table

    def print_table(to: Console, table: Table) -> None:
        cells.extend(str(cell) for column in table.columns for cell in column.cells)
        cells.extend(str(column.header) for column in table.columns if table.show_header)
        real(to, table)

    for module in (figures, plan_report, measure_command, bench):
        monkeypatch.setattr(module, "print_table", print_table)
    return cells


def check(out: Cells, cells: list[str]) -> None:
    assert len(cells) > 10
    missing = [cell for cell in cells if cell.strip() not in out.text]
    assert "…" not in out.text and not missing


@pytest.mark.parametrize(("width", "is_terminal"), WIDTHS)
def test_the_plans_tables(kept, found, width, is_terminal):
    out = Cells(width, is_terminal=is_terminal)
    plan_report.show(out.console, *found)
    check(out, kept)
    assert NAME in "".join(out.text.split("\n"))


@pytest.mark.parametrize(("width", "is_terminal"), WIDTHS)
def test_the_benchmarks_tables(kept, plan, width, is_terminal):
    lanes = dict.fromkeys(("compute", "disk_in"), LaneUse(98765.43, 1 << 50, 987654321, 12345.6))
    timeline = SimpleNamespace(makespan_s=123456.7, bound_s=98765.4, lanes=dict.fromkeys(("prefill", "decode"), lanes))
    out = Cells(width, is_terminal=is_terminal)
    figures.print_plan(out.console, plan)
    figures.print_lanes(out.console, timeline, figures.predicted_json(predict(plan, MACHINE), MACHINE))
    figures.dry_run(out.console, plan, MACHINE, None)
    check(out, kept)
    assert "98765.43" in kept and str(987654321) in out.text


@pytest.mark.parametrize(("width", "is_terminal"), WIDTHS)
def test_the_machines_table(kept, width, is_terminal):
    out = Cells(width, is_terminal=is_terminal)
    measure_command.print_hardware(out.console, MACHINE)
    check(out, kept)


@pytest.mark.parametrize(("width", "is_terminal"), WIDTHS)
def test_the_demos_table(kept, width, is_terminal):
    out = Cells(width, is_terminal=is_terminal)
    row = dict.fromkeys(("prefill_tok_s", "decode_tok_s", "total_tok_s", "makespan_s"), 1234567.8) | {"bound_s": 3.3}
    bench.print_strategies(out.console, dict.fromkeys(bench.STRATEGIES, row))
    check(out, kept)


def test_off_a_terminal_a_table_is_as_wide_as_it_needs(plan):
    narrow, wide = Cells(40, is_terminal=False), Cells(4000, is_terminal=False)
    for out in (narrow, wide):
        figures.print_plan(out.console, plan)
    assert all(line in narrow.text for line in wide.text.splitlines() if "│" in line)


def test_bars_fit_sixty_columns():
    from rich.progress import Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    for last in ((TimeElapsedColumn(), TimeRemainingColumn()), (TextColumn("1000000/1000000"), TimeElapsedColumn())):
        out = Cells(60, is_terminal=True)
        bars = Progress(*COLUMNS, *last, console=out.console)
        for name in (*PHASES.values(), "sequences"):
            bars.add_task(name, total=10)
        out.console.print(bars)
        assert "…" not in out.text and all(name in out.text for name in PHASES.values())
