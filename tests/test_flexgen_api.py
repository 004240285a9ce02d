"""FlexGen's Python interface: a script in its style runs, and answers what the library answers."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from flexgen_triton import LLM, Policy, SamplingParams, opt_config
from flexgen_triton.demo import DEMO_DIR
from flexgen_triton.flex_opt import CompressionConfig, ExecutionEnv, OptLM, str2bool
from flexgen_triton.models.opt import ModelError, config_by_name, model_spec
from flexgen_triton.opt_config import OptConfig, get_opt_config
from flexgen_triton.plan.policy import PolicyError

ROOT = Path(__file__).parents[1]
PAD = 1
PROMPTS = [[40, 50, 60], [70, 80, 90, 100, 110], [120]]
SCRIPT = """
import argparse

from transformers import AutoTokenizer

from flexgen_triton.flex_opt import Policy, OptLM, ExecutionEnv, CompressionConfig, str2bool
from flexgen_triton.opt_config import get_opt_config


def main(args):
    prompts = ["Return the", "Raise an exception if the file"]
    env = ExecutionEnv.create(args.offload_dir)
    policy = Policy(len(prompts), 1, *args.percent, True, True, args.pin_weight, False, 1.0,
                    args.compress_weight, CompressionConfig(num_bits=4, group_size=64, group_dim=0, symmetric=False),
                    args.compress_cache, CompressionConfig(num_bits=4, group_size=64, group_dim=2, symmetric=False))
    config = get_opt_config(args.model)
    print(f"cache of {config.cache_bytes(len(prompts), 48)} bytes")
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    model = OptLM(args.model, env, args.path, policy)
    inputs = tokenizer(prompts, padding="max_length", max_length=40)
    output_ids = model.generate(inputs.input_ids, do_sample=False, max_new_tokens=8)
    for n, text in enumerate(tokenizer.batch_decode(output_ids, skip_special_tokens=True)):
        print(f"{n}: {text}")
    env.close_copy_threads()


