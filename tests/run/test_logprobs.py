"""Log-probabilities of tokens and of prompts are those of transformers' logits, wherever the weights lie."""

from __future__ import annotations

import pytest
import torch
from transformers import OPTForCausalLM

from flexgen_triton import LLM, Policy, SamplingParams

TOP = 3
SPREAD = (20, 30, 25, 30, 40, 30)


@pytest.fixture(params=[False, True], ids=["head whole", "head in parts"])
def head(request, monkeypatch):
    if request.param:
        monkeypatch.setattr("flexgen_triton.models.parts.MIN_HEAD_PART_BYTES", 1)
        monkeypatch.setattr("flexgen_triton.run.head.SCORED_ROWS", 7)
    return request.param


@pytest.mark.parametrize("copies", [False, True], ids=["in place", "copied"])
def test_they_are_those_of_transformers(tiny_models, tmp_path, copies, head):
    tiny = tiny_models["pre-norm, 3 heads of 64"]
    params = [
        SamplingParams(
            max_tokens=4, temperature=0, ignore_eos=True, logprobs=TOP if n % 2 else None,
            prompt_logprobs=TOP if n % 3 else None,
        )
        for n in range(len(tiny.prompts))
    ]  # fmt: skip
    with LLM(str(tiny.path), policy=Policy(3, 2, *SPREAD), dtype="float32", offload_dir=tmp_path, copies=copies) as llm:
        assert sum(bundle.is_head for bundle in llm.engine.spec.bundles(False)) > 1 or not head
        outputs = llm.generate(tiny.prompts, params)
    model = OPTForCausalLM.from_pretrained(tiny.path, dtype=torch.float32).eval()
    for output, asked, prompt in zip(outputs, params, tiny.prompts, strict=True):
        (completion,) = output.outputs
        ids = [*prompt, *completion.token_ids]
        with torch.inference_mode():
            want = model(torch.tensor([ids])).logits[0].log_softmax(-1)  # [T, V]: of the token after each
        if asked.prompt_logprobs is None:
            assert output.prompt_logprobs is None
        else:
            assert output.prompt_logprobs is not None
            assert len(output.prompt_logprobs) == len(prompt) and output.prompt_logprobs[0] is None
            check(output.prompt_logprobs[1:], want[: len(prompt) - 1], ids[1:])
        if asked.logprobs is None:
            assert completion.logprobs is None and completion.cumulative_logprob is None
        else:
            check(completion.logprobs, want[len(prompt) - 1 : -1], completion.token_ids)
            own = sum(want[len(prompt) - 1 + n, t].item() for n, t in enumerate(completion.token_ids))
            assert completion.cumulative_logprob == pytest.approx(own, abs=1e-3)


def check(found, want, tokens):
    """Each position's table has its token and the likeliest, with their log-probabilities."""
    assert len(found) == len(want)
    for table, row, token in zip(found, want, tokens, strict=False):
        likeliest = row.topk(TOP).indices.tolist()
        assert set(table) == {token, *likeliest}
        assert next(iter(table)) == token
        for t, entry in table.items():
            assert entry.logprob == pytest.approx(row[t].item(), abs=2e-4)
        assert [table[t].rank for t in likeliest] == [1, 2, 3]
