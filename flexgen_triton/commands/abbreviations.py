"""Long options cut short, as argparse takes them; of FlexGen's flags, as its published commands have them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import click

FLEXGEN_FLAGS = frozenset(
    (
        *("--model", "--path", "--offload-dir", "--prompt-len", "--gen-len", "--cut-gen-len", "--debug-mode"),
        *("--gpu-batch-size", "--num-gpu-batches", "--percent", "--sep-layer", "--pin-weight", "--cpu-cache-compute"),
        *("--attn-sparsity", "--compress-weight", "--compress-cache", "--log-file", "--no-log", "--verbose"),
        "--overlap",
    )
)


class Command(click.Command):
    """A command whose long options may be cut short as argparse's may: by the beginning of one option alone.

    What is the beginning of one of FlexGen's flags alone is that flag, as in the commands that were published for it:
    `--cpu` is `--cpu-cache-compute`. The beginning of several is an error that names them.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(self._written_out(ctx, args)))

    def _written_out(self, ctx: click.Context, args: list[str]) -> Iterator[str]:
        """The arguments, every option by its whole name. What an option takes as its values is left as it is."""
        options = {
            name: _num_values(option)
            for option in self.get_params(ctx)
            if isinstance(option, click.Option)
            for name in (*option.opts, *option.secondary_opts)
        }
        rest = iter(args)
        for arg in rest:
            name, equals, value = arg.partition("=")
            if name.startswith("--") and name != "--" and name not in options:
                name = _whole_name(name, options, ctx)
            yield f"{name}{equals}{value}"
            if arg == "--":
                yield from rest
            if not equals:
                yield from islice(rest, options.get(name, 0))


def _num_values(option: click.Option) -> int:
    """Count the arguments after the option that are its values whatever they look like."""
    is_optional = isinstance(option.flag_value, bool | str)
    return 0 if option.is_flag or option.count or is_optional else option.nargs


def _whole_name(start: str, options: Iterable[str], context: click.Context) -> str:
    """The option that begins so, one of FlexGen's first; `start` itself where there is none."""
    found = sorted(name for name in options if name.startswith(start))
    for candidates in ([name for name in found if name in FLEXGEN_FLAGS], found):
        if len(candidates) == 1:
            return candidates[0]
    if found:
        raise click.UsageError(f"{start} may be {', '.join(found)}; write one of them out", context)
    return start
