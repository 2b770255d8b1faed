"""What leaves in a combine of few tokens (`few_combine.mojo`).

A warp takes some channels of a token, loads those of all its rows here at once, adds them in registers, and stores the
sum as cells.
"""

from max.gpu import lane_id
from max.gpu.primitives import warp
from std.bit import count_trailing_zeros
from std.sys import size_of

from ..cell import full_cell, store_cell
from ..combine_tensors import CombineInput, row_bytes, travels_by_row
from ..launch import Endpoint
from ..layout import (
    CELL_BYTES,
    FIELD_ROW_MAP,
    KIND_SHAPE,
    partial_offset,
    row_offset,
)
from ..numeric import quotient, remainder
from ..peers import Bytes, typed
from ..routing import NO_ROW, by_source
from .cells import Cut, add_row, to_row
from .gathered_rows import rows_before
from .opening import Opening
from .routing import ballot
from .share import Share
from .timeline import (
    MARK_COMBINE_SUMS_ARRIVED,
    MARK_COMBINE_SUM_READY,
    mark,
)

comptime SENT_AT_ONCE = 4
"""Rows of a sum that leaves whose loads are under way at once: of a token, a rank has seldom more."""


@always_inline
def sent_cells[narrow: Bool]() -> Int:
    """Cells of a lane in a piece that leaves.

    Parameters:
        narrow: Whether there are so few tokens that pieces are small.

    Returns:
        How many.
    """
    return 2 if narrow else 4


@always_inline
def _rows_of[
    layout: StaticString
](
    ep: Endpoint[False], x: CombineInput, tokens: Int32, source: Int, token: Int
) -> Int32:
    """To lane k, the row of a token's choice k, or `NO_ROW`; with rows by source the token's one row, to one lane."""
    var lane = Int(lane_id())
    comptime if layout == "gathered":
        var first = rows_before(tokens, source)
        return Int32(first + token) if lane == 0 else NO_ROW
    else:
        if lane >= ep.s.top_k:
            return NO_ROW
        var at = (source * ep.s.max_tokens + token) * ep.s.top_k
        return x.row_map[at + lane]


@always_inline
def send_sums_as_cells[
    dtype: DType,
    hidden: Int,
    layout: StaticString,
    reduce: StaticString,
    narrow: Bool,
](
    ep: Endpoint[False],
    x: CombineInput,
    epoch: UInt64,
    stage: Int32,
    share: Share,
    mut opening: Opening,
):
    """Send the calling warp's pieces: sums of a token's rows here; or its rows, one by one.

    Parameters:
        dtype: Type of the rows, and on the wire.
        hidden: H.
        layout: Output layout of the dispatch.
        reduce: "expert" or "source".
        narrow: Whether pieces are small.

    Args:
        ep: The rank.
        x: The rows.
        epoch: The launch's epoch.
        stage: `STAGE_*`, for the failure record.
        share: The calling warp's pieces.
        opening: What the first store waits for.
    """
    comptime size = row_bytes[dtype, hidden]()
    comptime by_row = travels_by_row[layout, reduce]()
    comptime sums = not by_row and not by_source[layout]()
    comptime C = sent_cells[narrow]()
    comptime cut = Cut[dtype, hidden, C]
    comptime V = cut.values
    comptime A = SENT_AT_ONCE
    var s = ep.s
    var lane = Int(lane_id())
    var buffer = ep.buffer(epoch)
    var rows = x.rows.size // size
    var tokens: Int32 = 0  # lane r: T of source r
    if lane < s.n_ranks:
        tokens = x.num_tokens[lane]
    for i in range(
        share.first, s.n_ranks * s.max_tokens * cut.pieces, share.stride
    ):
        var i_token = quotient(i, cut.pieces)
        var piece = i - i_token * cut.pieces
        var t = quotient(i_token, s.n_ranks)
        var source = remainder(ep.me + i_token, s.n_ranks)
        if t >= Int(warp.shuffle_idx(tokens, UInt32(source))):
            continue
        var row = _rows_of[layout](ep, x, tokens, source, t)
        var weight: Float32 = 1
        comptime if sums:
            if lane < s.top_k:
                weight = x.weights[(source * s.max_tokens + t) * s.top_k + lane]
        if ballot(Int(row) >= rows) != 0:
            if Int(row) >= rows:
                ep.head.fail(
                    KIND_SHAPE,
                    stage,
                    chunk=FIELD_ROW_MAP,
                    value=Int(row),
                    limit=rows - 1,
                )
            return
        var left = ballot(row >= 0)
        comptime if by_source[layout]():
            left &= ~left + 1  # there is one row
        if left == 0:
            continue
        var sum = Array[SIMD[DType.float32, V], C](fill=0)
        while left != 0:
            var loaded = Array[SIMD[DType.uint64, 2], A * C](fill=0)
            var weights = Array[Float32, A](fill=1)
            var which = Array[Int32, A](fill=-1)
            comptime for a in range(A):
                if left != 0:
                    var k = UInt32(count_trailing_zeros(left))
                    left &= left - 1
                    which[a] = Int32(k)
                    var from_ = x.rows.bytes(
                        Int(warp.shuffle_idx(row, k)) * size
                    )
                    weights[a] = warp.shuffle_idx(weight, k)
                    comptime for c in range(C):
                        var at = cut.channel(piece, c)
                        if at < hidden:
                            loaded[a * C + c] = typed[DType.uint64](
                                from_, 0
                            ).unsafe_load[
                                width=2, alignment=16, invariant=False
                            ](
                                2 * (at // V)
                            )
            comptime for a in range(A):
                if which[a] >= 0:
                    comptime if sums:
                        comptime for c in range(C):
                            sum[c] = add_row[dtype, V](
                                sum[c], loaded[a * C + c], weights[a]
                            )
                    else:
                        if not opening.passed():
                            return
                        var to = partial_offset(s, buffer, ep.me, t)
                        comptime if by_row:
                            to = row_offset(s, buffer, t, Int(which[a]))
                        comptime for c in range(C):
                            _store[dtype, hidden](
                                ep.recv[source].unsafe_offset(to),
                                cut.channel(piece, c),
                                loaded[a * C + c],
                            )
        mark[MARK_COMBINE_SUM_READY](ep)
        if not opening.passed():
            return
        comptime if sums:
            var to = ep.recv[source].unsafe_offset(
                partial_offset(s, buffer, ep.me, t)
            )
            comptime for c in range(C):
                _store[dtype, hidden](
                    to,
                    cut.channel(piece, c),
                    to_row[dtype, V](sum[c]),
                )
        mark[MARK_COMBINE_SUMS_ARRIVED](ep)


@always_inline
def _store[
    dtype: DType, hidden: Int
](to: Bytes, channel: Int, row: SIMD[DType.uint64, 2]):
    """Store a cell of a row, if the row has it."""
    if channel < hidden:
        store_cell(
            to.unsafe_offset(channel * size_of[Scalar[dtype]]()), full_cell(row)
        )
