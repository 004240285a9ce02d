"""Formats of weights and of the cache: the tensors that a matrix is stored as, the bytes of a number, what it costs.

The pure half of a format. Its arithmetic is in models/ops/weight.py, its kernels in kernels/.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..kernels.sizes import (
    BLOCK_ROWS,
    CODES_PER_WORD,
    FUSED_GROUP,
    KV_GROUP,
    WIDEN_BYTES,
    kv_width,
    panel_blocks,
    widened_rows,
)

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
STORED_BYTES = DTYPE_BYTES | {"int16": 2}  # four 4-bit codes to an int16
FOUR_BIT = "4-bit"  # the name of its rates in a machine's profile
SCALE_BYTES = 4  # scale and minimum of a group, in fp16

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor that a matrix is stored as, by the end of its name."""

    suffix: str
    dtype: str
    shape: Shape


@dataclass(frozen=True, slots=True)
class Plain:
    """Numbers as they are computed with."""

    dtype: str

    @property
    def rates(self) -> str:
        """The key of its rates in a machine's profile."""
        return self.dtype

    @property
    def description(self) -> str:
        return "uncompressed"

    @property
    def parameter_bytes(self) -> float:
        return DTYPE_BYTES[self.dtype]

    @property
    def panel_room(self) -> int:
        """Bytes for panels beside a CPU's products of many rows."""
        return WIDEN_BYTES if DTYPE_BYTES[self.dtype] == 2 else 0

    @property
    def inner_bytes(self) -> int:
        """Bytes of a number of an MLP's inner result on a CPU: in 16 bits widened beside itself, else held twice."""
        return 6 if DTYPE_BYTES[self.dtype] == 2 else 8

    def parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        """The tensors that a matrix is stored as: itself."""
        return (Part("", self.dtype, shape),)

    def dense_rows(self, rows: int) -> int:
        """Rows from which on a GPU multiplies it dequantised, where that is from `rows` on; 0: never."""
        return 0

    def widened_bytes(self, rows: int, shape: tuple[int, int]) -> int:
        """Bytes that a CPU's product of `rows` rows takes: x in fp32, and a panel's result."""
        outputs, inputs = shape
        if DTYPE_BYTES[self.dtype] == 4:
            return 0
        return 4 * rows * (inputs + min(int(widened_rows(inputs)), outputs)) + 4 * outputs

    def panel_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of the rows of a matrix in fp32 that a CPU's product takes at a time."""
        outputs, inputs = shape
        return 0 if DTYPE_BYTES[self.dtype] == 4 else 4 * inputs * min(int(widened_rows(inputs)), outputs)


@dataclass(frozen=True, slots=True)
class FourBit:
    """P16 (kernels/formats.py): 4 bits with a scale and a minimum for each group of `group_size` along K."""

    group_size: int

    @property
    def numbers_part(self) -> int:
        """The part that holds numbers, which may be damaged: the scales; any codes are codes."""
        return 1

    @property
    def rates(self) -> str:
        """The key of its rates in a machine's profile."""
        return FOUR_BIT

    @property
    def description(self) -> str:
        return f"in 4 bits, groups of {self.group_size}"

    @property
    def parameter_bytes(self) -> float:
        return 0.5 + SCALE_BYTES / self.group_size

    @property
    def panel_room(self) -> int:
        """Bytes for panels beside a CPU's products of many rows."""
        return int(WIDEN_BYTES)

    @property
    def inner_bytes(self) -> int:
        """Bytes of a number of an MLP's inner result on a CPU: fp32, held twice."""
        return 8

    def parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        """Codes [blocks, K/4, 256] and scales [blocks, K/G, 2, 256] of a matrix [N, K]; a block of rows is one row."""
        rows, columns = shape
        blocks, groups = -(-rows // BLOCK_ROWS), -(-columns // self.group_size)
        return (
            Part("codes", "int16", (blocks, groups * self.group_size // CODES_PER_WORD, BLOCK_ROWS)),
            Part("scales", "float16", (blocks, groups, 2, BLOCK_ROWS)),
        )

    def dense_rows(self, rows: int) -> int:
        """Rows from which on a GPU multiplies it dequantised, where that is from `rows` on; 0: never."""
        return min(rows, 1) if self.group_size < FUSED_GROUP else rows

    def widened_bytes(self, rows: int, shape: tuple[int, int]) -> int:
        """Bytes that a CPU's product of `rows` rows takes: x, the result and what is added in fp32."""
        outputs, inputs = shape
        return 4 * rows * (inputs + 2 * outputs) + 4 * outputs

    def panel_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of the row blocks of a matrix in fp32 that a CPU's product takes at a time."""
        codes = self.parts(shape)[0].shape
        columns = CODES_PER_WORD * codes[1]
        return int(4 * columns * BLOCK_ROWS * min(panel_blocks(columns), codes[0]))


WeightFormat = Plain | FourBit


@dataclass(frozen=True, slots=True)
class Field:
    """The numbers of one token and head in a half of the cache: `width` elements."""

    dtype: str
    width: int

    @property
    def nbytes(self) -> int:
        return self.width * STORED_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class PlainCache:
    """K and V as they are computed."""

    quantising_bytes: int = 0  # of a number of K or V on its way into the cache, on a CPU

    def rates(self, dtype: str) -> str:
        """The key of its rates in a machine's profile, for a model of `dtype`."""
        return dtype

    @property
    def description(self) -> str:
        return "uncompressed"

    def fields(self, dtype: str, head_dim: int) -> tuple[Field, ...]:
        """A head's K or V of one token."""
        return (Field(dtype, head_dim),)


@dataclass(frozen=True, slots=True)
class FourBitCache:
    """P16 along the head: 4 bits, padded, with scale and minimum of every 64."""

    quantising_bytes: int = 20

    def rates(self, dtype: str) -> str:
        """The key of its rates in a machine's profile."""
        return FOUR_BIT

    @property
    def description(self) -> str:
        return "in 4 bits"

    def fields(self, dtype: str, head_dim: int) -> tuple[Field, ...]:
        """A head's K or V of one token: codes, and scales with minima."""
        width = kv_width(head_dim)
        return Field("int16", width // CODES_PER_WORD), Field("float16", 2 * width // KV_GROUP)


CacheFormat = PlainCache | FourBitCache
