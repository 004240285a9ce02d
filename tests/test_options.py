"""The shared options: what they make of a command line, and that none of them is forgotten on the way."""

from __future__ import annotations

from typing import Any

import click
import pytest
from click.testing import CliRunner

from flexgen_triton import SamplingParams, options
from flexgen_triton.plan.policy import Policy


def parsed(*args: str) -> tuple[click.Context, dict[str, Any]]:
    """The options as a command gets them."""
    found: list[tuple[click.Context, dict[str, Any]]] = []

    @click.command()
    @options.sampling_options
    @options.model_options
    @click.pass_context
    def command(context: click.Context, /, **given: Any) -> None:
        found.append((context, given))

    done = CliRunner().invoke(command, args)
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
