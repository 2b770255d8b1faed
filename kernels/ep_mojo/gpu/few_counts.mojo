"""What ranks tell each other beside rows that travel back as cells (`few_combine.mojo`): headers, and how many rows.

A full cell stays where it lies until it has been read. One that nobody awaits would be taken for one of a later round.
So a launch may not end well where choices of combine are not those of its dispatch, as far as they name other rows:
either there are more or fewer than come, which is found out here; or some of them never come, and the deadline ends it.
The word that says how many lies where the signal of chunk 0 would. None of these words covers anything.
"""

from max.gpu import WARP_SIZE, block_idx, grid_dim, lane_id
from max.gpu.primitives import warp

from ..cell import tell
from ..combine_tensors import CombineInput, CombineOutput, travels_by_row
from ..launch import Endpoint
from ..layout import FIELD_ROWS, KIND_SHAPE, combine_header
from ..routing import destination, normal_id
from ..signal import NO_SIGNAL, Waiter, word
from .launch import warp_index
from .opening import Opening


@always_inline
def tell_headers[
    layout: StaticString, reduce: StaticString
](ep: Endpoint[False], x: CombineInput, epoch: UInt64):
    """Send the headers, in a launch that may go on; the warp that opens calls this.

    Parameters:
        layout: Output layout of the dispatch.
        reduce: "expert" or "source".

    Args:
        ep: The rank.
        x: The rows.
        epoch: The launch's epoch.
    """
    var peer = Int(lane_id())
    if block_idx.x == 0 and peer < ep.s.n_ranks:
        comptime by_row = travels_by_row[layout, reduce]()
        tell(
            ep.count[peer],
            ep.window.header(ep.buffer(epoch), ep.me),
            word(epoch, combine_header(Int(x.num_tokens[peer]), by_row)),
        )


@always_inline
def tell_rows[
    layout: StaticString, reduce: StaticString
](ep: Endpoint[False], x: CombineInput, epoch: UInt64, mut opening: Opening,):
    """Tell each peer how many rows, or sums, it gets; a warp of the first R CTAs does, behind what it sends itself.

    Parameters:
        layout: Output layout of the dispatch.
        reduce: "expert" or "source".

    Args:
        ep: The rank.
        x: The rows.
        epoch: The launch's epoch.
        opening: What the first store waits for.
    """
    if warp_index() != 0 or not opening.passed():
        return  # what the launch was given may be wrong
    comptime by_row = travels_by_row[layout, reduce]()
    var K = ep.s.top_k
    for peer in range(Int(block_idx.x), ep.s.n_ranks, Int(grid_dim.x)):
        var T = Int(x.num_tokens[peer])
        var rows: Int32 = 0
        comptime if layout == "gathered":
            rows = Int32(T) if lane_id() == 0 else 0
        else:
            for t in range(Int(lane_id()), T, WARP_SIZE):
                var at = (peer * ep.s.max_tokens + t) * K
                var mine: Int32 = 0
                for k in range(K):
                    mine += Int32(x.row_map[at + k] >= 0)
                rows += mine if by_row else min(mine, 1)
        rows = warp.sum(rows)
        if lane_id() == 0:
            tell(
                ep.count[peer],
                ep.window.signal(ep.buffer(epoch), ep.me, 0),
                word(epoch, Int(rows)),
            )


@always_inline
def compare_rows[
    ids_dtype: DType, by_row: Bool
](
    ep: Endpoint[False],
    x: CombineOutput[ids_dtype],
    T: Int,
    epoch: UInt64,
    waiter: Waiter,
    stage: Int32,
):
    """Record a failure where a peer tells of more or fewer rows than this rank awaits; a warp of the first R CTAs does.

    Parameters:
        ids_dtype: Type of the ids.
        by_row: Whether a row comes for each choice, and not one from each rank.

    Args:
        ep: The rank.
        x: Its tokens.
        T: How many.
        epoch: The launch's epoch.
        waiter: The launch's waiter.
        stage: `STAGE_*`, for the failure record.
    """
    if warp_index() != 0:
        return
    var s = ep.s
    for peer in range(Int(block_idx.x), s.n_ranks, Int(grid_dim.x)):
        var awaited: Int32 = 0
        if s.everywhere:
            awaited = Int32(T) if lane_id() == 0 else 0
        else:
            for t in range(Int(lane_id()), T, WARP_SIZE):
                var mine: Int32 = 0
                for k in range(s.top_k):
                    var id = x.ids[t * s.top_k + k].cast[DType.int64]()
                    mine += Int32(
                        destination(
                            normal_id(id, s.n_experts), s.n_local_experts()
                        )
                        == UInt32(1) << UInt32(peer)
                    )
                awaited += mine if by_row else min(mine, 1)
        awaited = warp.sum(awaited)
        if lane_id() == 0:
            var told = ep.chunk_of(waiter, epoch, peer, 0)
            if told != NO_SIGNAL and told != Int(awaited):
                ep.head.fail(
                    KIND_SHAPE,
                    stage,
                    peer=peer,
                    chunk=FIELD_ROWS,
                    value=told,
                    limit=Int(awaited),
                )
