"""The shared options: what they make of a command line, and that none of them is forgotten on the way."""

from __future__ import annotations

from typing import Any

import click
import pytest
from click.testing import CliRunner

from flexgen_triton import SamplingParams
from flexgen_triton.commands import options
from flexgen_triton.plan.policy import Policy


def command(found: list[tuple[click.Context, dict[str, Any]]] | None = None) -> click.Command:
    """A command with all shared options, which hands over what it gets."""

    @click.command(cls=options.Command)
    @click.argument("words", nargs=-1)
    @options.sampling_options
    @options.model_options
    @click.pass_context
    def function(context: click.Context, /, **given: Any) -> None:
        if found is not None:
            found.append((context, given))

    return function


def parsed(*args: str) -> tuple[click.Context, dict[str, Any]]:
    """The options as a command gets them."""
    found: list[tuple[click.Context, dict[str, Any]]] = []
    done = CliRunner().invoke(command(found), args)
    assert done.exit_code == 0, done.output
    return found[0]


@pytest.fixture
def opened(monkeypatch):
    """Opens no model, but returns what it would have been opened with."""

    class Opened(dict[str, Any]):
        has_tokenizer = False

    monkeypatch.setattr("flexgen_triton.llm.LLM", lambda model, **given: Opened(model=model, **given))
    return lambda *args: options.open_model(*parsed(*args))


def test_sampling_without_options_is_the_librarys_but_longer():
    assert options.sampling_params(parsed()[1]) == SamplingParams(max_tokens=options.MAX_TOKENS)


def test_every_sampling_option_arrives():
    flags = (
        "--n 2 --max-tokens 7 --min-tokens 3 --temperature 0.5 --top-p 0.9 --top-k 4 --min-p 0.1 --sampling-seed 6 "
        "--repetition-penalty 1.1 --presence-penalty 0.2 --frequency-penalty 0.3 --stop a --stop b --stop-token-id 5 "
        "--ignore-eos"
    )
    assert options.sampling_params(parsed(*flags.split())[1]) == SamplingParams(
        n=2,
        max_tokens=7,
        min_tokens=3,
        temperature=0.5,
        top_p=0.9,
        top_k=4,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        seed=6,
        stop=("a", "b"),
        stop_token_ids=(5,),
        ignore_eos=True,
    )


def test_the_demo_under_an_automatic_policy_by_default(opened):
    found = opened("--allow", "4bit,sparse", "--cpu-mem", "2GiB", "--seed", "3")
    assert found["model"] == "demo" and found["policy"] == "auto" and found["allow"] == {"4bit", "sparse"}
    assert found["cpu_memory"] == 2 << 30 and found["seed"] == 3


def test_checksums_are_asked_for(opened):
    assert opened("--verify")["verify"] is True and opened()["verify"] is False


@pytest.mark.parametrize(
    ("args", "policy"),
    [
        ("--policy manual", Policy(4)),
        ("--gpu-batch-size 2 --overlap false --compress-weight", Policy(2, overlap=False, compress_weight=True)),
        ("--percent 0 50 100 0 0 100", Policy(4, 1, 0, 50, 100, 0, 0, 100)),
    ],
)
def test_a_policy_by_hand(opened, args, policy):
    assert opened("--model", "m", *args.split())["policy"] == policy


def test_flags_that_contradict_each_other(opened):
    with pytest.raises(ValueError, match="--policy auto finds what --percent would say"):
        opened(*["--policy", "auto", "--percent", "0", "50", "100", "0", "0", "100"])


def test_what_an_automatic_policy_does_not_choose_is_as_the_flags_say(opened):
    found = opened("--overlap", "false", "--attn-sparsity", "0.5", "--compress-weight")
    assert found["policy"] == "auto"
    assert found["base"] == Policy(overlap=False, attn_sparsity=0.5, compress_weight=True)


@pytest.mark.parametrize(
    ("short", "name", "value"),
    [
        ("--cpu", "cpu_cache_compute", True),
        ("--cpu-cache", "cpu_cache_compute", True),
        ("--cpu-m 2GiB", "cpu_mem", 2 << 30),
        ("--gpu 3", "gpu_batch_size", 3),
        ("--num=5", "num_gpu_batches", 5),
        ("--over False", "overlap", False),
        ("--over", "overlap", True),
        ("--in", "copies", False),
        ("--perc 0 50 0 50 0 50", "percent", (0, 50, 0, 50, 0, 50)),
        ("--seed 4", "seed", 4),
    ],
)
def test_the_beginning_of_one_option_is_that_option(short, name, value):
    assert parsed(*short.split())[1][name] == value


def test_the_beginning_of_several_is_an_error_that_names_them():
    with pytest.raises(click.UsageError, match="--compress may be --compress-cache, --compress-weight"):
        command().main(["--compress"], standalone_mode=False)
    with pytest.raises(click.NoSuchOption, match="--unknown"):
        command().main(["--unknown"], standalone_mode=False)


def test_what_an_option_takes_is_not_read_as_another():
    given = parsed("--stop", "--cpu", "--stop=--see", "--model", "--pol", "--", "--seed")[1]
    assert given["stop"] == ("--cpu", "--see") and given["model"] == "--pol" and not given["cpu_cache_compute"]
