"""Run the tests as other machines would, and as luck might: other instruction sets, numbers of threads and examples.

    python bench/everywhere.py                     # the tests that compute, under each of torch's instruction sets
    python bench/everywhere.py --properties        # the properties, with five seeds and ten times the examples

Prints a row for every run: what was set, its last line, seconds. Exit code 1 if any failed. Takes an hour on two cores.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMPUTING = (
    "tests/models",
    "tests/run",
    "tests/kernels",
    "tests/test_reference_opt.py",
    "tests/bench/test_accuracy.py",
)
CAPABILITIES, THREADS = ("default", "avx2", "avx512"), (1, 4)
SEEDS, TIMES = range(1, 6), 10

Run = tuple[str, Sequence[str], Mapping[str, str]]  # its name, pytest's arguments, the environment's


def machines() -> Iterator[Run]:
    """Every instruction set that torch may be told to use, with one thread and with more than there are cores."""
    for threads, capability in product(THREADS, CAPABILITIES):
        env = {"ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": str(threads)}
        arguments = (*COMPUTING, "-m", "slow or not slow", "--ignore-glob=*ahead_of_time*")
        yield f"{capability}, {threads} threads", arguments, env


def draws() -> Iterator[Run]:
    """Every property, with other draws and more of them."""
    for seed in SEEDS:
        yield f"seed {seed}", ("-m", "hypothesis", f"--hypothesis-seed={seed}"), {"FLEXGEN_EXAMPLES": str(TIMES)}


def run(arguments: Sequence[str], env: Mapping[str, str]) -> tuple[bool, str, float]:
    """Run pytest and return (True if all passed, its last line and failures, seconds)."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--timeout=3000", *arguments]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 0, "; ".join([lines[-1].strip("= "), *failed]), time.perf_counter() - began


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--properties", action="store_true")
    failures = 0
    for name, arguments, env in draws() if parser.parse_args(args).properties else machines():
        passed, words, seconds = run(arguments, env)
        failures += not passed
        print(f"{name:22} {words} ({seconds:.0f} s)", flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
