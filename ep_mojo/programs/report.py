"""Tables and figures as text, and what the programs count."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, TextIO

import numpy as np

from .. import layout
from ..config import EPConfig

BARS = " ▁▂▃▄▅▆▇█"
DIGITS = " 123456789"
TABLE_BYTES = 2 + 4
"""Bytes of one choice in a routing table: an id and a weight."""


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns of text, the first one to the left, the others to the right."""
    cells = [list(map(str, row)) for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        first, *others = (
            text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(["  " + first, *others]).rstrip())
    return "\n".join(lines)


def bars(values: np.ndarray, stream: TextIO | None = None) -> str:
    """One character a value, its height in proportion to the largest; digits where the terminal has no Unicode."""
    encoding = (getattr(stream or sys.stdout, "encoding", None) or "ascii").lower()
    symbols = BARS if encoding.replace("-", "").startswith("utf") else DIGITS
    top = max(int(np.max(values, initial=0)), 1)
    steps = len(symbols) - 1
    return "".join(symbols[0 if v <= 0 else max(1, round(int(v) * steps / top))] for v in values)


def size(count: float) -> str:
    """Bytes as MB (10^6), below one as kB (10^3)."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def number_of(count: int, noun: str) -> str:
    """ "1 token", "2 tokens"."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def two_digits(value: float) -> str:
    """A number with two significant digits, or all digits before the point: "0.15", "1.5", "15", "150"."""
    places = 1 - math.floor(math.log10(abs(value))) if value else 1
    return f"{value:.{max(places, 0)}f}"


def traffic_matrix(cfg: EPConfig, handles: Sequence[Any]) -> np.ndarray:
    """Tokens that went from rank to rank, as the receivers saw them: int64 [R, R], row = source."""
    if cfg.output_layout == "gathered":
        return np.stack([h.recv_num_tokens for h in handles], axis=1).astype(np.int64)
    arrived = [(h.row_map >= 0).any(axis=2).sum(axis=1) for h in handles]
    return np.stack(arrived, axis=1).astype(np.int64)


def rows_per_expert(cfg: EPConfig, handles: Sequence[Any]) -> np.ndarray:
    """Rows that each expert got, int64 [E]."""
    if cfg.output_layout == "gathered":  # all ranks have all choices
        ids = handles[0].local_ids[: int(handles[0].row_offsets[-1])]
        return np.bincount(ids[ids >= 0], minlength=cfg.n_experts).astype(np.int64)
    if cfg.output_layout != "rank":
        return np.concatenate([h.counts for h in handles]).astype(np.int64)
    found = [h.local_ids[: int(h.row_offsets[-1])] for h in handles]
    return np.concatenate([np.bincount(ids[ids >= 0], minlength=cfg.n_local_experts) for ids in found])


def pairs(cfg: EPConfig, topk_ids: Sequence[np.ndarray]) -> np.ndarray:
    """Messages from rank to other rank: int64 [R, R], row = source, 0 from a rank to itself.

    Args:
        cfg: The config.
        topk_ids: int32 [T, K] of each rank.
    """
    R = cfg.n_ranks
    found = np.zeros((R, R), np.int64)
    for source, ids in enumerate(topk_ids):
        if cfg.output_layout == "gathered":
            found[source] = len(ids)
            continue
        owner = np.where((ids >= 0) & (ids < cfg.n_experts), ids // cfg.n_local_experts, -1)
        found[source] = [(owner == r).any(axis=1).sum() for r in range(R)]
    np.fill_diagonal(found, 0)
    return found


def largest_sum(each: np.ndarray) -> int:
    """The most that one rank sends or receives, of int [R, R] from rank (row) to rank."""
    return int(max(each.sum(axis=1).max(), each.sum(axis=0).max()))


def bytes_moved(cfg: EPConfig, topk_ids: Sequence[np.ndarray]) -> dict[str, dict[str, int]]:
    """Bytes of one round over the links between ranks (what a rank keeps for itself is left out).

        ours        dispatch: one message for each (token, other rank with an expert of it), and the routing table,
                    T * K * `TABLE_BYTES`, to every other rank; combine: one partial sum for each such pair
        per_expert  dispatch: one message for each (token, expert elsewhere); combine: one row for each of them
                    (k of the same expert count each)

    Returns:
        {"ours": {"dispatch", "combine", "total"}, "per_expert": {the same}}.
    """
    rows = messages = 0
    for source, ids in enumerate(topk_ids):
        valid = (ids >= 0) & (ids < cfg.n_experts)
        remote = valid & (ids // cfg.n_local_experts != source)
        rows += int(remote.sum())
        messages += _distinct(np.where(remote, ids, -1))
    payload = cfg.dispatch_format.message_bytes(cfg.hidden_size)
    split = {
        "ours": tuple(int(part.sum()) for part in _traffic(cfg, topk_ids)),
        "per_expert": (messages * (payload + layout.EXPERT_SLOTS_HEADER), rows * cfg.combine_row_bytes),
    }
    return {name: {"dispatch": d, "combine": c, "total": d + c} for name, (d, c) in split.items()}


def sent_gb_s(cfg: EPConfig, moved: int, us: float) -> float:
    """What a GPU sends on average, in 10^9 bytes a second: `moved` bytes of all ranks in `us` microseconds."""
    return moved / cfg.n_ranks / us / 1e3


def busiest(cfg: EPConfig, topk_ids: Sequence[np.ndarray]) -> int:
    """The most bytes that one rank sends, or receives, in a round: "ours" of `bytes_moved`."""
    return largest_sum(sum(_traffic(cfg, topk_ids)))


def _traffic(cfg: EPConfig, topk_ids: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Bytes from rank (row) to other rank, int64 [R, R], in dispatch and in combine."""
    each = pairs(cfg, topk_ids)
    tables = np.repeat([[TABLE_BYTES * ids.size] for ids in topk_ids], cfg.n_ranks, axis=1)
    np.fill_diagonal(tables, 0)
    payload = cfg.dispatch_format.message_bytes(cfg.hidden_size)
    return each * payload + tables, each.T * cfg.combine_row_bytes


def _distinct(values: np.ndarray) -> int:
    """Distinct values other than -1 in each row, summed over the rows."""
    ordered = np.sort(values, axis=1)
    new = np.ones(ordered.shape, bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return int((new & (ordered >= 0)).sum())
