"""Float32 arithmetic on bfloat16 and float32 rows, with the rounding that the oracle fixes."""

from std.math import fma
from std.memory import bitcast
from std.sys import inlined_assembly, is_gpu

from .peers import Bytes, typed
from .team import is_sm_90_or_newer


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
def store_f32[
    dtype: DType, width: Int, streams: Bool = False
](row: Bytes, i: Int, value: SIMD[DType.float32, width]):
    """Round values once (to nearest even) and store them. NaN stays NaN, subnormals stay subnormal.

    NVIDIA GPUs from sm_90 on round by an instruction of theirs, to the same bits but for NaN, which has one pattern.

    Parameters:
        dtype: The row's type, bfloat16 or float32.
        width: How many.
        streams: Whether the store goes past the caches; then it is aligned to its size, up to 64 bytes.

    Args:
        row: The row.
        i: Index of the first value, a multiple of `width`.
        value: What to store.
    """
    comptime if dtype == DType.bfloat16 and is_sm_90_or_newer() and width % 2 == 0:
        var pairs = SIMD[DType.uint32, width // 2](0)
        comptime for pair in range(width // 2):
            pairs[pair] = inlined_assembly[
                "cvt.rn.bf16x2.f32 $0, $1, $2;", UInt32, constraints="=r,f,f"
            ](value[2 * pair + 1], value[2 * pair])
        typed[DType.uint32](row, 0).unsafe_store[
            width=width // 2, alignment=row_alignment[2, width]()
        ](i // 2, pairs)
    elif dtype == DType.bfloat16:
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
