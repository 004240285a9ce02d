"""Numbers that are no numbers end the requests they touch with an error that names the cause, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny_models import Tiny
from torch import Tensor

from flexgen_triton import LLM, Policy, SamplingParams
from flexgen_triton.commands import bench
from flexgen_triton.commands.main import cli
from flexgen_triton.demo import DEMO_DIR
from flexgen_triton.flex_opt import ExecutionEnv, OptLM
from flexgen_triton.run import engine as engine_module
from flexgen_triton.sequences.outputs import OutputError, RequestOutput

GREEDY = SamplingParams(max_tokens=10, ignore_eos=True, temperature=0)
MIXED = (20, 30, 25, 30, 40, 30)
SPREAD = Policy(4, 2, *MIXED)
PLACES = {
    "in memory": ((100, 0, 100, 0, 100, 0), {}),
    "on the host": ((0, 100, 0, 100, 0, 100), {}),
    "on disk": ((0, 0, 0, 0, 0, 0), {}),
    "a bit of each": (MIXED, {}),
    "attended on the host": ((20, 30, 25, 70, 40, 30), {"cpu_cache_compute": True, "cpu_attention_percent": 50}),
    "4-bit cache": (MIXED, {"compress_cache": True}),
    "sparse": (MIXED, {"attn_sparsity": 0.5}),
}
AGAIN = "the checkpoint is damaged; download it again"
FC1, POSITIONS = "decoder.layers.1.fc1.weight", "decoder.embed_positions.weight"
BAD_POSITION = 40  # which of PROMPT_LENS 33 and 70 come to, 33 with its eighth new token
Change = Callable[[dict[str, Tensor]], None]

pytestmark = pytest.mark.usefixtures("one_thread")


def damaged(tiny: Tiny, folder: Path, change: Change, name: str = "opt-damaged") -> str:
    """A copy of the checkpoint with tensors, by their plain names, changed in place."""
    source = folder / name
    source.mkdir()
    shutil.copy(tiny.path / "config.json", source)
    tensors = load_file(tiny.path / "model.safetensors")
    change({key.removeprefix("model."): t for key, t in tensors.items()})
    save_file(tensors, source / "model.safetensors")
    return str(source)


def two_nans(tensors: dict[str, Tensor]) -> None:
    tensors[FC1][7, 11] = tensors[FC1][200, 3] = torch.nan


def bad_position(tensors: dict[str, Tensor]) -> None:
    tensors[POSITIONS][BAD_POSITION + 2] = torch.nan


def errors(outputs: list[RequestOutput]) -> set[tuple[str | None, str | None]]:
    assert not any(o.outputs for o in outputs) and all(o.finished for o in outputs)
    return {(o.error_code, o.error) for o in outputs}


def run(source: str, folder: Path, prompts, *, policy=SPREAD, copies=True, **more):
    with LLM(source, policy=policy, offload_dir=folder / "off", copies=copies, **more) as llm:
        return llm.generate(prompts, GREEDY)


@pytest.mark.grid
@pytest.mark.parametrize("copies", [False, True], ids=["in place", "copied"])
@pytest.mark.parametrize("place", PLACES)
def test_a_bad_row_fails_the_prompts_that_use_it_and_no_other(tiny, tmp_path, place, copies):
    """A position's row: one prompt holds it, one comes to it half way, the others never do. The engine goes on."""
    percent, fields = PLACES[place]
    policy = Policy(4, 2, *percent, **fields)
    if policy.cpu_cache_compute and not copies:
        pytest.skip("the host is the device there")
    right = tiny.tokens
    if place in ("4-bit cache", "sparse"):
        whole = run(str(tiny.path), tmp_path, tiny.prompts, policy=policy, copies=copies, dtype="float32")
        right = [o.outputs[0].token_ids for o in whole]
    with LLM(
        damaged(tiny, tmp_path, bad_position), policy=policy, dtype="float32", offload_dir=tmp_path, copies=copies
    ) as llm:
        outputs = llm.generate(tiny.prompts, GREEDY)
        streamed = list(llm.stream((p, GREEDY) for p in tiny.prompts))
    for output in outputs + streamed:
        length = len(output.prompt_token_ids)
        if length not in (33, 70):
            assert output.error is None and output.outputs[0].token_ids == right[output.request_id]
            continue
        assert (output.outputs, output.error_code, output.finished) == ([], "not_finite", True)
        assert output.error == (
            f"the output projection's logits at token step {8 if length == 33 else 0} are not all numbers: "
            f"1003 of 1003 are NaN; {POSITIONS} holds 192 NaN values: {AGAIN}"
        )


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        (f"{FC1} holds 2 NaN values", {}),
        (f"{FC1} holds 4 NaN scales or minima of 4-bit groups", {"compress_weight": True}),
    ],
    ids=["16 bits", "4 bits"],
)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_weights_that_are_no_numbers_are_named(tiny, tmp_path, dtype, words, fields):
    source = damaged(tiny, tmp_path, two_nans)
    outputs = run(source, tmp_path, tiny.prompts, policy=Policy(3, 2, *MIXED, **fields), dtype=dtype)
    assert errors(outputs) == {
        (
            "not_finite",
            "the output projection's logits at token step 0 are not all numbers: 1003 of 1003 are NaN; "
            f"{words}: {AGAIN}",
        )
    }


