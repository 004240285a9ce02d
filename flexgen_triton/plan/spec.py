"""A model's modules and tensors, and the workload it is given, as plain data.

Knows shapes, bytes and floating-point operations. Does not know where anything is stored or how it is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import NamedTuple

from .formats import DTYPE_BYTES, STORED_BYTES, PackedFormat, Plain, WeightFormat
from .policy import Policy

STAGES = EMBED, PROJECT, ATTEND, FINISH, MLP, HEAD = "embed", "project", "attend", "finish", "mlp", "head"


@dataclass(frozen=True, slots=True)
class Packed:
    """The matrix [N, K] that a tensor is a part of, as its format stores it."""

    matrix: str = field(compare=False)  # its name in the model
    shape: tuple[int, int]
    format: PackedFormat
    part: int  # of format.parts


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One weight as the engine sees it, and the checkpoint tensors it is concatenated from along dimension 0.

    A table cut over several modules (a large output projection) is one TensorSpec in each, with its first row in `row`.
    A `gathered` tensor is looked up row by row where it lies (an embedding) and is never streamed for that use. An
    `exact` one is never compressed.
    """

    name: str  # unique in the model: "3.qkv.weight"
    shape: tuple[int, ...]  # as stored
    sources: tuple[str, ...]  # names in a Hugging Face checkpoint, without any "model." prefix
    source_rows: tuple[int, ...]  # rows (or elements, for a vector) that each source contributes
    gathered: bool = False
    row: int = 0
    exact: bool = False
    dtype: str = ""  # as stored; a model's tensors have one
    packed: Packed | None = None  # of a matrix that is stored as several tensors

    @property
    def format(self) -> WeightFormat:
        return self.packed.format if self.packed else Plain(self.dtype)

    @property
    def part(self) -> int:
        """The place among the tensors that its matrix is stored as."""
        return self.packed.part if self.packed else 0

    @property
    def weight(self) -> str:
        """The name of the weight that it is, or is a part of."""
        return self.packed.matrix if self.packed else self.name

    @property
    def is_matrix(self) -> bool:
        """True for the first part of what products are made with."""
        return self.part == 0 and len(self.source_shape) == 2 and not self.gathered

    @property
    def source_shape(self) -> tuple[int, ...]:
        """The shape in the checkpoint, sources concatenated."""
        return self.packed.shape if self.packed else self.shape

    @property
    def num_parameters(self) -> int:
        return prod(self.source_shape) if self.part == 0 else 0

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * STORED_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class State:
    """K and V of every earlier token, kept for later ones."""

    kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class StageSpec:
    """A step of a model's computation with its own weights, and what it costs: for one row, a token.

    An attention module is three: Q, K and V are projected, attended with, and projected back (`FINISH`).
    """

    kind: str
    tensors: tuple[TensorSpec, ...] = ()
    passes: int = 0  # bytes read and written apart from products: norms, biases, activations, residuals
    results: int = 0  # numbers of its operations' results, which are kept to the computation's end
    widest: int = 0  # numbers of the widest intermediate, where that is wider than a hidden state
    lookups: tuple[str, ...] = ()  # "tokens", "positions": the tables that it looks up
    positions: bool = False  # it needs the tokens' positions on the device
    state: State | None = None  # what it keeps of every token


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """Stages whose weights are kept together, in a file of a store of our own: "embed", "attention", "mlp" or "head".

    A head too large to stream at once is several modules of kind "head", each with some rows of the projection.
    """

    kind: str
    index: int  # which decoder layer, or which part of the head
    stages: tuple[StageSpec, ...]

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        return tuple(t for stage in self.stages for t in stage.tensors)

    @property
    def is_decoder(self) -> bool:
        """True for the modules of decoder layers, of which `index` is the number."""
        return self.kind in ("attention", "mlp")

    @property
    def name(self) -> str:
        return "embed" if self.kind == "embed" else f"{self.kind}.{self.index}"

    def with_tensors(self, change: Callable[[TensorSpec], Iterable[TensorSpec]]) -> ModuleSpec:
        """The module with each tensor in the place of which `change` puts others."""
        stages = (replace(s, tensors=tuple(new for t in s.tensors for new in change(t))) for s in self.stages)
        return replace(self, stages=tuple(stages))

    def stored_as(self, dtype: str) -> ModuleSpec:
        """With all tensors in `dtype`."""
        return self.with_tensors(lambda t: (replace(t, dtype=dtype),))


@dataclass(frozen=True, slots=True)
class Bundle:
    """Modules whose weights are placed, loaded and released together: one, or a whole decoder layer."""

    modules: tuple[ModuleSpec, ...]

    @property
    def name(self) -> str:
        return "+".join(m.name for m in self.modules)

    @property
    def stages(self) -> tuple[StageSpec, ...]:
        return tuple(s for m in self.modules for s in m.stages)

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        return tuple(t for m in self.modules for t in m.tensors)

    @property
    def is_head(self) -> bool:
        return any(m.kind == "head" for m in self.modules)


