"""`python -m flexgen_triton.apps.chatbot`: a conversation on the terminal."""

from __future__ import annotations

import sys
from typing import Any

import click

from ..commands.command_line import invoke
from ..commands.generate import pieces
from ..commands.options import Command, load_by_hand, model_options
from ..llm import LLM, Prompt
from ..sequences.params import SamplingParams

OPENING = "This is a conversation in which an assistant answers what a user asks, briefly and truthfully.\n"
USER, ASSISTANT = "User", "Assistant"
END = f"\n{USER}:"

Message = dict[str, str]


def written(messages: list[Message]) -> str:
    """The conversation as a transcript that the assistant has to go on with: for a model without a chat template."""
    names = {"user": USER, "assistant": ASSISTANT}
    turns = (f"{names[m['role']]}: {m['content']}\n" for m in messages)
    return f"{OPENING}{''.join(turns)}{ASSISTANT}:"


def rendered(llm: LLM, messages: list[Message]) -> Prompt:
    """The conversation as the model's own template has it, else as a transcript."""
    if not llm.tokenizer.chat_template:
        return written(messages)
    text = llm.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids: list[int] = llm.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def shortened(llm: LLM, messages: list[Message], max_tokens: int) -> list[Message]:
    """The newest messages whose prompt leaves room for an answer; a question and its answer go together."""
    while len(messages) > 1 and len(llm.token_ids(rendered(llm, messages))) + max_tokens > llm.spec.max_positions:
        messages = messages[2:]
    return messages


def answer(llm: LLM, messages: list[Message], params: SamplingParams) -> str:
    """Write the assistant's next turn as it comes, and return it."""
    text = ""
    for piece, output in pieces(llm.stream([(rendered(llm, messages), params)], partial=True), params.stop):
        if output.error:
            raise ValueError(output.error)
        text += piece
        click.echo(piece if text != piece else piece.lstrip(), nl=False)
    click.echo()
    return text.strip()


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--max-tokens", type=int, default=96, show_default=True, help="Length of an answer at most.")
@click.option("--temperature", type=float, default=0.7, show_default=True, help="0 is greedy.")
@model_options
@click.pass_context
def command(context: click.Context, /, max_tokens: int, temperature: float, **options: Any) -> None:
    """Answer the lines of standard input one by one; an empty line, or its end, ends the conversation.

    The oldest turns are forgotten when the conversation no longer fits the model.
    """
    messages: list[Message] = []
    with load_by_hand(context, options) as llm:
        stop = () if llm.tokenizer.chat_template else (END,)
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, stop=stop)
        while True:
            click.echo(f"{USER}: ", nl=False)
            line = sys.stdin.readline().strip()
            if not line:
                click.echo()
                return
            messages = shortened(llm, [*messages, {"role": "user", "content": line}], max_tokens)
            click.echo(f"{ASSISTANT}: ", nl=False)
            messages.append({"role": "assistant", "content": answer(llm, messages, params)})


def main() -> None:
    invoke(command)


if __name__ == "__main__":
    main()
