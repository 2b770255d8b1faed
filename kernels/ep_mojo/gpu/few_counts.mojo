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
from ..peers import View
from ..settings import Settings
from ..signal import NO_SIGNAL, Waiter, word
from .launch import warp_index, warps
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


comptime CHOICES_AHEAD = 8
"""Choices of a token whose loads are under way at once."""


@always_inline
def count_travelling[
    dtype: DType, //, by_row: Bool
](
    choices: View[dtype],
    begin: Int64,
    end: Int64,
    T: Int,
    top_k: Int,
    lane: Int,
    lanes: Int,
) -> Int:
    """How many rows, or sums, travel for some tokens: of choices whose value lies in a range; a lane's part of them.

    Parameters:
        dtype: Type of the choices.
        by_row: Whether each row travels, and not one sum for each token.

    Args:
        choices: [T, K].
        begin: The least value in the range.
        end: The one behind the largest.
        T: The tokens.
        top_k: K.
        lane: The calling lane.
        lanes: How many share the tokens.

    Returns:
        Of the calling lane's tokens.
    """
    var rows = 0
    for t in range(lane, T, lanes):
        var found = 0
        for first in range(0, top_k, CHOICES_AHEAD):
            var value = Array[Int64, CHOICES_AHEAD](fill=0)
            comptime for u in range(CHOICES_AHEAD):  # no branch between loads
                value[u] = choices[t * top_k + min(first + u, top_k - 1)].cast[
                    DType.int64
                ]()
            comptime for u in range(CHOICES_AHEAD):
                var here = (value[u] >= begin) & (value[u] < end)
                found += Int(here & (first + u < top_k))
        rows += found if by_row else min(found, 1)
    return rows


@always_inline
def rows_sent[
    by_row: Bool
](row_map: View[DType.int32], T: Int, top_k: Int, lane: Int, lanes: Int) -> Int:
    """How many rows, or sums, leave for a source; a lane's part of them.

    Parameters:
        by_row: Whether each row travels, and not one sum for each token.

    Args:
        row_map: Int32 [T, K], of the source.
        T: Its tokens.
        top_k: K.
        lane: The calling lane.
        lanes: How many share the tokens.

    Returns:
        Of the calling lane's tokens.
    """
    return count_travelling[by_row](
        row_map, 0, Int64.MAX, T, top_k, lane, lanes
    )


@always_inline
def rows_awaited[
    ids_dtype: DType, by_row: Bool
](
    s: Settings,
    ids: View[ids_dtype],
    T: Int,
    peer: Int,
    lane: Int,
    lanes: Int,
) -> Int:
    """How many rows, or sums, come from a peer; a lane's part of them.

    Parameters:
        ids_dtype: Type of the ids.
        by_row: Whether each row travels, and not one sum for each token.

    Args:
        s: The settings.
        ids: [T, K].
        T: The rank's tokens.
        peer: The peer.
        lane: The calling lane.
        lanes: How many share the tokens.

    Returns:
        Of the calling lane's tokens.
    """
    var begin = Int64(peer * s.n_local_experts())  # the peer's experts
    var end = begin + Int64(s.n_local_experts())
    return count_travelling[by_row](ids, begin, end, T, s.top_k, lane, lanes)


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
    # Of the last warps, which send least, the one that has not opened the launch.
    if warp_index() != max(0, warps() - 2) or not opening.passed():
        return  # what the launch was given may be wrong
    comptime by_row = travels_by_row[layout, reduce]()
    var block = ep.s.max_tokens * ep.s.top_k
    for peer in range(Int(block_idx.x), ep.s.n_ranks, Int(grid_dim.x)):
        var T = Int(x.num_tokens[peer])
        var rows = T
        comptime if layout != "gathered":
            rows = Int(
                warp.sum(
                    Int32(
                        rows_sent[by_row](
                            x.row_map.part(peer * block, block),
                            T,
                            ep.s.top_k,
                            Int(lane_id()),
                            WARP_SIZE,
                        )
                    )
                )
            )
        if lane_id() == 0:
            tell(
                ep.count[peer],
                ep.window.signal(ep.buffer(epoch), ep.me, 0),
                word(epoch, rows),
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
    for peer in range(Int(block_idx.x), ep.s.n_ranks, Int(grid_dim.x)):
        var awaited = T
        if not ep.s.everywhere:
            awaited = Int(
                warp.sum(
                    Int32(
                        rows_awaited[ids_dtype, by_row](
                            ep.s, x.ids, T, peer, Int(lane_id()), WARP_SIZE
                        )
                    )
                )
            )
        if lane_id() == 0:
            var told = ep.chunk_of(waiter, epoch, peer, 0)
            if told != NO_SIGNAL and told != awaited:
                ep.head.fail(
                    KIND_SHAPE,
                    stage,
                    peer=peer,
                    chunk=FIELD_ROWS,
                    value=told,
                    limit=awaited,
                )
