"""Float32 arithmetic on bfloat16 and float32 rows, with the rounding that the oracle fixes."""

from std.math import fma
from std.memory import bitcast
from std.sys import inlined_assembly, is_gpu

from .peers import Bytes, typed
from .team import is_sm_90_or_newer


@always_inline
def quotient(a: Int, b: Int) -> Int:
    """`a // b` in 32 bits: a GPU takes many times as long for 64.

    Args:
        a: 0 to 2^32 - 1.
        b: 1 to 2^32 - 1.

    Returns:
        The quotient.
    """
    return Int(UInt32(a) // UInt32(b))


@always_inline
def remainder(a: Int, b: Int) -> Int:
    """`a % b` in 32 bits, see `quotient`.

    Args:
        a: 0 to 2^32 - 1.
        b: 1 to 2^32 - 1.

    Returns:
        The remainder.
    """
    return Int(UInt32(a) % UInt32(b))


@always_inline
def row_alignment[size: Int, width: Int]() -> Int:
    """How far `width` values of a row are aligned: rows begin at multiples of 16 bytes, which matters on a GPU.

    Parameters:
        size: Bytes of a value.
        width: How many are accessed at once, at a multiple of `width`.

    Returns:
        Bytes.
    """
    comptime if is_gpu():
        return min(16, size * width)
    else:
        return size


@always_inline
def load_f32[
    space: AddressSpace, //, dtype: DType, width: Int
](row: Pointer[UInt8, MutUntrackedOrigin, address_space=space], i: Int) -> SIMD[
    DType.float32, width
]:
    """Load values of a row and widen them, exactly.

    Parameters:
        space: Where the row is.
        dtype: The row's type, bfloat16 or float32.
        width: How many.

    Args:
        row: The row.
        i: Index of the first value, a multiple of `width`.

    Returns:
        The values.
    """
    comptime assert (
        dtype == DType.bfloat16 or dtype == DType.float32
    ), "rows are bfloat16 or float32"
    comptime if dtype == DType.bfloat16 and is_gpu() and width % 2 == 0:
        # One operation for each value.
        var pairs = typed[DType.uint32](row, 0).unsafe_load[
            width=width // 2,
            alignment=row_alignment[2, width](),
            invariant=False,
        ](i // 2)
        var even = bitcast[DType.float32](pairs << 16)
        var odd = bitcast[DType.float32](pairs & 0xFFFF0000)
        return rebind[SIMD[DType.float32, width]](even.interleave(odd))
    elif dtype == DType.bfloat16:
        var bits = typed[DType.uint16](row, 0).unsafe_load[
            width=width, alignment=row_alignment[2, width](), invariant=False
        ](i)
        return bitcast[DType.float32](bits.cast[DType.uint32]() << 16)
    else:
        return typed[DType.float32](row, 0).unsafe_load[
            width=width, alignment=row_alignment[4, width](), invariant=False
        ](i)


@always_inline
def _bf16_pairs[
    width: Int
](value: SIMD[DType.float32, width]) -> SIMD[DType.uint32, width // 2]:
    """Values as pairs of bfloat16, by the instruction that sm_90 has for that."""
    var pairs = SIMD[DType.uint32, width // 2](0)
    comptime for pair in range(width // 2):
        pairs[pair] = inlined_assembly[
            "cvt.rn.bf16x2.f32 $0, $1, $2;", UInt32, constraints="=r,f,f"
        ](value[2 * pair + 1], value[2 * pair])
    return pairs


@always_inline
def _bf16_bits[
    width: Int
](value: SIMD[DType.float32, width]) -> SIMD[DType.uint16, width]:
    """Values as bfloat16."""
    var bits = bitcast[DType.uint32](value)
    var rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    var nan = (bits & 0x7FFFFFFF).gt(0x7F800000)
    return nan.select((bits >> 16) | 0x40, rounded).cast[DType.uint16]()


@always_inline
def to_payload[
    dtype: DType, width: Int
](value: SIMD[DType.float32, width]) -> UInt64:
    """Round values once, as `store_f32` does, into 8 bytes.

    Parameters:
        dtype: The row's type, bfloat16 or float32.
        width: How many 8 bytes hold.

    Args:
        value: The values.

    Returns:
        The bytes, the first value lowest.
    """
    comptime if dtype == DType.float32:
        var bits = bitcast[DType.uint32](value).cast[DType.uint64]()
        return bits[0] | bits[1] << 32
    elif is_sm_90_or_newer():
        var pairs = _bf16_pairs(value).cast[DType.uint64]()
        return pairs[0] | pairs[1] << 32
    else:
        var bits = _bf16_bits(value).cast[DType.uint64]()
        return bits[0] | bits[1] << 16 | bits[2] << 32 | bits[3] << 48


@always_inline
def of_payload[
    dtype: DType, width: Int
](payload: UInt64) -> SIMD[DType.float32, width]:
    """Widen what 8 bytes hold, exactly.

    Parameters:
        dtype: The row's type, bfloat16 or float32.
        width: How many values they hold.

    Args:
        payload: The bytes, the first value lowest.

    Returns:
        The values.
    """
    comptime bits = 64 // width
    var value = SIMD[DType.float32, width](0)
    comptime for i in range(width):
        var one = (payload >> UInt64(bits * i)).cast[DType.uint32]()
        comptime if dtype == DType.bfloat16:
            one = one << 16
        value[i] = bitcast[DType.float32](one)
    return value


@always_inline
def store_f32[
    space: AddressSpace, //, dtype: DType, width: Int, streams: Bool = False
](
    row: Pointer[UInt8, MutUntrackedOrigin, address_space=space],
    i: Int,
    value: SIMD[DType.float32, width],
):
    """Round values once (to nearest even) and store them. NaN stays NaN, subnormals stay subnormal.

    NVIDIA GPUs from sm_90 on round by an instruction of theirs, to the same bits but for NaN, which has one pattern.

    Parameters:
        space: Where the row is.
        dtype: The row's type, bfloat16 or float32.
        width: How many.
        streams: Whether the store goes past the caches; then it is aligned to its size, up to 64 bytes.

    Args:
        row: The row.
        i: Index of the first value, a multiple of `width`.
        value: What to store.
    """
    comptime if dtype == DType.bfloat16 and is_sm_90_or_newer() and width % 2 == 0:
        typed[DType.uint32](row, 0).unsafe_store[
            width=width // 2, alignment=row_alignment[2, width]()
        ](i // 2, _bf16_pairs(value))
    elif dtype == DType.bfloat16:
        typed[DType.uint16](row, 0).unsafe_store[
            width=width,
            alignment=min(64, 2 * width) if streams else row_alignment[
                2, width
            ](),
            non_temporal=streams,
        ](i, _bf16_bits(value))
    else:
        typed[DType.float32](row, 0).unsafe_store[
            width=width,
            alignment=min(64, 4 * width) if streams else row_alignment[
                4, width
            ](),
            non_temporal=streams,
        ](i, value)


@always_inline
def accumulate[
    space: AddressSpace, //, dtype: DType, width: Int
](
    acc: SIMD[DType.float32, width],
    row: Pointer[UInt8, MutUntrackedOrigin, address_space=space],
    i: Int,
    weight: Float32,
) -> SIMD[DType.float32, width]:
    """Add a weighted row: fma(w, x, acc), rounded once.

    Parameters:
        space: Where the row is.
        dtype: The row's type.
        width: How many values.

    Args:
        acc: The sum so far.
        row: The row.
        i: Index of the first value.
        weight: The router's weight.

    Returns:
        The new sum.
    """
    return fma(
        SIMD[DType.float32, width](weight), load_f32[dtype, width](row, i), acc
    )
