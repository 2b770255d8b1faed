"""Part of the GPU's dispatch_wait: from the routing tables to the rows, a CTA for each piece of a source.

A CTA awaits its source's header, counts its piece's rows and notes that in the rank's own counters; when all pieces are
counted, it works out where each group begins, gives every choice its row, and notes that too. No CTA awaits another
before it has counted all of its own pieces, and counting awaits only headers: so all get there.
"""

from max.gpu import block_dim, block_idx, grid_dim, lane_id, thread_idx
from max.gpu.primitives import warp
from max.gpu.sync import barrier

from ..dispatch_tensors import DispatchOutput
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
from .choices import Choices
from .launch import Peers, told, warp_index
from .notes import await_note
from .pieces import Pieces
from .routing import Histogram, ballot, count_rows, map_rows
from .shared_memory import MAX_WARPS
from .starts import start_rows
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
    pieces: Pieces,
    out_: DispatchOutput,
    stage: Int32,
):
    """Map the pieces of this CTA: v = its index, and further ones where there are fewer CTAs than pieces.

    The whole CTA calls this. Shared memory is free for row slots afterwards.

    Parameters:
        F: The format.
        layout: Output layout.

    Args:
        ep: The rank.
        epoch: The launch's epoch.
        waiter: The launch's waiter.
        pieces: The pieces.
        out_: The outputs.
        stage: `STAGE_*`, for the failure record.
    """
    var s = ep.s
    var own = ep.head.base
    var buffer = ep.buffer(epoch)
    var groups = 1 if layout == "rank" else s.n_groups()
    var hist = Histogram(groups)
    var counts = window_view[DType.int32](
        own, 4 * WORK_COUNTS, pieces.n * groups
    )
    var first = Int(block_idx.x)
    var stride = Int(grid_dim.x)
    var several = first + stride < pieces.n
    for v in range(first, pieces.n, stride):
        var piece = pieces.piece(s, v)
        var T = NO_SIGNAL
        if thread_idx.x == 0:
            T = ep.tokens_of(waiter, epoch, piece.source)
        T = told(T)
        if T == NO_SIGNAL:
            return
        mark[MARK_HEADER_SEEN](ep)
        count_rows[layout](
            Choices(ep, buffer, piece, T),
            hist,
            counts.part(v * groups, groups),
        )
        mark[MARK_ROWS_COUNTED](ep)
        if thread_idx.x == 0:
            if piece.begin == 0:
                out_.recv_num_tokens[piece.source] = Int32(T)
            note(own, 4 * WORK_COUNTED + 8 * v, word(epoch, T))
    for v in range(first, pieces.n, stride):
        var piece = pieces.piece(s, v)
        var T = _all_counted(ep, waiter, epoch, pieces, v)
        if T == NO_SIGNAL:
            return
        mark[MARK_ALL_COUNTED](ep)
        var choices = Choices(ep, buffer, piece, T)
        if several:
            count_rows[layout](choices, hist, counts.part(v * groups, groups))
        var offsets = out_.row_offsets if v == 0 else View[DType.uint32]()
        var needed = start_rows[layout](
            s, counts, pieces, v, hist, offsets, out_.counts
        )
        if not rows_fit[F, layout](ep, out_, needed, stage):
            return
        var block = s.max_tokens * s.top_k
        map_rows[layout](
            choices,
            hist,
            out_.row_map.part(piece.source * block, block),
            out_.src_info,
        )
        barrier()  # all rows are given; and shared memory is free
        mark[MARK_ROWS_MAPPED](ep)
        if thread_idx.x == 0:
            note(own, 4 * WORK_MAPPED + 8 * v, word(epoch, T))


@always_inline
def rows_fit[
    F: TokenFormat, layout: StaticString
](ep: Endpoint[True], out_: DispatchOutput, needed: Int, stage: Int32) -> Bool:
    """Whether the outputs hold all rows; a failure is recorded where not. The whole CTA calls this.

    Parameters:
        F: The format.
        layout: Output layout.

    Args:
        ep: The rank.
        out_: The outputs.
        needed: Of thread 0: what `start_rows` has returned.
        stage: `STAGE_*`, for the failure record.

    Returns:
        The same for all threads.
    """
    var fits = 0
    if thread_idx.x == 0:
        var room = (
            ep.s.n_ranks * ep.s.max_tokens if layout
            == "expert_padded" else out_.tokens.size // F.token_bytes
        )
        fits = Int(needed <= room)
        if fits == 0:
            ep.head.fail(KIND_CAPACITY, stage, value=needed, limit=room)
    return told(fits) != 0


@always_inline
def _all_counted(
    ep: Endpoint[True],
    waiter: Waiter,
    epoch: UInt64,
    pieces: Pieces,
    piece: Int,
) -> Int:
    """Await the counts of all pieces; the whole CTA calls this. T of one piece's source, or `NO_SIGNAL`."""
    var T = NO_SIGNAL
    if warp_index() == 0:
        var v = Int(lane_id())
        var mine: Int32 = 0
        if v < pieces.n:
            mine = Int32(
                await_note(
                    ep, waiter, epoch, WORK_COUNTED, v, peer=pieces.source(v)
                )
            )
        if ballot(Int(mine) == NO_SIGNAL) == 0:
            T = Int(warp.shuffle_idx(mine, UInt32(piece)))
    return told(T)


def cta_bytes[layout: StaticString](peers: Peers) -> Int:
    """Shared memory of the histogram.

    Parameters:
        layout: Output layout.

    Args:
        peers: The rank's side.

    Returns:
        Bytes.
    """
    comptime if layout == "gathered":
        return 0  # nothing is mapped
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
