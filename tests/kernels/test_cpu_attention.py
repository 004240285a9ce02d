"""Attention over the cache on the CPU equals softmax attention over the numbers that the cache stands for."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from flexgen_triton.kernels.cpu.attention import decode_attention, decode_attention_lse, decode_workspace_bytes
from flexgen_triton.kernels.cpu.sparse_attention import sparse_decode_attention, sparse_workspace_bytes
from flexgen_triton.kernels.formats import KVSegment, dequantize_kv, quantize_kv

NAN = float("nan")
FORMATS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "4 bits": None}


class Shape(NamedTuple):
    heads: int
    kv_heads: int
    dim: int
    block: int
    lens: tuple[tuple[int, ...], ...]  # of each segment, each sequence


SHAPES = {
    "minimal": Shape(1, 1, 1, 1, ((1,),)),
    "no sequences": Shape(2, 2, 64, 8, ((),)),
    "a sequence without tokens": Shape(2, 2, 64, 8, ((9, 0, 3),)),
    "three segments, some empty": Shape(3, 3, 80, 8, ((5, 0, 17), (0, 0, 9), (1, 2, 0))),
    "grouped heads, blocks beyond a chunk": Shape(6, 2, 128, 64, ((130, 63), (1, 65))),
    "wide heads": Shape(2, 1, 320, 16, ((33, 4),)),
    "wide heads, each alone": Shape(2, 2, 320, 16, ((33, 6),)),
    "odd heads": Shape(2, 2, 65, 33, ((70, 34),)),
}

Numbers = list[tuple[Tensor, Tensor]]  # K and V of each segment, [blocks, B, Hkv, T, D] float64


def make(shape: Shape, dtype: torch.dtype | None) -> tuple[Tensor, list[KVSegment], Numbers]:
    """q, segments as views of one array of K and V, and what they stand for; NaN behind the valid tokens."""
    torch.manual_seed(0)
    segments, numbers = [], []
    for lens in shape.lens:
        blocks = max(-(-max(lens, default=0) // shape.block), 1) + 1
        sizes = (blocks, len(lens), 2, shape.kv_heads, shape.block)
        x = torch.randn(*sizes, shape.dim)
        position = torch.arange(blocks)[:, None, None] * shape.block + torch.arange(shape.block)
        unused = (position >= torch.tensor(lens, dtype=torch.long)[:, None])[:, :, None, None].expand(sizes)
        if dtype is None:
            stores = quantize_kv(x)
            x = dequantize_kv(*stores, shape.dim, torch.float32)
            stores[1][unused] = NAN
        else:
            stores = (x.to(dtype),)
            x = stores[0].double()
            stores[0][unused] = NAN
        k, v = (tuple(s[:, :, i] for s in stores) for i in (0, 1))
        segments.append(KVSegment(k, v, torch.tensor(lens, dtype=torch.int32)))
        numbers.append((x[:, :, 0].double(), x[:, :, 1].double()))
    return torch.randn(len(shape.lens[0]), shape.heads, shape.dim), segments, numbers


def plain(q: Tensor, shape: Shape, numbers: Numbers, keep: list[int] | None = None) -> tuple[Tensor, Tensor]:
    """Attention and log-sum-exp, head by head, in q's dtype; with `keep`, FlexGen's choice of rows of V."""
    out, lse = torch.zeros_like(q), torch.full(q.shape[:2], float("-inf"), dtype=q.dtype)
    for b in range(len(q)):
        for h in range(shape.heads):
            g = h // (shape.heads // shape.kv_heads)
            parts = list(zip(numbers, (lens[b] for lens in shape.lens), strict=True))
            k, v = (torch.cat([kv[i][:, b, g].flatten(0, 1)[:n] for kv, n in parts]).to(q.dtype) for i in (0, 1))
            if not len(k):
                continue
            scores = k @ q[b, h] * shape.dim**-0.5
            lse[b, h] = scores.logsumexp(0)
            weights = torch.exp(scores - lse[b, h])
            if keep is not None:
                dropped = scores[:-1].sort(descending=True, stable=True).indices[keep[b] :]
                weights[dropped] = 0
            out[b, h] = weights @ v
    return out, lse


def assert_as_exact(got: Tensor, rough: Tensor, exact: Tensor) -> None:
    """At most twice the error of plain fp32, and two roundings of fp32."""
    assert got.isfinite().all()
    if got.numel():
        error, allowed = ((t.double() - exact).abs().max().item() for t in (got, rough))
        assert error <= 2 * allowed + 2.0**-22 * exact.abs().max().item(), (error, allowed)


@pytest.mark.parametrize("dtype", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_attention_is_as_exact_as_plain_fp32(shape, dtype):
    q, segments, numbers = make(shape, dtype)
    out, lse = decode_attention_lse(q, segments)
    exact, exact_lse = plain(q.double(), shape, numbers)
    rough, rough_lse = plain(q, shape, numbers)
    assert_as_exact(out, rough, exact)
    empty = exact_lse == float("-inf")
    assert torch.equal(lse == float("-inf"), empty)
    assert_as_exact(lse[~empty], rough_lse[~empty], exact_lse[~empty])


@pytest.mark.parametrize("dtype", [torch.float16, None], ids=["fp16", "4 bits"])  # seconds to compile for each more
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("keep", [0, 2, 1000], ids=["newest only", "few", "all"])
def test_sparse_attention_reads_the_rows_that_weigh_most(shape, dtype, keep):
    q, segments, numbers = make(shape, dtype)
    keeps = [keep + b % 2 for b in range(len(q))]
    out = sparse_decode_attention(q, segments, torch.tensor(keeps, dtype=torch.int32))
    assert_as_exact(out, plain(q, shape, numbers, keeps)[0], plain(q.double(), shape, numbers, keeps)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_result_has_the_query_s_dtype(dtype):
    shape = SHAPES["three segments, some empty"]
    q, segments, numbers = make(shape, torch.float16)
    q = q.to(dtype)
    out = decode_attention(q, segments)
    exact = plain(q.double(), shape, numbers)[0]
    assert out.dtype == dtype
    assert_as_exact(out, plain(q.float(), shape, numbers)[0].to(dtype), exact)


@pytest.mark.parametrize("dtype", [torch.float16, None], ids=["fp16", "4 bits"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_workspace_of_the_stated_size_is_enough(shape, dtype):
    q, segments, _ = make(shape, dtype)
    size = decode_workspace_bytes(*q.shape)
    check_workspace(size, q, lambda **given: decode_attention(q, segments, **given))
    keep = torch.full((len(q),), 5, dtype=torch.int32)
    longest = max(map(sum, zip(*shape.lens, strict=True)), default=0)
    size = sparse_workspace_bytes(*q.shape, longest, 5)
    check_workspace(size, q, lambda **given: sparse_decode_attention(q, segments, keep, **given))


def check_workspace(size: int, q: Tensor, attend: Callable[..., Tensor]) -> None:
    """Check that old contents do not matter, bytes behind it stay, and `out` gets what a new tensor would."""
    workspace, out = torch.full((size // 4 + 16,), NAN), torch.full_like(q, NAN)
    workspace[size // 4 :] = 7
    assert attend(out=out, workspace=workspace[: size // 4]) is out
    assert torch.equal(out, attend())
    assert (workspace[size // 4 :] == 7).all()


@pytest.mark.parametrize("dtype", [torch.float16, None], ids=["fp16", "4 bits"])
def test_nothing_of_the_result_s_size_is_allocated(dtype):
    q, segments, _ = make(Shape(16, 16, 128, 8, ((9, 3, 5, 7),)), dtype)
    out, workspace = torch.empty_like(q), torch.empty(decode_workspace_bytes(*q.shape) // 4)
    decode_attention(q, segments, out=out, workspace=workspace)
    with torch.profiler.profile(profile_memory=True) as profile:
        decode_attention(q, segments, out=out, workspace=workspace)
    assert sum(max(event.cpu_memory_usage, 0) for event in profile.events()) < 256


def test_scale_replaces_the_usual_one():
    q, segments, _ = make(Shape(2, 2, 64, 8, ((9, 3),)), torch.float16)
    torch.testing.assert_close(decode_attention(q, segments, scale=0.25), decode_attention(2 * q, segments))


def test_large_scores_do_not_overflow():
    shape = Shape(1, 1, 64, 8, ((40,),))
    q, segments, numbers = make(shape, torch.float32)
    q = 1e4 * q
    assert_as_exact(decode_attention(q, segments), plain(q, shape, numbers)[0], plain(q.double(), shape, numbers)[0])


def test_of_equal_scores_the_lower_position_is_kept():
    k = torch.zeros(1, 1, 1, 8, 64, dtype=torch.float16)
    k[..., 1::2] = -0.0
    v = torch.eye(8, 64).half().view(1, 1, 1, 8, 64)
    segment = KVSegment((k,), (v,), torch.tensor([8], dtype=torch.int32))
    out = sparse_decode_attention(torch.randn(1, 1, 64), [segment], torch.tensor([3], dtype=torch.int32))
    torch.testing.assert_close(out[0, 0, :8], torch.tensor([1, 1, 1, 0, 0, 0, 0, 1]) / 8)


def test_nan_in_a_valid_token_reaches_its_heads_only():
    q, segments, _ = make(Shape(4, 2, 64, 8, ((9, 3),)), torch.float16)
    segments[0].k[0][0, 0, 1, 2, 3] = NAN
    for out in (decode_attention(q, segments), sparse_decode_attention(q, segments, torch.tensor([2, 2]))):
        assert out[0, 2:].isnan().all()
        assert out[0, :2].isfinite().all() and out[1].isfinite().all()


def test_runs_in_several_threads_at_once():
    q, segments, _ = make(SHAPES["grouped heads, blocks beyond a chunk"], torch.float16)
    want = decode_attention(q, segments)
    with ThreadPoolExecutor(3) as pool:
        assert all(torch.equal(out, want) for out in pool.map(lambda _: decode_attention(q, segments), range(12)))
