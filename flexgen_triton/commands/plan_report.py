"""The findings of a search for a policy, as tables for people and as JSON for programs.

Knows what was found and predicted. Does not know the command's options, nor how a model is found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..plan.fit import fits, need
from ..plan.footprint import ACTIVATIONS, CACHE, WEIGHTS
from ..plan.hardware import GIB
from ..plan.placement import Tier
from ..plan.plan import Plan
from ..plan.policy import Policy
from ..plan.predict import PHASES, Prediction
from ..plan.problem import available
from ..plan.search import Found, Searched, frontier
from .console import TIERS, print_table

RESOURCES = {
    "gpu": "GiB of GPU memory",
    "host": "GiB of host memory",
    "disk": "GiB of disk",
    "h2d": "GB/s from host to GPU",
    "d2h": "GB/s from GPU to host",
    "disk_in": "GB/s of disk read",
    "disk_out": "GB/s of disk write",
    "host_attention": "GB/s of attention on the host",
}
NOTHING = 0.0005  # a gain below this share of the throughput is none


@dataclass(frozen=True)
class Choice:
    """A policy to tell about. Without a prediction it was not simulated: its figures are the relaxation's, bounds."""

    policy: Policy
    plan: Plan
    tokens_per_s: float
    latency_s: float
    prediction: Prediction | None = None

    @property
    def at_most(self) -> str:
        """The sign before a figure that is only a bound; empty for a simulated one."""
        return "" if self.prediction else "≤ "


def choices(searched: Searched) -> Iterator[Choice]:
    """Yield the simulated policies, best first, then others that fit from the frontier of throughput and latency."""
    for found in searched.found:
        yield _simulated(found)
    known = {(f.policy.gpu_batch_size, f.policy.num_gpu_batches) for f in searched.found}
    free = available(searched.hardware, searched.problem)
    for latency, tokens_per_s, policy in reversed(frontier(searched)):
        plan = searched.problem.plan(policy, host_is_apart=searched.hardware.host_is_apart)
        if (policy.gpu_batch_size, policy.num_gpu_batches) not in known and fits(plan, free):
            yield Choice(policy, plan, tokens_per_s, latency)


def _simulated(found: Found) -> Choice:
    return Choice(found.policy, found.plan, found.tokens_per_s, found.latency_s, found.prediction)


def memory(plan: Plan, searched: Searched) -> dict[str, dict[str, float]]:
    """Bytes by tier: of weights, cache and activations, of rings and workspace, of all, and those there are.

    The disk's weights are the whole store that they are read from. The host's cache has the pages of tokens of the
    disk's sequences that are not full yet.
    """
    store = {Tier.DISK: plan.model.weight_bytes}
    found = {}
    for tier, free in available(searched.hardware, searched.problem).items():
        tiers = (tier,) if plan.host_is_apart or tier is Tier.DISK else (Tier.GPU, Tier.HOST)
        kept = {kind: sum(plan.footprint.of(kind, t) for t in tiers) for kind in (WEIGHTS, CACHE, ACTIVATIONS)}
        kept[WEIGHTS] = store.get(tier, kept[WEIGHTS])
        needs = need(plan)[tier] + store.get(tier, 0)
        found[tier.value] = {
            **{kind: float(nbytes) for kind, nbytes in kept.items()},
            "other": float(needs - sum(kept.values())),
            "need": float(needs),
            "available": free + store.get(tier, 0),
        }
    return {tier: found[tier] for tier in TIERS if tier in found}


# Printing


