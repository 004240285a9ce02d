"""This machine's profile: measured in under a minute, kept in a file per machine, corrected by what runs took.

The file lies in the offload directory, whose disk's speed is part of it. Not yet run on a GPU.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from ..memory.arena import host_available, rss
from ..memory.device import gpu_memory, gpu_name, reserved_bytes
from ..memory.stripes import Folders
from ..models import ops
from ..models.checkpoint import open_store
from ..models.config import ModelConfig
from ..models.family import make_model, model_spec, probe_config
from ..plan.cost import seconds
from ..plan.formats import DTYPE_BYTES, FourBitCache, PlainCache
from ..plan.hardware import Hardware, HardwareError
from ..plan.json_file import JsonError, read_object
from ..plan.link import Span
from ..plan.policy import Policy
from ..plan.schedule import Lane
from ..plan.spec import pack
from ..run.engine import Engine
from ..run.report import RunReport
from ..run.running import check_process
from ..sequences.params import SamplingParams
from ..sequences.sequence import TokenSequence
from . import arithmetic, transfers
from .workbench import CPU, MIB, Clock, Workbench, rounded

Progress = Callable[[str, int, int], None]  # the phase, steps done, of how many

MEASURING_BYTES = 640 << 20  # that measuring takes on top of what the process has
STEPS = 9  # that progress is told of
LINKS = ("h2d", "d2h", "h2d_pageable", "d2h_pageable")
TINY = probe_config(64, 4, 2, 256, vocab=512, positions=128)
SAMPLE = probe_config(2048, 2, 32, 8192, vocab=4096, positions=128)
SAMPLE_STEPS = 16
LEAST_SHARE = 0.01  # of a run's makespan, for a lane to correct the profile


# Measuring


def measure(
    device: torch.device, folders: Folders, *, quick: bool = False, progress: Progress | None = None
) -> Hardware:
    """Measure the machine: its device, its host, and the disk of `folders`, where a scratch file lies meanwhile.

    `quick` takes seconds and gives coarse figures. Raises OSError when the disk has no room for half a GiB,
    ForkedError in a fork of a process that computed.
    """
    check_process()
    folders.make()
    steps = _Steps(progress)
    share = 0.1 if quick else 1.0  # of the time each step gets
    host_is_apart = device.type == "cuda"
    source = f"measured{', quickly' if quick else ''}{_others()}"
    with torch.inference_mode(), ExitStack() as benches:
        _compile_apart()
        prepare()
        process_bytes = rss()
        steps.done()
        bench = benches.enter_context(Workbench(device, quick=quick))
        host = benches.enter_context(Workbench(CPU, quick=quick, pin=True)) if host_is_apart else bench
        figures = _device_figures(bench, host, steps, share)
        disk = transfers.disk(folders, host.arena.buffer[: 64 * MIB], quick=quick, budget_s=6 * share)
        steps.done()
    hardware = Hardware(
        name=machine_name(device, folders),
        source=source,
        host_is_apart=host_is_apart,
        gpu_bytes=0,
        host_bytes=0,
        disk_bytes=0,
        disk_read=disk.read,
        disk_write=disk.write,
        disk_rows=disk.rows,
        disk_table=disk.table,
        dequantize_rows=ops.crossover_rows(device) if host_is_apart else 0,
        process_bytes=process_bytes,
        context_bytes=_context_bytes(device),
        **figures,
    )
    hardware = replace(hardware, overhead=_overheads(hardware, device, folders, quick=quick))
    if not quick:
        hardware = _corrected(hardware, device, folders)
    steps.done()
    return with_capacities(hardware, device, folders)


def _others() -> str:
    """A word on other work, which makes every figure worse: said where it keeps half of the cores busy."""
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    return f", while others used the machine (load {load:.1f} on {cores} cores)" if load > cores / 2 else ""


class _Steps:
    """Counts what was measured for `progress`."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress, self._done = progress, 0
        self._tell()

    def done(self, steps: int = 1) -> None:
        self._done += steps
        self._tell()

    def _tell(self) -> None:
        if self._progress:
            self._progress("measure", self._done, STEPS)


def _device_figures(bench: Workbench, host: Workbench, steps: _Steps, share: float) -> dict[str, Any]:
    """Measure the rates of the device, of the host's processor and of the link between them."""
    clock = Clock(bench.device, quick=bench.quick)
    figures: dict[str, Any] = {"matmul": arithmetic.products(bench, clock, 12 * share)}
    steps.done()
    figures["prefill_attention"] = arithmetic.prompt_attention(bench, clock, 2 * share)
    steps.done()
    figures["decode_attention"] = arithmetic.token_attention(bench, clock, 3 * share)
    steps.done()
    figures["elementwise"] = arithmetic.passes(bench, clock, share)
    figures["device_read"] = transfers.memory_read(bench, clock, share)
    steps.done()
    beside = _host_figures(bench, host, clock, share) if bench.device.type == "cuda" else _same(bench, clock, share)
    steps.done(2)
    return {"host_attention": figures["decode_attention"], "host_read": figures["device_read"], **figures, **beside}


