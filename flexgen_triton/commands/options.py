"""The command line's options that commands share: which model, where its bytes live, how text is sampled.

Owns their names, defaults and help, and how they become an `LLM` and `SamplingParams`. Knows no command.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from ..defaults import AUTO, DEFAULT_OFFLOAD_DIR, DEMO
from ..plan.policy import LOSSY, CompressionConfig, Policy
from ..sequences.params import SamplingParams
from ..sizes import parse_size
from .command_line import Command as Command

if TYPE_CHECKING:
    from ..llm import LLM

Function = TypeVar("Function", bound=Callable[..., Any])
Option = Callable[[Any], Any]
Report = Callable[[str, int, int], None]  # phase, done, total
Check = Callable[[], None]  # raises what is to end the work

FLAG: dict[str, Any] = {"is_flag": False, "flag_value": True, "type": bool, "show_default": True}
BY_HAND = ("gpu_batch_size", "num_gpu_batches", "percent")  # one of these says that the policy is given by flags
BASE_PERCENT = (100, 0, 100, 0, 100, 0)
MAX_TOKENS = 128  # a paragraph; the library's default, vLLM's, is 16
DEFAULTS = SamplingParams()


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
    click.option("--gpu-batch-size", type=int, default=4, show_default=True),
    click.option("--num-gpu-batches", type=int, default=1, show_default=True),
    click.option(
        "--percent",
        nargs=6,
        type=int,
        default=BASE_PERCENT,
        show_default=True,
        help="Six numbers: weights on GPU and CPU, cache on GPU and CPU, activations on GPU and CPU; the rest is disk.",
    ),
    ALLOW,
    *MEMORY,
    click.option("--hardware", help="A machine's profile, by file or name; by default this machine, measured once."),
    click.option("--sep-layer", default=True, help="Attention and MLP are layers of their own.", **FLAG),
    click.option("--pin-weight", default=True, help="Keep the host's weights in pinned memory.", **FLAG),
    click.option("--cpu-cache-compute", is_flag=True, help="The CPU attends to what its memory holds of the cache."),
    click.option(
        "--cpu-attention-percent",
        type=float,
        default=100.0,
        show_default=True,
        help="With --cpu-cache-compute: of the host's sequences, those it attends to; the rest are sent to the GPU.",
    ),
    click.option(
        "--keep-open-pages",
        is_flag=True,
        help="New tokens' cache leaves the GPU a whole page at a time, not at once.",
    ),
    click.option("--attn-sparsity", type=float, default=1.0, show_default=True, help="Share of V that decode reads."),
    click.option("--compress-weight", is_flag=True, help="Weights in 4 bits."),
    click.option("--compress-cache", is_flag=True, help="KV cache in 4 bits."),
    click.option(
        "--group-size", type=int, default=64, show_default=True, help="Weights that share a scale: 32, 64, 128."
    ),
    click.option("--overlap", default=True, help="Load ahead while computing.", **FLAG),
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

SAMPLING: tuple[Option, ...] = (
    click.option("--max-tokens", type=int, default=MAX_TOKENS, show_default=True, help="New tokens at most."),
    click.option("--min-tokens", type=int, default=DEFAULTS.min_tokens, show_default=True, help="New tokens at least."),
    click.option("--temperature", type=float, default=DEFAULTS.temperature, show_default=True, help="0 is greedy."),
    click.option(
        "--top-p",
        type=float,
        default=DEFAULTS.top_p,
        show_default=True,
        help="Choose among the likeliest tokens that add up to this probability.",
    ),
    click.option(
        "--top-k", type=int, default=DEFAULTS.top_k, show_default=True, help="Choose among so many; 0: among all."
    ),
    click.option(
        "--min-p",
        type=float,
        default=DEFAULTS.min_p,
        show_default=True,
        help="Choose among tokens with at least this share of the likeliest one's probability.",
    ),
    click.option("--repetition-penalty", type=float, default=DEFAULTS.repetition_penalty, show_default=True),
    click.option("--presence-penalty", type=float, default=DEFAULTS.presence_penalty, show_default=True),
    click.option("--frequency-penalty", type=float, default=DEFAULTS.frequency_penalty, show_default=True),
    click.option("--n", type=int, default=DEFAULTS.n, show_default=True, help="Completions of each prompt."),
    click.option("--stop", multiple=True, help="A text that ends a completion; may be given several times."),
    click.option("--stop-token-id", type=int, multiple=True, help="A token that ends one; may be given several times."),
    click.option("--ignore-eos", is_flag=True, help="Go on after the end of the text."),
    click.option("--sampling-seed", type=int, help="Of a prompt's random choices; by default it comes from --seed."),
)


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
    """The policy that the flags spell out."""
    w_gpu, w_cpu, cache_gpu, cache_cpu, act_gpu, act_cpu = options["percent"]
    return Policy(
        options["gpu_batch_size"],
        options["num_gpu_batches"],
        w_gpu,
        w_cpu,
        cache_gpu,
        cache_cpu,
        act_gpu,
        act_cpu,
        overlap=options["overlap"],
        sep_layer=options["sep_layer"],
        pin_weight=options["pin_weight"],
        cpu_cache_compute=options["cpu_cache_compute"],
        attn_sparsity=options["attn_sparsity"],
        compress_weight=options["compress_weight"],
        comp_weight_config=CompressionConfig(group_size=options["group_size"]),
        compress_cache=options["compress_cache"],
        cpu_attention_percent=options["cpu_attention_percent"],
        keep_open_pages=options["keep_open_pages"],
    )


def base_policy(options: Mapping[str, Any]) -> Policy:
    """The part of an automatic policy that flags decide: all but sizes of batches, their number and percentages."""
    return replace(flags_policy({**options, "percent": BASE_PERCENT}), gpu_batch_size=1, num_gpu_batches=1)


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
    return SamplingParams(
        n=options["n"],
        max_tokens=options["max_tokens"],
        min_tokens=options["min_tokens"],
        temperature=options["temperature"],
        top_p=options["top_p"],
        top_k=options["top_k"],
        min_p=options["min_p"],
        repetition_penalty=options["repetition_penalty"],
        presence_penalty=options["presence_penalty"],
        frequency_penalty=options["frequency_penalty"],
        seed=options["sampling_seed"],
        stop=options["stop"],
        stop_token_ids=options["stop_token_id"],
        ignore_eos=options["ignore_eos"],
    )
