"""`python -m flexgen_triton generate`: complete prompts from the command line, a file or standard input."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from ..sequences.params import SamplingParams
from ..stopping import Stop, Stopped, end_unread, stoppable
from .options import LOG_JSON, Command, model_options, open_model, sampling_options, sampling_params
from .progress import Display, closing_text, figures

if TYPE_CHECKING:
    from ..llm import LLM
    from ..sequences.outputs import RequestOutput
    from ..sequences.translator import PreparedPrompt

MAX_ERRORS = 5  # that are told one by one


class Prompts:
    """Prompts one after the other, checked as they are read; `count` of them so far, all of them once `is_read`.

    `errors` names those that cannot be run.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.count, self.is_read = 0, False
        self.errors: list[str] = []

    def prepared(self, llm: LLM, params: SamplingParams) -> Iterator[PreparedPrompt]:
        """Yield the prompts as `LLM.stream` takes them; note in `errors` those that are refused."""
        for text in self._texts:
            self.count += 1
            try:
                yield llm.request(text, params)
            except ValueError as error:
                self.errors.append(f"prompt {self.count} ({_start(text)!r}): {error}")
        self.is_read = True


def _start(text: str, width: int = 40) -> str:
    return text if len(text) <= width else f"{text[:width]}..."


def read_prompts(arguments: Sequence[str], file: Path | None, stop: Stop, *, whole: bool) -> Iterator[str]:
    """The prompts of the arguments, else of the file, else of standard input: a line each, or (`whole`) one in all.

    Raises ValueError where they are given twice, or are no text; OSError; and Stopped, also while it waits for them.
    """
    if arguments and (file or whole):
        raise ValueError(f"prompts are given as arguments; {'-f' if file else '--whole'} is for those that are not")
    if arguments:
        yield from arguments
        return
    if file is None and sys.stdin is not None and sys.stdin.isatty():
        click.echo(f"prompts, {'ended' if whole else 'one a line, ended'} by Ctrl-D:", err=True)
    with _open(file, stop) as stream:
        try:
            if whole:
                with stop.at_once():
                    text = stream.read()
                yield text.removesuffix("\n")
                return
            for line in _lines(stream, stop):
                if line.strip():
                    yield line.rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file or 'standard input'} is no UTF-8 text: {error}") from error


def _open(file: Path | None, stop: Stop) -> AbstractContextManager[TextIO]:
    """The file, or standard input, which is not closed."""
    if file is not None:
        with stop.at_once():  # a pipe is open when somebody writes
            return file.open(encoding="utf-8")
    if sys.stdin is None:
        raise ValueError("standard input is closed; give prompts as arguments or with -f FILE")
    return nullcontext(sys.stdin)


def _lines(stream: TextIO, stop: Stop) -> Iterator[str]:
    while True:
        with stop.at_once():
            line = stream.readline()
        if not line:
            return
        yield line


def in_order(outputs: Iterable[RequestOutput]) -> Iterator[list[RequestOutput]]:
    """Finished outputs in the order of the prompts, those that are due together; what ends early waits for its turn."""
    waiting: dict[int, RequestOutput] = {}
    due = 0
    for output in outputs:
        waiting[output.request_id] = output
        ready = []
        while due in waiting:
            ready.append(waiting.pop(due))
            due += 1
        if ready:
            yield ready


def pieces(outputs: Iterable[RequestOutput], stop: Sequence[str]) -> Iterator[tuple[str, RequestOutput]]:
    """Yield the text that each output adds; a tail that may begin a stop string waits for the next output."""
    told = 0
    for output in outputs:
        text = output.outputs[0].text if output.outputs else ""
        end = len(text) if output.finished else max(_safe_length(text, stop), told)
        yield text[told:end], output
        told = end


def _safe_length(text: str, stop: Sequence[str]) -> int:
    """Length of the text up to where a stop string may have begun."""
    begun = (n for s in stop for n in range(1, len(s)) if text.endswith(s[:n]))
    return len(text) - max(begun, default=0)


def as_text(output: RequestOutput) -> str:
    """Each completion after its prompt, and an empty line."""
    prompt = click.style(output.prompt or "", bold=True)
    return "".join(f"{prompt}{completion.text}\n\n" for completion in output.outputs)


