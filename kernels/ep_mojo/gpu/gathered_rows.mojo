"""The GPU's dispatch_wait with layout "gathered": every token of every rank becomes a row, ranks ascending, no gaps.

Nothing has to be mapped. Each warp awaits all headers, lane r that of source r; with their T it knows where the rows of
each source begin. Then it takes chunks of a source, the first by its number and further ones as it comes free
(`turns.mojo`): awaits the signal, brings each message into shared memory, copies it to its row, and writes what the
row's token has chosen, from the table that the header has covered.
"""

from max.gpu import lane_id
from max.gpu.primitives import warp

from ..dispatch_tensors import Rows, localise
from ..formats import TokenFormat
from ..launch import Endpoint
from ..layout import KIND_CAPACITY, message_offset
from ..numeric import quotient, remainder
from ..signal import Waiter
from ..team import WarpTeam
from .headers import await_tokens
from .launch import warp_memory, warp_slot
from .routing import ballot
from .share import Share, chunks_of_all
from .shared_rows import (
    SlotTeam,
    finish_stores,
    order_for_bulk,
    release_slots,
)
from .timeline import (
    MARK_HEADER_SEEN,
    MARK_MESSAGE_LOADED,
    MARK_ROWS_WRITTEN,
    MARK_SIGNAL_SEEN,
    mark,
)
from .turns import Turns


@always_inline
def rows_before(tokens: Int32, source: Int) -> Int:
    """Rows of all sources before one; a warp calls this.

    Args:
        tokens: Lane r: tokens of source r.
        source: The source; R for all rows.

    Returns:
        Their sum, to all lanes.
    """
    var mine = tokens if Int(lane_id()) < source else Int32(0)
    return Int(warp.sum(mine))


@always_inline
def gather_rows[
    F: TokenFormat, layout: StaticString, warp_bytes: Int
](
    ep: Endpoint[True],
    epoch: UInt64,
    waiter: Waiter,
    share: Share,
    rows: Rows[F, layout],
    stage: Int32,
):
    """Copy messages to their rows as they arrive.

    Parameters:
        F: The format.
        layout: "gathered".
        warp_bytes: Shared memory that the launch has for each warp.

    Args:
        ep: The rank.
        epoch: The launch's epoch.
        waiter: The launch's waiter.
        share: The calling warp's first chunk, of all sources in turn, or `LATE`; and how many warps have one.
        rows: The outputs.
        stage: `STAGE_*`, for the failure record.
    """
    var s = ep.s
    var out_ = rows.out
    var lane = Int(lane_id())
    var awaited = await_tokens(ep, epoch, waiter)
    if not awaited[1]:
        return
    mark[MARK_HEADER_SEEN](ep)
    var tokens = awaited[0]
    var total = rows_before(tokens, s.n_ranks)
    if total > rows.capacity:
        if share.first == 0 and lane == 0:
            ep.head.fail(KIND_CAPACITY, stage, value=total, limit=rows.capacity)
        return
    if share.first == 0:
        for r in range(s.n_ranks + 1):
            var before = rows_before(tokens, r)
            if lane == r:
                out_.row_offsets[r] = UInt32(before)
        if lane < s.n_ranks:
            out_.counts[lane] = tokens
            out_.recv_num_tokens[lane] = tokens
    var buffer = ep.buffer(epoch)
    var slot = warp_slot(warp_memory(warp_bytes), sending=False)
    var window = ep.recv[ep.me]
    var turns = Turns(ep, share, chunks_of_all(s, tokens))
    while turns.next():
        var r = remainder(ep.me + turns.chunk, s.n_ranks)
        var chunk = quotient(turns.chunk, s.n_ranks)
        var T = Int(warp.shuffle_idx(tokens, UInt32(r)))
        var begin = chunk * s.tokens_per_signal
        if begin >= T:
            continue
        var first = rows_before(tokens, r)
        var signal = ep.chunk_of(waiter, epoch, r, chunk)
        order_for_bulk()  # the messages may be brought in then
        if ballot(signal != 0) != 0:
            break
        mark[MARK_SIGNAL_SEEN](ep)
        for t in range(begin, min(begin + s.tokens_per_signal, T)):
            release_slots()
            slot.load[F.message_bytes](
                window.unsafe_offset(message_offset(s, buffer, r, t))
            )
            mark[MARK_MESSAGE_LOADED](ep)
            rows.put[SlotTeam](slot.row, first + t)
            localise[WarpTeam, layout](ep, buffer, r, t, first + t, out_)
            if lane == 0:
                var row = first + t
                out_.src_info[2 * row] = Int32(r * s.max_tokens + t)
                out_.src_info[2 * row + 1] = -1
    finish_stores()
    mark[MARK_ROWS_WRITTEN](ep)


@always_inline
def mark_behind[
    F: TokenFormat, layout: StaticString
](
    ep: Endpoint[True],
    epoch: UInt64,
    waiter: Waiter,
    share: Share,
    rows: Rows[F, layout],
):
    """Say of all rows behind the last one that they hold nothing: -1, and weights of 0.

    Parameters:
        F: The format.
        layout: "gathered".

    Args:
        ep: The rank.
        epoch: The launch's epoch.
        waiter: The launch's waiter.
        share: The calling warp's part.
        rows: The outputs.
    """
    var awaited = await_tokens(ep, epoch, waiter)
    if not awaited[1]:
        return
    var out_ = rows.out
    var used = min(rows_before(awaited[0], ep.s.n_ranks), rows.capacity)
    var thread = share.first * WarpTeam.lanes + Int(lane_id())
    var threads = share.stride * WarpTeam.lanes
    for i in range(2 * used + thread, out_.src_info.size, threads):
        out_.src_info[i] = -1
    for i in range(used * ep.s.top_k + thread, out_.local_ids.size, threads):
        out_.local_ids[i] = -1
        out_.local_weights[i] = 0
