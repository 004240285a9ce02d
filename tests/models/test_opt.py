"""OPT's specs are transformers' models, tensor for tensor."""

from __future__ import annotations

import pytest
import torch
from transformers import OPTConfig as HFConfig
from transformers import OPTForCausalLM

from flexgen_triton.models.config import ModelConfig, ModelError
from flexgen_triton.models.family import SIZES, config_by_name, model_spec, read_config
from flexgen_triton.models.opt import NAMES

PUBLISHED = {  # parameters of the published checkpoints, in millions
    "opt-125m": 125.2,
    "opt-350m": 331.2,
    "opt-1.3b": 1315.8,
    "opt-2.7b": 2651.6,
    "opt-6.7b": 6658.5,
    "opt-13b": 12853.5,
    "opt-30b": 29974.5,
    "opt-66b": 65718.7,
}


def transformers_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    fields = {name: getattr(config, own) for name, own in NAMES.items()} | {"eos_token_id": config.eos_ids[0]}
    with torch.device("meta"):
        model = OPTForCausalLM(HFConfig(**{**fields, "word_embed_proj_dim": config.embed_width}))
    shapes = {n.removeprefix("model."): tuple(p.shape) for n, p in model.named_parameters()}
    if config.tied:
        shapes.pop("lm_head.weight", None)
    return shapes


@pytest.mark.parametrize("name", SIZES)
def test_every_tensor_of_transformers_is_used_once(name):
    config = SIZES[name]
    shapes = transformers_shapes(config)
    rows = dict.fromkeys(shapes, 0)
    for module in model_spec(config, name, "float16").modules:
        for tensor in module.tensors:
            assert tensor.shape[0] == sum(tensor.source_rows)
            for source, count in zip(tensor.sources, tensor.source_rows, strict=True):
                rows[source] += count
                assert shapes[source][1:] == tensor.shape[1:], source
    assert rows == {source: shape[0] for source, shape in shapes.items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name):
    assert model_spec(SIZES[name], name, "float16").num_parameters / 1e6 == pytest.approx(PUBLISHED[name], rel=2e-3)


def test_the_output_projection_is_cut_so_that_no_slot_dwarfs_the_others():
    spec = model_spec(SIZES["opt-1.3b"], "opt-1.3b", "bfloat16")
    sizes = {m.name: sum(t.nbytes for t in m.tensors if not t.gathered) for m in spec.modules}
    assert max(sizes.values()) == max(v for n, v in sizes.items() if n.startswith("mlp"))
    assert sum(n.startswith("head") for n in sizes) == 4


def test_names_are_found_with_and_without_an_owner():
    assert config_by_name("facebook/opt-30b") is config_by_name("OPT-30B") is SIZES["opt-30b"]
    assert config_by_name("gpt2") is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt2"}, "runs opt.* models only"),
        ({"hidden_size": 100}, "not a multiple"),
        ({"activation_function": "mish"}, "unknown"),
        ({"ffn_dim": None}, "lacks"),
    ],
)
def test_a_config_that_cannot_be_run(change, words):
    good = {"model_type": "opt", "hidden_size": 96, "num_hidden_layers": 1, "num_attention_heads": 3, "ffn_dim": 8}
    fields = {**good, **change}
    fields = {k: v for k, v in fields.items() if v is not None}
    with pytest.raises(ModelError, match=words):
        read_config(fields)
