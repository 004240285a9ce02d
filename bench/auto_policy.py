"""The automatic policy against the best of a grid of policies, all of them measured on this machine.

    python bench/auto_policy.py                                       # opt-125m, random weights, about ten minutes
    python bench/auto_policy.py --model DIRECTORY --num-prompts 32 --sizes 8,32 --batches 1,4 --limits 2GB,3GB,4GB

Every policy of the grid (GPU batch sizes x numbers of GPU batches x share of the weights that stays in memory x where
the cache lies) generates for all prompts, in a process of its own. Then, for each memory limit, the fastest that fits
by its planned need is run again in turn with the policy that the search finds under this limit; their medians are
compared. Without a GPU, a limit is on the host's memory and what does not stay there lies on disk; with one, on the
GPU's, and it lies on the host. Results go to bench/results/<machine>/auto_policy-<commit>.json (or `--out`).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from limits import parse_bytes
from predictions import OFFLOAD_DIR, Job, RunError, measure_machine, run
from rows import ROOT, Row, make_header, results_path, without_folders, write_results

sys.path.insert(0, str(ROOT))

from flexgen_triton.plan.hardware import Hardware, load_profile
from flexgen_triton.plan.policy import Policy, PolicyError
from flexgen_triton.plan.problem import Problem
from flexgen_triton.plan.search import search

RESIDENT = (0, 50, 100)  # per cent of the weights
LIMITS = 3  # as many limits by default, from what the smallest policy of the grid needs to what the largest does
SPARE = 1.02  # of that need

Figures = dict[str, Any]
Runner = Callable[[Policy], Figures]


def grid(sizes: Sequence[int], batches: Sequence[int], num_prompts: int, *, host_is_apart: bool) -> list[Policy]:
    """Every coarse policy whose batches the prompts fill. What is not resident lies one tier further away."""
    found = []
    for size, count, weights, cache in product(sizes, batches, RESIDENT, (100, 0)):
        if size <= num_prompts and size * (count - 1) < num_prompts:
            away = (100 - weights, 100 - cache) if host_is_apart else (0, 0)
            found.append(Policy(size, count, weights, away[0], cache, away[1], 100, 0))
    return found


def in_place(policy: Policy, *, host_is_apart: bool) -> Policy:
    """The policy as it acts: without a GPU, the host's share counts as the GPU's; an idle choice is the default."""
    whole = replace(policy, pin_weight=True) if not host_is_apart else policy
    if host_is_apart:
        return whole
    shares = {
        f"{kind}_gpu_percent": getattr(policy, f"{kind}_gpu_percent") + getattr(policy, f"{kind}_cpu_percent")
        for kind in ("w", "cache", "act")
    }
    return replace(whole, **shares, w_cpu_percent=0, cache_cpu_percent=0, act_cpu_percent=0)


def name(policy: Policy) -> str:
    """`16x4 0 50 0 100 100 0`."""
    shares = " ".join(f"{x:g}" for x in policy.percent)
    return f"{policy.gpu_batch_size}x{policy.num_gpu_batches} {shares}"


@dataclass(frozen=True, slots=True)
class Measured:
    """A policy and its runs over all prompts."""

    policy: Policy
    runs: tuple[Figures, ...]

    @property
    def tokens_per_s(self) -> float:
        return float(median(r["total_tok_s"] for r in self.runs))

    def need(self, tier: str) -> int:
        """Bytes of a tier that its largest round was planned to need."""
        return int(max(r["need"][tier] for r in self.runs))

    def details(self) -> dict[str, Any]:
        keys = ("prefill_s", "decode_s", "total_s", "total_tok_s", "peak_host_bytes", "peak_gpu_bytes", "load_before")
        return {
            "policy": asdict(self.policy),
            "need": self.runs[0]["need"],
            "predicted_tok_s": self.predicted_tokens_per_s,
            "runs": [{key: r[key] for key in keys} for r in self.runs],
        }

    @property
    def predicted_tokens_per_s(self) -> float:
        first = self.runs[0]
        return float(first["num_prompts"] * first["gen_len"] / first["predicted"]["total_s"])


@dataclass(frozen=True, slots=True)
class Comparison:
    """The search's choice under a limit and the grid's best, run in turn."""

    limit: int
    automatic: Measured | None
    best: Measured | None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Automatic over the grid's best; 1 where they are the same policy."""
        if self.automatic is None or self.best is None:
            return None
        return self.automatic.tokens_per_s / self.best.tokens_per_s


