"""Resources of an engine and of each of its runs: used by one process only, and freed once.

Knows lanes, buffers, weights and the disk's threads; does not know what they are used for.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import TypeVar

from ..memory.buffers import Buffers
from ..memory.disk import DiskQueue
from ..memory.lanes import Lanes
from ..memory.weights import Weights
from ..plan.footprint import WORKSPACE
from ..plan.placement import Tier
from ..plan.plan import Plan

_T = TypeVar("_T")

CLOSED = "the model is closed; make a new LLM"
ENDED = "the run has ended"
FORKED = (
    "a model was at work in the process that this one was forked from, and threads do not survive a fork; fork before "
    "the first model is loaded, or start the process by spawn"
)


class ClosedError(ValueError):
    """Use of a model that was closed, or of a run whose model was."""


class ForkedError(ValueError):
    """Use of a model in a process that was forked from one in which a model was at work."""


@cache
def _working_process() -> int:
    """The process in which this was first called."""
    return os.getpid()


def check_process() -> None:
    """Raise ForkedError in a fork of a process that called this; call it before anything is computed.

    OpenMP has no threads in a fork of a process that used it: torch then hangs, and numba ends the process.
    """
    if _working_process() != os.getpid():
        raise ForkedError(FORKED)


class Run:
    """The lanes and the buffers of one run.

    The run uses its buffers `at_work`. Whoever closes it stops the lanes, and frees the buffers unless it is at work in
    another thread: it then meets an error at its next op and frees them itself.
    """

    def __init__(self, lanes: Lanes, check: Callable[[], None]) -> None:
        """`check` raises where the run may not go on."""
        self.lanes, self._check = lanes, check
        self._buffers: deque[Buffers] = deque()  # one, or none
        self._workspace = 0  # of the plan that the buffers were made for
        self._is_at_work = False
        self._is_closed = False

    @property
    def buffers(self) -> Buffers:
        return self._buffers[-1]

    def holds(self, plan: Plan) -> bool:
        """Return True if the buffers, and the memory left beside them, are large enough for the plan."""
        if not self._buffers or not self.buffers.sizes.hold(plan):
            return False
        return plan.footprint.of(WORKSPACE, Tier.GPU) <= self._workspace

    def take(self, buffers: Buffers, workspace: int = 0) -> None:
        """Own buffers, made for a plan with this workspace."""
        self._buffers.append(buffers)
        self._workspace = workspace

    def drop(self) -> None:
        """Free the buffers."""
        for buffers in _popped(self._buffers):
            buffers.close()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Allow the use of buffers inside. Raises ClosedError or ForkedError where they may not be used."""
        self._is_at_work = True
        try:
            self._check()
            yield
        finally:
            self._is_at_work = False
            if self._is_closed:
                self.drop()

    def close(self, why: str) -> None:
        """Stop the lanes, whose users are raised ClosedError with this sentence, and free the buffers."""
        self._is_closed = True
        self.lanes.close(ClosedError(why))
        if not self._is_at_work:
            self.drop()


class Holdings:
    """Weights, the disk's threads and the runs under way; `close` ends the runs and frees all, from any thread.

    In a fork of its process there is nothing to free and `close` does nothing: the threads are not there, a lock may be
    held by one of them for ever, and memory and files are the fork's own copies, which end with it.
    """

    def __init__(self, weights: Weights, disk: DiskQueue) -> None:
        self._runs: list[Run] = []
        self._closers: deque[Callable[[], None]] = deque([disk.close, weights.close])
        self._process = os.getpid()
        self._closed: str | None = None

    @property
    def is_busy(self) -> bool:
        """True while a run is under way, be it between two of its answers."""
        return bool(self._runs)

    def check(self) -> None:
        """Raise ClosedError or ForkedError where these may not be used."""
        if self._process != os.getpid():
            raise ForkedError(FORKED)
        if self._closed is not None:
            raise ClosedError(self._closed)

    @contextmanager
    def run(self, open_lanes: Callable[[], Lanes]) -> Iterator[Run]:
        """A run, closed at the end. Raises as `check` does."""
        self.check()
        run = Run(open_lanes(), self.check)
        self._runs.append(run)
        try:
            self.check()  # another thread may have closed all but this run, which it did not see
            yield run
        finally:
            if self._process == os.getpid():
                run.close(ENDED)
                self._runs.remove(run)

    def close(self, why: str = CLOSED) -> None:
        """Free everything; runs that are under way raise ClosedError, which says why."""
        if self._process != os.getpid():
            return
        self._closed = self._closed or why
        for run in list(self._runs):
            run.close(why)
        for close in _popped(self._closers):
            close()


def _popped(held: deque[_T]) -> Iterator[_T]:
    """Take out all that is held, from the right: two threads never get the same one."""
    with suppress(IndexError):
        while True:
            yield held.pop()
