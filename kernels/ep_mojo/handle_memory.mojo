"""A handle's tensors in one block of memory, for callers that allocate them: one tensor in place of nine. Mirrored by
`packed_handle` in `ep_mojo/handle.py`.

    row_offsets [groups + 1] | counts [groups] | expert_ids [groups or 0] | recv_num_tokens [R] | row_map [R, Tm, K] |
    recv_weights [R, Tm, K] | src_info [rows, 2] | local_ids [rows, K or 0] | local_weights [rows, K or 0]

in words of 32 bits, each from a multiple of `WORDS` words on. What combine needs does not move with the rows. With
layout "gathered" row_map and recv_weights have size 0.
"""

from .combine_tensors import CombineInput
from .dispatch_tensors import DispatchOutput
from .layout import align_up
from .peers import View, window_view
from .routing import by_source, choices_mapped
from .settings import Settings

comptime WORDS = 4
"""Every part begins at a multiple of as many words."""


struct _Parts(Movable):
    """Takes one part after another."""

    var memory: View[DType.int32]
    """The block."""
    var at: Int
    """The next part's first word."""

    def __init__(out self, memory: View[DType.int32]):
        self.memory = memory
        self.at = 0

    def take[dtype: DType](mut self, size: Int) -> View[dtype]:
        var offset = 4 * self.at
        self.at += align_up(size, WORDS)
        return window_view[dtype](self.memory.bytes(0), offset, size)


def packed_output[
    layout: StaticString
](
    s: Settings,
    tokens: View[DType.uint8],
    scales: View[DType.uint8],
    rows: Int,
    memory: View[DType.int32],
) -> Tuple[DispatchOutput, Int]:
    """What dispatch writes.

    Parameters:
        layout: Output layout.

    Args:
        s: The settings.
        tokens: Rows as bytes.
        scales: Scales as bytes.
        rows: How many rows there is room for.
        memory: The block.

    Returns:
        The tensors, and the words that the block must have.
    """
    comptime by_rank = by_source[layout]()
    var groups = s.n_ranks if by_rank else s.n_groups()
    var choices = choices_mapped[layout](s)
    var local = rows * s.top_k if by_rank else 0
    var parts = _Parts(memory)
    var row_offsets = parts.take[DType.uint32](groups + 1)
    var counts = parts.take[DType.int32](groups)
    var expert_ids = parts.take[DType.int32](0 if by_rank else groups)
    var num_tokens = parts.take[DType.int32](s.n_ranks)
    var row_map = parts.take[DType.int32](choices)
    var weights = parts.take[DType.float32](choices)
    var src_info = parts.take[DType.int32](2 * rows)
    var local_ids = parts.take[DType.int32](local)
    var local_weights = parts.take[DType.float32](local)
    var output = DispatchOutput(
        tokens,
        scales,
        row_offsets,
        counts,
        expert_ids,
        src_info,
        local_ids,
        local_weights,
        weights,
        row_map,
        num_tokens,
    )
    return (output, parts.at)


def packed_input[
    layout: StaticString
](
    s: Settings,
    rows: View[DType.uint8],
    memory: View[DType.int32],
    shared_out: View[DType.uint8],
) -> Tuple[CombineInput, Int]:
    """What combine reads.

    Parameters:
        layout: Output layout of the dispatch.

    Args:
        s: The settings.
        rows: Expert rows as bytes.
        memory: The block that dispatch wrote.
        shared_out: Output for the shared expert's rows.

    Returns:
        The tensors, and the words that the block must have at least.
    """
    comptime by_rank = by_source[layout]()
    var groups = s.n_ranks if by_rank else s.n_groups()
    var choices = choices_mapped[layout](s)
    var parts = _Parts(memory)
    _ = parts.take[DType.uint32](groups + 1)
    _ = parts.take[DType.int32](groups)
    _ = parts.take[DType.int32](0 if by_rank else groups)
    var num_tokens = parts.take[DType.int32](s.n_ranks)
    var row_map = parts.take[DType.int32](choices)
    var weights = parts.take[DType.float32](choices)
    return (
        CombineInput(rows, row_map, weights, num_tokens, shared_out),
        parts.at,
    )
