"""Formats: e4m3 against its table of values, scales against their definition, messages in and out."""

from std.memory import bitcast
from std.testing import TestSuite, assert_equal, assert_true

from ep_mojo import BF16, BlockwiseFP8, Bytes, HostTeam, TokenFormat, View
from ep_mojo.formats import format_tag
from ep_mojo.formats.blockwise_fp8 import power_of_two_at_least, to_e4m3

comptime INF: UInt32 = 0x7F800000


def f32(bits: UInt32) -> Float32:
    return bitcast[DType.float32](bits)


def bits_of(x: Float32) -> UInt32:
    return bitcast[DType.uint32](x)


def value_of(code: Int) -> Float32:
    """The value of an e4m3fn code without sign, 0 to 126, from the definition."""
    var exponent = code >> 3
    var fraction = Float32(code & 7)
    if exponent == 0:
        return fraction / 512
    var value = 8 + fraction
    for _ in range(exponent, 10):
        value /= 2
    for _ in range(10, exponent):
        value *= 2
    return value


def nearest(x: Float32) -> Int:
    """The code of |x| by search: nearest value, ties to the even code, 448 at most."""
    var a = abs(x)
    if a >= 448:
        return 126
    var best = 0
    for code in range(127):
        var d = abs(
            value_of(code).cast[DType.float64]() - a.cast[DType.float64]()
        )
        var least = abs(
            value_of(best).cast[DType.float64]() - a.cast[DType.float64]()
        )
        if d < least or (d == least and code % 2 == 0):
            best = code
    return best


def encode_one(x: Float32) -> Int:
    return Int(to_e4m3(SIMD[DType.float32, 1](x))[0])


def test_known_values() raises:
    assert_equal(value_of(126), 448)
    assert_equal(value_of(8), 0.015625)
    assert_equal(value_of(1), 0.001953125)
    for pair in [
        (Float32(0), 0),
        (Float32(1), 0x38),
        (Float32(-1), 0xB8),
        (Float32(448), 0x7E),
        (Float32(464), 0x7E),
        (Float32(1e30), 0x7E),
        (Float32(-1e30), 0xFE),
        (Float32(0.0009765625), 0),  # half of the least subnormal: tie to 0
        (Float32(0.0009765626), 1),
        (Float32(0.0029296875), 2),  # between codes 1 and 2: tie to 2
    ]:
        assert_equal(encode_one(pair[0]), pair[1])
    assert_equal(encode_one(f32(INF)), 0x7E)
    assert_equal(encode_one(f32(INF | 0x80000000)), 0xFE)
    assert_equal(encode_one(f32(0x80000000)), 0x80)
    for nan in [UInt32(0x7F800001), 0x7FC00000, 0xFFC00000, 0xFFFFFFFF]:
        assert_equal(encode_one(f32(nan)), 0x7F)


def test_every_value_encodes_to_itself() raises:
    for code in range(127):
        assert_equal(encode_one(value_of(code)), code)
        assert_equal(encode_one(-value_of(code)), code | 0x80)


def test_rounding_around_every_midpoint() raises:
    """At the middle of two neighbours, and one float32 below and above it."""
    for code in range(126):
        var middle = (value_of(code) + value_of(code + 1)) / 2
        var bits = bits_of(middle)
        assert_equal(encode_one(f32(bits - 1)), code)
        assert_equal(encode_one(f32(bits + 1)), code + 1)
        assert_equal(encode_one(middle), code + code % 2)


def test_rounding_against_search() raises:
    """Float32 patterns from all over the range, 16 at a time."""
    var bits: UInt32 = 12345
    for _ in range(250):
        var x = SIMD[DType.float32, 16](0)
        for i in range(16):
            bits = bits * 1664525 + 1013904223
            # Exponents from 2^-14 to 2^10, any fraction and sign.
            var exponent = 113 + (bits >> 8) % 25
            x[i] = f32(
                (bits & 0x80000000)
                | (exponent << 23)
                | ((bits * 2654435761) & 0x7FFFFF)
            )
        var got = to_e4m3(x)
        for i in range(16):
            var sign = 0x80 if x[i] < 0 else 0
            assert_equal(Int(got[i]), nearest(x[i]) | sign)


def test_power_of_two_at_least() raises:
    for e in range(1, 255):
        var power = f32(UInt32(e) << 23)
        assert_equal(Int(power_of_two_at_least(power)), e)
        assert_equal(Int(power_of_two_at_least(f32(bits_of(power) + 1))), e + 1)
        if e > 1:
            assert_equal(Int(power_of_two_at_least(f32(bits_of(power) - 1))), e)
    assert_equal(Int(power_of_two_at_least(f32(INF))), 255)


def token[hidden: Int](seed: Int) -> List[UInt16]:
    """Bfloat16 bits of many sizes."""
    var x = List[UInt16](length=hidden, fill=0)
    var bits = UInt32(seed * 7919 + 1)
    for i in range(hidden):
        bits = bits * 1664525 + 1013904223
        var exponent = 118 + (bits >> 12) % 14
        x[i] = UInt16(
            ((bits >> 16) & 0x8000) | (exponent << 7) | ((bits >> 20) & 0x7F)
        )
    return x^


def bytes_of(mut x: List[UInt16]) -> Bytes:
    return View[DType.uint16](Int(x.unsafe_ptr()), 1).bytes()


