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

import flexgen_triton
from flexgen_triton import LLM, Policy, SamplingParams, flex_opt, opt_config, utils
from flexgen_triton.commands import plan as plan_command
from flexgen_triton.demo import DEMO_DIR
from flexgen_triton.flex_opt import CompressionConfig, ExecutionEnv, OptLM, str2bool
from flexgen_triton.models.config import ModelError
from flexgen_triton.models.family import config_by_name, model_spec
from flexgen_triton.models.locate import find_model, find_sizes
from flexgen_triton.opt_config import OptConfig, get_opt_config
from flexgen_triton.plan.policy import PolicyError
from flexgen_triton.sequences.outputs import RequestOutput, answered

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
    """The library's answers to PROMPTS."""
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
    with pytest.raises(ValueError, match="debug_mode is 'slowly'; it is None or one of fewer_batch, breakdown"):
        model.generate([[5]], debug_mode="slowly")
    with pytest.raises(PolicyError, match="512 positions"):
        model.generate([[5]], max_new_tokens=600)
    formats = (False, CompressionConfig(), False, CompressionConfig(group_dim=2))
    with pytest.raises(PolicyError, match="attn_sparsity"):
        Policy(1, 1, 100, 0, 0, 100, 100, 0, True, True, True, True, 1.5, *formats)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="not a directory"):
        OptLM("unknown", ExecutionEnv.create(tmp_path), "~/opt_weights", Policy())


@pytest.mark.parametrize("name", ["facebook/opt-30b", "OPT-6.7B", "opt-175b", "opt-175b-stage"])
def test_sizes_by_name(name):
    config = get_opt_config(name)
    known = config_by_name(name)
    spec = model_spec(known, name, "float16")
    assert config.name == name.rsplit("/", 1)[-1].lower() and config.pad == config.pad_token_id == 1
    assert (config.hidden_size, config.n_head, config.ffn_embed_dim) == (spec.hidden, spec.num_heads, known.ffn)
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
    with pytest.raises(ModelError, match="no known size"):
        opt_config.get_opt_config("opt-999b")


def test_the_top_level_has_the_names_of_the_interface():
    assert (flexgen_triton.ExecutionEnv, flexgen_triton.OptLM) == (ExecutionEnv, OptLM)
    assert flexgen_triton.CompressionConfig is CompressionConfig and flexgen_triton.Policy is Policy


@pytest.mark.parametrize("module", [flex_opt, opt_config, utils], ids=lambda m: m.__name__)
def test_the_names_that_scripts_import(module):
    names = {
        flex_opt: "Policy OptLM ExecutionEnv Env Task CompressionConfig TorchDevice TorchDisk TorchMixedDevice "
        "str2bool get_opt_config get_filename add_parser_arguments get_test_inputs DUMMY_WEIGHT",
        opt_config: "OptConfig get_opt_config download_opt_weights disable_torch_init restore_torch_init",
        utils: "Task ExecutionEnv BenchmarkResult KB MB GB T run_cmd str2bool project_decode_latency "
        "write_benchmark_log read_benchmark_log",
    }
    assert not [name for name in names[module].split() if not hasattr(module, name)]


def test_an_older_script_that_makes_its_devices_itself(offload, tokens, capsys):
    gpu, cpu, disk = flex_opt.TorchDevice("cuda:0"), flex_opt.TorchDevice("cpu"), flex_opt.TorchDisk(str(offload))
    env = flex_opt.Env(gpu=gpu, cpu=cpu, disk=disk, mixed=flex_opt.TorchMixedDevice([gpu, cpu, disk]))
    model = OptLM(get_opt_config("demo"), env, "~/opt_weights", Policy(2, 2))
    model.init_all_weights()
    assert model.num_gpu_batches == 2
    assert model.generate(padded(5), max_new_tokens=6)[:, 5:].tolist() == tokens
    model.delete_all_weights()
    with pytest.raises(ValueError, match=r"init_all_weights\(\) loads them again"):
        model.generate(padded(5))
    model.init_all_weights()
    assert model.generate(padded(5), max_new_tokens=6)[:, 5:].tolist() == tokens
    used, peak = env.cpu.mem_stats()
    assert 0 < used <= peak
    assert env.cpu.print_stats()[1] >= peak and "cpu: " in capsys.readouterr().out
    size = disk.mem_stats()[0]
    (offload / "more").write_bytes(b"12345")
    assert disk.mem_stats()[0] == size + 5 and env.disk.print_stats()[0] == size + 5
    disk.close_copy_threads()
    with pytest.raises(ValueError, match="environment was closed"):
        model.generate(padded(5))


