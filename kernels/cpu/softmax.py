"""The softmax of scores that are base-2 logarithms: highest, sum and weights, of as many scores as a vector has.

Knows no K, no V and no head.
"""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .jit import compiled, nearest, vectorize_apart
from .lanes import EXP2_SERIES, LANES, add, exp2, larger, largest, load, spread, store, subtract, sum_of

LOG2E = math.log2(math.e)
LOWEST = np.float32(-3e38)
ZERO = np.float32(0)


@intrinsic
def _power_of_two(typingctx, n):
    """2 ** n for a whole n of -126..127, made of exponent bits."""

    def codegen(context, builder, signature, args):
        word = ir.IntType(32)
        biased = builder.add(builder.fptosi(args[0], word), ir.Constant(word, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(word, 23)), ir.FloatType())

    return types.float32(types.float32), codegen


_ONE, _C1, _C2, _C3, _C4, _C5, _C6, _C7 = map(np.float32, EXP2_SERIES)


@compiled
def exp2_number(x):
    """2 ** x for x <= 0 in arithmetic that vectorises; 0 below the normal numbers."""
    n = nearest(x)
    f = x - n
    series = _ONE + f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * (_C5 + f * (_C6 + f * _C7))))))
    return ZERO if x < np.float32(-126) else series * _power_of_two(n)


@compiled
def _highest(scores, best):
    """The highest of the scores and `best`, whatever NaN there is."""
    whole = len(scores) - len(scores) % LANES
    high = spread(best)
    for t in range(0, whole, LANES):
        high = larger(high, load(scores, t))
    best = largest(high)
    for t in range(whole, len(scores)):
        best = max(best, scores[t])
    return best


@compiled
def soften(scores, best):
    """Scores to weights in place, 2 ** (score - the new highest) -> (the new highest, their sum)."""
    best = _highest(scores, best)
    whole = len(scores) - len(scores) % LANES
    high, sums = spread(best), spread(ZERO)
    for t in range(0, whole, LANES):
        weights = exp2(subtract(load(scores, t), high))
        store(weights, scores, t)
        sums = add(sums, weights)
    total = sum_of(sums)
    for t in range(whole, len(scores)):
        scores[t] = exp2_number(scores[t] - best)
        total += scores[t]
    return best, total


@compiled
def log_sum(scores):
    """The base-2 log-sum-exp of scores."""
    vectorize_apart()
    best = _highest(scores, LOWEST)
    total = ZERO
    for t in range(len(scores)):
        total += exp2_number(scores[t] - best)
    return best + np.float32(np.log2(total))
