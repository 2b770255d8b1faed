"""What a round of `gpu_stress.py` holds, in NumPy: the mirror of `stress_ops/law.mojo`, which says what and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

ROUND, SEED, RANK, MAX_DELAY_NS, N_RANKS, N_EXPERTS, TOP_K, MAX_TOKENS, ALIGNMENT, GATHERED = range(10)
LAW_WORDS = 16
DISPATCHES, COMBINES, ROWS, TOKENS, WRONG, FIRST = range(6)
FAULT = 12
FINDINGS_WORDS = 16
KINDS = (
    "none",
    "row_offsets",
    "expert_ids",
    "recv_num_tokens",
    "row_map",
    "recv_weights",
    "src_info of a row",
    "order of rows",
    "src_info where there is no row",
    "padding",
    "content of a row",
    "scale of a row",
    "sum of a token",
    "counts",
    "choice of a row",
    "weight of a row",
)
"""What a mismatch is about, by `WRONG_*` of `stress_ops/work.mojo`."""
FOR_TOKENS, FOR_MODE, FOR_IDS, FOR_WEIGHTS, FOR_VALUES, FOR_DELAY, FOR_ALL = range(1, 8)
FACTORS = np.array([1, 2, -1])
"""What expert e multiplies its rows by: the entry e mod 3."""

U64 = np.uint64


def mix(z: Any, v: Any) -> np.ndarray:
    """Hash one more number: uint64 arrays, which are broadcast."""
    with np.errstate(over="ignore"):
        h = np.asarray(z, U64) ^ (np.asarray(v, U64) * U64(0x9E3779B97F4A7C15) + U64(0x632BE59BD9B4E019))
        h = (h ^ (h >> U64(33))) * U64(0xFF51AFD7ED558CCD)
        h = (h ^ (h >> U64(33))) * U64(0xC4CEB9FE1A85EC53)
        return h ^ (h >> U64(33))


@dataclass(frozen=True)
class Routing:
    """One round's choices.

    Attributes:
        tokens: int [R]: T of each rank.
        ids: int32 [R, Tmax, K].
        weights: float32 [R, Tmax, K].
    """

    tokens: np.ndarray
    ids: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class Law:
    """The rounds of one config.

    Attributes:
        seed: Of everything.
        cfg: The config, whose sizes it takes.
        max_delay_ns: The longest delay.
    """

    seed: int
    cfg: Any
    max_delay_ns: int = 0

    def words(self, rank: int) -> np.ndarray:
        """A rank's own copy before the first round, int64 [LAW_WORDS]."""
        cfg, found = self.cfg, np.zeros(LAW_WORDS, np.int64)
        found[SEED], found[RANK], found[MAX_DELAY_NS] = self.seed, rank, self.max_delay_ns
        found[N_RANKS], found[N_EXPERTS], found[TOP_K] = cfg.n_ranks, cfg.n_experts, cfg.top_k
        found[MAX_TOKENS] = cfg.max_tokens_per_rank
        found[ALIGNMENT] = cfg.alignment if cfg.output_layout == "expert" else 0
        found[GATHERED] = cfg.output_layout == "gathered"
        return found

    def routing(self, number: int) -> Routing:
        """Choices and weights of all ranks in a round."""
        cfg = self.cfg
        R, E, K, Tmax = cfg.n_ranks, cfg.n_experts, cfg.top_k, cfg.max_tokens_per_rank
        base = mix(U64(self.seed), number)
        common = int(mix(base, FOR_ALL))
        ranks = np.arange(R)
        h = mix(mix(base, FOR_TOKENS), ranks)
        tokens = np.select(
            [h % U64(8) == 0, h % U64(8) == 1, h % U64(8) == 2],
            [0, Tmax, 1],
            ((h >> U64(8)) % U64(Tmax + 1)).astype(np.int64),
        )
        modes = (mix(mix(base, FOR_MODE), ranks) % U64(8)).astype(np.int64)
        if common & 1 == 0:
            modes[:] = (common >> 8) % 8
        choice = np.arange(Tmax * K)
        h = mix(mix(mix(base, FOR_IDS), ranks)[:, None], choice)
        ids = np.empty((R, Tmax * K), np.int64)
        for r in range(R):
            ids[r] = self._ids(int(modes[r]), h[r], common, R, E)
        h = mix(mix(mix(base, FOR_WEIGHTS), ranks)[:, None], choice)
        weights = ((h >> U64(8)) % U64(3)).astype(np.float32)
        shape = (R, Tmax, K)
        return Routing(tokens, ids.astype(np.int32).reshape(shape), weights.reshape(shape))

    @staticmethod
    def _ids(mode: int, h: np.ndarray, common: int, R: int, E: int) -> np.ndarray:
        low, high = h & U64(0xFFFFFFFF), h >> U64(32)

        def below(n: int, of: np.ndarray = low) -> np.ndarray:
            return ((of * U64(n)) >> U64(32)).astype(np.int64)

        if mode == 3:
            return below(E, (low * high) >> U64(32))
        if mode == 4:
            return np.full(h.shape, (common >> 16) % E, np.int64)
        if mode == 5:
            return (common >> 16) % R * (E // R) + below(E // R)
        if mode == 6:
            return below(E + 4) - 2
        if mode == 7:
            return np.where(high % U64(8) == 0, below(E), -1)
        return below(E)

    def values(self, number: int) -> np.ndarray:
        """Tokens of all ranks as whole numbers, int64 [R, Tmax, H]."""
        cfg = self.cfg
        R, Tmax, H = cfg.n_ranks, cfg.max_tokens_per_rank, cfg.hidden_size
        base = mix(mix(U64(self.seed), number), FOR_VALUES)
        word = mix(mix(base, np.arange(R * Tmax))[:, None], np.arange(H // 8))
        byte = ((word[..., None] >> (U64(8) * np.arange(8).astype(U64))) & U64(255)).astype(np.int64)
        byte = byte.reshape(R * Tmax, H)
        found = ((byte * 15) >> 8) - 7
        found[:, ::128] = np.where(byte[:, ::128] >= 128, 7, -7)
        return found.reshape(R, Tmax, H)

    def rows(self, numbers: range) -> np.ndarray:
        """Rows that each rank gets in these rounds, int64 [R]."""
        cfg, found = self.cfg, np.zeros(self.cfg.n_ranks, np.int64)
        token = np.arange(cfg.max_tokens_per_rank)
        for number in numbers:
            routing = self.routing(number)
            if cfg.output_layout == "gathered":
                found += routing.tokens.sum()
                continue
            there = (token < routing.tokens[:, None])[..., None]
            valid = there & (routing.ids >= 0) & (routing.ids < cfg.n_experts)
            found += np.bincount(routing.ids[valid] // cfg.n_local_experts, minlength=cfg.n_ranks)
        return found


def first_mismatch(findings: np.ndarray) -> str:
    """What the findings say of the first mismatch, "" if there was none."""
    if findings[WRONG] == 0:
        return ""
    kind, number, first, second, want, got = (int(v) for v in findings[FIRST : FIRST + 6])
    name = KINDS[kind] if 0 <= kind < len(KINDS) else f"kind {kind}"
    where = f"round {number}: {name} [{first}, {second}]"
    return f"{int(findings[WRONG])} mismatches, the first in {where} = {got}, not {want}"
