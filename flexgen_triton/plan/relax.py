"""The planning problem with its steps smoothed away: loads and memory as linear functions of the nine shares.

FlexGen's linear program (ICML 2023, section 4.3) with what it left out: real layers with embeddings and output
projection, formats, rings, workspaces, every lane. No coefficient is written by hand. Each is a difference between
plans made by `make_plan` and costed by `seconds`, the same as are run; so a relaxation cannot drift from the schedule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import NamedTuple

from scipy.optimize import linprog

from .cost import seconds
from .fit import need
from .footprint import STAGING
from .generator import Generator
from .hardware import GIB, Hardware
from .placement import Tier
from .plan import Plan, make_plan
from .policy import Policy
from .predict import DECODE, PHASES, PREFILL, sample_steps, sampled
from .spec import ModelSpec, Workload

KINDS = ("w", "cache", "act")
SHORT = 2  # decoder layers of the model that coefficients are taken from; all are alike
SHORT_STEPS = 4
STAGE = "stage"
TIE = 1e-3  # weight of all lanes' loads beside the busiest one's: between equals, move less

Amounts = dict[tuple[str, str], float]  # (phase, lane) -> seconds; ("need", tier) and ("stage", ring) -> bytes
ATTENDED = "attended"  # of the cache: at home on the host, and attended to by it
Place = Tier | str
Shares = dict[tuple[str, Place], float]  # kind and place -> share, summing to 1 for each kind


class Optimum(NamedTuple):
    """The relaxation's best shares, and a time that no policy of its kind beats."""

    seconds: float
    shares: Shares


def shortened(model: ModelSpec, layers: int) -> ModelSpec:
    """The model with its first `layers` decoder layers only."""
    modules = tuple(m for m in model.modules if not m.is_decoder or m.index < layers)
    return replace(model, modules=modules, num_decoder_layers=layers)


@dataclass(frozen=True)
class Relaxation:
    """One model in one format, in GPU batches of one size, on one machine. `policy` gives everything but shares."""

    model: ModelSpec
    policy: Policy
    prompt_len: int
    gen_len: int
    hardware: Hardware

    @property
    def places(self) -> list[tuple[str, Place]]:
        """The places each kind may have, the GPU first; host bytes that are used in place count as the GPU's."""
        tiers = tuple(Tier) if self.hardware.host_is_apart else (Tier.GPU, Tier.DISK)
        attended: list[tuple[str, Place]] = [("cache", ATTENDED)] if self.hardware.host_is_apart else []
        return [*product(KINDS, tiers), *attended]

    def _plan(self, model: ModelSpec, shares: Shares, num_gpu_batches: int) -> Plan:
        policy = with_shares(replace(self.policy, num_gpu_batches=num_gpu_batches), shares)
        workload = Workload.uniform(self.prompt_len, self.gen_len, policy.gpu_batch_size, num_gpu_batches)
        return make_plan(model, policy, workload, host_is_apart=self.hardware.host_is_apart)

    def _amounts(self, shares: Shares, num_gpu_batches: int) -> Amounts:
        """Loads and needs of the whole model, from shortened ones: their last decoder layer stands for all left out."""
        layers = self.model.num_decoder_layers
        short = shortened(self.model, min(SHORT, layers))
        plan = self._plan(short, shares, num_gpu_batches)
        found = self._loads(plan, layers - short.num_decoder_layers + 1)
        needs = _needs(plan)
        if layers > short.num_decoder_layers:
            longer = _needs(self._plan(shortened(self.model, SHORT + 1), shares, num_gpu_batches))
            needs = _along(needs, longer, layers - SHORT)
        return found | needs

    def _loads(self, plan: Plan, times: int) -> Amounts:
        """Seconds by phase and lane; the last decoder layer's layers count `times`."""
        steps = sorted(sample_steps(plan.workload.steps, SHORT_STEPS).items())
        last = plan.model.num_decoder_layers - 1
        repeated = [stage.module.is_decoder and stage.module.index == last for stage in plan.stages]
        found: Amounts = {}
        for op in Generator(sampled(plan.program, dict(steps))):
            key = (DECODE if op.i else PREFILL, op.lane.value)
            weight = steps[min(op.i, len(steps) - 1)][1] * (times if repeated[op.j] else 1)
            found[key] = found.get(key, 0.0) + weight * seconds(op, self.hardware)
        return found

    @cached_property
    def _corners(self) -> dict[int, tuple[Amounts, dict[tuple[str, Place], Amounts]]]:
        """Amounts with all on the GPU, and the change by each other place, for one and for two GPU batches."""
        found = {}
        for count in (1, 2):
            base: Shares = {(kind, Tier.GPU): 1.0 for kind in KINDS}
            at_base = self._amounts(base, count)
            changes: dict[tuple[str, Place], Amounts] = {}
            for kind, place in self.places:
                if place is not Tier.GPU:
                    moved = {key: share for key, share in base.items() if key[0] != kind} | {(kind, place): 1.0}
                    changes[kind, place] = _less(self._amounts(moved, count), at_base)
            found[count] = at_base, changes
        return found

    def linear(self, num_gpu_batches: int) -> tuple[Amounts, dict[tuple[str, Place], Amounts]]:
        """Amounts with all on the GPU and their changes, for any number of GPU batches."""
        (one, first), (two, second) = self._corners[1], self._corners[2]
        more = num_gpu_batches - 1
        return _along(one, two, more), {key: _along(first[key], second[key], more) for key in first}

    def solve(
        self,
        num_gpu_batches: int,
        available: Mapping[Tier, float],
        *,
        max_seconds: float | None = None,
        faster: Mapping[str, float] | None = None,
    ) -> Optimum | None:
        """The best shares for that many GPU batches within `available` bytes; None where nothing fits.

        `faster` divides the loads of lanes, to tell what a faster one would bring.
        """
        base, changes = self.linear(num_gpu_batches)
        variables = self.places
        lanes = sorted(key for key in set(base).union(*changes.values()) if key[0] in PHASES)
        speed = faster or {}

        def row(key: tuple[str, str], scale: float) -> tuple[list[float], float]:
            """Coefficients of an amount over the shares, and its constant."""
            slopes = [changes.get(v, {}).get(key, 0.0) / scale for v in variables]
            return slopes, base.get(key, 0.0) / scale

        upper: list[list[float]] = []
        limits: list[float] = []
        total = [0.0] * len(variables)
        for key in lanes:
            slopes, constant = row(key, speed.get(key[1], 1.0))
            upper.append([*slopes, *(-1.0 if key[0] == phase else 0.0 for phase in PHASES)])
            limits.append(-constant)
            total = [a + b for a, b in zip(total, slopes, strict=True)]
        upper = [[*r, *(0.0 for _ in STAGING)] for r in upper]
        for tier, nbytes in available.items():
            slopes, constant = row(("need", tier.value), GIB)
            upper.append([*slopes, 0.0, 0.0, *(float(tier is Tier.HOST) for _ in STAGING)])
            limits.append(nbytes / GIB - constant)
        for ring, kind in product(STAGING, KINDS):  # staging is as large as the kind that needs most of it
            slopes, constant = row((STAGE, ring), GIB)
            own = (s if v[0] == kind else 0.0 for s, v in zip(slopes, variables, strict=True))
            upper.append([*own, 0.0, 0.0, *(-1.0 if r == ring else 0.0 for r in STAGING)])
            limits.append(-constant)
        if max_seconds is not None:
            upper.append([*[0.0] * len(variables), 1.0, 1.0, *(0.0 for _ in STAGING)])
            limits.append(max_seconds)
        others = len(PHASES) + len(STAGING)
        equal = [[*(float(v[0] == kind) for v in variables), *[0.0] * others] for kind in KINDS]
        found = linprog(
            [*(TIE * t for t in total), *(1.0 for _ in PHASES), *(0.0 for _ in STAGING)],
            A_ub=upper,
            b_ub=limits,
            A_eq=equal,
            b_eq=[1.0] * len(KINDS),
            bounds=[(0, 1)] * len(variables) + [(0, None)] * others,
            method="highs",
        )
        if found.status != 0:
            return None
        values = [float(x) for x in found.x]
        return Optimum(sum(values[len(variables) :][: len(PHASES)]), dict(zip(variables, values, strict=False)))


