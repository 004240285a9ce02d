"""Llama: its configurations are read or refused in a sentence, and its tokens are transformers' under any policy."""

from __future__ import annotations

import json
from itertools import product

import pytest
import torch
from tiny_models import NEW_TOKENS, PROMPT_LENS, Tiny, answers
from transformers import LlamaConfig, LlamaForCausalLM

from flexgen_triton import LLM, Policy, SamplingParams
from flexgen_triton.models.config import ModelError
from flexgen_triton.models.family import model_spec, read_config

GREEDY = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
SIZES = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "num_hidden_layers": 3}
JSON = {"model_type": "llama", **SIZES, "intermediate_size": 160, "vocab_size": 503}
PLACES = {
    "resident": (100, 0, 100, 0, 100, 0),
    "host": (0, 100, 0, 100, 0, 100),
    "disk": (0, 0, 0, 0, 0, 0),
    "mixed": (20, 30, 40, 30, 30, 30),
}
CHANGES = {
    "": {"gpu_batch_size": 3, "num_gpu_batches": 2},
    "joined, serial": {"gpu_batch_size": 2, "num_gpu_batches": 3, "sep_layer": False, "overlap": False},
    "host attention": {"gpu_batch_size": 4, "num_gpu_batches": 2, "cpu_cache_compute": True, "keep_open_pages": True},
}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def llama(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Six query heads that share two of K and V, and heads wider than the hidden state."""
    torch.manual_seed(7)
    sizes = {**SIZES, "intermediate_size": 160, "vocab_size": 503, "max_position_embeddings": 128}
    config = LlamaConfig(**sizes, tie_word_embeddings=request.param, initializer_range=0.15)
    model = LlamaForCausalLM(config).eval()
    path = tmp_path_factory.mktemp("llama")
    model.save_pretrained(path)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(4, config.vocab_size, (n,), generator=generator).tolist() for n in PROMPT_LENS]
    return Tiny(path, prompts, *answers(model, prompts))


@pytest.mark.parametrize(("place", "change"), list(product(PLACES, CHANGES)))
def test_tokens_are_transformers_under_any_policy(llama, tmp_path, place, change):
    shares = ("w_gpu_percent", "w_cpu_percent", "cache_gpu_percent", "cache_cpu_percent", "act_gpu_percent")
    placed = dict(zip((*shares, "act_cpu_percent"), PLACES[place], strict=True))
    policy = Policy(**placed, **CHANGES[change])
    with LLM(str(llama.path), policy=policy, dtype="float32", offload_dir=tmp_path, copies=place != "resident") as llm:
        outputs = llm.generate(llama.prompts, GREEDY)
    assert [o.outputs[0].token_ids for o in outputs] == llama.tokens


@pytest.mark.parametrize(
    "formats", [{"compress_weight": True}, {"compress_cache": True, "attn_sparsity": 0.5}], ids=str
)
def test_formats_do_not_depend_on_where_bytes_lie(llama, tmp_path, formats):
    found = []
    for place in ("resident", "mixed"):
        policy = Policy(3, 2, *PLACES[place], **formats)
        with LLM(str(llama.path), policy=policy, dtype="float32", offload_dir=tmp_path, copies=place == "mixed") as llm:
            found.append([o.outputs[0].token_ids for o in llm.generate(llama.prompts, GREEDY)])
    assert found[0] == found[1]


def test_any_of_several_ends_of_text_ends_it(llama, tmp_path):
    first, second = llama.tokens[0][2], llama.tokens[2][4]
    config = json.loads((llama.path / "config.json").read_text())
    own = tmp_path / "model"
    own.mkdir()
    (own / "model.safetensors").symlink_to(llama.path / "model.safetensors")
    (own / "config.json").write_text(json.dumps({**config, "eos_token_id": [first, second]}))
    with LLM(str(own), policy=Policy(3, 2), dtype="float32", offload_dir=tmp_path / "off") as llm:
        outputs = llm.generate(llama.prompts, SamplingParams(max_tokens=NEW_TOKENS, temperature=0))
    for output, want in zip(outputs, llama.tokens, strict=True):
        ends = [n for n, token in enumerate(want) if token in (first, second)]
        assert output.outputs[0].token_ids == want[: ends[0] + 1 if ends else NEW_TOKENS]
        assert output.outputs[0].finish_reason == ("stop" if ends else "length")
    assert min(len(o.outputs[0].token_ids) for o in outputs) < NEW_TOKENS


def test_every_tensor_of_transformers_is_used_once():
    config = read_config(JSON)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in JSON.items() if k != "model_type"}))
    shapes = {n.removeprefix("model."): tuple(p.shape) for n, p in model.named_parameters()}
    rows = dict.fromkeys(shapes, 0)
    for tensor in (t for m in model_spec(config, "tiny", "float16").modules for t in m.tensors):
        for source, count in zip(tensor.sources, tensor.source_rows, strict=True):
            rows[source] += count
            assert shapes[source][1:] == tensor.shape[1:], source
    assert rows == {source: shape[0] for source, shape in shapes.items()}


def test_defaults_are_transformers():
    config = read_config({k: v for k, v in JSON.items() if k not in ("num_key_value_heads", "head_dim")})
    assert (config.kv_heads, config.head_dim, config.rope_theta, config.tied) == (6, 16, 1e4, False)
    assert read_config({**JSON, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}).rope_theta == 5e5
    assert read_config({**JSON, "rope_theta": 5e5}).rope_theta == 5e5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 'rope_type is "llama3"; this version does not'),
        ({"rope_parameters": {"rope_type": "yarn"}}, 'rope_type is "yarn"'),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"mlp_bias": True}, "mlp_bias is true"),
        ({"rope_scaling": [1]}, "rope_type is a list of 1"),
        ({"num_key_value_heads": 4}, "num_key_value_heads 4"),
        ({"head_dim": 31}, "head_dim 31"),
        ({"hidden_act": "mish"}, "hidden_act is .mish.; that is unknown"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps is"),
        ({"rope_theta": 0}, "rope_theta is 0; it must be a number from 1"),
        ({"eos_token_id": [2, 503]}, "eos_token_id is 503"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_run(change, words):
    with pytest.raises(ModelError, match=words):
        read_config({**JSON, **change})
