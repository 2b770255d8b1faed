"""What stands in an ExpertSlots window, the same on every target.

A message is a header of 16 bytes, token (i32), mask of choices (u32), 8 bytes of zero, and then the format's message;
bit k of the mask says that the token's k-th choice is this expert. Block b = expert * R + source of a rank's window
holds what came from `source` for its local expert, by ascending token.
"""

from .launch import Endpoint
from .layout import (
    EXPERT_SLOTS_HEADER,
    EXPERT_SLOTS_MASK,
    EXPERT_SLOTS_TOKEN,
    ROUTED_MASKS,
    expert_slot_offset,
)
from .peers import Bytes, View, typed, window_view


@always_inline
def message_of(ep: Endpoint[True], block: Int, slot: Int) -> Bytes:
    """A message in the rank's own window.

    Args:
        ep: The rank.
        block: Local expert * R + source.
        slot: Number of the message in its block.

    Returns:
        Its header.
    """
    var R = ep.s.n_ranks
    return ep.recv[ep.me].unsafe_offset(
        expert_slot_offset(ep.s, block // R, block % R, slot)
    )


@always_inline
def token_of(message: Bytes) -> Int:
    """The token's index on its own rank.

    Args:
        message: The header.

    Returns:
        0 to Tm - 1.
    """
    return Int(
        typed[DType.int32](message, EXPERT_SLOTS_TOKEN).unsafe_load[
            invariant=False
        ](0)
    )


@always_inline
def mask_of(message: Bytes) -> UInt32:
    """The choices that are this expert.

    Args:
        message: The header.

    Returns:
        One bit a choice, at least one.
    """
    return typed[DType.uint32](message, EXPERT_SLOTS_MASK).unsafe_load[
        invariant=False
    ](0)


@always_inline
def payload(message: Bytes) -> Bytes:
    """The format's part of a message.

    Args:
        message: The header.

    Returns:
        What stands behind it.
    """
    return message.unsafe_offset(EXPERT_SLOTS_HEADER)


@always_inline
def write_header(message: Bytes, token: Int, mask: UInt32):
    """Write a header, by one thread.

    Args:
        message: The header, in a peer's window.
        token: The token's index on its own rank.
        mask: The choices that are this expert.
    """
    var words = SIMD[DType.uint32, 4](UInt32(token), mask, 0, 0)
    typed[DType.uint32](message, EXPERT_SLOTS_TOKEN).unsafe_store[
        width=4, alignment=16
    ](0, words)


@always_inline
def routed_masks[
    has_table: Bool
](ep: Endpoint[has_table]) -> View[DType.uint32]:
    """Which choices of the rank's own tokens dispatch_async has sent: combine_wait sums those.

    Parameters:
        has_table: True for dispatch, False for combine.

    Args:
        ep: The rank.

    Returns:
        Uint32 [Tm] in the rank's own counters, one bit a choice.
    """
    return window_view[DType.uint32](
        ep.head.base, 4 * ROUTED_MASKS, ep.s.max_tokens
    )
