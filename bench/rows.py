"""Benchmark results: rows under a header that says on which machine and from which commit they come.

Owns the file format of bench/results and its naming. Does not know what is measured, and writes no host name and no
absolute path: result files are published.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
_PACKAGES = ("torch", "triton", "transformers", "accelerate", "flexgen_triton")


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. `share` is the value's share of `roof`, the best this machine could do, measured in the same run."""

    name: str
    value: float | None  # None: it did not finish, and `note` says why
    unit: str
    better: str = "higher"  # or "lower"
    roof: float | None = None
    share: float | None = None
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.better not in ("higher", "lower"):
            raise ValueError(f"{self.name}: better is {self.better!r}; it must be 'higher' or 'lower'")


@dataclass(frozen=True, slots=True)
class Results:
    """A result file: where and from what, and the rows."""

    header: dict[str, Any]
    rows: tuple[Row, ...]

    @property
    def machine(self) -> str:
        return machine_name(self.header.get("machine", {}))

    @property
    def commit(self) -> str:
        commit = self.header.get("commit", {})
        return f"{commit.get('id', 'unknown')}{'-dirty' if commit.get('dirty') else ''}"


def make_header(command: list[str] | None = None) -> dict[str, Any]:
    """Machine, commit, date, versions and command of a run that happens here and now."""
    return {
        "machine": machine(),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in _PACKAGES}},
        "command": portable(sys.argv if command is None else command),
    }


def machine() -> dict[str, Any]:
    """The properties of this machine that speeds depend on: CPU model, cores, bytes of memory, GPU name or None."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": _gpu_name(),
    }


def machine_name(machine: dict[str, Any]) -> str:
    """The machine's folder in bench/results: its GPU (`nvidia-h200`), or its CPU with cores and memory."""
    memory = round(machine.get("memory_bytes", 0) / 2**30)
    name = machine.get("gpu") or f"{machine.get('cpu') or 'unknown'} {machine.get('cores', 0)}c {memory}g"
    name = re.sub(r"\((r|tm)\)|\b(cpu|processor)\b", "", name.lower())
    return re.sub(r"[^a-z0-9.]+", "-", name).strip("-")


def commit() -> dict[str, Any]:
    """The repository's commit, and whether files other than results differ from it."""
    return {
        "id": _output(["git", "rev-parse", "--short=12", "HEAD"]) or "uncommitted",
        "dirty": bool(_output(["git", "status", "--porcelain", "--", ".", ":!bench/results"])),
    }


def results_path(what: str, header: dict[str, Any]) -> Path:
    """The file that results are kept in: bench/results/<machine>/<what>-<commit>.json."""
    results = Results(header, ())
    return RESULTS / results.machine / f"{what}-{results.commit}.json"


def write_results(path: Path, rows: list[Row], header: dict[str, Any]) -> None:
    """Writes a result file, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"header": header, "rows": [asdict(row) for row in rows]}, indent=1)
    path.write_text(text + "\n")


def read_results(path: Path) -> Results:
    """Reads a result file of ours or of pytest-benchmark; raises ValueError for anything else."""
    try:
        data = json.loads(path.read_text())
        if "benchmarks" in data:
            return _from_pytest_benchmark(data)
        return Results(data["header"], tuple(_row(row) for row in data["rows"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a result file: {type(error).__name__}: {error}") from error


def portable(command: list[str]) -> list[str]:
    """A command line without this machine's folders: the interpreter is `python`, paths keep their last part."""
    return ["python" if arg == sys.executable else without_folders(arg) for arg in command]


def without_folders(text: str) -> str:
    """Absolute paths in a text cut to their last part."""
    return re.sub(r"(?<![\w.:/])/(?:[^\s/:'\"]+/)+", "", text)


def _row(data: dict[str, Any]) -> Row:
    """A row from JSON; keys that are not a Row's are kept among its details."""
    known = {k: v for k, v in data.items() if k in Row.__dataclass_fields__ and k != "details"}
    extra = {k: v for k, v in data.items() if k not in Row.__dataclass_fields__}
    return Row(**known, details={**data.get("details", {}), **extra})


def _from_pytest_benchmark(data: dict[str, Any]) -> Results:
    """Rows from pytest-benchmark's JSON: the median time, unless `extra_info` gives a value, unit and direction."""
    info = data.get("machine_info", {})
    header = {
        "machine": info.get("bench_machine")
        or {"cpu": info.get("cpu", {}).get("brand_raw"), "cores": info.get("cpu", {}).get("count", 0)},
        "commit": {
            "id": (data.get("commit_info", {}).get("id") or "unknown")[:12],
            "dirty": data.get("commit_info", {}).get("dirty"),
        },
        "date": data.get("datetime"),
    }
    defaults = {"unit": "s", "better": "lower"}
    rows = (
        _row({**defaults, "value": b["stats"]["median"], **b["extra_info"], "name": b["name"]})
        for b in data["benchmarks"]
    )
    return Results(header, tuple(rows))


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text() if info.exists() else "", re.MULTILINE)
    return found[1] if found else platform.machine()


def _gpu_name() -> str | None:
    if not shutil.which("nvidia-smi"):
        return None
    return _output(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]).partition("\n")[0] or None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(cmd: list[str]) -> str:
    """A command's output, empty when it is missing or fails."""
    try:
        return subprocess.run(cmd, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