@pytest.mark.parametrize(
    ("dtype", "fields", "names", "words"),
    [
        ("float32", {}, ("k_proj.weight", "v_proj.weight"), ("1 infinite value", "2 infinite values")),
        ("bfloat16", {}, ("q_proj.bias", "v_proj.bias"), ("1 infinite value", "2 infinite values")),
        (
            "float32",
            {"compress_weight": True},
            ("q_proj.weight", "k_proj.weight"),
            ("1 infinite scale or minimum of a 4-bit group",) * 2,
        ),
    ],
    ids=["in place", "converted", "4 bits"],
)
def test_fused_tensors_are_named_by_what_the_checkpoint_calls_them(tiny, tmp_path, dtype, fields, names, words):
    at = "decoder.layers.2.self_attn"

    def change(tensors: dict[str, Tensor]) -> None:
        for n, name in enumerate(names):
            tensors[f"{at}.{name}"].view(-1)[: n + 1] = torch.inf

    (output,) = run(damaged(tiny, tmp_path, change), tmp_path, [[5]], policy=Policy(**fields), dtype=dtype)
    said = "; ".join(f"{at}.{name} holds {what}" for name, what in zip(names, words, strict=True))
    assert output.error.endswith(f"; {said}: {AGAIN}")


def test_absurdly_large_weights_are_named(tiny, tmp_path):
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["decoder.layers.1.fc2.weight"][:] = 65504

    (error,) = errors(run(damaged(tiny, tmp_path, change), tmp_path, tiny.prompts, dtype="float16"))
    assert error[1].endswith(
        f"; decoder.layers.1.fc2.weight holds 65504, and no trained model has a weight over 10000: {AGAIN}"
    )


