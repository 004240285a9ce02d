"""Running totals of a stream of rounds: constant in size, however many rounds there are."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from ..plan.fit import need
from ..plan.plan import Plan
from ..plan.policy import Policy
from .trace import Timeline


@dataclass(frozen=True, slots=True)
class Choice:
    """A policy, what it is predicted to generate per second, and the lane that is predicted to be busiest."""

    policy: Policy
    tokens_per_s: float
    busiest: str


@dataclass(slots=True)
class Totals:
    """Counts, and seconds and bytes by lane, over all rounds that have ended.

    `memory` is the planned peak of the largest round.
    """

    sequences: int = 0  # that have ended
    prompt_tokens: int = 0
    output_tokens: int = 0
    rounds: int = 0
    seconds_ended: float = 0.0
    bound_s: float = 0.0  # the busiest lane's seconds in each phase of each round
    busy: dict[str, float] = field(default_factory=dict)
    moved: dict[str, int] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    choice: Choice | None = None  # the automatic policy, and what it was predicted to do
    began: float | None = None  # when the round under way did, by time.perf_counter()

    def begin(self, plan: Plan) -> None:
        """A round of this plan begins."""
        self.began = time.perf_counter()
        for tier, nbytes in need(plan).items():
            self.memory[tier.value] = max(nbytes, self.memory.get(tier.value, 0))

    def end(self, timeline: Timeline) -> None:
        """The round has ended, and this is what it did."""
        self.rounds += 1
        self.began = None
        self.seconds_ended += timeline.makespan_s
        self.bound_s += timeline.bound_s
        for lanes in timeline.lanes.values():
            for lane, use in lanes.items():
                self.busy[lane] = self.busy.get(lane, 0.0) + use.busy_s
                self.moved[lane] = self.moved.get(lane, 0) + use.bytes

    def answer(self, prompt_tokens: int, output_tokens: int) -> None:
        """A sequence has ended."""
        self.sequences += 1
        self.prompt_tokens += prompt_tokens
        self.output_tokens += output_tokens

    @property
    def seconds(self) -> float:
        """Seconds of all rounds, the one under way included so far."""
        return self.seconds_ended + (time.perf_counter() - self.began if self.began is not None else 0.0)

    @property
    def busiest(self) -> str | None:
        """The lane that was busy longest."""
        return max(self.busy, key=self.busy.__getitem__, default=None)
