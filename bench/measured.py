"""Write docs/measured.md: a table of every result file in bench/results, by machine.

    python bench/measured.py            # write the page
    python bench/measured.py --print    # to standard output instead

Owns how the rows of each script are shown. Measures nothing and reads result files only, so the page is the same
wherever it is written; a test compares it with the committed one.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from report import markdown, rows_table
from rows import RESULTS, ROOT, Results, Row, read_results

PAGE = ROOT / "docs" / "measured.md"
EVERY_S = 300  # between the samples of a soak that are shown
INTRODUCTION = """\
# Measured

`python bench/measured.py` writes this page from the files in [bench/results](../bench/results/README.md), by machine.
Every run names its commit and its command; `-dirty` behind a commit says that files differed from it. The results that
have no file, and remarks on these tables, are in [measured-by-hand.md](measured-by-hand.md)."""
NO_GPU = "None of these machines has a GPU: not yet run on a GPU."


def accuracy(rows: Sequence[Row]) -> str:
    """The rows of bench/accuracy.py beside what FlexGen published, with the change from its own fp16."""
    base = next((row.details["published"] for row in rows if row.name == "fp16"), None)
    lines = [["", "perplexity", "change from fp32", "top-1 as fp32", "FlexGen, OPT-30B", "OPT-175B"]]
    for row in rows:
        change, error, top1 = (row.details[key] for key in ("change", "change_error", "same_top1"))
        figures = [f"{row.value:.2f}", f"{change:+.2%} ± {error:.2%}" if error else "", f"{top1:.1%}"]
        lines.append([row.name, *figures, *_published(row.details["published"], base)])
    return markdown(lines)


def _published(perplexities: Sequence[float] | None, base: Sequence[float] | None) -> list[str]:
    if perplexities is None or base is None:
        return ["", ""]
    changes = [x / y - 1 for x, y in zip(perplexities, base, strict=True)]
    return [f"{x:.2f} ({c:+.1%})" if c else f"{x:.2f}" for x, c in zip(perplexities, changes, strict=True)]


def peers(rows: Sequence[Row]) -> str:
    """Every run of every case, and the ratios of the sides."""
    lines = [["", "sequences", "tok/s", "prefill s", "decode s", "peak GB", "makespan / bound", "load before"]]
    for row in rows:
        lines += [_peer_cells(row, run) for run in row.details.get("runs", ())]
    told = [f"{row.name}: {row.note or f'{row.value:.2f}'}" for row in rows if row.name.startswith("ratio")]
    return markdown(lines) + "".join(f"\n\n{text}" for text in told)


def _peer_cells(row: Row, run: Mapping[str, Any]) -> list[str]:
    name, sequences, peak = row.name, str(row.details["sequences"]), run["peak_bytes"]
    if run["outcome"] != "ok":
        return [name, sequences, run["outcome"], *[""] * 5]
    figures = [f"{run['total_tok_s']:.1f}", f"{run['prefill_s']:.1f}", f"{run['decode_s']:.1f}"]
    overlap = f"{run['makespan_s'] / run['bound_s']:.3f}" if run["bound_s"] else ""
    load = "" if run.get("load_before") is None else f"{run['load_before']:.1f}"
    return [name, sequences, *figures, "" if peak is None else f"{peak / 1e9:.2f}", overlap, load]


def predictions(rows: Sequence[Row]) -> str:
    """Predicted beside measured seconds, medians over a case's runs, and planned over peak memory."""
    lines = [["", "predicted s", "measured s", "predicted / measured", "planned / peak memory"]]
    for row in rows:
        name, d = row.name.partition(":")[0], row.details
        if "measured" not in d:
            lines.append([name, row.note, *[""] * 3])
            continue
        seconds = [f"{d[key]['total_s']:.2f}" for key in ("predicted", "measured")]
        lines.append([name, *seconds, f"{d['ratio']['total_s']:.2f}", f"{d['memory_ratio']:.3f}"])
    return markdown(lines)


def auto_policy(rows: Sequence[Row]) -> str:
    """The automatic policy under each limit beside the grid's best, then the whole grid."""
    compared = [row for row in rows if "limit_bytes" in row.details]
    lines = [["limit GB", "automatic", "tok/s", "best of the grid", "tok/s", "automatic / best", ""]]
    for row in compared:
        sides = [cell for side in ("automatic", "best") for cell in _policy_cells(row.details.get(side))]
        ratio = "" if row.value is None else f"{row.value:.3f}"
        lines.append([f"{row.details['limit_bytes'] / 1e9:.2f}", *sides, ratio, row.note])
    grid = [["grid", "tok/s"]]
    grid += [[f"`{row.name.removeprefix('grid ')}`", f"{row.value:.2f}"] for row in rows if row not in compared]
    return f"{markdown(lines)}\n\n{markdown(grid)}"


