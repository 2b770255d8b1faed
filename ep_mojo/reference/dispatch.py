"""Dispatch on lists over ranks, slow and obvious."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config import BY_SOURCE, EPConfig
from ..dtypes import as_bits, bfloat16_bits_to_float32, storage_dtype
from ..errors import CapacityError, UnsupportedError
from ..formats import BF16, BlockwiseFP8, CustomFormat
from ..validate import check_inputs, check_rank_list
from . import fp8


@dataclass
class ReferenceHandle:
    """What dispatch gives on one rank, as NumPy arrays: the same fields and shapes as `Handle`.

    rows is cfg.rows_capacity, S the scales of a row. Where there is no row, tokens and scales are zero here (in the
    engine they are zero in padding that alignment asks for, and unspecified elsewhere).

    Attributes:
        rank: The rank.
        tokens: [rows, H], or [n_groups, R * Tmax, H] for "expert_padded"; bfloat16 as uint16, e4m3 as uint8 bits.
        scales: [rows, S], or with scales_layout="column" [S, rows], "expert_padded" [G*S, rows/G]; float32 [0, 0]
            without scales.
        row_offsets: uint32 [n_groups + 1], or [R + 1] by source ("rank", "gathered").
        counts: int32 [n_groups], or [R] by source: true number of rows of each group.
        expert_ids: int32 [n_groups]: global expert id, E for the shared expert; [0] by source.
        src_info: int32 [rows, 2]: (source rank * Tmax + token, k), k = -1 for shared rows and by source; (-1, -1) = no
            row.
        local_ids: int32 [rows, K]: "rank" local expert ids, -1 = not on this rank; "gathered" global ids, -1 = none;
            else [0, 0].
        local_weights: float32 [rows, K]: "rank" 0 where the id is -1; "gathered" as they came; else [0, 0].
        recv_weights: float32 [R, Tmax, K]: every rank's weights, 1 where it gave none, 0 past its tokens; with
            slots="expert" all 0, because weights do not travel; "gathered" [0, 0, 0].
        row_map: int32 [R, Tmax, K]: the row of (source, token, k), or -1. "rank": at the first local k only;
            "gathered" [0, 0, 0].
        recv_num_tokens: int32 [R]: tokens of every rank; with slots="expert" one more than the highest token that came
            from it, because no more is known.
        topk_ids: [T, K] as given.
        weights: float32 [T, K] as given, or None.
        num_tokens: Tokens that count, an int up to T.
    """

    rank: int
    tokens: np.ndarray
    scales: np.ndarray
    row_offsets: np.ndarray
    counts: np.ndarray
    expert_ids: np.ndarray
    src_info: np.ndarray
    local_ids: np.ndarray
    local_weights: np.ndarray
    recv_weights: np.ndarray
    row_map: np.ndarray
    recv_num_tokens: np.ndarray
    topk_ids: np.ndarray
    weights: np.ndarray | None
    num_tokens: int


def dispatch(
    cfg: EPConfig,
    xs: list,
    topk_ids: list,
    weights: list | None = None,
    num_tokens: list | None = None,
    x_scales: list | None = None,
    input_scale: float | list | None = None,
) -> list[ReferenceHandle]:
    """Send every token to the ranks of its experts.

    Args:
        cfg: The config.
        xs: For each rank bfloat16 [T, H] as uint16 bits, or e4m3 bits uint8 [T, H] with `x_scales`.
        topk_ids: For each rank int32 or int64 [T, K]; ids outside [0, E) mean "no expert".
        weights: For each rank float32 [T, K] or None.
        num_tokens: For each rank None, an int, or int32 [1]: rows past it are ignored.
        x_scales: For each rank the scales of tokens that are quantised already; they are copied unchanged.
        input_scale: A factor for the float32 tokens before they are quantised, one for all or one a rank.

    Returns:
        One handle a rank.

    Raises:
        ShapeError, DTypeError: An input does not fit the config.
        CapacityError: A rank gets more rows than its output holds.
        UnsupportedError: The format cannot do this, or the reference does not know it.
    """
    xs, topk_ids = check_rank_list(cfg, "x", xs), check_rank_list(cfg, "topk_ids", topk_ids)
    weights, num_tokens, x_scales = (
        [None] * cfg.n_ranks if v is None else check_rank_list(cfg, name, v)
        for name, v in (("weights", weights), ("num_tokens", num_tokens), ("x_scales", x_scales))
    )
    factors = check_rank_list(cfg, "input_scale", input_scale) if isinstance(input_scale, (list, tuple)) else None
    factors = factors or [input_scale] * cfg.n_ranks
    counts = [
        check_inputs(cfg, r, xs[r], topk_ids[r], weights[r], num_tokens[r], x_scales[r]) for r in range(cfg.n_ranks)
    ]
    encoded = [encode(cfg, xs[r], x_scales[r], factors[r]) for r in range(cfg.n_ranks)]
    return [_receive(cfg, rank, encoded, topk_ids, weights, counts) for rank in range(cfg.n_ranks)]


def encode(
    cfg: EPConfig, x: np.ndarray, x_scales: np.ndarray | None, factor: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """One rank's tokens in the dispatch format.

    Args:
        cfg: The config.
        x: bfloat16 bits [T, H], or e4m3 bits with `x_scales`.
        x_scales: [T, S], or None.
        factor: Input scale, or None.

    Returns:
        (tokens [T, elements], scales [T, S]) in storage types.
    """
    fmt, x = cfg.dispatch_format, as_bits(x)
    if factor is not None and (isinstance(fmt, BF16) or x_scales is not None):
        raise UnsupportedError(
            "nothing is quantised here",
            field="input_scale",
            value=factor,
            allowed="None with BF16 and with tokens that are quantised already",
            remedy="scale the tokens before dispatch",
        )
    if x_scales is not None:
        return x, np.asarray(x_scales)
    if isinstance(fmt, BF16):
        return x, np.zeros((x.shape[0], 0), np.float32)
    with np.errstate(all="ignore"):
        x32 = bfloat16_bits_to_float32(x) * np.float32(1 if factor is None else factor)
    if isinstance(fmt, BlockwiseFP8):
        return fp8.quantize(x32, fmt.scale)
    if fmt.encode is None:
        raise _unknown_format(fmt, "encode")
    tokens, scales = fmt.encode(x32)
    return as_bits(tokens), np.asarray(scales).reshape(x.shape[0], cfg.scales_per_token)


def dequantize(cfg: EPConfig, tokens: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float32 values of the rows that dispatch gave, for experts that compute in float32.

    Args:
        cfg: The config.
        tokens: `ReferenceHandle.tokens`, or a slice of rows [rows, elements].
        scales: Those of these rows, [rows, S]: see `scales_by_row`.

    Returns:
        float32, shaped like `tokens` with H elements a row.

    Raises:
        UnsupportedError: A `CustomFormat` without `decode`.
    """
    fmt, tokens = cfg.dispatch_format, as_bits(tokens)
    if isinstance(fmt, BF16):
        return bfloat16_bits_to_float32(tokens)
    rows = tokens.reshape(-1, tokens.shape[-1])
    if isinstance(fmt, BlockwiseFP8):
        values = fp8.dequantize(rows, np.ascontiguousarray(scales), fmt.scale)
    elif fmt.decode is None:
        raise _unknown_format(fmt, "decode")
    else:
        values = fmt.decode(rows, scales)
    return values.reshape(*tokens.shape[:-1], cfg.hidden_size)


