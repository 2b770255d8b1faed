"""The host's combine_async: expert rows go back to the ranks that their tokens came from.

For each source rank and each token of it that has rows here (the handle's `row_map` says which):

    reduce "expert"   one partial sum over k ascending, float32, rounded once, to slot (my rank, token)
    reduce "source"   every row as it is, to slot (token, k)
    layout "rank"     the token's one row as it is, to slot (my rank, token)

Writes the source's combine windows of buffer `epoch mod B`: rows, then signal c once the rows of the source's tokens
c*G .. c*G+G-1 are there, also where there were none; a header first. `begin_send` has awaited the buffer's credits.
"""

from ..launch import Endpoint
from ..layout import (
    FIELD_RECV_NUM_TOKENS,
    FIELD_ROW_MAP,
    KIND_SHAPE,
    combine_header,
    partial_offset,
    row_offset,
)
from ..numeric import accumulate, store_f32
from ..peers import Bytes, View
from ..signal import finish_streaming, publish, word
from ..team import HostTeam, copy_bytes, zero_bytes
from .workers import exceeds_caches, n_workers, share

comptime WIDTH = 64
"""Channels that are summed at a time."""


struct CombineInput(ImplicitlyCopyable, Movable):
    """Expert rows, and what the handle says about them."""

    var rows: View[DType.uint8]
    """[rows, H] as bytes."""
    var row_map: View[DType.int32]
    """[R, Tm, K]."""
    var weights: View[DType.float32]
    """[R, Tm, K]."""
    var num_tokens: View[DType.int32]
    """[R]."""
    var shared_out: View[DType.uint8]
    """[T, H] as bytes: receives the shared expert's rows; size 0 without a shared expert."""

    def __init__(
        out self,
        rows: View[DType.uint8],
        row_map: View[DType.int32],
        weights: View[DType.float32],
        num_tokens: View[DType.int32],
        shared_out: View[DType.uint8],
    ):
        """Name the tensors.

        Args:
            rows: Expert rows as bytes.
            row_map: The row of each choice.
            weights: All sources' weights.
            num_tokens: All sources' T.
            shared_out: Output for the shared expert's rows.
        """
        self.rows = rows
        self.row_map = row_map
        self.weights = weights
        self.num_tokens = num_tokens
        self.shared_out = shared_out


