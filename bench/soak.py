"""Test that memory stays flat: streams and calls of every kind, for as long as is asked, in one process.

    python bench/soak.py --seconds 3600 --out FILE.json --plot FILE.png

Random prompts, lengths, sampling settings, logprobs, stop strings, streams that are left half way, requests that are
refused, and the policy changed now and then. Every `--every` seconds a row is written of what the process holds;
`--objects` adds what Python and glibc hold of it. The last line is the slope of its anonymous memory over the second
half. Results go to bench/results/<machine>/soak-<commit>.json unless `--out` says where.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import random
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import linear_regression
from typing import Any

from rows import ROOT, Row, make_header, results_path, write_results

sys.path.insert(0, str(ROOT))

from flexgen_triton import LLM, SamplingParams
from flexgen_triton.demo import heldout
from flexgen_triton.plan.policy import Policy

MIB = 1 << 20
FLAT = 1.0  # MiB in ten minutes, which the second half may rise by
POLICIES = (
    Policy(8, 2),
    Policy(4, 3, 50, 0, 50, 0),
    Policy(16, 1, 0, 0, 0, 100, 0, 100),
    Policy(4, 2, 100, 0, 0, 0),
    Policy(8, 1, compress_weight=True),
    Policy(8, 2, 50, 50, 50, 50, 50, 50, compress_cache=True),
    Policy(8, 1, attn_sparsity=0.3),
)
PER_POLICY = 8  # calls


@dataclass(frozen=True, slots=True)
class Sample:
    """The memory of the process at one moment, in bytes; the last four only where they were asked for."""

    at_s: float
    outputs: int
    calls: int
    abandoned: int
    refused: int
    rss: int
    anonymous: int
    file: int
    threads: int
    files: int
    objects: int = 0  # that Python's collector tracks
    traced: int = 0  # that Python allocated
    in_use: int = 0  # of glibc's heaps and mappings
    kept_free: int = 0  # that glibc has not given back


class Soak:
    """Calls of one LLM, drawn at random, and what came of them."""

    def __init__(self, llm: LLM, seed: int) -> None:
        self.llm, self.random = llm, random.Random(seed)
        words = " ".join(heldout()).split()
        self._words = words
        self.outputs = self.calls = self.abandoned = self.refused = 0

    def call(self) -> None:
        """One stream or one `generate`; now and then the policy is changed first, to each of them once at the start."""
        if self.calls < len(POLICIES):
            self.llm.use(POLICIES[self.calls])
        elif self.calls % PER_POLICY == 0:
            self.llm.use(self.random.choice(POLICIES))
        self.calls += 1
        draw = self.random.random()
        if draw < 0.15:
            self._generate()
        elif draw < 0.2:
            self._refused()
        else:
            self._stream(leave=draw < 0.3)

    def _generate(self) -> None:
        prompts = [self._prompt() for _ in range(self.random.randint(1, 20))]
        self.outputs += len(self.llm.generate(prompts, [self._params() for _ in prompts]))

    def _stream(self, *, leave: bool) -> None:
        size = self.random.choice((1, 3, 10, 40))
        stream = self.llm.stream(self._requests(size), partial=self.random.random() < 0.3)
        if not leave:
            self.outputs += sum(1 for _ in stream)
            return
        self.outputs += sum(1 for _ in itertools.islice(stream, self.random.randint(1, size)))
        self.abandoned += 1
        if self.random.random() < 0.5:
            stream.close()

    def _refused(self) -> None:
        try:
            self.llm.generate([[1, 2, 10**6]] if self.random.random() < 0.5 else "", SamplingParams(max_tokens=2))
        except ValueError:
            self.refused += 1

    def _requests(self, count: int) -> Iterator[tuple[str, SamplingParams]]:
        return ((self._prompt(), self._params()) for _ in range(count))

    def _prompt(self) -> str:
        length = self.random.choice((1, 3, 10, 30, 90))
        at = self.random.randrange(len(self._words) - length)
        return " ".join(self._words[at : at + length])[:400]

    def _params(self) -> SamplingParams:
        draw = self.random.random
        return SamplingParams(
            n=self.random.choice((1, 1, 1, 2, 3)),
            max_tokens=self.random.randint(1, 48),
            temperature=self.random.choice((0.0, 0.7, 1.0, 1.3)),
            top_p=self.random.choice((1.0, 0.9)),
            top_k=self.random.choice((0, 20)),
            repetition_penalty=self.random.choice((1.0, 1.1)),
            stop=self.random.choice(((), (), ".", ("the", "return"))),
            ignore_eos=draw() < 0.5,
            logprobs=self.random.choice((None, None, 3)),
            prompt_logprobs=2 if draw() < 0.1 else None,
        )

    def sample(self, started: float, *, objects: bool) -> Sample:
        """Take a sample of the process now."""
        status = _status()
        more: dict[str, int] = {}
        if objects:
            in_use, kept = heap_bytes()
            traced = tracemalloc.get_traced_memory()[0] if tracemalloc.is_tracing() else 0
            more = {"objects": len(gc.get_objects()), "traced": traced, "in_use": in_use, "kept_free": kept}
        return Sample(
            round(time.monotonic() - started, 1),
            self.outputs,
            self.calls,
            self.abandoned,
            self.refused,
            status["VmRSS"] * 1024,
            status["RssAnon"] * 1024,
            status["RssFile"] * 1024,
            status["Threads"],
            len(list(Path("/proc/self/fd").iterdir())),
            **more,
        )


def _status() -> dict[str, int]:
    """The numbers of /proc/self/status; sizes are in KiB."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {fields[0].rstrip(":"): int(fields[1]) for fields in lines if len(fields) > 1 and fields[1].isdecimal()}


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


