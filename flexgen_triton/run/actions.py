"""One round at work: the actions that its ops name, on its sequences.

Owns what passes from op to op, and the stages before the head; the head's output projection and the tokens drawn from
it are run/head.py's. Knows no order: the plan's program has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from ..memory.activations import Activations
from ..memory.buffers import Buffers
from ..memory.cache import Cache
from ..memory.cache_homes import CacheHomes
from ..memory.cache_places import CachePlaces, Segment
from ..memory.disk import DiskQueue
from ..memory.scratch import Scratch
from ..memory.weights import Segments, Weights
from ..models import ops
from ..models.family import Model
from ..models.inputs import Positions
from ..models.ops import Weight, read_weight
from ..plan.layout import Group
from ..plan.plan import Plan
from ..plan.schedule import OPS, Kind, Op, Slot
from ..plan.spec import ATTEND, EMBED, HEAD, PROJECT, STAGES
from ..sequences.sequence import TokenSequence
from .head import Head


@dataclass(slots=True)
class _Work:
    """An op's computation on its way from stage to stage."""

    op: Op
    hidden: Tensor
    projected: Tensor | None = None
    attended: Tensor | None = None


class Round:
    """State of the GPU batches of one plan while it runs; `actions` maps an op's name to what it does.

    `on_step(i, k)` is called when GPU batch k has its tokens of token step i, on the lane that computes.
    """

    def __init__(
        self,
        plan: Plan,
        batches: Sequence[Sequence[TokenSequence]],
        model: Model,
        weights: Weights,
        buffers: Buffers,
        disk: DiskQueue,
        *,
        dtype: torch.dtype,
        on_step: Callable[[int, int], None],
        keep_logits: Callable[[int, Tensor], None] | None = None,
    ) -> None:
        self._plan, self._batches, self._model, self._weights, self._buffers = plan, batches, model, weights, buffers
        homes = CacheHomes(plan, buffers)
        self._cache = Cache(plan, homes, buffers, disk, self._ended)
        self._cache_places = CachePlaces(plan, homes, buffers.uploads, self._ended)
        self._activations = Activations(plan, buffers, disk, dtype)
        self._device, self._dtype, self._work = buffers.device, dtype, buffers.work
        self._head = Head(
            plan, batches, model, self._work, device=self._device, on_step=on_step, keep_logits=keep_logits
        )
        self._views: dict[int, Mapping[str, Weight]] = {}  # by layer, counted on from token step to token step
        self._dense = [Scratch(room) for room in buffers.dense.chunk(plan.bundles_in_use)]
        self._places: dict[int, Positions] = {}
        self._step = -1
        self._nothing = self._passed = torch.empty(0)

    @property
    def actions(self) -> dict[str, Action]:
        """The action of each kind of op, by its name; a transfer of fewer bytes than planned returns how many."""
        return {kind.name: partial(action, self) for kind, action in ACTIONS.items()}

    def _ended(self, k: int) -> list[bool]:
        """Tell which sequences of GPU batch k are finished."""
        return [s.finished for s in self._batches[k]]

    def alive(self, i: int, k: int) -> bool:
        """Return True if GPU batch k still has an unfinished sequence."""
        return not all(s.finished for s in self._batches[k])

    # Slots

    def _slot(self, op: Op, ring: str) -> Tensor | None:
        slot = op.slot(ring)
        return self._buffers.slot(slot) if slot is not None else None

    def _bytes(self, op: Op, ring: str) -> Tensor:
        slot = self._slot(op, ring)
        assert slot is not None, f"{op} has no slot in {ring}"
        return slot

    def _into(self, op: Op) -> Tensor:
        """The memory that a read fills: the one slot it writes."""
        written: Slot = op.writes[0]
        return self._buffers.slot(written)

    def _staged_out(self, op: Op, direct: str) -> Tensor | None:
        staged = self._slot(op, "stage_out")
        return staged if staged is not None else self._slot(op, direct)

    # Transfers

    def read_weight(self, op: Op) -> None:
        part = self._plan.parts(self._bundle(op))[op.part]
        self._weights.read(part, self._into(op), staged=self._plan.host_is_apart)

    def load_weight(self, op: Op) -> None:
        bundle = self._bundle(op)
        part = self._plan.parts(bundle)[op.part]
        self._weights.load(bundle, part, self._slot(op, "stage_in"), self._bytes(op, "weight"))

    def read_cache(self, op: Op) -> int | None:
        return self._cache.read(op, self._into(op))

    def load_cache(self, op: Op) -> int | None:
        return self._cache.load(op, self._slot(op, "stage_in"), self._bytes(op, "cache"))

    def store_cache(self, op: Op) -> None:
        self._cache.store(op, self._slot(op, "cache_out"), self._slot(op, "stage_out"))

    def write_cache(self, op: Op) -> None:
        self._cache.write(op, self._staged_out(op, "cache_out"))

    def read_hidden(self, op: Op) -> None:
        self._activations.read(op, self._into(op))

    def load_hidden(self, op: Op) -> None:
        self._activations.load(op, self._slot(op, "stage_in"), self._bytes(op, "hidden"))

    def store_hidden(self, op: Op) -> None:
        self._activations.store(op, self._bytes(op, "hidden_out"), self._slot(op, "stage_out"))

    def write_hidden(self, op: Op) -> None:
        staged = self._staged_out(op, "hidden_out")
        assert staged is not None
        self._activations.write(op, staged)

    def _bundle(self, op: Op) -> int:
        return self._plan.stages[op.j].bundle

    # Arithmetic

    @torch.inference_mode()
    def compute(self, op: Op) -> None:
        """Stages one after another; the first takes what was kept for it, the last keeps what it made."""
        self._start(op)
        work = _Work(op, self._enter(op))
        for j in range(op.j, op.last + 1):
            COMPUTATIONS[self._plan.stages[j].spec.kind](self, work, j)
        self._leave(op, work.hidden)

    def embed(self, work: _Work, j: int) -> None:
        op, w = work.op, self._tensors(work.op)
        rows = partial(self._weights.rows, scratch=self._work, uploads=self._buffers.uploads)
        ids = np.array(self._head.next_tokens(op.k))
        work.hidden = self._model.embed(w, rows, ids, self._positions(op), self._work)

    def project(self, work: _Work, j: int) -> None:
        """Q, K and V of all new tokens; where attention is apart, those of the device's sequences to their cache."""
        op = work.op
        work.projected = self._model.project(self._tensors(op), work.hidden, self._positions(op), self._work)
        if j == op.last:
            handed = self._rows(op, "projected").copy_(work.projected)
            _, k, v = self._qkv(handed)
            self._write_tokens(op, k, v)

    def attend(self, work: _Work, j: int) -> None:
        """Attention of the sequences that the device attends to."""
        op = work.op
        if work.projected is not None:
            work.attended = self._attend(op, *self._qkv(work.projected))
        else:
            self._attend_groups(op, self._qkv(self._rows(op, "projected"))[0], self._rows(op, "result"))

    def finish(self, work: _Work, j: int) -> None:
        attended = self._rows(work.op, "result") if work.attended is None else work.attended
        work.hidden = self._model.output(self._tensors(work.op), work.hidden, attended, self._work)

    def mlp(self, work: _Work, j: int) -> None:
        work.hidden = self._model.mlp(self._tensors(work.op), work.hidden, self._work)

    def head(self, work: _Work, j: int) -> None:
        self._head.compute(work.op, self._tensors(work.op), work.hidden, part=self._plan.stages[j].module.index)

    def _start(self, op: Op) -> None:
        """Take temporaries back, but for what the computation before hands on; at a token step all that it was sent."""
        if op.loads_hidden:
            self._work.begin(planned=op.i > 0)
        if op.i != self._step:
            self._step = op.i
            self._buffers.uploads.begin(planned=op.i > 0)
            self._cache_places.start_step()
            self._places.clear()

    def _tensors(self, op: Op) -> Mapping[str, Weight]:
        """A bundle's weights, made once for all GPU batches that use this load of them."""
        bundle, in_use = self._bundle(op), self._plan.bundles_in_use
        n = op.i * len(self._plan.bundles) + bundle
        if n not in self._views:
            for old in [m for m in self._views if m <= n - in_use]:
                del self._views[old]
            room = self._dense[n % in_use]
            room.begin()  # what the bundle before there may have dequantised
            self._views[n] = dict(self._named(bundle, self._weights.view(bundle, self._slot(op, "weight")), room))
        return self._views[n]

    def _named(self, bundle: int, found: Segments, room: Scratch) -> Iterator[tuple[str, Weight]]:
        for name, parts in groupby(self._plan.bundles[bundle].tensors, key=lambda t: t.weight):
            tensors = list(parts)
            if all(t.name in found for t in tensors):  # not an embedding's table
                yield name, read_weight(tensors, found, room)

    def _enter(self, op: Op) -> Tensor:
        """The hidden state that enters; the parts of the head after the first share one input."""
        stage = self._plan.stages[op.j]
        if stage.spec.kind == EMBED or (stage.spec.kind == HEAD and stage.module.index > 0):
            return self._nothing
        return self._activations.get(op, self._slot(op, "hidden"), self._work) if op.loads_hidden else self._passed

    def _leave(self, op: Op, x: Tensor) -> None:
        """Keep a result, or hand it to the next computation, or both."""
        kind = self._plan.stages[op.last].spec.kind
        if kind in (PROJECT, ATTEND):  # handed on by rings
            return
        self._passed = x
        if op.stores_hidden and kind != HEAD:
            self._activations.put(op, x, self._slot(op, "hidden_out"))

    def _positions(self, op: Op) -> Positions:
        """Positions of the tokens that a token step computes, the same in all layers."""
        if op.k not in self._places:
            batch = self._plan.workload.batches[op.k]
            prompts = (np.arange(n) for n in batch.prompt_lens)
            ids = np.concatenate(list(prompts)) if op.i == 0 else np.array(batch.cached(op.i))
            self._places[op.k] = Positions(ids, partial(self._buffers.uploads.numbers, dtype=torch.int32))
        return self._places[op.k]

    def _qkv(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q [T, H, D], K and V [T, Hkv, D] of what a model projects, [T, H + 2 Hkv, D]."""
        model = self._plan.model
        keys = model.num_heads + model.num_kv_heads
        return projected[:, : model.num_heads], projected[:, model.num_heads : keys], projected[:, keys:]

    def _attend(self, op: Op, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = self._slot(op, "cache_out")
        if op.i == 0:
            for target in self._cache_places.prompt_targets(op, out):
                ops.write_prompt(k, v, target)
            return ops.prefill_attention(q, k, v, self._plan.workload.batches[op.k].prompt_lens)
        self._write_tokens(op, k, v)
        result = self._work.take(*q.shape, dtype=q.dtype)
        self._attend_groups(op, q, result)
        return result

    def _write_tokens(self, op: Op, k: Tensor, v: Tensor) -> None:
        for place in self._cache_places.token_targets(op, self._slot(op, "cache_out")):
            ops.write_tokens(k, v, place)

    def _attend_groups(self, op: Op, q: Tensor, out: Tensor) -> None:
        """Decode attention of the sequences that the device attends to: their rows of q [B, H, D] to those of out."""
        slot, out_slot = self._slot(op, "cache"), self._slot(op, "cache_out")
        for group, segments in self._cache_places.segments(op, slot, out_slot):
            self._attend_group(op, group, q[group.rows], segments, out[group.rows])

    def _attend_group(self, op: Op, group: Group, q: Tensor, segments: Sequence[Segment], out: Tensor) -> None:
        if self._plan.policy.attn_sparsity == 1:
            ops.decode_attention(q, segments, out=out, scratch=self._work)
            return
        keep = self._cache_places.kept(op, group)
        ops.sparse_decode_attention(q, segments, *keep, out=out, scratch=self._work)

    # Attention on the host's lane

    def store_query(self, op: Op) -> None:
        """d2h: Q, K and V of the sequences that the host attends to."""
        rows = self._plan.groups[op.k].cache.attended_by_host.rows
        self._rows(op, "query").copy_(self._rows(op, "projected")[rows], non_blocking=True)

    @torch.inference_mode()
    def attend_host(self, op: Op) -> None:
        """Append the new tokens at their home on the host and attend there, in place."""
        q, k, v = self._qkv(self._rows(op, "query"))
        answer, scratch = self._rows(op, "answer"), self._buffers.hosted
        for rows, target, segments, keep in self._cache_places.attended(op):
            ops.write_tokens(k, v, target)
            scratch.begin()
            if self._plan.policy.attn_sparsity == 1:
                ops.decode_attention(q[rows], segments, out=answer[rows], scratch=scratch)
            else:
                most = int(keep.numpy().max())
                ops.sparse_decode_attention(q[rows], segments, keep, most, out=answer[rows], scratch=scratch)

    def load_attended(self, op: Op) -> None:
        """h2d: the host's results of them."""
        rows = self._plan.groups[op.k].cache.attended_by_host.rows
        self._rows(op, "result")[rows].copy_(self._rows(op, "answer"), non_blocking=True)

    def _rows(self, op: Op, ring: str) -> Tensor:
        """A ring's slot as rows of heads [n, H, D]: of all sequences, or in host memory of those it attends to."""
        model, batch = self._plan.model, self._plan.workload.batches[op.k]
        heads = model.num_heads + (2 * model.num_kv_heads if ring in ("projected", "query") else 0)
        size = batch.size if ring in ("projected", "result") else self._plan.groups[op.k].cache.attended_by_host.size
        numbers = self._bytes(op, ring).view(self._dtype)
        return numbers[: size * heads * model.head_dim].view(size, heads, model.head_dim)


Action = Callable[..., int | None]

ACTIONS: Mapping[Kind, Action] = {kind: getattr(Round, kind.name) for kind in OPS}  # an op without one fails here
COMPUTATIONS: Mapping[str, Callable[[Round, _Work, int], None]] = {kind: getattr(Round, kind) for kind in STAGES}
