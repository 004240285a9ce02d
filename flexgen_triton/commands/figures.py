"""The figures of a benchmark run, by FlexGen's definitions, and how they are printed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..plan.fit import need
from ..plan.footprint import KINDS, WORKSPACE
from ..plan.formats import PlainCache
from ..plan.hardware import GIB, Hardware
from ..plan.placement import Tier
from ..plan.plan import Plan
from ..plan.policy import Policy
from ..plan.predict import Prediction, predict
from ..plan.search import Found, Searched
from ..run.report import RunReport
from ..run.trace import LaneUse, Timeline
from ..utils import GB, log_text
from .console import print_table


def step_seconds(report: RunReport) -> list[float]:
    """Seconds of each token step, summed over the rounds of the schedule: prefill first."""
    totals: list[float] = []
    for ends in report.step_ends:
        durations = [b - a for a, b in zip((0.0, *ends), ends, strict=False)]
        for n, seconds in enumerate(durations):
            if n == len(totals):
                totals.append(0.0)
            totals[n] += seconds
    return totals


def timing(report: RunReport, *, prompt_tokens: int, num_prompts: int, gen_len: int) -> dict[str, float]:
    """Prefill, decode and total latency and throughput.

    When fewer steps than `gen_len` were run (`--cut-gen-len`), decode is projected from the mean of those that were.
    """
    steps = step_seconds(report)
    prefill, decode = steps[0], sum(steps[1:])
    if len(steps) < gen_len:
        decode = decode / max(len(steps) - 1, 1) * (gen_len - 1)
    total = prefill + decode
    return {
        "prefill_s": prefill,
        "prefill_tok_s": prompt_tokens / prefill,
        "decode_s": decode,
        "decode_tok_s": num_prompts * (gen_len - 1) / max(decode, 1e-10),
        "total_s": total,
        "total_tok_s": num_prompts * gen_len / total,
    }


def placed(plans: Sequence[Plan]) -> dict[str, dict[str, int]]:
    """Bytes by kind and tier: weights once, cache and activations of the largest round."""
    return max((p.placement for p in plans), key=lambda p: sum(p["cache"].values()))


def lanes_json(timeline: Timeline) -> dict[str, dict[str, dict[str, float]]]:
    return {phase: {lane: asdict(use) for lane, use in lanes.items()} for phase, lanes in timeline.lanes.items()}


def percent_text(plan: Plan) -> str:
    return " ".join(f"{x:g}" for x in plan.policy.percent)


def formats_text(plan: Plan) -> str:
    """Formats and options that differ from the model's defaults, as ", weights in 4 bits, groups of 64, 10 % of V"."""
    policy = plan.policy
    texts = [
        f", weights {policy.weight_format.description}" if policy.weight_format else "",
        f", cache {policy.cache_format.description}" if policy.cache_format != PlainCache() else "",
        f", {policy.attn_sparsity:.0%} of V" if policy.attn_sparsity < 1 else "",
        f", {policy.attended_percent:g} % attended by the host" if plan.host_attends else "",
        ", open pages kept" if plan.keeps_open else "",
    ]
    return "".join(texts)


def print_plan(console: Console, plan: Plan) -> None:
    """Print what goes where, before anything is touched: the memory to set aside, which adds up to its peak."""
    policy, workload = plan.policy, plan.workload
    console.print(
        f"[bold]{escape(plan.model.name)}[/] {plan.model.dtype}, {plan.model.num_decoder_layers} decoder layers, "
        f"{policy.gpu_batch_size} x {policy.num_gpu_batches} sequences ({policy.strategy}), "
        f"percent {percent_text(plan)}, {workload.steps} token steps{formats_text(plan)}"
    )
    table = Table("GiB", "GPU", "host", "disk", title="plan")
    for kind in KINDS:
        table.add_row(kind, *(f"{plan.footprint.of(kind, tier) / GIB:.3f}" for tier in Tier))
    table.add_row("peak", *(f"{plan.footprint.total(tier) / GIB:.3f}" for tier in Tier))
    print_table(console, table)


