"""Run a peer and us on the same model, prompts and memory limit, in turn, and print the ratio.

    python bench/peers.py --model DIR --prompt-len 8 --gen-len 32 --memory 1600MB --batches 64,128 \\
        --ours "64x1:0 0 0 100 0 100" --ours "64x4:0 0 0 100 0 100:--sep-layer 0" --repeat 3 --out FILE.json

Every run is a fresh process under bench/limits.py with the model's pages dropped from the page cache. Speed is
FlexGen's: generated tokens / (prefill + decode). Start is all the rest of the process's time: imports, loading, any
conversion. A run that is killed for memory is a result.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import Any

from limits import TIMED_OUT, LimitedRun, drop_page_cache, end_on_sigterm, parse_bytes, run_limited
from report import plain_table
from rows import ROOT, Row, make_header, portable, results_path, without_folders, write_results

OURS = "flexgen_triton"
OUT_OF_MEMORY = "killed for memory"


@dataclass(frozen=True, slots=True)
class Case:
    """One side with its settings: a command that writes its figures to the JSON file it is given."""

    side: str
    name: str
    sequences: int  # that are generated together
    command: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Figures:
    """One run of a case: seconds, bytes and tokens per second; None where it did not come so far."""

    outcome: str  # "ok", "killed for memory" or why it failed
    total_tok_s: float | None = None
    prefill_s: float | None = None
    decode_s: float | None = None
    start_s: float | None = None
    peak_bytes: int | None = None  # of the group: process and page cache
    peak_gpu_bytes: int | None = None
    peak_host_bytes: int | None = None  # as the side itself says
    makespan_s: float | None = None
    bound_s: float | None = None
    limited: bool = False
    load_before: float | None = None  # the machine's load average: over 1 or so, others were computing too

    @property
    def overlap(self) -> float | None:
        """Makespan / bound: 1 is a run as fast as its busiest lane."""
        return self.makespan_s / self.bound_s if self.makespan_s and self.bound_s else None


def ours_case(text: str, args: argparse.Namespace, scratch: Path) -> Case:
    """A case of ours from `BxK:six percentages[:extra flags]`; raises ValueError for anything else."""
    shape, _, rest = text.partition(":")
    percent, _, extra = rest.partition(":")
    try:
        batch, num_batches = (int(n) for n in re.split("[x\u00d7]", shape))
        percentages = [str(int(p)) for p in percent.split()]
    except ValueError:
        percentages = []
    if len(percentages) != 6:
        raise ValueError(f'--ours {text!r} is not "BxK:six percentages[:extra flags]", such as "64x2:0 0 0 100 0 100"')
    command = [sys.executable, "-m", "flexgen_triton.bench", "--model", str(args.model)]
    command += ["--prompt-len", str(args.prompt_len), "--gen-len", str(args.gen_len), "--seed", str(args.seed)]
    command += ["--gpu-batch-size", str(batch), "--num-gpu-batches", str(num_batches), "--percent", *percentages]
    command += ["--offload-dir", str(scratch / "ours"), "--no-log", *shlex.split(extra)]
    name = " ".join([OURS, f"{batch}x{num_batches}", *percentages, without_folders(extra)]).strip()
    return Case(OURS, name, batch * num_batches, tuple(command))


def peer_case(batch: int, args: argparse.Namespace, scratch: Path) -> Case:
    """The peer at one batch: this script again, as a worker."""
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", args.peer, "--model", str(args.model)]
    command += ["--prompt-len", str(args.prompt_len), "--gen-len", str(args.gen_len), "--seed", str(args.seed)]
    command += ["--batches", str(batch), "--scratch", str(scratch / "peer"), "--peer-map", args.peer_map]
    for flag, value in (("--peer-gpu-memory", args.peer_gpu_memory), ("--peer-cpu-memory", args.peer_cpu_memory)):
        command += [flag, value] if value else []
    return Case(args.peer, f"{args.peer} {batch}", batch, tuple(command))


def in_turn(peers: list[Case], ours: list[Case], repeat: int) -> Iterator[Case]:
    """A B A B: the sides take turns, and every repetition goes through all cases."""
    for _ in range(repeat):
        for pair in zip_longest(peers, ours):
            yield from (case for case in pair if case is not None)


def run_case(case: Case, args: argparse.Namespace, scratch: Path) -> Figures:
    """Runs a case once in a fresh process, cold, under the memory limit."""
    for path in (args.model, scratch):
        drop_page_cache(path)
    result = scratch / "result.json"
    result.unlink(missing_ok=True)
    load_before = os.getloadavg()[0]
    run = run_limited([*case.command, "--json", str(result)], args.memory, args.timeout)
    figures = figures_of(run, json.loads(result.read_text()) if result.exists() else None)
    return replace(figures, load_before=load_before)


def figures_of(run: LimitedRun, result: dict[str, Any] | None) -> Figures:
    """A run's figures from how its process ended and the JSON it wrote."""
    if run.returncode != 0 or result is None:
        return Figures(outcome_of(run), peak_bytes=run.peak_bytes, limited=run.limited)
    return Figures(
        outcome="ok",
        total_tok_s=result["total_tok_s"],
        prefill_s=result["prefill_s"],
        decode_s=result["decode_s"],
        start_s=run.seconds - result["total_s"],
        peak_bytes=run.peak_bytes,
        peak_gpu_bytes=result.get("peak_gpu_bytes"),
        peak_host_bytes=result.get("peak_host_bytes"),
        makespan_s=result.get("makespan_s"),
        bound_s=result.get("bound_s"),
        limited=run.limited,
    )