class Stage(NamedTuple):
    """A stage in its place: j counts them over the whole model."""

    spec: StageSpec
    module: ModuleSpec
    bundle: int


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only language model: its modules in order and the sizes the engine plans with."""

    name: str
    family: str
    dtype: str  # "float32", "bfloat16" or "float16"
    hidden: int
    num_decoder_layers: int
    num_heads: int
    vocab: int
    max_positions: int
    modules: tuple[ModuleSpec, ...]

    @property
    def itemsize(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def state(self) -> State:
        """The state of its layers, which is the same in all that have one."""
        (found,) = {s.state for m in self.modules for s in m.stages if s.state}
        return found

    @property
    def num_kv_heads(self) -> int:
        return self.state.kv_heads

    @property
    def head_dim(self) -> int:
        return self.state.head_dim

    @property
    def num_parameters(self) -> int:
        return sum(t.num_parameters for m in self.modules for t in m.tensors)

    @property
    def weight_bytes(self) -> int:
        return sum(t.nbytes for m in self.modules for t in m.tensors)

    @property
    def format(self) -> WeightFormat:
        """The format of the matrices of its decoder layers."""
        return next((t.format for m in self.modules for t in m.tensors if t.packed), Plain(self.dtype))

    @property
    def is_packed(self) -> bool:
        """True where matrices are not stored as a checkpoint has them."""
        return any(t.packed for m in self.modules for t in m.tensors)

    def bundles(self, sep_layer: bool) -> tuple[Bundle, ...]:
        """Its modules in bundles: attention and MLP apart (`sep_layer`), or those of a decoder layer together."""
        if sep_layer:
            return tuple(Bundle((m,)) for m in self.modules)
        bundles: list[Bundle] = []
        for module in self.modules:
            last = bundles[-1].modules[-1] if bundles else None
            if last and module.is_decoder and last.is_decoder and module.index == last.index:
                bundles[-1] = Bundle((*bundles[-1].modules, module))
            else:
                bundles.append(Bundle((module,)))
        return tuple(bundles)


def pack(spec: ModelSpec, form: PackedFormat) -> ModelSpec:
    """The model with every matrix of its decoder layers and projections in a format.

    Embeddings and the output projection, which often are one table, keep their 16 bits.
    """

    def parts(tensor: TensorSpec) -> Iterable[TensorSpec]:
        return _parts(tensor, form) if len(tensor.shape) == 2 and not tensor.exact else (tensor,)

    return replace(spec, modules=tuple(m.with_tensors(parts) for m in spec.modules))


def stored_as(spec: ModelSpec, policy: Policy) -> ModelSpec:
    """The model in the format that the policy asks for."""
    return spec if policy.weight_format is None else pack(spec, policy.weight_format)


def _parts(tensor: TensorSpec, form: PackedFormat) -> Iterator[TensorSpec]:
    rows, columns = tensor.shape
    for n, part in enumerate(form.parts((rows, columns))):
        packed = Packed(tensor.name, (rows, columns), form, n)
        name = f"{tensor.name}.{part.suffix}"
        yield replace(tensor, name=name, shape=part.shape, dtype=part.dtype, packed=packed)


def cached(prompt_lens: Sequence[int], asked: Sequence[int], step: int) -> tuple[int, ...]:
    """Cached tokens of sequences when token step `step` begins."""
    return tuple(p + step - 1 if 0 < step < n else 0 for p, n in zip(prompt_lens, asked, strict=True))


@dataclass(frozen=True, slots=True)
class Batch:
    """One GPU batch: prompt lengths in tokens, longest first, and the most new tokens that a sequence asks.

    `asked` says what each of them asks, where they differ: one that has all it asked for moves no cache any more.
    """

    prompt_lens: tuple[int, ...]
    new_tokens: int
    asked: tuple[int, ...] = ()
    scored: int = 0  # prompt tokens whose log-probabilities are asked for
    sampler_bytes: int = 0  # kept to sample from, for every entry of the vocabulary: counts of tokens, raw logits

    @property
    def size(self) -> int:
        return len(self.prompt_lens)

    @property
    def prompt_tokens(self) -> int:
        return sum(self.prompt_lens)

    @property
    def max_len(self) -> int:
        """Positions that the longest sequence's cache must hold (the last token is never cached)."""
        return max(p + n - 1 for p, n in zip(self.prompt_lens, self.new_tokens_each, strict=True))

    @property
    def new_tokens_each(self) -> tuple[int, ...]:
        return self.asked or (self.new_tokens,) * self.size

    def first(self, size: int) -> Batch:
        """The batch of the first `size` sequences alone."""
        asked = self.new_tokens_each[:size]
        lens = self.prompt_lens[:size]
        return Batch(lens, max(asked), asked, min(self.scored, sum(lens)), self.sampler_bytes)

    def cached(self, step: int) -> tuple[int, ...]:
        """Cached tokens of each sequence when token step `step` begins; none of one that has ended."""
        return cached(self.prompt_lens, self.new_tokens_each, step)

    def tokens(self, step: int) -> int:
        """Tokens computed in token step `step`: the packed prompts, then one per sequence."""
        return self.prompt_tokens if step == 0 else self.size


@dataclass(frozen=True, slots=True)
class Workload:
    """The GPU batches of one round of the schedule."""

    batches: tuple[Batch, ...]

    @classmethod
    def uniform(cls, prompt_len: int, gen_len: int, gpu_batch_size: int, num_gpu_batches: int) -> Workload:
        return cls((Batch((prompt_len,) * gpu_batch_size, gen_len),) * num_gpu_batches)

    @property
    def steps(self) -> int:
        return max(b.new_tokens for b in self.batches)
