"""BlockwiseFP8: e4m3 values with one scale for each 128 channels.

    amax  = max(1e-4, max |x| of the block), NaN ignored
    float32:       scale = amax / 448,               q = e4m3(x * (448 / amax))
    power_of_two:  scale = 2^ceil(log2(amax / 448)), q = e4m3(x / scale)
    ue8m0:         the same; only the exponent byte travels, four to an int32, the last one filled with zeros

All in float32. e4m3 rounds to nearest even and saturates: Inf becomes +-448, NaN 0x7F.
"""

from std.memory import bitcast
from std.sys import inlined_assembly

from ..layout import align_up
from ..numeric import row_alignment
from ..peers import Bytes, typed
from ..team import Team, copy_bytes, is_sm_90_or_newer
from .token_format import TokenFormat, spread_scales

comptime BLOCK = 128
"""Channels that share a scale."""
comptime E4M3_MAX: Float32 = 448.0
"""Largest e4m3 value."""
comptime MIN_AMAX: Float32 = 1e-4
"""Keeps the scale of an all-zero block finite."""


@always_inline
def magnitude[
    n: SIMDLength
](x: SIMD[DType.float32, n]) -> SIMD[DType.uint32, n]:
    """The bits of |x|.

    Parameters:
        n: Vector width.

    Args:
        x: Any values.

    Returns:
        Their bits without the sign; above 0x7F800000 for NaN.
    """
    return bitcast[DType.uint32](x) & 0x7FFFFFFF


