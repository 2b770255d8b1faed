"""Exact rational arithmetic for tests: one operation on float32, rounded once by the rules of IEEE 754."""

import math
from fractions import Fraction

import numpy as np

FLOAT32_MAX = Fraction(2**24 - 1) * 2**104


def round_to_float32(value: Fraction) -> float:
    """The float32 nearest to a nonzero fraction, ties to even, subnormals and overflow included."""
    sign, magnitude = (-1.0 if value < 0 else 1.0), abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if magnitude < Fraction(2) ** exponent:
        exponent -= 1
    quantum = Fraction(2) ** (max(exponent, -126) - 23)
    units = round(magnitude / quantum)  # Fraction rounds half to even
    return sign * (math.inf if units * quantum > FLOAT32_MAX else float(units * quantum))


def exact_fma(a: float, b: float, c: float) -> float:
    """a * b + c of three float32 values."""
    if not all(map(math.isfinite, (a, b, c))):
        if any(map(math.isnan, (a, b, c))) or (0 in (a, b) and math.inf in (abs(a), abs(b))):
            return math.nan
        if math.isfinite(a) and math.isfinite(b):
            return c
        product = math.copysign(math.inf, math.copysign(1, a) * math.copysign(1, b))
        return math.nan if c == -product else product
    total = Fraction(a) * Fraction(b) + Fraction(c)
    if total != 0:
        return round_to_float32(total)
    product_sign = math.copysign(1, a) * math.copysign(1, b)
    exact_zeros = 0 in (a, b) and c == 0
    return -0.0 if exact_zeros and product_sign < 0 and math.copysign(1, c) < 0 else 0.0


def same_float32(got, want) -> bool:
    """Equal bit for bit, or both NaN."""
    got, want = np.float32(got), np.float32(want)
    return bool(np.isnan(got) and np.isnan(want)) or got.tobytes() == want.tobytes()
