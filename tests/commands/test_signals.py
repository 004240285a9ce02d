"""Signals: the first one ends a command cleanly, whatever runs when it comes; a job then goes on as if it never was.

At more instants, from a job's first step to its last:
FLEXGEN_SIGNALS=40 python -m pytest -n 0 -s tests/commands/test_signals.py -k any_instant
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from batch_jobs import ROOT, Job, sampled
from click.testing import CliRunner

from flexgen_triton import LLM
from flexgen_triton.commands import generate as generate_command
from flexgen_triton.commands import run_batch
from flexgen_triton.commands.main import cli
from flexgen_triton.commands.progress import Display
from flexgen_triton.jobs.journal import Journal
from flexgen_triton.stopping import SAID, SIGNALS, Stop, Stopped, stoppable

INSTANTS = int(os.environ.get("FLEXGEN_SIGNALS", "2"))
LINES = 30
DROPS = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # a wait's Stopped, in a finaliser

pytestmark = pytest.mark.usefixtures("one_thread")


class Late:
    """Sends the process a signal while Python finalises it, where it drops exceptions."""

    def __init__(self, number: signal.Signals) -> None:
        self.number = number

    def __del__(self) -> None:
        signal.raise_signal(self.number)


@pytest.fixture(scope="module")
def offload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("offload")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, offload: Path, one_thread: None) -> dict[str, str]:
    """The answers of a job that nothing stopped."""
    job = Job(tmp_path_factory.mktemp("whole"), sampled(LINES), offload)
    job.done()
    return job.answers()


@pytest.fixture
def job(tmp_path: Path, offload: Path) -> Job:
    return Job(tmp_path, sampled(LINES), offload)


@pytest.fixture
def send(monkeypatch: pytest.MonkeyPatch):
    """Sends a signal from within a finaliser, when a function of this name is called for the nth time."""

    def at(owner: object, name: str, number: signal.Signals, nth: int = 1) -> None:
        function: Callable[..., Any] = getattr(owner, name)
        calls = [*[None] * (nth - 1), Late(number)]

        def call(*args: Any, **kwargs: Any) -> Any:
            if calls:
                calls.pop(0)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    return at


PLACES = {  # where the signal comes, and how many lines are done then at most
    "before the model": (run_batch, "fingerprint", 1, 0),
    "as it opens": (run_batch, "open_model", 1, 0),
    "while weights are loaded": (Display, "phase", 1, 0),
    "while lines are read": (LLM, "request", 7, 0),
    "at an answer": (Journal, "append", 5, LINES - 1),
}


@pytest.mark.parametrize(
    ("place", "number"),
    [
        pytest.param("before the model", signal.SIGINT, marks=DROPS),
        *((place, signal.SIGINT) for place in PLACES if place != "before the model"),
        ("at an answer", signal.SIGTERM),
        ("at an answer", signal.SIGHUP),
    ],
)
def test_a_signal_within_a_finaliser_stops_the_job_all_the_same(job, whole, send, monkeypatch, capfd, place, number):
    owner, name, nth, most = PLACES[place]
    send(owner, name, number, nth)
    result = job.run()
    monkeypatch.undo()
    assert result.exit_code == 128 + number, (result.output, result.exception)
    done = job.written()
    assert done <= most
    said = f"{done} of {LINES} lines are done; " if place != "before the model" else ""
    assert result.output == f"stopped: {said}the same command goes on\n"
    assert capfd.readouterr().err == SAID.decode()
    job.done()
    assert job.answers() == whole


@pytest.mark.parametrize("place", [pytest.param("as it opens", marks=DROPS), "in the middle"])
def test_generate_ends_with_one_line(offload, send, capfd, place):
    owner, name = {"as it opens": (generate_command, "open_model"), "in the middle": (LLM, "request")}[place]
    send(owner, name, signal.SIGINT)
    args = ["generate", "--gpu-batch-size", "2", "--offload-dir", str(offload), "--max-tokens", "50"]
    result = CliRunner().invoke(cli, [*args, "Return the", "Raise an exception if"])
    assert result.exit_code == 130 and result.output == "", (result.output, result.exception)
    assert capfd.readouterr().err == SAID.decode()


@contextmanager
def interrupted_when_ready() -> Iterator[None]:
    """Within, SIGINT comes a moment after the command has set its handler; how long it is loaded does not matter."""
    own, ended = signal.getsignal(signal.SIGINT), threading.Event()

    def send() -> None:
        while signal.getsignal(signal.SIGINT) is own and not ended.wait(0.01):
            pass
        if not ended.wait(0.2):
            os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield
    finally:
        ended.set()
        sender.join()


@pytest.mark.parametrize("whole", [False, True], ids=["lines", "whole"])
@pytest.mark.parametrize("is_open", [False, True], ids=["nobody writes", "nothing comes"])
def test_generate_ends_while_it_waits_for_prompts(tmp_path, capfd, is_open, whole):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = os.open(pipe, os.O_RDWR) if is_open else -1
    try:
        with interrupted_when_ready():
            result = CliRunner().invoke(cli, ["generate", "-f", str(pipe), *["--whole"][:whole]])
    finally:
        if is_open:
            os.close(writer)
    assert result.exit_code == 130 and result.output == "", (result.output, result.exception)
    assert capfd.readouterr().err == SAID.decode()


def test_a_job_ends_while_it_waits_for_standard_input(tmp_path, monkeypatch, capfd):
    reader, writer = os.pipe()
    with open(reader) as stream, open(writer, "w"):
        monkeypatch.setattr(sys, "stdin", stream)
        with interrupted_when_ready(), pytest.raises(SystemExit) as ended:
            run_batch.command.main(["-i", "-", "-o", str(tmp_path / "out.jsonl")], standalone_mode=False)
    assert ended.value.code == 130 and not list(tmp_path.iterdir())
    assert capfd.readouterr().err == SAID.decode() + "stopped: the same command goes on\n"


def test_ignored_signals_stay_ignored_and_others_get_their_handlers_back(capfd):
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGHUP, signal.SIGTERM)}
    own = signal.getsignal(signal.SIGINT)
    try:
        with stoppable() as stop:
            signal.raise_signal(signal.SIGHUP)  # as nohup has it
            signal.raise_signal(signal.SIGTERM)
            stop.check()
            assert capfd.readouterr().err == ""
            signal.raise_signal(signal.SIGINT)
            assert stop.requested == signal.SIGINT
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            with pytest.raises(Stopped):
                stop.check()
        assert signal.getsignal(signal.SIGINT) is own
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def wait(stop: Stop, event: Callable[[], object]) -> str:
    """Note how far a wait comes in which something happens."""
    reached = "nothing"
    try:
        with stop.at_once():
            reached = "the event"
            event()
            reached = "the end"
    except Stopped:
        return reached
    return "what follows"


@DROPS
def test_a_wait_ends_at_once_and_work_ends_where_it_asks():
    with stoppable() as stop:
        assert wait(stop, lambda: None) == "what follows"
        assert wait(stop, lambda: signal.raise_signal(signal.SIGINT)) == "the event"
        assert wait(stop, lambda: None) == "nothing"  # it is to stop
    with stoppable() as stop:
        assert wait(stop, lambda: Late(signal.SIGINT) and None) == "the end"  # which dropped what was raised
    with stoppable() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested == signal.SIGINT
        with pytest.raises(Stopped):
            stop.check()


@pytest.mark.parametrize("second", SIGNALS, ids=lambda number: number.name)
def test_a_second_signal_ends_the_process_at_once(second):
    code = f"""
        import os, signal, time
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        from flexgen_triton.stopping import stoppable
        with stoppable():
            signal.raise_signal(signal.SIGTERM)
            print("still here", flush=True)
            signal.raise_signal({int(second)})
            print("and here")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == -second and done.stdout == "still here\n"
    assert done.stderr == SAID.decode()


