"""How the KV cache and the hidden states of a GPU batch are divided over the tiers and laid out in memory.

Sequences of a batch stand longest first: the first ones on the GPU, the next on the host, the last on disk. K and V of
`block_tokens` tokens of one sequence are one chunk; a group of n sequences keeps its chunks block-major, `[blocks, n,
chunk]`, so any number of leading blocks is one contiguous range. A chunk is all of K, then all of V, each of them one
field after another, `[KV heads, block_tokens, width]`: a 16-bit cache has one field, the head's numbers; a 4-bit one
has two, codes and scales (kernels/formats.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .placement import PAGE, Tier
from .policy import CACHE_GROUP
from .spec import CODES_PER_WORD, STORED_BYTES, Batch, ModelSpec

BLOCK_TOKENS = 64
SHORT_BLOCK_TOKENS = 8  # for sequences so short that a 64-token block would be mostly padding
SHORT_SEQUENCE = 128


def pad(nbytes: int, to: int = PAGE) -> int:
    return -(-nbytes // to) * to


def block_tokens_for(max_len: int) -> int:
    return BLOCK_TOKENS if max_len > SHORT_SEQUENCE else SHORT_BLOCK_TOKENS


def split_counts(sizes: Sequence[int], percents: Sequence[float]) -> list[tuple[int, int, int]]:
    """Sequences of each batch per tier (GPU, host, disk), the shares exact to one sequence over all batches."""
    counts: list[tuple[int, int, int]] = []
    seen = given_gpu = given_host = 0
    for size in sizes:
        seen += size
        on_gpu = min(max(round(seen * percents[0] / 100) - given_gpu, 0), size)
        given_gpu += on_gpu
        wanted_host = round(seen * (percents[0] + percents[1]) / 100) - given_gpu - given_host
        on_host = min(max(wanted_host, 0), size - on_gpu)
        given_host += on_host
        counts.append((on_gpu, on_host, size - on_gpu - on_host))
    return counts


@dataclass(frozen=True, slots=True)
class Group:
    """The sequences `[first, first + size)` of a GPU batch, which share a tier."""

    tier: Tier
    first: int
    prompt_lens: tuple[int, ...]

    @property
    def size(self) -> int:
        return len(self.prompt_lens)

    @property
    def stop(self) -> int:
        return self.first + self.size

    def cached(self, step: int) -> tuple[int, ...]:
        """Cached tokens of each sequence when token step `step` begins."""
        return tuple(p + step - 1 if step else 0 for p in self.prompt_lens)

    def tokens(self, step: int) -> int:
        return sum(self.prompt_lens) if step == 0 else self.size


def make_groups(batch: Batch, counts: tuple[int, int, int]) -> tuple[Group, Group, Group]:
    """The GPU's, the host's and the disk's sequences of one batch."""
    gpu, host, _ = counts
    cuts = (0, gpu, gpu + host, batch.size)
    groups = [Group(t, a, batch.prompt_lens[a:b]) for t, a, b in zip(Tier, cuts, cuts[1:], strict=False)]
    return groups[0], groups[1], groups[2]


@dataclass(frozen=True, slots=True)
class Field:
    """What a chunk holds of one token and head: `width` elements."""

    dtype: str
    width: int

    @property
    def nbytes(self) -> int:
        return self.width * STORED_BYTES[self.dtype]


def cache_fields(spec: ModelSpec, *, is_4bit: bool) -> tuple[Field, ...]:
    """A head's K or V: as computed, or in 4 bits, padded to a power of two, with scale and minimum of every 64."""
    if not is_4bit:
        return (Field(spec.dtype, spec.head_dim),)
    width = max(CACHE_GROUP, 1 << (spec.head_dim - 1).bit_length())
    return Field("int16", width // CODES_PER_WORD), Field("float16", 2 * width // CACHE_GROUP)


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """Sizes of KV chunks, in bytes; `stride` from one sequence's chunk to the next is a whole number of pages."""

    num_kv_heads: int
    fields: tuple[Field, ...]
    block_tokens: int

    @property
    def token_bytes(self) -> int:
        """K and V of one token in one layer."""
        return 2 * self.num_kv_heads * sum(f.nbytes for f in self.fields)

    @property
    def stride(self) -> int:
        return pad(self.token_bytes * self.block_tokens)

    def blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)

    def full(self, tokens: int) -> int:
        return tokens // self.block_tokens

    def dense(self, blocks: int, size: int) -> int:
        """Bytes of `blocks` blocks of `size` sequences."""
        return blocks * size * self.stride


def block_runs(counts: Sequence[int]) -> list[tuple[int, int]]:
    """(block, n): the first n sequences have that block. `counts` are blocks per sequence, longest first."""
    return [(b, sum(c > b for c in counts)) for b in range(max(counts, default=0))]
