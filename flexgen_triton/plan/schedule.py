"""The schedule of a round as data: what moves, what computes, on which lane.

Indices as in the FlexGen paper (section 4.2): i token step, j layer, here its stages, k GPU batch. A plan says what
each visit moves and computes (`Program`); the generator makes ops of it; nobody writes a dependency by hand (link.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from .formats import WeightFormat


class Lane(Enum):
    """An in-order queue of work: a worker thread, with a CUDA stream where there is one."""

    DISK_IN = "disk_in"
    DISK_OUT = "disk_out"
    H2D = "h2d"
    D2H = "d2h"
    HOST_ATTENTION = "host_attention"
    COMPUTE = "compute"

    __hash__ = object.__hash__  # members are singletons; an Enum's own hash is the slowest part of linking a schedule


class Slot(NamedTuple):
    """Named memory that ops hand to each other: `nbytes` at byte `at` of a ring, or a home (at 0, of no given size)."""

    ring: str
    number: int
    at: int = 0
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class Work:
    """The amount of one computation, in units that a machine has rates for."""

    rows: int  # of every matrix product
    products: tuple[tuple[WeightFormat, float], ...]  # format of the matrices, FLOPs
    weight_bytes: int  # of those matrices, as stored
    hidden_bytes: int  # of activations that norms, biases, residuals and the like pass over
    first_of_load: bool  # the first GPU batch that uses this load of the weights
    prompt_flops: float = 0.0  # causal attention over prompts ...
    prompt_len: int = 0  # ... of this mean length
    cache_bytes: int = 0  # K and V that decode attention reads ...
    cache_flops: float = 0.0
    cache_format: str = ""  # ... in this format
    gathered_bytes: int = 0  # V that it fetches from the host's home
    streamed_bytes: int = 0  # read from disk for it, meanwhile or before
    lookups: int = 0  # rows of tables read from disk one by one

    @property
    def flops(self) -> float:
        return sum(flops for _, flops in self.products) + self.prompt_flops + self.cache_flops


class Cost(Enum):
    """The measure of an op's time: its bytes at a transfer's rate, or its work at the arithmetic's."""

    BYTES = "bytes"
    WORK = "work"


class Kind(NamedTuple):
    """A kind of op: its name, the lane that runs it and what it costs there."""

    name: str
    lane: Lane
    cost: Cost = Cost.BYTES


# every op there is: run/actions.py has an action for each
OPS = (
    READ_WEIGHT := Kind("read_weight", Lane.DISK_IN),
    LOAD_WEIGHT := Kind("load_weight", Lane.H2D),
    READ_CACHE := Kind("read_cache", Lane.DISK_IN),
    LOAD_CACHE := Kind("load_cache", Lane.H2D),
    STORE_CACHE := Kind("store_cache", Lane.D2H),
    WRITE_CACHE := Kind("write_cache", Lane.DISK_OUT),
    READ_HIDDEN := Kind("read_hidden", Lane.DISK_IN),
    LOAD_HIDDEN := Kind("load_hidden", Lane.H2D),
    STORE_HIDDEN := Kind("store_hidden", Lane.D2H),
    WRITE_HIDDEN := Kind("write_hidden", Lane.DISK_OUT),
    STORE_QUERY := Kind("store_query", Lane.D2H),
    ATTEND_HOST := Kind("attend_host", Lane.HOST_ATTENTION, Cost.WORK),
    LOAD_ATTENDED := Kind("load_attended", Lane.H2D),
    COMPUTE := Kind("compute", Lane.COMPUTE, Cost.WORK),
)


@dataclass(frozen=True, slots=True)
class Op:
    """One transfer or one computation. `overwrites` are slots whose memory it takes over."""

    kind: Kind
    i: int
    j: int  # the first stage that it computes; of a transfer, the stage that it is for
    k: int
    part: int = 0
    reads: tuple[Slot, ...] = ()
    writes: tuple[Slot, ...] = ()
    overwrites: tuple[Slot, ...] = ()
    bytes: int = 0
    work: Work | None = None  # of a computation
    stages: int = 1  # that it computes, one after another
    pageable: bool = False  # a transfer from memory that is not pinned
    loads_hidden: bool = True  # the hidden state comes from where it was kept, else from the computation before
    stores_hidden: bool = True  # its result is kept for a later row, else only handed to the next computation

    @property
    def name(self) -> str:
        return self.kind.name

    @property
    def lane(self) -> Lane:
        return self.kind.lane

    @property
    def last(self) -> int:
        """The last stage that it computes."""
        return self.j + self.stages - 1

    @property
    def flops(self) -> float:
        return self.work.flops if self.work else 0.0

    def slot(self, ring: str) -> Slot | None:
        """The slot of `ring` that this op touches, if any."""
        return next((s for s in (*self.reads, *self.writes) if s.ring == ring), None)

    def __str__(self) -> str:
        stages = f"{self.j}" if self.stages == 1 else f"{self.j}..{self.last}"
        return f"{self.name}(i={self.i}, j={stages}, k={self.k}, part={self.part})"


@dataclass(frozen=True, slots=True)
class WeightTraffic:
    """Bytes that one use of a bundle's weights moves, in parts of nearly equal size."""

    disk_parts: tuple[int, ...]
    host_parts: tuple[int, ...]  # all zero where host bytes are used in place
    slot: int  # bytes of ring that the streamed share occupies


@dataclass(frozen=True, slots=True)
class CacheTraffic:
    """Bytes that attention of one visit moves: the cache before it, the new K and V after it."""

    disk_read: int = 0  # bytes moved by disk_in ...
    read_slot: int = 0  # ... and the room they take: sequences of unequal length leave gaps
    host_load: int = 0
    slot: int = 0
    gathered: int = 0  # V that attention itself reads from the host's home
    out: int = 0
    host_store: int = 0
    disk_write: int = 0
    write_slot: int = 0  # room on the way to disk: prefill writes through the out ring, decode the open page's home


class Handoff(NamedTuple):
    """Bytes that a stage hands to the next one where they are computed apart: of all sequences on the device, and of
    those that the host attends to."""

    device: int
    host: int


@dataclass(frozen=True, slots=True)
class HiddenTraffic:
    """Bytes of a GPU batch's hidden state that are kept off the device between layers."""

    host: int = 0
    disk: int = 0


class Program(NamedTuple):
    """All that the generator asks about a plan."""

    weights: tuple[WeightTraffic, ...]  # by bundle
    bundles: tuple[int, ...]  # by stage: whose weights it needs
    attends: tuple[bool, ...]  # by stage: it is attention
    batch_steps: tuple[int, ...]  # token steps of each GPU batch
    cache: Callable[[int, int], CacheTraffic]  # (i, k)
    hidden: Callable[[int, int, int], HiddenTraffic]  # (i, j, k): the state that stage j hands to stage j + 1
    work: Callable[..., Work]  # (i, j, k, stages, kind)
    handoff: Callable[[int, int], Handoff]  # (j, k): of projection and of attention
    host_attends: bool  # in decode, to some sequences: attention is computed apart from its neighbours
    device_attends: Callable[[int], bool]  # (k): to some sequences too
    rings: dict[str, int]  # capacity in bytes
    host_is_apart: bool  # host memory is apart from the device's: h2d and d2h lanes exist
    keeps_open: bool  # there, the device keeps the pages of the cache that are being filled
    serial: bool  # no overlap: every op after the one before it
    pinned: bool  # the host's share of the weights lies in pinned memory