def best_within(measured: Sequence[Measured], tier: str, free: float) -> Measured | None:
    """The fastest of those that are planned to need no more than `free` bytes of the tier."""
    fitting = [m for m in measured if m.need(tier) <= free]
    return max(fitting, key=lambda m: m.tokens_per_s, default=None)


def spread(measured: Sequence[Measured], tier: str, besides: int) -> list[int]:
    """Limits from what the smallest needs to what the largest does, with what a process takes besides its plan."""
    needs = sorted(m.need(tier) for m in measured)
    if not needs:
        return []
    low, high = needs[0] * SPARE + besides, needs[-1] * SPARE + besides
    return [round(low + (high - low) * n / (LIMITS - 1)) for n in range(LIMITS)]


def in_turn(policies: Sequence[Policy], runner: Runner, repeats: int) -> list[Measured]:
    """Every policy `repeats` times, A B A B."""
    runs: dict[int, list[Figures]] = {n: [] for n in range(len(policies))}
    for _ in range(repeats):
        for n, policy in enumerate(policies):
            runs[n].append(runner(policy))
    return [Measured(policy, tuple(runs[n])) for n, policy in enumerate(policies)]


def limited_tier(hardware: Hardware) -> tuple[str, int]:
    """The tier that limits are on, and the bytes of it that a process takes besides its plan."""
    return ("gpu", hardware.context_bytes) if hardware.host_is_apart else ("host", hardware.process_bytes)


def compare(
    limit: int, problem: Problem, hardware: Hardware, measured: Sequence[Measured], runner: Runner, repeats: int
) -> Comparison:
    """Search under the limit, and run what it finds against the grid's best that fits."""
    host_is_apart = hardware.host_is_apart
    limited = hardware.limited(gpu=limit) if host_is_apart else hardware.limited(host=limit)
    tier, besides = limited_tier(hardware)
    best = best_within(measured, tier, limit - besides)
    try:
        policy = search(problem, limited).best.policy
    except PolicyError as error:
        return Comparison(limit, None, best, str(error))
    if best is None:
        (automatic,) = in_turn([policy], runner, repeats)
        return Comparison(limit, automatic, None, "no policy of the grid fits")
    if in_place(policy, host_is_apart=host_is_apart) == in_place(best.policy, host_is_apart=host_is_apart):
        return Comparison(limit, best, best, "the same policy")
    automatic, again = in_turn([policy, best.policy], runner, repeats)
    return Comparison(limit, automatic, again)


# Results


def result_rows(measured: Sequence[Measured], comparisons: Sequence[Comparison]) -> list[Row]:
    found = [Row(f"grid {name(m.policy)}", m.tokens_per_s, "tok/s", details=m.details()) for m in measured]
    for c in comparisons:
        sides = {"automatic": c.automatic, "best": c.best}
        details = {side: m.details() for side, m in sides.items() if m is not None}
        title = f"automatic / best of the grid, limit {c.limit / 1e9:.2f} GB"
        found.append(
            Row(title, c.ratio, "x", note=without_folders(c.note), details={"limit_bytes": c.limit, **details})
        )
    return found


def table(comparisons: Sequence[Comparison]) -> str:
    """Markdown."""
    lines = [
        "| limit GB | automatic | tok/s | predicted | best of the grid | tok/s | automatic / best | |",
        "|---:|---|---:|---:|---|---:|---:|---|",
    ]
    for c in comparisons:
        cells = [f"{c.limit / 1e9:.2f}", *_side(c.automatic)]
        cells.append(f"{c.automatic.predicted_tokens_per_s:.2f}" if c.automatic else "")
        cells += [*_side(c.best), "" if c.ratio is None else f"{c.ratio:.3f}", c.note]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _side(measured: Measured | None) -> tuple[str, str]:
    return (name(measured.policy), f"{measured.tokens_per_s:.2f}") if measured else ("", "")


