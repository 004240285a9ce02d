"""Decode attention in Triton's interpreter against its specification in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flexgen_triton.kernels import attention_decode
from flexgen_triton.kernels.attention_decode import (
    decode_attention,
    decode_attention_lse,
    decode_attention_lse_ref,
    decode_attention_ref,
    merge,
    num_splits,
    tokens_ref,
)
from flexgen_triton.kernels.formats import KVSegment, quantize_kv

CASES = {  # heads, K/V heads, head dim, segments: (block length, 4 bits, valid tokens of each sequence)
    "one token": (1, 1, 64, [(1, False, [1])]),
    "one 4-bit token": (1, 1, 64, [(8, True, [1])]),
    "lengths 1 to 130": (1, 1, 64, [(64, False, [1, 64, 65, 130])]),
    "lengths 1 to 130, 4-bit": (1, 1, 64, [(64, True, [1, 64, 65, 130])]),
    "3 heads of 80": (3, 3, 80, [(64, False, [70, 9])]),
    "3 heads of 80, 4-bit": (3, 3, 80, [(64, True, [70, 9])]),
    "grouped 8:2": (8, 2, 64, [(64, False, [100]), (1, False, [1])]),
    "grouped 8:2, 4-bit": (8, 2, 64, [(64, True, [100]), (1, False, [1])]),
    "grouped 12:1, 4-bit": (12, 1, 64, [(8, True, [20])]),
    "128": (2, 2, 128, [(8, False, [3, 37])]),
    "128, 4-bit": (2, 2, 128, [(8, True, [3, 37])]),
    "256, 4-bit": (1, 1, 256, [(8, True, [25])]),
    "head dim 8": (2, 1, 8, [(8, False, [5, 11])]),
    "head dim 8, 4-bit": (2, 1, 8, [(8, True, [5, 11])]),
    "three segments, some empty": (2, 2, 64, [(64, True, [0, 70, 64]), (8, False, [5, 0, 0]), (1, False, [1, 1, 0])]),
    "blocks of 64, 8 and 1 in 4 bits": (2, 1, 128, [(64, True, [70, 1]), (8, True, [7, 8]), (1, True, [1, 0])]),
    "blocks of 48": (1, 1, 64, [(48, False, [100])]),
}
RUNS = pytest.mark.parametrize(
    ("dtype", "splits"), [(torch.float16, 1), (torch.float32, 3)], ids=["fp16", "fp32-split"]
)
NAN = float("nan")


def made(case: tuple, dtype: torch.dtype, spare: int = 1) -> tuple[Tensor, list[KVSegment]]:
    """q and segments as strided views, with NaN wherever no valid token is and `spare` unused blocks."""
    heads, kv_heads, dim, parts = case
    generator = torch.Generator().manual_seed(heads + dim + len(parts))
    num_seqs = len(parts[0][2])
    qkv = torch.randn(num_seqs, heads + 2 * kv_heads, dim, generator=generator).to(dtype)
    segments = []
    for block_len, q4, lens in parts:
        blocks = -(-max(lens) // block_len) + spare
        x = torch.randn(blocks, num_seqs, 2, kv_heads, block_len, dim, generator=generator) + 0.3
        fields = quantize_kv(x) if q4 else (x.to(dtype),)
        place = torch.arange(blocks * block_len).view(blocks, 1, 1, 1, block_len)
        unused = (place >= torch.tensor(lens).view(-1, 1, 1, 1)).expand(x.shape[:-1])
        for field in fields:
            field[unused] = NAN if field.is_floating_point() else -1
        k, v = (tuple(field[:, :, i] for field in fields) for i in (0, 1))
        segments.append(KVSegment(k, v, torch.tensor(lens, dtype=torch.int32)))
    return qkv[:, :heads], segments


def plain(q: Tensor, segments: list[KVSegment]) -> Tensor:
    """Attend by a few lines of torch in this precision: K and V dequantised, products and softmax rounded to it.

    In fp32 a product with codes and one with minima, as in the kernel: they cancel, which rounds more than all else.
    """
    out = torch.zeros(q.shape, dtype=q.dtype)
    for b, lens in enumerate(zip(*(s.lens.tolist() for s in segments), strict=True)):
        ks, vs = ([_terms(s[i], b, n, q) for s, n in zip(segments, lens, strict=True)] for i in (0, 1))
        ks, vs = ([torch.cat(x, 1) for x in zip(*terms, strict=True)] for terms in (ks, vs))  # [H, S, D] each
        scores = sum(q[b, :, None] @ k.transpose(1, 2) for k in ks) * q.shape[2] ** -0.5
        out[b] = sum(scores.softmax(-1) @ v for v in vs)[:, 0]
    return out


def _terms(tensors: tuple[Tensor, ...], seq: int, length: int, q: Tensor) -> tuple[Tensor, Tensor]:
    """Two terms of K or V [H, S, D]: minima and the rest in fp32, nothing and all otherwise."""
    x = tokens_ref(tensors, seq, length, q.shape[2], q.dtype)
    low = torch.zeros_like(x)
    if len(tensors) == 2 and q.dtype == torch.float32:
        low = tokens_ref((torch.zeros_like(tensors[0]), tensors[1]), seq, length, q.shape[2], q.dtype)
    repeat = q.shape[1] // x.shape[1]
    return tuple(t.repeat_interleave(repeat, 1).transpose(0, 1) for t in (low, x - low))


def error(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm())


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Outputs start as NaN, so that an element nobody wrote is seen."""
    empty = torch.empty
    monkeypatch.setattr(attention_decode.torch, "empty", lambda *a, **k: empty(*a, **k).fill_(NAN))


