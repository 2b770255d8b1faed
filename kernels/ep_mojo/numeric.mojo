"""Float32 arithmetic on bfloat16 and float32 rows, with the rounding that the oracle fixes."""

from std.math import fma
from std.memory import bitcast
from std.sys import is_gpu

from .peers import Bytes, typed


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
    dtype: DType, width: Int
](row: Bytes, i: Int) -> SIMD[DType.float32, width]:
    """Load values of a row and widen them, exactly.

    Parameters:
        dtype: The row's type, bfloat16 or float32.
        width: How many.

    Args:
        row: The row.
        i: Index of the first value.

    Returns:
        The values.
    """
    comptime assert (
        dtype == DType.bfloat16 or dtype == DType.float32
    ), "rows are bfloat16 or float32"
    comptime if dtype == DType.bfloat16:
        var bits = typed[DType.uint16](row, 0).unsafe_load[
            width=width, alignment=row_alignment[2, width](), invariant=False
        ](i)
        return bitcast[DType.float32](bits.cast[DType.uint32]() << 16)
    else:
        return typed[DType.float32](row, 0).unsafe_load[
            width=width, alignment=row_alignment[4, width](), invariant=False
        ](i)


@always_inline
def store_f32[
    dtype: DType, width: Int, streams: Bool = False
](row: Bytes, i: Int, value: SIMD[DType.float32, width]):
    """Round values once (to nearest even) and store them. NaN stays NaN, subnormals stay subnormal.

    Parameters:
        dtype: The row's type, bfloat16 or float32.
        width: How many.
        streams: Whether the store goes past the caches; then it is aligned to its size, up to 64 bytes.

    Args:
        row: The row.
        i: Index of the first value.
        value: What to store.
    """
    comptime if dtype == DType.bfloat16:
        var bits = bitcast[DType.uint32](value)
        var rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        var nan = (bits & 0x7FFFFFFF).gt(0x7F800000)
        var out = nan.select((bits >> 16) | 0x40, rounded).cast[DType.uint16]()
        typed[DType.uint16](row, 0).unsafe_store[
            width=width,
            alignment=min(64, 2 * width) if streams else row_alignment[
                2, width
            ](),
            non_temporal=streams,
        ](i, out)
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
    dtype: DType, width: Int
](acc: SIMD[DType.float32, width], row: Bytes, i: Int, weight: Float32) -> SIMD[
    DType.float32, width
]:
    """Add a weighted row: fma(w, x, acc), rounded once.

    Parameters:
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