def dry_run(console: Console, plan: Plan, hardware: Hardware | None, file: Path | None) -> None:
    """Print a plan that is not run, and what is predicted of it on a machine that is known; write both to the file."""
    print_plan(console, plan)
    prediction = predict(plan, hardware) if hardware else None
    if prediction and hardware:
        console.print(
            f"predicted: prefill {prediction.prefill_s:.3f} s, decode {prediction.decode_s:.3f} s, total "
            f"{prediction.total_s:.3f} s ({hardware.name})",
            markup=False,
        )
    if file:
        found = plan_json(plan) | {
            "predicted": predicted_json(prediction, hardware) if prediction and hardware else None
        }
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def plan_json(plan: Plan) -> dict[str, Any]:
    """A plan's figures, under the names that a run's have."""
    workload, placement = plan.workload, plan.placement
    return {
        "note": "the plan of one round; not a run",
        "model": plan.model.name,
        "dtype": plan.model.dtype,
        "policy": {f: getattr(plan.policy, f) for f in Policy.__slots__ if not f.startswith("comp_")},
        "prompt_len": max(n for batch in workload.batches for n in batch.prompt_lens),
        "gen_len": workload.steps,
        "num_prompts": sum(len(batch.prompt_lens) for batch in workload.batches),
        "model_bytes": plan.model.weight_bytes,
        "cache_bytes": sum(placement["cache"].values()),
        "hidden_bytes": sum(placement["activations"].values()),
        "placement": placement,
        "footprint": {kind: {t.value: plan.footprint.of(kind, t) for t in Tier} for kind in KINDS},
        "rings": dict(plan.footprint.rings),
        "workspace_bytes": plan.footprint.of(WORKSPACE, Tier.GPU),
        "device_bytes": plan.footprint.total(Tier.GPU),
        "host_bytes": plan.footprint.total(Tier.HOST),
        "need": {tier.value: nbytes for tier, nbytes in need(plan).items()},
    }


def predicted_json(prediction: Prediction, hardware: Hardware) -> dict[str, Any]:
    """A prediction in the form of the figures it is compared with; no time is projected in it."""
    return {
        "hardware": hardware.name,
        "prefill_s": prediction.prefill_s,
        "decode_s": prediction.decode_s,
        "total_s": prediction.total_s,
        "lanes": {p: {lane: {"busy_s": s} for lane, s in busy.items()} for p, busy in prediction.lanes.items()},
    }


def print_found(console: Console, best: Found, searched: Searched) -> None:
    """The policy that was found, and how much better any could be."""
    policy = best.policy
    console.print(
        f"automatic policy: {policy.gpu_batch_size} x {policy.num_gpu_batches}, percent {percent_text(best.plan)}"
        f"{formats_text(best.plan)}; predicted {best.tokens_per_s:.4g} token/s, no policy above "
        f"{searched.bound_tokens_per_s:.4g} ({searched.hardware.name})",
        markup=False,
    )


def print_lanes(console: Console, timeline: Timeline, predicted: Mapping[str, Any] | None = None) -> None:
    """Print how long each lane was busy, a row per phase and lane, beside the prediction where there is one."""
    table = Table(title="lanes")
    names = ("phase", "lane", "busy s", *("predicted s",) * bool(predicted), "GiB", "GB/s", "ops", "exposed s")
    for name in names:
        table.add_column(name, justify="left" if name in ("phase", "lane") else "right")
    for phase, lanes in timeline.lanes.items():
        for lane, use in lanes.items():
            busy, *others = _lane_cells(use, rate=lane != "compute")
            foretold = predicted["lanes"][phase].get(lane, {"busy_s": 0.0})["busy_s"] if predicted else 0.0
            table.add_row(phase, lane, busy, *(f"{foretold:.2f}",) * bool(predicted), *others)
    print_table(console, table)
    makespan, bound = timeline.makespan_s, timeline.bound_s
    ratio = f"makespan {makespan:.2f} s, bound {bound:.2f} s, makespan / bound {makespan / max(bound, 1e-9):.3f}"
    console.print(f"{ratio}, predicted {predicted['total_s']:.2f} s" if predicted else ratio)


def _lane_cells(use: LaneUse, *, rate: bool) -> tuple[str, ...]:
    speed = f"{use.bytes / use.busy_s / 1e9:.2f}" if rate and use.busy_s else ""
    return f"{use.busy_s:.2f}", f"{use.bytes / GIB:.2f}", speed, str(use.ops), f"{use.exposed_s:.2f}"


def logged(result: Mapping[str, Any]) -> tuple[Any, ...]:
    """The figures that a log has, in its order."""
    names = ("model_bytes", "cache_bytes", "hidden_bytes", "peak_gpu_bytes", "projected")
    rates = (f"{phase}_{kind}" for phase in ("prefill", "decode", "total") for kind in ("s", "tok_s"))
    return tuple(result[name] for name in (*names, *rates))


def summary(result: Mapping[str, Any]) -> str:
    """FlexGen's closing lines, as they are logged, and the host's memory."""
    host = (
        f"peak host mem: {result['peak_host_bytes'] / GB:.3f} GB "
        f"(planned {result['planned_host_bytes'] / GB:.3f}), of it pinned {result['pinned_bytes'] / GB:.3f} GB"
    )
    return f"{log_text(*logged(result))}\n{host}"
