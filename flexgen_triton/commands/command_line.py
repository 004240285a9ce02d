"""The steps of a command line: check flags and output files first, import modules next, tell mistakes in one sentence.

Owns the order of these and the exit codes. Knows no command.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

import click

from .. import interrupts
from ..os_errors import sentence
from ..stopping import end_unread
from . import abbreviations
from .flag_checks import check_flags, check_outputs


class Command(abbreviations.Command):
    """A command whose options may be cut short, and that checks what it was given before it begins.

    `imports` are modules that it needs and that take long: they are loaded after its flags were found good, while
    Ctrl-C still ends the process at once.
    """

    def __init__(self, *args: Any, imports: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._imports = imports

    def invoke(self, context: click.Context) -> Any:
        """Run the command; raises ValueError for flags that would be ignored and files that cannot be written."""
        check_flags(context)
        check_outputs(context)
        for module in self._imports:
            import_module(module)
        interrupts.loaded()
        return super().invoke(context)


def invoke(chosen: click.Command) -> NoReturn:
    """Run a command line and exit; a user's mistake or a failing disk ends in one sentence and exit code 1."""
    try:
        status = chosen.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        raise SystemExit(error.exit_code) from None
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        raise SystemExit(interrupts.INTERRUPTED) from None
    except BrokenPipeError:
        end_unread()
    except (ValueError, OSError, MemoryError) as error:
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        reason = sentence(error) if isinstance(error, OSError) else str(error) or "the memory is full"
        click.echo(f"error: {reason}{notes}", err=True)
        raise SystemExit(1) from None
    finally:
        interrupts.loading()  # what is left of the process is not to be told about either
    raise SystemExit(status if isinstance(status, int) else 0)
