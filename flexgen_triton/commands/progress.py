"""Progress of a run on stderr: bars for people, lines of JSON for programs.

Owns the figures derived from a run's totals and how they are written. Knows nothing of models or of the engine.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from ..plan.hardware import GIB
from ..run.totals import Totals
from .console import TIERS

PHASES = {"measure": "measuring", "convert": "converting", "load": "loading", "generate": "generating"}
COLUMNS = (TextColumn("{task.description}"), BarColumn(bar_width=20))  # with the times, within 60 columns
REDRAW_S = 0.1
LOG_S = 1.0


def figures(done: int, totals: Totals, total: int | None = None) -> dict[str, Any]:
    """Sequences done, and the figures of a run so far: rates over the seconds that rounds ran; None: not known yet."""
    seconds = totals.seconds
    is_timed = total is not None and totals.sequences and seconds
    return {
        "done": done,
        "total": total,
        "prompt_tokens": totals.prompt_tokens,
        "output_tokens": totals.output_tokens,
        "output_tok_s": totals.output_tokens / seconds if seconds and totals.output_tokens else None,
        "predicted_tok_s": totals.choice.tokens_per_s if totals.choice else None,
        "predicted_busiest": totals.choice.busiest if totals.choice else None,
        "eta_s": max((total or 0) - done, 0) * seconds / totals.sequences if is_timed else None,
        "rounds": totals.rounds,
        "seconds": seconds,
        "bound_s": totals.bound_s,
        "busiest": totals.busiest,
        "busy": dict(totals.busy),
        "moved": dict(totals.moved),
        "memory": dict(totals.memory),
    }


def figures_text(f: Mapping[str, Any]) -> str:
    """ "1234 tokens, 56.7 tok/s, 1:02:03 to go, busiest disk_in (93 %), GiB planned: GPU 1.2, host 30.0" """
    texts = [f"{f['output_tokens']} tokens"]
    texts += [f"{f['output_tok_s']:.4g} tok/s"] if f["output_tok_s"] is not None else []
    texts += _predicted(f)
    texts += [f"{_clock(f['eta_s'])} to go"] if f["eta_s"] is not None else []
    texts += [_busiest(f)] if f["busiest"] else []
    memory = [f"{TIERS[tier]} {n / GIB:.1f}" for tier, n in f["memory"].items() if n]
    return ", ".join(texts + ([f"GiB planned: {memory[0]}", *memory[1:]] if memory else []))


def closing_text(f: Mapping[str, Any]) -> str:
    """The last line of a run: what was done, how fast, and how near to the bound of its busiest lane."""
    texts = [_count(f["done"], "prompt"), _count(f["output_tokens"], "token")]
    if f["seconds"]:
        texts += [f"{f['seconds']:.2f} s", f"{f['output_tok_s'] or 0:.4g} tok/s", *_predicted(f)]
        texts += [f"makespan / bound {f['seconds'] / f['bound_s']:.3f}"] if f["bound_s"] else []
    return ", ".join(texts + ([_busiest(f)] if f["busiest"] else []))


def _predicted(f: Mapping[str, Any]) -> list[str]:
    """The predicted speed of an automatic policy: until something is measured, the only figure there is."""
    if f["predicted_tok_s"] is None:
        return []
    return [f"predicted {f['predicted_tok_s']:.4g} tok/s by {f['predicted_busiest']}"]


def _busiest(f: Mapping[str, Any]) -> str:
    share = f" ({f['busy'][f['busiest']] / f['seconds']:.0%})" if f["seconds"] else ""
    return f"busiest lane {f['busiest']}{share}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{s:02}"


class Display:
    """Progress of a run on stderr, as a context manager: nothing where stderr is no terminal, unless `log_json`.

    With `log_json` there are no bars but a line of JSON, at most one a second and one at the end. `total` is how many
    sequences there will be, where that is known. Nothing but the time is looked at in calls that come too soon.
    """

    def __init__(self, total: int | None = None, *, log_json: bool = False, console: Console | None = None) -> None:
        self._total, self._log_json = total, log_json
        self._console = console or Console(stderr=True)
        self._is_shown = self._console.is_terminal and not log_json
        self._phases = Progress(*COLUMNS, TimeElapsedColumn(), TimeRemainingColumn())
        self._sequences = Progress(*COLUMNS, TextColumn("{task.completed}/{task.fields[of]}"), TimeElapsedColumn())
        self._tasks: dict[str, TaskID] = {}
        self._text = Text(style="dim")
        self._live: Live | None = None
        self._last: tuple[int, Totals] | None = None
        self._start = self._next = self._next_phase = 0.0

    def phase(self, name: str, done: int, total: int) -> None:
        """Part of the run: "measure", "convert", "load" or "generate", done so far of how much."""
        is_edge = name not in self._tasks or done >= total
        if not (self._is_shown or self._log_json) or not (is_edge or time.monotonic() >= self._next_phase):
            return
        self._next_phase = time.monotonic() + REDRAW_S
        if self._log_json:
            if self._last is None:  # else its figures say more
                self._log({"phase": PHASES.get(name, name), "done": done, "total": total})
            return
        if name not in self._tasks:
            self._tasks[name] = self._phases.add_task(PHASES.get(name, name), total=total)
        task = self._tasks[name]
        if done < self._phases.tasks[task].completed:  # the next round's
            self._phases.reset(task)
        self._phases.update(task, completed=done, total=total)

    def update(self, done: int, totals: Totals, total: int | None = None) -> None:
        """Sequences done, and the run's figures so far; `total` as soon as it is known."""
        self._total = self._total if total is None else total
        self._last = (done, totals)
        if time.monotonic() < self._next or not (self._is_shown or self._log_json):
            return
        if self._log_json:
            self._log(figures(done, totals, self._total))
        else:
            self._draw(done, totals)
            self._next = time.monotonic() + REDRAW_S

    def _draw(self, done: int, totals: Totals) -> None:
        of = "?" if self._total is None else self._total
        if not self._sequences.tasks:
            for name, task in self._tasks.items():
                self._phases.update(task, visible=name == "generate")
            self._sequences.add_task("sequences", total=self._total, of=of)
        self._sequences.update(self._sequences.tasks[0].id, completed=done, total=self._total, of=of)
        self._text.plain = figures_text(figures(done, totals, self._total))

    def _log(self, line: Mapping[str, Any], *, is_last: bool = False) -> None:
        """Write a line, unless one was written less than a second ago."""
        now = time.monotonic()
        if now < self._next and not is_last:
            return
        self._next = now + LOG_S
        self._console.file.write(json.dumps({"elapsed_s": round(now - self._start, 3), **line}) + "\n")
        self._console.file.flush()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Take the bars away while something else is written to the terminal."""
        self.hide()
        try:
            yield
        finally:
            self._show()

    def hide(self) -> None:
        """Take the bars away."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _show(self) -> None:
        if not self._is_shown or self._live is not None:
            return
        self._live = Live(
            get_renderable=self._renderable,
            console=self._console,
            transient=True,
            redirect_stdout=False,  # it is often a file or a pipe
            redirect_stderr=False,
        )
        self._live.start()

    def _renderable(self) -> Group:
        return Group(self._phases, *((self._sequences, self._text) if self._sequences.tasks else ()))

    def __enter__(self) -> Display:
        self._start = time.monotonic()
        self._show()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.hide()
        if self._log_json and self._last is not None:
            done, totals = self._last
            self._log(figures(done, totals, self._total), is_last=True)
