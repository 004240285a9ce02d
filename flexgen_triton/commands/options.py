"""The command line's options that commands share: which model, where its bytes live, how text is sampled.

Owns how they become an `LLM` and `SamplingParams`, and the names, defaults and help of those that are no field of
`Policy` or `SamplingParams`: a field's metadata has its own. Knows no command.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from ..defaults import AUTO, DEFAULT_OFFLOAD_DIR, DEMO
from ..flags import Flag, flags_of, from_flags, to_flags
from ..plan.policy import BY_HAND, LOSSY, Policy
from ..sequences.params import SamplingParams
from ..sizes import parse_size
from .command_line import Command as Command

if TYPE_CHECKING:
    from ..llm import LLM

Function = TypeVar("Function", bound=Callable[..., Any])
Option = Callable[[Any], Any]
Report = Callable[[str, int, int], None]  # phase, done, total
Check = Callable[[], None]  # raises what is to end the work


class Size(click.ParamType):  # type: ignore[type-arg]
    """An amount of memory on the command line."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


SIZE = Size()


def _words(context: click.Context, parameter: click.Parameter, value: str) -> frozenset[str]:
    """Words between commas."""
    return frozenset(word for word in value.split(",") if word)


OFFLOAD_DIR = click.option(
    "--offload-dir",
    type=click.Path(path_type=Path),
    multiple=True,
    default=(DEFAULT_OFFLOAD_DIR,),
    show_default=True,
    help="Where converted weights, the disk's share of the cache and the machine's profile go. Given several times, "
    "for a drive each, all of them are read and written at once.",
)
ALLOW = click.option(
    "--allow",
    default="",
    callback=_words,
    help=f"What an automatic policy may do that changes the output, of {','.join(LOSSY)}.",
)
MEMORY: tuple[Option, ...] = (
    click.option("--gpu-mem", type=SIZE, help="GPU memory to use at most, such as 16GiB; by default what is free."),
    click.option("--cpu-mem", type=SIZE, help="Host memory to use at most, the process's own included."),
    click.option("--disk-mem", type=SIZE, help="Disk space to use at most, for weights, cache and activations."),
)
DTYPE = click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16.")
DEVICE = click.option("--device", help="cuda or cpu; by default a GPU where there is one.")
LOG_JSON = click.option("--log-json", is_flag=True, help="Progress as lines of JSON on stderr, for programs.")


def _option(flag: Flag) -> Option:
    """A field's flag, as click has it; a word may be left out that says yes."""
    if flag.is_switch:
        return click.option(flag.word, is_flag=True, help=flag.help)
    if flag.is_many:
        return click.option(flag.word, type=flag.kind, multiple=True, help=flag.help)
    if flag.default is None:
        return click.option(flag.word, type=flag.kind, help=flag.help)
    word: dict[str, Any] = {"is_flag": False, "flag_value": True} if flag.kind is bool else {}
    return click.option(
        flag.word,
        type=flag.kind,
        nargs=len(flag.fields),
        default=flag.default,
        show_default=True,
        help=flag.help,
        **word,
    )


MODEL: tuple[Option, ...] = (
    click.option("--model", help="A checkpoint's directory, a hub id, an OPT size with --path _DUMMY_, or 'demo'."),
    click.option("--path", help="The checkpoint's directory, or _DUMMY_ for random weights."),
    OFFLOAD_DIR,
    click.option(
        "--policy",
        type=click.Choice(["auto", "manual"]),
        help="auto: the fastest policy found for this machine; manual: the next three flags. By default auto unless "
        "one of them is given.",
    ),
    *(_option(flag) for flag in flags_of(Policy) if flag.by_hand),
    ALLOW,
    *MEMORY,
    click.option("--hardware", help="A machine's profile, by file or name; by default this machine, measured once."),
    *(_option(flag) for flag in flags_of(Policy) if not flag.by_hand),
    click.option("--seed", type=int, default=0, show_default=True, help="Of random weights and of sampling."),
    DTYPE,
    DEVICE,
    click.option(
        "--verify",
        is_flag=True,
        help="Check every byte of a checkpoint that is read in place against checksums, made and kept the first time.",
    ),
    click.option("--copies/--in-place", default=None, help="On a CPU: really copy host bytes, as a GPU run does."),
)