def _same(bench: Workbench, clock: Clock, share: float) -> dict[str, Any]:
    """Links where the device is the host: copies in its memory, which the engine makes when it is told to."""
    return dict.fromkeys(LINKS, transfers.copies_in_place(bench, clock, share))


def _host_figures(bench: Workbench, host: Workbench, clock: Clock, share: float) -> dict[str, Any]:
    """Links between a GPU and its host, and what the host's processor does."""
    on_host = Clock(CPU, quick=bench.quick)
    with Workbench(CPU, quick=bench.quick) as pageable:
        links = transfers.links(bench, host, pageable, clock, 3 * share)
    attention = arithmetic.token_attention(host, on_host, 3 * share)
    return {**links, "host_attention": attention, "host_read": transfers.memory_read(host, on_host, share)}


def _compile_apart() -> None:
    """Compile the CPU's kernels in a process of its own, which takes with it what compilers leave in memory.

    Where that fails they are compiled here.
    """
    program = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import prepare; prepare()"
    subprocess.run([sys.executable, "-c", program], check=False, capture_output=True)


def prepare() -> None:
    """Load the CPU's kernels for every format, and compile those that are not kept on disk."""
    for dtype in DTYPE_BYTES:
        spec = model_spec(TINY, "tiny", dtype)
        for stored, cache in ((spec, PlainCache()), (pack(spec, arithmetic.PACKED), FourBitCache())):
            ops.prepare(stored, cache.fields(dtype, spec.head_dim), sparse=False)


def _context_bytes(device: torch.device) -> int:
    """GPU memory that is neither free nor torch's: the driver's context, the kernels' code, other processes."""
    if device.type != "cuda":
        return 0
    free, total = gpu_memory(device)
    return total - free - reserved_bytes(device)


def with_capacities(hardware: Hardware, device: torch.device, folders: Folders) -> Hardware:
    """The same machine with the bytes that this process can have now, and `folders` on disk.

    With what it takes already, so that what is left for a plan is without `process_bytes` and `context_bytes`.
    """
    gpu = 0
    if hardware.host_is_apart:
        gpu = gpu_memory(device)[0] + reserved_bytes(device) + hardware.context_bytes
    return hardware.limited(gpu, host_available() + rss(), folders.free_bytes())


# What any op costs its lane


def _overheads(hardware: Hardware, device: torch.device, folders: Folders, *, quick: bool) -> dict[str, float]:
    """Seconds that an op of a tiny model takes beyond its bytes and its arithmetic, by lane."""
    steps = 8 if quick else 32
    with _inside(folders) as work:
        alone = _run(TINY, Policy(), device, work, host_is_apart=hardware.host_is_apart, steps=steps)
        spread = Policy(1, 2, 0, 50, 0, 50, 0, 50, cpu_cache_compute=True)
        moved = _run(TINY, spread, device, work, host_is_apart=True, steps=steps)
    lanes = [lane for lane in Lane if lane is not Lane.COMPUTE]
    found = {lane.value: _excess((s for s in moved.timeline.spans if s.op.lane is lane), hardware) for lane in lanes}
    decoded = [s for s in alone.timeline.spans if s.op.i > 0]
    stages = alone.plans[0].stages
    kinds = [[s for s in decoded if stages[s.op.j].module.kind == kind] for kind in ("attention", "mlp")]
    found[Lane.COMPUTE.value] = mean(_excess(spans, hardware) for spans in kinds)
    return {lane: rounded(excess) for lane, excess in found.items()}


@contextmanager
def _inside(folders: Folders) -> Iterator[Folders]:
    """A temporary directory in each."""
    with ExitStack() as stack:
        made = (tempfile.TemporaryDirectory(prefix=".measure-", dir=path) for path in folders.paths)
        yield Folders(tuple(Path(stack.enter_context(each)) for each in made))


def _run(
    config: ModelConfig, policy: Policy, device: torch.device, folders: Folders, *, host_is_apart: bool, steps: int
) -> RunReport:
    """Generate with random weights, a round of prompts of 16 tokens."""
    spec = model_spec(config, f"measure-{config.hidden}", "float16")
    store = open_store(spec, None, folders.paths)
    params = SamplingParams(max_tokens=steps, ignore_eos=True, temperature=0)
    requests = [TokenSequence([5] * 16, params) for _ in range(policy.round_size)]
    with Engine(
        make_model(config), spec, store, policy, device=device, folders=folders, host_is_apart=host_is_apart
    ) as engine:
        return engine.generate(requests)


def _excess(spans: Iterable[Span], hardware: Hardware) -> float:
    """Median seconds beyond what ops would take that cost their lane nothing; 0 where they take less."""
    excess = median(s.end - s.start - seconds(s.op, hardware) for s in spans if s.op.bytes or s.op.work)
    return max(excess, 0.0)


