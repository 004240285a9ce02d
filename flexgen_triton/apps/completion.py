"""`python -m flexgen_triton.apps.completion`: complete a few prompts, several ways each."""

from __future__ import annotations

from typing import Any

import click

from ..commands.command_line import invoke
from ..commands.options import Command, load_by_hand, model_options
from ..sequences.params import SamplingParams

PROMPTS = (
    "Question: Which river flows through Cairo?\n"
    "Answer: The Nile.\n"
    "Question: Which river flows through Vienna?\n"
    "Answer:",
    "Write the dates in the text as numbers.\n"
    "Text: We met on the third of May and parted on the ninth.\n"
    "Dates: 3, 9\n"
    "Text: The tenth was a Sunday, the twelfth a Tuesday.\n"
    "Dates:",
)


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--max-tokens", type=int, default=32, show_default=True, help="New tokens at most.")
@click.option("--temperature", type=float, default=0.7, show_default=True, help="0 is greedy.")
@click.option("--n", type=int, default=1, show_default=True, help="Completions of each prompt.")
@model_options
@click.pass_context
def command(context: click.Context, /, max_tokens: int, temperature: float, n: int, **options: Any) -> None:
    """Complete two prompts that say by an example what is wanted; a completion ends with its line."""
    params = SamplingParams(n=n, max_tokens=max_tokens, temperature=temperature, stop="\n")
    with load_by_hand(context, options) as llm:
        for output in llm.generate(PROMPTS, params):
            for completion in output.outputs:
                click.echo(f"{output.prompt}{click.style(completion.text, bold=True)}\n")


def main() -> None:
    invoke(command)


if __name__ == "__main__":
    main()
