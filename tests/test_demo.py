"""The demo model loads offline, is small, speaks, and is as good as its README says."""

import re
from itertools import pairwise

import pytest
import torch
from transformers import AutoTokenizer, OPTForCausalLM, PreTrainedTokenizerFast

from flexgen_triton.demo import DEMO_DIR, heldout, prompts

MAX_BYTES = 8_000_000

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(DEMO_DIR, local_files_only=True)


def sampled(model: OPTForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, num_tokens: int) -> str:
    """As the benchmark shows it: at temperature 0.7. Greedy text of a model this briefly trained goes in circles."""
    torch.manual_seed(0)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=True, temperature=0.7, top_k=0
    )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def slice_documents(num_bytes: int) -> list[str]:
    """The documents that end within the first `num_bytes`, a separator counted as one byte."""
    kept, used = [], 0
    for document in heldout():
        used += len(document.encode()) + 1
        if used > num_bytes:
            return kept
        kept.append(document)
    return kept


@torch.inference_mode()
def perplexity(model: OPTForCausalLM, stream: torch.Tensor, bos: int) -> float:
    """The slow way round: 255 or 256 new tokens a window, all tokens of the stream judged once."""
    context = model.config.max_position_embeddings
    logprobs = []
    for first in [0, *range(context - 1, len(stream), context // 2)]:
        last = context - 1 if first == 0 else min(first + context // 2, len(stream))
        window = torch.tensor([bos, *stream[max(0, last - context + 1) : last].tolist()])
        scores = model(input_ids=window[None]).logits[0, :-1].log_softmax(dim=-1)
        logprobs.append(scores.gather(1, window[1:, None])[first - last :, 0])
    judged = torch.cat(logprobs)
    assert len(judged) == len(stream)
    return float(judged.mean().neg().exp())


def test_everything_stays_below_eight_megabytes() -> None:
    assert sum(path.stat().st_size for path in DEMO_DIR.iterdir() if path.is_file()) <= MAX_BYTES


def test_config_is_an_ordinary_opt(model: OPTForCausalLM) -> None:
    config = model.config
    assert config.architectures == ["OPTForCausalLM"]
    assert config.hidden_size // config.num_attention_heads == 64
    assert config.word_embed_proj_dim == config.hidden_size
    assert config.do_layer_norm_before
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (2, 2, 1)


def test_tokenizer_prepends_bos_and_gives_text_back(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "Raises ValueError if x < 0;\n  naïve “quotes” survive."
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == 2
    assert ids.count(2) == 1
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_prompts_have_different_lengths_and_leave_room(tokenizer: PreTrainedTokenizerFast) -> None:
    lengths = [len(ids) for ids in tokenizer(prompts())["input_ids"]]
    assert len(set(lengths)) == len(lengths) >= 16
    assert max(lengths) <= 128


def test_continuations_differ_and_are_text(model: OPTForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    known = set(re.findall(r"[a-z]+", " ".join(heldout()).lower()))
    texts = [sampled(model, tokenizer, prompt, num_tokens=32) for prompt in prompts()[:4]]
    assert len(set(texts)) == len(texts)
    for text in texts:
        words = re.findall(r"[a-z]+", text.lower())
        assert len(words) >= 12, text
        pairs = list(pairwise(words))
        assert len(set(pairs)) >= len(pairs) / 2, f"it loops: {text}"  # greedy text: a fifth
        assert sum(word in known for word in words) >= 0.8 * len(words), text


def test_readme_states_the_heldout_perplexity(model: OPTForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    readme = (DEMO_DIR / "README.md").read_text(encoding="utf-8")
    (stated,) = re.findall(r"Held-out perplexity, slice \| ([\d.]+)", readme)
    encoded = tokenizer(slice_documents(16 * 1024), add_special_tokens=False, verbose=False)["input_ids"]
    stream = torch.tensor([token for ids in encoded for token in (*ids, 2)])
    assert perplexity(model, stream, bos=2) == pytest.approx(float(stated), rel=0.05)
