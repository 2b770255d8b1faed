"""What arrives in a combine of few tokens (`few_combine.mojo`).

A warp takes some channels of a token, awaits the cells of some terms of their sum at once, and adds them in registers,
in the same order as `receive_sums.mojo`: biases, the shared expert's row, then what came, k or ranks ascending.
"""

from max.gpu import lane_id
from max.gpu.primitives import warp
from max.gpu.sync import syncwarp
from std.bit import count_trailing_zeros
from std.sys import size_of

from ..cell import Cell, of_full_cell
from ..combine_tensors import (
    CombineOutput,
    check_header,
    row_bytes,
    travels_by_row,
)
from ..launch import Endpoint
from ..layout import partial_offset, row_offset
from ..numeric import accumulate, quotient, store_f32
from ..routing import NO_EXPERT, everyone, normal_id
from ..signal import NO_SIGNAL, Waiter
from ..team import WarpTeam, zero_bytes
from ..tokens import given_tokens
from .cells import Cells, Cut, add_row
from .few_counts import compare_rows
from .routing import ballot, destination_of_lanes
from .share import Share
from .timeline import (
    MARK_COMBINE_SIGNALS_SEEN,
    MARK_COMBINE_TOKEN_WRITTEN,
    mark,
)


@always_inline
def received_cells[narrow: Bool]() -> Int:
    """Cells of a lane in a piece.

    Parameters:
        narrow: Whether there are so few tokens that pieces are small.

    Returns:
        How many.
    """
    return 1 if narrow else 4


comptime CELLS_AT_ONCE = 8
"""Cells of a lane that are awaited at once, of several terms of a sum."""


struct Arrivals(TrivialRegisterPassable):
    """What comes from other ranks for one token."""

    var all: UInt64
    """The choices, or the ranks, that it comes from: a bit each."""
    var peers: UInt32
    """Lane k: the rank that sends the row of choice k. Not used for sums of ranks."""
    var weight: Float32
    """Lane k: the weight of choice k. Not used for sums of ranks."""

    @always_inline
    def __init__(out self):
        """Nothing."""
        self.all = 0
        self.peers = 0
        self.weight = 1


@always_inline
def _terms_of[
    ids_dtype: DType, by_row: Bool
](ep: Endpoint[False], x: CombineOutput[ids_dtype], token: Int) -> Arrivals:
    """Find out what comes for a token; a warp calls this."""
    var s = ep.s
    var lane = Int(lane_id())
    var id = NO_EXPERT
    var terms = Arrivals()
    if lane < s.top_k and not (s.everywhere and not by_row):
        id = normal_id(
            x.ids[token * s.top_k + lane].cast[DType.int64](), s.n_experts
        )
    comptime if by_row:
        terms.all = ballot(id != NO_EXPERT)
        if id != NO_EXPERT:
            terms.peers = UInt32(quotient(Int(id), s.n_local_experts()))
            terms.weight = x.weight(token, lane, s.top_k)
    else:
        var ranks = destination_of_lanes(s, id)
        if s.everywhere:
            ranks = everyone(s)
        terms.all = UInt64(ranks)
    return terms


