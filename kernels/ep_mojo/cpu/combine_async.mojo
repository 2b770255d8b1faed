"""The host's combine_async: expert rows go back to the ranks that their tokens came from.

For each source rank and each token of it that has rows here (the handle's `row_map` says which):

    reduce "expert"   one partial sum over k ascending, float32, rounded once, to slot (my rank, token)
    reduce "source"   every row as it is, to slot (token, k)
    layout "rank"     the token's one row as it is, to slot (my rank, token)
    layout "gathered" the same; row t of the source's rows, which come after those of the sources before it

Writes the source's combine windows of buffer `epoch mod B`: rows, then signal c once the rows of the source's tokens
c*G .. c*G+G-1 are there, also where there were none; a header first. `begin_send` has awaited the buffer's credits.
"""

from ..combine_tensors import CombineInput, row_bytes, sum_terms, travels_by_row
from ..launch import Endpoint
from ..layout import (
    FIELD_RECV_NUM_TOKENS,
    FIELD_ROW_MAP,
    KIND_SHAPE,
    combine_header,
    partial_offset,
    row_offset,
)
from ..peers import Bytes, Scratch
from ..signal import finish_streaming, publish, word
from ..team import HostTeam, copy_bytes, zero_bytes
from .workers import exceeds_caches, n_workers, share


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
    comptime size = row_bytes[dtype, hidden]()
    comptime by_row = travels_by_row[layout, reduce]()
    var s = ep.s
    var epoch = ep.begin_send[HostTeam](stage)
    if not ep.head.failed():
        _check_handle[layout](ep, x, x.rows.size // size, stage)
    if ep.head.failed():
        zero_bytes[HostTeam](x.shared_out.bytes(), x.shared_out.size)
        ep.end_send[HostTeam](epoch, ep.head.failed())
        return
    var buffer = ep.buffer(epoch)
    var masked = ep.masked()
    for i in range(s.n_ranks):
        var peer = (ep.me + i) % s.n_ranks
        if (masked >> UInt32(peer)) & 1 == 1:
            continue
        publish(
            ep.count[peer],
            ep.window.header(buffer, ep.me),
            word(epoch, combine_header(Int(x.num_tokens[peer]), by_row)),
        )
    if x.shared_out.present():
        var own = min(Int(x.num_tokens[ep.me]) * size, x.shared_out.size)
        copy_bytes[HostTeam](x.rows.bytes(), x.shared_out.bytes(), own)
        zero_bytes[HostTeam](x.shared_out.bytes(own), x.shared_out.size - own)

    var starts = Scratch[DType.int32](s.n_ranks)
    var start = starts.view()  # rows gathered before each source's
    var block = s.max_tokens * s.top_k
    var tokens = 0
    var longest = 0
    for r in range(s.n_ranks):
        start[r] = Int32(tokens)
        tokens += Int(x.num_tokens[r])
        longest = max(longest, Int(x.num_tokens[r]))
    var items = s.n_ranks * s.n_signals(longest)
    var workers = n_workers(s, items, tokens * size)
    var streams = exceeds_caches(tokens * size)

    def work(i: Int) raises {imm}:
        var source = (ep.me + i) % s.n_ranks
        var chunk = i // s.n_ranks
        var first = chunk * s.tokens_per_signal
        var T = Int(x.num_tokens[source])
        if first >= T or (masked >> UInt32(source)) & 1 == 1:
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
                        copy_bytes[HostTeam](x.rows.bytes(row * size), to, size)
            else:
                var to = ep.recv[source].unsafe_offset(
                    partial_offset(s, buffer, ep.me, t)
                )
                comptime if layout == "gathered":
                    var row = Int(start[source]) + t
                    copy_bytes[HostTeam](x.rows.bytes(row * size), to, size)
                else:
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
    _ = starts^
    ep.end_send[HostTeam](epoch, ep.head.failed())


def _check_handle[
    layout: StaticString
](ep: Endpoint[False], x: CombineInput, rows: Int, stage: Int32):
    """Record a failure where the handle names rows or tokens that are not there."""
    var s = ep.s
    var gathered = 0
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
        gathered += T
        comptime if layout == "gathered":
            highest = Int32(gathered) - 1
        else:
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
    var terms = x.terms[dtype, hidden](at, top_k)
    if terms.n == 0:
        return
    comptime if unweighted:
        copy_bytes[HostTeam](terms.row[0], to, row_bytes[dtype, hidden]())
    else:
        if streams and Int(to) % 64 == 0:
            sum_terms[HostTeam, dtype, dtype, dtype, hidden, True](terms, to)
        else:
            sum_terms[HostTeam, dtype, dtype, dtype, hidden](terms, to)
