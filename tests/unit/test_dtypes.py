"""bfloat16 and e4m3 in NumPy against ml_dtypes, and the way to MAX buffers and back."""

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from ep_mojo import dtypes
from ep_mojo.errors import DTypeError

ALL_BF16 = np.arange(1 << 16, dtype=np.uint16)
ALL_E4M3 = np.arange(1 << 8, dtype=np.uint8)


def test_bfloat16_widens_exactly():
    want = ALL_BF16.view(ml_dtypes.bfloat16).astype(np.float32)
    assert np.array_equal(
        dtypes.bfloat16_bits_to_float32(ALL_BF16).view(np.uint32)[want == want], bits(want)[want == want]
    )
    assert np.array_equal(np.isnan(dtypes.bfloat16_bits_to_float32(ALL_BF16)), np.isnan(want))


def bits(x):
    return np.asarray(x, np.float32).view(np.uint32)


def test_bfloat16_round_trip():
    back = dtypes.float32_to_bfloat16_bits(dtypes.bfloat16_bits_to_float32(ALL_BF16))
    finite = (ALL_BF16 & 0x7FFF) <= 0x7F80
    assert np.array_equal(back[finite], ALL_BF16[finite])
    assert np.array_equal(back[~finite], ALL_BF16[~finite] | 0x40)


def test_bfloat16_rounds_every_upper_half():
    """Every bfloat16 with the lower halves around the tie: subnormals and overflow to infinity included."""
    for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        x = ((ALL_BF16.astype(np.uint32) << 16) | np.uint32(low)).view(np.float32)
        with np.errstate(all="ignore"):
            want = x.astype(ml_dtypes.bfloat16).view(np.uint16)
        got = dtypes.float32_to_bfloat16_bits(x)
        number = ~np.isnan(x)
        assert np.array_equal(got[number], want[number])
        assert np.isnan(dtypes.bfloat16_bits_to_float32(got[~number])).all()
        assert ((got[~number] & 0x40) != 0).all()


def test_bfloat16_keeps_shape_and_reads_any_order():
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    for view in (x, x.T, x[:, ::2], x[:0], np.float32(3)):
        got = dtypes.float32_to_bfloat16_bits(view)
        assert got.shape == np.shape(view)
        assert np.array_equal(dtypes.bfloat16_bits_to_float32(got), view)


def test_e4m3_table():
    want = ALL_E4M3.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    nan = np.isnan(want)
    assert np.array_equal(np.isnan(dtypes.E4M3_TABLE), nan)
    assert nan.sum() == 2
    assert np.array_equal(bits(dtypes.E4M3_TABLE)[~nan], bits(want)[~nan])
    assert np.array_equal(
        dtypes.e4m3_bits_to_float32(ALL_E4M3.reshape(16, 16)), dtypes.E4M3_TABLE.reshape(16, 16), True
    )


def test_e4m3_round_trip():
    back = dtypes.float32_to_e4m3_bits(dtypes.E4M3_TABLE)
    assert np.array_equal(back[ALL_E4M3 != 0xFF], ALL_E4M3[ALL_E4M3 != 0xFF])
    assert back[0xFF] == 0x7F


def saturated(x):
    """ml_dtypes gives NaN where it overflows; clip first."""
    return np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def test_e4m3_of_every_bfloat16():
    x = dtypes.bfloat16_bits_to_float32(ALL_BF16)
    x = x[~np.isnan(x)]
    assert np.array_equal(dtypes.float32_to_e4m3_bits(x), saturated(x))


def test_e4m3_of_every_value_tie_and_neighbour():
    values = np.sort(dtypes.E4M3_TABLE[:0x7F])
    ties = ((values[:-1].astype(np.float64) + values[1:]) / 2).astype(np.float32)
    edges = np.concatenate([values, ties, [np.float32(464), np.float32(480)]])
    x = np.concatenate([edges, np.nextafter(edges, np.float32(1e9)), np.nextafter(edges, np.float32(-1e9))])
    x = np.concatenate([x, -x])
    assert np.array_equal(dtypes.float32_to_e4m3_bits(x), saturated(x))


