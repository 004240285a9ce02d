"""Ctrl-C by phase: while a command is only being loaded it ends the process at once, later it is a KeyboardInterrupt.

An exception raised in the middle of an import prints a traceback, or is swallowed where the import forgives one.
Importing this changes nothing. It imports nothing that takes time, for it must come first.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT


def loading() -> None:
    """Let Ctrl-C end the process from here on, with the exit code that shells give it; not where it is ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit)


def loaded() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again from here on, so that open files and threads get closed."""
    if signal.getsignal(signal.SIGINT) is _exit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _exit(number: int, frame: FrameType | None) -> None:
    os._exit(INTERRUPTED)
