"""How routing tables are brought in (`tables.mojo` says what they travel as): choices as cells, for who maps them and
for rows that name their choices; and weights out of the window."""

from max.gpu import WARP_SIZE, block_dim, lane_id, thread_idx
from max.gpu.sync import barrier, syncwarp

from ..cell import load_cell
from ..dispatch_tensors import DispatchOutput, put_choice, table_weights
from ..launch import Endpoint
from ..layout import CHUNK_HEADER
from ..numeric import quotient
from ..peers import View
from ..signal import NO_SIGNAL, Waiter, value_of
from ..team import WarpTeam
from .cells import Cells
from .pieces import Piece
from .routing import ballot
from .share import Share
from .shared_memory import TABLE_WORDS, shared_memory
from .tables import Choice

comptime CHOICES_AHEAD = 4
"""Choices that a thread awaits at once: with 8 warps, all that it has of few tokens."""


@always_inline
def bring_choices(
    ep: Endpoint[True],
    waiter: Waiter,
    epoch: UInt64,
    piece: Piece,
    ids: View[DType.int16],
    out_: DispatchOutput,
) -> Int:
    """Await a piece of a source's table that travels as cells; the whole CTA calls this, and meets.

    Args:
        ep: The rank.
        waiter: The launch's waiter.
        epoch: The launch's epoch.
        piece: The piece.
        ids: Int16 [Tmax, K], in shared memory that nobody reads any more: out, at the piece's choices.
        out_: `recv_weights` are written there, too.

    Returns:
        The same to all threads: T of the source, or `NO_SIGNAL` when the rank has failed.
    """
    var said = View[DType.int32](Int(shared_memory(TABLE_WORDS)), 2)
    if thread_idx.x == 0:
        said[0] = 0  # whether a cell has not come; behind it T
    barrier()
    var K = ep.s.top_k
    var come = await_choices[one_source=True](
        ep,
        waiter,
        epoch,
        piece.source,
        piece.begin * K,
        piece.limit * K,
        ids,
        out_.recv_weights,
        said.part(1, 1),
    )
    if not come:
        said[0] = 1
    barrier()
    var T = Int(said[1]) if said[0] == 0 else NO_SIGNAL
    barrier()
    return T


@always_inline
def await_choices[
    one_source: Bool
](
    ep: Endpoint[True],
    waiter: Waiter,
    epoch: UInt64,
    source: Int,
    begin: Int,
    end: Int,
    ids: View[DType.int16],
    weights: View[DType.float32],
    tokens: View[DType.int32],
) -> Bool:
    """Await choices, of one source or from one source on; each thread of the CTA its part.

    Parameters:
        one_source: Whether all of them are of one source.

    Args:
        ep: The rank.
        waiter: The launch's waiter.
        epoch: The launch's epoch.
        source: The source of the first one.
        begin: The first one, of the Tmax * K of this source.
        end: Behind the last one, counted likewise.
        ids: Out: the expert of each, counted likewise.
        weights: Out [R, Tmax, K]: the weights; may be absent.
        tokens: Out: T of each source, by the thread that has its first choice here.

    Returns:
        Of the calling thread alone: False when the rank has failed.
    """
    comptime A = CHOICES_AHEAD
    var size = ep.s.max_tokens * ep.s.top_k
    var window = ep.own_count()
    var buffer = ep.buffer(epoch)
    var threads = Int(block_dim.x)
    for base in range(begin + Int(thread_idx.x), end, A * threads):
        var some = Cells[A]()
        comptime for a in range(A):
            var i = base + a * threads
            if i < end:
                var turn = 0 if one_source else quotient(i, size)
                var r = source + turn
                var at = ep.window.table_cell(buffer, r, i - turn * size)
                some.want[a](window.unsafe_offset(at), r)
        if not some.come(ep, waiter, epoch, Int(CHUNK_HEADER)):
            return False
        comptime for a in range(A):
            var i = base + a * threads
            if i < end:
                var choice = Choice(some.payload[a])
                ids[i] = choice.id
                if weights.present():
                    weights[source * size + i] = choice.weight
                var turn = 0 if one_source else quotient(i, size)
                if i == max(begin, turn * size):
                    tokens[turn] = Int32(value_of(some.word[a]))
    return True


@always_inline
def localise_cells[
    layout: StaticString, come: Bool
](
    ep: Endpoint[True],
    waiter: Waiter,
    epoch: UInt64,
    source: Int,
    token: Int,
    row: Int,
    out_: DispatchOutput,
):
    """`localise`, by a warp, from the cells of the source's table.

    Parameters:
        layout: Output layout.
        come: Whether they have come for sure: the warp has learnt that behind a barrier or by an acquire.

    Args:
        ep: The rank.
        waiter: The launch's waiter.
        epoch: The launch's epoch.
        source: The source.
        token: Its token.
        row: The row.
        out_: The outputs.
    """
    var K = ep.s.top_k
    for k in range(Int(lane_id()), K, WARP_SIZE):
        var i = ep.window.table_cell(ep.buffer(epoch), source, token * K + k)
        var at = ep.own_count().unsafe_offset(i)
        var payload: UInt64
        comptime if come:
            payload = load_cell(at).payload
        else:
            var cell = Cells[1]()
            cell.want[0](at, source)
            if not cell.come(ep, waiter, epoch, Int(CHUNK_HEADER)):
                break
            payload = cell.payload[0]
        var choice = Choice(payload)
        put_choice[layout](ep, row * K + k, choice.id, choice.weight, out_)
    syncwarp()


@always_inline
def keep_weights(
    ep: Endpoint[True],
    epoch: UInt64,
    waiter: Waiter,
    share: Share,
    out_: DispatchOutput,
):
    """Copy the sources' weights out of the window, while others map the rows.

    Args:
        ep: The rank.
        epoch: The launch's epoch.
        waiter: The launch's waiter.
        share: The calling warp's pieces, of 4 weights a lane.
        out_: The outputs.
    """
    comptime V = 4
    comptime piece = V * WarpTeam.lanes
    var block = ep.s.max_tokens * ep.s.top_k
    var pieces = (block + piece - 1) // piece
    var buffer = ep.buffer(epoch)
    for i in range(share.first, ep.s.n_ranks * pieces, share.stride):
        var r = quotient(i, pieces)
        var T = ep.tokens_of(waiter, epoch, r)
        if ballot(T == NO_SIGNAL) != 0:
            return
        var n = T * ep.s.top_k
        var given = table_weights(ep, buffer, r)
        var at = (i - r * pieces) * piece + Int(lane_id()) * V
        for j in range(at, min(at + V, block)):
            out_.recv_weights[r * block + j] = given[j] if j < n else Float32(0)
