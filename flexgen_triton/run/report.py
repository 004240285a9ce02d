"""Reports of rounds that ran: their plans, when their ops ran, and when their token steps ended.

Prints nothing, and judges nothing: figures for people are made of them elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..plan.link import Span
from ..plan.plan import Plan
from .trace import Timeline


@dataclass(frozen=True, slots=True)
class RoundReport:
    """The report of one round: its plan, when its ops ran, and seconds from its start to the end of each token step."""

    plan: Plan
    timeline: Timeline
    step_ends: tuple[float, ...]

    @classmethod
    def of(cls, plan: Plan, spans: Sequence[Span]) -> RoundReport:
        """The report of a round whose ops ran as `spans` say."""
        return cls(plan, Timeline.of(spans), _step_ends(spans))


@dataclass(frozen=True, slots=True)
class RunReport:
    """The report of a call of `generate`: its rounds and when their ops ran."""

    timeline: Timeline
    plans: tuple[Plan, ...]
    step_ends: tuple[tuple[float, ...], ...]  # by round: seconds at which each token step ended, from its start

    @classmethod
    def of(cls, rounds: Sequence[RoundReport]) -> RunReport:
        """Rounds that ran one after the other."""
        spans: list[Span] = []
        start = 0.0
        for each in rounds:
            spans += [Span(s.op, s.start + start, s.end + start) for s in each.timeline.spans]
            start += each.timeline.makespan_s
        return cls(Timeline.of(spans), tuple(r.plan for r in rounds), tuple(r.step_ends for r in rounds))

    @property
    def prefill_s(self) -> float:
        return sum(ends[0] for ends in self.step_ends)

    @property
    def decode_s(self) -> float:
        return sum(ends[-1] - ends[0] for ends in self.step_ends)


def _step_ends(spans: Sequence[Span]) -> tuple[float, ...]:
    """The ends of the last computation of each token step, in seconds."""
    ends: dict[int, float] = {}
    for s in spans:
        if s.op.name == "compute":
            ends[s.op.i] = max(s.end, ends.get(s.op.i, 0.0))
    return tuple(end for _, end in sorted(ends.items()))
