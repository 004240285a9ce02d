"""`python -m flexgen_triton COMMAND`: generate text, measure a machine, plan for one, benchmark a policy."""

from __future__ import annotations

from importlib import import_module
from typing import NamedTuple, NoReturn

import click

from .command_line import invoke


class Entry(NamedTuple):
    """A command's module and the first sentence of its help, so that neither listing nor choosing loads the others."""

    module: str
    help: str


COMMANDS = {
    "bench": Entry(
        "bench", "Measure generation under one policy, with FlexGen's flags; without any, run the shipped demo."
    ),
    "generate": Entry("generate", "Complete PROMPTS, or the lines of a file or of standard input, to standard output."),
    "measure": Entry("measure", "Measure what this machine can do, and keep it for planning."),
    "plan": Entry("plan", "Find the best policies for a model on a machine, by prediction: nothing is run."),
    "run-batch": Entry("run_batch", "Answer a file of requests in OpenAI's batch format."),
}


class Commands(click.Group):
    """The commands, each loaded when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        found = import_module(f".{COMMANDS[cmd_name].module}", __package__).command
        assert isinstance(found, click.Command), cmd_name
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name].help) for name in self.list_commands(ctx)])


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Generate text with language models that do not fit the GPU."""


def main() -> NoReturn:
    """Run the command line."""
    invoke(cli)