@always_inline
def to_e4m3[n: SIMDLength](x: SIMD[DType.float32, n]) -> SIMD[DType.uint8, n]:
    """Round to e4m3fn, nearest even, saturating.

    Parameters:
        n: Vector width.

    Args:
        x: Any values; NaN gives 0x7F.

    Returns:
        The e4m3fn bytes.
    """
    comptime if is_sm_90_or_newer() and n % 2 == 0:  # to the same bits
        var pairs = SIMD[DType.uint16, n // 2](0)
        comptime for i in range(n // 2):
            pairs[i] = inlined_assembly[
                "cvt.rn.satfinite.e4m3x2.f32 $0, $1, $2;",
                UInt16,
                constraints="=h,f,f",
            ](x[2 * i + 1], x[2 * i])
        return rebind[SIMD[DType.uint8, n]](bitcast[DType.uint8, n](pairs))
    var bits = magnitude(x)
    var nan = bits.gt(0x7F800000)
    var a = min(bits, SIMD[DType.uint32, n](0x43E00000))  # 448
    # From 2^-6 on: keep three bits of the fraction and move the exponent's bias from 127 to 7.
    var normal = ((a + 0x7FFFF + ((a >> 20) & 1)) >> 20) - 960
    # Below: adding 2^14 leaves a multiple of 2^-9 in the low bits, rounded by the adder.
    var sum = bitcast[DType.float32](a) + SIMD[DType.float32, n](16384.0)
    var small = bitcast[DType.uint32](sum) - 0x46800000
    var code = a.lt(0x3C800000).select(small, normal) | (
        (bitcast[DType.uint32](x) >> 24) & 0x80
    )
    return nan.select(SIMD[DType.uint32, n](0x7F), code).cast[DType.uint8]()


@always_inline
def power_of_two_at_least(x: Float32) -> UInt32:
    """Exponent byte of the least power of two that is not below x.

    Args:
        x: A positive normal value, or Inf.

    Returns:
        The log2 + 127; 255 for Inf.
    """
    var bits = bitcast[DType.uint32](x)
    return (bits >> 23) + UInt32(1 if (bits & 0x7FFFFF) != 0 else 0)


struct BlockwiseFP8[
    hidden: Int, scale: StaticString = "float32", by_column: Bool = False
](TokenFormat):
    """Tokens quantised to e4m3 in blocks of 128 channels.

    Parameters:
        hidden: H, a multiple of 128.
        scale: "float32", "power_of_two" or "ue8m0".
        by_column: Whether the scales output is column-major.
    """

    comptime hidden_size = Self.hidden
    """H."""
    comptime input_dtype = DType.bfloat16
    """Tokens come as bfloat16."""
    comptime token_dtype = DType.float8_e4m3fn
    """And leave as e4m3."""
    comptime token_bytes = Self.hidden
    """One byte a channel."""
    comptime blocks = Self.hidden // BLOCK
    """Scales before packing."""
    comptime packed = Self.scale == "ue8m0"
    """Whether scales are exponent bytes."""
    comptime scale_dtype = DType.int32 if Self.packed else DType.float32
    """Element type of a scale."""
    comptime scales_per_token = (
        Self.blocks + 3
    ) // 4 if Self.packed else Self.blocks
    """Elements of the scales output per row."""
    comptime scales_by_column = Self.by_column
    """Column-major or not."""
    comptime message_bytes = align_up(
        Self.hidden + 4 * Self.scales_per_token, 16
    )
    """Channels, then scales."""
    comptime encode_parts = 4
    """Blocks do not depend on each other."""

    @staticmethod
    def key() -> String:
        """Name the format; see `TokenFormat.key`.

        Returns:
            The same string as in Python.
        """
        var layout = "column" if Self.by_column else "row"
        return String("blockwise_fp8/", Self.scale, "/", layout)

    @staticmethod
    @always_inline
    def encode[T: Team](token: Bytes, factor: Float32, message: Bytes):
        """Quantise; see `TokenFormat.encode`.

        Parameters:
            T: Who works on it; its lanes divide 128.

        Args:
            token: H bfloat16 values.
            factor: Multiplies the channels first.
            message: Where to.
        """
        Self._encode[T](token, factor, message, 0, 1)

    @staticmethod
    @always_inline
    def encode_part[
        T: Team
    ](token: Bytes, factor: Float32, message: Bytes, part: Int):
        """Quantise every fourth group of blocks; see `TokenFormat.encode_part`.

        Parameters:
            T: Who works on it; its lanes divide 128.

        Args:
            token: H bfloat16 values.
            factor: Multiplies the channels first.
            message: Where to.
            part: Which groups.
        """
        Self._encode[T](token, factor, message, part, Self.encode_parts)

    @staticmethod
    @always_inline
    def _encode[
        T: Team
    ](token: Bytes, factor: Float32, message: Bytes, part: Int, parts: Int):
        """Quantise groups of blocks: `part`, and every `parts`-th after it."""
        comptime assert (
            Self.hidden % BLOCK == 0
        ), "BlockwiseFP8: hidden must be a multiple of 128"
        comptime if Self.packed:
            if T.lane() == 0 and part == 0:
                for i in range(Self.blocks, 4 * Self.scales_per_token):
                    message.unsafe_store(Self.hidden + i, UInt8(0))
        comptime U = T.blocks_ahead
        comptime full = Self.blocks // U
        for i in range(part, full, parts):
            Self._encode_blocks[T, U](token, factor, message, i * U)
        comptime if Self.blocks % U != 0:
            if full % parts == part:
                Self._encode_blocks[T, Self.blocks % U](
                    token, factor, message, full * U
                )

    @staticmethod
    @always_inline
    def _encode_blocks[
        T: Team, n: Int
    ](token: Bytes, factor: Float32, message: Bytes, begin: Int):
        """Quantise n blocks, at most one for each lane: loads and reductions overlap, and lane u works out scale u."""
        comptime per_lane = BLOCK // T.lanes
        comptime V = min(per_lane, 32)
        var first = begin * BLOCK + T.lane() * per_lane
        var top = Array[Float32, n](fill=0)
        comptime for u in range(n):
            top[u] = Self._largest[V, per_lane](
                token, first + u * BLOCK, factor
            )
        var amax: Float32 = 0
        comptime for u in range(n):
            var largest = T.max(top[u])
            amax = largest if T.lane() == u else amax
        amax = max(MIN_AMAX, amax)
        var unit = amax / E4M3_MAX
        var inverse = E4M3_MAX / amax
        comptime if Self.scale != "float32":
            unit = bitcast[DType.float32](power_of_two_at_least(unit) << 23)
            inverse = 1 / unit  # exact; 0 where the block holds an Inf
        if T.lane() < n:
            comptime if Self.packed:
                message.unsafe_store(
                    Self.hidden + begin + T.lane(),
                    UInt8(bitcast[DType.uint32](unit) >> 23),
                )
            else:
                typed[DType.float32](message, Self.hidden).unsafe_store(
                    begin + T.lane(), unit
                )
        comptime for u in range(n):
            Self._quantise[V, per_lane](
                token,
                first + u * BLOCK,
                factor,
                T.from_lane(inverse, u),
                message,
            )

    @staticmethod
    @always_inline
    def _largest[
        V: Int, count: Int
    ](token: Bytes, at: Int, factor: Float32) -> Float32:
        """Largest magnitude of the lane's channels of a block; NaN is ignored."""
        var top = SIMD[DType.float32, V](0)
        for i in range(0, count, V):
            var bits = magnitude(Self._load[V](token, at + i, factor))
            var known = bits.gt(0x7F800000).select(
                SIMD[DType.uint32, V](0), bits
            )
            top = max(top, bitcast[DType.float32](known))
        return top.reduce_max()

    @staticmethod
    @always_inline
    def _quantise[
        V: Int, count: Int
    ](token: Bytes, at: Int, factor: Float32, inverse: Float32, message: Bytes):
        """Write the lane's channels of a block."""
        for i in range(0, count, V):
            var x = Self._load[V](token, at + i, factor)
            var y = magnitude(x).eq(0x7F800000).select(x, x * inverse)
            message.unsafe_store[width=V, alignment=row_alignment[1, V]()](
                at + i, to_e4m3(y)
            )

    @staticmethod
    @always_inline
    def _load[
        V: Int
    ](token: Bytes, i: Int, factor: Float32) -> SIMD[DType.float32, V]:
        var bits = typed[DType.uint16](token, 0).unsafe_load[
            width=V, alignment=row_alignment[2, V](), invariant=False
        ](i)
        return bitcast[DType.float32](bits.cast[DType.uint32]() << 16) * factor

    @staticmethod
    @always_inline
    def pack[T: Team](token: Bytes, scales: Bytes, message: Bytes):
        """Pass a quantised token through.

        Parameters:
            T: Who works on it.

        Args:
            token: H e4m3 values.
            scales: Its scales.
            message: Where to.
        """
        copy_bytes[T](token, message, Self.token_bytes)
        copy_bytes[T](
            scales,
            message.unsafe_offset(Self.token_bytes),
            4 * Self.scales_per_token,
        )

    @staticmethod
    @always_inline
    def unpack[
        T: Team
    ](message: Bytes, token: Bytes, scales: Bytes, stride: Int):
        """Copy the message to a row and its scales.

        Parameters:
            T: Who works on it.

        Args:
            message: The message.
            token: The row.
            scales: The row's first scale.
            stride: Elements between two of its scales.
        """
        copy_bytes[T](message, token, Self.token_bytes)
        spread_scales[T, Self.scale_dtype, Self.scales_per_token](
            message.unsafe_offset(Self.token_bytes), scales, stride
        )