def _corrected(hardware: Hardware, device: torch.device, folders: Folders) -> Hardware:
    """Correct a profile by measured over predicted seconds of lanes, in short runs on layers of a real model's size.

    What is timed by itself is some 15 % quicker than the same between all that an engine does, and where the cores that
    compute also read the disk, computing takes longer while they do.
    """
    host_is_apart = hardware.host_is_apart
    with _inside(folders) as work:
        resident, streamed = (
            _run(SAMPLE, policy, device, work, host_is_apart=host_is_apart, steps=SAMPLE_STEPS)
            for policy in (Policy(8), Policy(8, 1, 0, 0))
        )
        found = {Lane.COMPUTE: _ratio(resident, Lane.COMPUTE, hardware)}
        found[Lane.DISK_IN] = _ratio(streamed, Lane.DISK_IN, hardware)
        if host_is_apart:
            beside = _run(SAMPLE, Policy(8, 2, 0, 100, 0, 100, 0, 100), device, work, host_is_apart=True, steps=8)
            found |= {lane: _ratio(beside, lane, hardware) for lane in (Lane.H2D, Lane.D2H)}
    more = _busy_s(streamed, Lane.COMPUTE) - _busy_s(resident, Lane.COMPUTE)
    read = sum(s.op.bytes for s in streamed.timeline.spans if s.op.lane is Lane.DISK_IN)
    return replace(
        hardware,
        correction={lane.value: rounded(ratio) for lane, ratio in found.items()},
        disk_compute=0.0 if host_is_apart else float(f"{max(more, 0.0) / read / found[Lane.COMPUTE]:.3g}"),
    )


def _busy_s(report: RunReport, lane: Lane) -> float:
    return sum(s.end - s.start for s in report.timeline.spans if s.op.lane is lane)


def _ratio(report: RunReport, lane: Lane, hardware: Hardware) -> float:
    """Measured over predicted seconds of a lane."""
    return _busy_s(report, lane) / sum(seconds(s.op, hardware) for s in report.timeline.spans if s.op.lane is lane)


# The file of a machine


def machine_name(device: torch.device, folders: Folders) -> str:
    """Name what a machine's speed depends on: its processor, the cores this process may use, its GPU, its drives."""
    cores = len(os.sched_getaffinity(0))
    gpu = f", {gpu_name(device)}" if device.type == "cuda" else ""
    drives = f", {len(folders.paths)} drives" if len(folders.paths) > 1 else ""
    return f"{_processor()}, {cores} cores{gpu}{drives}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def profile_path(folders: Folders, device: torch.device) -> Path:
    """The file in which this machine's profile is kept."""
    name = machine_name(device, folders)
    words = re.sub(r"\((r|tm)\)|\b(cpu|processor)\b", "", name.lower())
    readable = re.sub(r"[^a-z0-9.]+", "-", words).strip("-.")[:64]
    return folders.first / f"machine-{readable}-{hashlib.sha256(name.encode()).hexdigest()[:8]}.json"


def cached_profile(folders: Folders, device: torch.device) -> Hardware | None:
    """This machine's profile with the capacities of now; None where there is none that this version can read."""
    try:
        return with_capacities(Hardware.from_file(profile_path(folders, device)), device, folders)
    except HardwareError:
        return None


def load_or_measure(device: torch.device, folders: Folders, progress: Progress | None = None) -> Hardware:
    """This machine's profile, measured and kept where it was not yet; raises OSError as `measure` does."""
    found = cached_profile(folders, device)
    if found is None:
        found = measure(device, folders, progress=progress)
        save_profile(found, profile_path(folders, device))
    return found


def save_profile(hardware: Hardware, path: Path) -> None:
    """Write the file whole or not at all; raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(hardware.to_json(), encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


# Corrections


def refine(hardware: Hardware, run: Mapping[str, Any]) -> Hardware:
    """The profile with each lane's correction times what a run's busy seconds were of those predicted for it.

    `run` is what `bench --json` writes. Lanes that were busy for less than a hundredth of the run's makespan say
    nothing and stay as they are. Raises HardwareError when the figures or the prediction are not there.
    """
    try:
        measured, predicted = _busy(run["lanes"]), _busy(run["predicted"]["lanes"])
        least = LEAST_SHARE * float(run["makespan_s"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise HardwareError(
            f"the run's figures lack what was measured or predicted of its lanes ({error!r}); write them with "
            "`bench --json`"
        ) from error
    ratios = {
        lane: busy / predicted[lane]
        for lane, busy in measured.items()
        if busy > 0 and busy >= least and predicted.get(lane, 0.0) > 0
    }
    corrected = {lane: rounded(hardware.correction.get(lane, 1.0) * ratio) for lane, ratio in ratios.items()}
    return replace(hardware, correction={**hardware.correction, **corrected})


def _busy(lanes: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    """Busy seconds of each lane, over the phases."""
    total: dict[str, float] = {}
    for phase in lanes.values():
        for lane, use in phase.items():
            total[lane] = total.get(lane, 0.0) + float(use["busy_s"])
    return total


def read_run(path: Path) -> Mapping[str, Any]:
    """The figures that `bench --json` wrote; raises HardwareError where the file holds none, OSError."""
    try:
        return read_object(path)
    except JsonError as error:
        raise HardwareError(f"{error}; write a run's figures with `bench --json`") from error
