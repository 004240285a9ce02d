"""Runs a schedule: every op, in issue order, on its lane, behind what it must wait for."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from functools import partial

import torch

from ..memory.lanes import Check, Lanes
from ..plan.generator import Generator as Issue
from ..plan.link import Linker, Span
from ..plan.schedule import Lane, Op, Program

Action = Callable[[Op], int | None]  # returns the bytes moved, None where they are as planned
HOST_LANES = (Lane.DISK_IN, Lane.DISK_OUT, Lane.HOST_ATTENTION)  # without a stream


def open_lanes(device: torch.device, *, host_is_apart: bool, check: Check | None = None) -> Lanes:
    """The lanes of an engine; without those of the link where host memory is the device's.

    `check` is called whenever an op is issued, on the thread that issues it; what it raises ends the run.
    """
    names = tuple(Lane) if host_is_apart else (Lane.DISK_IN, Lane.DISK_OUT, Lane.COMPUTE)
    return Lanes(names, device=device, streams=[lane for lane in Lane if lane not in HOST_LANES], check=check)


def execute(
    program: Program,
    actions: Mapping[str, Action],
    lanes: Lanes,
    *,
    alive: Callable[[int, int], bool] | None = None,
) -> Generator[None, None, list[Span]]:
    """Run `program` on idle `lanes`, looking each op's action up by name.

    Yields whenever an op was issued, returns when all finished. `alive(i, k)` is asked when all computation of GPU
    batch k before token step i has finished; None never asks. The first error of any op stops the lanes and is raised
    with that op in its notes.
    """
    spans: list[Span] = []
    moved: dict[int, int] = {}  # by the identity of an op, until it is done

    def act(op: Op) -> None:
        nbytes = actions[op.name](op)
        if nbytes is not None and nbytes != op.bytes:
            moved[id(op)] = nbytes

    def on_done(op: Op, start: float, end: float) -> None:
        nbytes = moved.pop(id(op), op.bytes)
        spans.append(Span(op if nbytes == op.bytes else replace(op, bytes=nbytes), start, end))

    lanes.restart(on_done)
    computed: dict[int, int] = {}  # GPU batch -> position of its latest computation

    def still_alive(i: int, k: int) -> bool:
        if alive is None or i == 0:
            return True
        lanes.wait(Lane.COMPUTE, computed[k])
        return alive(i, k)

    linker = Linker(serial=program.serial)
    for op in Issue(program, still_alive):
        position = lanes.submit(op.lane, partial(act, op), linker.link(op), op)
        if op.lane is Lane.COMPUTE:
            computed[op.k] = position
        yield
    lanes.finish()
    return spans
