"""Temporaries: what computations need beside weights, cache and hidden states, in bytes.

Decoding takes them from memory that is allocated before the run; prompts' are allocated as they are made, beside it.
"""

from __future__ import annotations

from ..kernels.sizes import (
    SEGMENTS,
    cpu_decode_bytes,
    cpu_sparse_bytes,
    gpu_decode_bytes,
    gpu_sparse_bytes,
)
from .layout import COUNT_BYTES, Count, pad
from .placement import Tier
from .spec import TensorSpec
from .traffic import Traffic

SCORED_ROWS = 256  # prompt positions whose logits are made at a time
ALIGNMENT = 16 << 10  # what the temporaries of a computation lose by starting at multiples of 256: 64 of them
HEAP_BYTES = 64 << 20  # that the process's heap keeps of what was freed
HUGE_PAGE = 2 << 20  # that large buffers are made of, where the system has them


def prompt_bytes(traffic: Traffic) -> int:
    """Return the bytes of the prompts' largest computation.

    In place, memory counts when it is first written: what the cache does not yet hold after the prompts is taken off,
    but for what the heap keeps of that.
    """
    prompts = _prompt_rows_bytes(traffic, max(b.prompt_tokens for b in traffic.workload.batches))
    return max(prompts - (0 if traffic.host_is_apart else unfilled_bytes(traffic)), min(prompts, HEAP_BYTES))


def temporaries(traffic: Traffic) -> dict[str, int]:
    """Bytes allocated before the run for the computations of token steps, and for tensors that outlive one of them.

    `decode`: the largest computation of one token of each sequence. `widened`: what it takes on top on a CPU,
    and `panel` the rows of a matrix in fp32 there, for prompts too. `dense`: a 4-bit layer dequantised, which a GPU
    keeps for all GPU batches that use this load of it. `hosted`: attention on the host. `uploads`: what the host hands
    the device in a token step. `token_staging`: new tokens of the host's and the disk's sequences, on their way home.
    """
    rows = max(b.size for b in traffic.workload.batches)
    hosted = max(g.cache.attended_by_host.size for g in traffic.groups)
    matrices = [t for bundle in traffic.distinct_bundles for t in bundle.tensors if t.is_matrix]
    sizes = {
        "decode": (rows + 1) * _row_bytes(traffic)
        + max(_attention_bytes(traffic, rows), _product_bytes(traffic, rows, matrices))
        + ALIGNMENT,
        "widened": max(
            _host_attention_bytes(traffic, rows), *(t.format.widened_bytes(rows, _shape(t)) for t in matrices)
        )
        + ALIGNMENT,
        "panel": max(t.format.panel_bytes(_shape(t)) for t in matrices),
        "dense": _dense_bytes(traffic),
        "hosted": _host_attention_bytes(traffic, hosted) if hosted else 0,
        "uploads": _upload_bytes(traffic),
        "token_staging": _token_staging_bytes(traffic),
    }
    return {name: pad(nbytes) for name, nbytes in sizes.items()}


def _shape(matrix: TensorSpec) -> tuple[int, int]:
    rows, columns = matrix.source_shape
    return rows, columns


def _row_bytes(traffic: Traffic) -> int:
    """The results, for one row, of all computations that hand them on to each other."""
    bundles = _bundle_bytes(traffic)
    return max(sum(bundles[n : n + traffic.bundles_in_use]) for n in range(len(bundles)))


def _bundle_bytes(traffic: Traffic) -> list[int]:
    """Each bundle's results for one row, all kept to its end, with its entry and attention's result."""
    model = traffic.model
    others = 3 * model.hidden + model.num_heads * model.head_dim
    return [model.itemsize * (sum(s.results for s in bundle.stages) + others) for bundle in traffic.bundles]


