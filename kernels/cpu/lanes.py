"""Vectors of 16 fp32 numbers as values of a compiled kernel, for the loops that LLVM does not vectorise well by itself.

A `Lanes` is made, combined and stored by the functions below and lives in a register between them. LLVM splits it where
the machine's registers are shorter.

A group of P16 is read through a *table* of 16 numbers in memory, which `tabulate` makes and `look_up` alone reads.
With AVX-512 it holds what the 16 codes stand for, and one instruction, which reads the low four bits of each lane, gets
16 numbers out of it: a mask, a conversion and a product less than computing them. Elsewhere it holds scale and minimum.
Either way a number is code * scale + minimum, rounded once.
"""

from __future__ import annotations

import math

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from ..sizes import LANES

_FLOAT, _WORD = ir.FloatType(), ir.IntType(32)
_FLOATS, _WORDS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_WORD, LANES)


class Lanes(types.Type):
    """16 fp32 numbers, or 16 words of 32 bits."""

    def __init__(self, name: str, vector: ir.VectorType):
        super().__init__(name)
        self.vector = vector


numbers = Lanes("numbers", _FLOATS)
words = Lanes("words", _WORDS)


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, kind.vector)


def _address(context, builder, kind, array, at):
    """Pointer to array[at : at + 16], as a vector."""
    pointer = builder.gep(context.make_array(kind)(context, builder, array).data, [at])
    return builder.bitcast(pointer, ir.VectorType(pointer.type.pointee, LANES).as_pointer())


def _spread(builder, value):
    empty = ir.Constant(_FLOATS, ir.Undefined)
    first = builder.insert_element(empty, value, _WORD(0))
    return builder.shuffle_vector(first, empty, ir.Constant(_WORDS, [0] * LANES))


def _multiply_add(builder, a, b, c):
    return builder.fadd(builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))


def _permutes(context) -> bool:
    """Return True if the machine finds 16 numbers in a table of 16 by one instruction."""
    _, _, features = context.codegen().magic_tuple()
    return "+avx512f" in features.split(",")


@intrinsic
def spread(typingctx, x):
    """A number in every lane."""

    def codegen(context, builder, signature, args):
        return _spread(builder, args[0])

    return numbers(types.float32), codegen


@intrinsic
def load(typingctx, array, at):
    """array[at : at + 16] of an fp32 vector."""

    def codegen(context, builder, signature, args):
        return builder.load(_address(context, builder, signature.args[0], *args), align=4)

    return numbers(array, types.intp), codegen


