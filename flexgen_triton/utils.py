"""FlexGen's `utils`: the names that its scripts import from there, and the log that its parser reads.

Owns FlexGen's conventions for devices, tasks and logs; knows no model.
"""

from __future__ import annotations

import argparse
import subprocess
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from numpy.typing import ArrayLike

from .memory.arena import peak_rss, rss
from .memory.device import allocated_bytes, has_gpu, peak_allocated_bytes

__all__ = [
    "GB",
    "KB",
    "MB",
    "BenchmarkResult",
    "ExecutionEnv",
    "T",
    "Task",
    "TorchDevice",
    "TorchDisk",
    "TorchMixedDevice",
    "project_decode_latency",
    "read_benchmark_log",
    "run_cmd",
    "str2bool",
    "write_benchmark_log",
]

KB, MB, GB = 1 << 10, 1 << 20, 1 << 30
T = 1e12
WARM_UP = 2  # decode steps that are counted as they are when the others are projected


@dataclass(frozen=True)
class Task:
    """One call of `generate`, in FlexGen's words: prompts of one length and how they are continued."""

    inputs: ArrayLike
    prompt_len: int
    gen_len: int
    cut_gen_len: int | None
    do_sample: bool
    temperature: float
    stop: int | None


class TorchDevice:
    """The GPU ("cuda:0") or the host ("cpu") of an environment; it says how much memory is in use."""

    def __init__(self, name: str) -> None:
        self.name = name

    def mem_stats(self) -> tuple[int, int]:
        """Bytes in use and at most: torch's on the GPU, the process's own on the host, 0 where there is no GPU."""
        if self.name == "cpu":
            return rss(), peak_rss()
        if not has_gpu():
            return 0, 0
        return allocated_bytes(self.name), peak_allocated_bytes(self.name)

    def print_stats(self, output_file: str | Path | None = None) -> tuple[int, int]:
        """Print what `mem_stats` returns, or write it to a file."""
        used, peak = self.mem_stats()
        text = f"{self.name}: {used / GB:.4f} GB in use, {peak / GB:.4f} GB at most"
        if output_file is None:
            print(text)
        else:
            Path(output_file).write_text(text + "\n")
        return used, peak


@dataclass(frozen=True)
class TorchDisk:
    """The directory where the disk's share goes. Closing it frees the models that were loaded with it."""

    path: str | Path
    _models: list[weakref.finalize[Any, Any]] = field(default_factory=list, repr=False, compare=False)

    def adopt(self, free: weakref.finalize[Any, Any]) -> None:
        """Call `free` when this is closed, if it was not called before."""
        self._models.append(free)

    def close_copy_threads(self) -> None:
        """Free the memory, files and threads of all models that were loaded with this."""
        for free in self._models:
            free()
        self._models.clear()

    def mem_stats(self) -> tuple[int, int]:
        """Bytes of the directory's files, twice: there is no record of the most there were."""
        used = sum(p.stat().st_size for p in Path(self.path).expanduser().rglob("*") if p.is_file())
        return used, used

    def print_stats(self) -> tuple[int, int]:
        """Print what `mem_stats` returns."""
        used, _ = self.mem_stats()
        print(f"{self.path}: {used / GB:.4f} GB of files")
        return used, used


@dataclass(frozen=True)
class TorchMixedDevice:
    """The three tiers together, as FlexGen names them; nothing is done with it here."""

    base_devices: Sequence[TorchDevice | TorchDisk]


@dataclass(frozen=True)
class ExecutionEnv:
    """The devices of a run. The disk says where the disk's share of weights, cache and activations goes."""

    gpu: TorchDevice
    cpu: TorchDevice
    disk: TorchDisk
    mixed: TorchMixedDevice

    @classmethod
    def create(cls, offload_dir: str | Path) -> Self:
        """Make an environment whose disk is a directory."""
        gpu, cpu, disk = TorchDevice("cuda:0"), TorchDevice("cpu"), TorchDisk(offload_dir)
        return cls(gpu, cpu, disk, TorchMixedDevice([gpu, cpu, disk]))

    def close_copy_threads(self) -> None:
        """Free the memory, files and threads of all models that were loaded with this."""
        self.disk.close_copy_threads()


