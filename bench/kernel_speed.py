"""The Triton kernels on this GPU: right, and how fast beside their roof, torch's own and their targets.

`rows()` checks every kernel against its reference on shapes of OPT-1.3B, 30B and 175B, then times it over M = 1..2048
and over lengths 128..2048 x batches 1..256. A row's roof is the least time for its bytes at the rate of a copy, or for
its arithmetic at that of a large torch product, whichever is more, both measured first. Inputs are random and a buffer
larger than L2 is written before every run; times are medians by device events. What a group's seconds do not suffice
for is a row that says so, so that all of it ends within BUDGET_S.

`problems()` lists what is timed and needs no device; `measure` runs one. The tests do so in Triton's interpreter. The
module is not called `kernels` because transformers looks for a distribution of that name.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import torch.nn.functional as F
from rows import Row, without_folders
from torch import Tensor
from triton.errors import TritonError

from flexgen_triton.kernels import formats, quant, sizes
from flexgen_triton.kernels.attention_decode import decode_attention, decode_attention_ref
from flexgen_triton.kernels.attention_prefill import prefill_attention, prefill_attention_ref
from flexgen_triton.kernels.attention_sparse import sparse_decode_attention
from flexgen_triton.kernels.elementwise import append_kv, append_kv_ref, write_prompt_kv, write_prompt_kv_ref
from flexgen_triton.kernels.formats import KVSegment
from flexgen_triton.kernels.matmul_q4 import Workspace, matmul_q4, matmul_q4_ref
from flexgen_triton.kernels.norm import layer_norm, layer_norm_ref
from flexgen_triton.kernels.sizes import kv_width

GROUP = 64
PAGE_TOKENS = 64
KEEP = 0.1  # of V's rows that sparse attention reads
MS = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 512, 1024, 2048)
LENGTHS = (128, 256, 512, 1024, 2048)
BATCHES = (1, 4, 16, 64, 256)
CHECKED_MS = (1, 7, 16, 32, 33, 64, 150, 512)
CHECKED_LENS = (700, 1, 64, 37, 200)
FLUSH_BYTES = 512 << 20  # several times any L2; writing it also gives the host time to queue what is timed
ROW_S = 0.1  # of timing for one figure
BUDGET_S = {"correctness": 80, "linears": 150, "decode": 130, "prefill": 60, "small": 40}  # 460 s
MEMORY_SHARE = 0.4  # of what is free that one problem may take
FILLS_BYTES = 64 << 20  # a smaller problem does not fill an H200, and the targets are for one that does

Call = Callable[[], object]
Timer = Callable[[Call], float]


@dataclass(frozen=True, slots=True)
class Model:
    """The shapes of one OPT size."""

    name: str
    hidden: int
    heads: int
    head_dim: int

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """[N, K] of the linear layers' matrices."""
        return {
            "out": (self.hidden, self.hidden),
            "fc1": (4 * self.hidden, self.hidden),
            "fc2": (self.hidden, 4 * self.hidden),
        }


MODELS = (Model("opt-30b", 7168, 56, 128), Model("opt-1.3b", 2048, 32, 64), Model("opt-175b", 12288, 96, 128))


@dataclass(frozen=True, slots=True)
class Setup:
    """A call on tensors that are there, and torch's ways to the same."""

    call: Call
    peers: dict[str, Call] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Problem:
    """A kernel's call to be timed: the bytes it must move, its operations, its targets, and its set-up on a device.

    Targets are a share of the roof (`roof`) and how many times as fast as a peer it should be (by the peer's name).
    """

    name: str
    num_bytes: int
    flops: int
    memory_bytes: int  # that setting it up takes, peers included
    make: Callable[[torch.device, torch.dtype], Setup]
    targets: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Roofs:
    """The best rates of this GPU, measured here."""

    copy_bytes_s: float  # read and written
    product_flops_s: float

    def floor_s(self, problem: Problem) -> float:
        return max(problem.num_bytes / self.copy_bytes_s, problem.flops / self.product_flops_s)


