"""float32 arithmetic with exactly one rounding per operation, as the kernels do it."""

from __future__ import annotations

import numpy as np


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c in float32, rounded once (to nearest, ties to even). Broadcasts.

    The product of two float32 is exact in float64. The sum is not: its error is found with a two-sum and folded into
    the last bit (round to odd), after which the rounding to float32 gives what the exact value would give.
    """
    with np.errstate(all="ignore"):
        product = np.asarray(a, np.float32).astype(np.float64) * np.asarray(b, np.float32).astype(np.float64)
        addend = np.asarray(c, np.float32).astype(np.float64)
        total = np.atleast_1d(product + addend)
        # Two-sum: product + addend = total + error, exactly.
        part = total - product
        error = (product - (total - part)) + (addend - part)
        bits = total.view(np.int64)
        even = (bits & 1) == 0
        inexact = np.isfinite(total) & (error != 0)
        outward = (error > 0) == (total > 0)
        bits += np.where(inexact & even, np.where(outward, 1, -1), 0)
        return total.astype(np.float32).reshape(np.broadcast_shapes(product.shape, addend.shape))


def add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b in float32, without warnings about infinities."""
    with np.errstate(all="ignore"):
        return np.add(a, b, dtype=np.float32)
