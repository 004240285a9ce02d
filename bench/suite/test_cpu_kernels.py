"""The CPU's kernels: 4-bit products beside torch's fastest with plain weights, attention beside reading memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import cycle

import pytest
import torch
import torch.nn.functional as F

from flexgen_triton.kernels.cpu_attention import decode_attention, sparse_decode_attention
from flexgen_triton.kernels.cpu_matmul_q4 import linear_q4
from flexgen_triton.kernels.formats import KVSegment, quantize_kv, quantize_weight

MATRICES = 4  # in turn, so that none stays in the cache
SHAPES = {"8192x2048": (8192, 2048), "2048x8192": (2048, 8192)}
FORMATS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "4 bits": None}
SEQS, HEADS, TOKENS, DIM, BLOCK = 8, 32, 1024, 128, 64
ROUNDS = 10


def seconds(run: Callable[[], object], rounds: int = ROUNDS) -> float:
    """The best of a few runs."""
    run()
    best = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - began)
    return best


def plain_seconds(x: torch.Tensor, weight: torch.Tensor) -> float:
    """A product with plain weights by torch, in the fastest of three dtypes."""
    times = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        turns = cycle([weight.to(dtype) for _ in range(MATRICES)])
        narrow = x.to(dtype)
        times.append(seconds(lambda turns=turns, narrow=narrow: F.linear(narrow, next(turns))))
    return min(times)


@pytest.mark.parametrize("num_rows", [1, 4, 16, 64, 256])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_linear_q4(benchmark, judge, shape, num_rows):
    """The share is the speed-up over torch."""
    rows, columns = shape
    x, weight = torch.randn(num_rows, columns), torch.randn(rows, columns)
    packed = quantize_weight(weight)
    turns = cycle([tuple(part.clone() for part in packed) for _ in range(MATRICES)])
    out = torch.empty(num_rows, rows)
    benchmark.pedantic(lambda: linear_q4(x, *next(turns), rows, out), rounds=ROUNDS, warmup_rounds=2)
    work = 2 * num_rows * rows * columns / 1e9
    judge(work / benchmark.stats.stats.min, "GFLOP/s", work / plain_seconds(x, weight))


def cache(dtype: torch.dtype | None) -> KVSegment:
    x = torch.randn(TOKENS // BLOCK, SEQS, HEADS, BLOCK, DIM)
    parts = quantize_kv(x) if dtype is None else (x.to(dtype),)
    return KVSegment(parts, tuple(part.clone() for part in parts), torch.full((SEQS,), TOKENS, dtype=torch.int32))


def reading_rate() -> float:
    """Bytes a second of summing an array that no cache holds."""
    array = torch.randn(1 << 26)
    return array.nbytes / seconds(array.sum)


@pytest.mark.parametrize("dtype", FORMATS.values(), ids=FORMATS)
def test_decode_attention(benchmark, judge, dtype):
    segment, q = cache(dtype), torch.randn(SEQS, HEADS, DIM)
    benchmark.pedantic(lambda: decode_attention(q, [segment]), rounds=ROUNDS, warmup_rounds=2)
    size = sum(part.nbytes for part in (*segment.k, *segment.v))
    judge(size / benchmark.stats.stats.min / 1e9, "GB/s", reading_rate() / 1e9)


@pytest.mark.parametrize("dtype", FORMATS.values(), ids=FORMATS)
def test_sparse_decode_attention(benchmark, judge, dtype):
    """A tenth of V; the bytes that are judged are all of K and that tenth."""
    segment, q = cache(dtype), torch.randn(SEQS, HEADS, DIM)
    keep = torch.full((SEQS,), TOKENS // 10, dtype=torch.int32)
    benchmark.pedantic(lambda: sparse_decode_attention(q, [segment], keep), rounds=ROUNDS, warmup_rounds=2)
    size = 1.1 * sum(part.nbytes for part in segment.k)
    judge(size / benchmark.stats.stats.min / 1e9, "GB/s", reading_rate() / 1e9)
