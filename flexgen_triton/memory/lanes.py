"""Lanes: in-order queues of work on worker threads, each with a CUDA stream where there is one.

Work is enqueued and an event recorded on a lane with a stream, and run on a lane without one. Knows threads, streams
and events; does not know what the work is.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch

from .device import Event, Stream, current_stream, new_stream, on_stream, record

LaneName = Hashable
LaneWait = tuple[LaneName, int]  # a lane and the position of one of its pieces of work
OnDone = Callable[[Any, float, float], None]  # tag, and the seconds at which it began and ended
Check = Callable[[], None]

CHECK_S = 0.1  # between two checks of whoever waits


@dataclass(frozen=True, slots=True)
class Work:
    """One piece of work: what to call, what to wait for on other lanes, and the tag its times are reported under."""

    run: Callable[[], None]
    waits: Sequence[LaneWait]
    tag: Any


class LaneStoppedError(RuntimeError):
    """Raised to whoever still waits on lanes that were closed."""


class _Lane:
    """State of one lane; its worker is the only writer, under the lanes' lock."""

    def __init__(self, name: LaneName, stream: Stream | None) -> None:
        self.name, self.stream = name, stream
        self.queue: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self.submitted = 0
        self.done = 0  # pieces run, or enqueued on the stream
        self.events: dict[int, Event] = {}
        self.thread: threading.Thread | None = None

    def event(self, position: int) -> Event:
        """The event behind that work, or, of work so old that its event was dropped, the oldest that is kept."""
        return self.events.get(position) or next(iter(self.events.values()))


class Lanes:
    """A set of lanes that wait for each other by position. The first error stops them all and is raised to the user.

    `on_done(tag, start, end)` is called with seconds since `restart`, on the lane's thread for host lanes and from
    `finish` for streams. At most `window` pieces of work are outstanding; `submit` blocks beyond that. `check` is
    called by `submit`, `wait` and `finish`, on the thread that calls them, at the least every CHECK_S seconds while
    they wait for a lane; what it raises, they raise. A context manager, which closes them.
    """

    def __init__(
        self,
        names: Iterable[LaneName],
        *,
        device: torch.device,
        streams: Iterable[LaneName] = (),
        on_done: OnDone = lambda tag, start, end: None,
        check: Check | None = None,
        window: int = 1024,
    ) -> None:
        self._device, self._window, self._check = device, window, check
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._outstanding = 0
        with_stream = set(streams) if device.type == "cuda" else set()
        self._lanes = {n: _Lane(n, new_stream(device) if n in with_stream else None) for n in names}
        self._stream_times: list[tuple[Any, Event, Event]] = []
        self._with_stream = bool(with_stream)
        self.restart(on_done)
        for lane in self._lanes.values():
            lane.thread = threading.Thread(target=self._work, args=(lane,), name=f"lane-{lane.name}", daemon=True)
            lane.thread.start()

    def restart(self, on_done: OnDone) -> None:
        """Count work and seconds anew, and report to `on_done`; what was submitted must have finished.

        Threads stay, so that rounds which follow each other share theirs: a new thread starts its own team of OpenMP
        threads and may get its own heap, which keeps what others would use (60 MB more after 20 rounds of the demo).
        """
        with self._changed:
            self._raise_error()
            assert not self._outstanding, f"{self._outstanding} pieces of work are outstanding"
            for lane in self._lanes.values():
                lane.submitted = lane.done = 0
                lane.events.clear()
            self._on_done = on_done
            self._base = record(current_stream(self._device)) if self._with_stream else None
            self._start = time.perf_counter()

    def submit(self, name: LaneName, run: Callable[[], None], waits: Sequence[LaneWait], tag: Any) -> int:
        """Queue work on a lane behind what is there; returns its position. Raises the first error of any lane."""
        if self._check is not None:
            self._check()
        lane = self._lanes[name]
        with self._changed:
            self._wait_for(lambda: self._outstanding < self._window)
            self._outstanding += 1
            position = lane.submitted
            lane.submitted += 1
        lane.queue.put(Work(run, waits, tag))
        return position

    def wait(self, name: LaneName, position: int) -> None:
        """Block until that piece of work has been run (on a stream: has finished)."""
        lane = self._lanes[name]
        with self._changed:
            self._wait_for(lambda: lane.done > position)
        if lane.stream is not None:
            lane.event(position).synchronize()

    def finish(self) -> None:
        """Wait for everything submitted; raises the first error."""
        with self._changed:
            self._wait_for(lambda: self._outstanding == 0)
        for lane in self._lanes.values():
            if lane.stream is not None:
                lane.stream.synchronize()
        for tag, start, end in self._stream_times:
            assert self._base is not None
            self._on_done(tag, self._base.elapsed_time(start) / 1e3, self._base.elapsed_time(end) / 1e3)
        self._stream_times.clear()

    def close(self, error: BaseException | None = None) -> None:
        """Stop every lane after its current piece of work and join the threads; who still waits is raised `error`.

        From any thread, a lane's own too, which then ends a little later.
        """
        with self._changed:
            self._error = self._error or error or LaneStoppedError("the lanes were closed")
            self._changed.notify_all()
        for lane in self._lanes.values():
            lane.queue.put(None)
        for lane in self._lanes.values():
            assert lane.thread is not None
            if lane.thread is not threading.current_thread():
                lane.thread.join()
            if lane.stream is not None:
                lane.stream.synchronize()  # nothing may still read or write memory that is about to be freed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _wait_for(self, is_so: Callable[[], bool]) -> None:
        """Wait, on a caller's thread, until it is so; raises the first error of any lane, and what `check` raises."""
        while not self._changed.wait_for(lambda: self._error or is_so(), CHECK_S if self._check else None):
            assert self._check is not None
            self._check()
        self._raise_error()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self, lane: _Lane) -> None:
        while (work := lane.queue.get()) is not None:
            try:
                if not self._await(lane, work.waits):
                    continue  # stopped: drain the queue
                self._run(lane, work)
            except BaseException as error:  # whatever it is, it belongs to the caller of submit, wait or finish
                error.add_note(f"in {work.tag} on lane {getattr(lane.name, 'value', lane.name)}")
                with self._changed:
                    self._error = self._error or error
                    self._changed.notify_all()

    def _await(self, lane: _Lane, waits: Sequence[LaneWait]) -> bool:
        """Wait until the work of other lanes was issued, then order this lane behind it; False when stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or all(self._lanes[n].done > p for n, p in waits))
            if self._error:
                return False
        for name, position in waits:
            other = self._lanes[name]
            if other.stream is None:
                continue
            if lane.stream is not None:
                lane.stream.wait_event(other.event(position))
            else:
                other.event(position).synchronize()
        return True

    def _run(self, lane: _Lane, work: Work) -> None:
        if lane.stream is None:
            start = time.perf_counter()
            work.run()
            self._on_done(work.tag, start - self._start, time.perf_counter() - self._start)
            self._done(lane, None)
            return
        began = record(lane.stream)
        with on_stream(lane.stream):
            work.run()
        ended = record(lane.stream)
        self._stream_times.append((work.tag, began, ended))
        self._done(lane, ended)

    def _done(self, lane: _Lane, event: Event | None) -> None:
        with self._changed:
            if event is not None:
                lane.events[lane.done] = event
                lane.events.pop(lane.done - 4 * self._window, None)
            lane.done += 1
            self._outstanding -= 1
            self._changed.notify_all()
