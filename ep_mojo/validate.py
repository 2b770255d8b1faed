"""Checks of what a caller passes for one rank, before anything is written: shapes, element types, sizes.

Arrays may be NumPy arrays (bfloat16 and float8 as bit patterns or `ml_dtypes`) or MAX buffers: only their shapes and
types are read. The value of `num_tokens` is read where it is an int or a NumPy array. `name[r]` in a message is the
array of rank r.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .dtypes import storage_dtype
from .errors import DTypeError, ShapeError, UnsupportedError
from .formats import BlockwiseFP8

if TYPE_CHECKING:
    from .config import EPConfig


def dtype_name(array: Any) -> str:
    """Name of the element type of a NumPy array or a MAX buffer."""
    return array.dtype.name


def describe(array: Any) -> Described:
    """Element type and shape of `array` for a message, for example "float32 [3, 64]"."""
    return Described(f"{dtype_name(array)} {[int(n) for n in array.shape]}")


class Described(str):
    """A string whose repr has no quotes."""

    def __repr__(self) -> str:
        return str(self)


def check_array(name: str, array: Any, dtypes: Sequence[str], shape: Sequence[int | str], remedy: str = "") -> None:
    """Check element type and shape of an array.

    Args:
        name: Name for the message.
        array: A NumPy array or a MAX buffer.
        dtypes: Allowed types by MAX's names; "bfloat16" also stands for uint16 bits, a float8 type for uint8 bits.
        shape: Expected sizes; a string is a size that is free.
        remedy: What to do about a wrong shape.

    Raises:
        DTypeError: Not an array, or of another type.
        ShapeError: Of another shape.
    """
    if not hasattr(array, "dtype") or not hasattr(array, "shape"):
        raise DTypeError(
            f"{type(array).__name__} is not an array",
            field=name,
            value=array,
            allowed=" or ".join(dtypes),
            remedy="pass a NumPy array or a MAX buffer",
        )
    allowed = {d: storage_dtype(d).name for d in dtypes}
    bits = isinstance(array, np.ndarray) and dtype_name(array) in allowed.values()
    if dtype_name(array) not in allowed and not bits:
        words = (d if d == s else f"{d} (as {s} bit patterns)" for d, s in allowed.items())
        raise DTypeError(
            field=name,
            value=describe(array),
            allowed=" or ".join(words),
            remedy="convert it first; nothing is cast silently",
        )
    sizes = [int(n) for n in array.shape]
    if len(sizes) != len(shape) or any(isinstance(s, int) and s != n for s, n in zip(shape, sizes, strict=True)):
        words = "[" + ", ".join(str(s) for s in shape) + "]"
        raise ShapeError(
            field=name, value=describe(array), allowed=words, remedy=remedy or f"pass {name} of that shape"
        )


def check_rank_list(cfg: EPConfig, name: str, values: Any) -> list:
    """`values` as a list with one entry a rank.

    Raises:
        DTypeError: Not a sequence.
        ShapeError: Not R entries.
    """
    if isinstance(values, (str, bytes)) or not hasattr(values, "__len__") or not hasattr(values, "__getitem__"):
        raise DTypeError(
            field=name,
            value=values,
            allowed=f"a list of {cfg.n_ranks} arrays",
            remedy="pass one array a rank, in rank order",
        )
    if len(values) != cfg.n_ranks:
        raise ShapeError(
            field=f"len({name})",
            value=len(values),
            allowed=f"n_ranks = {cfg.n_ranks}",
            remedy="pass one array a rank, in rank order",
        )
    return list(values)


def check_inputs(
    cfg: EPConfig,
    rank: int,
    x: Any,
    topk_ids: Any,
    weights: Any = None,
    num_tokens: Any = None,
    x_scales: Any = None,
) -> int:
    """Check the inputs of dispatch on one rank.

    Args:
        cfg: The config.
        rank: For the messages.
        x: bfloat16 [T, H], or float8_e4m3fn [T, H] together with `x_scales`. T up to max_tokens_per_rank.
        topk_ids: int32 or int64 [T, K], any values.
        weights: float32 [T, K] or None.
        num_tokens: An int, or int32 [1], from 0 to T; None = T.
        x_scales: float32 [T, H / 128] (or, for ue8m0, int32 [T, ceil(H / 512)]) of tokens that are quantised already.

    Returns:
        The number of tokens that count: num_tokens where it can be read, else T.

    Raises:
        ShapeError, DTypeError: What is wrong, by name.
        UnsupportedError: Quantised tokens with a format that cannot take them.
    """
    if x_scales is not None:
        _check_prequantized(cfg)
    x_dtype = "bfloat16" if x_scales is None else "float8_e4m3fn"
    check_array(f"x[{rank}]", x, [x_dtype], ["T", cfg.hidden_size])
    rows = int(x.shape[0])
    if rows > cfg.max_tokens_per_rank:
        raise ShapeError(
            field=f"x[{rank}]",
            value=describe(x),
            allowed=f"0 to max_tokens_per_rank = {cfg.max_tokens_per_rank} rows",
            remedy="pass fewer tokens, or raise max_tokens_per_rank",
        )
    check_array(
        f"topk_ids[{rank}]", topk_ids, ["int32", "int64"], [rows, cfg.top_k], f"pass [T, top_k] with T = {rows} as in x"
    )
    if weights is not None:
        check_array(
            f"weights[{rank}]", weights, ["float32"], [rows, cfg.top_k], f"pass [T, top_k] with T = {rows} as in x"
        )
    if x_scales is not None:
        dtype = cfg.dispatch_format.scale_dtype
        check_array(f"x_scales[{rank}]", x_scales, [dtype], [rows, cfg.scales_per_token])
    return check_num_tokens(f"num_tokens[{rank}]", num_tokens, rows)


def check_num_tokens(name: str, num_tokens: Any, rows: int) -> int:
    """The value of `num_tokens` (None, an int, int32 [1]), checked to be in [0, rows]; `rows` if it cannot be read."""
    if num_tokens is None:
        return rows
    if isinstance(num_tokens, (int, np.integer)) and not isinstance(num_tokens, bool):
        value = int(num_tokens)
    else:
        check_array(name, num_tokens, ["int32"], [1])
        if not isinstance(num_tokens, np.ndarray):
            return rows
        value = int(num_tokens[0])
    if not 0 <= value <= rows:
        raise ShapeError(
            field=name, value=value, allowed=f"0 to {rows} (rows of x)", remedy="pass at most the number of rows of x"
        )
    return value


def check_expert_rows(cfg: EPConfig, rank: int, y: Any) -> None:
    """Check the expert rows of one rank: combine_dtype, shaped like `Handle.tokens` with H elements a row.

    Raises:
        ShapeError, DTypeError: What is wrong, by name.
    """
    shape = [cfg.rows_capacity, cfg.hidden_size]
    if cfg.output_layout == "expert_padded":
        shape = [cfg.n_groups, cfg.n_ranks * cfg.max_tokens_per_rank, cfg.hidden_size]
    check_array(f"y[{rank}]", y, [cfg.combine_dtype], shape, "pass one row for each row of dispatch's tokens")


def check_bias(cfg: EPConfig, rank: int, name: str, bias: Any, rows: int) -> None:
    """Check a bias of combine on one rank: bfloat16 or float32 [T, H].

    Raises:
        ShapeError, DTypeError: What is wrong, by name.
    """
    check_array(f"{name}[{rank}]", bias, ["bfloat16", "float32"], [rows, cfg.hidden_size])


def _check_prequantized(cfg: EPConfig) -> None:
    fmt = cfg.dispatch_format
    if not isinstance(fmt, BlockwiseFP8) or fmt.scale == "power_of_two":
        raise UnsupportedError(
            "takes no quantised tokens",
            field="dispatch_format",
            value=fmt,
            allowed='x_scales with BlockwiseFP8(scale="float32") or BlockwiseFP8(scale="ue8m0")',
            remedy="pass x as bfloat16 without x_scales, or use one of these formats",
        )
