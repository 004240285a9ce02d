"""How the KV cache and the hidden states of a GPU batch are divided over the tiers and laid out in memory.

Sequences of a batch stand longest first: the first ones on the GPU, the next on the host, the last on disk. K and V of
`block_tokens` tokens of one sequence are one chunk `[2, KV heads, block_tokens, head_dim]`; a group of n sequences
keeps its chunks block-major, `[blocks, n, chunk]`, so any number of leading blocks is one contiguous range.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .placement import PAGE, Tier
from .spec import Batch, ModelSpec

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
class CacheLayout:
    """Sizes of KV chunks, in bytes; `stride` from one sequence's chunk to the next is a whole number of pages."""

    num_kv_heads: int
    head_dim: int
    itemsize: int
    block_tokens: int

    @classmethod
    def of(cls, spec: ModelSpec, block_tokens: int) -> CacheLayout:
        return cls(spec.num_kv_heads, spec.head_dim, spec.itemsize, block_tokens)

    @property
    def token_bytes(self) -> int:
        return 2 * self.num_kv_heads * self.head_dim * self.itemsize

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
