"""How many bytes of windows a number of tokens needs, and how many tokens a number of bytes allows; `Config`.

Normal mode, bytes a token of a rank: every rank has room for each token of every other (dispatch) and for one row from
each (combine), beside the routing table and a signal for every few tokens. The table is counted with `MAX_TOP_K`
choices, so that the largest T follows from `num_nvl_bytes`, the row and R alone. Where there are few tokens
(`EPConfig.few_tokens`), windows have room for cells, and take up to half as much again; where tables alone travel as
cells (`EPConfig.table_room`), 16 bytes more for each choice.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from ..comm.windows import block_bytes
from ..config import MAX_PAIRS, MAX_RANKS, MAX_SMS, EPConfig
from ..errors import CapacityError
from ..formats import BF16, TokenFormat, align_up, check_int
from ..layout import CELL_CHOICES, FEW_CHOICES, MAX_TOKENS, MAX_TOP_K

HINT_TOKENS = 8192
"""Tokens of a rank for which `get_nvl_buffer_size_hint` answers."""
HINT_TOP_K = 8
"""Choices a token for which `get_low_latency_rdma_size_hint` answers. More take more, fewer may (where so few
travel as cells), and neither are refused."""
NORMAL_BUFFERS = 1
"""Rounds of normal mode in flight: dispatch and combine alternate, so that the one buffer is free when it is needed."""
TOKENS_PER_SIGNAL = 4
"""In normal mode, whose launches mostly have 20 to 64 SMs: docs/performance.md, "Tokens of a signal"."""
MARGIN_BYTES = 1 << 16
"""For headers, credits, and rounding up to whole pages."""
LARGEST_BYTES = 1 << 50
KEPT = 256
"""Configs that are remembered."""


def bytes_per_token(row_bytes: int, n_ranks: int) -> int:
    """Window bytes that each token of a rank takes in normal mode."""
    row = align_up(row_bytes, 16)
    table = (2 + 4) * MAX_TOP_K
    signals = 2 * -(-8 // TOKENS_PER_SIGNAL)
    return NORMAL_BUFFERS * n_ranks * (2 * row + table + signals)


def bytes_for(tokens: int, row_bytes: int, n_ranks: int) -> int:
    """`num_nvl_bytes` with which `max_tokens` gives at least `tokens`."""
    return MARGIN_BYTES + tokens * bytes_per_token(row_bytes, n_ranks)


def max_tokens(num_nvl_bytes: int, row_bytes: int, n_ranks: int) -> int:
    """The largest T of a rank in normal mode.

    Raises:
        CapacityError: Not one token fits.
    """
    tokens = (num_nvl_bytes - MARGIN_BYTES) // bytes_per_token(row_bytes, n_ranks)
    if tokens < 1:
        raise CapacityError(
            f"not one token of {row_bytes} bytes fits",
            field="num_nvl_bytes",
            value=num_nvl_bytes,
            allowed=f"{bytes_for(HINT_TOKENS, row_bytes, n_ranks)} for {HINT_TOKENS} tokens a rank",
            remedy="make the Buffer with config.get_nvl_buffer_size_hint(hidden_bytes, num_ranks) bytes",
        )
    # Choices of one launch are counted in 24 bits.
    return min(tokens, MAX_PAIRS // MAX_TOP_K, MAX_TOKENS)


@functools.lru_cache(KEPT)
def low_latency_config(tokens: int, hidden: int, top_k: int, n_experts: int, n_ranks: int, **fields) -> EPConfig:
    """The engine's config of low-latency mode: a signal for each token, so that no warp does two while others do none.

    Raises:
        ConfigError: A size is out of range.
    """
    return EPConfig(
        hidden_size=hidden,
        top_k=top_k,
        n_experts=n_experts,
        max_tokens_per_rank=tokens,
        n_ranks=n_ranks,
        output_layout="expert_padded",
        reduce="source",
        tokens_per_signal=1,
        **fields,
    )


def low_latency_bytes(tokens: int, hidden: int, n_ranks: int, n_experts: int) -> int:
    """Bytes of a rank's windows in low-latency mode, bfloat16, `HINT_TOP_K` choices a token; also of those for fewer.

    Raises:
        ConfigError: A size is out of range.
    """
    given = {"num_max_dispatch_tokens_per_rank": tokens, "hidden": hidden}
    given |= {"num_ranks": n_ranks, "num_experts": n_experts}
    return _bytes_of(*(check_int(name, value, 1, LARGEST_BYTES) for name, value in given.items()))


@functools.lru_cache(KEPT)
def _bytes_of(tokens: int, hidden: int, n_ranks: int, n_experts: int) -> int:
    # More tokens, of which less travels as cells, may take less.
    most = (FEW_CHOICES // (n_ranks * HINT_TOP_K), CELL_CHOICES // HINT_TOP_K)
    sizes = {tokens, *(max(1, min(tokens, n)) for n in most)}
    return max(block_bytes(low_latency_config(n, hidden, HINT_TOP_K, n_experts, n_ranks)) for n in sizes)


@functools.lru_cache(KEPT)
def normal_config(
    num_nvl_bytes: int, hidden: int, top_k: int, n_experts: int, n_ranks: int, fmt: TokenFormat, timeout_s: float
) -> EPConfig:
    """The engine's config of normal mode. Tmax follows from the row of bfloat16, so that handles fit every format.

    Raises:
        ConfigError: A size is out of range.
        CapacityError: Not one token fits.
    """
    return EPConfig(
        hidden_size=hidden,
        top_k=top_k,
        n_experts=n_experts,
        max_tokens_per_rank=max_tokens(num_nvl_bytes, 2 * hidden, n_ranks),
        n_ranks=n_ranks,
        dispatch_format=fmt,
        output_layout="rank",
        reduce="expert",
        num_buffers=NORMAL_BUFFERS,
        tokens_per_signal=TOKENS_PER_SIGNAL,
        timeout_s=timeout_s,
    )


@functools.lru_cache(KEPT)
def sums_config(cfg: EPConfig, channels: int) -> EPConfig:
    """The config of a combine of `channels` float32, with the routes of `cfg`.

    Raises:
        ConfigError: There are too many of them, or none.
    """
    width = align_up(check_int("topk_weights.shape[1]", channels, 1, 1 << 15), 8)
    return cfg.replace(hidden_size=width, dispatch_format=BF16(), combine_dtype="float32", output_dtype="float32")


@dataclass(frozen=True)
class Config:
    """Tuning of normal mode. The engine needs `num_sms` only; the others are taken so that callers need no change.

    Args:
        num_sms: SMs (on the host: worker threads) that a launch may use: 1 to 1024.
        num_max_nvl_chunked_send_tokens, num_max_nvl_chunked_recv_tokens: Not used.
        num_max_rdma_chunked_send_tokens, num_max_rdma_chunked_recv_tokens: Not used.

    Raises:
        ConfigError: A number is out of range.
    """

    num_sms: int = 20
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256

    def __post_init__(self):
        check_int("num_sms", self.num_sms, 1, MAX_SMS)
        for side in ("nvl_chunked_send", "nvl_chunked_recv", "rdma_chunked_send", "rdma_chunked_recv"):
            name = f"num_max_{side}_tokens"
            check_int(name, getattr(self, name), 1, 1 << 30)

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """`num_nvl_bytes` for 8192 tokens a rank, each a row of `hidden_bytes` bytes.

        Raises:
            ConfigError: A number is out of range.
        """
        row = check_int("hidden_bytes", hidden_bytes, 1, 1 << 20)
        return bytes_for(HINT_TOKENS, row, check_int("num_ranks", num_ranks, 1, MAX_RANKS))

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """0: ranks of one node need no RDMA buffer.

        Raises:
            ConfigError: A number is out of range.
        """
        check_int("hidden_bytes", hidden_bytes, 1, 1 << 20)
        check_int("num_ranks", num_ranks, 1, MAX_RANKS)
        return 0