def combine_async[
    dtype: DType, hidden: Int, layout: StaticString, reduce: StaticString
](ep: Endpoint[False], x: CombineInput, stage: Int32) raises:
    """Send.

    Parameters:
        dtype: Type of the rows, and on the wire.
        hidden: H.
        layout: Output layout of the dispatch.
        reduce: "expert" or "source".

    Args:
        ep: The rank.
        x: The rows.
        stage: `STAGE_*`, for the failure record.

    Raises:
        What the worker pool raises; failures of the protocol go on record instead.
    """
    comptime row_bytes = hidden * (2 if dtype == DType.bfloat16 else 4)
    comptime by_row = reduce == "source" and layout != "rank"
    var s = ep.s
    var epoch = ep.begin_send(stage)
    if not ep.head.failed():
        _check_handle(ep, x, x.rows.size // row_bytes, stage)
    if ep.head.failed():
        zero_bytes[HostTeam](x.shared_out.bytes(), x.shared_out.size)
        ep.end_send(epoch)
        return
    var buffer = ep.buffer(epoch)
    for i in range(s.n_ranks):
        var peer = (ep.me + i) % s.n_ranks
        publish(
            ep.count[peer],
            ep.window.header(buffer, ep.me),
            word(epoch, combine_header(Int(x.num_tokens[peer]), by_row)),
        )
    if x.shared_out.present():
        var own = min(Int(x.num_tokens[ep.me]) * row_bytes, x.shared_out.size)
        copy_bytes[HostTeam](x.rows.bytes(), x.shared_out.bytes(), own)
        zero_bytes[HostTeam](x.shared_out.bytes(own), x.shared_out.size - own)

    var per_source = s.n_signals(s.max_tokens)
    var items = s.n_ranks * per_source
    var block = s.max_tokens * s.top_k
    var tokens = 0
    for r in range(s.n_ranks):
        tokens += Int(x.num_tokens[r])
    var workers = n_workers(s, items, tokens * row_bytes)
    var streams = exceeds_caches(tokens * row_bytes)

    def work(i: Int) raises {imm}:
        var source = (ep.me + i) % s.n_ranks
        var chunk = i // s.n_ranks
        var first = chunk * s.tokens_per_signal
        var T = Int(x.num_tokens[source])
        if first >= T:
            return
        for t in range(first, min(first + s.tokens_per_signal, T)):
            var at = source * block + t * s.top_k
            comptime if by_row:
                for k in range(s.top_k):
                    var row = Int(x.row_map[at + k])
                    if row >= 0:
                        var to = ep.recv[source].unsafe_offset(
                            row_offset(s, buffer, t, k)
                        )
                        copy_bytes[HostTeam](
                            x.rows.bytes(row * row_bytes), to, row_bytes
                        )
            else:
                var to = ep.recv[source].unsafe_offset(
                    partial_offset(s, buffer, ep.me, t)
                )
                _send_partial[dtype, hidden, layout == "rank"](
                    x, at, s.top_k, to, streams
                )
        finish_streaming()
        publish(
            ep.count[source],
            ep.window.signal(buffer, ep.me, chunk),
            word(epoch, 0),
        )

    share(work, items, workers)
    ep.end_send(epoch)


def _check_handle(
    ep: Endpoint[False], x: CombineInput, rows: Int, stage: Int32
):
    """Record a failure where the handle names rows or tokens that are not there."""
    var s = ep.s
    for r in range(s.n_ranks):
        var T = Int(x.num_tokens[r])
        if T < 0 or T > s.max_tokens:
            ep.head.fail(
                KIND_SHAPE,
                stage,
                chunk=FIELD_RECV_NUM_TOKENS,
                value=T,
                limit=s.max_tokens,
            )
            return
        var highest: Int32 = -1
        var first = r * s.max_tokens * s.top_k
        for i in range(first, first + T * s.top_k):
            highest = max(highest, x.row_map[i])
        if x.shared_out.present() and r == ep.me:
            highest = max(highest, Int32(T) - 1)
        if Int(highest) >= rows:
            ep.head.fail(
                KIND_SHAPE,
                stage,
                chunk=FIELD_ROW_MAP,
                value=Int(highest),
                limit=rows - 1,
            )
            return


@always_inline
def _send_partial[
    dtype: DType, hidden: Int, unweighted: Bool
](x: CombineInput, at: Int, top_k: Int, to: Bytes, streams: Bool):
    """Sum a token's rows of this rank, if it has any, into the source's window."""
    comptime row_bytes = hidden * (2 if dtype == DType.bfloat16 else 4)
    var rows = Array[Int, 32](fill=0)
    var weights = Array[Float32, 32](fill=0)
    var n = 0
    for k in range(top_k):
        var row = Int(x.row_map[at + k])
        if row >= 0:
            rows[n] = row
            weights[n] = x.weights[at + k]
            n += 1
    if n == 0:
        return
    comptime if unweighted:
        copy_bytes[HostTeam](x.rows.bytes(rows[0] * row_bytes), to, row_bytes)
        return

    @always_inline
    def sum[width: Int, streams: Bool](i: Int) {imm}:
        var acc = SIMD[DType.float32, width](0)
        for j in range(n):
            acc = accumulate[dtype, width](
                acc, x.rows.bytes(rows[j] * row_bytes), i, weights[j]
            )
        store_f32[dtype, width, streams](to, i, acc)

    comptime whole = hidden // WIDTH * WIDTH
    if streams and Int(to) % 64 == 0:
        for i in range(0, whole, WIDTH):
            sum[WIDTH, True](i)
    else:
        for i in range(0, whole, WIDTH):
            sum[WIDTH, False](i)
    for i in range(whole, hidden, 8):
        sum[8, False](i)
