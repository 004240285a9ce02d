"""Any number of prompts of any lengths: the tokens are transformers', run one prompt at a time."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from flexgen_triton import LLM, Policy, SamplingParams
from flexgen_triton.sequences.outputs import RequestOutput

COUNT, LONGEST, MOST_TOKENS, VOCAB = 200, 400, 16, 211
SPREAD = (20, 30, 25, 40, 40, 30)

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Mixed:
    """Prompts of 1 to 400 tokens, what each asks for, and the greedy tokens up to the end of text."""

    path: Path
    prompts: list[list[int]]
    params: list[SamplingParams]
    tokens: list[list[int]]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Mixed:
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("mixed") / "opt-mixed"
    config = OPTConfig(
        hidden_size=128, num_attention_heads=2, ffn_dim=160, num_hidden_layers=2, vocab_size=VOCAB,
        max_position_embeddings=LONGEST + MOST_TOKENS, word_embed_proj_dim=128, init_std=0.3, dropout=0.0,
    )  # fmt: skip
    model = OPTForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    model.save_pretrained(path)
    draw = random.Random(5)
    lens = [1, LONGEST, *(draw.randint(1, LONGEST) for _ in range(COUNT - 2))]
    prompts = [[draw.randrange(3, VOCAB) for _ in range(n)] for n in lens]
    tokens = [greedy(model, prompt) for prompt in prompts]
    asked = [draw.randint(1, MOST_TOKENS) for _ in prompts]
    counts = Counter(t for found in tokens for t in set(found[:8]))
    eos = min(counts, key=lambda t: (abs(counts[t] - COUNT // 2), t))  # ends about half of them early
    written = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**written, "eos_token_id": eos}))
    cut = [found[: found.index(eos) + 1] if eos in found else found for found in tokens]
    assert sum(len(c) < n for c, n in zip(cut, asked, strict=True)) > COUNT // 10
    params = [SamplingParams(max_tokens=n, temperature=0) for n in asked]
    return Mixed(path, prompts, params, [c[:n] for c, n in zip(cut, asked, strict=True)])


@torch.inference_mode()
def greedy(model: OPTForCausalLM, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=MOST_TOKENS,
        do_sample=False,
    )
    found: list[int] = out[0, len(prompt) :].tolist()
    return found


def check(mixed: Mixed, outputs: list[RequestOutput]) -> None:
    assert [o.outputs[0].token_ids for o in outputs] == mixed.tokens
    for output, params in zip(outputs, mixed.params, strict=True):
        if len(output.outputs[0].token_ids) < params.max_tokens:
            assert output.outputs[0].finish_reason == "stop"


@pytest.mark.grid(cover=["overlap"])
@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "sequential"])
@pytest.mark.parametrize("num_gpu_batches", [1, 2, 3, 4])
def test_tokens_are_transformers_tokens(mixed, tmp_path, num_gpu_batches, overlap):
    policy = Policy(13, num_gpu_batches, *SPREAD, overlap=overlap)
    copies = num_gpu_batches % 2 == 0
    with LLM(str(mixed.path), policy=policy, dtype="float32", offload_dir=tmp_path, copies=copies) as llm:
        check(mixed, llm.generate(mixed.prompts, mixed.params))


@pytest.mark.grid(cover=[])
@pytest.mark.parametrize("num_gpu_batches", [1, 3])
def test_a_stream_gives_the_same(mixed, tmp_path, num_gpu_batches, monkeypatch):
    """Few are read ahead, so that the pool is refilled between blocks."""
    monkeypatch.setattr("flexgen_triton.run.engine.MIN_WAITING", 60)
    monkeypatch.setattr("flexgen_triton.run.engine.WAITING_ROUNDS", 2)
    policy = Policy(9, num_gpu_batches, *SPREAD)
    pairs = iter(zip(mixed.prompts, mixed.params, strict=True))
    with LLM(str(mixed.path), policy=policy, dtype="float32", offload_dir=tmp_path, copies=True) as llm:
        outputs = list(llm.stream(pairs))
        assert llm.totals.sequences == COUNT
        assert llm.totals.output_tokens == sum(map(len, mixed.tokens))
        assert llm.totals.rounds > COUNT / policy.round_size
    assert sorted(o.request_id for o in outputs) == list(range(COUNT)), "each once"
    assert [o.request_id for o in outputs] != list(range(COUNT)), "they come as they end"
    check(mixed, sorted(outputs, key=lambda o: o.request_id))


def test_the_cache_of_sequences_that_have_ended_stays_where_it_is(mixed, tmp_path):
    """All ask for as much, and some reach the end of text sooner: of those nothing is sent any more."""
    params = SamplingParams(max_tokens=MOST_TOKENS, temperature=0)
    sent = {}
    for ignore_eos in (False, True):
        asked = replace(params, ignore_eos=ignore_eos)
        with LLM(str(mixed.path), policy=Policy(50, 2, 100, 0, 0, 50), dtype="float32", offload_dir=tmp_path,
                 copies=True) as llm:  # fmt: skip
            llm.generate(mixed.prompts, asked)
            assert llm.last_report is not None
            lanes = llm.last_report.timeline.lanes["decode"]
        sent[ignore_eos] = lanes["h2d"].bytes, lanes["disk_in"].bytes
    for early, full in zip(sent[False], sent[True], strict=True):
        assert early < 0.9 * full
