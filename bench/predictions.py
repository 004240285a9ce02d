"""Predicted against measured: how long a plan takes and what memory it needs, on the machine this runs on.

    python bench/predictions.py --models opt-1.3b=DIRECTORY --out FILE.json
    python bench/predictions.py --cases 1.3b-disk,1.3b-4bit --repeat 1 --hardware PROFILE.json

Models without a directory get random weights, which are made once in the offload directory. The machine is measured
three times at the start, and all is predicted from the median. Every run is a process of its own, so that its peak of
memory is its own. Results are written after every case, to
bench/results/<machine>/predictions-<commit>.json unless `--out` says where; a Markdown table goes to standard output.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from prediction_cases import CPU_CASES, GPU_CASES, Case
from rows import ROOT, Row, make_header, results_path, without_folders, write_results

sys.path.insert(0, str(ROOT))

from flexgen_triton.plan.hardware import Hardware, median_of
from flexgen_triton.plan.placement import Tier
from flexgen_triton.plan.policy import CompressionConfig, Policy

WITHIN = 0.15  # of the measured time a prediction should be
MEASUREMENTS = 3  # of the machine, before the first run; predictions are made from their median
SPARE = 0.10  # planned memory may exceed the peak by this share, and must not fall short
OFFLOAD_DIR = Path("~/.cache/flexgen_triton")


class RunError(RuntimeError):
    """A run that ended without figures; the message is the last it said."""


# A run in a process of its own


@dataclass(frozen=True, slots=True)
class Job:
    """A worker's orders. `num_prompts` None: one round of the policy. `hardware`: a profile to predict with."""

    model: str
    policy: Policy
    prompt_len: int
    gen_len: int
    path: str | None = None
    num_prompts: int | None = None
    hardware: str | None = None
    dtype: str = "auto"
    device: str | None = None
    offload_dir: str = str(OFFLOAD_DIR)
    seed: int = 0

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        fields = json.loads(text)
        return cls(**{**fields, "policy": policy_from(fields["policy"])})


def policy_from(fields: Mapping[str, Any]) -> Policy:
    """The policy of which `asdict` made these fields."""
    configs = {n: CompressionConfig(**fields[n]) for n in ("comp_weight_config", "comp_cache_config")}
    return Policy(**{**fields, **configs})


def run(job: Job) -> dict[str, Any]:
    """The figures of a run in a fresh process, with the load average before it; raises RunError."""
    with tempfile.TemporaryDirectory(prefix="predictions-") as folder:
        job_file, out = Path(folder) / "job.json", Path(folder) / "out.json"
        job_file.write_text(job.to_json())
        load = os.getloadavg()[0]
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", str(job_file), "--out", str(out)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode or not out.exists():
            raise RunError((done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1])
        return {**json.loads(out.read_text()), "load_before": load}


def work(job_file: Path, out: Path) -> None:
    """The worker: loads the model, generates once, and writes what was measured and predicted."""
    from flexgen_triton import LLM, SamplingParams
    from flexgen_triton.commands.bench import measure, random_prompts
    from flexgen_triton.plan.fit import need
    from flexgen_triton.plan.hardware import load_profile

    job = Job.from_json(job_file.read_text())
    hardware = load_profile(job.hardware) if job.hardware else None
    with LLM(
        job.model,
        path=job.path,
        policy=job.policy,
        dtype=job.dtype,
        device=job.device,
        offload_dir=Path(job.offload_dir).expanduser(),
        seed=job.seed,
    ) as llm:
        prompts = random_prompts(job.num_prompts or job.policy.round_size, job.prompt_len, llm.spec.vocab, job.seed)
        params = SamplingParams(max_tokens=job.gen_len, ignore_eos=True, temperature=0)
        figures = measure(llm, prompts, params, gen_len=job.gen_len, hardware=hardware)
        assert llm.last_report is not None
        plans = llm.last_report.plans
        needs = [{tier.value: nbytes for tier, nbytes in need(plan).items()} for plan in plans]
        figures |= {
            "need": {tier: max(n[tier] for n in needs) for tier in needs[0]},
            "planned_gpu_bytes": max(p.footprint.total(Tier.GPU) for p in plans) if llm.engine.host_is_apart else 0,
        }
    del figures["outputs"]
    out.write_text(json.dumps(figures))


def measure_machine(file: Path, offload_dir: Path, *, quick: bool = False) -> None:
    """Write this machine's profile as it is now, measured in a process of its own."""
    command = [sys.executable, "-m", "flexgen_triton", "measure", "--output", str(file)]
    command += ["--offload-dir", str(offload_dir), *(["--quick"] if quick else [])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"measuring the machine failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")


# Figures


