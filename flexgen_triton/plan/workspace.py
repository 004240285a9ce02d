"""Bytes that computations need beside weights, cache and hidden states.

Decoding takes its temporaries from memory that is allocated before the run (`temporaries`); prompts' are allocated as
they are made, beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .layout import kv_width, pad
from .spec import BLOCK_ROWS

if TYPE_CHECKING:
    from .plan import Plan
    from .spec import LayerSpec, TensorSpec

SCORED_ROWS = 256  # prompt positions whose logits are made at a time
WIDEN_BYTES = 16 << 20  # of fp32 rows that the CPU widens a 16-bit matrix to at a time
DEQUANTISED_BYTES = 2 << 20  # the same of a 4-bit one; 8 MiB halve the product's speed
ALIGNMENT = 16 << 10  # what the temporaries of a computation lose by starting at multiples of 256: 64 of them
DECODE_PROGRAMS = 16 * 304  # that attention is split for at most: 16 for each multiprocessor of the largest chip
MIN_SPLIT_TOKENS, MAX_SPLITS = 128, 64  # of a sequence, in attention on a GPU
HOST_THREADS, HOST_CHUNK = 128, 32  # that attend on the host at most, and tokens that each widens at a time
HEAP_BYTES = 64 << 20  # that the process's heap keeps of what was freed
HUGE_PAGE = 2 << 20  # that large buffers are made of, where the system has them
SEGMENTS = 3  # that a sequence's cache is in at most: full pages, the open one, the newest token


def workspace_bytes(plan: Plan) -> int:
    """Temporaries of decoding and, beside them, of the prompts' largest computation, with the logits.

    In place, pages count when they are first written: what the cache does not yet hold after the prompts is taken
    off what the prompts' computation needs, but for what the heap keeps of that.
    """
    prompts = _rows_bytes(plan, max(b.prompt_tokens for b in plan.workload.batches))
    on_top = max(prompts - (0 if plan.host_is_apart else _unfilled_bytes(plan)), min(prompts, HEAP_BYTES))
    return on_top + _head_bytes(plan) + _logits_bytes(plan) + sum(_used(plan).values())


def temporaries(plan: Plan) -> dict[str, int]:
    """Bytes allocated before the run for the computations of token steps, and for tensors that outlive one of them.

    `decode`: the largest computation of one token of each sequence. `widened`: what it takes on top on a CPU,
    and `panel` the rows of a matrix in fp32 there, for prompts too. `dense`: a 4-bit layer dequantised, which a GPU
    keeps for all GPU batches that use this load of it. `hosted`: attention on the host. `uploads`: what the host hands
    the device in a token step. `token_staging`: new tokens of the host's and the disk's sequences, on their way home.
    """
    rows = max(b.size for b in plan.workload.batches)
    hosted = max(g.cache.attended.size for g in plan.groups)
    matrices = [t for layer in plan.layers for t in layer.tensors if _is_matrix(t)]
    sizes = {
        "decode": (rows + 1) * _row_bytes(plan)
        + max(_attention_bytes(plan, rows), _product_bytes(plan, rows, matrices))
        + ALIGNMENT,
        "widened": max(_host_attention_bytes(plan, rows), *(_widened_bytes(plan, rows, t) for t in matrices))
        + ALIGNMENT,
        "panel": max(_panel_bytes(plan, t) for t in matrices),
        "dense": _dense_bytes(plan),
        "hosted": _host_attention_bytes(plan, hosted) if hosted else 0,
        "uploads": _upload_bytes(plan),
        "token_staging": _token_staging_bytes(plan),
    }
    return {name: pad(nbytes) for name, nbytes in sizes.items()}


def _used(plan: Plan) -> dict[str, int]:
    """The temporaries that the plan's device touches."""
    names = ("decode", "dense", "uploads") if plan.host_is_apart else ("decode", "widened", "panel")
    return {name: plan.temporaries[name] for name in names}


