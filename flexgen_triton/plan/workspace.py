"""What computations need beside weights, cache and hidden states: temporaries of a plan's largest one, in bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .plan import Plan

SCORED_ROWS = 256  # prompt positions whose logits are made at a time
WIDEN_BYTES = 16 << 20  # of fp32 rows that the CPU widens a 16-bit matrix to at a time


def workspace_bytes(plan: Plan) -> int:
    """Temporaries of the largest computation, with the logits.

    In place, pages count when they are first written: what the cache does not yet hold after the prompts is taken
    off what the prompts' computation needs.
    """
    batches = plan.workload.batches
    prompts = _rows_bytes(plan, max(b.prompt_tokens for b in batches))
    tokens = _rows_bytes(plan, max(b.size for b in batches))
    largest = max(prompts - (0 if plan.copies else _unfilled_bytes(plan)), tokens)
    return largest + _head_bytes(plan) + _dense_bytes(plan) + _score_bytes(plan) + _logits_bytes(plan)


def _rows_bytes(plan: Plan, rows: int) -> int:
    """Temporaries of an MLP or an attention over `rows` packed rows, whichever needs more.

    On a CPU products of 16-bit matrices are fp32, [rows, ffn] widened beside the 16-bit one; an activation
    function's result is a second tensor of that size.
    """
    model, itemsize = plan.model, plan.model.itemsize
    widens = not plan.copies and itemsize == 2 and not model.is_4bit
    inner = model.ffn * (6 if widens else 2 * itemsize if plan.copies else 8)
    mlp = inner + model.hidden * (4 * itemsize + 4)
    quantised = 20 if plan.policy.is_cache_4bit and not plan.copies else 0  # K or V on its way to 4 bits
    attention = model.hidden * (5 * itemsize + 16 + quantised)
    panels = 2 * WIDEN_BYTES if not plan.copies and (itemsize == 2 or model.is_4bit) else 0
    return rows * max(mlp, attention) + panels


def _head_bytes(plan: Plan) -> int:
    """The largest part of the output projection's product, where it is not made in place."""
    parts = (t.shape[0] for layer in plan.layers if layer.is_head for t in layer.tensors if t.exact)
    in_place = not plan.copies and plan.model.itemsize == 2
    largest, batches = max(parts), plan.workload.batches
    sampled = 0 if in_place else largest * max(b.size for b in batches) * plan.model.itemsize
    scored = max(b.scored for b in batches)
    chunk = 2 * largest * min(scored, SCORED_ROWS) * 4  # logits of some positions, and their exponentials
    return sampled + chunk + sum(b.scored for b in batches) * plan.model.hidden * plan.model.itemsize


def _unfilled_bytes(plan: Plan) -> int:
    """Bytes of the cache's homes in memory that are first written after the prompts."""
    layout, layers, total = plan.cache_layout, sum(layer.has_cache for layer in plan.layers), 0
    for batch, groups in zip(plan.workload.batches, plan.groups, strict=True):
        blocks = layout.blocks(batch.max_len)
        for group in groups.cache[:2]:
            total += sum(layout.dense(blocks - layout.blocks(n), 1) for n in group.prompt_lens)
    return layers * total


def _dense_bytes(plan: Plan) -> int:
    """4-bit layers dequantised, which a GPU keeps for all GPU batches that use this load of them."""
    if not plan.copies:
        return 0
    parameters = [sum(t.num_parameters for t in layer.tensors if t.packing) for layer in plan.layers]
    turns = parameters + parameters[: plan.layers_in_use - 1]
    windows = (turns[j : j + plan.layers_in_use] for j in range(len(parameters)))
    return max(map(sum, windows)) * plan.model.itemsize


def _score_bytes(plan: Plan) -> int:
    """Sparse attention's scores, fp32, and their largest: of every sequence, head and token."""
    if plan.policy.attn_sparsity == 1:
        return 0
    return max(b.size * b.max_len for b in plan.workload.batches) * plan.model.num_heads * 8


def _logits_bytes(plan: Plan) -> int:
    """fp32 logits of all GPU batches, kept while the parts of the head go by, and what their samplers keep."""
    return sum(4 * b.size + b.sampler_bytes for b in plan.workload.batches) * plan.model.vocab