def test_e4m3_of_random_floats():
    pattern = np.random.default_rng(0).integers(0, 1 << 32, 500_000, dtype=np.uint32).view(np.float32)
    near = np.random.default_rng(1).normal(scale=30, size=200_000).astype(np.float32)
    x = np.concatenate([pattern[~np.isnan(pattern)], near, near / 10_000])
    assert np.array_equal(dtypes.float32_to_e4m3_bits(x), saturated(x))


def test_e4m3_specials():
    x = np.array(
        [np.inf, -np.inf, np.nan, -np.nan, 0.0, -0.0, 1e30, -1e30, 2**-10, -(2**-10), 2**-9, 1e-45], np.float32
    )
    want = [0x7E, 0xFE, 0x7F, 0x7F, 0x00, 0x80, 0x7E, 0xFE, 0x00, 0x80, 0x01, 0x00]
    assert dtypes.float32_to_e4m3_bits(x).tolist() == want


def test_as_bits():
    a = np.ones((2, 3), ml_dtypes.bfloat16)
    assert dtypes.as_bits(a).dtype == np.uint16
    assert np.shares_memory(dtypes.as_bits(a), a)
    assert dtypes.as_bits(np.ones(3, ml_dtypes.float8_e4m3fn)).dtype == np.uint8
    assert dtypes.as_bits(np.ones(3, np.float32)).dtype == np.float32


def test_storage_dtype():
    assert dtypes.storage_dtype("bfloat16") == np.uint16
    assert dtypes.storage_dtype("int32") == np.int32
    with pytest.raises(DTypeError, match="float7"):
        dtypes.storage_dtype("float7")


NAMES = ["bfloat16", "float8_e4m3fn", "float32", "int32", "int64", "uint32", "uint64", "bool", "uint8", "uint16"]
SHAPES = [(3, 4), (0, 4), (3, 0), (0,), (1,), (), (2, 3, 8)]


@pytest.mark.parametrize("name", NAMES)
def test_buffer_round_trip(name):
    for shape in SHAPES:
        count = int(np.prod(shape))
        array = (np.arange(count) % 251).astype(dtypes.storage_dtype(name)).reshape(shape)
        buffer = dtypes.to_buffer(array, name)
        assert buffer.dtype.name == name
        assert tuple(buffer.shape) == shape
        back = dtypes.to_numpy(buffer)
        assert back.dtype == array.dtype
        assert back.shape == shape
        assert np.array_equal(back, array)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_buffer_of_ml_dtypes(dtype):
    array = np.arange(32).reshape(2, 16).astype(dtype)
    buffer = dtypes.to_buffer(array)
    assert buffer.dtype.name == array.dtype.name
    assert np.array_equal(dtypes.to_numpy(buffer), dtypes.as_bits(array))
    assert np.array_equal(dtypes.to_numpy(array), dtypes.as_bits(array))


def test_buffer_of_every_bit_pattern():
    for name, patterns in (("bfloat16", ALL_BF16), ("float8_e4m3fn", ALL_E4M3)):
        assert np.array_equal(dtypes.to_numpy(dtypes.to_buffer(patterns, name)), patterns)


def test_buffer_of_views():
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    locked = base.copy()
    locked.flags.writeable = False
    for view in (base[:, ::2], base.T, base[::-1], np.asfortranarray(base), locked):
        assert np.array_equal(dtypes.to_numpy(dtypes.to_buffer(view)), view)


@pytest.mark.parametrize(
    ("array", "name"),
    [
        (np.zeros(2, np.float32), "bfloat16"),
        (np.zeros(2, np.uint8), "bfloat16"),
        (np.zeros(2, np.int64), "int32"),
        (np.zeros(2, ml_dtypes.float8_e5m2), "float8_e4m3fn"),
        (np.zeros(2, ml_dtypes.bfloat16), "uint16"),
        (np.zeros(2), "float7"),
    ],
)
def test_buffer_does_not_cast(array, name):
    with pytest.raises(DTypeError):
        dtypes.to_buffer(array, name)


def test_max_is_not_imported():
    modules = "ep_mojo.dtypes, ep_mojo.config, ep_mojo.layout, ep_mojo.reference, ep_mojo.validate"
    code = f"import sys, {modules}; sys.exit('max' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