parser = argparse.ArgumentParser()
parser.add_argument("--model", default="facebook/opt-6.7b")
parser.add_argument("--path", default="~/opt_weights")
parser.add_argument("--offload-dir", default="~/flexgen_offload_dir")
parser.add_argument("--percent", nargs=6, type=int, default=[100, 0, 100, 0, 100, 0])
parser.add_argument("--pin-weight", type=str2bool, nargs="?", const=True, default=True)
parser.add_argument("--compress-weight", action="store_true")
parser.add_argument("--compress-cache", action="store_true")
main(parser.parse_args())
"""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def offload(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("offload")


@pytest.fixture(scope="module")
def model(offload, one_thread):
    env = ExecutionEnv.create(str(offload))
    yield OptLM(str(DEMO_DIR), env, "~/opt_weights", Policy(2, 2))
    env.close_copy_threads()


@pytest.fixture(scope="module")
def tokens(offload, one_thread) -> list[list[int]]:
    """What the library answers to PROMPTS."""
    with LLM("demo", policy=Policy(2, 2), offload_dir=offload) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))
    return [o.outputs[0].token_ids for o in outputs]


def padded(width: int) -> list[list[int]]:
    return [[PAD] * (width - len(p)) + p for p in PROMPTS]


def test_a_script_in_flexgens_style_runs(tmp_path, offload):
    (tmp_path / "completion.py").write_text(SCRIPT)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    flags = ("--model", str(DEMO_DIR), "--offload-dir", str(tmp_path / "off"), "--pin-weight", "false")
    command = [sys.executable, "completion.py", *flags, "--percent", "0", "50", "0", "100", "100", "0"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    with LLM("demo", policy=Policy(2), offload_dir=offload) as llm:
        prompts = ["Return the", "Raise an exception if the file"]
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    texts = [f"{n}: {o.prompt}{o.outputs[0].text}\n" for n, o in enumerate(outputs)]
    assert done.stdout == f"cache of {2 * 6 * 2 * 48 * 192 * 2} bytes\n" + "".join(texts)


@pytest.mark.parametrize("width", [5, 6, 41], ids="padded to {}".format)
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor], ids=["lists", "numpy", "torch"])
def test_the_inputs_as_given_and_then_what_the_library_answers(model, tokens, width, kind):
    inputs = padded(width)
    output = model.generate(kind(inputs), max_new_tokens=6)
    assert output.dtype == np.int32 and output.shape == (3, width + 6)
    assert output.tolist() == [row + new for row, new in zip(inputs, tokens, strict=True)]


def test_a_prompt_without_padding(model, tokens):
    assert model.generate([PROMPTS[1]], max_new_tokens=6).tolist() == [PROMPTS[1] + tokens[1]]


def test_after_the_stop_token_there_is_padding(model, tokens):
    stop = tokens[0][2]
    output = model.generate(padded(5), max_new_tokens=6, stop=stop)
    for row, new in zip(output, tokens, strict=True):
        kept = new.index(stop) + 1 if stop in new else 6
        assert row[5:].tolist() == new[:kept] + [PAD] * (6 - kept)


def test_a_cut_run_leaves_padding(model, tokens):
    output = model.generate(padded(5), max_new_tokens=6, cut_gen_len=2)
    assert output[:, 5:].tolist() == [new[:2] + [PAD] * 4 for new in tokens]


def test_rows_of_padding_stay_so(model, tokens):
    """A script fills its last batch up with them."""
    output = model.generate([[PAD] * 5, *padded(5)], max_new_tokens=6)
    assert output[0].tolist() == [PAD] * 11 and output[1:, 5:].tolist() == tokens
    assert model.generate([[PAD] * 3], max_new_tokens=2).tolist() == [[PAD] * 5]


def test_sampling_follows_torchs_generator(model, tokens):
    def sampled(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return model.generate([PROMPTS[0]] * 3, max_new_tokens=6, do_sample=True, temperature=0.9)[:, 3:].tolist()

    first = sampled(3)
    assert first == sampled(3) != sampled(4)
    assert len({tuple(row) for row in first}) > 1
    cold = model.generate(padded(5), max_new_tokens=6, do_sample=True, temperature=0.0)
    assert cold[:, 5:].tolist() == tokens


def test_random_weights_and_a_config_in_place_of_a_name(tmp_path, one_thread):
    env = ExecutionEnv.create(tmp_path)
    model = OptLM(get_opt_config("facebook/opt-125m"), env, "_DUMMY_", Policy())
    assert model.generate([[5, 6, 7]], max_new_tokens=2).shape == (1, 5)
    assert model.config.num_hidden_layers == 12
    env.close_copy_threads()


def test_where_a_model_is_found(tmp_path, tiny):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "some-opt").symlink_to(tiny.path)
    env = ExecutionEnv.create(tmp_path / "offload")
    for name, path in (("x/some-opt", tmp_path / "weights"), ("any", tiny.path), (str(tiny.path), tmp_path / "none")):
        model = OptLM(name, env, str(path), Policy(gpu_batch_size=4))
        assert model.config.vocab_size == 1003 and model.config.hidden_size == 192
        output = model.generate([tiny.prompts[2]], max_new_tokens=4)
        assert output[0, -4:].tolist() == tiny.tokens[2][:4]
    env.close_copy_threads()


def test_closing_the_environment_or_losing_the_model_frees_it(tmp_path, tiny, monkeypatch):
    closed = []
    close = LLM.close
    monkeypatch.setattr(LLM, "close", lambda llm: (closed.append(llm.policy.gpu_batch_size), close(llm)))
    env = ExecutionEnv.create(tmp_path)
    kept, lost = (OptLM(str(tiny.path), env, "_none_", Policy(size)) for size in (1, 2))
    del lost
    assert closed == [2]
    env.close_copy_threads()
    env.close_copy_threads()
    assert closed == [2, 1]
    with pytest.raises(ValueError, match="environment was closed"):
        kept.generate([[5]])


def test_mistakes_are_sentences(model, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="different lengths; pad them"):
        model.generate(PROMPTS)
    with pytest.raises(ValueError, match="1 dimension"):
        model.generate(PROMPTS[0])
    with pytest.raises(ValueError, match="breakdown"):
        model.generate([[5]], debug_mode="breakdown")
    with pytest.raises(PolicyError, match="512 positions"):
        model.generate([[5]], max_new_tokens=600)
    formats = (False, CompressionConfig(), False, CompressionConfig(group_dim=2))
    with pytest.raises(PolicyError, match="attn_sparsity"):
        Policy(1, 1, 100, 0, 0, 100, 100, 0, True, True, True, True, 1.5, *formats)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="not a directory"):
        OptLM("unknown", ExecutionEnv.create(tmp_path), "~/opt_weights", Policy())


@pytest.mark.parametrize("name", ["facebook/opt-30b", "OPT-6.7B", "opt-175b"])
def test_sizes_by_name(name):
    config = get_opt_config(name)
    known = config_by_name(name)
    spec = model_spec(known, name, "float16")
    assert config.name == name.rsplit("/", 1)[-1].lower() and config.pad == config.pad_token_id == 1
    assert (config.hidden_size, config.n_head, config.ffn_embed_dim) == (spec.hidden, spec.num_heads, spec.ffn)
    assert config.input_dim == config.hidden_size and config.max_seq_len == 2048 and config.dtype is np.float16
    assert config.model_bytes() == spec.weight_bytes
    assert config.cache_bytes(3, 100) == 2 * 3 * 100 * config.num_hidden_layers * config.hidden_size * 2
    assert config.hidden_bytes(3, 100) == 3 * 100 * config.hidden_size * 2


def test_sizes_of_fine_tuned_models_of_directories_and_as_given(tiny):
    assert get_opt_config("facebook/opt-iml-max-30b", max_seq_len=512) == OptConfig(
        "opt-iml-max-30b", 48, 512, 7168, 56, 7168, 28672
    )
    assert get_opt_config(str(tiny.path)).vocab_size == 1003 and get_opt_config("demo").name == "demo"
    assert OptConfig() == get_opt_config("opt-125m")
    with pytest.raises(ModelError, match="no known OPT size"):
        opt_config.get_opt_config("opt-999b")


def test_str2bool():
    assert [str2bool(v) for v in ("true", "Yes", "1", True)] == [True] * 4
    assert [str2bool(v) for v in ("false", "N", "0", False)] == [False] * 4
    with pytest.raises(argparse.ArgumentTypeError, match="maybe"):
        str2bool("maybe")
