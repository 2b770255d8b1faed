"""Rows to every peer, and nothing else: what the links can do, by the moves that the stages use.

For benchmarks. Nobody is told, and nothing is awaited but the own stores: no round may be under way.
"""

from max.gpu import WARP_SIZE, lane_id
from max.gpu.host import DeviceContext

from ..cell import Cell, has_cells, store_cell
from ..layout import (
    CELL_BYTES,
    CELL_PAYLOAD,
    align_up,
    message_offset,
    partial_offset,
)
from ..peers import Bytes, View, typed
from .launch import ByValue, Peers, Shape, warp_memory, warp_slot
from .share import Share
from .shared_memory import SLOT_ALIGNMENT
from .shared_rows import finish_stores, release_slots, store_row


@always_inline
def _store_as_cells[size: Int, marked: Bool](row: Bytes, to: Bytes):
    """Store a row that lies in shared memory as marked cells of no epoch; or as many full cells that hold nothing."""
    comptime payload = CELL_PAYLOAD if marked else CELL_BYTES
    for i in range(Int(lane_id()), size // payload, WARP_SIZE):
        var cell = Cell(0, 0)
        comptime if marked:
            cell.payload = typed[DType.uint64](row, 0).unsafe_load[
                invariant=False
            ](i)
        store_cell(to.unsafe_offset(CELL_BYTES * i), cell)


def push_stage[
    size: Int, dispatch: Bool
](peers: ByValue[Peers], rows: ByValue[View[DType.uint8]]):
    """The kernel.

    Parameters:
        size: Bytes of a row.
        dispatch: Whether to the windows of dispatch, or of combine.

    Args:
        peers: The rank's side.
        rows: What each peer gets, in its first buffer, at the places of this rank's messages or sums.
    """
    if not peers.value.valid():
        return
    var ep = peers.value.endpoint[dispatch]()
    var s = ep.s
    var slot = warp_slot(
        warp_memory(align_up(size, SLOT_ALIGNMENT)), sending=True
    )
    var others = s.n_ranks - 1
    var share = Share()
    for i in range(share.first, rows.value.size // size * others, share.stride):
        var peer = (ep.me + 1 + i % others) % s.n_ranks
        var row = i // others
        var at = message_offset(
            s, 0, ep.me, row
        ) if dispatch else partial_offset(s, 0, ep.me, row)
        release_slots()
        slot.load[size](rows.value.bytes(row * size))
        var to = ep.recv[peer].unsafe_offset(at)
        if has_cells() and (s.in_cells if dispatch else s.rows_in_cells):
            _store_as_cells[size, dispatch](slot.row, to)
        else:
            store_row[size](slot.row, 1, to)
    finish_stores()


def push[
    size: Int, dispatch: Bool
](peers: Peers, rows: View[DType.uint8], ctx: DeviceContext) raises:
    """Launch it.

    Parameters:
        size: Bytes of a row.
        dispatch: Whether to the windows of dispatch, or of combine.

    Args:
        peers: The rank's side.
        rows: What each peer gets.
        ctx: The device.

    Raises:
        UnsupportedError as text in front of the message, or what the driver raises.
    """
    var shape = Shape(
        ctx,
        peers.s,
        items=rows.size // size * (peers.s.n_ranks - 1),
        warp_bytes=align_up(size, SLOT_ALIGNMENT),
    )
    ctx.enqueue_function[push_stage[size, dispatch]](
        ByValue(peers),
        ByValue(rows),
        grid_dim=shape.ctas,
        block_dim=shape.threads,
        shared_mem_bytes=shape.shared_bytes,
        func_attribute=shape.memory(),
    )
