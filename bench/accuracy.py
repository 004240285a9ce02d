"""Accuracy that 4-bit weights, a 4-bit cache and sparse V cost: perplexity of held-out text under each of them.

    python bench/accuracy.py                        # the demo model
    python bench/accuracy.py --model DIRECTORY      # any OPT checkpoint

Each token is judged once, in windows of one context that slide by half of it. All tokens of a window are taken as
decoded ones: they attend to what the cache keeps, and to the share of V that is asked for. (A prompt, in the engine,
attends to everything; one row shows what that saves.) Arithmetic is the tests' plain reference in fp32, which
the engine is checked against; the 16-bit rows round the weights and every operation's result but sum in fp32, as
16-bit kernels do. A Markdown table goes to standard output, the figures to
bench/results/<machine>/accuracy-<commit>.json (or `--json`).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import measured
import rows
import torch
from torch import Tensor
from transformers import AutoTokenizer, OPTForCausalLM

sys.path.insert(0, str(rows.ROOT))
sys.path.insert(0, str(rows.ROOT / "tests"))

from demo_corpus import first_documents
from reference_opt import Options, ReferenceOPT, grouped_along_k, grouped_along_n

from flexgen_triton.demo import DEMO_DIR, heldout
from flexgen_triton.kernels.formats import WHOLE

MAX_CONTEXT = 2048

Score = Callable[[Tensor, int], Tensor]  # ids [T], how many of them come before what is judged -> logits [T, V]


@dataclass(frozen=True, slots=True)
class Case:
    """A way to store and attend.

    With `prompted` the tokens before the judged ones are a prompt, which attends to all of V and to K and V as they
    are. `published`: FlexGen's perplexity on WikiText, of OPT-30B and OPT-175B.
    """

    name: str
    options: Options
    prompted: bool = False
    published: tuple[float, float] | None = None


PUBLISHED_FP16 = (12.72, 10.82)
CASES = (
    Case("fp32", Options()),
    Case("fp16", Options(dtype=torch.float16), published=PUBLISHED_FP16),
    Case("bf16", Options(dtype=torch.bfloat16)),
    Case("fp16, 10 % of V", Options(dtype=torch.float16, sparsity=0.1)),
    Case("4-bit weights, G=64", Options(weight_group=64)),
    Case("the same, ranges not searched", Options(transform=partial(grouped_along_k, group_size=64, ranges=WHOLE))),
    Case("4-bit weights, G=128", Options(weight_group=128)),
    Case("4-bit weights, G=64 along N", Options(transform=partial(grouped_along_n, group_size=64))),
    Case("4-bit cache", Options(kv_quantised=True)),
    Case("4-bit weights, G=64, and cache", Options(weight_group=64, kv_quantised=True), published=(12.90, 10.94)),
    Case("the same, 20 % of V", Options(weight_group=64, kv_quantised=True, sparsity=0.2)),
    Case("the same, 10 % of V", Options(weight_group=64, kv_quantised=True, sparsity=0.1), published=(12.90, 10.94)),
    Case("the same, behind a prompt", Options(weight_group=64, kv_quantised=True, sparsity=0.1), prompted=True),
)


@dataclass(frozen=True, slots=True)
class Judgement:
    """A judged text: the cost of every token, and the token that was likeliest in its place."""

    nats: Tensor  # [T]
    likeliest: Tensor  # [T]

    @property
    def perplexity(self) -> float:
        return float(self.nats.mean().exp())


def token_stream(path: Path, bos: int, max_bytes: int | None) -> Tensor:
    """The held-out documents, each followed by the token that begins texts: [T]. Raises ValueError for too few bytes.

    A directory with a `heldout.txt` of its own, as train_demo.py makes them, is judged by that; others by the demo's.
    """
    documents = heldout(path if (path / "heldout.txt").exists() else DEMO_DIR)
    kept = documents if max_bytes is None else first_documents(documents, max_bytes)
    if not kept:
        size = len(documents[0].encode()) + 1
        raise ValueError(f"no document ends within {max_bytes} bytes; --slice {size} takes the first one")
    encoded = AutoTokenizer.from_pretrained(path)(kept, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in (*ids, bos)])


def windows(length: int, context: int) -> Iterator[tuple[int, int, int]]:
    """`(begin, judged, end)`: behind BOS a window has the tokens from `begin` on; it judges those from `judged` on."""
    judged = 0
    while judged < length:
        end = min(length, max(context - 1, judged + context // 2))
        yield max(0, end - (context - 1)), judged, end
        judged = end


def judge(score: Score, stream: Tensor, *, bos: int, context: int) -> Judgement:
    """Judge a text, every token once."""
    nats, likeliest = [], []
    for begin, judged, end in windows(len(stream), context):
        ids = torch.cat((torch.tensor([bos]), stream[begin : end - 1]))
        logits = score(ids, judged - begin + 1)[judged - end :]
        nats.append(torch.nn.functional.cross_entropy(logits, stream[judged:end], reduction="none"))
        likeliest.append(logits.argmax(-1))
    return Judgement(torch.cat(nats).double(), torch.cat(likeliest))


def compared(case: Case, got: Judgement, plain: Judgement) -> rows.Row:
    """A case's row, judged by fp32: `share` is fp32's perplexity over its own.

    The change's standard error is that of the mean of the tokens' differences, as if they were independent.
    """
    paired = got.nats - plain.nats
    ratio = got.perplexity / plain.perplexity
    details = {
        "change": ratio - 1,
        "change_error": ratio * float(paired.std()) / math.sqrt(len(paired)),
        "same_top1": float((got.likeliest == plain.likeliest).double().mean()),
        "published": case.published,
    }
    return rows.Row(
        case.name, got.perplexity, "perplexity", "lower", roof=plain.perplexity, share=1 / ratio, details=details
    )


def measure(model: OPTForCausalLM, stream: Tensor, cases: Sequence[Case] = CASES) -> Iterator[rows.Row]:
    """A row for each case, the first of which is what the others are compared with."""
    bos, context = model.config.bos_token_id, min(MAX_CONTEXT, model.config.max_position_embeddings)
    plain = None
    for case in cases:
        reference = ReferenceOPT(model.state_dict(), model.config, case.options)
        score = reference.score if case.prompted else lambda ids, _, score=reference.score: score(ids)
        got = judge(score, stream, bos=bos, context=context)
        plain = plain or got
        yield compared(case, got, plain)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The accuracy that 4 bits and sparse V cost.")
    parser.add_argument("--model", type=Path, default=DEMO_DIR, metavar="DIR", help="an OPT checkpoint")
    parser.add_argument("--slice", type=int, metavar="BYTES", help="only the documents that end within so many bytes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="default: bench/results/<machine>/accuracy-<commit>.json"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    model = OPTForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    try:
        stream = token_stream(arguments.model, model.config.bos_token_id, arguments.slice)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    header = {**rows.make_header(), "model": arguments.model.resolve().name, "tokens": len(stream)}
    path = arguments.json or rows.results_path("accuracy", header)
    results: list[rows.Row] = []
    began = time.perf_counter()
    for row in measure(model, stream):
        results.append(row)
        rows.write_results(path, results, header)
        print(f"{time.perf_counter() - began:4.0f} s  {row.name}: {row.value:.3f}", file=sys.stderr, flush=True)
    print(f"{measured.accuracy(results)}\n\n{header['model']}, {len(stream):,} tokens of held-out text")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