def _is_matrix(tensor: TensorSpec) -> bool:
    """True for the weight of a matrix product: a matrix, or its codes; not scales, vectors or tables."""
    if tensor.packing:
        return tensor.packing.half == "codes"
    return len(tensor.shape) == 2 and not tensor.gathered


def _row_bytes(plan: Plan) -> int:
    """The results, for one row, of all computations that hand them on to each other."""
    layers = [_layer_bytes(plan, layer) for layer in plan.layers]
    return max(sum(layers[j : j + plan.layers_in_use]) for j in range(len(layers)))


def _layer_bytes(plan: Plan, layer: LayerSpec) -> int:
    """The results of a layer's operations for one row, all kept to its end, and its entry; or its vectors' bytes."""
    model = plan.model
    width = sum(t.source_shape[0] for t in layer.tensors if _is_matrix(t) and not t.exact)
    looked_up = 2 * sum(t.shape[1] for t in layer.tensors if t.gathered)  # and of a table that the head multiplies with
    heads = model.num_heads * model.head_dim
    return model.itemsize * (width + looked_up + model.hidden * (3 + 2 * len(layer.modules)) + heads)


def _product_bytes(plan: Plan, rows: int, matrices: list[TensorSpec]) -> int:
    """Beside the result of a product: a part of the logits in 16 bits, and sums of x over groups of columns."""
    itemsize = plan.model.itemsize
    parts = (t.source_shape[0] * itemsize if t.exact and itemsize == 2 else t.source_shape[1] // 4 for t in matrices)
    return rows * max(parts)


def _attention_bytes(plan: Plan, rows: int) -> int:
    """Partial results of attention, or of a CPU's its queries and sums, and sparse attention's scores and choices."""
    model, batches = plan.model, plan.workload.batches
    longest = max(b.max_len for b in batches)
    splits = min(max(longest // MIN_SPLIT_TOKENS, 1), MAX_SPLITS)
    parts = max(rows, min(rows * splits, DECODE_PROGRAMS // model.num_kv_heads)) if plan.host_is_apart else rows
    numbers = SEGMENTS * parts * model.num_heads * (model.head_dim + 64) * 4
    if plan.policy.attn_sparsity < 1:
        places = longest + SEGMENTS * plan.cache_layout.page_tokens
        numbers += rows * model.num_heads * (4 * places + 24 * (plan.kept(longest) + 1))
    return numbers


def _host_attention_bytes(plan: Plan, rows: int) -> int:
    """Attention's on a CPU, with what each thread widens of the cache."""
    model, width = plan.model, kv_width(plan.model.head_dim)
    longest = max(b.max_len for b in plan.workload.batches) + SEGMENTS * plan.cache_layout.page_tokens
    sparse = plan.policy.attn_sparsity < 1
    scores = longest + plan.kept(longest) + 4 if sparse else 0
    thread = max(HOST_CHUNK * (2 * width + model.num_heads), longest if sparse else 0)
    return 4 * (rows * model.num_heads * (2 * width + 2 + scores) + HOST_THREADS * thread) + ALIGNMENT


def _widened_bytes(plan: Plan, rows: int, t: TensorSpec) -> int:
    """Bytes of a product on a CPU: x in fp32, and the result and addend of a 4-bit one, else a panel's result."""
    outputs, inputs = t.source_shape
    if t.packing:
        return 4 * rows * (inputs + 2 * outputs) + 4 * outputs
    if plan.model.itemsize == 4:
        return 0
    return 4 * rows * (inputs + min(_widened_rows(inputs), outputs)) + 4 * outputs


def _widened_rows(columns: int) -> int:
    return max(1, WIDEN_BYTES // (4 * columns))


def _panel_bytes(plan: Plan, t: TensorSpec) -> int:
    """Rows of a matrix in fp32, as many as a CPU's product takes at a time."""
    outputs, inputs = t.source_shape
    if t.packing:
        columns = 4 * t.shape[1]
        block = 4 * columns * BLOCK_ROWS
        return block * min(max(1, DEQUANTISED_BYTES // block), t.shape[0])
    return 0 if plan.model.itemsize == 4 else 4 * inputs * min(_widened_rows(inputs), outputs)


def _upload_bytes(plan: Plan) -> int:
    """A token step's embeddings looked up on the host, their places, and five counts of each sequence's tokens."""
    model = plan.model
    gathered = sum(t.shape[1] for layer in plan.layers for t in layer.tensors if t.gathered)
    row = (gathered + model.hidden) * model.itemsize + 4 * 8 + 5 * 4
    return sum(b.size * row + ALIGNMENT for b in plan.workload.batches)


def _token_staging_bytes(plan: Plan) -> int:
    if not plan.host_is_apart or plan.keeps_open:
        return 0
    return max(g.cache.host.size + g.cache.disk.size for g in plan.groups) * plan.cache_layout.token_bytes


def _rows_bytes(plan: Plan, rows: int) -> int:
    """Temporaries of an MLP or an attention over `rows` packed rows, whichever needs more.

    On a CPU products of 16-bit matrices are fp32, [rows, ffn] widened beside the 16-bit one; an activation
    function's result is a second tensor of that size.
    """
    model, itemsize = plan.model, plan.model.itemsize
    widens = not plan.host_is_apart and itemsize == 2 and not model.is_4bit
    inner = model.ffn * (6 if widens else 2 * itemsize if plan.host_is_apart else 8)
    mlp = inner + model.hidden * (4 * itemsize + 4)
    quantised = 20 if plan.policy.is_cache_4bit and not plan.host_is_apart else 0  # K or V on its way to 4 bits
    attention = model.hidden * (5 * itemsize + 16 + quantised)
    panels = WIDEN_BYTES if not plan.host_is_apart and (itemsize == 2 or model.is_4bit) else 0
    return rows * max(mlp, attention) + panels


def _head_bytes(plan: Plan) -> int:
    """The largest part of the output projection's product, where it is not made in place."""
    parts = (t.shape[0] for layer in plan.layers if layer.is_head for t in layer.tensors if t.exact)
    in_place = not plan.host_is_apart and plan.model.itemsize == 2
    largest, batches = max(parts), plan.workload.batches
    sampled = 0 if in_place else largest * max(b.size for b in batches) * plan.model.itemsize
    scored = max(b.scored for b in batches)
    chunk = 2 * largest * min(scored, SCORED_ROWS) * 4  # logits of some positions, and their exponentials
    return sampled + chunk + sum(b.scored for b in batches) * plan.model.hidden * plan.model.itemsize


def _unfilled_bytes(plan: Plan) -> int:
    """Bytes of the cache's homes in memory that are certainly first written after the prompts.

    Of a layer's home the pages behind its longest prompt, without the huge pages that also hold what is written
    earlier: they become resident as a whole.
    """
    layout, layers, total = plan.cache_layout, sum(layer.has_cache for layer in plan.layers), 0
    for batch, groups in zip(plan.workload.batches, plan.groups, strict=True):
        pages = layout.pages(batch.max_len)
        for group in groups.cache[:2]:
            filled = max(map(layout.pages, group.prompt_lens), default=pages)
            huge = layout.dense(pages - filled, group.size) // HUGE_PAGE
            total += max(huge - 1, 0) * HUGE_PAGE
    return layers * total


def _dense_bytes(plan: Plan) -> int:
    """4-bit layers dequantised, which a GPU keeps for all GPU batches that use this load of them."""
    if not plan.host_is_apart:
        return 0
    parameters = (sum(t.num_parameters for t in layer.tensors if t.packing) for layer in plan.layers)
    return plan.layers_in_use * pad(max(parameters) * plan.model.itemsize + ALIGNMENT) if plan.model.is_4bit else 0


def _logits_bytes(plan: Plan) -> int:
    """fp32 logits of all GPU batches, kept while the parts of the head go by, and what their samplers keep."""
    return sum(4 * b.size + b.sampler_bytes for b in plan.workload.batches) * plan.model.vocab
