"""The means of measuring a machine: a clock, and memory that no cache holds to take operands from.

Does not know what is timed. Every operand is a view of an arena filled once with numbers of ordinary size, so that no
operation meets a zero page, an infinity or a denormal number.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from statistics import median

import torch
from torch import Tensor

from ..memory.arena import Arena, host_available
from ..memory.device import gpu_capability, gpu_memory, synchronize
from ..models.family import model_spec, probe_config
from ..plan.hardware import Curve
from ..plan.spec import ModelSpec

CPU = torch.device("cpu")
MIB = 1 << 20
TIMED_S = 1e-3  # shorter runs are timed several at once
SLOWEST_S = 1.0  # larger sizes than the first that takes so long are left out


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
