"""The predicted time of a plan on a machine: its real schedule on a virtual clock, for a sample of token steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

from .cost import seconds
from .generator import Generator
from .hardware import Hardware
from .link import simulate
from .plan import Plan
from .schedule import Lane, Program

PHASES = PREFILL, DECODE = "prefill", "decode"
EXACT_STEPS = 6  # as many token steps are simulated one by one; of more, a sample


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds of one round of the schedule, and by phase and lane the seconds busy."""

    prefill_s: float
    decode_s: float
    tokens: int  # generated
    lanes: Mapping[str, Mapping[str, float]]
    ops: int  # simulated

    @classmethod
    def sum(cls, rounds: Sequence[Prediction]) -> Prediction:
        """Add up the predictions of several rounds that run one after another."""
        lanes: dict[str, dict[str, float]] = {PREFILL: {}, DECODE: {}}
        for round, phase in product(rounds, PHASES):
            for lane, busy in round.lanes[phase].items():
                lanes[phase][lane] = lanes[phase].get(lane, 0.0) + busy
        return cls(
            sum(b.prefill_s for b in rounds),
            sum(b.decode_s for b in rounds),
            sum(b.tokens for b in rounds),
            lanes,
            sum(b.ops for b in rounds),
        )

    @property
    def total_s(self) -> float:
        return self.prefill_s + self.decode_s

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens over prefill and decode, FlexGen's throughput."""
        return self.tokens / self.total_s

    @property
    def bound_s(self) -> float:
        """Busy time of the busiest lane in prefill plus that in decode."""
        return sum(max(busy.values(), default=0.0) for busy in self.lanes.values())

    def busiest(self, phase: str) -> str:
        """The lane with most to do; "" where nothing is done in that phase."""
        return max(self.lanes[phase], key=lambda lane: self.lanes[phase][lane], default="")


def sample_steps(steps: int, exact: int = EXACT_STEPS) -> dict[int, float]:
    """Token steps to simulate and how many each stands for: the first, which is the prompt's, the last, which stores
    nothing, and the middles of equal stretches of those between."""
    if steps <= exact:
        return dict.fromkeys(range(steps), 1.0)
    inner = exact - 2
    cuts = [1 + (steps - 2) * n // inner for n in range(inner + 1)]
    middles = {(low + high - 1) // 2: float(high - low) for low, high in pairwise(cuts)}
    return {0: 1.0, **middles, steps - 1: 1.0}


def sampled(program: Program, steps: Iterable[int]) -> Program:
    """The program of those token steps alone, one after another."""
    chosen = sorted(steps)
    counts = tuple(sum(i < n for i in chosen) for n in program.batch_steps)
    chosen.append(chosen[-1] + 1)  # loads look one step ahead
    return program._replace(
        batch_steps=counts,
        cache=lambda i, k: program.cache(chosen[i], k),
        hidden=lambda i, j, k: program.hidden(chosen[i], j, k),
        work=lambda i, *others: program.work(chosen[i], *others),
    )


def predict(plan: Plan, hardware: Hardware, *, exact: int = EXACT_STEPS) -> Prediction:
    """Simulate one round: all of its token steps, or where there are more than `exact` a weighted sample of them."""
    weights = [w for _, w in sorted(sample_steps(plan.workload.steps, exact).items())]
    program = sampled(plan.program, sample_steps(plan.workload.steps, exact))
    lanes: dict[str, dict[str, float]] = {PREFILL: {}, DECODE: {}}
    ends = [0.0] * len(weights)
    ops = 0
    for span in simulate(Generator(program), lambda op: seconds(op, hardware), serial=program.serial):
        op, took = span.op, span.end - span.start
        ops += 1
        busy = lanes[DECODE if op.i else PREFILL]
        busy[op.lane.value] = busy.get(op.lane.value, 0.0) + took * weights[op.i]
        if op.lane is Lane.COMPUTE:
            ends[op.i] = max(ends[op.i], span.end)
    decode = sum((b - a) * w for a, b, w in zip(ends, ends[1:], weights[1:], strict=False))
    tokens = sum(sum(b.new_tokens_each) for b in plan.workload.batches)
    return Prediction(ends[0], decode, tokens, lanes, ops)