def outcome_of(run: LimitedRun) -> str:
    """Say in a few words why a run gave no figures."""
    if run.oom_killed:
        return OUT_OF_MEMORY
    if run.returncode == TIMED_OUT:
        return f"timed out after {run.seconds:.0f} s"
    if "OutOfMemoryError" in run.stderr:
        return "out of GPU memory"
    last = (run.stderr.strip() or run.stdout.strip() or "no output").splitlines()[-1]
    return f"exit code {run.returncode}: {without_folders(last)[:200]}"


def speed(runs: list[Figures]) -> float | None:
    """The median speed of a case, None unless every run of it ended well."""
    speeds = [run.total_tok_s for run in runs if run.total_tok_s is not None]
    return median(speeds) if len(speeds) == len(runs) > 0 else None


def ratios(results: dict[Case, list[Figures]]) -> list[Row]:
    """Our speed / the peer's: at every batch that both ran, and each at its own best."""
    best: dict[str, dict[int, float]] = {"ours": {}, "peer": {}}
    for case, runs in results.items():
        side = best["ours" if case.side == OURS else "peer"]
        side[case.sequences] = max(side.get(case.sequences, 0.0), speed(runs) or 0.0)
    rows = [
        _ratio_row(f"ratio at the same batch of {n}", best["ours"][n], peer_speed)
        for n, peer_speed in sorted(best["peer"].items())
        if n in best["ours"]
    ]
    if all(best.values()):
        rows.append(_ratio_row("ratio, each at its best", *(max(best[side].values()) for side in ("ours", "peer"))))
    return rows


def _ratio_row(name: str, ours: float, peer: float) -> Row:
    if ours and peer:
        return Row(name, ours / peer, "x")
    missing = " and ".join([OURS] * (not ours) + ["the peer"] * (not peer))
    return Row(name, None, "x", note=f"{missing} did not finish")


def case_rows(results: dict[Case, list[Figures]]) -> Iterator[Row]:
    """Each case's median speed, and for ours how near it came to its bound."""
    for case, runs in results.items():
        note = next((run.outcome for run in runs if run.outcome != "ok"), "")
        details = {
            "sequences": case.sequences,
            "command": portable(list(case.command)),
            "runs": [asdict(r) for r in runs],
        }
        yield Row(case.name, speed(runs), "tok/s", note=note, details=details)
        overlaps = [run.overlap for run in runs if run.overlap is not None]
        if overlaps:
            yield Row(f"{case.name}: makespan / bound", median(overlaps), "x", better="lower")


def runs_table(results: dict[Case, list[Figures]]) -> str:
    """Every run of every case, as plain text."""
    lines = [["", "tok/s", "prefill s", "decode s", "start s", "peak GB", "makespan / bound", "load before", "outcome"]]
    for case, runs in results.items():
        for run in runs:
            peak = "" if run.peak_bytes is None else f"{run.peak_bytes / 1e9:.2f}"
            numbers = (run.total_tok_s, run.prefill_s, run.decode_s, run.start_s)
            cells = ["" if number is None else f"{number:.2f}" for number in numbers]
            overlap = "" if run.overlap is None else f"{run.overlap:.3f}"
            load = "" if run.load_before is None else f"{run.load_before:.1f}"
            lines.append([case.name, *cells, peak, overlap, load, run.outcome])
    return plain_table(lines)


