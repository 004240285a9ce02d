"""The division of a GPU batch's KV cache and hidden states over the tiers, and their layout in memory.

Sequences of a batch stand longest first: the first ones on the GPU, the next on the host (first those that it attends
to itself), the last on disk. Those that share a home are a group. A group of n sequences keeps its cache as
`[pages, 2, n, half]`: of every page of tokens K of all sequences, then V of all. So any number of leading pages is one
contiguous range, and a page's K of the longest sequences is one too. A half is K or V of `page_tokens` tokens of one
sequence, one field after another, `[KV heads, page_tokens, width]`: a 16-bit cache has one field, the head's numbers; a
4-bit one has two, codes and scales (kernels/formats.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from itertools import accumulate, groupby, pairwise
from operator import itemgetter

from .formats import Field
from .placement import ALIGN, Tier
from .spec import Batch, cached

PAGE_TOKENS = (64, 32, 16, 8)
NO_SHARE = 1e-9  # what is left of 100 % after rounding
MAX_OPEN_SHARE = 8  # a sequence's last page is half empty in the mean: that may be an eighth of what it holds


def pad(nbytes: int, to: int = ALIGN) -> int:
    return -(-nbytes // to) * to


def page_tokens_for(mean_len: float) -> int:
    """Tokens of a page for sequences of that mean length: many, unless too much of what moves would be empty."""
    return next((n for n in PAGE_TOKENS if n / 2 * MAX_OPEN_SHARE <= mean_len), PAGE_TOKENS[-1])


def split_counts(sizes: Sequence[int], percents: Sequence[float]) -> list[tuple[int, ...]]:
    """Return the sequences of each batch by share, and those left.

    At the end of every batch, each share of all sequences so far is exact to one. `percents` add up to at most 100.
    """
    shares = [percent / 100 for percent in percents]
    shares.append(max(1 - sum(shares), 0.0))
    used = [n for n, share in enumerate(shares) if share > NO_SHARE]
    totals = _split_totals(list(accumulate(sizes)), [shares[n] for n in used])
    counts = []
    for before, after in pairwise([(0,) * len(used), *totals]):
        row = [0] * len(shares)
        for n, low, high in zip(used, before, after, strict=True):
            row[n] = high - low
        counts.append(tuple(row))
    return counts


def _split_totals(ends: Sequence[int], shares: Sequence[float]) -> list[tuple[int, ...]]:
    """Divide 1, 2, ... items by `shares`, which are above 0 and add up to 1; return the parts at each of `ends`.

    Rounding each part by itself would not add up, or take items back. So each item goes to the part that needs it
    soonest among those it does not put too far ahead, which keeps every part within one of its share at every item
    (R. Tijdeman, The chairman assignment problem, 1980).
    """
    num = len(shares)
    if num == 1:
        return [(end,) for end in ends]
    slack = 1 / (2 * num - 2)
    parts = [0] * num
    history = [tuple(parts)]
    for item in range(1, ends[-1] + 1):
        due = [share * item - part for share, part in zip(shares, parts, strict=True)]
        ready = [n for n in range(num) if due[n] >= slack - NO_SHARE]
        parts[min(ready, key=lambda n: (1 - slack - due[n]) / shares[n])] += 1
        history.append(tuple(parts))
    return [history[end] for end in ends]


@dataclass(frozen=True, slots=True)
class Group:
    """The sequences `[first, first + size)` of a GPU batch, which share a home: a tier, and who attends to them."""

    tier: Tier
    first: int
    prompt_lens: tuple[int, ...]
    asked: tuple[int, ...]  # new tokens of each
    attended_by_host: bool = False  # in place; all others are attended to by the device

    @property
    def size(self) -> int:
        return len(self.prompt_lens)

    @property
    def stop(self) -> int:
        return self.first + self.size

    @property
    def rows(self) -> slice:
        """The places of its sequences in their GPU batch."""
        return slice(self.first, self.stop)

    @property
    def is_sent(self) -> bool:
        """True if its K and V are sent to the device, where host memory is apart from the device's."""
        return self.tier is not Tier.GPU and not self.attended_by_host

    def cached(self, step: int) -> tuple[int, ...]:
        """Cached tokens of each sequence when token step `step` begins; none of one that has ended."""
        return cached(self.prompt_lens, self.asked, step)

    def held(self, step: int) -> tuple[int, ...]:
        """Tokens of each sequence whose K and V move as a whole in a token step: the prompts, then what is cached."""
        return self.cached(step) if step else self.prompt_lens

    def live(self, counts: Sequence[int], ended: Sequence[bool]) -> list[int]:
        """The counts of its sequences, 0 for those that have ended, as `ended` says of its whole GPU batch."""
        return [0 if gone else n for n, gone in zip(counts, ended[self.rows], strict=True)]

    def tokens(self, step: int) -> int:
        return sum(self.prompt_lens) if step == 0 else self.size


