"""Places of K and V: where attention writes those of new tokens, and the segments that it reads.

What writes K and V is handed targets, attention segments; neither asks which tier those are on. Knows where homes and
slots hold a group's pages, and nothing of the transfers between them (cache.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ..plan.layout import Count, Group, Groups, SlotPages
from ..plan.placement import Tier
from ..plan.plan import Plan
from ..plan.schedule import Op
from .cache_homes import CacheHomes, Fields, key_fields, one_half, page_fields, token_fields
from .scratch import Uploads


class Segment(NamedTuple):
    """Cached tokens of n sequences, each field [pages, n, Hkv, tokens, width]; `lens` int32 [n] counts the valid ones.

    V may lie in host memory where K does not.
    """

    k: Fields
    v: Fields
    lens: Tensor


class PromptTarget(NamedTuple):
    """Fields for prompts' K and V: the first positions of sequence s get `counts[s]` packed rows from `rows[s]` on."""

    fields: Fields
    rows: Sequence[int]
    counts: Sequence[int]


class TokenTarget(NamedTuple):
    """Fields for one new token of each sequence: rows `[first, first + n)` go to a position of each sequence.

    `at` int32 [n] holds the positions on the device.
    """

    fields: Fields
    first: int
    positions: Sequence[int]
    at: Tensor


class Attended(NamedTuple):
    """A group that the host attends to: where one token of each sequence goes, and what attention reads."""

    rows: slice  # of all that the host is handed of a GPU batch
    target: TokenTarget
    segments: list[Segment]
    keep: Tensor  # int32 [n]: earlier tokens of each whose V sparse attention reads


class Numbers(NamedTuple):
    """One number of each of n sequences."""

    values: Sequence[int]
    on_device: Tensor  # int32 [n]
    largest: int


class StepCounts:
    """Numbers that the device is handed in a token step, each of them once for all layers."""

    def __init__(self, uploads: Uploads) -> None:
        self._uploads = uploads
        self._found: dict[tuple[int, int, int, Count], Numbers] = {}

    def begin(self) -> None:
        """Forget what was handed over in the last token step."""
        self._found.clear()

    def take(self, op: Op, first: int, count: Count, values: Callable[[], Sequence[int]]) -> Numbers:
        """Return the numbers of the sequences from `first` on of a GPU batch, made where this is the first to ask."""
        key = op.i, op.k, first, count
        if key not in self._found:
            made = values()
            self._found[key] = Numbers(made, self._uploads.numbers(made, torch.int32), max(made))
        return self._found[key]


class HostCounts:
    """Numbers for attention on the host, of one group's sequences: written anew in each token step."""

    def __init__(self, size: int) -> None:
        self._step = -1
        self._rows = torch.empty(3, size, dtype=torch.int32)

    def take(self, step: int, values: Callable[[], tuple[Sequence[int], ...]]) -> tuple[Tensor, Tensor, Tensor]:
        """Return where new tokens go, valid tokens with those, and what sparse attention keeps; each int32 [n]."""
        if self._step != step:
            self._rows.numpy()[:] = values()
            self._step = step
        at, valid, keep = self._rows
        return at, valid, keep