class DeviceTimer:
    """Seconds of a call by device events: the median of runs that find L2 full of something else."""

    def __init__(self, device: torch.device) -> None:
        self._flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device)

    def __call__(self, call: Call) -> float:
        for _ in range(2):
            call()
        once = self._runs(call, 2)[-1]
        return statistics.median(self._runs(call, int(min(50, max(5, ROW_S / (once + 3e-4))))))

    def _runs(self, call: Call, count: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in events:
            self._flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]


def measure_roofs(timer: Timer, device: torch.device, dtype: torch.dtype, size: int = 8192) -> Roofs:
    """Rates of a copy of 16 size^2 bytes and of a product of two [size, size] matrices, of random numbers."""
    source = torch.randint(256, (16 * size * size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = timer(lambda: target.copy_(source))
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return Roofs(2 * len(source) / copy_s, 2 * size**3 / timer(lambda: a @ b))


def measure(problem: Problem, timer: Timer, roofs: Roofs, device: torch.device, dtype: torch.dtype) -> Row:
    """One problem's row: its rate beside the roof, its ratios to its peers and targets in the note."""
    setup = problem.make(device, dtype)
    seconds = timer(setup.call)
    peers = {name: timer(call) for name, call in setup.peers.items()}
    return make_row(problem, seconds, peers, roofs)


def make_row(problem: Problem, seconds: float, peers: dict[str, float], roofs: Roofs) -> Row:
    floor = roofs.floor_s(problem)
    share = floor / seconds
    by_bytes = problem.num_bytes / roofs.copy_bytes_s >= floor
    amount, unit = (problem.num_bytes / 1e9, "GB/s") if by_bytes else (problem.flops / 1e12, "TFLOP/s")
    ratios = {name: peer / seconds for name, peer in peers.items()}
    reached = {"roof": share, **ratios}
    notes = [f"{seconds * 1e6:.1f} us"]
    notes += [f"{ratio:.2f}x {name}" for name, ratio in ratios.items()]
    notes += [
        f"target {target:g} of {name}: {'met' if reached[name] >= target else 'missed'}"
        for name, target in problem.targets.items()
        if name in reached
    ]
    details = {
        "seconds": seconds,
        "bytes": problem.num_bytes,
        "flops": problem.flops,
        "floor_s": floor,
        "peers_s": peers,
        "ratios": ratios,
        "targets": problem.targets,
    }
    value = amount / seconds
    return Row(problem.name, value, unit, roof=amount / floor, share=share, note=", ".join(notes), details=details)


def guarded(name: str, check: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """The check's rows; what torch or Triton's compiler raises is a row that counts as wrong, and the rest goes on."""
    try:
        yield from check()
    except (RuntimeError, AssertionError, TritonError) as error:
        note = without_folders(f"{type(error).__name__}: {error}")[:300]
        yield Row(f"runs: {name}", 0.0, "share", roof=1.0, share=0.0, note=note)


def skipped(problem: Problem, reason: str) -> Row:
    return Row(problem.name, None, "", note=f"skipped: {reason}", details={"targets": problem.targets})


# Linear layers


@lru_cache(maxsize=1)  # one matrix is timed for all M before the next
def _weight(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Random codes and scales, about what a matrix of variance 1/K has, and the matrix they stand for."""
    blocks, groups = -(-rows // sizes.BLOCK_ROWS), -(-columns // GROUP)
    shape = (blocks, groups * GROUP // 4, sizes.BLOCK_ROWS)
    codes = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, device=device)
    scale = torch.rand(blocks, groups, sizes.BLOCK_ROWS, device=device).add_(0.5) / (5 * columns**0.5)
    scales = torch.stack((scale, -7.5 * scale), 2).half()
    return codes, scales, quant.dequantize_weight(codes, scales, rows, columns, dtype)


def _int4pack(x: Tensor, rows: int) -> Call | None:
    """torch's own 4-bit product of the same shape, bf16 on random codes; None where it has none."""
    columns = x.shape[1]
    if x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) < (8, 0) or rows % 8 or columns % 128:
        return None
    packed = torch.randint(256, (rows, columns // 2), dtype=torch.uint8, device=x.device)
    weight = torch.ops.aten._convert_weight_to_int4pack(packed, 8)
    scales = torch.rand(columns // GROUP, rows, 2, dtype=torch.bfloat16, device=x.device)
    wide = x.bfloat16()
    return lambda: torch.ops.aten._weight_int4pack_mm(wide, weight, GROUP, scales)


def weight_bytes(rows: int, columns: int) -> int:
    """P16's codes and scales, whole blocks."""
    padded, groups = -(-rows // sizes.BLOCK_ROWS) * sizes.BLOCK_ROWS, -(-columns // GROUP)
    return padded * groups * (GROUP // 2 + 4)


def linear(model: Model, matrix: str, m: int) -> Problem:
    """A 4-bit linear layer, x [M, K] -> [M, N]."""
    rows, columns = model.matrices[matrix]

    def make(device: torch.device, dtype: torch.dtype) -> Setup:
        codes, scales, dense = _weight(rows, columns, device, dtype)
        x = torch.randn(m, columns, device=device).to(dtype)
        bias = torch.randn(rows, device=device).to(dtype)
        workspace = Workspace(device)
        peers: dict[str, Call] = {"cuBLAS": lambda: F.linear(x, dense, bias)}
        if (packed := _int4pack(x, rows)) is not None:
            peers["int4pack"] = packed
        return Setup(lambda: matmul_q4(x, codes, scales, rows, bias=bias, workspace=workspace), peers)

    targets = {"roof": 0.75, "cuBLAS": 2.9} if m <= 16 and model.name == "opt-30b" else {"cuBLAS": 1.0}
    return Problem(
        f"4-bit linear {model.name} {matrix} {rows}x{columns} M={m}",
        weight_bytes(rows, columns) + 2 * m * (rows + columns),
        2 * m * rows * columns,
        8 * rows * columns,
        make,
        targets,
    )


def dequantize(model: Model, matrix: str) -> Problem:
    rows, columns = model.matrices[matrix]

    def make(device: torch.device, dtype: torch.dtype) -> Setup:
        codes, scales, dense = _weight(rows, columns, device, dtype)
        out = torch.empty_like(dense)
        return Setup(lambda: quant.dequantize_weight(codes, scales, rows, columns, dtype, out=out))

    moved = weight_bytes(rows, columns) + 2 * rows * columns
    targets = {"roof": 0.85} if moved >= FILLS_BYTES else {}
    return Problem(f"dequantize {model.name} {rows}x{columns}", moved, 0, 8 * rows * columns, make, targets)


# Attention


def _cache(batch: int, heads: int, dim: int, length: int, device: torch.device, *, dtype: torch.dtype) -> KVSegment:
    """A full cache of random numbers in 16 bits, laid out as the engine's: K and V of a page side by side."""
    pages = -(-length // PAGE_TOKENS)
    kv = torch.empty(pages, batch, 2, heads, PAGE_TOKENS, dim, dtype=dtype, device=device).normal_()
    lens = torch.full((batch,), length, dtype=torch.int32, device=device)
    return KVSegment((kv[:, :, 0],), (kv[:, :, 1],), lens)


def _cache_q4(batch: int, heads: int, dim: int, length: int, device: torch.device) -> KVSegment:
    """The same in P16: random codes, scales of numbers of variance 1."""
    shape = (-(-length // PAGE_TOKENS), batch, 2, heads, PAGE_TOKENS)
    width = kv_width(dim)
    codes = torch.randint(-(2**15), 2**15, (*shape, width // 4), dtype=torch.int16, device=device)
    scale = torch.rand(*shape, width // GROUP, device=device, dtype=torch.float16).add_(1).mul_(0.2)
    scales = torch.stack((scale, -7.5 * scale), -1)
    lens = torch.full((batch,), length, dtype=torch.int32, device=device)
    return KVSegment((codes[:, :, 0], scales[:, :, 0]), (codes[:, :, 1], scales[:, :, 1]), lens)


def _query(batch: int, model: Model, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(batch, model.heads, model.head_dim, device=device).to(dtype)


def kv_bytes(model: Model, batch: int, length: int, *, four_bits: bool) -> int:
    """K and V of a layer."""
    numbers = 2 * batch * model.heads * length
    return numbers * (kv_width(model.head_dim) // GROUP * (GROUP // 2 + 4) if four_bits else 2 * model.head_dim)


def decode_16bit(model: Model, batch: int, length: int) -> Problem:
    def make(device: torch.device, dtype: torch.dtype) -> Setup:
        cache = _cache(batch, model.heads, model.head_dim, length, device, dtype=dtype)
        q = _query(batch, model, device, dtype)
        k, v = torch.empty(2, batch, model.heads, length, model.head_dim, dtype=dtype, device=device).normal_()
        torchs = {"torch": lambda: F.scaled_dot_product_attention(q[:, :, None], k, v)}
        return Setup(lambda: decode_attention(q, [cache]), torchs)

    moved = kv_bytes(model, batch, length, four_bits=False)
    targets = {"roof": 0.85} if moved >= FILLS_BYTES else {}
    return Problem(f"decode 16-bit {model.name} {batch}x{length}", moved, moved, 2 * moved, make, targets)


def decode_4bit(model: Model, batch: int, length: int) -> Problem:
    def make(device: torch.device, dtype: torch.dtype) -> Setup:
        cache = _cache_q4(batch, model.heads, model.head_dim, length, device)
        wide = _cache(batch, model.heads, model.head_dim, length, device, dtype=dtype)
        q = _query(batch, model, device, dtype)
        return Setup(lambda: decode_attention(q, [cache]), {"16 bits": lambda: decode_attention(q, [wide])})

    moved, wide_bytes = (kv_bytes(model, batch, length, four_bits=x) for x in (True, False))
    targets = {"16 bits": 2.5} if wide_bytes >= FILLS_BYTES else {}
    return Problem(f"decode 4-bit {model.name} {batch}x{length}", moved, wide_bytes, 2 * wide_bytes, make, targets)


def decode_sparse(model: Model, batch: int, length: int) -> Problem:
    """A tenth of V's rows; of K all."""

    def make(device: torch.device, dtype: torch.dtype) -> Setup:
        cache = _cache(batch, model.heads, model.head_dim, length, device, dtype=dtype)
        q = _query(batch, model, device, dtype)
        kept = max(1, int(KEEP * length))
        keep = torch.full((batch,), kept, dtype=torch.int32, device=device)
        dense = {"dense": lambda: decode_attention(q, [cache])}
        return Setup(lambda: sparse_decode_attention(q, [cache], keep, max_keep=kept), dense)

    whole = kv_bytes(model, batch, length, four_bits=False)
    targets = {"dense": 1.6} if whole >= FILLS_BYTES else {}
    moved = int(whole * (1 + KEEP) / 2)
    return Problem(f"decode sparse {model.name} {batch}x{length}", moved, moved, 2 * whole, make, targets)


def decode_sparse_host(model: Model, batch: int, length: int) -> Problem:
    """The same with V in pinned host memory, beside the copy of all of V that it saves; the roof counts K only."""

    def make(device: torch.device, dtype: torch.dtype) -> Setup:
        cache = _cache(batch, model.heads, model.head_dim, length, device, dtype=dtype)
        values = cache.v[0].contiguous()
        host = torch.empty(values.shape, dtype=dtype, pin_memory=device.type == "cuda").copy_(values)
        apart = cache._replace(v=(host,))
        q = _query(batch, model, device, dtype)
        kept = max(1, int(KEEP * length))
        keep = torch.full((batch,), kept, dtype=torch.int32, device=device)
        transfer = {"V transfer": lambda: values.copy_(host, non_blocking=True)}
        return Setup(lambda: sparse_decode_attention(q, [apart], keep, max_keep=kept), transfer)

    whole = kv_bytes(model, batch, length, four_bits=False)
    name = f"decode sparse {model.name} {batch}x{length}, V on the host"
    return Problem(name, whole // 2, whole, 2 * whole, make, {"V transfer": 5.0})


def prefill(model: Model, batch: int, length: int) -> Problem:
    """Prompts of one length, the kind that torch's attention can do in one call."""
    shape = (batch * length, 3, model.heads, model.head_dim)

    def make(device: torch.device, dtype: torch.dtype) -> Setup:
        q, k, v = torch.randn(shape, device=device).to(dtype).unbind(1)
        lens = (length,) * batch
        dense = [x.reshape(batch, length, *x.shape[1:]).transpose(1, 2).contiguous() for x in (q, k, v)]
        torchs = {"torch": lambda: F.scaled_dot_product_attention(*dense, is_causal=True)}
        return Setup(lambda: prefill_attention(q, k, v, lens), torchs)

    elements = batch * length * model.heads * model.head_dim
    # Two products of length^2 / 2 pairs each. The target is for work that fills the GPU: 10 us of an H200's.
    flops = 2 * elements * (length + 1)
    targets = {"torch": 0.9} if flops >= 8e9 else {}
    return Problem(f"prefill {model.name} {batch}x{length}", 8 * elements, flops, 24 * elements, make, targets)


# Small kernels


def norm(model: Model, m: int) -> Problem:
    """Layer norm of the hidden states of M tokens."""
    width = model.hidden

    def make(device: torch.device, dtype: torch.dtype) -> Setup:
        x = torch.randn(m, width, device=device).to(dtype)
        weight, bias = torch.randn(2, width, device=device).to(dtype)
        torchs = {"torch": lambda: F.layer_norm(x, (width,), weight, bias)}
        return Setup(lambda: layer_norm(x, weight, bias), torchs)

    moved = 4 * m * width
    return Problem(f"layer norm {model.name} M={m}", moved, 0, 4 * moved, make)


def write(model: Model, batch: int, length: int, *, four_bits: bool) -> Problem:
    """K and V of whole prompts (length > 1) or of one token of every sequence, to the cache."""
    heads, dim = model.heads, model.head_dim

    def make(device: torch.device, dtype: torch.dtype) -> Setup:
        k, v = torch.randn(batch * length, 2, heads, dim, device=device).to(dtype).unbind(1)
        room = max(length, 8 * PAGE_TOKENS)
        if four_bits:
            cache = _cache_q4(batch, heads, dim, room, device)
        else:
            cache = _cache(batch, heads, dim, room, device, dtype=dtype)
        fields = (cache.k, cache.v)
        if length > 1:
            lens = (length,) * batch
            return Setup(lambda: write_prompt_kv(k, v, *fields, lens))
        positions = torch.randint(room, (batch,), dtype=torch.int32, device=device)
        return Setup(lambda: append_kv(k, v, *fields, positions))

    source, target = (kv_bytes(model, batch, length, four_bits=x) for x in (False, four_bits))
    name = f"write {'4' if four_bits else '16'}-bit {model.name} {batch}x{length}"
    room = kv_bytes(model, batch, max(length, 8 * PAGE_TOKENS), four_bits=False)
    return Problem(name, source + target, 0, 3 * source + 2 * room, make)


def problems(
    models: Sequence[Model] = MODELS,
    ms: Sequence[int] = MS,
    batches: Sequence[int] = BATCHES,
    lengths: Sequence[int] = LENGTHS,
) -> dict[str, list[Problem]]:
    """Everything that is timed, by group, in the order it is timed in: the likeliest to be asked for first."""
    shapes = [(batch, length) for batch in reversed(batches) for length in reversed(lengths)]
    found: dict[str, list[Problem]] = {"linears": [], "decode": [], "prefill": [], "small": []}
    for model in models:
        for matrix in model.matrices:
            found["linears"] += [linear(model, matrix, m) for m in ms]
            found["linears"].append(dequantize(model, matrix))
        for kind in (decode_16bit, decode_4bit, decode_sparse):
            found["decode"] += [kind(model, *shape) for shape in shapes]
        found["decode"].append(decode_sparse_host(model, batches[len(batches) // 2], lengths[-1]))
        found["prefill"] += [prefill(model, *shape) for shape in shapes]
        found["small"] += [norm(model, m) for m in (ms[0], ms[-1])]
        for four_bits in (False, True):
            ends = ((batches[-1], 1), (1, lengths[-1]))
            found["small"] += [write(model, *shape, four_bits=four_bits) for shape in ends]
    return found


# Correctness


def _error(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth.double()).norm() / truth.double().norm())


def _verdict(name: str, error: float, bound: float) -> Row:
    """A row of unit `share`: 1 when the error is within its bound; NaN is not."""
    right = float(error <= bound)
    details = {"error": error, "bound": bound}
    return Row(
        f"right: {name}", right, "share", roof=1.0, share=right, note=f"{error:.2e} <= {bound:.2e}", details=details
    )


def check_linear(
    model: Model, matrix: str, ms: Sequence[int], device: torch.device, dtype: torch.dtype
) -> Iterator[Row]:
    """Dequantisation and the product, at most twice as far from fp64 as torch in 16 bits."""
    rows, columns = model.matrices[matrix]
    weight = torch.randn(rows, columns, device=device).to(dtype) / columns**0.5
    codes, scales = formats.quantize_weight(weight, GROUP)
    got = formats.dequantize_weight(codes, scales, rows, columns, torch.float32)
    name = f"{model.name} {matrix}"
    dense = quant.dequantize_weight(codes, scales, rows, columns, dtype)
    yield _verdict(f"dequantize {name}", _error(dense, got), 1.5 * _error(got.to(dtype), got))
    del got, weight
    for m in ms:
        x, bias = torch.randn(m, columns, device=device).to(dtype), torch.randn(rows, device=device).to(dtype)
        residual = torch.randn(m, rows, device=device).to(dtype)
        given = {"bias": bias, "activation": "relu", "residual": residual}
        truth = matmul_q4_ref(x, codes, scales, rows, **given)
        plain = torch.relu(F.linear(x, dense, bias)) + residual
        out = torch.full((m, rows), float("nan"), dtype=dtype, device=device)
        matmul_q4(x, codes, scales, rows, **given, out=out)
        yield _verdict(f"4-bit linear {name} M={m}", _error(out, truth), 2 * _error(plain, truth))


def check_attention(model: Model, lens: Sequence[int], device: torch.device, dtype: torch.dtype) -> Iterator[Row]:
    """Prefill, then the cache's writing in both formats, then decode over what was written."""
    heads, dim = model.heads, model.head_dim
    q, k, v = torch.randn(sum(lens), 3, heads, dim, device=device).to(dtype).unbind(1)
    truth = prefill_attention_ref(q.double(), k.double(), v.double(), lens)
    yield _verdict(f"prefill {model.name}", _error(prefill_attention(q, k, v, lens), truth), _rounding(truth, dtype))
    last = q[torch.tensor(lens, device=device).cumsum(0) - 1]
    room = max(lens) + PAGE_TOKENS
    count = torch.tensor(lens, dtype=torch.int32, device=device)
    for kind in ("16-bit", "4-bit"):
        caches = []
        for write_prompt, append in ((write_prompt_kv, append_kv), (write_prompt_kv_ref, append_kv_ref)):
            if kind == "4-bit":
                cache = _cache_q4(len(lens), heads, dim, room, device)
            else:
                cache = _cache(len(lens), heads, dim, room, device, dtype=dtype)
            for tensor in (*cache.k, *cache.v):
                tensor.zero_()
            write_prompt(k, v, cache.k, cache.v, lens)
            append(k[: len(lens)], v[: len(lens)], cache.k, cache.v, count)
            caches.append(cache._replace(lens=count + 1))
        numbers = [_numbers(cache, dim) for cache in caches]
        # A code may fall to the other side of a tie: a step of 1/15 of the range, seldom.
        yield _verdict(f"write {kind} {model.name}", _error(*numbers), 1e-3 if kind == "4-bit" else 0.0)
        truth = decode_attention_ref(last.double(), [caches[0]])
        got = decode_attention(last, [caches[0]])
        yield _verdict(f"decode {kind} {model.name}", _error(got, truth), _rounding(truth, dtype))
        got = sparse_decode_attention(last, [caches[0]], count)  # all earlier tokens kept: it is dense then
        yield _verdict(f"decode sparse {kind} {model.name}", _error(got, truth), _rounding(truth, dtype))


def _numbers(cache: KVSegment, dim: int) -> Tensor:
    if len(cache.k) == 1:
        return torch.stack((cache.k[0], cache.v[0]))
    return torch.stack([formats.dequantize_kv(*fields, dim, torch.float32) for fields in (cache.k, cache.v)])


def _rounding(truth: Tensor, dtype: torch.dtype) -> float:
    """Twice what attention in 16 bits loses at best: its weights and its result are rounded once each."""
    return 4 * _error(truth.to(dtype), truth) + 1e-6


def check_norm(model: Model, device: torch.device, dtype: torch.dtype) -> Iterator[Row]:
    x = torch.randn(5, model.hidden, device=device).to(dtype)
    weight, bias = torch.randn(2, model.hidden, device=device).to(dtype)
    truth = layer_norm_ref(x.double(), weight.double(), bias.double())
    error = _error(layer_norm(x, weight, bias), truth)
    yield _verdict(f"layer norm {model.name}", error, 2 * _error(truth.to(dtype), truth) + 1e-6)


def correctness(device: torch.device, dtype: torch.dtype, memory_bytes: int) -> Iterator[Row]:
    """Every kernel against its reference on real shapes, of the models whose largest matrix fits in fp64."""
    for model in MODELS:
        name = f"right: {model.name}"
        if 64 * math.prod(model.matrices["fc1"]) > memory_bytes:
            yield Row(name, None, "", note=f"skipped: more than {memory_bytes / 1e9:.1f} GB")
            continue
        for check, *given in ((check_linear, "fc1", CHECKED_MS), (check_attention, CHECKED_LENS), (check_norm,)):
            yield from guarded(name, lambda c=check, m=model, g=given: c(m, *g, device, dtype))


# All of it


def timed(
    group: Sequence[Problem],
    seconds: float,
    timer: Timer,
    roofs: Roofs,
    device: torch.device,
    dtype: torch.dtype,
    *,
    memory_bytes: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Row]:
    """Rows of a group until its seconds are spent; then, and for what memory has no room, rows that say so."""
    end = clock() + seconds
    for problem in group:
        if clock() > end:
            yield skipped(problem, f"the group's {seconds:g} s are spent")
        elif problem.memory_bytes > memory_bytes:
            needs, has = problem.memory_bytes / 1e9, memory_bytes / 1e9
            yield skipped(problem, f"needs {needs:.1f} GB of GPU memory, may take {has:.1f}")
        else:
            yield from guarded(problem.name, lambda p=problem: iter([measure(p, timer, roofs, device, dtype)]))


def rows(dtype: torch.dtype = torch.float16) -> Iterator[Row]:
    """Correctness, roofs, then every group; a row that says so where there is no GPU."""
    if not torch.cuda.is_available():
        yield Row("kernels", None, "", note="no GPU here: not checked, not timed")
        return
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    end = time.perf_counter() + BUDGET_S["correctness"]
    for row in correctness(device, dtype, torch.cuda.mem_get_info(device)[0]):
        yield row
        if time.perf_counter() > end:
            yield Row("right: the rest", None, "", note=f"skipped: {BUDGET_S['correctness']} s are spent")
            break
    timer = DeviceTimer(device)
    roofs = measure_roofs(timer, device, dtype)
    yield Row("roof: device copy, read and written", roofs.copy_bytes_s / 1e9, "GB/s")
    yield Row(f"roof: torch product of 8192^3, {dtype}", roofs.product_flops_s / 1e12, "TFLOP/s")
    for name, group in problems().items():
        _weight.cache_clear()
        torch.cuda.empty_cache()
        room = int(MEMORY_SHARE * torch.cuda.mem_get_info(device)[0])
        yield from timed(group, BUDGET_S[name], timer, roofs, device, dtype, memory_bytes=room)
