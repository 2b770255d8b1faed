"""Blockwise fp8 of the reference against a scalar version written from the rule."""

import math

import numpy as np
import pytest

from ep_mojo.dtypes import E4M3_TABLE, bfloat16_bits_to_float32, float32_to_e4m3_bits, round_to_bfloat16
from ep_mojo.reference import quantize
from ep_mojo.reference.fp8 import dequantize, next_power_of_two, pack_ue8m0, unpack_ue8m0

SCALES = ["float32", "power_of_two", "ue8m0"]
POSITIVE = [float(v) for v in E4M3_TABLE[:0x7F]]


def nearest_e4m3(value: float) -> int:
    """Scalar rounding: search among all codes; a tie goes to the even code."""
    if math.isnan(value):
        return 0x7F
    sign = 0x80 if math.copysign(1, value) < 0 else 0
    magnitude = min(abs(value), 448.0)
    distance = [abs(v - magnitude) for v in POSITIVE]
    best = min(distance)
    codes = [code for code, d in enumerate(distance) if d == best]
    return sign | next(c for c in codes if len(codes) == 1 or c % 2 == 0)


def block_by_rule(block, scale):
    """One block of 128 channels: (codes, s)."""
    f32 = np.float32
    finite = [abs(v) for v in block if not np.isnan(v)]
    amax = max([f32(1e-4), *finite])
    s = f32(amax / f32(448))
    if scale != "float32" and np.isfinite(s):
        exponent = math.frexp(float(s))[1] - (math.frexp(float(s))[0] == 0.5)
        s = f32(math.ldexp(1.0, exponent))
    codes = []
    for v in block:
        if np.isinf(v):
            codes.append(0x7E if v > 0 else 0xFE)
        elif scale == "float32":
            codes.append(nearest_e4m3(float(v * f32(f32(448) / amax))))
        else:
            codes.append(nearest_e4m3(float(v / s)))
    return codes, s


def samples():
    rng = np.random.default_rng(0)
    tokens = round_to_bfloat16(rng.normal(size=(6, 384)).astype(np.float32))
    tokens[1] *= np.float32(2.0) ** rng.integers(-30, 30, 384)
    tokens[2, :128] = 0
    tokens[2, 128:256] = 1e-6
    tokens[2, 256:] = np.where(rng.random(128) < 0.5, 448, -0.0)
    tokens[3, 5], tokens[3, 200], tokens[3, 300:310] = np.nan, np.inf, -np.inf
    tokens[4, :128] = np.nan
    tokens[4, 130] = -np.nan
    tokens[5] = np.ldexp(np.float32(1.75), rng.integers(-149, 128, 384)).astype(np.float32)
    return round_to_bfloat16(tokens)


@pytest.mark.parametrize("scale", SCALES)
def test_against_the_rule(scale):
    x = samples()
    with np.errstate(all="ignore"):
        q, scales = quantize(x, scale)
        factors = unpack_ue8m0(scales, 3) if scale == "ue8m0" else scales
        for t in range(x.shape[0]):
            for b in range(3):
                codes, s = block_by_rule(x[t, 128 * b : 128 * (b + 1)], scale)
                assert q[t, 128 * b : 128 * (b + 1)].tolist() == codes, (t, b)
                assert factors[t, b] == s, (t, b)


