"""Part of the GPU's dispatch_wait where there are few tokens: each CTA that copies maps all sources by itself.

Counting and mapping a thousand choices takes less long than to learn from other CTAs what they have counted and mapped.
Every such CTA awaits all headers, counts all rows, and gives out all of them in its shared memory, in the order of
`routing.mojo`. Each of its warps writes what belongs to the chunks that it will copy: their part of row_map and
src_info. What is the same for all is written by the first CTA, which notes it for those that mark what no row fills.
"""

from max.gpu import WARP_SIZE, block_idx, lane_id, thread_idx
from max.gpu.sync import barrier

from ..dispatch_tensors import DispatchOutput
from ..formats import TokenFormat
from ..launch import Endpoint
from ..layout import WORK_MAPPED
from ..peers import View, window_view
from ..settings import Settings
from ..signal import Waiter, note, word
from .choices import Choices
from .headers import await_tokens
from .launch import Peers, told, warp_index, warps
from .mapping import cta_bytes, rows_fit
from .routing import Histogram, count_rows, map_rows
from .shared_memory import MAX_WARPS, SLOTS, shared_memory
from .share import Share
from .starts import start_all
from .timeline import (
    MARK_ALL_COUNTED,
    MARK_HEADER_SEEN,
    MARK_ROWS_COUNTED,
    MARK_ROWS_MAPPED,
    mark,
)

comptime FEW_CHOICES = 1024
"""R * Tmax * K, at most: with 8 warps each loads its part at once."""


@always_inline
def maps_alone(s: Settings) -> Bool:
    """Whether each CTA maps by itself. Where peers can be masked it must not: CTAs might not agree on whose tokens
    there are.

    Args:
        s: The settings, as the kernel has them.

    Returns:
        The same for all CTAs.
    """
    return (
        not s.everywhere
        and not s.shrinks
        and s.n_ranks * s.max_tokens * s.top_k <= FEW_CHOICES
    )


@always_inline
def _groups[layout: StaticString](s: Settings) -> Int:
    """Groups of `Choices` of all sources."""
    return s.n_ranks if layout == "rank" else s.n_groups()


def mapping_bytes[layout: StaticString](peers: Peers) -> Int:
    """Shared memory that a CTA needs to map, at the place of the slots, whoever maps.

    Parameters:
        layout: Output layout.

    Args:
        peers: The rank's side.

    Returns:
        Bytes: of a histogram; where there are few tokens of that of all sources, T of each, and rows of all choices.
    """
    var s = peers.s
    var choices = s.n_ranks * s.max_tokens * s.top_k
    if not maps_alone(s):
        return cta_bytes[layout](peers)
    return Histogram.bytes(_groups[layout](s), MAX_WARPS) + 4 * (
        s.n_ranks + choices
    )


@always_inline
def map_alone[
    F: TokenFormat, layout: StaticString
](
    ep: Endpoint[True],
    epoch: UInt64,
    waiter: Waiter,
    share: Share,
    out_: DispatchOutput,
    stage: Int32,
) -> Int32:
    """Map all sources; the whole CTA calls this. Shared memory is free for row slots afterwards.

    Parameters:
        F: The format.
        layout: Output layout.

    Args:
        ep: The rank.
        epoch: The launch's epoch.
        waiter: The launch's waiter.
        share: The chunks that the calling warp will copy, of all sources in turn.
        out_: The outputs.
        stage: `STAGE_*`, for the failure record.

    Returns:
        Lane r: T of source r; 0 after a failure, so that nothing is copied: what the first CTA has noted says nothing
        of the row map of this one.
    """
    var s = ep.s
    var lane = Int(lane_id())
    var hist = Histogram(_groups[layout](s))
    var behind = Histogram.bytes(hist.groups, warps())
    var tokens = window_view[DType.int32](
        shared_memory(SLOTS), behind, s.n_ranks
    )
    var rows = window_view[DType.int32](
        shared_memory(SLOTS),
        behind + 4 * s.n_ranks,
        s.n_ranks * s.max_tokens * s.top_k,
    )
    var came = 1
    if warp_index() == 0:
        var awaited = await_tokens(ep, epoch, waiter)
        if lane < s.n_ranks:
            tokens[lane] = awaited[0]
        came = Int(awaited[1])
    if told(came) == 0:
        return 0
    mark[MARK_HEADER_SEEN](ep)
    var first = block_idx.x == 0
    var choices = Choices(ep, ep.buffer(epoch), tokens)
    count_rows[layout](choices, hist, hist.totals)
    mark[MARK_ROWS_COUNTED](ep)
    var needed = start_all[layout](
        s,
        hist,
        out_.row_offsets if first else View[DType.uint32](),
        out_.counts,
    )
    if not rows_fit[F, layout](ep, out_, needed, stage):
        return 0
    mark[MARK_ALL_COUNTED](ep)
    map_rows[layout](choices, hist, rows, View[DType.int32]())
    var known: Int32 = -1
    if lane < s.n_ranks:
        known = tokens[lane]
        if first and warp_index() == 0:
            out_.recv_num_tokens[lane] = known
    barrier()  # all rows are given
    if first and thread_idx.x == 0:
        note(ep.head.base, 4 * WORK_MAPPED, word(epoch, Int(known)))
    _keep_rows[layout](s, ep.me, share, rows, out_)
    barrier()  # and shared memory is free
    mark[MARK_ROWS_MAPPED](ep)
    return known


@always_inline
def _keep_rows[
    layout: StaticString
](
    s: Settings,
    me: Int,
    share: Share,
    rows: View[DType.int32],
    out_: DispatchOutput,
):
    """Write row_map and src_info of the calling warp's chunks."""
    var K = s.top_k
    for i in range(
        share.first, s.n_ranks * s.n_signals(s.max_tokens), share.stride
    ):
        var r = (me + i) % s.n_ranks
        var begin = i // s.n_ranks * s.tokens_per_signal
        var end = min(begin + s.tokens_per_signal, s.max_tokens)
        var of_source = r * s.max_tokens
        for at in range(
            (of_source + begin) * K + Int(lane_id()),
            (of_source + end) * K,
            WARP_SIZE,
        ):
            var row = Int(rows[at])
            out_.row_map[at] = Int32(row)
            if row >= 0:
                var k = -1 if layout == "rank" else at % K
                out_.src_info[2 * row] = Int32(at // K)
                out_.src_info[2 * row + 1] = Int32(k)