@always_inline
def _receive_sums[
    dtype: DType,
    out_dtype: DType,
    bias_dtype: DType,
    ids_dtype: DType,
    hidden: Int,
    by_row: Bool,
    narrow: Bool,
](
    ep: Endpoint[False],
    x: CombineOutput[ids_dtype],
    T: Int,
    epoch: UInt64,
    waiter: Waiter,
    share: Share,
):
    """Sum the calling warp's pieces, as what they are made of arrives.

    Parameters:
        dtype: Type on the wire, and of the shared expert's rows.
        out_dtype: Type of the output.
        bias_dtype: Type of both biases.
        ids_dtype: Type of the ids.
        hidden: H.
        by_row: Whether a row came for each choice, and not one from each rank.
        narrow: Whether pieces are small.

    Args:
        ep: The rank.
        x: Its tokens.
        T: How many.
        epoch: The launch's epoch.
        waiter: The launch's waiter.
        share: The calling warp's pieces.
    """
    comptime C = received_cells[narrow]()
    comptime cut = Cut[dtype, hidden, C]
    comptime V = cut.values
    comptime A = CELLS_AT_ONCE // C
    for i in range(share.first, T * cut.pieces, share.stride):
        var token = quotient(i, cut.pieces)
        var piece = i - token * cut.pieces
        var chunk = quotient(token, ep.s.tokens_per_signal)
        var terms = _terms_of[ids_dtype, by_row](ep, x, token)
        var sum = Array[SIMD[DType.float32, V], C](fill=0)
        comptime for c in range(C):
            var channel = cut.channel(piece, c)
            if channel < hidden:
                sum[c] = _begin[dtype, bias_dtype, ids_dtype, hidden, V](
                    x, token, channel
                )
        while terms.all != 0:
            var some = Cells[A * C, full=True]()
            var weights = Array[Float32, A](fill=1)
            var n = 0
            comptime for a in range(A):
                if terms.all != 0:
                    var which = Int(count_trailing_zeros(terms.all))
                    terms.all &= terms.all - 1
                    n = a + 1
                    var peer = which
                    var row: Int
                    comptime if by_row:
                        peer = Int(warp.shuffle_idx(terms.peers, UInt32(which)))
                        weights[a] = warp.shuffle_idx(
                            terms.weight, UInt32(which)
                        )
                        row = row_offset(ep.s, ep.buffer(epoch), token, which)
                    else:
                        row = partial_offset(
                            ep.s, ep.buffer(epoch), which, token
                        )
                    var cells = ep.recv[ep.me].unsafe_offset(row)
                    comptime for c in range(C):
                        var channel = cut.channel(piece, c)
                        if channel < hidden:
                            some.want[a * C + c](
                                cells.unsafe_offset(
                                    channel * size_of[Scalar[dtype]]()
                                ),
                                peer,
                            )
            if ballot(not some.come(ep, waiter, epoch, chunk)) != 0:
                return
            mark[MARK_COMBINE_SIGNALS_SEEN](ep)
            comptime for a in range(A):
                if a < n:
                    comptime for c in range(C):
                        comptime i = a * C + c
                        sum[c] = add_row[dtype, V](
                            sum[c],
                            of_full_cell(Cell(some.payload[i], some.word[i])),
                            weights[a],
                        )
        var y = x.y.bytes(token * row_bytes[out_dtype, hidden]())
        comptime for c in range(C):
            var channel = cut.channel(piece, c)
            if channel < hidden:
                store_f32[out_dtype, V](y, channel, sum[c])
        mark[MARK_COMBINE_TOKEN_WRITTEN](ep)


@always_inline
def receive_back_as_cells[
    dtype: DType,
    out_dtype: DType,
    bias_dtype: DType,
    ids_dtype: DType,
    hidden: Int,
    layout: StaticString,
    reduce: StaticString,
    narrow: Bool,
](
    ep: Endpoint[False],
    x: CombineOutput[ids_dtype],
    epoch: UInt64,
    stage: Int32,
    share: Share,
):
    """Receive and sum, in a launch that may go on.

    Parameters:
        dtype: Type on the wire, and of the shared expert's rows.
        out_dtype: Type of the output.
        bias_dtype: Type of both biases.
        ids_dtype: Type of the ids.
        hidden: H.
        layout: Output layout of the dispatch.
        reduce: "expert" or "source".
        narrow: Whether pieces are small.

    Args:
        ep: The rank.
        x: Its tokens.
        epoch: The launch's epoch.
        stage: `STAGE_*`, for the failure record.
        share: The calling warp's part.
    """
    comptime out_bytes = row_bytes[out_dtype, hidden]()
    comptime by_row = travels_by_row[layout, reduce]()
    var waiter = ep.waiter(stage)
    var T = given_tokens(x.rows, x.num_tokens)
    for t in range(T + share.first, x.rows, share.stride):
        zero_bytes[WarpTeam](x.y.bytes(t * out_bytes), out_bytes)
    var fine = True
    var peer = Int(lane_id())
    if peer < ep.s.n_ranks:
        var header = ep.header_of(waiter, epoch, peer)
        fine = header != NO_SIGNAL
        if fine:
            fine = check_header(ep, stage, peer, header, T, by_row)
    var missing = ballot(not fine)
    syncwarp()
    if missing == 0:
        compare_rows[ids_dtype, by_row](ep, x, T, epoch, waiter, stage)
        _receive_sums[
            dtype, out_dtype, bias_dtype, ids_dtype, hidden, by_row, narrow
        ](ep, x, T, epoch, waiter, share)


@always_inline
def _begin[
    dtype: DType, bias_dtype: DType, ids_dtype: DType, hidden: Int, V: Int
](x: CombineOutput[ids_dtype], token: Int, channel: Int) -> SIMD[
    DType.float32, V
]:
    """Biases, then the shared expert's row, from a channel on."""
    var sum = SIMD[DType.float32, V](0)
    comptime bias_bytes = row_bytes[bias_dtype, hidden]()
    if x.bias0.present():
        sum = accumulate[bias_dtype, V](
            sum, x.bias0.bytes(token * bias_bytes), channel, 1
        )
    if x.bias1.present():
        sum = accumulate[bias_dtype, V](
            sum, x.bias1.bytes(token * bias_bytes), channel, 1
        )
    if x.shared_rows.present():
        sum = accumulate[dtype, V](
            sum,
            x.shared_rows.bytes(token * row_bytes[dtype, hidden]()),
            channel,
            1,
        )
    return sum