def run_cmd(cmd: str) -> int:
    """Print a command line and run it in the shell; returns its exit code."""
    print(cmd, flush=True)
    return subprocess.run(cmd, shell=True, check=False).returncode


def str2bool(value: str | bool) -> bool:
    """Convert "true", "yes", "1" and the like, or the contrary, for argparse."""
    if isinstance(value, bool):
        return value
    if value.lower() in ("true", "t", "yes", "y", "1"):
        return True
    if value.lower() in ("false", "f", "no", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{value!r} is neither true nor false")


# The log


@dataclass(frozen=True)
class BenchmarkResult:
    """Seconds and tokens per second of one run, as a log holds them."""

    prefill_latency: float
    prefill_throughput: float
    decode_latency: float
    decode_throughput: float
    total_latency: float
    total_throughput: float


def project_decode_latency(costs: Sequence[float], prompt_len: int, gen_len: int) -> float:
    """Seconds that decode takes in all, from those of the steps that were run (`costs`, prefill first).

    The first two decode steps count as they are, each later one as the mean of those that were run. Raises ValueError
    where no decode step was.
    """
    decode = list(costs[1:])
    if not decode:
        raise ValueError("decode cannot be projected from prefill alone; run at least one more token step")
    warm = decode[:WARM_UP]
    steady = decode[WARM_UP:] or warm
    return sum(warm) + sum(steady) / len(steady) * max(gen_len - 1 - len(warm), 0)


def log_text(
    model_size: float,
    cache_size: float,
    hidden_size: float,
    gpu_peak_mem: float,
    projected: bool,
    prefill_latency: float,
    prefill_throughput: float,
    decode_latency: float,
    decode_throughput: float,
    total_latency: float,
    total_throughput: float,
) -> str:
    """Five lines in the form that FlexGen's parser reads: tabs between the figures, and 2**30 bytes a GB."""
    phases = {
        "prefill": (prefill_latency, prefill_throughput),
        "decode": (decode_latency, decode_throughput),
        "total": (total_latency, total_throughput),
    }
    sizes = {"model size": model_size, "cache size": cache_size, "hidden size (p)": hidden_size}
    lines = [
        _line({name: f"{nbytes / GB:.3f} GB" for name, nbytes in sizes.items()}),
        _line({"peak gpu mem": f"{gpu_peak_mem / GB:.3f} GB", "projected": str(projected)}),
    ]
    for phase, (seconds, rate) in phases.items():
        lines.append(_line({f"{phase} latency": f"{seconds:.3f} s", f"{phase} throughput": f"{rate:.3f} token/s"}))
    return "\n".join(lines)


def _line(figures: dict[str, str]) -> str:
    return "\t".join(f"{name}: {text}" for name, text in figures.items())


def write_benchmark_log(filename: str | Path, *figures: Any, **named: Any) -> str:
    """Append what `log_text` makes of the figures to a file, and return it."""
    text = log_text(*figures, **named)
    with Path(filename).open("a") as log:
        log.write(text + "\n")
    return text


def read_benchmark_log(filename: str | Path) -> BenchmarkResult:
    """Read the first run of a log; raises ValueError where it is none."""
    lines = Path(filename).read_text().splitlines()[:5]
    try:
        figures = dict(part.split(": ", 1) for line in lines for part in line.split("\t"))
        names = [f"{phase} {kind}" for phase in ("prefill", "decode", "total") for kind in ("latency", "throughput")]
        return BenchmarkResult(*(float(figures[name].split()[0]) for name in names))
    except (ValueError, KeyError) as error:
        raise ValueError(f"{filename} is no log of a benchmark run: {error}") from error
