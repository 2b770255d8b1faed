"""Blockwise fp8: one scale for each 128 channels."""

from __future__ import annotations

import numpy as np

from ..dtypes import E4M3_MAX, e4m3_bits_to_float32, float32_to_e4m3_bits
from ..formats import BLOCK_SIZE

AMAX_FLOOR = np.float32(1e-4)


def quantize(x: np.ndarray, scale: str = "float32") -> tuple[np.ndarray, np.ndarray]:
    """Quantise tokens by the rule of `BlockwiseFP8`.

    Args:
        x: float32 [T, H], H a multiple of 128.
        scale: Option of `BlockwiseFP8`.

    Returns:
        e4m3 bit patterns uint8 [T, H], and the scales: float32 [T, H / 128], or int32 [T, ceil(H / 512)] for "ue8m0".
    """
    tokens, hidden = x.shape
    blocks = np.asarray(x, np.float32).reshape(tokens, hidden // BLOCK_SIZE, BLOCK_SIZE)
    with np.errstate(all="ignore"):
        amax = np.fmax(AMAX_FLOOR, np.fmax.reduce(np.abs(blocks), axis=2))  # fmax ignores NaN
        scales = amax / np.float32(E4M3_MAX)
        if scale == "float32":
            scaled = blocks * (np.float32(E4M3_MAX) / amax)[:, :, None]
        else:
            scales = next_power_of_two(scales)
            scaled = blocks / scales[:, :, None]
    # Infinities stay the largest value of their sign, whatever their scale made of them.
    scaled = np.where(np.isinf(blocks), blocks, scaled)
    q = float32_to_e4m3_bits(scaled).reshape(tokens, hidden)
    return q, pack_ue8m0(scales) if scale == "ue8m0" else scales


def next_power_of_two(s: np.ndarray) -> np.ndarray:
    """2^ceil(log2(s)) of positive normal float32 (or infinite) values, from their bits."""
    bits = np.asarray(s, np.float32).view(np.uint32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
    return (exponent.astype(np.uint32) << np.uint32(23)).view(np.float32)


def pack_ue8m0(scales: np.ndarray) -> np.ndarray:
    """The exponent bytes (exponent + 127, infinity 255) of powers of two [T, S], four to an int32, first byte lowest.

    Returns:
        int32 [T, ceil(S / 4)]; missing bytes are zero.
    """
    tokens, count = scales.shape
    packed = np.zeros((tokens, -(-count // 4) * 4), np.uint8)
    packed[:, :count] = np.asarray(scales, np.float32).view(np.uint32) >> 23
    return packed.view("<i4")


def unpack_ue8m0(packed: np.ndarray, count: int) -> np.ndarray:
    """The inverse of `pack_ue8m0`: float32 [T, count]."""
    exponents = np.ascontiguousarray(packed, dtype="<i4").view(np.uint8)[:, :count]
    return (exponents.astype(np.uint32) << np.uint32(23)).view(np.float32)


def dequantize(tokens: np.ndarray, scales: np.ndarray, scale: str = "float32") -> np.ndarray:
    """Values of quantised tokens: q * s, in float32.

    Args:
        tokens: e4m3 bit patterns [rows, H].
        scales: [rows, S], as `quantize` gives them.
        scale: Option of `BlockwiseFP8`.

    Returns:
        float32 [rows, H].
    """
    rows, hidden = tokens.shape
    blocks = hidden // BLOCK_SIZE
    factors = unpack_ue8m0(scales, blocks) if scale == "ue8m0" else scales
    values = e4m3_bits_to_float32(tokens).reshape(rows, blocks, BLOCK_SIZE)
    with np.errstate(all="ignore"):
        return (values * factors[:, :, None]).reshape(rows, hidden)