@pytest.mark.grid
@RUNS
@pytest.mark.parametrize("case", CASES)
def test_no_further_from_the_truth_than_twice_plain_torch(monkeypatch, case, splits, dtype):
    monkeypatch.setattr(attention_decode, "num_splits", lambda *_: splits)
    q, segments = made(CASES[case], dtype)
    truth = decode_attention_ref(q.double(), segments)
    allowed = 2 * error(plain(q, segments), truth)
    assert allowed < 0.01
    got = decode_attention(q, segments)
    assert got.dtype == dtype and error(got, truth) <= allowed


@pytest.mark.parametrize(
    "case", ["one token", "lengths 1 to 130", "3 heads of 80, 4-bit", "three segments, some empty"]
)
def test_partial_results_come_in_fp32_with_their_log_sum_exp(monkeypatch, case):
    monkeypatch.setattr(attention_decode, "num_splits", lambda *_: 2)
    q, segments = made(CASES[case], torch.float16)
    truth = decode_attention_ref(q.double(), segments)
    allowed = 2 * error(plain(q, segments), truth)
    partial, lse = decode_attention_lse(q, segments)
    assert partial.dtype == lse.dtype == torch.float32 and error(partial, truth) <= allowed
    torch.testing.assert_close(lse.double(), decode_attention_lse_ref(q.double(), segments)[1], rtol=1e-5, atol=1e-5)


def test_one_token_too_few_would_be_seen():
    q, segments = made(CASES["128, 4-bit"], torch.float16)
    truth = decode_attention_ref(q.double(), segments)
    shifted = [s._replace(lens=s.lens - 1) for s in segments]
    assert error(decode_attention_ref(q.double(), shifted), truth) > 2 * error(plain(q, segments), truth)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_parts_merge_to_the_whole(dtype):
    q, segments = made(CASES["three segments, some empty"], dtype)
    outs, lses = zip(*(decode_attention_lse(q, [segment]) for segment in segments), strict=True)
    assert lses[0][0].isneginf().all() and not outs[0][0].any()
    outs[0][0] = NAN  # an empty part may hold anything
    out = torch.empty(3, 4, 64, dtype=dtype)[:, ::2]
    merged, lse = merge(outs, lses, out=out)
    assert merged is out
    truth, true_lse = decode_attention_lse_ref(q.double(), segments)
    assert error(out, truth) <= 2 * error(plain(q, segments), truth)
    torch.testing.assert_close(lse.double(), true_lse, rtol=1e-5, atol=1e-5)


def test_a_merge_of_many_parts():
    outs, lses = torch.randn(37, 2, 3, 8), 5 * torch.randn(37, 2, 3)
    merged, lse = merge(list(outs), list(lses))
    torch.testing.assert_close(merged, (lses.softmax(0)[..., None] * outs).sum(0))
    torch.testing.assert_close(lse, lses.logsumexp(0))


def test_nothing_cached_is_an_empty_part():
    q = torch.randn(2, 3, 16)
    empty = (torch.empty(0, 2, 3, 64, 16),)
    out, lse = decode_attention_lse(q, [KVSegment(empty, empty, torch.zeros(2, dtype=torch.int32))])
    assert not out.any() and lse.isneginf().all()


def test_output_and_scale_are_as_asked():
    q, segments = made(CASES["grouped 8:2"], torch.float32)
    wide = torch.full((1, 9, 64), NAN)
    got = decode_attention(q, segments, scale=0.5, out=wide[:, 1:])
    assert got.data_ptr() == wide[:, 1:].data_ptr() and wide[:, 0].isnan().all()
    torch.testing.assert_close(got, decode_attention_ref(q, segments, scale=0.5), rtol=1e-4, atol=1e-5)


def test_scores_far_apart_do_not_overflow():
    q, segments = made(CASES["lengths 1 to 130"], torch.float32)
    torch.testing.assert_close(decode_attention(q * 300, segments), decode_attention_ref(q * 300, segments))


def test_splits_fill_the_gpu_and_stay_worth_their_while():
    assert num_splits(132, 1792, 1024) == 1  # OPT-30B, 32 sequences, on an H200
    assert num_splits(132, 56, 2048) == 16  # one sequence: limited by its length
    assert num_splits(132, 56, 1 << 16) == 132 * 16 // 56
    assert num_splits(132, 1, 1 << 20) == 64
    assert num_splits(132, 5000, 1 << 20) == num_splits(132, 1, 64) == 1