def bytes_of(mut x: List[UInt8]) -> Bytes:
    return View[DType.uint8](Int(x.unsafe_ptr()), 1).bytes()


def word_at(x: List[UInt8], at: Int) -> UInt32:
    var w: UInt32 = 0
    for i in range(4):
        w |= UInt32(x[at + i]) << UInt32(8 * i)
    return w


def check_fp8[
    hidden: Int, scale: StaticString
](var x: List[UInt16], factor: Float32) raises:
    """Encode a token and compare each block with the rule; then unpack it as a row and as a column."""
    comptime F = BlockwiseFP8[hidden, scale]
    var message = List[UInt8](length=F.message_bytes + 16, fill=0xEE)
    F.encode[HostTeam](bytes_of(x), factor, bytes_of(message))
    for block in range(hidden // 128):
        var amax: Float32 = 1e-4
        for i in range(block * 128, block * 128 + 128):
            var v = abs(f32(UInt32(x[i]) << 16) * factor)
            if v == v:
                amax = max(amax, v)
        var s = amax / 448
        var inverse = 448 / amax
        comptime if scale != "float32":
            s = f32(power_of_two_at_least(s) << 23)
        comptime if scale == "ue8m0":
            assert_equal(UInt32(message[hidden + block]), bits_of(s) >> 23)
        else:
            assert_equal(word_at(message, hidden + 4 * block), bits_of(s))
        for i in range(block * 128, block * 128 + 128):
            var v = f32(UInt32(x[i]) << 16) * factor
            var want = 0x7F
            if v == v:
                var scaled = v * inverse if scale == "float32" else v / s
                if abs(v) == f32(INF):
                    scaled = v
                want = nearest(scaled)
                want |= 0x80 if bits_of(v) >> 31 == 1 else 0
            assert_equal(Int(message[i]), want)
    comptime S = F.scales_per_token
    comptime if scale == "ue8m0":
        for i in range(hidden // 128, 4 * S):
            assert_equal(message[hidden + i], 0)
    for i in range(16):  # nothing past the message
        assert_equal(message[F.message_bytes + i], 0xEE)

    var row = List[UInt8](length=hidden, fill=0)
    for stride in [1, 3]:
        var scales = List[UInt8](length=4 * S * stride, fill=0xEE)
        F.unpack[HostTeam](
            bytes_of(message), bytes_of(row), bytes_of(scales), stride
        )
        for i in range(hidden):
            assert_equal(row[i], message[i])
        for i in range(S):
            var at = 4 * i * stride
            assert_equal(word_at(scales, at), word_at(message, hidden + 4 * i))
    var again = List[UInt8](length=F.message_bytes, fill=0)
    var packed = List[UInt8](length=4 * S, fill=0)
    F.unpack[HostTeam](bytes_of(message), bytes_of(row), bytes_of(packed), 1)
    F.pack[HostTeam](bytes_of(row), bytes_of(packed), bytes_of(again))
    for i in range(hidden + 4 * S):
        assert_equal(again[i], message[i])
    _ = row^  # byte pointers keep nothing alive
    _ = packed^
    _ = x^


def test_blockwise_fp8() raises:
    for seed in range(4):
        check_fp8[128, "float32"](token[128](seed), 1)
        check_fp8[640, "float32"](token[640](seed), 0.37)
        check_fp8[640, "power_of_two"](token[640](seed), 1)
        check_fp8[640, "ue8m0"](token[640](seed), 3)


def test_blockwise_fp8_special_values() raises:
    var x = token[640](9)
    for i in range(128):
        x[i] = 0x8000 if i % 2 == 1 else 0  # a block of zeros: scale 1e-4 / 448
    x[130] = 0x7FC0
    x[131] = 0xFFC1
    x[300] = 0x7F80
    x[301] = 0xFF80
    check_fp8[640, "float32"](x.copy(), 1)
    check_fp8[640, "power_of_two"](x.copy(), 1)
    check_fp8[640, "ue8m0"](x.copy(), 1)


def test_bf16() raises:
    comptime F = BF16[72]
    var x = token[72](1)
    x[3] = 0x7FC1
    x[4] = 0xFF80
    var message = List[UInt8](length=F.message_bytes, fill=0)
    F.encode[HostTeam](bytes_of(x), 5, bytes_of(message))
    var row = List[UInt16](length=72, fill=0)
    F.unpack[HostTeam](bytes_of(message), bytes_of(row), bytes_of(row), 1)
    for i in range(72):
        assert_equal(row[i], x[i])
    _ = message^


def test_sizes_and_keys() raises:
    assert_equal(BF16[7168].message_bytes, 14336)
    assert_equal(BlockwiseFP8[7168].message_bytes, 7168 + 4 * 56)
    assert_equal(BlockwiseFP8[128].message_bytes, 144)
    assert_equal(BlockwiseFP8[7168, "ue8m0"].scales_per_token, 14)
    assert_equal(BlockwiseFP8[640, "ue8m0"].message_bytes, 656)
    assert_equal(BF16[8].key(), "bf16")
    assert_equal(BlockwiseFP8[128].key(), "blockwise_fp8/float32/row")
    assert_equal(
        BlockwiseFP8[128, "ue8m0", True].key(), "blockwise_fp8/ue8m0/column"
    )
    assert_true(format_tag[BF16[8]]() != format_tag[BlockwiseFP8[128]]())


def main() raises:
    TestSuite.discover_tests[__functions_in_module()]().run()