def test_an_overflow_in_float16_is_told_from_damage(tiny, tmp_path):
    """With the way out, which is one."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name in ("fc1", "fc2"):
            tensors[f"decoder.layers.1.{name}.weight"] *= 300

    source = damaged(tiny, tmp_path, change)
    (error,) = errors(run(source, tmp_path, tiny.prompts, dtype="float16"))
    assert "; the weights are finite, none larger than 2" in error[1] and "(decoder.layers.1.fc" in error[1]
    assert error[1].endswith("outgrew float16, which ends at 65504: run it with dtype bfloat16 or float32")
    for dtype in ("bfloat16", "float32"):
        assert not any(o.error for o in run(source, tmp_path, tiny.prompts, dtype=dtype))


def test_an_infinite_logit_is_an_error_too(tiny_models, tmp_path):
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["decoder.final_layer_norm.weight"][3] = 0
        tensors["decoder.final_layer_norm.bias"][3] = 5
        tensors["lm_head.weight"][17] = 0
        tensors["lm_head.weight"][17, 3] = 3e38

    tiny = tiny_models["heads of 128, untied"]
    found = errors(run(damaged(tiny, tmp_path, change), tmp_path, tiny.prompts, dtype="float32"))
    for code, error in found:
        assert code == "not_finite" and error.endswith(f"; lm_head.weight holds 3e+38, and no trained model has a "
                                                       f"weight over 10000: {AGAIN}")  # fmt: skip
        assert "step 0 are not all numbers: the 999 reach from -" in error and " to inf; " in error


def test_scored_prompts_and_several_completions_fail_once(tiny, tmp_path):
    """With sampling, penalties and log-probabilities, which a bad row goes through; beside it all is as ever."""
    params = SamplingParams(
        n=2, max_tokens=9, seed=5, ignore_eos=True, top_k=5, top_p=0.9, min_p=0.01, min_tokens=3,
        repetition_penalty=1.2, presence_penalty=0.5, logprobs=2, prompt_logprobs=2,
    )  # fmt: skip
    fields = {"policy": Policy(4, 2, *MIXED), "dtype": "float32", "offload_dir": tmp_path / "off", "copies": True}
    with LLM(str(tiny.path), **fields) as llm:
        whole = llm.generate(tiny.prompts, params)
    with LLM(damaged(tiny, tmp_path, bad_position), **fields) as llm:
        outputs = llm.generate(tiny.prompts, params)
        partial = [o for o in llm.stream(((p, params) for p in tiny.prompts), partial=True) if o.error]
    for output, right in zip(outputs, whole, strict=True):
        length = len(output.prompt_token_ids)
        if length not in (33, 70):
            assert output.outputs == right.outputs and output.prompt_logprobs == right.prompt_logprobs
            continue
        where = " at token step 8" if length == 33 else " of the prompt"
        assert output.error.startswith(f"the output projection's logits{where} are not all numbers: ")
        assert (output.outputs, output.prompt_logprobs) == ([], None)
    assert sorted(o.request_id for o in partial) == [0, 3], "each is told of once"
    assert "of the prompt are not all numbers: at 69 of 69 positions;" in outputs[3].error


def test_the_weights_are_looked_through_once(tiny, tmp_path, monkeypatch):
    told = []
    diagnose = engine_module.diagnose
    monkeypatch.setattr(engine_module, "diagnose", lambda *args: told.append(args) or diagnose(*args))
    with LLM(damaged(tiny, tmp_path, two_nans), policy=Policy(2), dtype="float32", offload_dir=tmp_path / "off") as llm:
        for _ in range(2):
            assert all(o.error for o in llm.generate(tiny.prompts, GREEDY))
    assert len(told) == 1


@pytest.fixture(scope="module")
def broken_demo(tmp_path_factory) -> Path:
    """The demo model with a NaN in a layer."""
    directory = tmp_path_factory.mktemp("models") / "broken"
    shutil.copytree(DEMO_DIR, directory, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    tensors = load_file(directory / "model.safetensors")
    name = next(n for n in tensors if n.endswith("decoder.layers.1.fc1.weight"))
    tensors[name][3, 4] = torch.nan
    save_file(tensors, directory / "model.safetensors")
    return directory


CAUSE = f"decoder.layers.1.fc1.weight holds 1 NaN value: {AGAIN}"


def test_every_command_says_so_and_fails(broken_demo, tmp_path):
    shared = ["--model", str(broken_demo), "--gpu-batch-size", "4", "--offload-dir", str(tmp_path / "off")]
    for command in (
        ["generate", "one prompt"],
        ["generate", "one prompt", "another"],
        ["bench", "--gen-len", "2", "--prompt-len", "8", "--no-log"],
    ):
        done = CliRunner().invoke(cli, [*command, *shared])
        assert isinstance(done.exception, ValueError), done
        assert CAUSE in str(done.exception) and "\n" not in str(done.exception)
    lines = [
        {"custom_id": f"{n}", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a", **more}}
        for n, more in enumerate(({}, {"logprobs": 2, "echo": True}, {"prompt": ["a", "b"], "n": 2}))
    ]
    (tmp_path / "in").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = CliRunner().invoke(cli, ["run-batch", "-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), *shared])
    assert done.exit_code == 0, done.output
    answers = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert sorted(a["custom_id"] for a in answers) == ["0", "1", "2"]
    for answer in answers:
        assert answer["response"] is None and answer["error"]["code"] == "not_finite"
        assert answer["error"]["message"].endswith(CAUSE)


def test_callers_who_need_every_answer_get_one_error(broken_demo, tmp_path):
    with (
        LLM(str(broken_demo), policy=Policy(2), offload_dir=tmp_path) as llm,
        pytest.raises(OutputError, match=rf"^prompt 0: .*{CAUSE} \(and 2 of the other prompts have no answer\)$"),
    ):
        bench.measure(llm, [[5], [6], [7]], GREEDY, gen_len=10)
    env = ExecutionEnv.create(str(tmp_path))
    model = OptLM("broken", env, str(broken_demo), Policy(2))
    with pytest.raises(OutputError, match=CAUSE):
        model.generate([[5, 6]], max_new_tokens=2)
    env.close_copy_threads()
