"""Planned memory against what runs take, and automatic policies under limits, each in a control group of its own.

    python bench/memory_honesty.py --models demo,opt-125m,opt-1.3b --out FILE.json

First every policy by hand: once to see the process's peak beside its plan, then in a group limited to the plan. Then
automatic policies in groups limited to what they were told they may use: the least that the search says would do, half
as much again, and three times as much.

Planned and peak are of the process: resident pages, those of mapped libraries included. The group's limit counts these
and, beside them, pages of files that the kernel keeps for later; it drops such pages before it kills anybody.
Models other than the demo get random weights, made once in the offload directory.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from limits import LimitedRun, end_on_sigterm, parse_bytes, run_limited
from rows import ROOT, Row, make_header, results_path, write_results

sys.path.insert(0, str(ROOT))

from predictions import OFFLOAD_DIR, policy_from

from flexgen_triton.plan.policy import Policy

MIB = 1 << 20
SPARE = 1.15  # planned over peak, at most
POLICIES = {
    "resident": Policy(8, 1),
    "half on disk": Policy(8, 1, 50, 0),
    "all on disk": Policy(8, 1, 0, 0, 0, 0, 0, 0),
    "cache on disk": Policy(16, 1, 100, 0, 0, 0, 100, 0),
    "4-bit weights": Policy(8, 1, compress_weight=True),
    "4-bit both": Policy(8, 1, compress_weight=True, compress_cache=True),
    "8 GPU batches": Policy(4, 8, 50, 0, 100, 0, 100, 0),
}
LOOSER = {"tight": 1.0, "middle": 1.5, "loose": 3.0}  # times the least that would do


@dataclass(frozen=True, slots=True)
class Job:
    """One run in a process of its own. Without a policy it is automatic, within `cpu_memory` bytes."""

    model: str
    policy: Policy | None
    cpu_memory: int | None
    prompt_len: int
    gen_len: int
    num_prompts: int  # of an automatic policy; others get a round
    offload_dir: str
    dtype: str

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        fields = json.loads(text)
        return cls(**{**fields, "policy": policy_from(fields["policy"]) if fields["policy"] else None})


def work(job: Job) -> dict[str, Any]:
    """Load, generate one round (or `num_prompts` prompts), and give what was planned and taken."""
    from flexgen_triton import LLM, SamplingParams
    from flexgen_triton.commands.bench import measure, random_prompts
    from flexgen_triton.machine.auto import choose
    from flexgen_triton.memory.arena import peak_rss

    with LLM(
        job.model,
        path=None if job.model == "demo" else "_DUMMY_",
        policy=job.policy or "auto",
        cpu_memory=job.cpu_memory,
        dtype=job.dtype,
        device="cpu",
        offload_dir=job.offload_dir,
    ) as llm:
        count = job.policy.round_size if job.policy else job.num_prompts
        prompts = random_prompts(count, job.prompt_len, llm.spec.vocab, 0)
        params = SamplingParams(max_tokens=job.gen_len, ignore_eos=True, temperature=0)
        if job.policy is None:
            llm.use(choose(llm.problem([job.prompt_len], job.gen_len, count), llm.hardware).policy)
        before = peak_rss()
        found = measure(llm, prompts, params, gen_len=job.gen_len)
        keep = ("policy", "peak_host_bytes", "planned_host_bytes", "total_s")
        return {**{k: found[k] for k in keep}, "peak_before_bytes": before}


def worker(job_file: Path, out: Path) -> int:
    """Write what came of the job; 1 and a sentence where it was refused."""
    try:
        out.write_text(json.dumps(work(Job.from_json(job_file.read_text()))))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def run(job: Job, limit: int | None) -> tuple[LimitedRun, dict[str, Any]]:
    """The run in a group, and what its process wrote; nothing where it did not come so far."""
    with tempfile.TemporaryDirectory(prefix="honesty-") as folder:
        job_file, out = Path(folder) / "job.json", Path(folder) / "out.json"
        job_file.write_text(job.to_json())
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", str(job_file), "--out", str(out)]
        ended = run_limited(command, limit, timeout_s=1800)
        return ended, json.loads(out.read_text()) if out.exists() else {}


@dataclass(frozen=True, slots=True)
class Case:
    """The bytes a run was allowed, and took. `limit`: of its group; `planned` and `peak`: of the process."""

    name: str
    limit: int
    planned: int | None
    peak: int | None
    group_peak: int | None
    outcome: str  # "ok", or why it ended
    policy: str = ""

    @property
    def holds(self) -> bool:
        return self.outcome == "ok" and self.peak is not None and self.planned is not None and self.peak <= self.planned

    @property
    def ratio(self) -> float | None:
        return self.planned / self.peak if self.planned and self.peak else None


def outcome(ended: LimitedRun) -> str:
    if ended.oom_killed:
        return "killed for memory"
    if ended.returncode:
        return (ended.stderr.strip() or f"exit code {ended.returncode}").splitlines()[-1]
    return "ok"


def by_hand(model: str, policies: Sequence[str], args: argparse.Namespace) -> Iterator[Case]:
    """Every policy: its peak without a limit, and whether it runs in a group limited to its plan."""
    for name in policies:
        job = _job(model, POLICIES[name], None, args)
        ended, found = run(job, None)
        case = Case(f"{model}, {name}", 0, None, None, ended.peak_bytes, outcome(ended))
        if found:
            planned, peak = found["planned_host_bytes"], found["peak_host_bytes"]
            limited, _ = run(job, planned)
            case = Case(case.name, planned, planned, peak, limited.peak_bytes, outcome(limited))
        yield case


def automatic(model: str, args: argparse.Namespace) -> Iterator[Case]:
    """Automatic policies in groups limited to what they may use."""
    refused, _ = run(_job(model, None, MIB, args), None)
    least = re.search(r"--cpu-mem (\S+) would do", refused.stderr)
    if not least:
        yield Case(f"{model}, automatic", MIB, None, None, None, f"named no limit that would do: {outcome(refused)}")
        return
    for name, times in LOOSER.items():
        limit = int(parse_bytes(least[1]) * times)
        ended, found = run(_job(model, None, limit, args), limit)
        peak = max(found["peak_host_bytes"], found["peak_before_bytes"]) if found else None
        yield Case(
            f"{model}, automatic, {name}",
            limit,
            found.get("planned_host_bytes"),
            peak,
            ended.peak_bytes,
            outcome(ended) if peak is None or peak <= limit else f"peak {peak} over the limit",
            policy=_shares(found["policy"]) if found else "",
        )


def _shares(policy: dict[str, Any]) -> str:
    percents = (f"{policy[f'{kind}_{at}_percent']:g}" for kind in ("w", "cache", "act") for at in ("gpu", "cpu"))
    return f"{policy['gpu_batch_size']}x{policy['num_gpu_batches']}: {' '.join(percents)}"


def _job(model: str, policy: Policy | None, cpu_memory: int | None, args: argparse.Namespace) -> Job:
    dtype = "auto" if model == "demo" else args.dtype
    return Job(model, policy, cpu_memory, args.prompt_len, args.gen_len, args.num_prompts, str(args.offload_dir), dtype)


def row(case: Case) -> Row:
    """Planned over peak; no value where it did not run."""
    note = "" if case.holds else case.outcome if case.outcome != "ok" else "peak over the plan"
    value = case.ratio if case.outcome == "ok" else None
    return Row(case.name, value, "planned / peak", "lower", note=note, details=asdict(case))


def table(cases: Sequence[Case]) -> str:
    """Markdown."""
    lines = [
        "| | planned MiB | peak MiB | planned / peak | limit MiB | peak of the group | |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for c in cases:
        planned, peak, limit, group = (
            f"{n / MIB:.0f}" if n else "" for n in (c.planned, c.peak, c.limit, c.group_peak)
        )
        ratio = f"{c.ratio:.3f}" if c.ratio else ""
        lines.append(f"| {c.name} | {planned} | {peak} | {ratio} | {limit} | {group} | {c.outcome} {c.policy} |")
    return "\n".join(lines)


def verdict(cases: Sequence[Case]) -> str:
    held = sum(c.holds for c in cases)
    close = sum(c.ratio is not None and c.ratio <= SPARE for c in cases)
    return f"{held} of {len(cases)} ran within plan and limit; {close} planned at most {SPARE} times the peak"


def main(argv: list[str] | None = None) -> int:
    """0: every run stayed within its plan and its limit; 1: one did not."""
    parser = argparse.ArgumentParser(description="Planned memory against what runs take, under memory limits.")
    parser.add_argument("--models", default="demo,opt-125m,opt-1.3b", metavar="NAME,...")
    parser.add_argument("--policies", default=",".join((*POLICIES, "automatic")), metavar="NAME,...")
    parser.add_argument("--prompt-len", type=int, default=64)
    parser.add_argument("--gen-len", type=int, default=16)
    parser.add_argument("--num-prompts", type=int, default=64, help="of automatic policies")
    parser.add_argument("--dtype", default="bfloat16", help="of the models with random weights")
    parser.add_argument("--offload-dir", type=Path, default=OFFLOAD_DIR)
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        return worker(args.worker, args.out)
    end_on_sigterm()
    args.offload_dir = args.offload_dir.expanduser()
    header, cases = make_header(), []
    names = args.policies.split(",")
    for model in args.models.split(","):
        for case in _cases(model, names, args):
            cases.append(case)
            print(table([case]).splitlines()[-1], file=sys.stderr, flush=True)
            write_results(args.out or results_path("memory", header), [row(c) for c in cases], header)
    print(table(cases))
    print(f"\n{verdict(cases)}")
    return int(not all(c.holds for c in cases))


def _cases(model: str, names: Sequence[str], args: argparse.Namespace) -> Iterator[Case]:
    yield from by_hand(model, [n for n in names if n != "automatic"], args)
    if "automatic" in names:
        yield from automatic(model, args)


if __name__ == "__main__":
    raise SystemExit(main())
