"""Train the demo model: a small OPT that speaks the prose of Python's own documentation.

Everything is made from what a Python installation carries: the docstrings and comment blocks of the standard library's
source files, and `pydoc_data.topics`, cleaned and split by demo_corpus.py. The script trains a byte-level BPE tokenizer
and the model within a time budget on the CPU, and writes model, tokenizer, held-out text and a README with the
measured perplexity to `--out`. It knows nothing of the engine; `prompts.txt` is written by hand.

    python bench/train_demo.py --out flexgen_triton/demo --minutes 25
"""

import argparse
import json
import math
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from demo_corpus import build_corpus, first_documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from flexgen_triton import demo

SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]  # OPT's ids 0 to 3
BOS = 2  # OPT begins and ends a text with the same token
VOCAB_SIZE = 4096
CONTEXT = 512
STRIDE = CONTEXT // 2  # of the held-out windows: every token is judged with at least half a context before it
SLICE_BYTES = 16 * 1024  # the beginning of the held-out text that the tests judge again
TOKENS_PER_STEP = 1024  # small, for more steps within the budget
LENGTHS = (128, 256, CONTEXT)  # taken in turn: short ones are faster per token, long ones train the late positions
PEAK_LR = 2e-3
WARMUP = 0.03  # of the time budget