def test_a_job_stopped_at_any_instant_ends_as_if_it_never_was(tmp_path, job, whole):
    """In processes of their own, at instants spread over what an uninterrupted job takes."""
    took, seen = 2.0, []
    if INSTANTS > 2:
        (tmp_path / "timed").mkdir()
        took = job_seconds(Job(tmp_path / "timed", sampled(LINES), job.args[7]))
    for n in range(INSTANTS):
        number = SIGNALS[n % len(SIGNALS)]
        process = job.start(ready=True)
        assert process.stdout and process.stdout.readline() == "ready\n"
        time.sleep(0.02 + took * n / INSTANTS)
        process.send_signal(number)
        output, errors = process.communicate(timeout=100)
        done = job.written()
        seen.append((number.name, process.returncode, done))
        assert output == "" and "Traceback" not in errors and "ignored" not in errors, errors
        if process.returncode == 128 + number:
            first, last = errors.splitlines()
            assert first == SAID.decode().strip()
            assert last in (
                "stopped: the same command goes on",
                f"stopped: {done} of {LINES} lines are done; the same command goes on",
            )
        else:
            assert done == LINES and process.returncode in (0, -number), (process.returncode, errors)
            job.output.unlink()  # from its beginning once more
    print(f"the job takes {took:.1f} s; signal, exit code, lines done: {seen}")
    job.done()
    assert job.answers() == whole


def job_seconds(job: Job) -> float:
    """Seconds from the moment a job's modules are loaded to its end."""
    process = job.start(ready=True)
    assert process.stdout and process.stdout.readline() == "ready\n"
    begun = time.monotonic()
    assert process.communicate(timeout=100) and process.returncode == 0
    return time.monotonic() - begun