@pytest.mark.parametrize("scale", SCALES)
def test_shapes(scale):
    for tokens, hidden in [(0, 128), (3, 128), (2, 640), (1, 1024)]:
        q, scales = quantize(np.ones((tokens, hidden), np.float32), scale)
        assert (q.shape, q.dtype) == ((tokens, hidden), np.uint8)
        blocks = hidden // 128
        want = ((tokens, -(-blocks // 4)), np.int32) if scale == "ue8m0" else ((tokens, blocks), np.float32)
        assert (scales.shape, scales.dtype) == want


def test_scale_of_a_plain_block():
    x = np.zeros((1, 128), np.float32)
    x[0, :3] = 448, 1, -448
    q, s = quantize(x)
    assert s[0, 0] == 1
    assert q[0, :4].tolist() == [0x7E, 0x38, 0xFE, 0x00]


def test_largest_channel_is_448():
    x = np.abs(samples()[:1]) + np.float32(1)
    q, _ = quantize(x)
    assert (q.reshape(3, 128).max(axis=1) == 0x7E).all()


def test_infinity_stays_visible():
    x = np.ones((1, 128), np.float32)
    x[0, 7], x[0, 8], x[0, 9], x[0, 10] = np.inf, -np.inf, np.nan, -3
    for scale in SCALES:
        q, scales = quantize(x, scale)
        assert q[0, 7:12].tolist() == [0x7E, 0xFE, 0x7F, 0x80, 0x00]
        if scale == "ue8m0":
            assert scales[0, 0] == 255
        else:
            assert np.isinf(scales[0, 0])
            assert np.isinf(dequantize(q, scales, scale)[0, 7])


def test_floor_of_amax():
    for scale in SCALES:
        q, scales = quantize(np.zeros((1, 128), np.float32), scale)
        assert not q.any()
        s = unpack_ue8m0(scales, 1) if scale == "ue8m0" else scales
        assert s[0, 0] == (np.float32(1e-4) / np.float32(448) if scale == "float32" else 2.0**-22)


@pytest.mark.parametrize("scale", SCALES)
def test_error_after_dequantising(scale):
    x = round_to_bfloat16(np.random.default_rng(3).normal(size=(20, 512)).astype(np.float32))
    q, scales = quantize(x, scale)
    error = np.abs(dequantize(q, scales, scale) - x).reshape(20, 4, 128)
    amax = np.abs(x).reshape(20, 4, 128).max(axis=2, keepdims=True)
    # Half a unit in the last place of e4m3 is 1/16; powers of two waste up to a factor 2 among the subnormals only.
    assert (error <= np.maximum(np.abs(x).reshape(error.shape) / 16, amax * 2.0**-17)).all()


def test_next_power_of_two():
    exponents = np.arange(-126, 127)
    powers = np.ldexp(np.float32(1), exponents).astype(np.float32)
    assert np.array_equal(next_power_of_two(powers), powers)
    assert np.array_equal(next_power_of_two(np.nextafter(powers, np.float32(np.inf))), powers * 2)
    assert np.array_equal(next_power_of_two(np.nextafter(powers[1:], np.float32(0))), powers[1:])
    assert np.isinf(next_power_of_two(np.array([np.inf], np.float32)))


def test_ue8m0_packing():
    scales = np.array([[1, 2, 0.5, 4, 2.0**-126], [2.0**127, 1, 1, 1, np.inf]], np.float32)
    packed = pack_ue8m0(scales)
    assert packed.shape == (2, 2)
    assert packed.dtype == np.int32
    assert packed.view(np.uint8).tolist() == [[127, 128, 126, 129, 1, 0, 0, 0], [254, 127, 127, 127, 255, 0, 0, 0]]
    assert np.array_equal(unpack_ue8m0(packed, 5), scales)


def test_all_e4m3_codes_appear():
    """A block of exact multiples of its scale comes through unchanged, subnormal codes included."""
    codes = np.arange(128, dtype=np.uint8)
    codes[127] = 0x7E
    x = E4M3_TABLE[codes][None]
    for scale in SCALES:
        for sign in (1, -1):
            q, _ = quantize(x * np.float32(sign), scale)
            assert np.array_equal(q[0], codes | (0x80 if sign < 0 else 0))


def test_bf16_input_is_exact():
    patterns = np.arange(0x4000, 0x4080, dtype=np.uint16)
    q, _ = quantize(bfloat16_bits_to_float32(patterns)[None], "power_of_two")
    assert len(set(q[0].tolist())) > 8


def test_multiplies_by_the_inverse_scale():
    """x * (448 / amax) and x / (amax / 448) round differently next to ties; the first is the rule."""
    mantissas = np.arange(128, 256).astype(np.float32)
    x = np.concatenate([round_to_bfloat16(mantissas[None] / np.float32(2**e)) for e in range(1, 12)])
    x = np.repeat(x, 128, axis=0)
    x[:, 0] = np.tile(mantissas, 11)  # the largest of its block
    amax = x[:, :1]
    q, scales = quantize(x)
    assert np.array_equal(scales, amax / np.float32(448))
    assert np.array_equal(q, float32_to_e4m3_bits(x * (np.float32(448) / amax)))
    assert not np.array_equal(q, float32_to_e4m3_bits(x / scales))