@dataclass(frozen=True, slots=True)
class Score:
    """The model's loss on a text, summed over its tokens."""

    nats: float
    num_tokens: int
    num_bytes: int

    @property
    def perplexity(self) -> float:
        """Perplexity per token, so it depends on the tokenizer."""
        return math.exp(self.nats / self.num_tokens)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text, so it does not depend on the tokenizer."""
        return self.nats / math.log(2) / self.num_bytes


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE with OPT's special tokens, which prepends `</s>` as OPT's tokenizer does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A </s> $B", special_tokens=[("</s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """Every document followed by `</s>`: `[num_tokens] int64`."""
    encoded = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in (*ids, BOS)])


def paragraph_starts(tokenizer: PreTrainedTokenizerFast, stream: torch.Tensor) -> torch.Tensor:
    """Starts of training windows: `[num_starts] int64`, each with a full context after it."""
    (newline,) = tokenizer("\n", add_special_tokens=False)["input_ids"]
    ends = ((stream == newline) | (stream == BOS)).nonzero().squeeze(1)
    return ends[ends + CONTEXT < len(stream)] + 1


def demo_config() -> OPTConfig:
    """Six layers of three heads of 64, sized so that weights and texts stay below 8 MB in float16."""
    return OPTConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        word_embed_proj_dim=192,
        num_attention_heads=3,
        num_hidden_layers=6,
        ffn_dim=768,
        max_position_embeddings=CONTEXT,
        do_layer_norm_before=True,
        dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=BOS,
        eos_token_id=BOS,
        pad_token_id=1,
    )


def new_optimizer(model: OPTForCausalLM) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices only."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.98), fused=True)


def learning_rate(progress: float) -> float:
    """Linear warm-up, then a cosine to zero; `progress` runs from 0 to 1."""
    if progress < WARMUP:
        return PEAK_LR * max(progress, 1e-3) / WARMUP
    return PEAK_LR * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - WARMUP) / (1 - WARMUP))))


def sample_batch(stream: torch.Tensor, starts: torch.Tensor, length: int) -> torch.Tensor:
    """Random windows, each `</s>` and then text from the beginning of a paragraph: `[B, length] int64`."""
    chosen = starts[torch.randint(len(starts), (TOKENS_PER_STEP // length,))]
    batch = stream[chosen[:, None] - 1 + torch.arange(length)]
    batch[:, 0] = BOS
    return batch


def train(model: OPTForCausalLM, stream: torch.Tensor, starts: torch.Tensor, seconds: float) -> int:
    """Train in place for so many seconds of processor time, printing the loss; returns the number of steps."""
    optimizer = new_optimizer(model)
    began, step, mean = time.process_time(), 0, math.log(VOCAB_SIZE)
    while (progress := (time.process_time() - began) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress)
        batch = sample_batch(stream, starts, LENGTHS[step % len(LENGTHS)])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        mean += 0.02 * (loss.item() - mean)
        if step % 100 == 0:
            print(f"{progress:6.1%}  step {step:5}  train loss {mean:.3f}", flush=True)
    return step


@torch.inference_mode()
def score(model: OPTForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> Score:
    """Judge a text in windows of one context that slide by half of it, each beginning with `</s>`."""
    stream = token_stream(tokenizer, documents)
    nats, judged = 0.0, 0
    while judged < len(stream):
        end = min(len(stream), max(CONTEXT - 1, judged + STRIDE))
        text = stream[max(0, end - (CONTEXT - 1)) : end]
        window = torch.cat([torch.tensor([BOS]), text])
        logits = model(input_ids=window[None, :-1]).logits[0]
        costs = torch.nn.functional.cross_entropy(logits, window[1:], reduction="none")
        nats += costs[judged - end :].sum().item()
        judged = end
    return Score(nats, len(stream), sum(len(document.encode()) + 1 for document in documents))


def save(model: OPTForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write float16 weights, config and tokenizer, each file complete before it takes its name."""
    staging = out / "staging"
    model.half().save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    tokenizer.backend_tokenizer.save(str(staging / "tokenizer.json"), pretty=False)
    rewrite_json(staging / "config.json", {"torch_dtype": "float16"})
    rewrite_json(staging / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    for path in staging.iterdir():
        path.chmod(0o644)
        os.replace(path, out / path.name)
    staging.rmdir()


def rewrite_json(path: Path, changes: dict[str, str]) -> None:
    """Set the names that transformers 4 and 5 both read."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2, sort_keys=True) + "\n")


@torch.inference_mode()
def sample(model: OPTForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """A prompt and the greedy continuation of it, the continuation in bold."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, do_sample=False)
    continuation = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return f"> {prompt} **{' '.join(continuation.split())}**"


def readme(facts: dict[str, str], samples: list[str]) -> str:
    """The README that stands beside the weights."""
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return README.format(table=table, samples="\n\n".join(samples), python=platform.python_version())


README = """# Demo model

A small OPT that continues English documentation prose, so that the engine can be tried and tested without a download.
It writes phrases in that style and knows nothing; trained for minutes, it loops when decoded greedily, as shown below.

| | |
|---|---|
{table}

Perplexity is in float32 from the saved float16 weights, over windows of the context length that slide by half of it,
each beginning with `</s>`; bits per byte do not depend on the tokenizer. The slice is the whole documents that end
within the first 16 KiB of `heldout.txt`.

Trained on the docstrings and comment blocks of the standard library of CPython {python} and on its `pydoc_data.topics`,
cleaned to prose; whole modules and topics, chosen by a hash of their name, are held out in `heldout.txt` (a document's
paragraphs on lines of their own, documents separated by an empty line). `python bench/train_demo.py --out
flexgen_triton/demo` makes everything here again except `prompts.txt`, which is written by hand.

Greedy continuations of shipped prompts:

{samples}

The text is © Python Software Foundation and contributors, under the
[PSF License Agreement](https://docs.python.org/3/license.html), which allows derived works. `heldout.txt` is an
excerpt of it, cleaned as described; some paragraphs come from modules that carry their own permissive notices.
"""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=demo.DEMO_DIR, help="directory to write to")
    parser.add_argument("--minutes", type=float, default=25.0, help="processor time of training, per thread")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def measure(out: Path) -> tuple[dict[str, str], list[str]]:
    """Judge the model as saved: the README's facts and samples."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = OPTForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    documents = demo.heldout(out)
    whole = score(model, tokenizer, documents)
    part = score(model, tokenizer, first_documents(documents, SLICE_BYTES))
    facts = {
        "Parameters": f"{model.num_parameters():,}, float16 ({(out / 'model.safetensors').stat().st_size:,} bytes)",
        "Shape": "6 layers, hidden 192 (3 heads of 64), ffn 768, pre-norm, ReLU, tied embeddings",
        "Vocabulary, context": f"{VOCAB_SIZE}, {CONTEXT}",
        "Held-out text": f"{whole.num_bytes:,} bytes, {whole.num_tokens:,} tokens",
        "Held-out perplexity": f"{whole.perplexity:.2f}",
        "Held-out bits per byte": f"{whole.bits_per_byte:.3f}",
        "Held-out perplexity, slice": f"{part.perplexity:.2f}",
    }
    return facts, [sample(model, tokenizer, prompt) for prompt in demo.prompts()[:4]]


def main() -> None:
    """Build the corpus, train, save, judge what was saved, and write the README."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)

    corpus = build_corpus()
    (arguments.out / "heldout.txt").write_text("\n\n".join(corpus.heldout) + "\n", encoding="utf-8")
    tokenizer = train_tokenizer(corpus.train)
    stream = token_stream(tokenizer, corpus.train)
    num_bytes = sum(map(len, corpus.train))
    print(f"training text {num_bytes:,} bytes, {len(stream):,} tokens, {len(corpus.train)} documents", flush=True)

    model = OPTForCausalLM(demo_config()).train()
    steps = train(model, stream, paragraph_starts(tokenizer, stream), 60 * arguments.minutes * arguments.threads)
    save(model, tokenizer, arguments.out)

    facts, samples = measure(arguments.out)
    facts["Training text"] = f"{num_bytes:,} bytes, {len(stream):,} tokens"
    facts["Training"] = f"{steps:,} steps of {TOKENS_PER_STEP:,} tokens, {arguments.minutes:g} minutes on a CPU"
    (arguments.out / "README.md").write_text(readme(facts, samples), encoding="utf-8")
    print("\n".join(f"{name}: {value}" for name, value in facts.items()))


if __name__ == "__main__":
    main()
