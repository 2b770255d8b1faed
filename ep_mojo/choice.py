"""Routed or gathered? An estimate of a round of each, from the bytes that a GPU receives and measured constants.

Routed, a token goes to the ranks of its experts, E[h] of R; gathered, to all of them. Both ways round, dispatch and
combine, with M bytes of a message and C bytes of a row of combine:

    bytes = T * h * (R - 1) / R * (M + C)       us = launch + bytes / rate

h = R when gathered. Routed, with K different experts drawn evenly, h = R * (1 - binomial(E - L, K) / binomial(E, K)).
Constants are of 2 x H200 (docs/performance.md); for more GPUs the estimate is an extrapolation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .config import EPConfig
from .formats import check_int

ROUTED_LAUNCHES_US = 45.0
"""A replayed round of dispatch and combine of next to no tokens."""
GATHERED_LAUNCHES_US = 31.0
"""The same of all_gather_v and reduce_scatter_v."""
RATE_GB_S = 270.0
"""What a GPU receives in small rounds."""


@dataclass(frozen=True)
class Estimate:
    """What a round takes.

    Attributes:
        ranks: Ranks that a token goes to, on average, its own included.
        rows: Rows that a rank receives: what its experts work on.
        bytes: That reach a GPU over its links.
        us: Microseconds.
    """

    ranks: float
    rows: float
    bytes: float
    us: float


@dataclass(frozen=True)
class Choice:
    """What `Communicator.choose` found.

    Attributes:
        tokens: T that it was asked for.
        routed, gathered: The estimates.
    """

    tokens: int
    routed: Estimate
    gathered: Estimate

    @property
    def layout(self) -> str:
        """ "gathered" or "routed", whichever takes less time."""
        return "gathered" if self.gathered.us < self.routed.us else "routed"


def choose(cfg: EPConfig, tokens: int | None = None) -> Choice:
    """See `Communicator.choose`."""
    T = cfg.max_tokens_per_rank if tokens is None else check_int("tokens", tokens, 0, cfg.max_tokens_per_rank)
    R, E, K = cfg.n_ranks, cfg.n_experts, cfg.top_k
    hit = R * (1 - math.comb(E - cfg.n_local_experts, K) / math.comb(E, K)) if K <= E else float(R)
    routed = _estimate(cfg, T, hit, T * K, ROUTED_LAUNCHES_US)
    return Choice(T, routed, _estimate(cfg, T, R, R * T, GATHERED_LAUNCHES_US))


def _estimate(cfg: EPConfig, tokens: int, ranks: float, rows: float, launches_us: float) -> Estimate:
    per_token = cfg.dispatch_format.message_bytes(cfg.hidden_size) + cfg.combine_row_bytes
    moved = tokens * ranks * (cfg.n_ranks - 1) / cfg.n_ranks * per_token
    return Estimate(float(ranks), float(rows), moved, launches_us + moved / (1e3 * RATE_GB_S))
