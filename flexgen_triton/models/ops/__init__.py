"""The operations models are made of, and the one place that picks an implementation by the tensor's device.

On a GPU they are the Triton kernels of `kernels/` and cuBLAS. On the CPU they are torch's own and, for 4-bit matrices,
norms, the cache and attention over it, compiled loops. There 16-bit matrices are multiplied in fp32 unless the
processor has bf16 arithmetic: without it torch emulates 16-bit products several times slower than it widens the
weights, a cache-sized panel of rows at a time.

Results and temporaries come from a `Scratch`: while tokens are decoded, from memory allocated before the run. Without
one they are torch's own. What an operation needs beside its result is back before it returns.
"""

from .attention import decode_attention, prefill_attention, sparse_decode_attention, write_prompt, write_tokens
from .elementwise import ACTIVATIONS, gated, layer_norm, rms_norm, rotate
from .prepare import prepare
from .weight import (
    PlainWeight,
    Weight,
    crossover_rows,
    encode,
    from_bytes,
    linear,
    linear_into,
    read_weight,
)

__all__ = [
    "ACTIVATIONS",
    "PlainWeight",
    "Weight",
    "crossover_rows",
    "decode_attention",
    "encode",
    "from_bytes",
    "gated",
    "layer_norm",
    "linear",
    "linear_into",
    "prefill_attention",
    "prepare",
    "read_weight",
    "rms_norm",
    "rotate",
    "sparse_decode_attention",
    "write_prompt",
    "write_tokens",
]
