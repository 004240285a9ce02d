"""The CPU's kernels: 4-bit products beside torch's fastest with plain weights, attention beside reading memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import cycle

import pytest
import torch
import torch.nn.functional as F

from flexgen_triton.kernels.cpu.attention import decode_attention, decode_workspace_bytes
from flexgen_triton.kernels.cpu.matmul_q4 import linear_q4
from flexgen_triton.kernels.cpu.sparse_attention import sparse_decode_attention
from flexgen_triton.kernels.formats import KVSegment, quantize_kv, quantize_weight

MATRICES = 4  # in turn, so that none stays in the cache
SHAPES = {"8192x2048": (8192, 2048), "2048x8192": (2048, 8192)}
FORMATS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "4 bits": None}
SEQS, HEADS, TOKENS, DIM, BLOCK = 8, 32, 1024, 128, 64
ROUNDS = 10
TURNS = 40  # rounds in turn with rivals: the best of few is a matter of luck where threads must be woken


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


def cache(dtype: torch.dtype | None, dim: int = DIM) -> KVSegment:
    x = torch.randn(TOKENS // BLOCK, SEQS, HEADS, BLOCK, dim)
    parts = quantize_kv(x) if dtype is None else (x.to(dtype),)
    return KVSegment(parts, tuple(part.clone() for part in parts), torch.full((SEQS,), TOKENS, dtype=torch.int32))


def reading() -> tuple[Callable[[], object], int]:
    """Summing an array that no cache holds, and its bytes: what reading costs."""
    array = torch.randn(1 << 26)
    return array.sum, array.nbytes


def reading_rate() -> float:
    """Bytes a second of reading."""
    read, size = reading()
    return size / seconds(read)


def in_turn(rivals: dict[str, Callable[[], object]]) -> tuple[Callable[[], None], dict[str, float]]:
    """A function that runs every rival once, and the best seconds of each so far: run between the rounds of another, it
    meets the same machine as that one, whatever else runs there."""
    best = dict.fromkeys(rivals, float("inf"))

    def turn() -> None:
        for name, run in rivals.items():
            began = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - began)

    return turn, best


def plain_ways(dtype: torch.dtype, dim: int) -> dict[str, Callable[[], object]]:
    """Attention by torch on K and V [B, H, S, D]: its own operator, and fp32 copies multiplied as FlexGen does."""
    k, v = (torch.randn(SEQS, HEADS, TOKENS, dim).to(dtype) for _ in range(2))
    q = torch.randn(SEQS, HEADS, 1, dim).to(dtype)

    def copies() -> torch.Tensor:
        scores = torch.bmm(q.float().flatten(0, 1), k.float().flatten(0, 1).transpose(1, 2))
        return torch.bmm(torch.softmax(scores * dim**-0.5, -1), v.float().flatten(0, 1))

    return {"SDPA": lambda: F.scaled_dot_product_attention(q, k, v), "fp32 copies and bmm": copies}


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", FORMATS.values(), ids=FORMATS)
def test_decode_attention(benchmark, judge, dtype, dim):
    """16 and 32 bits beside torch's ways; 4 bits beside the same tokens in fp16."""
    segment, q = cache(dtype, dim), torch.randn(SEQS, HEADS, dim)
    out, workspace = torch.empty_like(q), torch.empty(decode_workspace_bytes(*q.shape) // 4)

    def attend(segment: KVSegment) -> None:
        decode_attention(q, [segment], out=out, workspace=workspace)

    narrow = cache(torch.float16, dim)
    read, read_bytes = reading()
    others = {"16 bits": lambda: attend(narrow)} if dtype is None else plain_ways(dtype, dim)
    turn, best = in_turn({"reading": read, **others})
    for _ in range(2):
        turn()
    benchmark.pedantic(lambda: attend(segment), setup=turn, rounds=TURNS, warmup_rounds=2)
    best_own = benchmark.stats.stats.min
    size = sum(part.nbytes for part in (*segment.k, *segment.v))
    rivals = {name: best[name] / best_own for name in others}
    judge(size / best_own / 1e9, "GB/s", read_bytes / best["reading"] / 1e9, rivals)


@pytest.mark.parametrize("dtype", FORMATS.values(), ids=FORMATS)
def test_sparse_decode_attention(benchmark, judge, dtype):
    """A tenth of V; the bytes that are judged are all of K and that tenth."""
    segment, q = cache(dtype), torch.randn(SEQS, HEADS, DIM)
    keep = torch.full((SEQS,), TOKENS // 10, dtype=torch.int32)
    benchmark.pedantic(lambda: sparse_decode_attention(q, [segment], keep), rounds=ROUNDS, warmup_rounds=2)
    size = 1.1 * sum(part.nbytes for part in segment.k)
    judge(size / benchmark.stats.stats.min / 1e9, "GB/s", reading_rate() / 1e9)
