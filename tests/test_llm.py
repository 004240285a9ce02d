"""Finding a model and its dtype: directories, the hub's cache, random weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexgen_triton import LLM, Policy, SamplingParams
from flexgen_triton.models.config import ModelError
from flexgen_triton.models.locate import check_device, choose_dtype, find_model

ROOT = Path(__file__).parents[1]
GREEDY = SamplingParams(max_tokens=5, ignore_eos=True, temperature=0)


def test_a_hub_id_is_read_from_the_cache_when_offline(tiny, tmp_path):
    snapshot = tmp_path / "hub" / "models--someone--tiny" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0123abcd")
    for file in tiny.path.iterdir():
        (snapshot / file.name).symlink_to(file)
    code = (
        "from flexgen_triton import LLM, Policy, SamplingParams\n"
        f"with LLM('someone/tiny', policy=Policy(), offload_dir={str(tmp_path / 'off')!r}) as llm:\n"
        f"    out = llm.generate({tiny.prompts!r}, SamplingParams(max_tokens=4, ignore_eos=True, temperature=0))\n"
        "print([o.outputs[0].token_ids for o in out])"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [t[:4] for t in tiny.tokens]


@pytest.mark.parametrize("prefix", ["model.", ""], ids=["prefixed", "bare"])
def test_a_pickled_checkpoint_is_converted_and_then_reused(tiny, tmp_path, prefix):
    """The hub's OPT repositories hold `.bin` files, some without the "model." prefix."""
    source = tmp_path / "opt-bin"
    source.mkdir()
    (source / "config.json").write_text((tiny.path / "config.json").read_text())
    tensors = load_file(tiny.path / "model.safetensors")
    torch.save({k.replace("model.", prefix, 1): v for k, v in tensors.items()}, source / "pytorch_model.bin")
    steps: list[tuple[str, int, int]] = []
    for run in range(2):
        steps.clear()
        with LLM(
            str(source),
            policy=Policy(4, 2, 10, 20, 0, 50),
            offload_dir=tmp_path / "off",
            progress=lambda *s: steps.append(s),
        ) as llm:
            outputs = llm.generate(tiny.prompts, GREEDY)
        assert [o.outputs[0].token_ids for o in outputs] == [t[:5] for t in tiny.tokens]
        assert any(phase == "convert" for phase, *_ in steps) == (run == 0)


def test_sixteen_bit_weights_stream_from_where_they_lie(tiny, tmp_path):
    """bf16 on disk, bf16 run: no copy is made, and the tokens are those of all-resident weights."""
    source = tmp_path / "opt-bf16"
    source.mkdir()
    config = json.loads((tiny.path / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    tensors = load_file(tiny.path / "model.safetensors")
    save_file({k: v.bfloat16() for k, v in tensors.items()}, source / "model.safetensors")
    answers = []
    for policy in (Policy(4, 2), Policy(4, 2, 0, 0, 0, 0, 0, 0), Policy(4, 2, 30, 30, 30, 30, 30, 30)):
        for copies in (False, True):
            with LLM(str(source), policy=policy, offload_dir=tmp_path / "off", copies=copies) as llm:
                assert llm.spec.dtype == "bfloat16"
                answers.append([o.outputs[0].token_ids for o in llm.generate(tiny.prompts, GREEDY)])
    assert all(answer == answers[0] for answer in answers)
    assert not list((tmp_path / "off").iterdir())


def test_texts_go_in_and_come_out(tmp_path):
    prompts = ["Return the", "Raise an exception if the file"]
    with LLM("demo", policy=Policy(1, 2), offload_dir=tmp_path) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=6, ignore_eos=True, temperature=0))
    for output, prompt in zip(outputs, prompts, strict=True):
        assert output.prompt == prompt
        assert output.prompt_token_ids[0] == 2, "OPT's texts begin with </s>"
        assert output.outputs[0].text and len(output.outputs[0].token_ids) == 6


def test_dtype_is_the_checkpoints_own_unless_asked(tiny):
    source = find_model(str(tiny.path))
    assert choose_dtype("auto", source) == "float32"
    assert choose_dtype("bfloat16", source) == "bfloat16"
    with pytest.raises(ModelError, match="not supported"):
        choose_dtype("int4", source)


def test_random_weights_of_a_directorys_shape(tiny, tmp_path):
    with LLM(str(tiny.path), path="_DUMMY_", policy=Policy(), offload_dir=tmp_path) as llm:
        outputs = llm.generate(tiny.prompts[:2], GREEDY)
        with pytest.raises(ModelError, match="token ids"):
            llm.generate(["text"], GREEDY)
    assert [len(o.outputs[0].token_ids) for o in outputs] == [5, 5]


def test_bfloat16_is_refused_where_the_gpu_has_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a T4")
    with pytest.raises(ModelError, match=r"bfloat16 needs .* 8\.0, a T4 has 7\.5; use --dtype float16"):
        check_device("bfloat16", torch.device("cuda"))
    check_device("float16", torch.device("cuda"))
    check_device("bfloat16", torch.device("cpu"))