@intrinsic
def load_wide(typingctx, array, at):
    """array[at : at + 16] in fp32, by what its bits travel in (`cpu_jit.flat`): int16 fp16, uint16 bf16, or itself."""

    def codegen(context, builder, signature, args):
        kind = signature.args[0]
        found = builder.load(_address(context, builder, kind, *args), align=kind.dtype.bitwidth // 8)
        if kind.dtype == types.int16:
            return builder.fpext(builder.bitcast(found, ir.VectorType(ir.HalfType(), LANES)), _FLOATS)
        if kind.dtype == types.uint16:
            bits = builder.shl(builder.zext(found, _WORDS), ir.Constant(_WORDS, [16] * LANES))
            return builder.bitcast(bits, _FLOATS)
        return found

    return numbers(array, types.intp), codegen


@intrinsic
def store(typingctx, lanes, array, at):
    """array[at : at + 16] = lanes."""

    def codegen(context, builder, signature, args):
        builder.store(args[0], _address(context, builder, signature.args[1], *args[1:]), align=4)
        return context.get_dummy_value()

    return types.void(numbers, array, types.intp), codegen


@intrinsic
def multiply_add(typingctx, a, b, c):
    """a * b + c, rounded once where the machine can."""

    def codegen(context, builder, signature, args):
        return _multiply_add(builder, *args)

    return numbers(numbers, numbers, numbers), codegen


# 2 ** f = exp(f ln 2) on -1/2..1/2 by its series, to the term below 2 ** -24; the lowest power first
EXP2_SERIES = [math.log(2) ** n / math.factorial(n) for n in range(8)]


@intrinsic
def exp2(typingctx, lanes):
    """2 ** x of 16 numbers that are 0 or less; 0 below the normal numbers, NaN of NaN."""

    def codegen(context, builder, signature, args):
        (x,) = args
        round_each = ir.FunctionType(_FLOATS, [_FLOATS])
        nearest = builder.call(cgutils.get_or_insert_function(builder.module, round_each, "llvm.rint.v16f32"), [x])
        rest = builder.fsub(x, nearest)
        series = ir.Constant(_FLOATS, [EXP2_SERIES[-1]] * LANES)
        for factor in EXP2_SERIES[-2::-1]:
            series = _multiply_add(builder, series, rest, ir.Constant(_FLOATS, [factor] * LANES))
        biased = builder.add(builder.fptosi(nearest, _WORDS), ir.Constant(_WORDS, [127] * LANES))
        power = builder.bitcast(builder.shl(biased, ir.Constant(_WORDS, [23] * LANES)), _FLOATS)
        tiny = builder.fcmp_ordered("<", x, ir.Constant(_FLOATS, [-126.0] * LANES))
        return builder.select(tiny, ir.Constant(_FLOATS, None), builder.fmul(series, power))

    return numbers(numbers), codegen


@intrinsic
def sum_of(typingctx, lanes):
    """The sum of 16 numbers."""

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(_FLOAT, [_FLOAT, _FLOATS])
        reduce = cgutils.get_or_insert_function(builder.module, kind, "llvm.vector.reduce.fadd.v16f32")
        return builder.call(reduce, [ir.Constant(_FLOAT, 0.0), args[0]], fastmath=("reassoc", "nsz"))

    return types.float32(numbers), codegen


@intrinsic
def subtract(typingctx, a, b):
    """a - b in each lane."""

    def codegen(context, builder, signature, args):
        return builder.fsub(*args)

    return numbers(numbers, numbers), codegen


@intrinsic
def add(typingctx, a, b):
    """a + b in each lane."""

    def codegen(context, builder, signature, args):
        return builder.fadd(*args)

    return numbers(numbers, numbers), codegen


@intrinsic
def larger(typingctx, a, b):
    """The larger of two in each lane; a's where b's is NaN."""

    def codegen(context, builder, signature, args):
        a, b = args
        return builder.select(builder.fcmp_ordered(">", b, a), b, a)

    return numbers(numbers, numbers), codegen


@intrinsic
def largest(typingctx, lanes):
    """The largest of 16 numbers, none NaN."""

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(_FLOAT, [_FLOATS])
        reduce = cgutils.get_or_insert_function(builder.module, kind, "llvm.vector.reduce.fmax.v16f32")
        return builder.call(reduce, args, fastmath=("nnan", "nsz"))

    return types.float32(numbers), codegen


@intrinsic
def load_words(typingctx, array, at):
    """array[at : at + 16] of P16 words (int16), each in a lane of 32 bits."""

    def codegen(context, builder, signature, args):
        packed = builder.load(_address(context, builder, signature.args[0], *args), align=2)
        return builder.zext(packed, _WORDS)

    return words(array, types.intp), codegen


@intrinsic
def tabulate(typingctx, scale, low):
    """The table of a group."""

    def codegen(context, builder, signature, args):
        scale, low = args
        if _permutes(context):
            codes = ir.Constant(_FLOATS, [float(code) for code in range(LANES)])
            return _multiply_add(builder, codes, _spread(builder, scale), _spread(builder, low))
        first = builder.insert_element(ir.Constant(_FLOATS, None), scale, _WORD(0))
        return builder.insert_element(first, low, _WORD(1))

    return numbers(types.float32, types.float32), codegen


@intrinsic
def look_up(typingctx, packed, shift, tables, at):
    """The numbers that bits `shift`..`shift` + 3 (a literal) of the words stand for in the table tables[at:][:16]."""

    def codegen(context, builder, signature, args):
        packed, _, tables, at = args
        kind = signature.args[2]
        codes = builder.lshr(packed, ir.Constant(_WORDS, [signature.args[1].literal_value] * LANES))
        if _permutes(context):
            table = builder.load(_address(context, builder, kind, tables, at), align=4)
            signature = ir.FunctionType(_FLOATS, [_FLOATS, _WORDS])
            permute = cgutils.get_or_insert_function(builder.module, signature, "llvm.x86.avx512.permvar.sf.512")
            return builder.call(permute, [table, codes])
        codes = builder.sitofp(builder.and_(codes, ir.Constant(_WORDS, [15] * LANES)), _FLOATS)
        pair = builder.gep(context.make_array(kind)(context, builder, tables).data, [at])
        scale, low = (_spread(builder, builder.load(builder.gep(pair, [_WORD(i)]))) for i in range(2))
        return _multiply_add(builder, codes, scale, low)

    if not isinstance(shift, types.IntegerLiteral):
        return None
    return numbers(words, shift, tables, types.intp), codegen


def _meet(builder, a, b, half):
    """a's and b's runs of 2 * half lanes, each folded to `half`, in turn."""
    lanes = range(LANES)
    low = [lane // (2 * half) * (2 * half) + lane % half + (LANES if lane // half % 2 else 0) for lane in lanes]
    first, second = (
        builder.shuffle_vector(a, b, ir.Constant(_WORDS, [lane + more for lane in low])) for more in (0, half)
    )
    return builder.fadd(first, second, flags=("reassoc",))


@intrinsic
def sum_each(typingctx, array, at):
    """The sums of 16 vectors, array[at + 16 * n :][:16], each in its lane."""

    def codegen(context, builder, signature, args):
        array, at = args
        places = (builder.add(at, ir.Constant(at.type, LANES * n)) for n in range(LANES))
        rows = [builder.load(_address(context, builder, signature.args[0], array, n), align=4) for n in places]
        while len(rows) > 1:
            half = len(rows) // 2
            rows = [_meet(builder, a, b, half) for a, b in zip(rows[:half], rows[half:], strict=True)]
        return rows[0]

    return numbers(array, types.intp), codegen