@dataclass(frozen=True, slots=True)
class Outcome:
    """The runs of a case, and why there are none where one failed."""

    case: Case
    runs: tuple[dict[str, Any], ...] = ()
    error: str = ""

    def measured(self, key: str) -> float:
        """The median over the runs."""
        return float(median(r[key] for r in self.runs))

    def predicted(self, key: str) -> float:
        return float(self.runs[0]["predicted"][key])

    def ratio(self, key: str) -> float | None:
        """Predicted over measured; None where nothing was measured."""
        measured = self.measured(key) if self.runs else 0.0
        return self.predicted(key) / measured if measured else None

    @property
    def memory_ratio(self) -> float | None:
        """Planned over peak host bytes of the run that came nearest to its plan, or went furthest over it."""
        return min((r["planned_host_bytes"] / r["peak_host_bytes"] for r in self.runs), default=None)

    @property
    def is_close(self) -> bool:
        ratio = self.ratio("total_s")
        return ratio is not None and abs(ratio - 1) <= WITHIN

    @property
    def is_within_plan(self) -> bool:
        ratio = self.memory_ratio
        return ratio is not None and 1 <= ratio <= 1 + SPARE


def lane_ratios(run: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Predicted over measured busy seconds, by phase and lane, of lanes that were busy for a tenth of the phase."""
    found: dict[str, dict[str, float]] = {}
    for phase, lanes in run["lanes"].items():
        predicted = run["predicted"]["lanes"].get(phase, {})
        least = 0.1 * run[f"{phase}_s"]
        found[phase] = {
            lane: predicted.get(lane, {}).get("busy_s", 0.0) / use["busy_s"]
            for lane, use in lanes.items()
            if use["busy_s"] > least
        }
    return found


KEPT = (
    "prefill_s", "decode_s", "total_s", "total_tok_s", "makespan_s", "bound_s", "planned_host_bytes", "peak_host_bytes",
    "planned_gpu_bytes", "peak_gpu_bytes", "load_before",
)  # fmt: skip


def row(outcome: Outcome) -> Row:
    """A case's row: how far its prediction is off, as a share of the time measured."""
    case, ratio = outcome.case, outcome.ratio("total_s") if outcome.runs else None
    details: dict[str, Any] = {
        "model": case.model,
        "policy": asdict(case.policy),
        "prompt_len": case.prompt_len,
        "gen_len": case.gen_len,
    }
    if outcome.runs:
        keys = ("prefill_s", "decode_s", "total_s")
        details |= {
            "ratio": {key: outcome.ratio(key) for key in keys},
            "memory_ratio": outcome.memory_ratio,
            "measured": {key: outcome.measured(key) for key in keys},
            "predicted": outcome.runs[0]["predicted"],
            "runs": [
                {**{k: r[k] for k in KEPT}, "lanes": _busy(r["lanes"]), "lane_ratios": lane_ratios(r)}
                for r in outcome.runs
            ],
        }
    error = None if ratio is None else abs(ratio - 1)
    note = without_folders(outcome.error)
    return Row(f"{case.name}: prediction off by", error, "share", better="lower", note=note, details=details)


def _busy(lanes: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    return {phase: {lane: use["busy_s"] for lane, use in uses.items()} for phase, uses in lanes.items()}


def table(outcomes: Iterable[Outcome]) -> str:
    """Markdown: seconds and ratios (predicted over measured) of every case, and memory (planned over peak)."""
    headings = ["", "predicted s", "measured s", "ratio", "prefill", "decode"]
    headings += ["planned GB", "peak GB", "planned / peak", "load"]
    lines = ["| " + " | ".join(headings) + " |", "|---|" + "---:|" * (len(headings) - 1)]
    for outcome in outcomes:
        cells = [outcome.error] + [""] * (len(headings) - 2) if not outcome.runs else _cells(outcome)
        lines.append("| " + " | ".join([outcome.case.name, *cells]) + " |")
    return "\n".join(lines)


def _cells(outcome: Outcome) -> list[str]:
    ratios = [outcome.ratio(key) for key in ("total_s", "prefill_s", "decode_s")]
    gigabytes = [outcome.measured(key) / 1e9 for key in ("planned_host_bytes", "peak_host_bytes")]
    return [
        f"{outcome.predicted('total_s'):.2f}",
        f"{outcome.measured('total_s'):.2f}",
        *("" if r is None else f"{r:.2f}" for r in ratios),
        *(f"{g:.2f}" for g in gigabytes),
        f"{outcome.memory_ratio:.3f}",
        f"{max(r['load_before'] for r in outcome.runs):.1f}",
    ]


def verdict(outcomes: Sequence[Outcome]) -> str:
    """Count the predictions that hold, in a sentence."""
    ran = [o for o in outcomes if o.runs]
    close, within = sum(o.is_close for o in ran), sum(o.is_within_plan for o in ran)
    over = [o.case.name for o in ran if o.memory_ratio is not None and o.memory_ratio < 1]
    text = (
        f"{close} of {len(ran)} times within {WITHIN:.0%}; {within} of {len(ran)} needs of memory within {SPARE:.0%} "
        f"above the peak, {len(over)} below it"
    )
    return (
        text
        + (f" ({', '.join(over)})" if over else "")
        + (f"; {len(outcomes) - len(ran)} cases failed" * (len(ran) < len(outcomes)))
    )


# All cases


def profile(folder: Path, args: argparse.Namespace) -> tuple[Path, list[dict[str, Any]]]:
    """The profile that every case is predicted from, before any runs, and what was measured for it."""
    if args.hardware:
        return args.hardware, []
    measured = []
    for number in range(MEASUREMENTS):
        file = folder / f"machine-{number}.json"
        measure_machine(file, args.offload_dir, quick=args.quick)
        measured.append(json.loads(file.read_text()))
    middle = folder / "machine.json"
    middle.write_text(median_of([Hardware.from_json(json.dumps(m)) for m in measured]).to_json())
    return middle, measured


def run_case(case: Case, hardware: Path, args: argparse.Namespace) -> Outcome:
    """All runs of a case; one that fails ends it."""
    directory = args.models.get(case.model)
    job = Job(
        model=str(directory or case.model),
        path=None if directory else "_DUMMY_",
        policy=case.policy,
        prompt_len=case.prompt_len,
        gen_len=case.gen_len,
        hardware=str(hardware.resolve()),
        dtype=args.dtype,
        device=args.device,
        offload_dir=str(args.offload_dir),
    )
    runs: list[dict[str, Any]] = []
    try:
        for _ in range(args.repeat):
            runs.append(run(job))
            said = runs[-1]
            seconds = f"{said['total_s']:.2f} s, predicted {said['predicted']['total_s']:.2f}"
            print(f"{case.name}: {seconds}, load {said['load_before']:.1f}", file=sys.stderr, flush=True)
    except RunError as error:
        print(f"{case.name}: {error}", file=sys.stderr, flush=True)
        return Outcome(case, error=str(error))
    return Outcome(case, tuple(runs))


def chosen(cases: Sequence[Case], names: str) -> list[Case]:
    """The cases of these names, between commas; all without any. Raises ValueError for one that is not there."""
    wanted = [n for n in names.split(",") if n]
    by_name = {c.name: c for c in cases}
    unknown = [n for n in wanted if n not in by_name]
    if unknown:
        raise ValueError(f"there is no case {', '.join(unknown)}; there are {', '.join(by_name)}")
    return [by_name[n] for n in wanted] if wanted else list(cases)


def models(text: list[str]) -> dict[str, Path]:
    """Directories by model from NAME=DIRECTORY; raises ValueError for anything else."""
    pairs = [t.partition("=") for t in text]
    wrong = [t for t, (name, _, directory) in zip(text, pairs, strict=True) if not name or not directory]
    if wrong:
        raise ValueError(f"--models {wrong[0]!r} is not NAME=DIRECTORY, such as opt-1.3b=/models/opt-1.3b")
    return {name: Path(directory).expanduser().resolve() for name, _, directory in pairs}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Predicted against measured times and memory on this machine.")
    parser.add_argument("--cases", default="", metavar="NAME,...", help="default: all")
    parser.add_argument("--models", action="append", default=[], metavar="NAME=DIR", help="repeatable")
    parser.add_argument("--repeat", type=int, default=3, help="runs of a case")
    parser.add_argument("--hardware", type=Path, metavar="FILE", help="a profile; default: measured at the start")
    parser.add_argument("--quick", action="store_true", help="measure the machine in seconds, coarsely")
    parser.add_argument("--dtype", help="default: bfloat16 on a CPU, float16 on a GPU")
    parser.add_argument("--device", help="cuda or cpu; default: a GPU where there is one")
    parser.add_argument("--offload-dir", type=Path, default=OFFLOAD_DIR)
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def complete(args: argparse.Namespace) -> list[Case]:
    """Fill in what depends on the machine, and give the cases."""
    import torch

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ("float16" if args.device == "cuda" else "bfloat16")
    args.offload_dir = args.offload_dir.expanduser()
    args.models = models(args.models)
    return chosen(GPU_CASES if args.device == "cuda" else CPU_CASES, args.cases)


def main(argv: list[str] | None = None) -> int:
    """0: every case ran; 1: one failed; 2: the command line is wrong."""
    args = parse_args(argv)
    if args.worker:
        work(args.worker, args.out)
        return 0
    try:
        cases = complete(args)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    header = make_header()
    out = args.out or results_path("predictions", header)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="predictions-") as folder:
        hardware, measured = profile(Path(folder), args)
        shared = {"device": args.device, "dtype": args.dtype, "profiles": measured}
        for case in cases:
            outcomes.append(run_case(case, hardware, args))
            write_results(out, [row(o) for o in outcomes], header | shared)
    print(table(outcomes))
    print(f"\n{verdict(outcomes)}")
    return 1 if any(o.error for o in outcomes) else 0


if __name__ == "__main__":
    raise SystemExit(main())
