"""The host's dispatch_async: routing table and messages leave for every destination rank.

Writes, in every peer's windows, this rank's blocks of buffer `epoch mod B`:

    count window   ids i16 [T, K], weights f32 [T, K], then the header (value T)
    recv window    message of token t at slot t, for the peers that own one of its experts (or all of them)
    count window   signal c, once the messages of tokens c*G .. c*G+G-1 are there; also where there were none

Why the order holds: table before header, messages before their signal, each signal a release store by the thread that
stored what it covers. The buffer is free: `begin_send` has awaited every reader's credit.
"""

from ..dispatch_tensors import DispatchInput
from ..formats import TokenFormat
from ..launch import Endpoint
from ..layout import message_offset
from ..peers import View, window_view
from ..routing import destinations, everyone, normal_id
from ..signal import finish_streaming, publish, word
from ..team import HostTeam, StreamingTeam, copy_bytes
from ..tokens import token_count
from .workers import exceeds_caches, n_workers, share


def dispatch_async[
    F: TokenFormat, ids_dtype: DType, encoded: Bool
](ep: Endpoint[True], x: DispatchInput[ids_dtype], stage: Int32) raises:
    """Send.

    Parameters:
        F: The format.
        ids_dtype: Type of the ids.
        encoded: Whether `x.tokens` and `x.scales` are in the format already.

    Args:
        ep: The rank.
        x: Its tokens.
        stage: `STAGE_*`, for the failure record.

    Raises:
        What the worker pool raises; failures of the protocol go on record instead.
    """
    var epoch = ep.begin_send[HostTeam](stage)
    var T = token_count(ep, stage, x.rows, x.num_tokens)
    if ep.head.failed():
        ep.end_send[HostTeam](epoch, ep.head.failed())
        return
    var s = ep.s
    var buffer = ep.buffer(epoch)
    var masked = ep.masked()
    var ids = _send_table(ep, x, T, buffer, masked)
    ep.announce[HostTeam](epoch, T, masked)

    var n_chunks = s.n_signals(T)
    var workers = n_workers(s, n_chunks, T * F.message_bytes)
    var streams = exceeds_caches(T * F.message_bytes * s.n_ranks)

    def work(chunk: Int) raises {imm}:
        var first = chunk * s.tokens_per_signal
        for t in range(first, min(first + s.tokens_per_signal, T)):
            var mask = destinations(ids, t, s.top_k, s.n_local_experts())
            if s.everywhere:
                mask = everyone(s)
            if s.shared_expert:
                mask |= UInt32(1) << UInt32(ep.me)
            mask &= ~masked
            var offset = message_offset(s, buffer, ep.me, t)
            var written = -1
            for i in range(s.n_ranks):
                var peer = (ep.me + i) % s.n_ranks
                if (mask >> UInt32(peer)) & 1 == 0:
                    continue
                var message = ep.recv[peer].unsafe_offset(offset)
                if written < 0:
                    x.write[F, encoded, HostTeam](t, message)
                    written = peer
                    continue
                var first_copy = ep.recv[written].unsafe_offset(offset)
                if streams:
                    copy_bytes[StreamingTeam](
                        first_copy, message, F.message_bytes
                    )
                else:
                    copy_bytes[HostTeam](first_copy, message, F.message_bytes)
        finish_streaming()
        for i in range(s.n_ranks):
            var peer = (ep.me + i) % s.n_ranks
            if (masked >> UInt32(peer)) & 1 == 0:
                publish(
                    ep.count[peer],
                    ep.window.signal(buffer, ep.me, chunk),
                    word(epoch, 0),
                )

    share(work, n_chunks, workers)
    ep.end_send[HostTeam](epoch, ep.head.failed())


def _send_table[
    ids_dtype: DType
](
    ep: Endpoint[True],
    x: DispatchInput[ids_dtype],
    T: Int,
    buffer: Int,
    masked: UInt32,
) -> View[DType.int16]:
    """Write the routing table into my own window, then copy it to every peer's that is not masked."""
    var n = T * ep.s.top_k
    var ids_at = ep.window.table_ids(buffer, ep.me)
    var weights_at = ep.window.table_weights(buffer, ep.me)
    var own = ep.own_count()
    var ids = window_view[DType.int16](own, ids_at, n)
    var weights = window_view[DType.float32](own, weights_at, n)
    for i in range(n):
        ids[i] = normal_id(x.ids[i].cast[DType.int64](), ep.s.n_experts)
        weights[i] = x.weights[i] if x.weights.present() else Float32(1)
    for peer in range(ep.s.n_ranks):
        if peer != ep.me and (masked >> UInt32(peer)) & 1 == 0:
            var there = ep.count[peer]
            copy_bytes[HostTeam](
                ids.bytes(), there.unsafe_offset(ids_at), 2 * n
            )
            copy_bytes[HostTeam](
                weights.bytes(), there.unsafe_offset(weights_at), 4 * n
            )
    return ids
