"""The account of a run's time: lanes by phase, the bound, and a trace for Chrome or Perfetto.

Measured and simulated runs are both lists of spans, so both are reported in this one form.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..plan.link import Span
from ..plan.predict import PHASES
from ..plan.schedule import Lane

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class LaneUse:
    """One lane in one phase: seconds busy, bytes moved, ops, and seconds busy while compute was idle."""

    busy_s: float
    bytes: int
    ops: int
    exposed_s: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """Spans of a whole run, and the seconds at which each round's prefill and decode ended."""

    spans: tuple[Span, ...]

    @classmethod
    def of(cls, spans: Iterable[Span]) -> Timeline:
        return cls(tuple(sorted(spans, key=lambda s: s.start)))

    @property
    def makespan_s(self) -> float:
        return max((s.end for s in self.spans), default=0.0)

    @property
    def bound_s(self) -> float:
        """Busy time of the busiest lane in prefill plus that in decode: no schedule of these ops is shorter."""
        return sum(max((use.busy_s for use in lanes.values()), default=0.0) for lanes in self.lanes.values())

    @property
    def lanes(self) -> dict[str, dict[str, LaneUse]]:
        """Use of each lane by phase and lane name; an op belongs to the phase of its token step."""
        busy = _merge((s.start, s.end) for s in self.spans if s.op.lane is Lane.COMPUTE)
        table: dict[str, dict[str, LaneUse]] = {}
        for phase in PHASES:
            chosen = [s for s in self.spans if (s.op.i == 0) == (phase == "prefill")]
            table[phase] = {
                lane.value: _use([s for s in chosen if s.op.lane is lane], busy)
                for lane in Lane
                if any(s.op.lane is lane and (s.op.bytes or s.op.flops) for s in chosen)
            }
        return table


def _use(spans: Sequence[Span], compute: Sequence[Interval]) -> LaneUse:
    busy = sum(s.end - s.start for s in spans)
    hidden = (
        busy if spans and spans[0].op.lane is Lane.COMPUTE else _overlap([(s.start, s.end) for s in spans], compute)
    )
    return LaneUse(busy, sum(s.op.bytes for s in spans), len(spans), busy - hidden)


def _merge(intervals: Iterable[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for low, high in sorted(intervals):
        if merged and low <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return merged


def _overlap(first: Sequence[Interval], second: Sequence[Interval]) -> float:
    """Seconds that intervals of two sorted lists have in common."""
    total, n = 0.0, 0
    for low, high in first:
        while n < len(second) and second[n][1] <= low:
            n += 1
        m = n
        while m < len(second) and second[m][0] < high:
            total += min(high, second[m][1]) - max(low, second[m][0])
            m += 1
    return total


def write_chrome_trace(timeline: Timeline, path: Path) -> None:
    """Write the spans as Chrome trace events, one row per lane (opens in Perfetto and chrome://tracing)."""
    rows = {lane: n for n, lane in enumerate(Lane)}
    events: list[dict[str, object]] = [
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": n, "args": {"name": lane.value}} for lane, n in rows.items()
    ]
    for s in timeline.spans:
        args = {"i": s.op.i, "j": s.op.j, "k": s.op.k, "part": s.op.part, "bytes": s.op.bytes, "flops": s.op.flops}
        events.append(
            {
                "name": s.op.name,
                "ph": "X",
                "pid": 0,
                "tid": rows[s.op.lane],
                "ts": s.start * 1e6,
                "dur": (s.end - s.start) * 1e6,
                "args": args,
            }
        )
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
