"""Part of the GPU's dispatch_wait: from the routing tables to the rows, one CTA a source.

A CTA awaits its source's header, counts its rows and publishes that in the rank's own counters; when all sources are
counted, it works out where each group begins, gives every choice its row, and publishes that too.
"""

from max.gpu import block_dim, block_idx, grid_dim, lane_id, thread_idx
from max.gpu.sync import barrier

from ..dispatch_tensors import DispatchOutput, table_ids
from ..formats import TokenFormat
from ..launch import Endpoint
from ..layout import (
    KIND_CAPACITY,
    WORK_COUNTED,
    WORK_COUNTS,
    WORK_MAPPED,
)
from ..peers import View, window_view
from ..routing import group_name
from ..signal import NO_SIGNAL, Waiter, note, word
from .launch import Peers, told, warp_index
from .notes import await_note
from .routing import Histogram, ballot, count_source, map_source, start_rows
from .shared_memory import MAX_WARPS
from .timeline import (
    MARK_ALL_COUNTED,
    MARK_HEADER_SEEN,
    MARK_ROWS_COUNTED,
    MARK_ROWS_MAPPED,
    mark,
)


@always_inline
def map_sources[
    F: TokenFormat, layout: StaticString
](
    ep: Endpoint[True],
    epoch: UInt64,
    waiter: Waiter,
    out_: DispatchOutput,
    stage: Int32,
):
    """Map the sources of this CTA: r = its index, and further ones where there are fewer CTAs than ranks.

    The whole CTA calls this. Shared memory is free for row slots afterwards.

    Parameters:
        F: The format.
        layout: Output layout.

    Args:
        ep: The rank.
        epoch: The launch's epoch.
        waiter: The launch's waiter.
        out_: The outputs.
        stage: `STAGE_*`, for the failure record.
    """
    var s = ep.s
    var own = ep.head.base
    var buffer = ep.buffer(epoch)
    var groups = 1 if layout == "rank" else s.n_groups()
    var hist = Histogram(groups)
    var counts = window_view[DType.int32](
        own, 4 * WORK_COUNTS, s.n_ranks * groups
    )
    var first = Int(block_idx.x)
    var stride = Int(grid_dim.x)
    var several = first + stride < s.n_ranks
    for r in range(first, s.n_ranks, stride):
        var T = NO_SIGNAL
        if thread_idx.x == 0:
            T = ep.header_of(waiter, epoch, r)
        T = told(T)
        if T == NO_SIGNAL:
            return
        mark[MARK_HEADER_SEEN](ep)
        count_source[layout](
            s,
            table_ids(ep, buffer, r),
            T,
            r,
            ep.me,
            hist,
            counts.part(r * groups, groups),
        )
        mark[MARK_ROWS_COUNTED](ep)
        if thread_idx.x == 0:
            out_.recv_num_tokens[r] = Int32(T)
            note(own, 4 * WORK_COUNTED + 8 * r, word(epoch, T))
    for r in range(first, s.n_ranks, stride):
        if not _all_counted(ep, waiter, epoch):
            return
        mark[MARK_ALL_COUNTED](ep)
        var T = Int(out_.recv_num_tokens[r])
        if several:
            count_source[layout](
                s,
                table_ids(ep, buffer, r),
                T,
                r,
                ep.me,
                hist,
                counts.part(r * groups, groups),
            )
        var fits = 0
        if warp_index() == 0:
            var offsets = out_.row_offsets if r == 0 else View[DType.uint32]()
            var needed = start_rows[layout](
                s, counts, r, hist, offsets, out_.counts
            )
            var room = (
                s.n_ranks * s.max_tokens if layout
                == "expert_padded" else out_.tokens.size // F.token_bytes
            )
            fits = Int(needed <= room)
            if thread_idx.x == 0 and fits == 0:
                ep.head.fail(KIND_CAPACITY, stage, value=needed, limit=room)
        if told(fits) == 0:
            return
        var block = s.max_tokens * s.top_k
        map_source[layout](
            s,
            table_ids(ep, buffer, r),
            T,
            r,
            ep.me,
            hist,
            out_.row_map.part(r * block, block),
            out_.src_info,
        )
        barrier()  # all rows are given; and shared memory is free
        mark[MARK_ROWS_MAPPED](ep)
        if thread_idx.x == 0:
            note(own, 4 * WORK_MAPPED + 8 * r, word(epoch, T))


@always_inline
def _all_counted(ep: Endpoint[True], waiter: Waiter, epoch: UInt64) -> Bool:
    """Await the counts of all sources; the whole CTA calls this."""
    var counted = True
    if warp_index() == 0:
        var lane = Int(lane_id())
        if lane < ep.s.n_ranks:
            var T = await_note(ep, waiter, epoch, WORK_COUNTED, lane)
            counted = T != NO_SIGNAL
        counted = ballot(not counted) == 0
    return told(Int(counted)) != 0


def cta_bytes[layout: StaticString](peers: Peers) -> Int:
    """Shared memory of the histogram.

    Parameters:
        layout: Output layout.

    Args:
        peers: The rank's side.

    Returns:
        Bytes.
    """
    var groups = 1 if layout == "rank" else peers.s.n_groups()
    return Histogram.bytes(groups, MAX_WARPS)


@always_inline
def name_groups(ep: Endpoint[True], out_: DispatchOutput):
    """Write which expert each group is, whatever happens later; the first CTA does.

    Args:
        ep: The rank.
        out_: The outputs.
    """
    if block_idx.x == 0:
        for g in range(
            Int(thread_idx.x), out_.expert_ids.size, Int(block_dim.x)
        ):
            out_.expert_ids[g] = group_name(ep.s, g, ep.me)
