"""Pieces that families share: specifications of their tensors, the output projection in parts, single weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from torch import Tensor

from ..memory.scratch import Scratch
from ..plan.spec import ATTEND, FINISH, HEAD, PROJECT, ModuleSpec, StageSpec, State, TensorSpec
from . import ops
from .config import ModelConfig
from .ops import PlainWeight, Weight

MIN_HEAD_PART_BYTES = 32 << 20

# Specifications


def matrix(name: str, shape: tuple[int, int], *sources: str, rows: Sequence[int] = ()) -> TensorSpec:
    """A matrix [N, K] concatenated from `sources`, of as many rows each unless `rows` says otherwise."""
    each = tuple(rows) or (shape[0] // len(sources),) * len(sources)
    return TensorSpec(name, shape, sources, each)


def vector(name: str, size: int, *sources: str) -> TensorSpec:
    """A vector concatenated from `sources` of equal sizes."""
    return TensorSpec(name, (size,), sources, (size // len(sources),) * len(sources))


def table(name: str, shape: tuple[int, int], source: str) -> TensorSpec:
    """A table whose rows are looked up."""
    return TensorSpec(name, shape, (source,), shape[:1], gathered=True, exact=True)


def result_numbers(tensors: Sequence[TensorSpec], norms: int) -> int:
    """Numbers for a row of what a stage's operations result in: products, lookups (twice: on their way), norms."""
    products = sum(t.source_shape[0] for t in tensors if len(t.shape) == 2 and not t.gathered and not t.exact)
    return products + 2 * sum(t.shape[1] for t in tensors if t.gathered) + norms


def module(kind: str, index: int, *stages: StageSpec) -> ModuleSpec:
    return ModuleSpec(kind, index, stages)


def attention(
    index: int,
    before: Sequence[TensorSpec],
    after: Sequence[TensorSpec],
    *,
    passes: tuple[int, int],
    hidden: int,
    state: State,
    positions: bool = False,
) -> ModuleSpec:
    """The module of attention, from its tensors before and after attention and the bytes passed over in both."""
    return module(
        "attention",
        index,
        StageSpec(PROJECT, tuple(before), passes[0], result_numbers(before, 0), positions=positions),
        StageSpec(ATTEND, state=state),
        StageSpec(FINISH, tuple(after), passes[1], result_numbers(after, 2 * hidden)),
    )


def head_name(config: ModelConfig) -> str:
    """The tensor that the head multiplies with."""
    return "tokens.weight" if config.tied else "lm_head.weight"


def head(config: ModelConfig, itemsize: int, first: Sequence[TensorSpec], tokens: str) -> list[ModuleSpec]:
    """The output projection, in parts no larger than a decoder layer's MLP, so that the ring need not hold it whole.

    `first` are the tensors that its input is made with, `tokens` is the token table's name in the checkpoint.
    """
    name, source = head_name(config), tokens if config.tied else "lm_head.weight"
    width, vocab = config.embed_width, config.vocab
    limit = max(2 * config.hidden * config.ffn * itemsize, MIN_HEAD_PART_BYTES)
    count = -(-vocab * width * itemsize // limit)
    cuts = [vocab * n // count for n in range(count + 1)]
    modules = []
    for n, (low, high) in enumerate(pairwise(cuts)):
        rows = TensorSpec(name, (high - low, width), (source,), (high - low,), row=low, exact=True)
        tensors = (*(first if n == 0 else ()), rows)
        passes = 12 * (high - low)  # fp32 logits are written once and read twice, to be sampled
        modules.append(module(HEAD, n, StageSpec(HEAD, tensors, passes, result_numbers(tensors, 2 * config.hidden))))
    return modules


# Weights


def as_matrix(w: Mapping[str, Weight], name: str) -> PlainWeight:
    """A weight that is not quantised."""
    weight = w[name]
    assert isinstance(weight, PlainWeight), name
    return weight


def as_vector(w: Mapping[str, Weight], name: str, scratch: Scratch) -> Tensor:
    return as_matrix(w, name).vector(scratch)


def head_columns(w: Mapping[str, Weight], name: str) -> slice:
    """The part of the vocabulary that this part of the head makes the logits of."""
    weight = as_matrix(w, name)
    return slice(weight.row, weight.row + weight.rows)


def logits(w: Mapping[str, Weight], name: str, x: Tensor, out: Tensor, scratch: Scratch) -> None:
    """Write the logits of this part of the vocabulary: [T, width] -> out [T, columns] fp32."""
    ops.linear_into(x, as_matrix(w, name), out, scratch=scratch)
