"""The fma of the reference against exact rational arithmetic."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.exact_float import exact_fma, same_float32

from ep_mojo.reference import fma
from ep_mojo.reference.arithmetic import add


def check(a, b, c):
    with np.errstate(all="ignore"):
        a, b, c = (np.asarray(v).astype(np.float32) for v in (a, b, c))
    got = fma(a, b, c)
    assert got.dtype == np.float32
    for i in range(a.size):
        want = exact_fma(float(a[i]), float(b[i]), float(c[i]))
        assert same_float32(got[i], want), f"fma({a[i]!r}, {b[i]!r}, {c[i]!r}) = {got[i]!r}, expected {want!r}"


SPECIAL = np.array(
    [
        0.0,
        -0.0,
        1,
        -1,
        np.inf,
        -np.inf,
        np.nan,
        1e-45,
        -1e-45,
        2**-126,
        -(2**-126),
        2**-149,
        3.4028235e38,
        -3.4028235e38,
    ]
    + [1 + 2**-23, 1 - 2**-24, 2**-75, 2**-74, 2**100, 2**24, 2**24 - 1, 2**-24, 3, 1 / 3, 2**-130, 1.5 * 2**-140],
    np.float32,
)


def test_specials():
    a, b, c = (m.ravel() for m in np.meshgrid(SPECIAL, SPECIAL, SPECIAL))
    check(a, b, c)


def test_random_bits():
    rng = np.random.default_rng(0)
    check(*(rng.integers(0, 1 << 32, 5000, dtype=np.uint32).view(np.float32) for _ in range(3)))


def test_random_values_and_cancellations():
    rng = np.random.default_rng(1)
    a, b = (rng.normal(size=4000).astype(np.float32) for _ in range(2))
    c = rng.normal(size=4000).astype(np.float32) * np.float32(2.0) ** rng.integers(-60, 60, 4000)
    check(a, b, c)
    check(a, b, -(a * b))  # the sum is the rounding error of the product
    check(a, b, np.nextafter(-(a * b), np.float32(0)))


def test_subnormal_results():
    rng = np.random.default_rng(2)
    a = rng.normal(size=4000).astype(np.float32) * np.float32(2.0**-70)
    b = rng.normal(size=4000).astype(np.float32) * np.float32(2.0**-70)
    c = rng.integers(-(2**12), 2**12, 4000).astype(np.float64) * 2.0**-149
    check(a, b, c)


def test_double_rounding():
    """Sums that lie next to a tie of float32, nearer than float64 can tell: rounding twice would get them wrong."""
    one = np.float32(1) + np.float32(2**-23)
    cases = []
    for big in (1.0, 1.0 + 2**-23, 2.0**20, 1.5):
        for tiny in (2.0**-60, 2.0**-100, 2.0**-149):
            for s in (1, -1):
                # big + half a unit in the last place, then a little more or less
                half = big * 2.0**-24
                cases.append((np.float32(2.0**-12) * s, np.float32(half * 2**12), np.float32(big * s)))
                cases.append((one * s, one, np.float32(tiny)))
                cases.append((one * s, one, np.float32(-tiny)))
                cases.append((np.float32(2.0**12 + 1) * s, np.float32(2.0**12 + 2.0**-11), np.float32(tiny)))
    a = np.float32(1 + 2**-12)  # a * a = 1 + 2^-11 + 2^-24: a tie
    cases += [(a, a, np.float32(s * 2.0**-e)) for s in (1, -1) for e in range(24, 150)]
    check(*map(np.array, zip(*cases, strict=True)))
    # The naive way, through float64, does get some of these wrong, so that the cases are worth their name.
    naive = np.float32(np.float64(a) * np.float64(a) + 2.0**-100)
    assert naive != fma(a, a, np.float32(2.0**-100))


floats = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)


@settings(max_examples=300, deadline=None)
@given(floats, floats, floats)
def test_any_floats(a, b, c):
    assert same_float32(fma(np.float32(a), np.float32(b), np.float32(c)), exact_fma(a, b, c))


def test_broadcasts_and_keeps_shape():
    row = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert np.array_equal(fma(np.float32(2), row, row), 3 * row)
    assert fma(np.float32(2), row[:, :0], row[:, :0]).shape == (2, 0)
    assert fma(np.float32(2), np.float32(3), np.float32(4)).shape == ()
    assert fma(row, row, np.float32(1)).dtype == np.float32


def test_inputs_are_left_alone():
    a, b, c = (np.full(3, 1.1, np.float32) for _ in range(3))
    fma(a, b, c)
    assert (a == np.float32(1.1)).all()
    assert (c == np.float32(1.1)).all()


def test_add_is_float32():
    assert add(np.float32(1), np.float32(2**-24)) == 1
    assert np.isnan(add(np.float32(np.inf), np.float32(-np.inf)))
