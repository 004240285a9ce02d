"""Shared parts of the CPU kernels: compiling them, tensors as arrays, and single numbers of the formats.

Kernels are compiled by numba when they are first called and kept on disk (beside the source, else in the user's cache
folder; nowhere if neither can be written). A kernel is a serial function of one tile, which LLVM vectorises, and a
parallel loop over tiles that calls it. Both run without the GIL and may be called from any thread. What is kept is
looked up by its own source file: after a change here, delete the folders it is kept in.

Threads: numba's OpenMP layer where the system has the library, which several threads may enter at once; its fallback,
`workqueue`, aborts the process then, so launches take turns (`launch`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array
from torch import Tensor

from ..sizes import MAX_THREADS

FASTMATH = {"contract", "reassoc", "nsz"}  # sums may be reordered and fused; NaN and infinity stay what they are
_CARRIERS = {torch.float16: torch.int16, torch.bfloat16: torch.uint16}
_TURN = threading.Lock()


def compiled(function: Callable, *, parallel: bool = False) -> Callable:
    """`function` compiled on its first call, without the GIL."""
    options = {"nogil": True, "parallel": parallel, "fastmath": FASTMATH, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder to keep it in
        return numba.njit(**options)(function)


def compiled_parallel(function: Callable) -> Callable:
    """`function` compiled on its first call, its `prange` loops over numba's threads.

    Such a loop calls a serial kernel and no more, with its variable as np.int64: numba types the loop twice, as signed
    and as unsigned, and would compile all it calls for both.
    """
    return compiled(function, parallel=True)


def num_threads() -> int:
    """The most threads that a kernel may run on."""
    return min(int(numba.config.NUMBA_NUM_THREADS), MAX_THREADS)


def launch(kernel: Callable, *args: object) -> None:
    """Run a parallel kernel on as many threads as torch would use in this thread."""
    with _TURN:
        numba.set_num_threads(min(torch.get_num_threads(), num_threads()))
        kernel(*args)


def flat(x: Tensor) -> np.ndarray:
    """The elements from x's first to its last as a dense vector: one array type whatever x's strides; no copy.

    fp16 comes as int16 and bf16 as uint16, which `widen` tells apart.
    """
    x = x.view(_CARRIERS.get(x.dtype, x.dtype))
    if x.is_contiguous():
        return x.view(-1).numpy()
    span = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    return x.as_strided((span,), (1,)).numpy()


@intrinsic
def vectorize_apart(typingctx):
    """Promise that the calling function's arrays do not overlap, and let it use vectors of 512 bits.

    Without the first, LLVM guards or gives up every loop that stores; without the second it prefers 256 bits on
    Skylake's successors, half the multiplications a cycle.
    """

    def codegen(context, builder, signature, args):
        function = builder.function
        set.add(function.attributes, '"prefer-vector-width"="512"')  # llvmlite's own add knows only bare names
        for arg in function.args:
            if isinstance(arg.type, ir.PointerType):
                arg.add_attribute("noalias")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def widen(typingctx, number):
    """The fp32 value of a float by the type its bits travel in: int16 fp16, uint16 bf16, float32 itself."""

    def codegen(context, builder, signature, args):
        (value,) = args
        if number == types.int16:
            return builder.fpext(builder.bitcast(value, ir.HalfType()), ir.FloatType())
        if number == types.uint16:
            word = ir.IntType(32)
            return builder.bitcast(builder.shl(builder.zext(value, word), ir.Constant(word, 16)), ir.FloatType())
        return value

    return types.float32(number), codegen


@intrinsic
def nearest(typingctx, x):
    """The nearest whole number."""

    def codegen(context, builder, signature, args):
        return builder.call(builder.module.declare_intrinsic("llvm.rint", [ir.FloatType()]), args)

    return types.float32(types.float32), codegen


@intrinsic
def plane(typingctx, word, j):
    """The code of plane j of a P16 word (int16)."""

    def codegen(context, builder, signature, args):
        bits = ir.IntType(32)
        shift = builder.shl(builder.trunc(args[1], bits), ir.Constant(bits, 2))
        code = builder.and_(builder.lshr(builder.zext(args[0], bits), shift), ir.Constant(bits, 15))
        return builder.sitofp(code, ir.FloatType())

    return types.float32(types.int16, types.int64), codegen


@intrinsic
def part(typingctx, array, at, count):
    """array[at : at + count] of a vector, unchecked and borrowed: whoever owns the array must still hold it.

    A slice counts references, atomically, and that costs more than the vectors of a few tokens.
    """
    result = types.Array(array.dtype, 1, "C")

    def codegen(context, builder, signature, args):
        source = context.make_array(array)(context, builder, args[0])
        target = context.make_array(result)(context, builder)
        data = builder.gep(source.data, [args[1]])
        sizes = {"shape": [args[2]], "strides": [source.itemsize], "itemsize": source.itemsize}
        populate_array(target, data=data, meminfo=None, **sizes)
        return target._getvalue()

    return result(array, types.intp, types.intp), codegen


@intrinsic
def prefetch(typingctx, array, at):
    """Ask for the cache line of array[at]; any index is safe."""

    def codegen(context, builder, signature, args):
        byte, number = ir.IntType(8), ir.IntType(32)
        address = builder.gep(context.make_array(signature.args[0])(context, builder, args[0]).data, [args[1]])
        kind = ir.FunctionType(ir.VoidType(), [byte.as_pointer(), number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        read, keep_in_second_level, data = number(0), number(2), number(1)
        builder.call(function, [builder.bitcast(address, byte.as_pointer()), read, keep_in_second_level, data])
        return context.get_dummy_value()

    return types.void(array, types.intp), codegen


def _plane(j: int):
    @intrinsic
    def plane(typingctx, word):
        def codegen(context, builder, signature, args):
            bits = ir.IntType(32)
            masked = builder.and_(builder.zext(args[0], bits), ir.Constant(bits, 15 << 4 * j))
            return builder.sitofp(masked, ir.FloatType())

        return types.float32(types.int16), codegen

    return plane


# The code of plane j of a P16 word, times 16**j: left where it lies it costs a mask and a conversion, and no shift. The
# other factor of its product carries the PLANE_WEIGHT. In plain integer expressions numba would widen to 64 bits.
plane0, plane1, plane2, plane3 = (_plane(j) for j in range(4))
PLANE_WEIGHTS = (1.0, 2.0**-4, 2.0**-8, 2.0**-12)
