"""Part of the GPU's dispatch_wait: from the routing tables to the rows, a CTA for each piece of a source.

A CTA awaits its source's header, or the cells of its piece where tables travel as these (`tables_received.mojo`); it
counts its piece's rows and tells the counts in the rank's own counters; from those of all pieces it works out where
each group begins, gives every choice its row, and notes that. No CTA awaits another before it has counted all of its
own pieces, and counting awaits only headers or tables: so all get there.
"""

from max.gpu import block_dim, block_idx, grid_dim, thread_idx
from max.gpu.sync import barrier

from ..bare import count_off
from ..dispatch_tensors import DispatchOutput, table_ids
from ..formats import TokenFormat
from ..launch import Endpoint
from ..layout import KIND_CAPACITY, WORK_COUNTED, align_up
from ..peers import View, window_view
from ..routing import group_name
from ..settings import Settings
from ..signal import NO_SIGNAL, Waiter, word
from .choices import Choices
from .launch import told
from .notes import await_note, note_mapped, tell_count
from .pieces import Piece, Pieces
from .routing import AHEAD, AHEAD_SHARED, Histogram, count_rows, map_rows
from .shared_memory import MAX_WARPS, SLOTS, shared_memory
from .starts import start_rows
from .tables_received import bring_choices
from .timeline import (
    MARK_HEADER_SEEN,
    MARK_ROWS_COUNTED,
    MARK_ROWS_MAPPED,
    mark,
)


@always_inline
def map_sources[
    F: TokenFormat, layout: StaticString, table_cells: Bool
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
        table_cells: Whether tables travel as cells; then their weights are kept here, too.

    Args:
        ep: The rank.
        epoch: The launch's epoch.
        waiter: The launch's waiter.
        pieces: The pieces.
        out_: The outputs.
        stage: `STAGE_*`, for the failure record.
    """
    comptime ahead = AHEAD_SHARED if table_cells else AHEAD
    var s = ep.s
    var own = ep.head.base
    var buffer = ep.buffer(epoch)
    var groups = 1 if layout == "rank" else s.n_groups()
    var hist = Histogram(groups)
    var first = Int(block_idx.x)
    var stride = Int(grid_dim.x)
    var several = first + stride < pieces.n
    var T = NO_SIGNAL
    for v in range(first, pieces.n, stride):
        var piece = pieces.piece(s, v)
        var ids = _ids[layout, table_cells](ep, buffer, piece)
        hist.clear()
        comptime if table_cells:
            T = bring_choices(ep, waiter, epoch, piece, ids, out_)
        else:
            if thread_idx.x == 0:
                T = ep.tokens_of(waiter, epoch, piece.source)
            T = told(T)
        if T == NO_SIGNAL:
            return
        mark[MARK_HEADER_SEEN](ep)
        count_rows[layout, ahead](Choices(ep, ids, piece, T), hist)
        for g in range(Int(thread_idx.x), groups, Int(block_dim.x)):
            tell_count(ep, epoch, groups, v, g, hist.totals[g])
        mark[MARK_ROWS_COUNTED](ep)
        if thread_idx.x == 0:
            count_off(own, 4 * WORK_COUNTED + 8 * v, word(epoch, T))
            if piece.begin == 0:
                out_.recv_num_tokens[piece.source] = Int32(T)
    for v in range(first, pieces.n, stride):
        var piece = pieces.piece(s, v)
        var ids = _ids[layout, table_cells](ep, buffer, piece)
        if several:  # shared memory holds another piece's
            hist.clear()
            comptime if table_cells:
                T = bring_choices(ep, waiter, epoch, piece, ids, out_)
            else:
                if thread_idx.x == 0:
                    T = await_note(
                        ep, waiter, epoch, WORK_COUNTED, v, peer=piece.source
                    )
                T = told(T)
            if T == NO_SIGNAL:
                return
        var choices = Choices(ep, ids, piece, T)
        if several:
            count_rows[layout, ahead](choices, hist)
        var offsets = out_.row_offsets if v == 0 else View[DType.uint32]()
        var needed = start_rows[layout](
            ep, waiter, epoch, pieces, v, hist, offsets, out_.counts
        )
        if not rows_fit[F, layout](ep, out_, needed, stage):
            return
        var block = s.max_tokens * s.top_k
        map_rows[layout, ahead](
            choices,
            hist,
            out_.row_map.part(piece.source * block, block),
        )
        barrier()  # all rows are given; and shared memory is free
        mark[MARK_ROWS_MAPPED](ep)
        note_mapped(ep, epoch, v, T)


@always_inline
def _ids[
    layout: StaticString, table_cells: Bool
](ep: Endpoint[True], buffer: Int, piece: Piece) -> View[DType.int16]:
    """The table that a piece's ids are in: in the window, or that piece of it in shared memory behind the histogram."""
    comptime if table_cells:
        return window_view[DType.int16](
            shared_memory(SLOTS),
            cta_bytes[layout](ep.s),
            ep.s.max_tokens * ep.s.top_k,
        )
    else:
        return table_ids(ep, buffer, piece.source)


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
        needed: How many; negative, as `NO_SIGNAL` is: nobody knows, and none fit.
        stage: `STAGE_*`, for the failure record.

    Returns:
        The same for all threads.
    """
    var room = (
        ep.s.n_ranks * ep.s.max_tokens if layout
        == "expert_padded" else out_.tokens.size // F.token_bytes
    )
    if needed > room and thread_idx.x == 0:
        ep.head.fail(KIND_CAPACITY, stage, value=needed, limit=room)
    return 0 <= needed <= room


@always_inline
def cta_bytes[
    layout: StaticString, table_cells: Bool = False
](s: Settings) -> Int:
    """Shared memory of the histogram, and of a table's ids where these travel as cells.

    Parameters:
        layout: Output layout.
        table_cells: Whether they do.

    Args:
        s: The settings.

    Returns:
        Bytes, a multiple of 16.
    """
    comptime if layout == "gathered":
        return 0  # nothing is mapped
    var groups = 1 if layout == "rank" else s.n_groups()
    var bytes = align_up(Histogram.bytes(groups, MAX_WARPS), 16)
    comptime if table_cells:
        bytes += align_up(2 * s.max_tokens * s.top_k, 16)
    return bytes


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