def show(console: Console, searched: Searched, told: list[Choice], gains: Mapping[str, float]) -> None:
    """Print the search's findings for people."""
    problem, best, hardware = searched.problem, searched.best, searched.hardware
    prompts = "as many prompts as are best" if problem.num_prompts is None else f"{problem.num_prompts} prompts"
    console.print(
        f"[bold]{escape(problem.model.name)}[/] {problem.model.dtype}, {prompts}, {problem.prompt_len} tokens in, "
        f"{problem.gen_len} out, on [bold]{escape(hardware.name)}[/]"
    )
    console.print("A prediction of what this engine will do there, by simulating its schedule; nothing was run.\n")
    print_table(console, _policies(searched, told))
    console.print(
        f"No policy of these round sizes is predicted above [bold]{searched.bound_tokens_per_s:.4g} tok/s[/]; "
        f"the best found is {searched.gap:.1%} below that.\n"
    )
    print_table(console, _memory_table(best.plan, searched))
    print_table(console, _lanes_table(best.prediction))
    print_table(console, _worth_table(gains, best.tokens_per_s))
    console.print(f"The machine's figures: {hardware.source}\n", markup=False)


def _table(title: str, words: int, *headings: str) -> Table:
    """A table whose first columns, `words` of them, are words and the others numbers."""
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False
    )
    for n, heading in enumerate(headings):
        table.add_column(heading, justify="left" if n < words else "right", no_wrap=True)
    return table


def _policies(searched: Searched, told: list[Choice]) -> Table:
    host_is_apart = searched.hardware.host_is_apart
    tiers = "/".join(TIERS.values() if host_is_apart else ("host", "disk"))
    bounds = "" if all(c.prediction for c in told) else "; ≤: a bound, not simulated"
    attended = "; attended: of the cache, by the host" if any(c.policy.attended_percent for c in told) else ""
    title = f"policies: per cent on {tiers}{attended}{bounds}"
    table = _table(
        title, 7, "batches", "weights", "cache", "attended", "act.", "format", "busiest lanes",
        "tok/s", "latency s", f"GiB of {tiers}",
    )  # fmt: skip
    for choice in told:
        table.add_row(
            f"{choice.policy.gpu_batch_size} x {choice.policy.num_gpu_batches}",
            *(_shares(choice.policy, kind, host_is_apart=host_is_apart) for kind in ("w", "cache")),
            f"{choice.policy.attended_percent:.0f}" if host_is_apart else "all",
            _shares(choice.policy, "act", host_is_apart=host_is_apart),
            _format(choice.policy),
            ", ".join(_busiest(choice.prediction).values()) if choice.prediction else "",
            f"{choice.at_most}{choice.tokens_per_s:.4g}",
            f"{_seconds(choice.latency_s)}",
            " / ".join(f"{tier['need'] / GIB:.1f}" for tier in memory(choice.plan, searched).values()),
        )
    return table


def _shares(policy: Policy, kind: str, *, host_is_apart: bool) -> str:
    gpu, cpu, disk = (getattr(policy, f"{kind}_{tier}_percent") for tier in ("gpu", "cpu", "disk"))
    return f"{gpu:g}/{cpu:g}/{disk:g}" if host_is_apart else f"{gpu + cpu:g}/{disk:g}"


def _format(policy: Policy) -> str:
    """Name what is in 4 bits and the share of V that is read."""
    small = [name for name, is_4bit in (("w", policy.compress_weight), ("kv", policy.compress_cache)) if is_4bit]
    texts = [f"4-bit {'+'.join(small)}"] if small else []
    texts += [f"{policy.attn_sparsity:.0%} V"] if policy.attn_sparsity < 1 else []
    return ", ".join(texts) or "as is"


def _busiest(prediction: Prediction) -> dict[str, str]:
    """The busiest lane of each phase; a single new token has no decode."""
    return {phase: prediction.busiest(phase) for phase in PHASES if prediction.lanes[phase]}


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f}" if seconds >= 100 else f"{seconds:.3g}"


def _memory_table(plan: Plan, searched: Searched) -> Table:
    kinds = ("weights", "cache", "activations", "other", "need", "available")
    table = _table(
        "the best: GiB of each tier (the disk's weights: the whole store)", 1,
        "", "weights", "cache", "activations", "rings, workspace", "needed", "available", "used",
    )  # fmt: skip
    for tier, nbytes in memory(plan, searched).items():
        share = f"{nbytes['need'] / nbytes['available']:.1%}" if nbytes["available"] > 0 else ""
        table.add_row(TIERS[tier], *(f"{nbytes[kind] / GIB:.2f}" for kind in kinds), share)
    return table


