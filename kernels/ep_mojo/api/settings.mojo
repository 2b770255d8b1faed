"""Settings of the seed-named functions, from what each of them knows, and the hash that a rank's head must hold for
it."""

from std.sys import size_of

from ..formats import TokenFormat, format_tag
from ..layout import EXPERT_SLOTS_HEADER
from ..settings import COMBINE_UNHASHED, DISPATCH_UNHASHED, Settings


def dispatch_settings[
    F: TokenFormat, n_experts: Int, max_tokens: Int, n_ranks: Int
](top_k: Int = 1) -> Settings:
    """What a dispatch function knows.

    Parameters:
        F: The format.
        n_experts: E.
        max_tokens: Tm.
        n_ranks: R.

    Args:
        top_k: K, from the head of the counters; not hashed.

    Returns:
        The settings; combine rows have no size.
    """
    return Settings(
        n_ranks=n_ranks,
        n_experts=n_experts,
        top_k=top_k,
        max_tokens=max_tokens,
        hidden_size=F.hidden_size,
        message_bytes=F.message_bytes + EXPERT_SLOTS_HEADER,
        row_bytes=0,
        format_tag=format_tag[F](),
    )


def dispatch_hash[
    F: TokenFormat, n_experts: Int, max_tokens: Int, n_ranks: Int
]() -> UInt64:
    """What the head's `HEAD_DISPATCH_HASH` must be.

    Parameters:
        F: The format.
        n_experts: E.
        max_tokens: Tm.
        n_ranks: R.

    Returns:
        The hash.
    """
    return dispatch_settings[F, n_experts, max_tokens, n_ranks]().hash(
        DISPATCH_UNHASHED
    )


def combine_settings[
    dtype: DType,
    hidden: Int,
    top_k: Int,
    n_experts: Int,
    max_tokens: Int,
    n_ranks: Int,
]() -> Settings:
    """What a combine function knows.

    Parameters:
        dtype: Type of the rows.
        hidden: H.
        top_k: K.
        n_experts: E.
        max_tokens: Tm.
        n_ranks: R.

    Returns:
        The settings; messages have no size.
    """
    return Settings(
        n_ranks=n_ranks,
        n_experts=n_experts,
        top_k=top_k,
        max_tokens=max_tokens,
        hidden_size=hidden,
        message_bytes=0,
        row_bytes=hidden * size_of[Scalar[dtype]](),
        format_tag=0,
    )


def combine_hash[
    dtype: DType,
    hidden: Int,
    top_k: Int,
    n_experts: Int,
    max_tokens: Int,
    n_ranks: Int,
]() -> UInt64:
    """What the head's `HEAD_COMBINE_HASH` must be.

    Parameters:
        dtype: Type of the rows.
        hidden: H.
        top_k: K.
        n_experts: E.
        max_tokens: Tm.
        n_ranks: R.

    Returns:
        The hash.
    """
    return combine_settings[
        dtype, hidden, top_k, n_experts, max_tokens, n_ranks
    ]().hash(COMBINE_UNHASHED)