def with_shares(policy: Policy, shares: Mapping[tuple[str, Place], float]) -> Policy:
    """The policy with these shares, which are rounded to whole percentages and sum to 100."""
    fields: dict[str, int] = {}
    for kind in KINDS:
        ends = [shares.get((kind, Tier.GPU), 0.0)]
        ends.append(ends[0] + shares.get((kind, Tier.HOST), 0.0) + shares.get((kind, ATTENDED), 0.0))
        gpu, both = (round(100 * end) for end in ends)
        fields |= {f"{kind}_gpu_percent": gpu, f"{kind}_cpu_percent": both - gpu}
    if attended := shares.get(("cache", ATTENDED), 0.0):
        on_host = attended + shares.get(("cache", Tier.HOST), 0.0)
        fields |= {"cpu_cache_compute": True, "cpu_attention_percent": round(100 * attended / on_host)}
    return replace(policy, **fields)  # type: ignore[arg-type]


def _needs(plan: Plan) -> Amounts:
    """Bytes of each tier, the staging rings apart: they are shared by weights, cache and activations."""
    found = {("need", tier.value): float(nbytes) for tier, nbytes in need(plan).items()}
    staging = {(STAGE, ring): float(plan.footprint.rings[ring]) for ring in STAGING}
    found["need", Tier.HOST.value] -= sum(staging.values())
    return found | staging


def _less(a: Amounts, b: Amounts) -> Amounts:
    return {key: a.get(key, 0.0) - b.get(key, 0.0) for key in a.keys() | b.keys()}


def _along(one: Amounts, two: Amounts, more: int) -> Amounts:
    return {key: one.get(key, 0.0) + more * (two.get(key, 0.0) - one.get(key, 0.0)) for key in one.keys() | two.keys()}


def whole_tiers(policy: Policy, tiers: Sequence[Tier]) -> list[Policy]:
    """The policy with each of weights, cache and activations wholly on one of the tiers, in every combination."""
    return [
        with_shares(policy, dict.fromkeys(zip(KINDS, chosen, strict=True), 1.0))
        for chosen in product(tiers, repeat=len(KINDS))
    ]
