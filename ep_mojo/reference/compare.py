"""Bitwise comparison of results with the reference; differences come as text that names the first differing element."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..config import EPConfig
from ..dtypes import as_bits, bfloat16_bits_to_float32
from .dispatch import ReferenceHandle, scales_by_row

FIELDS = (
    "tokens",
    "scales",
    "row_offsets",
    "counts",
    "expert_ids",
    "src_info",
    "local_ids",
    "local_weights",
    "recv_weights",
    "row_map",
    "recv_num_tokens",
)
"""Fields of a handle that are tensors."""


def array_difference(name: str, want: np.ndarray, got: np.ndarray, where: np.ndarray | None = None) -> str | None:
    """Compare two arrays bit by bit.

    Args:
        name: Name for the text.
        want: Expected.
        got: Of the same dtype (bit patterns or `ml_dtypes`) and shape.
        where: bool, broadcast from the left of the shape: elements that count. None = all.

    Returns:
        None, or what differs first: dtype, shape, or index, both values, and how many elements differ.
    """
    want, got = as_bits(want), as_bits(got)
    if want.dtype != got.dtype:
        return f"{name}: dtype {got.dtype}, expected {want.dtype}"
    if want.shape != got.shape:
        return f"{name}: shape {list(got.shape)}, expected {list(want.shape)}"
    bits = f"u{want.dtype.itemsize}"
    differs = np.ascontiguousarray(want).view(bits) != np.ascontiguousarray(got).view(bits)
    if where is not None:
        differs &= where.reshape(where.shape + (1,) * (want.ndim - where.ndim))
    if not differs.any():
        return None
    first = tuple(int(i) for i in np.argwhere(differs.reshape(want.shape))[0])
    return f"{name}{list(first)} = {got[first]}, expected {want[first]} ({int(differs.sum())} of {differs.size} differ)"


def defined_rows(cfg: EPConfig, handle: ReferenceHandle) -> np.ndarray:
    """bool [rows_capacity]: rows whose tokens and scales are specified, alignment padding included."""
    rows = np.arange(cfg.rows_capacity)
    if cfg.output_layout == "expert_padded":
        size = cfg.n_ranks * cfg.max_tokens_per_rank
        return rows % size < handle.counts[rows // size]
    return rows < handle.row_offsets[-1]


def handle_differences(cfg: EPConfig, want: ReferenceHandle, got: Any) -> list[str]:
    """Compare a handle with the reference's, leaving out rows whose content is unspecified.

    Args:
        cfg: The config.
        want: From `dispatch` of this package.
        got: Any object with the same fields as NumPy arrays; fields it lacks are left out, tokens excepted.

    Returns:
        What differs, one line a field; empty if equal bit for bit.
    """
    rows = defined_rows(cfg, want)
    found = []
    for field in FIELDS:
        if field != "tokens" and not hasattr(got, field):
            continue
        expected, actual, where = getattr(want, field), getattr(got, field), None
        if field == "tokens":
            where = rows.reshape(expected.shape[:-1])
        elif field == "scales" and cfg.scales_per_token:
            where = rows
            if np.shape(expected) == np.shape(actual):
                expected, actual = (scales_by_row(cfg, np.asarray(a)) for a in (expected, actual))
            else:
                where = None
        difference = array_difference(f"rank {want.rank} {field}", expected, actual, where)
        if difference:
            found.append(difference)
    return found


def output_difference(name: str, want: np.ndarray, got: np.ndarray) -> str | None:
    """Compare what combine returned: bit by bit, but any NaN equals any NaN. Float32, or bfloat16 as uint16 bits."""
    want, got = as_bits(want), as_bits(got)
    if want.dtype != got.dtype or want.shape != got.shape:
        return array_difference(name, want, got)
    nan = [np.isnan(bfloat16_bits_to_float32(a) if a.dtype == np.uint16 else a) for a in (want, got)]
    return array_difference(name, want, got, ~(nan[0] & nan[1]))
