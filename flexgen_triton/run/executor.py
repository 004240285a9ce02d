"""Runs a schedule: every op, in issue order, on its lane, behind what it must wait for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from ..memory.lanes import Lanes
from ..plan.link import Linker, Span
from ..plan.schedule import Generator, Lane, Op, Program

Action = Callable[[Op], None]
HOST_LANES = (Lane.DISK_IN, Lane.DISK_OUT)


def lanes_of(program: Program) -> tuple[Lane, ...]:
    """The lanes a program uses: no copies, no link."""
    return tuple(Lane) if program.copies else (*HOST_LANES, Lane.COMPUTE)


def execute(
    program: Program,
    actions: Mapping[str, Action],
    *,
    device: torch.device,
    alive: Callable[[int, int], bool] | None = None,
) -> list[Span]:
    """Run `program`, looking each op's action up by name; returns when every op has finished.

    `alive(i, k)` is asked when all computation of GPU batch k before token step i has finished; None never asks.
    The first error of any op stops the run and is raised with that op in its notes; no thread is left either way.
    """
    spans: list[Span] = []
    streams = [lane for lane in Lane if lane not in HOST_LANES]
    lanes = Lanes(
        lanes_of(program),
        device=device,
        streams=streams,
        on_done=lambda op, start, end: spans.append(Span(op, start, end)),
    )
    computed: dict[int, int] = {}  # GPU batch -> position of its latest computation

    def still_alive(i: int, k: int) -> bool:
        if alive is None or i == 0:
            return True
        lanes.wait(Lane.COMPUTE, computed[k])
        return alive(i, k)

    linker = Linker(serial=program.serial)
    try:
        for op in Generator(program, still_alive):
            position = lanes.submit(op.lane, partial(actions[op.name], op), linker.link(op), op)
            if op.lane is Lane.COMPUTE:
                computed[op.k] = position
        lanes.finish()
    finally:
        lanes.close()
    return spans