def _policy_cells(side: Mapping[str, Any] | None) -> tuple[str, str]:
    if side is None:
        return "", ""
    p = side["policy"]
    percent = [p[f"{kind}_{tier}_percent"] for kind in ("w", "cache", "act") for tier in ("gpu", "cpu")]
    name = f"{p['gpu_batch_size']}x{p['num_gpu_batches']} {' '.join(f'{x:g}' for x in percent)}"
    return f"`{name}`", f"{median(run['total_tok_s'] for run in side['runs']):.2f}"


def memory(rows: Sequence[Row]) -> str:
    """Planned memory beside the peak under a control group of the plan's size."""
    lines = [["", "policy", "limit MB", "planned MB", "peak MB", "planned / peak", "outcome"]]
    for row in rows:
        d = row.details
        sizes = [f"{d[key] / 1e6:.0f}" if d[key] else "" for key in ("limit", "planned", "peak")]
        ratio = "" if row.value is None else f"{row.value:.3f}"
        lines.append([row.name, f"`{d['policy']}`" if d["policy"] else "", *sizes, ratio, d["outcome"]])
    return markdown(lines)


def soak(rows: Sequence[Row]) -> str:
    """The slope of the process's own memory, and a sample every few minutes."""
    slope, *samples = rows
    lines = [["minutes", "answers", "streams given up", "requests refused", "own memory MiB", "threads", "open files"]]
    shown = -1.0
    for row in samples:
        d = row.details
        if d["at_s"] // EVERY_S > shown or row is samples[-1]:
            shown = d["at_s"] // EVERY_S
            counts = [str(d[key]) for key in ("outputs", "abandoned", "refused")]
            lines.append([f"{d['at_s'] / 60:.1f}", *counts, f"{row.value:.1f}", str(d["threads"]), str(d["files"])])
    slope_text = slope.note if slope.value is None else f"{slope.value:+.2f} {slope.unit} over the second half"
    return f"{markdown(lines)}\n\nSlope: {slope_text}."


SHOWN: dict[str, tuple[Callable[[Sequence[Row]], str], str]] = {
    "accuracy": (accuracy, "Perplexity of held-out text, and how often the likeliest token is fp32's."),
    "auto_policy": (
        auto_policy,
        "Every policy of a coarse grid was run; then, under each limit of memory, the policy that the search finds and "
        "the fastest of the grid that fits, in turn. A policy is `batch x batches`, then its six percentages.",
    ),
    "memory": (memory, "Planned memory against its peak, each run under a control group's limit."),
    "peers": (
        peers,
        "Each run a fresh process, in turn, with a cold page cache; the peak is of process and page cache. The bound "
        "is the busy time of the busiest lane in prefill plus that in decode.",
    ),
    "predictions": (predictions, "The machine was measured first; each case was then run and compared."),
    "soak": (soak, "Random streams and calls in one process."),
}


def section(path: Path, results: Results) -> str:
    """One result file: its commit, date, command, and its table."""
    name = path.name.partition("-")[0]
    show, about = SHOWN.get(name, (rows_table, ""))
    link = f"[{path.name}](../bench/results/{path.parent.name}/{path.name})"
    parts = [f"### {name}, commit {results.commit}", f"{link}, {str(results.header.get('date', ''))[:10]}"]
    if command := results.header.get("command"):
        parts.append(f"```\n{shlex.join(['python', *command])}\n```")
    return "\n\n".join([*parts, *[about] * bool(about), show(results.rows)])


def machine_text(machine: Mapping[str, Any]) -> str:
    """A machine as a heading: its GPU or processor, cores and memory."""
    cores, gib = machine.get("cores", 0), round(machine.get("memory_bytes", 0) / 2**30)
    return f"{machine.get('gpu') or machine.get('cpu')}, {cores} cores, {gib} GiB"


def page(folder: Path = RESULTS) -> str:
    """The whole page, machines and files in the order of their names."""
    machines: dict[str, list[str]] = {}
    has_gpu = False
    for path in sorted(folder.glob("*/*.json")):
        results = read_results(path)
        machine = results.header.get("machine", {})
        machines.setdefault(f"## {machine_text(machine)}", []).append(section(path, results))
        has_gpu = has_gpu or bool(machine.get("gpu"))
    parts = [part for heading, sections in machines.items() for part in (heading, *sections)]
    return "\n\n".join([INTRODUCTION, *[NO_GPU] * (not has_gpu), *parts]) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write docs/measured.md from the files in bench/results.")
    parser.add_argument("--print", action="store_true", help="to standard output instead")
    if parser.parse_args(argv).print:
        print(page(), end="")
    else:
        PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