def _product_bytes(traffic: Traffic, rows: int, matrices: list[TensorSpec]) -> int:
    """Beside the result of a product: a part of the logits in 16 bits, and sums of x over groups of columns."""
    itemsize = traffic.model.itemsize
    parts = (t.source_shape[0] * itemsize if t.exact and itemsize == 2 else t.source_shape[1] // 4 for t in matrices)
    return rows * max(parts)


def _attention_bytes(traffic: Traffic, rows: int) -> int:
    """Partial results of attention, and sparse attention's scores and choices."""
    model = traffic.model
    longest = max(b.max_len for b in traffic.workload.batches)
    split = longest if traffic.host_is_apart else 0  # a CPU does not divide a sequence
    nbytes: int = gpu_decode_bytes(rows, model.num_heads, model.num_kv_heads, model.head_dim, split)
    if traffic.policy.attn_sparsity < 1:
        nbytes += gpu_sparse_bytes(rows, model.num_heads, _places(traffic), traffic.kept(longest))
    return nbytes


def _host_attention_bytes(traffic: Traffic, rows: int) -> int:
    """Workspace of attention on a CPU, on as many threads as it may have."""
    model = traffic.model
    nbytes: int = cpu_decode_bytes(rows, model.num_heads, model.head_dim)
    if traffic.policy.attn_sparsity < 1:
        places = _places(traffic)
        nbytes = cpu_sparse_bytes(rows, model.num_heads, model.head_dim, places, traffic.kept(places))
    return nbytes


def _places(traffic: Traffic) -> int:
    """Tokens that a sequence's segments have room for, the pages that are not full included."""
    longest = max(b.max_len for b in traffic.workload.batches)
    return longest + int(SEGMENTS) * traffic.cache_layout.page_tokens


def _upload_bytes(traffic: Traffic) -> int:
    """A token step's embeddings looked up on the host, their places, positions, and the counts of each sequence."""
    model = traffic.model
    gathered = sum(t.shape[1] for bundle in traffic.bundles for t in bundle.tensors if t.gathered)
    positions = any(s.spec.positions for s in traffic.stages)
    row = (gathered + model.hidden) * model.itemsize + 4 * 8 + (len(Count) + positions) * COUNT_BYTES
    return sum(b.size * row + ALIGNMENT for b in traffic.workload.batches)


def _token_staging_bytes(traffic: Traffic) -> int:
    if not traffic.hands_over_tokens:
        return 0
    return max(g.cache.sent.size for g in traffic.groups) * traffic.cache_layout.token_bytes


def _prompt_rows_bytes(traffic: Traffic, rows: int) -> int:
    """Temporaries of an MLP or an attention over `rows` packed rows, whichever needs more.

    On a CPU products of 16-bit matrices are fp32, [rows, ffn] widened beside the 16-bit one; an activation
    function's result is a second tensor of that size.
    """
    model, itemsize = traffic.model, traffic.model.itemsize
    on_gpu, form = traffic.host_is_apart, traffic.model.format
    inner = max(s.spec.widest for s in traffic.stages) * (2 * itemsize if on_gpu else form.inner_bytes)
    mlp = inner + model.hidden * (4 * itemsize + 4)
    quantising = 0 if on_gpu else traffic.policy.cache_format.quantising_bytes
    attention = max(model.hidden, model.num_heads * model.head_dim) * (5 * itemsize + 16 + quantising)
    return rows * max(mlp, attention) + (0 if on_gpu else form.panel_room)


def head_bytes(traffic: Traffic) -> int:
    """The largest part of the output projection's product, where it is not made in place."""
    parts = (t.shape[0] for bundle in traffic.bundles if bundle.is_head for t in bundle.tensors if t.exact)
    in_place = not traffic.host_is_apart and traffic.model.itemsize == 2
    largest, batches = max(parts), traffic.workload.batches
    sampled = 0 if in_place else largest * max(b.size for b in batches) * traffic.model.itemsize
    scored = max(b.scored for b in batches)
    chunk = 2 * largest * min(scored, SCORED_ROWS) * 4  # logits of some positions, and their exponentials
    return sampled + chunk + sum(b.scored for b in batches) * traffic.model.hidden * traffic.model.itemsize


def unfilled_bytes(traffic: Traffic) -> int:
    """Bytes of the cache's homes on the device that are certainly first written after the prompts.

    Of a layer's home the pages behind its longest prompt, without the huge pages that also hold what is written
    earlier: they become resident as a whole.
    """
    layout, layers, total = traffic.cache_layout, len(traffic.cached_stages), 0
    for batch, groups in zip(traffic.workload.batches, traffic.groups, strict=True):
        pages = layout.pages(batch.max_len)
        for group in (g for g in groups.cache if g.tier is Tier.GPU):
            filled = max(map(layout.pages, group.prompt_lens), default=pages)
            huge = layout.dense(pages - filled, group.size) // HUGE_PAGE
            total += max(huge - 1, 0) * HUGE_PAGE
    return layers * total


def _dense_bytes(traffic: Traffic) -> int:
    """Packed bundles dequantised, which a GPU keeps for all GPU batches that use this load of them."""
    if not traffic.host_is_apart or not traffic.model.is_packed:
        return 0
    parameters = (sum(t.num_parameters for t in bundle.tensors if t.packed) for bundle in traffic.distinct_bundles)
    return traffic.bundles_in_use * pad(max(parameters) * traffic.model.itemsize + ALIGNMENT)


def logits_bytes(traffic: Traffic) -> int:
    """fp32 logits of all GPU batches, kept while the parts of the head go by, and what their samplers keep."""
    return sum(4 * b.size + b.sampler_bytes for b in traffic.workload.batches) * traffic.model.vocab