class CachePlaces:
    """Targets and segments of one round's K and V, in homes and in the slots that an op is handed.

    `ended(k)` says which sequences of GPU batch k have ended: attention reads none of their earlier tokens.
    """

    def __init__(self, plan: Plan, homes: CacheHomes, uploads: Uploads, ended: Callable[[int], Sequence[bool]]) -> None:
        self._plan, self._homes, self._ended = plan, homes, ended
        self._layout = plan.cache_layout
        self._counts = StepCounts(uploads)
        self._host_counts = {
            (k, group.first): HostCounts(group.size)
            for k, groups in enumerate(plan.groups)
            for group in groups.cache.attended_by_host
        }

    def start_step(self) -> None:
        """Forget what was kept for the last token step."""
        self._counts.begin()

    def cached(self, op: Op, group: Group) -> list[int]:
        """Tokens that attention reads of each sequence, besides its newest one."""
        return group.live(group.cached(op.i), self._ended(op.k))

    def kept(self, op: Op, group: Group) -> tuple[Tensor, int]:
        """Earlier tokens whose V sparse attention reads, int32 [n] on the device; and the most of a sequence."""
        numbers = self._counts.take(op, group.first, Count.KEPT, lambda: self._kept(self.cached(op, group)))
        return numbers.on_device, numbers.largest

    def _kept(self, cached: Sequence[int]) -> list[int]:
        return [self._plan.kept(n) for n in cached]

    def _by_device(self, op: Op) -> Iterator[Group]:
        """Groups that the device attends to."""
        return (g for g in self._plan.groups[op.k].cache if not g.attended_by_host)

    def _is_copied(self, group: Group) -> bool:
        """Say if the device attends to copies of a group's K and V, its new tokens apart from them."""
        return self._plan.host_is_apart and group.is_sent

    def _copied(self, op: Op) -> Groups:
        return Groups(g for g in self._plan.groups[op.k].cache if self._is_copied(g))

    def _has_pages_at_home(self, group: Group) -> bool:
        """Say if the device reaches all of a group's pages at home."""
        return group.tier is Tier.GPU or (group.tier is Tier.HOST and not self._plan.host_is_apart)

    # Fields of homes and slots

    def _at_home(self, op: Op, group: Group) -> Fields:
        return page_fields(self._layout, self._homes[op, group].memory, group.size)

    def _in_slot(self, op: Op, group: Group, slot: Tensor | None) -> Iterator[tuple[SlotPages, Tensor]]:
        """Yield a group's pages in a slot, with the bytes of them; without a slot none."""
        if slot is not None:
            for pages in self._plan.slot_pages(op.i, op.k):
                if pages.group is group:
                    yield pages, slot[pages.at]

    def _open_on_device(self, op: Op) -> Fields:
        return page_fields(self._layout, self._homes.device_open(op), self._copied(op).size)

    def _rows_of(self, op: Op, group: Group, fields: Fields) -> Fields:
        """One group's share of what holds all sequences whose K and V are copied."""
        first = group.first - self._copied(op).first
        return tuple(field[:, first : first + group.size] for field in fields)

    # Where new K and V go

    def prompt_targets(self, op: Op, out: Tensor | None) -> list[PromptTarget]:
        """Return where a prompt's packed rows of K and V go: homes within reach and, for the rest, the slot `out`."""
        batch = self._plan.workload.batches[op.k]
        if batch.new_tokens == 1:
            return []
        first = [0, *accumulate(batch.prompt_lens)]  # packed row of each sequence
        return [
            target
            for group in self._plan.groups[op.k].cache
            for target in self._group_targets(group, first[group.rows], self._prompt_pages(op, group, out))
        ]

    def _group_targets(
        self, group: Group, rows: Sequence[int], places: Iterator[tuple[Fields, Sequence[int]]]
    ) -> Iterator[PromptTarget]:
        """Fill places with a group's prompts, one behind the other; each has room for so many pages of a sequence."""
        done = [0] * group.size
        for fields, pages in places:
            room = [n * self._layout.page_tokens for n in pages]
            counts = [min(n - m, most) for n, m, most in zip(group.prompt_lens, done, room, strict=True)]
            if any(counts):
                yield PromptTarget(fields, [row + m for row, m in zip(rows, done, strict=True)], counts)
            done = [m + n for m, n in zip(done, counts, strict=True)]
        assert tuple(done) == group.prompt_lens, (group, done)

    def _prompt_pages(self, op: Op, group: Group, out: Tensor | None) -> Iterator[tuple[Fields, Sequence[int]]]:
        """Yield where a group's prompts go, with the pages of each sequence there: pages in `out`, then open ones."""
        if self._has_pages_at_home(group):
            yield self._at_home(op, group), [self._layout.pages(n) for n in group.prompt_lens]
            return
        for pages, own in self._in_slot(op, group, out):
            yield page_fields(self._layout, own, group.size), pages.counts
        if not self._plan.host_is_apart:
            yield self._at_home(op, group), [1] * group.size
        elif self._plan.keeps_open and self._is_copied(group):
            yield self._rows_of(op, group, self._open_on_device(op)), [1] * group.size

    def token_targets(self, op: Op, out: Tensor | None) -> list[TokenTarget]:
        """Return where one new token of every sequence goes; `out` is the slot on the way to the host."""
        targets = [self._home_target(op, group) for group in self._by_device(op) if not self._is_copied(group)]
        return [*targets, self._newest_target(op, out)] if self._copied(op) else targets

    def _home_target(self, op: Op, group: Group) -> TokenTarget:
        places = self._counts.take(op, group.first, Count.PLACE, lambda: self._new(op, group))
        return TokenTarget(self._at_home(op, group), group.first, places.values, places.on_device)

    def _newest_target(self, op: Op, out: Tensor | None) -> TokenTarget:
        copied = self._copied(op)
        places = self._counts.take(op, copied.first, Count.PLACE, lambda: [n for g in copied for n in self._new(op, g)])
        return TokenTarget(self._newest(op, out), copied.first, places.values, places.on_device)

    def _newest(self, op: Op, out: Tensor | None) -> Fields:
        """Return the fields for the newest tokens of all sequences whose K and V are copied.

        Those tokens alone, on their way home in the slot `out`, or their open pages.
        """
        if self._plan.keeps_open:
            return self._open_on_device(op)
        assert out is not None, op
        return token_fields(self._layout, out, self._copied(op).size)

    def _new(self, op: Op, group: Group) -> list[int]:
        """Positions of a group's new tokens where the device writes them."""
        if not self._is_copied(group):
            return self._homes.places(group, op.i)
        return [n % self._layout.page_tokens if self._plan.keeps_open else 0 for n in group.cached(op.i)]

    # What attention reads

    def attended(self, op: Op) -> list[Attended]:
        """Return where new tokens go and what attention reads, for each group that the host attends to."""
        groups = self._plan.groups[op.k].cache.attended_by_host
        return [self._attended(op, group, group.first - groups.first) for group in groups]

    def _attended(self, op: Op, group: Group, first: int) -> Attended:
        def numbers() -> tuple[Sequence[int], ...]:
            cached = self.cached(op, group)
            return positions, [n + 1 for n in cached], self._kept(cached)

        positions = group.cached(op.i)
        at, valid, keep = self._host_counts[op.k, group.first].take(op.i, numbers)
        fields, used = self._at_home(op, group), self._layout.pages(max(positions) + 1)
        target = TokenTarget(fields, first, positions, at)
        return Attended(slice(first, first + group.size), target, [segment(fields, valid, used)], keep)

    def segments(self, op: Op, slot: Tensor | None, out: Tensor | None) -> list[tuple[Group, list[Segment]]]:
        """Return what attention reads once the new tokens are written, by group, the newest token last.

        `slot` is this visit's slot of the cache ring, `out` its slot on the way to the host. Without a slot there is
        nothing before the newest tokens, or all sequences have ended and attend to what there is.
        """
        return [(group, list(self._segments(op, group, slot, out))) for group in self._by_device(op)]

    def _segments(self, op: Op, group: Group, slot: Tensor | None, out: Tensor | None) -> Iterator[Segment]:
        if self._has_pages_at_home(group):
            numbers = self._counts.take(op, group.first, Count.PAGES, lambda: [n + 1 for n in self.cached(op, group)])
            yield segment(self._at_home(op, group), numbers.on_device, self._layout.pages(numbers.largest))
            return
        for pages, own in self._in_slot(op, group, slot):
            yield self._sent_segment(op, pages, own)
        yield self._newest_segment(op, group, out)

    def _sent_segment(self, op: Op, pages: SlotPages, own: Tensor) -> Segment:
        """Return what a slot holds of a group; V from its home where only K was sent."""
        group = pages.group
        if pages.are_open:
            lens = self._counts.take(op, group.first, Count.OPEN, lambda: self._homes.places(group, op.i)).on_device
        else:
            lens = self._counts.take(op, group.first, Count.PAGES, lambda: self._valid(op, pages)).on_device
        if pages.halves == 2:
            return segment(page_fields(self._layout, own, group.size), lens)
        home = [field[: max(pages.counts)] for field in self._at_home(op, group)]
        return Segment(key_fields(self._layout, own, group.size), one_half(home, 1), lens)

    def _valid(self, op: Op, pages: SlotPages) -> list[int]:
        """Tokens of each sequence in pages that are not open ones."""
        room = [n * self._layout.page_tokens for n in pages.counts]
        return [min(n, most) for n, most in zip(self.cached(op, pages.group), room, strict=True)]

    def _newest_segment(self, op: Op, group: Group, out: Tensor | None) -> Segment:
        """Return what a group's new tokens were written to, apart from its other pages."""
        copied = self._is_copied(group)
        fields = self._rows_of(op, group, self._newest(op, out)) if copied else self._at_home(op, group)
        lens = self._counts.take(op, group.first, Count.NEWEST, lambda: [n + 1 for n in self._new(op, group)])
        return segment(fields, lens.on_device)


def segment(fields: Sequence[Tensor], lens: Tensor, pages: int | None = None) -> Segment:
    """The first pages of fields of K and V."""
    fields = [field[:pages] for field in fields]
    return Segment(one_half(fields, 0), one_half(fields, 1), lens)
