"""The host's combine_wait: what came back is summed into the tokens' outputs.

Reads this rank's combine windows of buffer `epoch mod B`. For each chunk of own tokens it awaits the signals of the
ranks that own one of the chunk's experts, then, in float32 and in this order,

    acc = ((0 + bias0) + bias1) + shared row
    reduce "source"   acc = fma(w, row, acc) over valid k ascending
    otherwise         acc = acc + partial over contributing ranks ascending

and rounds once to the output type. Choices of masked ranks add nothing. Rows past T come back zero. Then the buffer
goes back by a credit.
"""

from ..combine_tensors import (
    CombineOutput,
    Terms,
    begin_token,
    check_header,
    row_bytes,
    sum_terms,
    travels_by_row,
)
from ..launch import Endpoint
from ..layout import MAX_TOP_K, partial_offset, row_offset
from ..routing import NO_EXPERT, destination, everyone, normal_id
from ..signal import MASKED, NO_SIGNAL
from ..team import HostTeam, zero_bytes
from ..tokens import token_count
from .workers import n_workers, share


def combine_wait[
    dtype: DType,
    out_dtype: DType,
    bias_dtype: DType,
    ids_dtype: DType,
    hidden: Int,
    layout: StaticString,
    reduce: StaticString,
](ep: Endpoint[False], x: CombineOutput[ids_dtype], stage: Int32) raises:
    """Receive and sum.

    Parameters:
        dtype: Type on the wire, and of the shared expert's rows.
        out_dtype: Type of the output.
        bias_dtype: Type of both biases.
        ids_dtype: Type of the ids.
        hidden: H.
        layout: Output layout of the dispatch.
        reduce: "expert" or "source".

    Args:
        ep: The rank.
        x: Its tokens.
        stage: `STAGE_*`, for the failure record.

    Raises:
        What the worker pool raises; failures of the protocol go on record instead.
    """
    comptime out_bytes = row_bytes[out_dtype, hidden]()
    comptime by_row = travels_by_row[layout, reduce]()
    var s = ep.s
    var K = s.top_k
    var epoch = ep.begin_wait(stage, ep.last_sent())
    var buffer = ep.buffer(epoch)
    var waiter = ep.waiter(stage)
    var T = token_count(ep, stage, x.rows, x.num_tokens)
    for r in range(s.n_ranks):
        if ep.head.failed():
            break
        var header = ep.header_of(waiter, epoch, r)
        if header != NO_SIGNAL and header != MASKED:
            _ = check_header(ep, stage, r, header, T, by_row)
    var masked = ep.masked()
    var n_chunks = s.n_signals(T)
    var window = ep.recv[ep.me]
    var workers = n_workers(s, n_chunks, T * out_bytes)

    def work(chunk: Int) raises {imm}:
        var ids = Array[Int16, MAX_TOP_K](fill=NO_EXPERT)
        var arrived: UInt32 = 0
        var lost = masked
        var first = chunk * s.tokens_per_signal
        for t in range(first, min(first + s.tokens_per_signal, T)):
            var mask: UInt32 = 0
            for k in range(K):
                ids[k] = normal_id(
                    x.ids[t * K + k].cast[DType.int64](), s.n_experts
                )
                mask |= destination(ids[k], s.n_local_experts())
            if s.everywhere:
                mask = everyone(s)
            mask &= ~lost
            for r in range(s.n_ranks):
                var bit = UInt32(1) << UInt32(r)
                if mask & bit & ~arrived != 0:
                    var signal = ep.chunk_of(waiter, epoch, r, chunk)
                    if signal == NO_SIGNAL:
                        return
                    if signal == MASKED:
                        lost |= bit
                    arrived |= bit
            mask &= ~lost
            var terms = Terms()
            begin_token[dtype, bias_dtype, ids_dtype, hidden](terms, x, t)
            comptime if by_row:
                for k in range(K):
                    if destination(ids[k], s.n_local_experts()) & mask != 0:
                        terms.add(
                            window.unsafe_offset(row_offset(s, buffer, t, k)),
                            x.weight(t, k, K),
                        )
            else:
                for r in range(s.n_ranks):
                    if (mask >> UInt32(r)) & 1 == 1:
                        terms.add(
                            window.unsafe_offset(
                                partial_offset(s, buffer, r, t)
                            )
                        )
            sum_terms[HostTeam, dtype, bias_dtype, out_dtype, hidden](
                terms, x.y.bytes(t * out_bytes)
            )

    if not ep.head.failed():
        share(work, n_chunks, workers)
    var done = 0 if ep.head.failed() else T * out_bytes
    zero_bytes[HostTeam](x.y.bytes(done), x.y.size - done)
    ep.end_wait[HostTeam](epoch, ep.head.failed())