def test_a_text_ends_a_row_as_a_stop_token_does(model, tokens):
    tokenizer = model._llm.tokenizer
    stop = tokenizer.decode(tokens[0][:2])[-2:]
    ends = [min((n for n in range(1, 7) if stop in tokenizer.decode(new[:n])), default=6) for new in tokens]
    assert ends[0] <= 2
    output = model.generate(padded(5), max_new_tokens=6, stop=stop)
    assert output[:, 5:].tolist() == [new[:n] + [PAD] * (6 - n) for new, n in zip(tokens, ends, strict=True)]
    never = model.generate(padded(5), max_new_tokens=6, stop="\n\n\n")
    assert never[:, 5:].tolist() == tokens


def test_a_text_cannot_end_a_row_without_a_tokenizer(tmp_path, tiny):
    model = OptLM(str(tiny.path), ExecutionEnv.create(tmp_path), "~/opt_weights", Policy())
    with pytest.raises(ValueError, match=r"is a text, and .* has no tokenizer to find it; give a token id"):
        model.generate([[5, 6]], max_new_tokens=2, stop="x")
    model.delete_all_weights()


@pytest.mark.parametrize("kind", [int, np.int64])
def test_calls_as_an_evaluation_makes_them(model, tokens, kind):
    """Batches of one size, padded to 256 tokens and filled up with rows of padding; all but greedy by temperature."""
    rows = np.full((4, 256), PAD, dtype=np.int64)
    rows[:3] = padded(256)
    for stop in (kind(tokens[0][2]), None):
        output = model.generate(rows, do_sample=True, temperature=1e-7, max_new_tokens=6, stop=stop)
        assert output.shape == (4, 262) and output[3].tolist() == [PAD] * 262
        for row, new in zip(output[:3, 256:].tolist(), tokens, strict=True):
            end = new.index(stop) + 1 if stop in new else 6
            assert row == new[:end] + [PAD] * (6 - end)


def test_debug_modes_cut_the_run_and_breakdown_says_what_each_lane_did(model, tokens, capsys):
    few = model.generate(padded(5), max_new_tokens=6, debug_mode="fewer_batch", verbose=2)
    steps = flex_opt.FEWER_STEPS
    assert few[:, 5:].tolist() == [new[:steps] + [PAD] * (6 - steps) for new in tokens]
    assert not capsys.readouterr().out
    broken = model.generate(padded(5), max_new_tokens=6, debug_mode="breakdown", cut_gen_len=2)
    assert broken[:, 5:].tolist() == [new[:2] + [PAD] * 4 for new in tokens]
    out = capsys.readouterr().out
    assert "lanes" in out and "prefill" in out and "decode" in out
    assert model._llm.policy == model.policy and model.policy.overlap


def test_a_prompt_without_an_answer_is_an_error():
    found = RequestOutput(0, None, [5], [])
    assert answered([found]) == [found]
    with pytest.raises(ValueError, match="prompt 1: it is too long"):
        answered([found, RequestOutput(1, None, [5], [], error="it is too long")])


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub's cache that holds nothing, and no way to the hub."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cached(hub: Path, name: str, directory: Path) -> None:
    """Put a checkpoint where the hub's client keeps what it fetched."""
    repository = hub / f"models--facebook--{name}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / ("0" * 40)).symlink_to(directory)


def test_numpy_weights_are_not_passed_over_to_fetch_the_model_again(tmp_path, hub, tiny):
    arrays = tmp_path / "opt_weights" / "opt-30b-np"
    arrays.mkdir(parents=True)
    (arrays / "decoder.embed_tokens.weight").write_bytes(b"")
    for path in (arrays.parent, arrays):
        with pytest.raises(ModelError, match="opt-30b-np has FlexGen's numpy weights"):
            find_model("facebook/opt-30b", str(path))
    cached(hub, "opt-30b", tiny.path)
    with pytest.warns(UserWarning, match="the copy of facebook/opt-30b that was fetched from the hub before is used"):
        found = find_model("facebook/opt-30b", str(arrays.parent))
    assert found.name == "opt-30b" and found.config.vocab == 1003