def heap_bytes() -> tuple[int, int]:
    """Bytes that glibc has handed out, mapped ones included, and those that it keeps free; zeros without glibc 2.33."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return 0, 0
    mallinfo2.restype = _Mallinfo
    info = mallinfo2()
    return info.uordblks + info.hblkhd, info.fordblks


def trimmed() -> int:
    """Bytes of anonymous memory that glibc gives back when it is told to."""
    before = _status()["RssAnon"]
    ctypes.CDLL(None).malloc_trim(0)
    return (before - _status()["RssAnon"]) * 1024


def slope(samples: Sequence[Sample]) -> float | None:
    """Growth of anonymous memory over the second half, in MiB in ten minutes; None for less than four rows in it."""
    half = [s for s in samples if s.at_s >= samples[-1].at_s / 2]
    if len(half) < 4:
        return None
    return float(linear_regression([s.at_s for s in half], [s.anonymous / MIB for s in half]).slope) * 600


def soak(args: argparse.Namespace) -> tuple[list[Sample], dict[str, Any]]:
    """Call at random for `args.seconds`, sampling; what the objects grew by comes beside the samples."""
    with (
        tempfile.TemporaryDirectory(prefix="soak-") as folder,
        LLM("demo", policy=POLICIES[0], offload_dir=args.offload_dir or folder) as llm,
    ):
        state = Soak(llm, args.seed)
        samples: list[Sample] = []
        kinds: Counter[str] = Counter()
        traces = None
        started = time.monotonic()
        while (now := time.monotonic() - started) < args.seconds:
            if now >= len(samples) * args.every:
                samples.append(state.sample(started, objects=args.objects))
                _tell(samples[-1])
                if len(samples) == 4 and args.objects:
                    kinds = _kinds()
                    traces = tracemalloc.take_snapshot() if tracemalloc.is_tracing() else None
            state.call()
        samples.append(state.sample(started, objects=args.objects))
        _tell(samples[-1])
        if args.objects:
            print("more objects than at the fourth row:", (_kinds() - kinds).most_common(20))
        if traces is not None:
            for line in tracemalloc.take_snapshot().compare_to(traces, "lineno")[:25]:
                print(line)
        return samples, {"trimmed": trimmed()}


def _kinds() -> Counter[str]:
    return Counter(f"{type(o).__module__}.{type(o).__qualname__}" for o in gc.get_objects())


def _tell(sample: Sample) -> None:
    def mib(nbytes: int) -> str:
        return f"{nbytes / MIB:7.1f}"

    print(
        f"{sample.at_s:7.1f} s  rss {mib(sample.rss)}  anon {mib(sample.anonymous)}  file {mib(sample.file)} MiB  "
        f"{sample.threads} threads  {sample.files} fds  {sample.outputs} outputs  {sample.abandoned} left  "
        f"{sample.refused} refused"
        + (
            f"  {sample.objects} objects  traced {mib(sample.traced)}  in use {mib(sample.in_use)}  "
            f"kept free {mib(sample.kept_free)}"
            if sample.objects
            else ""
        ),
        flush=True,
    )


def rows(samples: Sequence[Sample], growth: float | None) -> list[Row]:
    """A row for the slope, and one for every sample."""
    first = Row("soak-slope", growth, "MiB in 10 min", "lower", note="" if growth is not None else "too short a run")
    return [first, *(Row(f"soak-{s.at_s:.0f}s", s.anonymous / MIB, "MiB", "lower", details=asdict(s)) for s in samples)]


def plot(samples: Sequence[Sample], path: Path) -> None:
    """Resident memory over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4))
    minutes = [s.at_s / 60 for s in samples]
    for label, values in (("all", [s.rss for s in samples]), ("anonymous", [s.anonymous for s in samples])):
        axes.plot(minutes, [v / MIB for v in values], label=label)
    axes.set(xlabel="minutes", ylabel="MiB resident", ylim=(0, None), title=f"{samples[-1].outputs} outputs")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    """0: memory is flat, or the run too short to tell; 1: it rises."""
    parser = argparse.ArgumentParser(description="Run streams of every kind and watch the process's memory.")
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--every", type=float, default=30, help="seconds between samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--objects", action="store_true", help="count Python's objects and glibc's bytes too")
    parser.add_argument("--trace", action="store_true", help="and where Python's were allocated (slow)")
    parser.add_argument("--offload-dir", type=Path)
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    args = parser.parse_args(argv)
    if args.trace:
        tracemalloc.start(8)
    header = make_header()
    samples, more = soak(args)
    growth = slope(samples)
    write_results(args.out or results_path("soak", header), rows(samples, growth), header | more)
    if args.plot:
        plot(samples, args.plot)
    print(f"trimmed {more['trimmed'] / MIB:.1f} MiB")
    if growth is None:
        return 0
    print(f"second half: {growth:+.2f} MiB of anonymous memory in 10 minutes; flat is below {FLAT:g}")
    return int(growth >= FLAT)


if __name__ == "__main__":
    raise SystemExit(main())
