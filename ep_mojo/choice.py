"""Routed or gathered? An estimate of a round of each, from the bytes that a GPU receives and measured constants.

Routed, a token goes to the ranks of its experts; gathered, to all R. With M bytes of a message and C bytes of a row of
combine, of which d and c go and come for each token:

    bytes = T * (R - 1) / R * (d * M + c * C)       us = launches + bytes / rate

Gathered, d = c = R. Routed, with K different experts drawn evenly, d = c = h = R * (1 - binomial(E - L, K) /
binomial(E, K)), but d = K with slots="expert" and c = K with reduce="source". Without choices nothing can be routed.
Constants are of 2 x H200 (docs/performance.md); for more GPUs the estimate is an extrapolation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .config import EPConfig
from .formats import check_int

ROUTED_LAUNCHES_US = 28.0
"""A replayed round of dispatch and combine of next to no tokens."""
GATHERED_LAUNCHES_US = 24.0
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
    sent = K if cfg.slots == "expert" else hit
    back = K if cfg.slots == "expert" or cfg.reduce == "source" else hit
    routed = _estimate(cfg, T, (hit, sent, back), T * K, ROUTED_LAUNCHES_US if K else math.inf)
    return Choice(T, routed, _estimate(cfg, T, (R, R, R), R * T, GATHERED_LAUNCHES_US))


def _estimate(
    cfg: EPConfig, tokens: int, ranks: tuple[float, float, float], rows: float, launches_us: float
) -> Estimate:
    """`ranks`: that a token goes to; messages of a token, rows that come back for it."""
    hit, sent, back = ranks
    per_token = sent * cfg.dispatch_format.message_bytes(cfg.hidden_size) + back * cfg.combine_row_bytes
    moved = tokens * per_token * (cfg.n_ranks - 1) / cfg.n_ranks
    return Estimate(float(hit), float(rows), moved, launches_us + moved / (1e3 * RATE_GB_S))
