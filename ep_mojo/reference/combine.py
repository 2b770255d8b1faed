"""Combine on lists over ranks in fixed arithmetic: float32, one rounding per fma or addition, one order."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..config import BY_SOURCE, EPConfig
from ..dtypes import as_bits, bfloat16_bits_to_float32, float32_to_bfloat16_bits, round_to_bfloat16
from ..errors import ConfigError, UnsupportedError
from ..formats import check_choice
from ..validate import check_array, check_bias, check_expert_rows, check_rank_list
from .arithmetic import add, fma
from .dispatch import ReferenceHandle


def combine(
    cfg: EPConfig,
    ys: list,
    handles: list[ReferenceHandle],
    *,
    reduce: str | None = None,
    weights: list | None = None,
    bias0: list | None = None,
    bias1: list | None = None,
) -> list[np.ndarray]:
    """Bring the experts' rows back and sum them with the router's weights.

        acc = ((0 + bias0) + bias1) + shared row, then
        reduce="source": acc = fma(w, x, acc) in ascending k
        reduce="expert": on each expert's rank p = fma(w, x, p) in ascending k from 0, p rounded to combine_dtype;
            acc = acc + p in ascending rank
        layouts by source: acc = acc + row in ascending rank, unweighted; with "gathered" all ranks give one

    Args:
        cfg: The config.
        ys: For each rank the expert rows in combine_dtype, shaped like the handle's tokens with H elements a row.
        handles: What `dispatch` returned.
        reduce: "expert" or "source"; None = that of the config, else "expert".
        weights: For each rank float32 [T, K] to use instead of dispatch's; reduce="source" only.
        bias0: For each rank bfloat16 (uint16 bits) or float32 [T, H], or None.
        bias1: Likewise.

    Returns:
        For each rank [T, H] in output_dtype (bfloat16 as uint16 bits); rows past num_tokens are zero.

    Raises:
        ShapeError, DTypeError: An input does not fit.
        ConfigError, UnsupportedError: `reduce` or `weights` do not go with the config.
    """
    mode = reduce_mode(cfg, reduce)
    ys, handles = check_rank_list(cfg, "y", ys), check_rank_list(cfg, "handles", handles)
    optional = {"weights": weights, "bias0": bias0, "bias1": bias1}
    weights, bias0, bias1 = (
        [None] * cfg.n_ranks if v is None else check_rank_list(cfg, name, v) for name, v in optional.items()
    )
    for r, handle in enumerate(handles):
        rows = handle.topk_ids.shape[0]
        check_expert_rows(cfg, r, ys[r])
        for name, bias in (("bias0", bias0[r]), ("bias1", bias1[r])):
            if bias is not None:
                check_bias(cfg, r, name, bias, rows)
        if weights[r] is not None:
            _check_weights(cfg, r, weights[r], mode, rows)
    rows32 = [_to_float32(y).reshape(-1, cfg.hidden_size) for y in ys]
    return [_combine_rank(cfg, s, rows32, handles, mode, weights[s], (bias0[s], bias1[s])) for s in range(cfg.n_ranks)]


def reduce_mode(cfg: EPConfig, reduce: str | None = None) -> str:
    """The reduce mode of a call: the argument, else the config's, else "expert".

    Raises:
        ConfigError: Not a mode, or not the one that the config has fixed.
    """
    check_choice("reduce", reduce, ("expert", "source", None))
    if reduce is not None and cfg.reduce not in (None, reduce):
        raise ConfigError(
            field="reduce",
            value=reduce,
            allowed=f"{cfg.reduce!r}, as in the config",
            remedy="leave it out, or make the config with reduce=None",
        )
    return reduce or cfg.reduce or "expert"


def cast_rows(cfg: EPConfig, rows: np.ndarray) -> np.ndarray:
    """float32 rows in combine_dtype: uint16 bits of bfloat16, rounded to nearest even, or float32 as they are."""
    return float32_to_bfloat16_bits(rows) if cfg.combine_dtype == "bfloat16" else np.asarray(rows, np.float32)


def _combine_rank(
    cfg: EPConfig, source: int, rows32: list, handles: list, mode: str, weights: Any, biases: tuple
) -> np.ndarray:
    own = handles[source]
    weights = own.weights if weights is None else weights
    out = np.zeros((own.topk_ids.shape[0], cfg.hidden_size), np.float32)
    for t in range(own.num_tokens):
        acc = np.zeros(cfg.hidden_size, np.float32)
        for bias in biases:
            if bias is not None:
                acc = add(acc, _to_float32(bias[t]))
        if cfg.shared_expert:
            acc = add(acc, rows32[source][int(own.row_offsets[0]) + t])
        if cfg.output_layout in BY_SOURCE or mode == "expert":
            for r, handle in enumerate(handles):
                partial = _partial(cfg, rows32[r], handle, source, t)
                if partial is not None:
                    acc = add(acc, partial)
        else:
            for k in range(cfg.top_k):
                expert = int(own.topk_ids[t, k])
                if not 0 <= expert < cfg.n_experts:
                    continue
                r = expert // cfg.n_local_experts
                w = np.float32(1) if weights is None else weights[t, k]
                acc = fma(w, rows32[r][handles[r].row_map[source, t, k]], acc)
        out[t] = acc
    return float32_to_bfloat16_bits(out) if cfg.output_dtype == "bfloat16" else out


def _partial(cfg: EPConfig, rows: np.ndarray, handle: ReferenceHandle, source: int, token: int) -> np.ndarray | None:
    """What an expert's rank sends for a token, or None where it has no expert of it."""
    if cfg.output_layout == "gathered":
        return rows[int(handle.row_offsets[source]) + token]
    partial = None
    for k in range(cfg.top_k):
        row = int(handle.row_map[source, token, k])
        if row < 0:
            continue
        if cfg.output_layout == "rank":
            return rows[row]
        before = np.zeros(cfg.hidden_size, np.float32) if partial is None else partial
        partial = fma(handle.recv_weights[source, token, k], rows[row], before)
    if partial is not None and cfg.combine_dtype == "bfloat16":
        partial = round_to_bfloat16(partial)
    return partial


def _to_float32(values: np.ndarray) -> np.ndarray:
    bits = as_bits(values)
    return bfloat16_bits_to_float32(bits) if bits.dtype == np.uint16 else bits


def _check_weights(cfg: EPConfig, rank: int, weights: Any, mode: str, rows: int) -> None:
    if cfg.output_layout in BY_SOURCE or mode != "source":
        raise UnsupportedError(
            f"combine takes weights only where the source sums (here: layout {cfg.output_layout!r}, reduce {mode!r})",
            field=f"weights[{rank}]",
            value=None,
            allowed='None, or reduce="source" with an expert layout',
            remedy='give the weights to dispatch, or use reduce="source"',
        )
    check_array(f"weights[{rank}]", weights, ["float32"], [rows, cfg.top_k])