def as_json(output: RequestOutput) -> str:
    """A line of JSON for each completion, or for what went wrong."""
    failed = {"prompt": output.prompt, "text": None, "finish_reason": "error", "error": output.error}
    found = [{"prompt": output.prompt, "text": c.text, "finish_reason": c.finish_reason} for c in output.outputs]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in found or [failed])


def write_one(llm: LLM, prompts: Prompts, params: SamplingParams, display: Display) -> list[str]:
    """Write one prompt's completion as its tokens come; returns what went wrong."""
    outputs = llm.stream(prompts.prepared(llm, params), partial=True)
    errors: list[str] = []
    for piece, output in pieces(outputs, params.stop):
        if sys.stdout.isatty():
            display.hide()  # nothing may be drawn below a line that is not ended
        click.echo(piece, nl=output.finished)
        display.update(int(output.finished), llm.totals, total=1)
        errors += [output.error] if output.error else []
    return errors


def write_all(llm: LLM, prompts: Prompts, params: SamplingParams, display: Display, *, is_json: bool) -> list[str]:
    """Write every prompt's completions when it is its turn; returns what went wrong."""
    errors: list[str] = []

    def finished() -> Iterator[RequestOutput]:
        for output in llm.stream(prompts.prepared(llm, params)):
            total = prompts.count * params.n if prompts.is_read else None
            display.update(llm.totals.sequences, llm.totals, total)
            yield output

    for ready in in_order(finished()):
        with display.aside() if sys.stdout.isatty() else nullcontext():
            click.echo("".join((as_json if is_json else as_text)(output) for output in ready), nl=False)
        errors += [f"prompt {o.request_id + 1}: {o.error}" for o in ready if o.error]
    return errors


@click.command(
    "generate", cls=Command, imports=("flexgen_triton.llm",), context_settings={"help_option_names": ["-h", "--help"]}
)
@click.argument("prompts", nargs=-1)
@click.option("-f", "--file", type=click.Path(path_type=Path), help="A prompt a line.")
@click.option("--whole", is_flag=True, help="All of the file, or of standard input, is one prompt.")
@click.option(
    "--json", "is_json", is_flag=True, help="A line of JSON for each completion: prompt, text, finish_reason."
)
@LOG_JSON
@sampling_options
@model_options
@click.pass_context
def command(
    context: click.Context, /, prompts: tuple[str, ...], file: Path | None, whole: bool, is_json: bool, **options: Any
) -> None:
    """Complete PROMPTS, or the lines of a file or of standard input, to standard output.

    One prompt's text is written as it comes; several are written in their order, each after its prompt. Progress, and
    at the end how fast it was, goes to standard error.
    """
    try:
        with stoppable() as stop:
            errors = complete(context, read_prompts(prompts, file, stop, whole=whole), options, stop, is_json=is_json)
    except Stopped as stopped:  # of which a word was said when the signal came
        raise SystemExit(stopped.exit_code) from None
    except BrokenPipeError:
        end_unread()
    if errors:
        more = f"; and {len(errors) - MAX_ERRORS} more" if len(errors) > MAX_ERRORS else ""
        raise ValueError("; ".join(errors[:MAX_ERRORS]) + more)


def complete(
    context: click.Context, texts: Iterator[str], options: Mapping[str, Any], stop: Stop, *, is_json: bool
) -> list[str]:
    """Write the completions of the prompts, and how fast it was; returns what went wrong."""
    params = sampling_params(options)
    first = list(itertools.islice(texts, 2))
    if not first:
        raise ValueError("there are no prompts; give them as arguments, with -f FILE or on standard input, one a line")
    source = Prompts(itertools.chain(first, texts))
    with Display(log_json=options["log_json"]) as display:
        with stop.at_once():  # nothing is lost by that
            llm = open_model(context, options, display.phase, stop.check)
        with llm:
            _ = llm.tokenizer  # without one no prompt can be run
            if len(first) == 1 and params.n == 1 and not is_json:
                errors = write_one(llm, source, params, display)
            else:
                errors = write_all(llm, source, params, display, is_json=is_json)
        display.hide()
        if not options["log_json"]:
            click.echo(closing_text(figures(source.count, llm.totals)), err=True)
    return source.errors + errors
