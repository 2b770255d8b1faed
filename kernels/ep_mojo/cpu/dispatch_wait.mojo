"""The host's dispatch_wait: messages become output rows.

Reads this rank's windows of buffer `epoch mod B`: every source's header (T), then its table; from the tables every
output row follows without looking at payload. Then, chunk by chunk, as its signal arrives, each message is copied to
its 0 to K rows; where a peer is lost meanwhile, rows that did not come are zero. When all is read the buffer goes back
by a credit to every sender.

Writes the outputs alone. They are the handle's own copies: nothing in them points into a window.
"""

from ..dispatch_tensors import DispatchOutput, Rows, localise, table_ids
from ..formats import TokenFormat
from ..launch import Endpoint
from ..layout import KIND_CAPACITY, message_offset
from ..peers import Bytes, Scratch
from ..routing import (
    by_source,
    count_rows,
    group_name,
    map_rows,
    row_starts,
)
from ..signal import MASKED, NO_SIGNAL, Waiter
from ..team import HostTeam, StreamingTeam, copy_bytes, zero_bytes
from .workers import exceeds_caches, n_workers, share


def dispatch_wait[
    F: TokenFormat, layout: StaticString
](ep: Endpoint[True], out_: DispatchOutput, stage: Int32) raises:
    """Receive.

    Parameters:
        F: The format.
        layout: Output layout.

    Args:
        ep: The rank.
        out_: The outputs.
        stage: `STAGE_*`, for the failure record.

    Raises:
        What the worker pool raises; failures of the protocol go on record instead.
    """
    var s = ep.s
    var epoch = ep.begin_wait(stage, ep.last_sent())
    var waiter = ep.waiter(stage)
    for g in range(out_.expert_ids.size):
        out_.expert_ids[g] = group_name(s, g, ep.me)
    for r in range(s.n_ranks):
        if ep.head.failed():
            break
        out_.recv_num_tokens[r] = Int32(ep.tokens_of(waiter, epoch, r))
    if not ep.head.failed():
        _receive[F, layout](ep, epoch, waiter, Rows[F, layout](out_), stage)
    if ep.head.failed():
        out_.clear[HostTeam]()
    ep.end_wait[HostTeam](epoch, ep.head.failed())


def _receive[
    F: TokenFormat, layout: StaticString
](
    ep: Endpoint[True],
    epoch: UInt64,
    waiter: Waiter,
    rows: Rows[F, layout],
    stage: Int32,
) raises:
    var s = ep.s
    var out_ = rows.out
    var buffer = ep.buffer(epoch)
    var groups = 1 if by_source[layout]() else s.n_groups()
    var starts = Scratch[DType.int32](s.n_ranks * groups)
    var start = starts.view()
    var block = s.max_tokens * s.top_k

    def count(r: Int) raises {imm}:
        var ids = table_ids(ep, buffer, r)
        var mine = start.part(r * groups, groups)
        count_rows[layout](s, ids, Int(out_.recv_num_tokens[r]), r, ep.me, mine)

    def map(r: Int) raises {imm}:
        var T = Int(out_.recv_num_tokens[r])
        var mine = start.part(r * groups, groups)
        var to = out_.row_map.part(r * block, block)
        map_rows[layout](s, table_ids(ep, buffer, r), T, ep.me, mine, to)
        var weights = ep.own_count().unsafe_offset(
            ep.window.table_weights(buffer, r)
        )
        var kept = out_.recv_weights.bytes(r * block)
        copy_bytes[HostTeam](weights, kept, 4 * T * s.top_k)
        zero_bytes[HostTeam](
            kept.unsafe_offset(4 * T * s.top_k), 4 * (block - T * s.top_k)
        )

    for r in range(s.n_ranks):
        count(r)
    var needed = row_starts[layout](s, start, out_.row_offsets, out_.counts)
    var room = (
        s.n_ranks * s.max_tokens if layout == "expert_padded" else rows.capacity
    )
    if needed > room:
        ep.head.fail(KIND_CAPACITY, stage, value=needed, limit=room)
        return

    var streams = exceeds_caches(needed * F.token_bytes)
    out_.src_info.fill(-1)
    var shared_first = Int(start[ep.me * groups])
    var tokens = 0
    var longest = 0
    for r in range(s.n_ranks):
        var T = Int(out_.recv_num_tokens[r])
        tokens += T
        longest = max(longest, T)
        comptime if layout != "gathered":
            map(r)
    out_.local_ids.fill(-1)
    out_.local_weights.fill(0)

    var items = s.n_ranks * s.n_signals(longest)
    var workers = n_workers(s, items, tokens * F.message_bytes)

    @always_inline
    def put(message: Bytes, row: Int, came: Bool) {imm}:
        if not came:
            rows.zero[HostTeam](row)
        elif streams:
            rows.put[StreamingTeam](message, row)
        else:
            rows.put[HostTeam](message, row)

    def work(i: Int) raises {imm}:
        if i >= items:
            rows.zero_padding[HostTeam](i - items)
            return
        var r = (ep.me + i) % s.n_ranks
        var chunk = i // s.n_ranks
        var first = chunk * s.tokens_per_signal
        var T = Int(out_.recv_num_tokens[r])
        if first >= T:
            return
        var signal = ep.chunk_of(waiter, epoch, r, chunk)
        if signal == NO_SIGNAL:
            return
        var came = signal != MASKED
        for t in range(first, min(first + s.tokens_per_signal, T)):
            var message = ep.recv[ep.me].unsafe_offset(
                message_offset(s, buffer, r, t)
            )
            comptime if layout == "gathered":
                var row = Int(start[r]) + t
                put(message, row, came)
                out_.src_info[2 * row] = Int32(r * s.max_tokens + t)
                localise[HostTeam, layout](ep, buffer, r, t, row, out_)
                continue
            for k in range(s.top_k):
                var row = Int(out_.row_map[r * block + t * s.top_k + k])
                if row < 0:
                    continue
                put(message, row, came)
                out_.src_info[2 * row] = Int32(r * s.max_tokens + t)
                comptime if layout == "rank":
                    localise[HostTeam, layout](ep, buffer, r, t, row, out_)
                else:
                    out_.src_info[2 * row + 1] = Int32(k)
            if s.shared_expert and r == ep.me:
                put(message, shared_first + t, came)
                out_.src_info[2 * (shared_first + t)] = Int32(
                    r * s.max_tokens + t
                )

    var padded = layout == "expert" and s.alignment > 1
    share(work, items + (groups if padded else 0), workers)
    _ = starts^
