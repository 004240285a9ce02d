"""Speed of a device at the arithmetic that plans count, by size: the engine's own products, attention and norms.

Knows what to run and how much work it is. Does not know what the figures are for; machine/measure.py makes a profile of
them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..memory.cache_homes import page_fields
from ..memory.cache_places import Segment, segment
from ..models import ops
from ..plan.formats import CacheFormat, FourBit, FourBitCache, Plain, PlainCache, WeightFormat
from ..plan.hardware import Curve
from ..plan.layout import CacheLayout, page_tokens_for
from ..plan.plan import Plan, make_plan
from ..plan.policy import Policy
from ..plan.spec import ModelSpec, Workload
from .workbench import Clock, Task, Workbench

PACKED = FourBit(64)
ATTENTION_STAGES = 3  # projection, attention and its end; the probe's stage 0 is the embedding, its fifth the MLP

ROWS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 256, 512, 1024)
PROMPT_LENS = (32, 128, 512, 1024)
CONTEXTS = ((4, 16), (4, 64), (8, 256), (16, 512), (32, 1024))  # sequences, tokens of each
PASSED_ROWS = (1, 16, 256, 2048)


# Products


def products(bench: Workbench, clock: Clock, budget_s: float) -> dict[str, Curve]:
    """FLOP/s of `ops.linear` by the matrix's format and the rows of x, mean of an MLP's two shapes.

    On a GPU 4-bit matrices are measured where they are multiplied as they are; from `ops.crossover_rows` on they are
    dequantised once and multiplied in 16 bits.
    """
    crossover = ops.crossover_rows(bench.device)
    rows: Sequence[int] = (1, 8, 64, 256) if bench.quick else ROWS
    on_gpu = bench.device.type == "cuda"
    rows4 = [m for m in rows if m < crossover] if on_gpu else sorted({*rows, crossover - 1, crossover})
    sweeps = {dtype: _product_tasks(bench, rows, dtype, Plain(dtype)) for dtype in bench.dtypes}
    sweeps[PACKED.rates] = _product_tasks(bench, rows4, bench.half, PACKED)
    return clock.curves(sweeps, budget_s)


def _product_tasks(bench: Workbench, rows: Sequence[int], dtype: str, form: WeightFormat) -> list[Task]:
    pairs = [(n, k, _matrices(bench, n, k, form)) for n, k in ((bench.ffn, bench.hidden), (bench.hidden, bench.ffn))]

    def task(m: int) -> Task:
        inputs = [(bench.view(dtype, m, k), matrices) for _, k, matrices in pairs]
        return Task(m, 4.0 * m * bench.hidden * bench.ffn, lambda: [ops.linear(x, next(w)) for x, w in inputs])

    return [task(m) for m in rows]


def _matrices(bench: Workbench, n: int, k: int, form: WeightFormat) -> Iterator[ops.Weight]:
    """Matrices [n, k] all over the arena, without end."""
    return (ops.from_bytes(form, (n, k), stretch) for stretch in bench.stretches(round(n * k * form.parameter_bytes)))


# Attention and what passes over activations


def prompt_attention(bench: Workbench, clock: Clock, budget_s: float) -> Curve:
    """FLOP/s of causal attention by prompt length, of about as many tokens at every length."""
    tokens = 1024 if bench.quick else 2048 if bench.device.type == "cpu" else 16384
    lens = PROMPT_LENS[:3] if bench.quick else PROMPT_LENS
    return clock.curve([_prompt_task(bench, length, tokens // length) for length in lens], budget_s)


def _prompt_task(bench: Workbench, length: int, sequences: int) -> Task:
    qkv = bench.view(bench.half, length * sequences, 3, bench.heads, bench.hidden // bench.heads)
    q, k, v = qkv.unbind(1)
    work = _one_batch(bench, bench.half, length, sequences).work(0, 1, 0, ATTENTION_STAGES)
    return Task(length, work.prompt_flops, lambda: ops.prefill_attention(q, k, v, [length] * sequences))


def token_attention(bench: Workbench, clock: Clock, budget_s: float) -> dict[str, Curve]:
    """Bytes of K and V per second of attention over the cache, by its format and the bytes of all sequences."""
    contexts = CONTEXTS[:3] if bench.quick else CONTEXTS
    sweeps = {dtype: _context_tasks(bench, contexts, dtype, PlainCache()) for dtype in bench.dtypes}
    packed = FourBitCache()
    sweeps[packed.rates(bench.half)] = _context_tasks(bench, contexts, bench.half, packed)
    return clock.curves(sweeps, budget_s)


def _context_tasks(bench: Workbench, contexts: Sequence[tuple[int, int]], dtype: str, form: CacheFormat) -> list[Task]:
    """Attention over caches of which the arena holds two or more."""
    spec = bench.spec(dtype)
    fields = form.fields(dtype, spec.head_dim)
    layouts = [CacheLayout(spec.num_kv_heads, fields, page_tokens_for(tokens)) for _, tokens in contexts]
    return [
        _context_task(bench, spec, layout, sequences, tokens)
        for layout, (sequences, tokens) in zip(layouts, contexts, strict=True)
        if 2 * layout.dense(layout.pages(tokens), sequences) <= bench.nbytes
    ]


def _context_task(bench: Workbench, spec: ModelSpec, layout: CacheLayout, sequences: int, tokens: int) -> Task:
    q = bench.view(spec.dtype, sequences, spec.num_heads, spec.head_dim)
    stretches = bench.stretches(layout.dense(layout.pages(tokens), sequences))
    lens = torch.tensor([tokens] * sequences, dtype=torch.int32, device=bench.device)
    nbytes = sequences * tokens * layout.token_bytes

    def run() -> None:
        ops.decode_attention(q, [cached_segment(layout, next(stretches), lens)])

    return Task(nbytes, nbytes, run)


def cached_segment(layout: CacheLayout, buffer: Tensor, lens: Tensor) -> Segment:
    """A resident home of the cache of sequences with `lens` [n] tokens, as memory/cache_homes.py lays it out."""
    return segment(page_fields(layout, buffer, len(lens)), lens)


def passes(bench: Workbench, clock: Clock, budget_s: float) -> Curve:
    """Bytes per second that norms, activations and residuals pass over, as plans count them, by those of a layer."""
    rows = PASSED_ROWS[:3] if bench.quick else PASSED_ROWS
    return clock.curve([_passes_task(bench, m) for m in rows], budget_s)


def _passes_task(bench: Workbench, rows: int) -> Task:
    """Norms, residuals and activation of the probe's attention and MLP: all but the products, which add the biases."""
    x, inner = bench.view(bench.half, rows, bench.hidden), bench.view(bench.half, rows, bench.ffn)
    norm = bench.view(bench.half, bench.hidden)
    plan = _one_batch(bench, bench.half, rows, 1)
    nbytes = plan.work(0, 1, 0, ATTENTION_STAGES).hidden_bytes + plan.work(0, 1 + ATTENTION_STAGES, 0).hidden_bytes

    def run() -> None:
        for _ in ("attention", "mlp"):
            x + ops.layer_norm(x, norm, norm)
        ops.ACTIVATIONS["relu"](inner)

    return Task(nbytes / 2, nbytes, run)


def _one_batch(bench: Workbench, dtype: str, prompt_len: int, sequences: int) -> Plan:
    """A plan of the layer: layers are embedding, attention, MLP, head."""
    return make_plan(
        bench.spec(dtype), Policy(sequences), Workload.uniform(prompt_len, 2, sequences, 1), host_is_apart=False
    )
