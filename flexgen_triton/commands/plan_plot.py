"""The plan as a picture: what throughput costs in latency, and what the best policy needs of each memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..plan.hardware import GIB
from ..plan.search import Searched, frontier
from .console import TIERS

KINDS = {"weights": "#4878a8", "cache": "#d1713c", "activations": "#5a9a68", "other": "#b8b8b8"}
LABELS = {"other": "rings, workspace"}
WIDE = 5  # a largest value so many times the smallest is drawn on a logarithmic axis
LEGEND = {"loc": "upper center", "fontsize": 8, "frameon": False, "columnspacing": 1.2, "handletextpad": 0.5}


def require_matplotlib() -> None:
    """Raise ValueError, with the way out, where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib, which is not installed: pip install 'flexgen_triton[plot]'")


def draw(searched: Searched, memory: Mapping[str, Mapping[str, float]], file: Path) -> None:
    """Write the picture as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    problem = searched.problem
    figure.suptitle(
        f"{problem.model.name}, {problem.prompt_len} tokens in, {problem.gen_len} out. Predicted for "
        f"{searched.hardware.name}",
        fontsize=10,
    )
    _draw_frontier(left, searched)
    _draw_memory(right, memory)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3, lw=0.6)
        axes.set_axisbelow(True)
    figure.savefig(file, format="png", dpi=130)


def _draw_frontier(axes: Any, searched: Searched) -> None:
    """Every candidate's bound, those that no other beats in both, and what was simulated."""
    best, others = searched.best, searched.found[1:]
    latencies = [c.optimum.seconds for c in searched.candidates]
    rates = [c.tokens_per_s for c in searched.candidates]
    edge = frontier(searched)
    axes.scatter(latencies, rates, s=12, color="#9aa5b1", alpha=0.55, linewidths=0, label="bounds of round sizes")
    axes.plot([e[0] for e in edge], [e[1] for e in edge], color="#4878a8", lw=1.3, label="their frontier")
    if others:
        points = [f.latency_s for f in others], [f.tokens_per_s for f in others]
        axes.scatter(*points, s=38, color="#c23b22", marker="D", zorder=3, label="simulated")
    label = f"best: {best.policy.gpu_batch_size} × {best.policy.num_gpu_batches}, {best.tokens_per_s:.3g} tok/s"
    axes.scatter([best.latency_s], [best.tokens_per_s], s=130, color="#c23b22", marker="*", zorder=4, label=label)
    _scale(axes.xaxis, axes.set_xscale, [*latencies, *(f.latency_s for f in searched.found)])
    _scale(axes.yaxis, axes.set_yscale, [*rates, *(f.tokens_per_s for f in searched.found)])
    axes.set_xlabel("latency of a round of prompts (s)")
    axes.set_ylabel("throughput (generated tokens / s)")
    axes.grid(axis="x", alpha=0.3, lw=0.6)
    axes.legend(ncols=4, bbox_to_anchor=(0.5, -0.15), **LEGEND)


def _scale(axis: Any, set_scale: Any, values: Sequence[float]) -> None:
    """A logarithmic axis, with plain numbers, where the values span a wide range."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if max(values, default=1.0) <= WIDE * min(values, default=1.0):
        return
    set_scale("log")
    within = max(values) < 300 * min(values)  # few enough powers of ten that there is room between them
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if within else (1,), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axis.set_minor_formatter(NullFormatter())


def _draw_memory(axes: Any, memory: Mapping[str, Mapping[str, float]]) -> None:
    """A stacked bar for each tier, in per cent of the bytes there are: tiers differ too much for one axis of bytes."""
    tiers = list(memory.values())
    bottoms = [0.0] * len(tiers)
    for kind, colour in KINDS.items():
        heights = [100 * nbytes[kind] / max(nbytes["available"], 1.0) for nbytes in tiers]
        axes.bar(range(len(tiers)), heights, 0.6, bottom=bottoms, color=colour, label=LABELS.get(kind, kind))
        bottoms = [a + b for a, b in zip(bottoms, heights, strict=True)]
    axes.axhline(100, color="#303030", lw=1.4, label="capacity")
    labels = [f"{TIERS[tier]}\n{_gib(n['need'])} of {_gib(n['available'])} GiB" for tier, n in memory.items()]
    axes.set_xticks(range(len(tiers)), labels, fontsize=9)
    axes.set_xlim(-0.6, len(tiers) - 0.4)
    axes.set_ylim(0, 105)
    axes.set_ylabel("memory that the best policy needs (%)")
    axes.legend(ncols=3, bbox_to_anchor=(0.5, -0.15), **LEGEND)


def _gib(nbytes: float) -> str:
    return f"{nbytes / GIB:,.{1 if nbytes < 100 * GIB else 0}f}"
