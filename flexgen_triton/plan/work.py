"""The arithmetic of every computation of a schedule, in units that a machine has rates for."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import NamedTuple

from .formats import WeightFormat
from .placement import Tier
from .schedule import ATTEND_HOST, COMPUTE, Kind, Work
from .spec import ATTEND, HEAD, Batch, StageSpec
from .traffic import Traffic

_NO_WORK = Work(rows=0, products=(), weight_bytes=0, hidden_bytes=0, first_of_load=False)


class _Cost(NamedTuple):
    """The products of stages for one row by format, bytes of their weights, and bytes that they pass over for a row."""

    products: tuple[tuple[WeightFormat, float], ...]
    weight_bytes: int
    passes: int


class Arithmetic:
    """Counts what the computations of a round do."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic, self.model, self.policy, self.workload = traffic, traffic.model, traffic.policy, traffic.workload
        self._costs: dict[tuple[int, int], _Cost] = {}
        tables = traffic.tables
        self._rows_on_disk = tables.disk.useful / max(sum(tables.share(t).useful for t in Tier), 1)

    def _cost(self, j: int, stages: int) -> _Cost:
        if (j, stages) not in self._costs:
            self._costs[j, stages] = _cost_of([s.spec for s in self._traffic.stages[j : j + stages]])
        return self._costs[j, stages]

    def work(self, i: int, j: int, k: int, stages: int = 1, kind: Kind = COMPUTE) -> Work:
        """The arithmetic of a computation of `stages` from stage j on, or of the host's part of attention."""
        batch, specs = self.workload.batches[k], [s.spec for s in self._traffic.stages[j : j + stages]]
        if kind is ATTEND_HOST or all(s.kind == ATTEND for s in specs):
            return self._attention_work(_NO_WORK, i, k, on_host=kind is ATTEND_HOST)
        rows = batch.size + (0 if i else batch.scored) if specs[0].kind == HEAD else batch.tokens(i)
        cost = self._cost(j, stages)
        work = Work(
            rows,
            tuple((form, flops * rows) for form, flops in cost.products),
            cost.weight_bytes,
            cost.passes * rows,
            first_of_load=k == 0,
            streamed_bytes=self._streamed(i, j, k),
        )
        if tables := {name for spec in specs for name in spec.lookups}:
            return replace(work, lookups=round(self._rows_on_disk * self._distinct_rows(i, batch, tables)))
        if all(s.kind != ATTEND for s in specs):
            return work
        if i == 0:
            squares = sum(p * p for p in batch.prompt_lens)
            flops = 2.0 * self.model.num_heads * self.model.head_dim * squares
            return replace(work, prompt_flops=flops, prompt_len=round(squares / batch.prompt_tokens))
        return self._attention_work(work, i, k)

    def _streamed(self, i: int, j: int, k: int) -> int:
        """Bytes read from disk meanwhile or before: of a bundle and its cache, counted where it begins."""
        traffic, bundle = self._traffic, self._traffic.stages[j].bundle
        if j and traffic.stages[j - 1].bundle == bundle:
            return 0
        streamed = sum(traffic.weight_traffic(bundle).disk_parts) // len(self.workload.batches)
        keeps = any(s.state for s in traffic.bundles[bundle].stages)
        return streamed + (traffic.cache_traffic(i, k).disk_read if keeps else 0)

    def _attention_work(self, work: Work, i: int, k: int, *, on_host: bool = False) -> Work:
        """Decode attention of one GPU batch added: of the sequences that the host attends to, or of all others."""
        chosen, model = [g for g in self._traffic.groups[k].cache if g.attended_by_host == on_host], self.model
        context = sum(sum(g.cached(i)) + g.size for g in chosen)
        return replace(
            work,
            cache_bytes=round(context * self._traffic.cache_layout.token_bytes * (1 + self.policy.attn_sparsity) / 2),
            cache_flops=4.0 * model.num_heads * model.head_dim * context,
            cache_format=self.policy.cache_format.rates(model.dtype),
            gathered_bytes=0 if on_host else self._traffic.cache_traffic(i, k).gathered,
        )

    def _distinct_rows(self, i: int, batch: Batch, tables: Collection[str]) -> float:
        """Rows of the tables that a step looks up: positions, and so many of random tokens that differ."""
        vocab, tokens = self.model.vocab, batch.tokens(i)
        positions = batch.prompt_lens[0] if i == 0 else len(set(batch.prompt_lens))
        rows = {"positions": positions, "tokens": vocab * (1 - (1 - 1 / vocab) ** tokens)}
        return sum(rows[name] for name in sorted(tables))


def _cost_of(stages: Sequence[StageSpec]) -> _Cost:
    flops: dict[WeightFormat, float] = {}
    tensors = [t for s in stages for t in s.tensors if not t.gathered]
    for t in tensors:
        if t.is_matrix:
            flops[t.format] = flops.get(t.format, 0.0) + 2.0 * t.num_parameters
    return _Cost(tuple(flops.items()), sum(t.nbytes for t in tensors), sum(s.passes for s in stages))
