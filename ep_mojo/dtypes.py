"""bfloat16 and float8_e4m3fn in NumPy, without further packages, and the way between NumPy and MAX buffers.

NumPy has neither type. Here an array of bfloat16 is an array of np.uint16 bit patterns and an array of float8_e4m3fn
one of np.uint8 bit patterns. Arrays of the `ml_dtypes` types are accepted wherever bit patterns are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import DTypeError

if TYPE_CHECKING:
    from max.driver import Buffer

STORAGE = {"bfloat16": np.dtype(np.uint16), "float8_e4m3fn": np.dtype(np.uint8), "float8_e5m2": np.dtype(np.uint8)}
"""NumPy types that hold the bits of types that NumPy lacks."""

E4M3_MAX = 448.0
E4M3_NAN = 0x7F
E4M3_MAX_BITS = 0x7E


def storage_dtype(name: str) -> np.dtype:
    """The NumPy type that holds elements of the MAX type `name` ("bfloat16" -> uint16, "float32" -> float32).

    Raises:
        DTypeError: There is no such type.
    """
    if name in STORAGE:
        return STORAGE[name]
    try:
        return np.dtype(name)
    except TypeError:
        raise DTypeError(
            field="dtype",
            value=name,
            allowed="bfloat16, float8_e4m3fn or a NumPy type name",
            remedy="check the spelling",
        ) from None


def as_bits(array: np.ndarray) -> np.ndarray:
    """`array`, or a view of its bits where its type is one of `ml_dtypes`. No copy."""
    array = np.asarray(array)
    return array.view(STORAGE[array.dtype.name]) if array.dtype.name in STORAGE else array


def float32_to_bfloat16_bits(x: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16: to nearest, ties to even; subnormals and infinities kept, NaN stays a (quiet) NaN.

    Args:
        x: float32, any shape.

    Returns:
        uint16 bit patterns, same shape.
    """
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32).reshape(np.shape(x))
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(is_nan, (bits >> np.uint32(16)) | np.uint32(0x40), rounded).astype(np.uint16)


def bfloat16_bits_to_float32(bits: np.ndarray) -> np.ndarray:
    """Widen bfloat16 bit patterns (uint16, or an ml_dtypes array) to float32, exactly. Same shape."""
    bits = as_bits(bits)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def round_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 values rounded to bfloat16, still float32."""
    return bfloat16_bits_to_float32(float32_to_bfloat16_bits(x))


def _e4m3_table() -> np.ndarray:
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    value = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10))
    value[(code & 0x7F) == E4M3_NAN] = np.nan
    return np.where(code >> 7, -value, value).astype(np.float32)


E4M3_TABLE = _e4m3_table()
"""float32 [256]: the value of every float8_e4m3fn bit pattern."""


def e4m3_bits_to_float32(bits: np.ndarray) -> np.ndarray:
    """Widen float8_e4m3fn bit patterns (uint8, or an ml_dtypes array) to float32, exactly. Same shape."""
    return E4M3_TABLE[as_bits(bits)]


def float32_to_e4m3_bits(x: np.ndarray) -> np.ndarray:
    """Round float32 to float8_e4m3fn: to nearest, ties to even, saturating.

    Beyond +-448, infinities included, becomes +-448 (0x7E, 0xFE); every NaN becomes 0x7F; -0.0 keeps its sign.

    Args:
        x: float32, any shape.

    Returns:
        uint8 bit patterns, same shape.
    """
    x = np.asarray(x, dtype=np.float32)
    magnitude = np.fmin(np.abs(x), np.float32(E4M3_MAX))  # NaN becomes 448 here, and is put right at the end
    exponent = np.maximum(np.frexp(magnitude)[1] - 1, -6)
    # In units of the last place r is 8..16, or 0..8 among the subnormals; 16 carries into the exponent by itself.
    r = np.rint(np.ldexp(magnitude, 3 - exponent)).astype(np.int32)
    code = np.where(magnitude == 0, 0, ((exponent + 7) << 3) + r - 8)
    code = code | (np.signbit(x).astype(np.int32) << 7)
    return np.where(np.isnan(x), E4M3_NAN, code).astype(np.uint8)


def to_buffer(array: np.ndarray, dtype_name: str | None = None) -> Buffer:
    """A MAX buffer in host memory with the elements of `array`.

    The buffer may share memory with `array`: keep the array as it is while the buffer is used.

    Args:
        array: Any shape, zero sizes included. bfloat16 and float8 as bit patterns or ml_dtypes arrays.
        dtype_name: MAX type of the elements; None = that of the array. "bfloat16" and the float8 types reinterpret
            the bits, everything else must be the array's own type.

    Raises:
        DTypeError: The array's type does not hold `dtype_name`.
    """
    from max.driver import Buffer
    from max.dtype import DType

    array = np.asarray(array)
    name = dtype_name or array.dtype.name
    bits = as_bits(array)
    if bits.dtype != storage_dtype(name) or (array.dtype.name in STORAGE and array.dtype.name != name):
        raise DTypeError(
            field="array",
            value=array.dtype.name,
            allowed=f"{storage_dtype(name)} (the bits of {name})" if name in STORAGE else name,
            remedy=f"convert the array to {name} first",
        )
    bits = np.ascontiguousarray(bits).reshape(bits.shape)
    dtype = getattr(DType, name)
    if bits.size == 0:
        return Buffer(dtype, bits.shape)
    if not bits.flags.writeable:
        bits = bits.copy()
    if name in STORAGE or name == "bool":
        return Buffer.from_numpy(bits.view(np.uint8 if name == "bool" else bits.dtype)).view(dtype, bits.shape)
    return Buffer.from_numpy(bits)


def to_numpy(buffer: Any) -> np.ndarray:
    """The elements of a MAX buffer; bfloat16 as uint16 bit patterns and float8 as uint8 bit patterns.

    A buffer on another device is copied to the host; one on the host may share its memory with the result.
    """
    from max.driver import CPU
    from max.dtype import DType

    if isinstance(buffer, np.ndarray):
        return as_bits(buffer)
    name = buffer.dtype.name
    shape = tuple(int(n) for n in buffer.shape)
    if 0 in shape:
        return np.empty(shape, storage_dtype(name))
    if not buffer.device.is_host:
        buffer = buffer.to(CPU())
    if name in STORAGE:
        buffer = buffer.view(getattr(DType, STORAGE[name].name), shape)
    return buffer.to_numpy()
