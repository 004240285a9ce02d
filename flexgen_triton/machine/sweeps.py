"""Speed of a machine at the operations that plans count, by size: the engine's own, on memory that no cache holds.

Knows what to run and how much work it is. Does not know what the figures are for; machine/measure.py makes a profile of
them. Every operand is a view of an arena filled once with numbers of ordinary size, so that no operation meets a zero
page, an infinity or a denormal number.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import cycle
from random import Random
from statistics import median

import torch
from torch import Tensor

from ..memory.arena import Arena, host_available
from ..memory.cache_homes import page_fields
from ..memory.cache_places import Segment, segment
from ..memory.device import current_stream, gpu_capability, gpu_memory, synchronize
from ..memory.disk import DiskQueue, Read, Write
from ..memory.disk_files import Readable
from ..memory.stripes import Folders
from ..memory.weights import BOUNCE_BYTES
from ..models import ops
from ..models.family import model_spec, probe_config
from ..plan.formats import CacheFormat, FourBit, FourBitCache, Plain, PlainCache, WeightFormat
from ..plan.hardware import Curve
from ..plan.layout import CacheLayout, page_tokens_for
from ..plan.plan import Plan, make_plan
from ..plan.policy import Policy
from ..plan.spec import ModelSpec, Workload

CPU = torch.device("cpu")
MIB = 1 << 20
PACKED = FourBit(64)
ATTENTION_STAGES = 3  # projection, attention and its end; the probe's stage 0 is the embedding, its fifth the MLP
TIMED_S = 1e-3  # shorter runs are timed several at once
SLOWEST_S = 1.0  # larger sizes than the first that takes so long are left out

ROWS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 256, 512, 1024)
PROMPT_LENS = (32, 128, 512, 1024)
CONTEXTS = ((4, 16), (4, 64), (8, 256), (16, 512), (32, 1024))  # sequences, tokens of each
PASSED_ROWS = (1, 16, 256, 2048)
COPY_BYTES = tuple(64 << 10 << n for n in range(0, 11, 2))  # to 64 MiB
DISK_BYTES = (16 << 10, *(256 << 10 << n for n in range(0, 9, 2)))  # to 64 MiB
EXTENT_BYTES = (1 * MIB, 4 * MIB, 8 * MIB)
DISK_THREADS = (1, 2, 4, 8)
TABLE_ROW_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Task:
    """Something to time: `run` does `units` of work, and counts as one of `size` in a curve."""

    size: float
    units: float
    run: Callable[[], object]


class Clock:
    """Times tasks in turn, round after round, so that a busy moment falls on all alike."""

    def __init__(self, device: torch.device, *, quick: bool) -> None:
        self.device, self.quick = device, quick

    def curves(
        self,
        sweeps: Mapping[str, Sequence[Task]],
        budget_s: float,
    ) -> dict[str, Curve]:
        """Each sweep's rates by size, from the median of the times that `budget_s` allows: what a run will meet.

        A sweep's tasks stand smallest first; it ends behind the first that takes SLOWEST_S.
        """
        deadline = time.perf_counter() + budget_s
        times = {name: list(self._first_round(tasks)) for name, tasks in sweeps.items()}
        again = [pair for name, found in times.items() for pair in zip(sweeps[name], found, strict=False)]
        for n in range(1 if self.quick else 9):
            for task, seconds in again:
                if n == 0 or time.perf_counter() < deadline:
                    seconds.append(self._seconds(task, min(seconds)))
        return {
            name: Curve(
                tuple((t.size, rounded(t.units / median(s))) for t, s in zip(sweeps[name], found, strict=False))
            )
            for name, found in times.items()
        }

    def curve(self, tasks: Sequence[Task], budget_s: float) -> Curve:
        """One sweep alone; see `curves`."""
        return self.curves({"": tasks}, budget_s)[""]

    def rate(self, task: Task, budget_s: float) -> float:
        """Units per second of one task."""
        return self.curve([task], budget_s).points[0][1]

    def _first_round(self, tasks: Sequence[Task]) -> Iterator[list[float]]:
        for task in tasks:
            if self.device.type == "cuda":
                task.run()  # compiles
            seconds = self._seconds(task, SLOWEST_S)
            yield [seconds]
            if seconds > SLOWEST_S:
                return

    def _seconds(self, task: Task, expected_s: float) -> float:
        count = min(max(1, round(TIMED_S / expected_s)), 100)
        self._wait()
        start = time.perf_counter()
        for _ in range(count):
            task.run()
        self._wait()
        return (time.perf_counter() - start) / count

    def _wait(self) -> None:
        synchronize(self.device)


def rounded(value: float) -> float:
    """Four digits: more would be noise."""
    return float(f"{value:.4g}")


class Workbench:
    """A filled arena on a device to take operands from, and the model they are the size of. A context manager."""

    def __init__(self, device: torch.device, *, quick: bool, pin: bool = False) -> None:
        self.device, self.quick = device, quick
        wanted = 128 * MIB if quick else 256 * MIB if device.type == "cpu" else 1024 * MIB
        free = host_available() if device.type == "cpu" else gpu_memory(device)[0]
        self.nbytes = max(min(wanted, free // 4), 128 * MIB) // MIB * MIB
        self.arena = Arena("measuring", self.nbytes, device, pin=pin)
        _fill(self.arena.buffer)
        scale = 2 if device.type == "cuda" and not quick else 1
        self.hidden, self.ffn = 2048 * scale, 8192 * scale
        self.heads = self.hidden // 128

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The formats the device computes in; bfloat16 last, where it has that."""
        capable = self.device.type == "cpu" or gpu_capability(self.device) >= (8, 0)
        return ("float32", "float16", "bfloat16") if capable else ("float32", "float16")

    @property
    def half(self) -> str:
        return self.dtypes[-1]

    def spec(self, dtype: str) -> ModelSpec:
        """A model of one decoder layer."""
        config = probe_config(self.hidden, 1, self.heads, self.ffn, vocab=256, positions=1 << 20)
        return model_spec(config, "measured", dtype)

    def stretches(self, nbytes: int) -> Iterator[Tensor]:
        """Stretches of `nbytes` bytes of the arena, one after another without end."""
        count = max(self.nbytes // nbytes, 1)
        return cycle([self.arena.buffer[n * nbytes : (n + 1) * nbytes] for n in range(count)])

    def view(self, dtype: str, *shape: int) -> Tensor:
        """The arena's first bytes as a tensor, for what may well be in a cache: activations."""
        numbers = self.arena.buffer.view(getattr(torch, dtype))
        return numbers[: torch.Size(shape).numel()].view(shape)

    def __enter__(self) -> Workbench:
        return self

    def __exit__(self, *_: object) -> None:
        self.arena.close()


def _fill(buffer: Tensor) -> None:
    """Random numbers from 1/128 to 2 in every format: 16-bit words of 0x3c00 to 0x3fff."""
    piece = min(len(buffer), MIB)
    buffer[:piece].view(torch.int16).random_(0x3C00, 0x4000)
    for low in range(piece, len(buffer), piece):
        buffer[low : low + piece] = buffer[: len(buffer[low : low + piece])]


# Products


def products(bench: Workbench, clock: Clock, budget_s: float) -> dict[str, Curve]:
    """FLOP/s of `ops.linear` by the matrix's format and the rows of x, mean of an MLP's two shapes.

    On a GPU 4-bit matrices are measured where they are multiplied as they are; from `ops.crossover_rows` on they are
    dequantised once and multiplied in 16 bits.
    """
    crossover = ops.crossover_rows(bench.device)
    rows: Sequence[int] = (1, 8, 64, 256) if bench.quick else ROWS
    on_gpu = bench.device.type == "cuda"
    rows4 = [m for m in rows if m < crossover] if on_gpu else sorted({*rows, crossover - 1, crossover})
    sweeps = {dtype: _product_tasks(bench, rows, dtype, Plain(dtype)) for dtype in bench.dtypes}
    sweeps[PACKED.rates] = _product_tasks(bench, rows4, bench.half, PACKED)
    return clock.curves(sweeps, budget_s)


def _product_tasks(bench: Workbench, rows: Sequence[int], dtype: str, form: WeightFormat) -> list[Task]:
    pairs = [(n, k, _matrices(bench, n, k, form)) for n, k in ((bench.ffn, bench.hidden), (bench.hidden, bench.ffn))]

    def task(m: int) -> Task:
        inputs = [(bench.view(dtype, m, k), matrices) for _, k, matrices in pairs]
        return Task(m, 4.0 * m * bench.hidden * bench.ffn, lambda: [ops.linear(x, next(w)) for x, w in inputs])

    return [task(m) for m in rows]


def _matrices(bench: Workbench, n: int, k: int, form: WeightFormat) -> Iterator[ops.Weight]:
    """Matrices [n, k] all over the arena, without end."""
    return (ops.from_bytes(form, (n, k), stretch) for stretch in bench.stretches(round(n * k * form.parameter_bytes)))


# Attention and what passes over activations


def prompt_attention(bench: Workbench, clock: Clock, budget_s: float) -> Curve:
    """FLOP/s of causal attention by prompt length, of about as many tokens at every length."""
    tokens = 1024 if bench.quick else 2048 if bench.device.type == "cpu" else 16384
    lens = PROMPT_LENS[:3] if bench.quick else PROMPT_LENS
    return clock.curve([_prompt_task(bench, length, tokens // length) for length in lens], budget_s)


def _prompt_task(bench: Workbench, length: int, sequences: int) -> Task:
    qkv = bench.view(bench.half, length * sequences, 3, bench.heads, bench.hidden // bench.heads)
    q, k, v = qkv.unbind(1)
    work = _one_batch(bench, bench.half, length, sequences).work(0, 1, 0, ATTENTION_STAGES)
    return Task(length, work.prompt_flops, lambda: ops.prefill_attention(q, k, v, [length] * sequences))


def token_attention(bench: Workbench, clock: Clock, budget_s: float) -> dict[str, Curve]:
    """Bytes of K and V per second of attention over the cache, by its format and the bytes of all sequences."""
    contexts = CONTEXTS[:3] if bench.quick else CONTEXTS
    sweeps = {dtype: _context_tasks(bench, contexts, dtype, PlainCache()) for dtype in bench.dtypes}
    packed = FourBitCache()
    sweeps[packed.rates(bench.half)] = _context_tasks(bench, contexts, bench.half, packed)
    return clock.curves(sweeps, budget_s)


def _context_tasks(bench: Workbench, contexts: Sequence[tuple[int, int]], dtype: str, form: CacheFormat) -> list[Task]:
    """Attention over caches of which the arena holds two or more."""
    spec = bench.spec(dtype)
    fields = form.fields(dtype, spec.head_dim)
    layouts = [CacheLayout(spec.num_kv_heads, fields, page_tokens_for(tokens)) for _, tokens in contexts]
    return [
        _context_task(bench, spec, layout, sequences, tokens)
        for layout, (sequences, tokens) in zip(layouts, contexts, strict=True)
        if 2 * layout.dense(layout.pages(tokens), sequences) <= bench.nbytes
    ]


def _context_task(bench: Workbench, spec: ModelSpec, layout: CacheLayout, sequences: int, tokens: int) -> Task:
    q = bench.view(spec.dtype, sequences, spec.num_heads, spec.head_dim)
    stretches = bench.stretches(layout.dense(layout.pages(tokens), sequences))
    lens = torch.tensor([tokens] * sequences, dtype=torch.int32, device=bench.device)
    nbytes = sequences * tokens * layout.token_bytes

    def run() -> None:
        ops.decode_attention(q, [cached_segment(layout, next(stretches), lens)])

    return Task(nbytes, nbytes, run)


def cached_segment(layout: CacheLayout, buffer: Tensor, lens: Tensor) -> Segment:
    """A resident home of the cache of sequences with `lens` [n] tokens, as memory/cache_homes.py lays it out."""
    return segment(page_fields(layout, buffer, len(lens)), lens)


def passes(bench: Workbench, clock: Clock, budget_s: float) -> Curve:
    """Bytes per second that norms, activations and residuals pass over, as plans count them, by those of a layer."""
    rows = PASSED_ROWS[:3] if bench.quick else PASSED_ROWS
    return clock.curve([_passes_task(bench, m) for m in rows], budget_s)


def _passes_task(bench: Workbench, rows: int) -> Task:
    """Norms, residuals and activation of the probe's attention and MLP: all but the products, which add the biases."""
    x, inner = bench.view(bench.half, rows, bench.hidden), bench.view(bench.half, rows, bench.ffn)
    norm = bench.view(bench.half, bench.hidden)
    plan = _one_batch(bench, bench.half, rows, 1)
    nbytes = plan.work(0, 1, 0, ATTENTION_STAGES).hidden_bytes + plan.work(0, 1 + ATTENTION_STAGES, 0).hidden_bytes

    def run() -> None:
        for _ in ("attention", "mlp"):
            x + ops.layer_norm(x, norm, norm)
        ops.ACTIVATIONS["relu"](inner)

    return Task(nbytes / 2, nbytes, run)


def _one_batch(bench: Workbench, dtype: str, prompt_len: int, sequences: int) -> Plan:
    """A plan of the layer: layers are embedding, attention, MLP, head."""
    return make_plan(
        bench.spec(dtype), Policy(sequences), Workload.uniform(prompt_len, 2, sequences, 1), host_is_apart=False
    )


# Memory and links


def memory_read(bench: Workbench, clock: Clock, budget_s: float) -> float:
    """Bytes per second at which all of the arena is summed."""
    numbers = bench.arena.buffer.view(torch.float32)
    return clock.rate(Task(bench.nbytes, bench.nbytes, numbers.sum), budget_s)


def copies_in_place(bench: Workbench, clock: Clock, budget_s: float) -> Curve:
    """Bytes per second copied from one place of the arena to another, by the bytes of a copy."""
    half = bench.nbytes // 2
    low, high = bench.arena.buffer[:half], bench.arena.buffer[half:]
    return clock.curve([_copy_task(low, high, n) for n in COPY_BYTES if n <= half], budget_s)


def _copy_task(source: Tensor, target: Tensor, nbytes: int) -> Task:
    """Copies of `nbytes` bytes to and from all over both."""
    starts = cycle(range(0, min(len(source), len(target)) - nbytes + 1, nbytes))

    def run() -> None:
        at = next(starts)
        target[at : at + nbytes].copy_(source[at : at + nbytes], non_blocking=True)

    return Task(nbytes, nbytes, run)


def links(bench: Workbench, pinned: Workbench, pageable: Workbench, clock: Clock, budget_s: float) -> dict[str, Curve]:
    """Bytes per second between a GPU's arena and the host's, by name of the link and bytes of a copy."""
    device, host, other = bench.arena.buffer, pinned.arena.buffer, pageable.arena.buffer
    bounce = host[:BOUNCE_BYTES]
    sizes = [n for n in COPY_BYTES if n <= len(host)]
    return clock.curves(
        {
            "h2d": [_copy_task(host, device, n) for n in sizes],
            "d2h": [_copy_task(device, host, n) for n in sizes],
            "h2d_pageable": [_bounced_task(other, bounce, device, n) for n in sizes],
            "d2h_pageable": [_copy_task(device, other, n) for n in sizes],
        },
        budget_s,
    )


def _bounced_task(source: Tensor, bounce: Tensor, target: Tensor, nbytes: int) -> Task:
    """Pageable bytes to the device as memory/weights.py takes them there: a piece at a time by a pinned buffer."""

    def run() -> None:
        for low in range(0, nbytes, len(bounce)):
            piece = source[low : min(low + len(bounce), nbytes)]
            current_stream(target.device).synchronize()
            staged = bounce[: len(piece)].copy_(piece)
            target[low : low + len(piece)].copy_(staged, non_blocking=True)

    return Task(nbytes, nbytes, run)


# Disk


@dataclass(frozen=True, slots=True)
class DiskRates:
    """Speeds of a directory's disk: bytes per second by the bytes of an operation, rows per second, and a table."""

    read: Curve
    write: Curve
    rows: float
    table: tuple[tuple[float, float, float], ...]  # bytes of an extent, threads, bytes per second read


def disk(folders: Folders, buffer: Tensor, *, quick: bool, budget_s: float) -> DiskRates:
    """Measure with a scratch file in `folders`; `buffer` [n] uint8 is what is read and written, pages of the host.

    Raises OSError with the bytes needed when the file does not fit.
    """
    size = 64 * MIB if quick else 512 * MIB
    clock = Clock(CPU, quick=quick)
    with closing(folders.scratch(size)) as file:
        with DiskQueue(folders.threads) as queue:
            for at in range(0, size, 16 * MIB):  # what was never written is read without the disk
                queue.write([Write(file, at, buffer[: 16 * MIB])])
            both = clock.curves(_disk_tasks(queue, file, buffer, quick=quick), budget_s / 2)
            rows = clock.rate(_rows_task(queue, file), budget_s / 20)
        table = tuple(_queue_rates(file, buffer, clock, budget_s / 3))
    return DiskRates(both["read"], both["write"], rows, table)


def _disk_tasks(queue: DiskQueue, file: Readable, buffer: Tensor, *, quick: bool) -> dict[str, list[Task]]:
    sizes = [n for n in (DISK_BYTES[:-1] if quick else DISK_BYTES) if n <= len(buffer)]
    return {
        "read": [_disk_task(queue, file, buffer[:n], write=False) for n in sizes],
        "write": [_disk_task(queue, file, buffer[:n], write=True) for n in sizes],
    }


def _disk_task(queue: DiskQueue, file: Readable, buffer: Tensor, *, write: bool) -> Task:
    """One operation of the buffer's size at a time, from the file's start to its end and again."""
    size = len(buffer)
    starts = cycle(range(0, file.size - size + 1, size))

    def run() -> None:
        if write:
            queue.write([Write(file, next(starts), buffer)])
        else:
            queue.read([Read(file, next(starts), buffer)])

    return Task(size, size, run)


def _rows_task(queue: DiskQueue, file: Readable, count: int = 1024) -> Task:
    """Rows at random places, as embeddings are looked up."""
    random = Random(0)
    places = [
        [random.randrange(file.size // TABLE_ROW_BYTES) * TABLE_ROW_BYTES for _ in range(count)] for _ in range(8)
    ]
    turns = cycle(places)
    return Task(count, count, lambda: queue.read_rows(file, next(turns), TABLE_ROW_BYTES))


def _queue_rates(file: Readable, buffer: Tensor, clock: Clock, budget_s: float) -> Iterator[tuple[float, float, float]]:
    """Bytes per second read by queues of other extents and numbers of threads."""
    whole = buffer[: min(len(buffer), file.size // 2, 64 * MIB)]
    each = budget_s / (len(EXTENT_BYTES) * len(DISK_THREADS))
    for extent in EXTENT_BYTES:
        for threads in DISK_THREADS:
            with DiskQueue(threads, extent) as queue:
                task = _disk_task(queue, file, whole, write=False)
                yield extent, threads, clock.curve([replace(task, size=1)], each).points[0][1]