class Groups(tuple[Group, ...]):
    """Groups of one GPU batch in the order of their sequences, none of them empty; chosen by their homes."""

    __slots__ = ()

    @property
    def size(self) -> int:
        """Sequences of all of them."""
        return sum(g.size for g in self)

    @property
    def first(self) -> int:
        """The first sequence's place in their GPU batch."""
        return self[0].first if self else 0

    @property
    def rows(self) -> slice:
        """The places of the sequences, which must be neighbours, in their GPU batch."""
        return slice(self.first, self.first + self.size)

    def cached(self, step: int) -> tuple[int, ...]:
        """Cached tokens of each sequence when token step `step` begins; none of one that has ended."""
        return tuple(n for g in self for n in g.cached(step))

    @property
    def attended_by_host(self) -> Groups:
        return Groups(g for g in self if g.attended_by_host)

    @property
    def sent(self) -> Groups:
        """The host's and the disk's that the device attends to."""
        return Groups(g for g in self if g.is_sent)

    @property
    def sent_by_host(self) -> Groups:
        return Groups(g for g in self if g.is_sent and g.tier is Tier.HOST)

    @property
    def on_disk(self) -> Groups:
        return Groups(g for g in self if g.tier is Tier.DISK)


CACHE_HOMES = ((Tier.GPU, False), (Tier.HOST, True), (Tier.HOST, False), (Tier.DISK, False))  # and: host attends
HIDDEN_HOMES = tuple((tier, False) for tier in Tier)


def make_groups(batch: Batch, counts: Sequence[int], homes: Sequence[tuple[Tier, bool]]) -> Iterator[Group]:
    """Divide a batch's sequences: yield a group for each of the homes, of as many sequences as `counts` say."""
    asked = batch.new_tokens_each
    for (tier, attended_by_host), n, end in zip(homes, counts, accumulate(counts), strict=True):
        yield Group(tier, end - n, batch.prompt_lens[end - n : end], asked[end - n : end], attended_by_host)


def cache_groups(batch: Batch, counts: Sequence[int]) -> Groups:
    """Divide a batch's sequences over the homes of K and V: on the GPU, attended by the host, sent by it, on disk."""
    return Groups(g for g in make_groups(batch, counts, CACHE_HOMES) if g.size)


def hidden_groups(batch: Batch, counts: Sequence[int]) -> tuple[Group, ...]:
    """Divide a batch's sequences by the tier of their hidden state."""
    return tuple(make_groups(batch, counts, HIDDEN_HOMES))


class Count(Enum):
    """The numbers that the device may be handed of a sequence in a token step, each at most once."""

    PLACE = auto()  # where its new token goes: in a home, in an open page or in a slot of new tokens
    PAGES = auto()  # valid tokens in its pages: at home, or in what is sent of them
    OPEN = auto()  # valid tokens in its open page, where that is sent
    NEWEST = auto()  # valid tokens where its new token is, apart from its pages
    KEPT = auto()  # earlier tokens whose V sparse attention reads


COUNT_BYTES = 4  # int32


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """Sizes in bytes of K and V, and where they lie; a half is a multiple of ALIGN."""

    num_kv_heads: int
    fields: tuple[Field, ...]
    page_tokens: int

    @property
    def token_bytes(self) -> int:
        """K and V of one token in one layer."""
        return 2 * self.num_kv_heads * sum(f.nbytes for f in self.fields)

    @property
    def half(self) -> int:
        """K, or V, of one page of one sequence."""
        return pad(self.token_bytes // 2 * self.page_tokens)

    def pages(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)

    def full(self, tokens: int) -> int:
        return tokens // self.page_tokens

    def filled(self, cached: Sequence[int]) -> list[int]:
        """The sequences, of so many cached tokens, whose next token fills a page; one that has ended holds none."""
        return [s for s, n in enumerate(cached) if (n + 1) % self.page_tokens == 0]

    def dense(self, pages: int, size: int, halves: int = 2) -> int:
        """Bytes of `pages` pages of `size` sequences: of K and V, or with one of the halves alone."""
        return pages * halves * size * self.half

    def ranges(self, counts: Sequence[int]) -> Iterator[tuple[int, int]]:
        """(start, end) in `[pages, 2, n, half]` of what sequences have; `counts` are their pages."""
        row = len(counts) * self.half
        start = end = 0
        for page, runs in groupby(page_runs(counts), key=itemgetter(0)):
            found = [(first, n) for _, first, n in runs]
            for half in (2 * page * row, (2 * page + 1) * row):
                for first, n in found:
                    low = half + first * self.half
                    if low != end:
                        if end > start:
                            yield start, end
                        start = low
                    end = low + n * self.half
        if end > start:
            yield start, end


@dataclass(frozen=True, slots=True)
class SlotPages:
    """Pages of one group in a slot of a ring: room for as many of each sequence as any has, `counts` of them valid."""

    group: Group
    counts: tuple[int, ...]  # pages of each sequence
    halves: int  # K and V, or one alone
    are_open: bool
    at: slice  # bytes of the slot

    @property
    def room(self) -> int:
        return int(self.at.stop - self.at.start)

    @property
    def pass_disk(self) -> bool:
        """True if the disk reads or writes them, and not the host: they stand first in a slot."""
        return self.group.tier is Tier.DISK and not self.are_open


def page_runs(counts: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(page, first, n): the n neighbours from sequence `first` on have that page. `counts` are pages of each."""
    for page in range(max(counts, default=0)):
        for has, run in groupby(range(len(counts)), key=lambda s, b=page: counts[s] > b):  # type: ignore[misc]
            if has:
                neighbours = list(run)
                yield page, neighbours[0], len(neighbours)
