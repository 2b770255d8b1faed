"""What `ep-mojo bench` compares with: NumPy as a user would write it, and plain copies. All ranks in one process."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ..config import EPConfig
from ..errors import MissingDependencyError

BLOCK = 128


class NumPyRound:
    """A round in vectorised NumPy: one gather for dispatch, a gather and a weighted sum for each k for combine.

    It has no ranks to speak of: tokens go straight to the rows of their experts, in the order of the "expert" layout,
    and no message is written in between. Arrays that can be are allocated once.
    """

    def __init__(self, cfg: EPConfig, xs: list[np.ndarray], topk_ids: list[np.ndarray], weights: list[np.ndarray]):
        """Keep the inputs of all ranks as one array each."""
        self.cfg = cfg
        self.x = np.concatenate(xs)
        self.ids = np.concatenate(topk_ids)
        self.weights = np.concatenate(weights)
        self.rows = np.empty((self.ids.size, cfg.hidden_size), np.uint16)
        self.acc = np.empty((len(self.x), cfg.hidden_size), np.float32)
        self.wide = np.empty_like(self.acc)

    def dispatch(self) -> tuple[np.ndarray, np.ndarray]:
        """(rows uint16 [N*K, H] grouped by expert, position of every (token, k) among them)."""
        order = np.argsort(self.ids.ravel(), kind="stable")
        np.take(self.x, order // self.cfg.top_k, axis=0, out=self.rows, mode="clip")
        return self.rows, self._positions(order)

    def dispatch_fp8(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(e4m3 rows, float32 scales, positions)."""
        q, scales = quantize_ml_dtypes(self.x)
        order = np.argsort(self.ids.ravel(), kind="stable")
        token = order // self.cfg.top_k
        return np.take(q, token, axis=0), np.take(scales, token, axis=0), self._positions(order)

    def combine(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Weighted sums of bfloat16 rows in float32, rounded to bfloat16: uint16 [N, H]."""
        self.acc[:] = 0
        bits = self.wide.view(np.uint32)
        for k in range(self.cfg.top_k):
            np.left_shift(rows[positions[:, k]], np.uint32(16), out=bits, dtype=np.uint32)
            np.multiply(self.wide, self.weights[:, k, None], out=self.wide)
            np.add(self.acc, self.wide, out=self.acc)
        sums = self.acc.view(np.uint32)
        return ((sums + np.uint32(0x7FFF) + ((sums >> 16) & 1)) >> 16).astype(np.uint16)

    def _positions(self, order: np.ndarray) -> np.ndarray:
        positions = np.empty_like(order)
        positions[order] = np.arange(len(order))
        return positions.reshape(-1, self.cfg.top_k)


def quantize_ml_dtypes(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Blockwise fp8 of bfloat16 bits [N, H] with `ml_dtypes`: (float8_e4m3fn [N, H], float32 scales [N, H / 128]).

    Raises:
        MissingDependencyError: `ml_dtypes` is not installed.
    """
    ml_dtypes = _ml_dtypes()
    blocks = x.view(ml_dtypes.bfloat16).astype(np.float32).reshape(len(x), -1, BLOCK)
    amax = np.maximum(np.abs(blocks).max(axis=2), np.float32(1e-4))
    q = (blocks * (np.float32(448) / amax)[:, :, None]).astype(ml_dtypes.float8_e4m3fn)
    return q.reshape(x.shape), amax / np.float32(448)


def _ml_dtypes() -> Any:
    try:
        import ml_dtypes
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "ml_dtypes is not installed; it is what fp8 encoding is compared with",
            remedy="pip install '.[bench]' in the checkout",
        ) from error
    return ml_dtypes


def has_ml_dtypes() -> bool:
    """Whether the fp8 comparison can run."""
    try:
        _ml_dtypes()
    except MissingDependencyError:
        return False
    return True


class PlainCopy:
    """A copy of `count` bytes in memory that has been touched before, by one thread or by one a core."""

    def __init__(self, count: int):
        """Allocate and touch source and destination."""
        self.source = np.ones(count, np.uint8)
        self.target = np.zeros(count, np.uint8)
        self.cores = available_cores()
        self.pool = ThreadPoolExecutor(self.cores)
        cuts = [count * i // self.cores for i in range(self.cores + 1)]
        self.parts = [slice(a, b) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]

    def one_thread(self) -> None:
        """Copy."""
        np.copyto(self.target, self.source)

    def all_cores(self) -> None:
        """Copy, each thread its part."""
        list(self.pool.map(lambda part: np.copyto(self.target[part], self.source[part]), self.parts))


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
