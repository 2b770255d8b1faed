"""Routing tables: what they travel as, and how they leave. `tables_received.mojo` brings them in.

    as cells       (`cells.mojo`) Tmax * K of them, whatever T is: behind the last choice -1 and weight 0, and T in
                   every word. So who awaits a part of a table knows all places beforehand. Many warps send them, a
                   lane each; the header is told besides, and covers nothing
    otherwise      ids and weights by one CTA for each peer, and the header behind them, which covers them

A header that covers a table is released at system scope, and so waits for all that the GPU has under way to its peers:
messages leave only when all tables have left, or the peers' row maps would come late. Cells wait for nothing, and no
message waits for them.
"""

from max.gpu import (
    WARP_SIZE,
    block_dim,
    block_idx,
    grid_dim,
    lane_id,
    thread_idx,
)
from max.gpu.sync import barrier
from std.memory import bitcast

from ..cell import Cell, store_cell, tell
from ..dispatch_tensors import DispatchInput
from ..launch import Endpoint
from ..layout import WORK_TABLED
from ..numeric import quotient, remainder
from ..peers import typed
from ..routing import NO_EXPERT, normal_id
from ..signal import NO_SIGNAL, Waiter, note, publish, word
from ..tokens import readable_tokens
from .notes import await_note
from .opening import Opening
from .routing import ballot
from .share import Share
from .shared_rows import order_for_bulk
from .timeline import MARK_TABLE_SENT, mark


struct Choice(TrivialRegisterPassable):
    """What the cell of a routing table holds."""

    var id: Int16
    """The expert, or `NO_EXPERT`."""
    var weight: Float32
    """Its weight."""

    @always_inline
    def __init__(out self, id: Int16, weight: Float32):
        """Make it.

        Args:
            id: The expert.
            weight: Its weight.
        """
        self.id = id
        self.weight = weight

    @always_inline
    def __init__(out self, payload: UInt64):
        """Read it.

        Args:
            payload: Of the cell.
        """
        self.id = payload.cast[DType.int16]()
        self.weight = bitcast[DType.float32](
            (payload >> 32).cast[DType.uint32]()
        )

    @always_inline
    def payload(self) -> UInt64:
        """What the cell is to hold.

        Returns:
            8 bytes.
        """
        var high = bitcast[DType.uint32](self.weight).cast[DType.uint64]() << 32
        return high | self.id.cast[DType.uint16]().cast[DType.uint64]()


@always_inline
def send_tables[
    ids_dtype: DType
](
    ep: Endpoint[True],
    x: DispatchInput[ids_dtype],
    epoch: UInt64,
    mut opening: Opening,
):
    """Send the routing table, covered by its header, to the peers that are this CTA's; the whole CTA calls this.

    Parameters:
        ids_dtype: Type of the ids.

    Args:
        ep: The rank.
        x: Its tokens.
        epoch: The launch's epoch.
        opening: What the first store waits for.
    """
    var T = readable_tokens(x.rows, x.num_tokens)
    for peer in range(Int(block_idx.x), ep.s.n_ranks, Int(grid_dim.x)):
        _send_table(ep, x, T, epoch, peer, opening)