def make_problem(args: argparse.Namespace) -> Problem:
    """Build the search's problem for the model that is measured."""
    from flexgen_triton.models.family import model_spec
    from flexgen_triton.models.locate import choose_dtype, find_model

    source = find_model(args.model, args.path)
    spec = model_spec(source.config, source.name, choose_dtype(args.dtype, source))
    return Problem(spec, args.prompt_len, args.gen_len, args.num_prompts)


def process_runner(args: argparse.Namespace, hardware: Path) -> Runner:
    """Runs a policy over all prompts in a process of its own, and says what came out."""
    job = Job(
        model=args.model,
        path=args.path,
        policy=Policy(),
        prompt_len=args.prompt_len,
        gen_len=args.gen_len,
        num_prompts=args.num_prompts,
        hardware=str(hardware),
        dtype=args.dtype,
        device=args.device,
        offload_dir=str(args.offload_dir),
    )

    def once(policy: Policy) -> Figures:
        figures = run(replace(job, policy=policy))
        load = figures["load_before"]
        print(f"{name(policy)}: {figures['total_tok_s']:.2f} tok/s, load {load:.1f}", file=sys.stderr, flush=True)
        return figures

    return once


def integers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def sizes_in_bytes(text: str) -> list[int]:
    return [parse_bytes(size) for size in text.split(",") if size]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The automatic policy against a measured grid of policies.")
    parser.add_argument("--model", default="opt-125m", help="a directory, or an OPT size by name")
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--prompt-len", type=int, default=32)
    parser.add_argument("--gen-len", type=int, default=8)
    parser.add_argument("--sizes", type=integers, default=[4, 16, 64], help="GPU batch sizes of the grid")
    parser.add_argument("--batches", type=integers, default=[1, 4], help="numbers of GPU batches of the grid")
    parser.add_argument("--limits", type=sizes_in_bytes, default=[], help="such as 2GB,3GB; default: by the grid")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side in a comparison")
    parser.add_argument("--grid-repeats", type=int, default=1, help="runs of each policy of the grid")
    parser.add_argument("--hardware", type=Path, metavar="FILE", help="a profile; default: measured now")
    parser.add_argument("--dtype", help="default: bfloat16 on a CPU, float16 on a GPU")
    parser.add_argument("--device", help="cuda or cpu; default: a GPU where there is one")
    parser.add_argument("--offload-dir", type=Path, default=OFFLOAD_DIR)
    parser.add_argument("--out", type=Path, metavar="FILE")
    return parser.parse_args(argv)


def complete(args: argparse.Namespace) -> None:
    """Fill in what depends on the machine and on the model."""
    import torch

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ("float16" if args.device == "cuda" else "bfloat16")
    directory = Path(args.model).expanduser()
    args.path = None if directory.is_dir() else "_DUMMY_"
    args.model = str(directory.resolve()) if directory.is_dir() else args.model
    args.offload_dir = args.offload_dir.expanduser()


def main(argv: list[str] | None = None) -> int:
    """0: all was compared; 1: a run failed."""
    args = parse_args(argv)
    complete(args)
    header = make_header()
    out = args.out or results_path("auto_policy", header)
    measured: list[Measured] = []
    comparisons: list[Comparison] = []
    with tempfile.TemporaryDirectory(prefix="auto-policy-") as folder:
        file = args.hardware.resolve() if args.hardware else Path(folder) / "machine.json"
        if not args.hardware:
            measure_machine(file, args.offload_dir)
        hardware = load_profile(file)
        runner = process_runner(args, file)
        asked = {key: getattr(args, key) for key in ("num_prompts", "prompt_len", "gen_len", "dtype", "device")}
        header |= {**asked, "model": without_folders(args.model), "profile": json.loads(file.read_text())}
        problem = make_problem(args)
        try:
            for policy in grid(args.sizes, args.batches, args.num_prompts, host_is_apart=hardware.host_is_apart):
                measured += in_turn([policy], runner, args.grid_repeats)
                write_results(out, result_rows(measured, comparisons), header)
            for limit in args.limits or spread(measured, *limited_tier(hardware)):
                comparisons.append(compare(limit, problem, hardware, measured, runner, args.repeats))
                write_results(out, result_rows(measured, comparisons), header)
        except RunError as error:
            print(f"a run failed: {error}", file=sys.stderr)
            return 1
    print(table(comparisons))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
