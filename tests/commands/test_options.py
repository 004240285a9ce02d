"""The shared options: what they make of a command line, and that none of them is forgotten on the way."""

from __future__ import annotations

from typing import Any

import click
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_triton import SamplingParams
from flexgen_triton.commands import options
from flexgen_triton.flags import flags_of, to_flags
from flexgen_triton.plan.policy import CompressionConfig, Policy


def command(
    found: list[tuple[click.Context, dict[str, Any]]] | None = None, kind: type[click.Command] = options.Command
) -> click.Command:
    """A command with all shared options, which hands over what it gets."""

    @click.command(cls=kind)
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
    assert options.sampling_params(parsed()[1]) == SamplingParams(max_tokens=128)


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


SHARES = st.tuples(st.integers(0, 100), st.integers(0, 100)).map(lambda n: (n[0], min(n[1], 100 - n[0])))
POLICIES = st.builds(
    lambda shares, **others: Policy(
        **{f"{k}_{t}_percent": n for k, s in zip(("w", "cache", "act"), shares, strict=True)
           for t, n in zip(("gpu", "cpu"), s, strict=True)},
        **others,
    ),
    st.tuples(SHARES, SHARES, SHARES),
    gpu_batch_size=st.integers(1, 1 << 40),
    num_gpu_batches=st.integers(1, 1 << 40),
    attn_sparsity=st.floats(0, 1, exclude_min=True),
    comp_weight_config=st.sampled_from([32, 64, 128]).map(lambda n: CompressionConfig(group_size=n)),
    cpu_attention_percent=st.floats(0, 100),
    **{f.name: st.booleans() for f in flags_of(Policy) if f.kind is bool},
)  # fmt: skip
REALS = {"repetition_penalty": (1e-9, 9), "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2), "min_p": (0, 1)}
PARAMS = st.builds(
    SamplingParams,
    n=st.integers(1, 1024),
    max_tokens=st.integers(50, 1 << 40),
    min_tokens=st.integers(0, 50),
    temperature=st.floats(0, 1e300),
    top_p=st.floats(0, 1, exclude_min=True),
    top_k=st.integers(-1, 1 << 40),
    seed=st.none() | st.integers(-(1 << 63), (1 << 64) - 1),
    stop=st.lists(st.text(st.characters(codec="utf-8"), min_size=1)),
    stop_token_ids=st.lists(st.integers(0, 1 << 40)),
    ignore_eos=st.booleans(),
    **{name: st.floats(low, high) for name, (low, high) in REALS.items()},
)


def read_back(words: list[str]) -> tuple[click.Context, dict[str, Any]]:
    """The options that words give, those included that would be refused for having no effect beside the others."""
    found: list[tuple[click.Context, dict[str, Any]]] = []
    command(found, kind=click.Command).main(words, standalone_mode=False)
    return found[0]


@settings(max_examples=200, deadline=None)
@given(policy=POLICIES)
def test_the_flags_of_a_policy_are_read_back_as_that_policy(policy):
    context, found = read_back(options.policy_flags(policy))
    assert options.flags_policy(found) == policy
    assert options.is_by_hand(context, found["policy"])


@settings(max_examples=200, deadline=None)
@given(params=PARAMS)
def test_the_flags_of_sampling_parameters_are_read_back_as_those(params):
    assert options.sampling_params(read_back(to_flags(params))[1]) == params


@pytest.mark.parametrize(
    ("made", "name"),
    [
        (Policy(w_gpu_percent=20.5), "w_gpu_percent"),
        (Policy(comp_weight_config=CompressionConfig(group_dim=1)), "comp_weight_config"),
        (Policy(comp_cache_config=CompressionConfig(enabled=False)), "comp_cache_config"),
        (SamplingParams(logprobs=2), "logprobs"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_no_flag_can_say_is_not_said_otherwise(made, name):
    with pytest.raises(ValueError, match=f"{name} is .*; no flag says that"):
        to_flags(made)


def test_a_policy_without_flags_is_the_librarys_with_the_benchmarks_batch():
    assert options.flags_policy({}) == Policy()
    assert options.flags_policy(parsed()[1]) == Policy(4)


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