@always_inline
def _send_table[
    ids_dtype: DType
](
    ep: Endpoint[True],
    x: DispatchInput[ids_dtype],
    T: Int,
    epoch: UInt64,
    peer: Int,
    mut opening: Opening,
):
    """Write the routing table into a peer's window, and say so in the header; the whole CTA calls this."""
    comptime V = 8
    var buffer = ep.buffer(epoch)
    var n = T * ep.s.top_k
    var window = ep.count[peer]
    var ids = typed[DType.int16](window, ep.window.table_ids(buffer, ep.me))
    var weights = typed[DType.float32](
        window, ep.window.table_weights(buffer, ep.me)
    )
    var whole = n // V * V
    var threads = Int(block_dim.x)
    for i in range(Int(thread_idx.x) * V, whole, threads * V):
        var id = x.ids.ptr.unsafe_load[width=V, alignment=4, invariant=False](
            i
        ).cast[DType.int64]()
        var w = SIMD[DType.float32, V](1)
        if x.weights.present():
            w = x.weights.ptr.unsafe_load[
                width=V, alignment=4, invariant=False
            ](i)
        if not opening.passed() or not opening.serves(peer):
            break
        ids.unsafe_store[width=V, alignment=16](
            i, normal_id(id, ep.s.n_experts)
        )
        weights.unsafe_store[width=V, alignment=16](i, w)
    if not opening.passed():
        return
    var served = opening.serves(peer)
    for i in range(whole + Int(thread_idx.x), n if served else 0, threads):
        ids.unsafe_store(
            i, normal_id(x.ids[i].cast[DType.int64](), ep.s.n_experts)
        )
        weights.unsafe_store(
            i, x.weights[i] if x.weights.present() else Float32(1)
        )
    barrier()
    if thread_idx.x == 0:
        if served:
            publish(window, ep.window.header(buffer, ep.me), word(epoch, T))
        note(ep.head.base, 4 * WORK_TABLED + 8 * peer, word(epoch, T))
    mark[MARK_TABLE_SENT](ep)


@always_inline
def send_tables_as_cells[
    ids_dtype: DType
](
    ep: Endpoint[True],
    x: DispatchInput[ids_dtype],
    epoch: UInt64,
    share: Share,
    mut opening: Opening,
):
    """Send the routing table to all peers as cells, one by a lane at a time; a warp calls this.

    So that the table leaves at once, before the links are full of messages, the warps are many, of all CTAs.

    Parameters:
        ids_dtype: Type of the ids.

    Args:
        ep: The rank.
        x: Its tokens.
        epoch: The launch's epoch.
        share: The calling warp's part: a piece is as many cells as the warp has lanes.
        opening: What the first store waits for.
    """
    var T = readable_tokens(x.rows, x.num_tokens)
    var n = T * ep.s.top_k
    var block = ep.s.max_tokens * ep.s.top_k
    var buffer = ep.buffer(epoch)
    var w = word(epoch, T)
    for i in range(
        share.first * WARP_SIZE + Int(lane_id()),
        ep.s.n_ranks * block,
        share.stride * WARP_SIZE,
    ):
        var turn = quotient(i, block)
        var window = ep.count[remainder(ep.me + turn, ep.s.n_ranks)]
        var at = i - turn * block
        var choice = Choice(NO_EXPERT, 0)
        if at < n:
            choice.id = normal_id(x.ids[at].cast[DType.int64](), ep.s.n_experts)
            choice.weight = 1
            if x.weights.present():
                choice.weight = x.weights[at]
        if not opening.passed():
            return
        store_cell(
            window.unsafe_offset(ep.window.table_cell(buffer, ep.me, at)),
            Cell(choice.payload(), w),
        )
        mark[MARK_TABLE_SENT](ep)
    if share.first == 0 and Int(lane_id()) < ep.s.n_ranks:
        if opening.passed():
            tell(ep.count[Int(lane_id())], ep.window.header(buffer, ep.me), w)


@always_inline
def tables_have_left(ep: Endpoint[True], epoch: UInt64, stage: Int32) -> Bool:
    """Wait until every peer's table has been sent, where tables are no cells; a warp calls this.

    Args:
        ep: The rank.
        epoch: The launch's epoch.
        stage: `STAGE_*`, for the failure record.

    Returns:
        The same to all lanes: False when the rank has failed.
    """
    var left = True
    if Int(lane_id()) < ep.s.n_ranks:
        var waiter = Waiter(ep.head, stage, False)
        var peer = Int(lane_id())
        var T = await_note(ep, waiter, epoch, WORK_TABLED, peer, peer=peer)
        left = T != NO_SIGNAL
    order_for_bulk()
    return ballot(not left) == 0
