"""`python -m flexgen_triton run-batch`: answer a file of requests in OpenAI's batch format, whatever interrupts it.

Owns the command's input, output and words; the job is jobs/job.py.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

import click

from ..jobs.job import Job, files_digest, formats, survey
from ..jobs.journal import Answers, Journal, Passing
from ..jobs.sidecar import JournalError
from ..models.locate import DEMO, choose_dtype, find_model
from ..os_errors import reason
from ..stopping import Stop, Stopped, end_unread, stoppable
from . import progress
from .options import LOG_JSON, Command, base_policy, is_by_hand, model_options, open_model
from .progress import Display

STANDARD = Path("-")  # as an input or an output: the process's own


def fingerprint(context: click.Context, options: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that must be the same for a job to go on; formats only where no automatic policy may choose them."""
    source = find_model(options["model"] or DEMO, options["path"])
    found = {
        "model": source.name,
        "model's files": "none" if source.directory is None else files_digest(source.directory),
        "dtype": choose_dtype(options["dtype"], source),
        "seed": options["seed"],
    }
    if options["allow"] and not is_by_hand(context, options["policy"]):
        return found
    return found | formats(base_policy(options))


def open_input(source: Path, stop: Stop) -> BinaryIO:
    """The input, which is read more than once; what comes on standard input is put in a file without a name first.

    Raises JournalError, OSError, and Stopped.
    """
    if source == STANDARD:
        return spool(opened(sys.stdin, "standard input"), stop)
    if source.is_dir():
        raise JournalError(f"{source} is a directory; name a file of requests")
    if source.exists() and not source.is_file():
        raise JournalError(
            f"{source} is no ordinary file; a job that can go on reads its input more than once, so write it to a "
            "file, or give -i - and the requests on standard input"
        )
    return source.open("rb")


def spool(stream: BinaryIO, stop: Stop) -> BinaryIO:
    """Copy all of a stream to a temporary file that has no name."""
    file = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115
    try:
        with stop.at_once():
            shutil.copyfileobj(stream, file)
        file.seek(0)
    except OSError as error:
        file.close()
        raise JournalError(
            f"standard input cannot be kept in {tempfile.gettempdir()}: {reason(error)}; choose another directory by "
            "TMPDIR, or write the requests to a file and name it"
        ) from error
    except BaseException:
        file.close()
        raise
    return file


def opened(stream: TextIO | None, name: str) -> BinaryIO:
    """Standard input or output, for bytes. Raises ValueError where the process was started with it closed."""
    if stream is None:
        raise ValueError(f"{name} is closed; open it, or name a file")
    return stream.buffer


@contextmanager
def open_output(output: Path, begun_with: Mapping[str, Any]) -> Iterator[Answers]:
    """The output: a journal, or standard output, of which nothing is kept. Raises what they raise."""
    if output == STANDARD:
        click.echo("answers go to standard output and are not kept: a job that is stopped begins anew", err=True)
        yield Passing(opened(sys.stdout, "standard output"), "standard output")
        return
    with Journal(output, begun_with) as journal:
        yield journal


def check_apart(file: BinaryIO, output: Path) -> None:
    """Raise JournalError where the answers would be added to the requests."""
    with suppress(OSError):  # what cannot be asked is not the input
        to = os.fstat(1) if output == STANDARD else output.stat()
        if os.path.samestat(os.fstat(file.fileno()), to):
            name = "standard output" if output == STANDARD else output
            raise JournalError(f"{name} is the input too; name another output")


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "-i",
    "--input-file",
    "source",
    required=True,
    type=click.Path(path_type=Path),
    help="Requests, a line each, in OpenAI's batch format; - is standard input, which is read to its end first.",
)
@click.option(
    "-o",
    "--output-file",
    "output",
    required=True,
    type=click.Path(path_type=Path),
    help="Answers are added here, a line each, as they come; OUTPUT.job beside it says whose they are. - is standard "
    "output, of which nothing is kept to go on with.",
)
@model_options
@LOG_JSON
@click.pass_context
def command(context: click.Context, /, source: Path, output: Path, log_json: bool, **options: Any) -> None:
    """Answer a file of requests in OpenAI's batch format.

    A job that was stopped in any way, even by a power cut, goes on when the same command is given again: lines that
    are answered stay as they are. A line that cannot be answered gets an error in its place and stops nothing: the exit
    code is 0 once every line has its answer or its error, and the last sentence says how many are errors.
    """
    try:
        with stoppable() as stop:
            click.echo(answer_file(context, source, output, options, stop, log_json=log_json), err=True)
    except Stopped as stopped:
        again = "begins anew" if output == STANDARD else "goes on"
        sentence = "; ".join([*getattr(stopped, "__notes__", ()), f"the same command {again}"])
        click.echo(f"stopped: {sentence}", err=True)
        raise SystemExit(stopped.exit_code) from None
    except BrokenPipeError:
        end_unread()


def answer_file(
    context: click.Context, source: Path, output: Path, options: Mapping[str, Any], stop: Stop, *, log_json: bool
) -> str:
    """Answer what is left of the input; returns what there is to say in the end.

    Raises JournalError, what the model raises, and Stopped, with a note that says how far the job has come.
    """
    with open_input(source, stop) as file:
        check_apart(file, output)
        with stop.at_once():  # a model may have to be fetched
            begun_with = fingerprint(context, options)
        with open_output(output, begun_with) as answers:
            total, left = survey(file, answers, stop.check)
            lines = f"all {total} lines of {'standard input' if source == STANDARD else source} are done"
            where = "" if output == STANDARD else f": {output}"
            if not left:
                return f"{lines}{where}"
            file.seek(0)
            with Display(total, log_json=log_json) as display, noted(answers, total):
                job = run_job(context, file, answers, options, stop, display, total)
    failed = f", {job.failed} of them with an error" if job.failed else ""
    figures = progress.closing_text(progress.figures(job.totals.sequences, job.totals))
    return f"{figures}\n{lines}, {left} in this run{failed}{where}"


def run_job(
    context: click.Context,
    file: BinaryIO,
    answers: Answers,
    options: Mapping[str, Any],
    stop: Stop,
    display: Display,
    total: int,
) -> Job:
    """Open the model and answer what is left; the job says how it went."""
    with open_model(context, options, display.phase, stop.check) as llm:
        stop.check()
        job = Job(llm, answers, options["seed"], stop.check)
        job.run(file, lambda: display.update(answers.done, llm.totals, total))
        return job


@contextmanager
def noted(answers: Answers, total: int) -> Iterator[None]:
    """Note on an error that ends the job how far it has come, unless the error says so itself."""
    try:
        yield
    except JournalError:
        raise
    except BaseException as error:
        error.add_note(f"{answers.done} of {total} lines are done")
        raise
