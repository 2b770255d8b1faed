"""The experts of the programs: SwiGLU in float32 NumPy on the rows that dispatch gave, and the dense reference."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config import BY_SOURCE, EPConfig
from ..dtypes import float32_to_bfloat16_bits
from ..gate import sigmoid
from ..reference import dequantize, scales_by_row
from .baselines import available_cores


@dataclass(frozen=True)
class SwiGLU:
    """FFN weights of all experts. F is the width. y = w_down (silu(w_gate x) * (w_up x)).

    Attributes:
        w_gate: float32 [E, F, H].
        w_up: float32 [E, F, H].
        w_down: float32 [E, H, F].
    """

    w_gate: np.ndarray
    w_up: np.ndarray
    w_down: np.ndarray

    @staticmethod
    def random(seed: int, n_experts: int, hidden_size: int, width: int = 16) -> SwiGLU:
        """Uniform weights that keep the size of a token about 1. The same seed gives the same weights."""
        shapes = [(width, hidden_size), (width, hidden_size), (hidden_size, width)]
        weights = [np.empty((n_experts, *shape), np.float32) for shape in shapes]

        def fill(expert: int) -> None:
            rng = np.random.default_rng([seed, expert])
            for array in weights:
                rng.random(out=array[expert], dtype=np.float32)
                array[expert] -= np.float32(0.5)
                array[expert] *= np.float32((12 / array.shape[2]) ** 0.5)  # variance 1 / inputs

        with ThreadPoolExecutor() as pool:
            list(pool.map(fill, range(n_experts)))
        return SwiGLU(*weights)

    def __call__(self, expert: int, x: np.ndarray) -> np.ndarray:
        """Output of one expert: float32 [n, H] from float32 [n, H]."""
        g = x @ self.w_gate[expert].T
        return (g * sigmoid(g) * (x @ self.w_up[expert].T)) @ self.w_down[expert].T


def identity(expert: int, x: np.ndarray) -> np.ndarray:
    """The expert that gives back what it gets."""
    return x


def expert_outputs(cfg: EPConfig, rank: int, handle: Any, ffn: Any) -> np.ndarray:
    """Run the experts of one rank on the rows that it was given.

    Args:
        cfg: The config, any output layout.
        rank: The rank.
        handle: Object with the fields of `Handle` as NumPy arrays.
        ffn: `SwiGLU`, or any function (expert, float32 [n, H]) -> float32 [n, H].

    Returns:
        Rows for combine: combine_dtype (bfloat16 as uint16 bits), shaped like `handle.tokens` with H elements a row.
        With the layouts by source a row is already the weighted sum over the rank's experts.
    """
    flat = handle.tokens.reshape(-1, handle.tokens.shape[-1])
    y = np.zeros((flat.shape[0], cfg.hidden_size), np.uint16 if cfg.combine_dtype == "bfloat16" else np.float32)
    first = rank * cfg.n_local_experts

    def convert(rows: np.ndarray) -> np.ndarray:
        return float32_to_bfloat16_bits(rows) if cfg.combine_dtype == "bfloat16" else rows

    if cfg.output_layout in BY_SOURCE:
        rows = int(handle.row_offsets[-1])
        x = _rows(cfg, flat, handle.scales, slice(0, rows))
        total = np.zeros_like(x)
        for local in range(cfg.n_local_experts):
            named = first + local if cfg.output_layout == "gathered" else local
            row, k = np.nonzero(handle.local_ids[:rows] == named)
            for i in _without_repeats(row):  # the same expert twice is two terms of one row
                total[row[i]] += handle.local_weights[row[i], k[i], None] * ffn(first + local, x[row[i]])
        y[:rows] = convert(total)
        return y

    def run_group(group: int) -> None:
        start = int(handle.row_offsets[group])
        rows = slice(start, start + int(handle.counts[group]))
        if rows.start < rows.stop:
            with np.errstate(all="ignore"):  # it holds for one thread
                y[rows] = convert(ffn(first + group, _rows(cfg, flat, handle.scales, rows)))

    with ThreadPoolExecutor(available_cores()) as pool:
        list(pool.map(run_group, range(len(handle.counts))))
    return y.reshape(*handle.tokens.shape[:-1], cfg.hidden_size)


def _rows(cfg: EPConfig, flat: np.ndarray, scales: np.ndarray, rows: slice) -> np.ndarray:
    return dequantize(cfg, flat[rows], scales_by_row(cfg, scales)[rows])


def _without_repeats(values: np.ndarray) -> Iterator[np.ndarray]:
    """Split the indices of a sorted array into sets in which no value occurs twice."""
    starts = np.flatnonzero(np.r_[True, values[1:] != values[:-1]]) if len(values) else np.zeros(0, np.int64)
    nth = np.arange(len(values)) - np.repeat(starts, np.diff(np.r_[starts, len(values)]))
    for n in range(int(nth.max(initial=-1)) + 1):
        yield np.flatnonzero(nth == n)


def dense_moe(
    x: np.ndarray, topk_ids: np.ndarray, weights: np.ndarray, n_experts: int, ffn: Any
) -> tuple[np.ndarray, np.ndarray]:
    """The layer without any ranks, in float32: what the distributed one must give up to rounding.

    Args:
        x: float32 [N, H]: the tokens of all ranks, in rank order.
        topk_ids: Integers [N, K]; ids outside [0, n_experts) mean "no expert".
        weights: float32 [N, K].
        n_experts: E.
        ffn: As in `expert_outputs`.

    Returns:
        (out [N, H] = sum over k of weight * ffn(x); size [N] = sum over k of |weight| * norm(ffn(x))). Errors are
        measured against the size: unlike norm(out) it does not vanish where terms cancel.
    """
    out = np.zeros_like(x)
    size = np.zeros(x.shape[0], np.float32)

    def terms_of(expert: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        token, k = np.nonzero(topk_ids == expert)
        with np.errstate(all="ignore"):  # it holds for one thread
            y = ffn(expert, x[token])  # in the engine's order of rows, so that BLAS rounds alike
            w = weights[token, k]
            return token, w[:, None] * y, np.abs(w) * np.linalg.norm(y, axis=1)

    used = np.unique(topk_ids[(topk_ids >= 0) & (topk_ids < n_experts)])
    with ThreadPoolExecutor(available_cores()) as pool:
        for token, terms, sizes in pool.map(terms_of, used.tolist()):
            for i in _without_repeats(token):
                out[token[i]] += terms[i]
                size[token[i]] += sizes[i]
    return out, size