def scales_by_row(cfg: EPConfig, scales: np.ndarray) -> np.ndarray:
    """[rows, S] from the scales of a handle, in whichever layout the config has them."""
    if cfg.scales_per_token == 0 or cfg.dispatch_format.scales_layout == "row":
        return scales
    if cfg.output_layout == "expert_padded":
        blocks = scales.reshape(cfg.n_groups, cfg.scales_per_token, -1)
        return blocks.swapaxes(1, 2).reshape(-1, cfg.scales_per_token)
    return scales.T


def _unknown_format(fmt: CustomFormat, function: str) -> UnsupportedError:
    return UnsupportedError(
        "the reference does not know this format",
        field="dispatch_format",
        value=fmt,
        allowed=f"BF16, BlockwiseFP8, or a CustomFormat with `{function}`",
        remedy=f"give CustomFormat({function}=...) a NumPy function",
    )


def _receive(
    cfg: EPConfig, rank: int, encoded: list, topk_ids: list, weights: list, counts: list[int]
) -> ReferenceHandle:
    n_ranks, tmax, top_k, n_local = cfg.n_ranks, cfg.max_tokens_per_rank, cfg.top_k, cfg.n_local_experts
    first = rank * n_local
    recv_weights = np.zeros((n_ranks, tmax, top_k), np.float32)
    row_map = np.full((n_ranks, tmax, top_k), -1, np.int32)
    for s in range(n_ranks):
        recv_weights[s, : counts[s]] = 1.0 if weights[s] is None else weights[s][: counts[s]]

    # (source, token, k) of every row, by group, in the order of the contract: source rank, then token, then k.
    by_rank, gathered = cfg.output_layout in BY_SOURCE, cfg.output_layout == "gathered"
    shared = int(cfg.shared_expert)
    groups: list[list[tuple[int, int, int]]] = [[] for _ in range(n_ranks if by_rank else cfg.n_groups)]
    if shared:
        groups[0] = [(rank, t, -1) for t in range(counts[rank])]
    for s in range(n_ranks):
        for t in range(counts[s]):
            if gathered:
                groups[s].append((s, t, -1))
                continue
            for k in range(top_k):
                local = int(topk_ids[s][t, k]) - first
                if not 0 <= local < n_local:
                    continue
                if by_rank:
                    groups[s].append((s, t, k))
                    break
                groups[shared + local].append((s, t, k))

    starts, end = _starts(cfg, rank, [len(g) for g in groups])
    rows = cfg.rows_capacity
    tokens = np.zeros((rows, cfg.token_elements), storage_dtype(cfg.dispatch_format.token_dtype))
    scales = np.zeros((rows, cfg.scales_per_token), cfg.dispatch_format.scale_dtype or np.float32)
    src_info = np.full((rows, 2), -1, np.int32)
    local_ids = np.full((rows if by_rank else 0, top_k if by_rank else 0), -1, np.int32)
    local_weights = np.zeros(local_ids.shape, np.float32)
    for start, group in zip(starts, groups, strict=True):
        for row, (s, t, k) in enumerate(group, start):
            tokens[row], scales[row] = encoded[s][0][t], encoded[s][1][t]
            src_info[row] = s * tmax + t, -1 if by_rank else k
            if k >= 0:
                row_map[s, t, k] = row
            if by_rank:
                local = topk_ids[s][t].astype(np.int64) - (0 if gathered else first)
                here = (local >= 0) & (local < (cfg.n_experts if gathered else n_local))
                local_ids[row] = np.where(here, local, -1)
                local_weights[row] = np.where(here | gathered, recv_weights[s, t], 0)
    if gathered:
        recv_weights, row_map = np.zeros((0, 0, 0), np.float32), np.zeros((0, 0, 0), np.int32)

    recv_num_tokens = np.array(counts, np.int32)
    if cfg.slots == "expert":
        recv_weights[:] = 0
        here = (row_map >= 0).any(axis=2)
        recv_num_tokens[:] = [max(np.flatnonzero(h), default=-1) + 1 for h in here]

    expert_ids = [] if by_rank else [cfg.n_experts] * shared + [first + e for e in range(n_local)]
    if cfg.output_layout == "expert_padded":
        tokens = tokens.reshape(cfg.n_groups, n_ranks * tmax, cfg.token_elements)
    if cfg.scales_per_token == 0:
        scales = np.zeros((0, 0), np.float32)
    elif cfg.dispatch_format.scales_layout == "column":
        if cfg.output_layout == "expert_padded":
            blocks = scales.reshape(cfg.n_groups, -1, cfg.scales_per_token)
            scales = np.ascontiguousarray(blocks.swapaxes(1, 2)).reshape(cfg.n_groups * cfg.scales_per_token, -1)
        else:
            scales = np.ascontiguousarray(scales.T)
    return ReferenceHandle(
        rank=rank,
        tokens=tokens,
        scales=scales,
        row_offsets=np.array([*starts, end], np.uint32),
        counts=np.array([len(g) for g in groups], np.int32),
        expert_ids=np.array(expert_ids, np.int32),
        src_info=src_info,
        local_ids=local_ids,
        local_weights=local_weights,
        recv_weights=recv_weights,
        row_map=row_map,
        recv_num_tokens=recv_num_tokens,
        topk_ids=topk_ids[rank],
        weights=weights[rank],
        num_tokens=counts[rank],
    )


def _starts(cfg: EPConfig, rank: int, counts: list[int]) -> tuple[list[int], int]:
    """First row of every group, and the end of the last."""
    if cfg.output_layout == "expert_padded":
        size = cfg.n_ranks * cfg.max_tokens_per_rank
        for g, count in enumerate(counts):
            if count > size:
                raise CapacityError(
                    f"rank {rank}: {count} rows arrived for local expert {g}",
                    field="rows of one expert (n_ranks * max_tokens_per_rank)",
                    value=size,
                    allowed=f"at least {count}",
                    remedy="raise max_tokens_per_rank, or use output_layout='expert'",
                )
        return [g * size for g in range(len(counts))], len(counts) * size
    starts, end = [], 0
    for count in counts:
        starts.append(end)
        end += -(-count // cfg.alignment) * cfg.alignment
    if end > cfg.rows_capacity:
        raise CapacityError(
            f"rank {rank}: {end} rows arrived (padding included)",
            field="max_rows",
            value=cfg.rows_capacity,
            allowed=f"at least {end}",
            remedy="raise max_rows, or leave it None for the worst case",
        )
    return starts, end
