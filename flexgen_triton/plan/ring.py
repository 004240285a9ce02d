"""Rings: buffers of variable-size slots, first in first out, planned before they are made."""

from __future__ import annotations

from collections import deque

from .schedule import Slot

SLOT_ALIGN = 4096


class Ring:
    """Plans a first-in first-out buffer of variable-size slots: where each lies and which old ones it overwrites.

    An old slot is reported once, to the first new one that touches it: a ring is written by one lane, in order.
    """

    def __init__(self, name: str, capacity: int) -> None:
        self.name, self.capacity = name, capacity
        self._live: deque[Slot] = deque()  # oldest first, up to the newest; some may be released already
        self._released: set[Slot] = set()
        self._stale: deque[Slot] = deque()  # released, memory not taken over yet; oldest first
        self._head = 0
        self._count = 0

    def _place(self, nbytes: int) -> int | None:
        """Return the next slot's place: the head, or the start when the end is too near; None while it is in use."""
        at = self._head if self._head + nbytes <= self.capacity else 0
        if at + nbytes > self.capacity or any(_overlap(s, at, nbytes) for s in self._live):
            return None
        return at

    def fits(self, nbytes: int) -> bool:
        return self._place(_round_up(nbytes)) is not None

    def take(self, nbytes: int) -> tuple[Slot, tuple[Slot, ...]]:
        """A new slot and the released ones whose memory it takes over."""
        nbytes = _round_up(nbytes)
        at = self._place(nbytes)
        assert at is not None, f"ring {self.name}: no room for {nbytes} of {self.capacity} bytes"
        slot = Slot(self.name, self._count, at, nbytes)
        self._count += 1
        if not nbytes:
            return slot, ()
        old = []
        wrapped = at < self._head
        while self._stale and (_overlap(self._stale[0], at, nbytes) or (wrapped and self._stale[0].at >= self._head)):
            old.append(self._stale.popleft())
        self._live.append(slot)
        self._head = at + nbytes
        return slot, tuple(old)

    def release(self, slot: Slot) -> None:
        if not slot.nbytes:
            return
        self._released.add(slot)
        while self._live and self._live[0] in self._released:
            self._released.remove(self._live[0])
            self._stale.append(self._live.popleft())


def _overlap(slot: Slot, at: int, nbytes: int) -> bool:
    return slot.at < at + nbytes and at < slot.at + slot.nbytes


def _round_up(nbytes: int) -> int:
    return -(-nbytes // SLOT_ALIGN) * SLOT_ALIGN
