"""`python -m flexgen_triton plan`: the best policies for a model on a machine, predicted, and how to run the best.

Owns the options, the model they name and the command that runs a policy. Does not know how findings are shown.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from ..defaults import DEFAULT_OFFLOAD_DIR
from ..machine.auto import machine
from ..memory.device import default_device
from ..memory.stripes import Folders
from ..models.config import ModelError
from ..models.family import config_by_name, model_spec
from ..models.locate import DUMMY, ModelSource, choose_dtype, find_local, find_sizes, hub_name, read_config
from ..plan.hardware import Hardware, profile_names
from ..plan.policy import Policy
from ..plan.problem import Problem
from ..plan.search import Searched, search
from ..plan.worth import worth
from ..run.engine import Limits
from .console import WIDTH, console
from .options import ALLOW, DTYPE, OFFLOAD_DIR, Command, memory_options, policy_flags
from .plan_report import as_json, choices, memory, show
from .progress import Display

# The model, and the command that runs a policy


@dataclass(frozen=True)
class Model:
    """A model of which only the configuration is needed, and the flags by which the benchmark finds it."""

    source: ModelSource
    dtype: str
    flags: tuple[str, ...]

    @classmethod
    def find(cls, model: str, path: str | None, dtype: str) -> Model:
        """A known OPT size needs no checkpoint; of a hub repository only config.json is fetched. Raises ModelError."""
        is_here = path == DUMMY or find_local(model, path) is not None
        known = not is_here and config_by_name(model) is not None
        remote = not is_here and not known and hub_name(model) is not None
        source = _remote_config(model) if remote else find_sizes(model, path)
        chosen = choose_dtype(dtype, source)
        path = path or (DUMMY if known else None)
        flags = ["--model", model, *(["--path", path] if path else [])]
        return cls(source, chosen, (*flags, *(["--dtype", chosen] if chosen != source.dtype else [])))


def _remote_config(model: str) -> ModelSource:
    """A hub repository's configuration alone; raises ModelError."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        path = Path(hf_hub_download(model, "config.json"))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(f"{model} is no directory here, no known size, nor to be had from the hub: {error}") from error
    return read_config(path, model.rsplit("/", 1)[-1], None)


def bench_command(model: Model, problem: Problem, policy: Policy, offload_dirs: Sequence[Path]) -> list[str]:
    """The benchmark's command for that policy: what it leaves out is the benchmark's default."""
    command = ["python", "-m", "flexgen_triton.bench", *model.flags]
    command += ["--prompt-len", str(problem.prompt_len), "--gen-len", str(problem.gen_len), *policy_flags(policy)]
    command += ["--num-prompts", str(problem.num_prompts)] if problem.num_prompts else []
    given = [] if tuple(offload_dirs) == (DEFAULT_OFFLOAD_DIR,) else offload_dirs
    return [*command, *(word for path in given for word in ("--offload-dir", str(path)))]


def shell_lines(command: list[str], width: int = WIDTH) -> str:
    """A command in lines no longer than `width` where its words allow it, each continued by a backslash."""
    lines = [""]
    for n, word in enumerate(map(shlex.quote, command)):
        whole = [word, *_values(command[n + 1 :])] if word.startswith("--") else [word]
        if lines[-1] and len(lines[-1]) + len(" ".join(whole)) + 3 > width:
            lines.append("   ")
        lines[-1] += f" {word}" if lines[-1] else word
    return " \\\n".join(lines)


def _values(words: list[str]) -> Iterator[str]:
    """The words before the next flag."""
    for word in words:
        if word.startswith("--"):
            return
        yield word


# The command


def find_policies(model: Model, hardware: Hardware, options: Mapping[str, Any]) -> Searched:
    """Search as the options say; a spinner on stderr meanwhile, where that is a terminal."""
    problem = Problem(
        model_spec(model.source.config, model.source.name, model.dtype),
        options["prompt_len"],
        options["gen_len"],
        options["num_prompts"],
        options["allow"],
        options["max_latency"],
        stored=model.source.is_stored and "4bit" not in options["allow"],
    )
    with Console(stderr=True).status("searching"):
        return search(problem, hardware)


@click.command("plan", cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", required=True, help="A checkpoint's directory, a hub id, a published size by name, or 'demo'.")
@click.option("--path", help="The checkpoint's directory; for a known OPT size none is needed.")
@click.option("--hardware", help=f"A profile's file, or one of {', '.join(profile_names())}; default: this machine.")
@click.option("--prompt-len", type=click.IntRange(1), default=512, show_default=True)
@click.option("--gen-len", type=click.IntRange(1), default=32, show_default=True)
@click.option("--num-prompts", type=click.IntRange(1), help="How many there are; default: as many as are best.")
@ALLOW
@click.option("--max-latency", type=click.FloatRange(0, min_open=True), help="Seconds for a round of prompts.")
@memory_options
@DTYPE
@OFFLOAD_DIR
@click.option("--top", type=click.IntRange(1), default=5, show_default=True, help="How many policies to print.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write all of it here.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw throughput, latency, memory (PNG).")
def command(**options: Any) -> None:
    """Find the best policies for a model on a machine, by prediction: nothing is run."""
    if options["plot"]:
        from .plan_plot import require_matplotlib

        require_matplotlib()
    model = Model.find(options["model"], options["path"], options["dtype"])
    limits = Limits(options["gpu_mem"], options["cpu_mem"], options["disk_mem"])
    device = default_device()
    with Display() as bars:
        folders = Folders.of(options["offload_dir"])
        hardware = machine(device, folders, limits, profile=options["hardware"], progress=bars.phase)
    searched = find_policies(model, hardware, options)
    told = list(islice(choices(searched), options["top"]))
    gains = worth(searched)
    to_run = bench_command(model, searched.problem, searched.best.policy, options["offload_dir"])
    printed = console()
    show(printed, searched, told, gains)
    printed.print("To run the best:\n")
    printed.print(shell_lines(to_run), soft_wrap=True, markup=False)
    if options["json_file"]:
        options["json_file"].write_text(json.dumps(as_json(searched, told, gains, to_run), indent=1) + "\n")
    if options["plot"]:
        from .plan_plot import draw

        draw(searched, memory(searched.best.plan, searched), options["plot"])
