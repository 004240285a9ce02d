"""The display: bars where stderr is a terminal, lines of JSON where asked for, else nothing, and never any delay."""

from __future__ import annotations

import io
import json
import time

import pytest
from rich.console import Console

from flexgen_triton.commands import progress
from flexgen_triton.commands.progress import Display, closing_text, figures, figures_text
from flexgen_triton.plan.hardware import GIB
from flexgen_triton.run.totals import Totals

HALFWAY = Totals(
    sequences=30,
    prompt_tokens=300,
    output_tokens=600,
    rounds=3,
    seconds_ended=12.0,
    bound_s=10.0,
    busy={"compute": 6.0, "disk_in": 9.0},
    moved={"disk_in": 1 << 30},
    memory={"gpu": 0, "host": 3 * GIB, "disk": GIB // 2},
)
NOTHING = Totals()


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=120)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


class Clock:
    """`time.monotonic` that stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    stopped = Clock()
    monkeypatch.setattr(progress, "time", stopped)
    return stopped


def test_figures_are_of_the_seconds_that_rounds_ran():
    found = figures(30, HALFWAY, 90)
    assert found["output_tok_s"] == 50 and found["eta_s"] == 60 * 12 / 30
    assert found["busiest"] == "disk_in" and found["memory"]["host"] == 3 * GIB
    text = figures_text(found)
    assert text == "600 tokens, 50 tok/s, 0:00:24 to go, busiest lane disk_in (75%), GiB planned: host 3.0, disk 0.5"
    assert closing_text(found) == (
        "30 prompts, 600 tokens, 12.00 s, 50 tok/s, makespan / bound 1.200, busiest lane disk_in (75%)"
    )


def test_what_is_not_known_yet_is_left_out():
    assert figures(30, HALFWAY)["eta_s"] is None
    found = figures(0, NOTHING, 90)
    assert found["output_tok_s"] is None and found["eta_s"] is None and found["busiest"] is None
    assert figures_text(found) == "0 tokens" and closing_text(found) == "0 prompts, 0 tokens"


def test_a_terminal_shows_phases_and_figures_and_is_left_clean():
    console = terminal()
    with Display(90, console=console) as display:
        for done in range(4):
            display.phase("load", done, 3)
        with display.aside():
            assert "loading" in written(console)
        display.phase("generate", 1, 8)
        display.update(30, HALFWAY)
    text = written(console)
    assert "generating" in text and "30/90" in text and "50 tok/s" in text
    assert text.rstrip().endswith("\x1b[2K")  # the last line is erased


def test_the_bars_step_aside(monkeypatch):
    console = terminal()
    with Display(console=console) as display:
        display.phase("load", 1, 3)
        with display.aside():
            before = written(console)
            time.sleep(0.3)  # more than a redraw
            assert written(console) == before
        display.hide()
        before = written(console)
    assert written(console) == before


def test_a_phase_that_starts_again_is_shown_from_its_start(clock):
    with Display(console=terminal()) as display:
        display.phase("generate", 8, 8)
        clock.now += 1
        display.phase("generate", 1, 8)
        (task,) = display._phases.tasks
        assert task.completed == 1 and not task.finished


@pytest.mark.parametrize("log_json", [False, True], ids=["bars", "json"])
def test_nothing_is_written_that_was_not_asked_for(log_json):
    console = Console(file=io.StringIO())
    with Display(log_json=log_json, console=console) as display:
        if not log_json:
            display.phase("load", 1, 3)
            display.update(30, HALFWAY, 90)
    assert written(console) == ""


def test_json_is_a_line_a_second_and_one_at_the_end(clock):
    console = terminal()
    with Display(log_json=True, console=console) as display:
        display.phase("load", 1, 3)
        for n in range(30):  # a quarter of a second apart
            clock.now += 0.25
            display.update(n, HALFWAY, 90)
        display.update(30, HALFWAY, 90)
    lines = [json.loads(line) for line in written(console).splitlines()]
    assert lines[0] == {"elapsed_s": 0, "phase": "loading", "done": 1, "total": 3}
    assert [line["done"] for line in lines[1:]] == [3, 7, 11, 15, 19, 23, 27, 30]
    assert all(line["busy"] == HALFWAY.busy for line in lines[1:])
    assert lines[-1] == {"elapsed_s": 7.5, **figures(30, HALFWAY, 90)}


def test_a_run_that_fails_leaves_its_last_figures():
    console = Console(file=io.StringIO())

    def run() -> None:
        with Display(log_json=True, console=console) as display:
            display.update(1, NOTHING, 90)
            display.update(30, HALFWAY)
            raise OSError

    with pytest.raises(OSError):
        run()
    first, last = map(json.loads, written(console).splitlines())
    assert first["done"] == 1 and last["done"] == 30 and last["total"] == 90


@pytest.mark.parametrize("log_json", [False, True], ids=["bars", "json"])
def test_a_hundred_thousand_updates_cost_nothing(log_json):
    """A microsecond each where nothing is drawn; the limit is for a busy machine."""
    totals = HALFWAY
    with Display(log_json=log_json, console=terminal()) as display:
        start = time.process_time()
        for n in range(100_000):
            display.update(n, totals)
            display.phase("generate", n, 200_000)
        assert time.process_time() - start < 2
