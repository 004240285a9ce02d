"""Flags that would be ignored, as a table: which, beside what else, and why. A user is told, instead of misled.

Also the files that a command writes in the end: whether they can be written is found out before it begins. Knows the
options of all commands by name, and nothing of what commands do.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ..defaults import DUMMY
from ..plan.policy import BY_HAND
from ..sequences.params import MIN_TEMPERATURE

GIVEN = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
OUTPUTS = ("json_file", "trace", "plot", "profile_file", "log_file")  # written when the command ends
AUTOMATIC = "auto"  # a log file's name that the run chooses


class FlagError(ValueError):
    """A flag that would have no effect, or a file that cannot be written; the message says why and what to do."""


class Flags:
    """A command's options: their values, and which of them were given."""

    def __init__(self, context: click.Context) -> None:
        self._context = context

    def __getitem__(self, name: str) -> Any:
        """An option's value; None where the command has no such option."""
        return self._context.params.get(name)

    def has(self, name: str) -> bool:
        """True if the command has this option."""
        return name in self._context.params

    def is_given(self, name: str) -> bool:
        """True if the option stands on the command line."""
        return self._context.get_parameter_source(name) in GIVEN

    @cached_property
    def by_hand(self) -> bool:
        """True if the policy is given by flags."""
        return self["policy"] == "manual" or any(map(self.is_given, BY_HAND))

    @property
    def by_hand_and_dry(self) -> bool:
        """True if only the plan of a policy by flags is printed, without loading a model or measuring a machine."""
        return self.by_hand and bool(self["dry_run"])

    @property
    def is_greedy(self) -> bool:
        """True if every token is the likeliest one."""
        return self.has("temperature") and self["temperature"] < MIN_TEMPERATURE

    @property
    def draws_nothing(self) -> bool:
        """True if no random numbers are needed: neither for weights, nor for prompts, nor to choose tokens."""
        if self["dry_run"]:
            return True
        if self["path"] == DUMMY:
            return False
        if self.has("dry_run"):  # the benchmark takes the likeliest token
            return self["prompts"] is not None
        return self.is_greedy or self["sampling_seed"] is not None


@dataclass(frozen=True, slots=True)
class Rule:
    """Options that have no effect where `is_idle`; `reason` ends the sentence that says so."""

    options: tuple[str, ...]
    is_idle: Callable[[Flags], bool]
    reason: str


RULES = (
    Rule(("allow", "max_latency"), lambda f: f.by_hand, "on a policy given by flags: only one that is searched for"),
    Rule(
        ("hardware",),
        lambda f: f.by_hand and not f.has("dry_run"),
        "on a policy given by flags: nothing is predicted of it",
    ),
    Rule(
        ("gpu_mem", "cpu_mem", "disk_mem"),
        lambda f: f.by_hand_and_dry,
        "on the plan of a policy given by flags: it says what is needed, whatever there is",
    ),
    Rule(
        ("prompts", "num_prompts"),
        lambda f: f.by_hand_and_dry,
        "on the plan of a policy given by flags: it is of one round, of prompts of --prompt-len tokens",
    ),
    Rule(
        ("trace", "log_file", "verbose", "verify"),
        lambda f: bool(f["dry_run"]),
        "with --dry-run: nothing is run",
    ),
    Rule(
        ("num_prompts", "prompt_len"), lambda f: f["prompts"] is not None, "with --prompts: the file's prompts are run"
    ),
    Rule(("log_file",), lambda f: bool(f["no_log"]), "with --no-log"),
    Rule(
        ("cut_gen_len",),
        lambda f: f.is_given("cut_gen_len") and f["cut_gen_len"] >= f["gen_len"],
        "where it is not below --gen-len",
    ),
    Rule(("cpu_attention_percent",), lambda f: not f["cpu_cache_compute"], "without --cpu-cache-compute"),
    Rule(
        ("group_size",),
        lambda f: not f["compress_weight"] and (f.by_hand or "4bit" not in f["allow"]),
        "where no weights are in 4 bits (--compress-weight)",
    ),
    Rule(
        ("top_p", "top_k", "min_p", "sampling_seed"),
        lambda f: f.is_greedy,
        "with --temperature 0: every token is the likeliest one",
    ),
    Rule(("seed",), lambda f: f.draws_nothing, "here: nothing is drawn at random"),
    Rule(("quick",), lambda f: f["run_file"] is not None, "with --refine: nothing is measured"),
)


def check_flags(context: click.Context) -> None:
    """Raise FlagError for the first flag that was given and would have no effect."""
    flags = Flags(context)
    for rule in RULES:
        found = [name for name in rule.options if flags.is_given(name)]
        if found and rule.is_idle(flags):
            raise FlagError(f"{_flag(context, found[0])} has no effect {rule.reason}; leave it out")


def _flag(context: click.Context, name: str) -> str:
    """An option as it is written on the command line."""
    return next(max(p.opts, key=len) for p in context.command.get_params(context) if p.name == name)


def check_outputs(context: click.Context) -> None:
    """Raise FlagError for a file that could not be written when the command ends, or that two options name."""
    flags, named = Flags(context), dict[Path, str]()
    for name in OUTPUTS:
        if not flags.is_given(name) or flags[name] == AUTOMATIC:
            continue
        path, option = Path(flags[name]), _flag(context, name)
        other = named.setdefault(path.absolute(), option)
        if other != option:
            raise FlagError(f"{other} and {option} both name {path}; name two files")
        try:
            check_writable(path)
        except OSError as error:
            reason = error.strerror or str(error)
            raise FlagError(f"{option} {path} cannot be written: {reason}; name another file") from error


def check_writable(path: Path) -> None:
    """Raise OSError where a file cannot be written. Leaves an existing one as it is, and none where there was none."""
    target = Path(os.path.realpath(path))  # what a link that leads nowhere yet would make
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
        target.unlink()
        return
    if not stat.S_ISFIFO(mode):  # opening one would wait for its reader
        os.close(os.open(target, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC))
