"""The host's combine with ExpertSlots: every expert row travels by itself, and the source sums.

Memory, of rank p: recv [Tm][K] rows, count u64 [E].

combine_async, on q, sends each row to the source that `src_info` names, slot (token, k), skips rows with (-1, -1), and
then publishes count[e] = (epoch, 0) for each of its experts e on every rank, also where it sent nothing.

combine_wait, on p, awaits all E words, and sums as `reduce="source"` does: acc = fma(w, row, acc) over the choices
that dispatch_async has sent, k ascending. It knows those from the masks behind the head of `atomic_counters`.

Why the order holds: `expert_launch.mojo`.
"""

from ..combine_tensors import (
    CombineOutput,
    Terms,
    begin_token,
    row_bytes,
    sum_terms,
)
from ..expert_launch import begin_send, end_combine_send, end_wait, rows_arrived
from ..expert_messages import routed_masks
from ..head import Head
from ..launch import Endpoint
from ..layout import FIELD_SRC_INFO, KIND_SHAPE, row_offset
from ..peers import View
from ..settings import Settings
from ..signal import Waiter
from ..team import HostTeam, copy_bytes, zero_bytes
from ..tokens import token_count
from .workers import n_workers, share

comptime ROWS_PER_ITEM = 16
"""Rows of src_info that a worker takes at a time."""


def combine_async[
    dtype: DType, hidden: Int
](
    ep: Endpoint[False],
    rows: View[DType.uint8],
    src_info: View[DType.int32],
    stage: Int32,
) raises:
    """Send.

    Parameters:
        dtype: Type of the rows, and on the wire.
        hidden: H.

    Args:
        ep: The rank.
        rows: Expert rows [rows, H] as bytes, in the rows of dispatch_wait.
        src_info: Int32 [rows, 2] of dispatch_wait.
        stage: `STAGE_*`, for the failure record.

    Raises:
        What the worker pool raises; failures of the protocol go on record instead.
    """
    comptime size = row_bytes[dtype, hidden]()
    var s = ep.s
    var epoch = begin_send(ep, stage)
    var n = min(src_info.size // 2, rows.size // size)
    if not ep.head.failed():
        _check_src_info(s, ep.head, src_info, n, stage)
    if ep.head.failed():
        end_combine_send(ep, epoch)
        return
    var items = (n + ROWS_PER_ITEM - 1) // ROWS_PER_ITEM
    var workers = n_workers(s, items, n * size)

    def work(item: Int) raises {imm}:
        var first = item * ROWS_PER_ITEM
        for row in range(first, min(first + ROWS_PER_ITEM, n)):
            var from_ = Int(src_info[2 * row])
            var k = Int(src_info[2 * row + 1])
            if from_ == -1:
                continue
            var offset = row_offset(s, 0, from_ % s.max_tokens, k)
            copy_bytes[HostTeam](
                rows.bytes(row * size),
                ep.recv[from_ // s.max_tokens].unsafe_offset(offset),
                size,
            )

    share(work, items, workers)
    end_combine_send(ep, epoch)


def _check_src_info(
    s: Settings, head: Head, src_info: View[DType.int32], n: Int, stage: Int32
):
    """Record a failure where a pair is neither (source rank * Tm + token, k) nor (-1, -1)."""
    var limit = s.n_ranks * s.max_tokens
    for row in range(n):
        var from_ = Int(src_info[2 * row])
        var k = Int(src_info[2 * row + 1])
        var given = 0 <= from_ < limit and 0 <= k < s.top_k
        if not given and not (from_ == -1 and k == -1):
            head.fail(
                KIND_SHAPE,
                stage,
                chunk=FIELD_SRC_INFO,
                value=from_,
                limit=limit - 1,
            )
            return


def combine_wait[
    dtype: DType,
    out_dtype: DType,
    bias_dtype: DType,
    ids_dtype: DType,
    hidden: Int,
](ep: Endpoint[False], x: CombineOutput[ids_dtype], stage: Int32) raises:
    """Receive and sum.

    Parameters:
        dtype: Type on the wire.
        out_dtype: Type of the output.
        bias_dtype: Type of both biases.
        ids_dtype: Type of the ids, which are not read.
        hidden: H.

    Args:
        ep: The rank.
        x: Its tokens.
        stage: `STAGE_*`, for the failure record.

    Raises:
        What the worker pool raises; failures of the protocol go on record instead.
    """
    comptime out_bytes = row_bytes[out_dtype, hidden]()
    var s = ep.s
    var K = s.top_k
    var epoch = ep.begin_wait(stage, ep.last_sent())
    var waiter = Waiter(ep.head, stage, s.virtual)
    var T = token_count(ep, stage, x.rows, x.num_tokens)
    for e in range(s.n_experts):
        if ep.head.failed() or not rows_arrived(ep, waiter, epoch, e):
            break
    var n_chunks = s.n_signals(T)
    var workers = n_workers(s, n_chunks, T * K * out_bytes)
    var window = ep.recv[ep.me]
    var routed = routed_masks(ep)

    def work(chunk: Int) raises {imm}:
        var first = chunk * s.tokens_per_signal
        for t in range(first, min(first + s.tokens_per_signal, T)):
            var terms = Terms()
            begin_token[dtype, bias_dtype, ids_dtype, hidden](terms, x, t)
            var mask = routed[t]
            for k in range(K):
                if (mask >> UInt32(k)) & 1 == 1:
                    terms.add(
                        window.unsafe_offset(row_offset(s, 0, t, k)),
                        x.weight(t, k, K),
                    )
            sum_terms[HostTeam, dtype, bias_dtype, out_dtype, hidden](
                terms, x.y.bytes(t * out_bytes)
            )

    if not ep.head.failed():
        share(work, n_chunks, workers)
    var done = 0 if ep.head.failed() else T * out_bytes
    zero_bytes[HostTeam](x.y.bytes(done), x.y.size - done)
    end_wait(ep, epoch)