def _lanes_table(prediction: Prediction) -> Table:
    title = f"the best: busy lanes of one round; makespan / bound {prediction.total_s / prediction.bound_s:.3f}"
    table = _table(title, 1, "lane", "prefill s", "of prefill", "decode s", "of decode")
    seconds = dict(zip(PHASES, (prediction.prefill_s, prediction.decode_s), strict=True))
    for lane in dict.fromkeys(lane for phase in PHASES for lane in prediction.lanes[phase]):
        cells: list[str] = []
        for phase, whole in seconds.items():
            busy = prediction.lanes[phase].get(lane, 0.0)
            cells += [f"{busy:.4g}", f"{busy / whole:.0%}" if whole else ""]
        table.add_row(lane, *cells)
    table.add_row("all", f"{prediction.prefill_s:.4g}", "", f"{prediction.decode_s:.4g}", "", style="bold")
    return table


def _worth_table(gains: Mapping[str, float], tokens_per_s: float) -> Table:
    table = _table("what one more would bring", 1, "one more", "tok/s", "")
    for name, gain in sorted(gains.items(), key=lambda item: -item[1]):
        if gain >= NOTHING * tokens_per_s:
            table.add_row(RESOURCES[name], f"+{gain:.3g}", f"+{gain / tokens_per_s:.1%}")
    nothing = [RESOURCES[name] for name, gain in gains.items() if gain < NOTHING * tokens_per_s]
    for name in nothing:
        table.add_row(name, "nothing", "")
    return table


# JSON


def as_json(searched: Searched, told: list[Choice], gains: Mapping[str, float], command: list[str]) -> dict[str, Any]:
    """The search's findings as JSON, for programs."""
    problem, hardware = searched.problem, searched.hardware
    return {
        "note": "a prediction for this engine, by simulating its schedule; not a run",
        "model": problem.model.name,
        "dtype": problem.model.dtype,
        "prompt_len": problem.prompt_len,
        "gen_len": problem.gen_len,
        "num_prompts": problem.num_prompts,
        "allow": sorted(problem.allow),
        "max_latency_s": problem.max_latency,
        "hardware": {
            "name": hardware.name,
            "source": hardware.source,
            "host_is_apart": hardware.host_is_apart,
            "gpu_bytes": hardware.gpu_bytes,
            "cpu_bytes": hardware.host_bytes,
            "disk_bytes": hardware.disk_bytes,
        },
        "policies": [_choice_json(choice, searched) for choice in told],
        "bound_tokens_per_s": searched.bound_tokens_per_s,
        "gap": searched.gap,
        "worth": dict(gains),
        "frontier": [
            {"latency_s": latency, "bound_tokens_per_s": tokens_per_s, "policy": policy_json(policy)}
            for latency, tokens_per_s, policy in frontier(searched)
        ],
        "command": command,
    }


def policy_json(policy: Policy) -> dict[str, Any]:
    """The policy's fields as the benchmark's figures have them, and the group size of 4-bit weights."""
    fields = {name: getattr(policy, name) for name in Policy.__slots__ if not name.startswith("comp_")}
    return {**fields, "group_size": policy.comp_weight_config.group_size}


def _choice_json(choice: Choice, searched: Searched) -> dict[str, Any]:
    prediction = choice.prediction
    found: dict[str, Any] = {
        "policy": policy_json(choice.policy),
        "simulated": prediction is not None,
        "tokens_per_s": choice.tokens_per_s,
        "latency_s": choice.latency_s,
        "memory": memory(choice.plan, searched),
    }
    if prediction:
        found |= {"prefill_s": prediction.prefill_s, "decode_s": prediction.decode_s, "bound_s": prediction.bound_s}
        found["lanes"] = {phase: dict(busy) for phase, busy in prediction.lanes.items()}
        found["busiest"] = _busiest(prediction)
    return found
