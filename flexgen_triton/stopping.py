"""Stopping early: on a signal, which the handler notes and the program asks for, or because nobody reads any more.

An exception that a handler raises lands in whatever runs just then: inside a `__del__` Python prints and drops it, and
halfway through an append it tears what was to be one step. So the first signal only sets a flag, and says so; `check`,
called at every line read and every op issued, raises `Stopped`. A second signal ends the process at once.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAID = b"stopping at the next step; a second signal ends the process at once\n"
STDERR = 2  # the descriptor: of all ways to write, a handler may only use the system's own


class Stopped(KeyboardInterrupt):
    """A signal asked the program to stop; `exit_code` is the one that shells give a program that a signal ended."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number


class Stop:
    """A signal's request that the program stop; `requested` is the signal's number, None before it."""

    def __init__(self) -> None:
        self.requested: int | None = None
        self._raises = False

    def check(self) -> None:
        """Raise Stopped once a signal has come."""
        if self.requested is not None:
            raise Stopped(self.requested)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise Stopped right at a signal inside, where the program waits for others, a terminal or a network."""
        self.check()
        self._raises = True
        try:
            self.check()  # it may have come just before
            yield
        finally:
            self._raises = False
        self.check()  # what was raised may have been dropped

    def end_wait(self) -> None:
        """Raise Stopped within `at_once`; for the handler."""
        if self._raises:
            self._raises = False
            self.check()


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Let the first SIGINT, SIGTERM or SIGHUP ask to stop, and a second one end the process; ignored ones stay so."""
    stop = Stop()
    said = b"\n" + SAID if os.isatty(STDERR) else SAID  # a terminal shows ^C, or half a line of text

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.requested = number
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        with suppress(OSError):
            os.write(STDERR, said)
        stop.end_wait()

    ignored = [each for each in SIGNALS if signal.getsignal(each) is signal.SIG_IGN]  # as nohup and & do
    before = {each: signal.getsignal(each) or signal.SIG_DFL for each in SIGNALS if each not in ignored}
    try:
        for each in before:
            signal.signal(each, on_signal)
        yield stop
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def end_unread() -> NoReturn:
    """End without a word, as programs do whose output nobody reads any more (`| head`)."""
    sys.stdout, sys.stderr = io.StringIO(), io.StringIO()  # what is left in the others cannot be written at exit
    raise SystemExit(128 + signal.SIGPIPE)