SAMPLING: tuple[Option, ...] = tuple(map(_option, flags_of(SamplingParams)))


def model_options(function: Function) -> Function:
    """Add the options that choose model, policy, memory and machine, under the names that `open_model` reads."""
    return _with(MODEL, function)


def memory_options(function: Function) -> Function:
    """Add the limits on each tier's memory."""
    return _with(MEMORY, function)


def sampling_options(function: Function) -> Function:
    """Add the options that `sampling_params` reads."""
    return _with(SAMPLING, function)


def _with(options: tuple[Option, ...], function: Function) -> Function:
    for option in reversed(options):  # help lists what was added last first
        function = option(function)
    return function


def is_by_hand(context: click.Context, policy: str | None) -> bool:
    """Return True if the policy is given by flags. Raises ValueError where they contradict `--policy`."""
    given = _given(context, BY_HAND)
    if policy == "auto" and given:
        raise ValueError(f"--policy auto finds what {', '.join(given)} would say; leave out one or the other")
    return policy == "manual" or bool(given)


def _given(context: click.Context, names: tuple[str, ...]) -> list[str]:
    """List the options of these that stand on the command line, as they are written there."""
    there = (n for n in names if context.get_parameter_source(n) is ParameterSource.COMMANDLINE)
    return [f"--{n.replace('_', '-')}" for n in there]


def flags_policy(options: Mapping[str, Any]) -> Policy:
    """The policy that the flags spell out; what is not among them is as the policy has it by default."""
    return from_flags(Policy, options)


def policy_flags(policy: Policy) -> list[str]:
    """The flags that spell a policy out. Raises ValueError for one that flags cannot say."""
    return to_flags(policy)


def base_policy(options: Mapping[str, Any]) -> Policy:
    """The part of an automatic policy that flags decide: all but sizes of batches, their number and percentages."""
    return flags_policy({name: value for name, value in options.items() if name not in BY_HAND})


def open_model(
    context: click.Context, options: Mapping[str, Any], progress: Report | None = None, check: Check | None = None
) -> LLM:
    """The model under the policy that the flags give, else under an automatic one; `demo` when none is named.

    Raises ValueError for flags that contradict each other, and whatever LLM raises.
    """
    policy = flags_policy(options) if is_by_hand(context, options["policy"]) else AUTO
    llm = load_model(options, policy, progress, check)
    if llm.has_tokenizer:  # what is wrong with it is no fault of any one prompt
        _ = llm.tokenizer
    return llm


def load_by_hand(context: click.Context, options: Mapping[str, Any]) -> LLM:
    """The model under the flags' policy, and under an automatic one only with `--policy auto`: nothing is measured."""
    is_by_hand(context, options["policy"])
    return load_model(options, AUTO if options["policy"] == AUTO else flags_policy(options))


def load_model(
    options: Mapping[str, Any], policy: Policy | str, progress: Report | None = None, check: Check | None = None
) -> LLM:
    """The model that the options name, under this policy."""
    from ..llm import LLM

    return LLM(
        options["model"] or DEMO,
        path=options["path"],
        policy=policy,
        base=base_policy(options),
        allow=options["allow"],
        gpu_memory=options["gpu_mem"],
        cpu_memory=options["cpu_mem"],
        disk_memory=options["disk_mem"],
        hardware=options["hardware"],
        dtype=options["dtype"],
        offload_dir=options["offload_dir"],
        device=options["device"],
        copies=options["copies"],
        seed=options["seed"],
        verify=options["verify"],
        progress=progress,
        check=check,
    )


def sampling_params(options: Mapping[str, Any]) -> SamplingParams:
    """Build the sampling parameters that the options ask for; raises ValueError for values out of range."""
    return from_flags(SamplingParams, options)