def test_where_the_weights_are_not_the_hub_is_asked_by_one_rule(tmp_path, hub, tiny):
    nowhere = str(tmp_path / "opt_weights")
    for name in ("facebook/opt-1.3b", "opt-1.3b"):
        with pytest.raises(ModelError, match=r"opt_weights has no config.json.* nor to be had from the hub"):
            find_model(name, nowhere)
    cached(hub, "opt-1.3b", tiny.path)
    model = OptLM("opt-1.3b", ExecutionEnv.create(tmp_path / "offload"), nowhere, Policy(4))
    assert model.generate([tiny.prompts[2]], max_new_tokens=4)[0, -4:].tolist() == tiny.tokens[2][:4]
    model.delete_all_weights()
    assert find_model("facebook/opt-1.3b", nowhere).name == "opt-1.3b"
    assert opt_config.download_opt_weights("facebook/opt-1.3b", nowhere).resolve() == tiny.path.resolve()
    with pytest.raises(ModelError, match="nothing to fetch"):
        opt_config.download_opt_weights("opt-1.3b", "_DUMMY_")
    (tmp_path / "opt_weights").mkdir()
    (tmp_path / "opt_weights" / "model.safetensors").touch()
    with pytest.raises(ModelError, match=r"model.safetensors but no config.json"):
        find_model("facebook/opt-6.7b", nowhere)


def test_sizes_alone_are_not_fetched_for(tmp_path, hub):
    """For a plan and a dry run, with FlexGen's default path, which need not exist."""
    for path in (None, str(tmp_path / "opt_weights")):
        assert find_sizes("facebook/opt-30b", path).config.layers == 48
        found = plan_command.Model.find("facebook/opt-30b", path, "auto")
        assert found.source.directory is None and found.flags[-1] == (path or "_DUMMY_")
    with pytest.raises(ModelError, match="no known size"):
        plan_command.Model.find("nobody/nothing", str(tmp_path / "opt_weights"), "auto")
    assert not hub.exists()


def test_layers_are_made_without_values_while_asked(monkeypatch):
    before = torch.nn.Linear.reset_parameters, torch.nn.LayerNorm.reset_parameters
    opt_config.disable_torch_init()
    opt_config.disable_torch_init()
    layer = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(layer.weight, 3.0)
    layer.reset_parameters()
    opt_config.restore_torch_init()
    opt_config.restore_torch_init()
    assert layer.weight.tolist() == [[3.0, 3.0]] * 2
    assert before == (torch.nn.Linear.reset_parameters, torch.nn.LayerNorm.reset_parameters)


def test_a_benchmarks_own_inputs_flags_and_log_name(model):
    inputs = flex_opt.get_test_inputs(24, 3, model._llm.tokenizer)
    assert len(inputs) == 3 and inputs[0] == inputs[2] and [len(row) for row in inputs] == [24] * 3
    parser = argparse.ArgumentParser()
    flex_opt.add_parser_arguments(parser)
    args = parser.parse_args(["--model", "facebook/opt-30b", "--cpu", "--pin-weight", "0", "--debug", "fewer_batch"])
    assert args.cpu_cache_compute and not args.pin_weight and args.debug_mode == "fewer_batch"
    name = "fo-opt-30b-gbs4-ngbs1-prompt512-gen32-percent-100-0-100-0-100-0-cpu-cache-nopin"
    assert flex_opt.get_filename(args) == name


def test_str2bool():
    assert [str2bool(v) for v in ("true", "Yes", "1", True)] == [True] * 4
    assert [str2bool(v) for v in ("false", "N", "0", False)] == [False] * 4
    with pytest.raises(argparse.ArgumentTypeError, match="maybe"):
        str2bool("maybe")


def test_run_cmd_says_what_it_runs(capfd):
    assert utils.run_cmd("echo $((40 + 2)); exit 3") == 3
    assert capfd.readouterr().out == "echo $((40 + 2)); exit 3\n42\n"


def test_decode_is_projected_from_the_steps_after_the_first_two():
    assert utils.project_decode_latency([9, 4, 3, 1, 2], 512, 32) == pytest.approx(4 + 3 + 1.5 * 29)
    assert utils.project_decode_latency([9, 4], 512, 8) == 4 + 4 * 6
    assert utils.project_decode_latency([9, 4, 3, 1], 512, 4) == 8
    with pytest.raises(ValueError, match="at least one more token step"):
        utils.project_decode_latency([9], 512, 32)


def test_a_log_is_read_back(tmp_path):
    figures = (3 << 30, 1 << 30, 1 << 20, 0, True, 1.5, 20.25, 3.0, 8.125, 4.5, 7.0)
    text = utils.write_benchmark_log(tmp_path / "run.log", *figures)
    assert (tmp_path / "run.log").read_text() == text + "\n"
    assert utils.read_benchmark_log(tmp_path / "run.log") == utils.BenchmarkResult(1.5, 20.25, 3.0, 8.125, 4.5, 7.0)
    (tmp_path / "run.log").write_text("hello\n")
    with pytest.raises(ValueError, match=r"run\.log is no log"):
        utils.read_benchmark_log(tmp_path / "run.log")