def accelerate_worker(args: argparse.Namespace) -> dict[str, Any]:
    """Hugging Face Accelerate: layers where its device map puts them, by default all on disk, on a GPU as they fit."""
    import torch
    from transformers import AutoModelForCausalLM

    use_gpu = torch.cuda.is_available()
    disk = args.peer_map == "disk" or (args.peer_map == "default" and not use_gpu)
    limits = {0: args.peer_gpu_memory, "cpu": args.peer_cpu_memory}
    model: Any = AutoModelForCausalLM.from_pretrained(
        args.model,
        dtype="auto",
        device_map={"": "disk"} if disk else "auto",
        max_memory=None if disk else {device: size for device, size in limits.items() if size} or None,
        offload_folder=str(args.scratch),
    )
    device = torch.device("cuda", 0) if use_gpu else torch.device("cpu")
    ids = random_prompts(model.config.vocab_size, int(args.batches), args.prompt_len, args.seed).to(device)
    first_token_at: list[float] = []

    def note_first_token(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not first_token_at:
            if use_gpu:
                torch.cuda.synchronize()
            first_token_at.append(time.perf_counter())
        return scores

    start = time.perf_counter()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=args.gen_len,
        min_new_tokens=args.gen_len,
        do_sample=False,
        logits_processor=[note_first_token],
    )
    tokens = out.cpu()  # waits for the GPU
    end = time.perf_counter()
    assert tokens.shape == (ids.shape[0], args.prompt_len + args.gen_len), tokens.shape
    peak_gpu = torch.cuda.max_memory_allocated() if use_gpu else 0
    return {"prefill_s": first_token_at[0] - start, "total_s": end - start, "peak_gpu_bytes": peak_gpu}


def random_prompts(vocab: int, num_prompts: int, prompt_len: int, seed: int) -> Any:
    """Uniform random token ids, special tokens left out.  # [num_prompts, prompt_len] int64"""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, vocab, (num_prompts, prompt_len), generator=generator)


WORKERS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {"accelerate": accelerate_worker}


def work(args: argparse.Namespace) -> None:
    """The worker process: generates once with a peer and writes its figures, with the engine's keys."""
    args.scratch.mkdir(parents=True, exist_ok=True)
    result = WORKERS[args.worker](args)
    tokens = int(args.batches) * args.gen_len
    result |= {"decode_s": result["total_s"] - result["prefill_s"], "total_tok_s": tokens / result["total_s"]}
    args.json.write_text(json.dumps(result))


def warm_imports() -> None:
    """Brings the libraries' files into the page cache outside any group, so that no run is charged for them."""
    code = "import torch, transformers, accelerate"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def compare(args: argparse.Namespace) -> dict[Case, list[Figures]]:
    """Runs all cases in turn, saying each run's outcome as it ends."""
    with tempfile.TemporaryDirectory(prefix="peers-", dir=args.scratch or args.model.resolve().parent) as folder:
        scratch = Path(folder)
        peers = [peer_case(int(batch), args, scratch) for batch in args.batches.split(",") if batch]
        ours = [ours_case(text, args, scratch) for text in args.ours]
        results: dict[Case, list[Figures]] = {case: [] for case in [*peers, *ours]}
        if args.memory:
            warm_imports()
        for case in in_turn(peers, ours, args.repeat):
            figures = run_case(case, args, scratch)
            results[case].append(figures)
            rate = "" if figures.total_tok_s is None else f", {figures.total_tok_s:.2f} tok/s"
            print(f"{case.name}: {figures.outcome}{rate}", file=sys.stderr, flush=True)
        return results


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A peer and us on the same model, prompts and memory limit, in turn.")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    parser.add_argument("--prompt-len", type=int, default=8)
    parser.add_argument("--gen-len", type=int, default=32)
    parser.add_argument("--memory", type=parse_bytes, help="such as 1600MB: process and page cache")
    parser.add_argument("--peer", choices=WORKERS, default="accelerate")
    parser.add_argument("--batches", default="", help="the peer's batches, such as 64,128")
    parser.add_argument("--peer-map", choices=("default", "disk", "auto"), default="default", help="its device map")
    parser.add_argument("--peer-gpu-memory", metavar="SIZE", help="its max_memory for GPU 0, such as 10GiB")
    parser.add_argument("--peer-cpu-memory", metavar="SIZE", help="its max_memory for the host, such as 30GiB")
    parser.add_argument("--ours", action="append", default=[], metavar="BxK:PERCENT[:FLAGS]", help="repeatable")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=3600, help="seconds a run")
    parser.add_argument("--scratch", type=Path, help="for offloaded files; default: beside the model")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: bench/results/<machine>/peers-<commit>.json")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """0: every run ended well or was killed for memory; 1: one failed otherwise; 2: the command line is wrong."""
    args = parse_args(argv)
    if args.worker:
        work(args)
        return 0
    end_on_sigterm()
    try:
        results = compare(args)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    rows = ratios(results)
    print(runs_table(results))
    for row in rows:
        print(f"{row.name}: {row.note or f'{row.value:.2f}'}")
    header = make_header()
    header |= {"prompt_len": args.prompt_len, "gen_len": args.gen_len, "memory_limit_bytes": args.memory}
    write_results(args.out or results_path("peers", header), [*case_rows(results), *rows], header)
    unplanned = {run.outcome for runs in results.values() for run in runs} - {"ok", OUT_OF_MEMORY, "out of GPU memory"}
    return 1 if unplanned else 0


if __name__ == "__main__":
    raise SystemExit(main())
