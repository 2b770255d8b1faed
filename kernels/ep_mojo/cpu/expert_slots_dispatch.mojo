"""The host's dispatch with ExpertSlots: one message for each distinct (token, expert).

Memory, of rank q: recv [L][R][Tm] messages (`expert_messages.mojo`), count u64 [L][R]. Messages of source p to local
expert e stand at recv[e][p][0..n), by ascending token.

dispatch_async, on p, writes recv[e][p] of every rank and then, last, its signal count[e][p] = (epoch, n), for every
(e, rank), also with n = 0. It keeps for itself, behind the head of `atomic_counters`, which choices of each token
were sent: combine_wait sums those.

dispatch_wait, on q, awaits all counts, reads the headers, gives every (message, k) its row, and copies. It writes its
outputs alone. Weights do not travel here: `recv_weights` is 0, and `recv_num_tokens` is one more than the highest token
that came from a source.

Why the order holds: `expert_launch.mojo`.
"""

from std.bit import count_trailing_zeros, pop_count

from ..dispatch_tensors import DispatchInput, DispatchOutput, Rows
from ..expert_launch import (
    begin_send,
    end_dispatch_send,
    end_wait,
    message_count,
)
from ..expert_messages import (
    mask_of,
    message_of,
    payload,
    routed_masks,
    token_of,
    write_header,
)
from ..formats import TokenFormat
from ..launch import Endpoint
from ..layout import KIND_CAPACITY, expert_slot_offset
from ..peers import Scratch, View
from ..routing import NO_ROW, group_name, normal_id, row_starts
from ..settings import Settings
from ..signal import Waiter
from ..team import HostTeam, copy_bytes
from ..tokens import token_count
from .workers import n_workers, share


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
        x: Its tokens; `x.weights` is not read.
        stage: `STAGE_*`, for the failure record.

    Raises:
        What the worker pool raises; failures of the protocol go on record instead.
    """
    var epoch = begin_send(ep, stage)
    var T = token_count(ep, stage, x.rows, x.num_tokens)
    var counts = Scratch[DType.int32](ep.s.n_experts)
    var sent = counts.view()
    if not ep.head.failed():
        _send[F, ids_dtype, encoded](ep, x, T, sent)
    end_dispatch_send(ep, epoch, sent)
    _ = counts^


def _send[
    F: TokenFormat, ids_dtype: DType, encoded: Bool
](
    ep: Endpoint[True],
    x: DispatchInput[ids_dtype],
    T: Int,
    sent: View[DType.int32],
) raises:
    var s = ep.s
    var K = s.top_k
    var n_local = s.n_local_experts()
    var slot_memory = Scratch[DType.int32](T * K, -1)
    var mask_memory = Scratch[DType.uint32](T * K)
    var slots = slot_memory.view()
    var masks = mask_memory.view()
    _assign_slots(ep, x.ids, T, sent, slots, masks)

    var n_chunks = s.n_signals(T)
    var workers = n_workers(s, n_chunks, T * s.message_bytes)

    def work(chunk: Int) raises {imm}:
        var begin = chunk * s.tokens_per_signal
        for t in range(begin, min(begin + s.tokens_per_signal, T)):
            var written = False
            var first = ep.recv[ep.me]
            for k in range(K):
                var slot = Int(slots[t * K + k])
                if slot < 0:
                    continue
                var id = Int(x.ids[t * K + k])
                var message = ep.recv[id // n_local].unsafe_offset(
                    expert_slot_offset(s, id % n_local, ep.me, slot)
                )
                write_header(message, t, masks[t * K + k])
                var to = payload(message)
                if written:
                    copy_bytes[HostTeam](first, to, F.message_bytes)
                    continue
                x.write[F, encoded, HostTeam](t, to)
                first = to
                written = True

    share(work, n_chunks, workers)
    _ = slot_memory^
    _ = mask_memory^


def _assign_slots[
    ids_dtype: DType
](
    ep: Endpoint[True],
    ids: View[ids_dtype],
    T: Int,
    sent: View[DType.int32],
    slots: View[DType.int32],
    masks: View[DType.uint32],
):
    """Number the messages of each expert; note duplicates of a choice in the mask of the first one."""
    var s = ep.s
    var K = s.top_k
    var routed = routed_masks(ep)
    var last_token = List[Int](length=s.n_experts, fill=-1)
    var first_k = List[Int](length=s.n_experts, fill=0)
    for t in range(T):
        var valid: UInt32 = 0
        for k in range(K):
            var id = Int(
                normal_id(ids[t * K + k].cast[DType.int64](), s.n_experts)
            )
            if id < 0:
                continue
            var bit = UInt32(1) << UInt32(k)
            valid |= bit
            if last_token[id] != t:
                last_token[id] = t
                first_k[id] = k
                slots[t * K + k] = sent[id]
                sent[id] += 1
            masks[t * K + first_k[id]] |= bit
        routed[t] = valid
    for t in range(T, s.max_tokens):
        routed[t] = 0


def dispatch_wait[
    F: TokenFormat, layout: StaticString
](ep: Endpoint[True], out_: DispatchOutput, stage: Int32) raises:
    """Receive.

    Parameters:
        F: The format.
        layout: Output layout: "expert" or "expert_padded".

    Args:
        ep: The rank.
        out_: The outputs; `recv_weights`, `row_map` and `recv_num_tokens` may be of size 0.
        stage: `STAGE_*`, for the failure record.

    Raises:
        What the worker pool raises; failures of the protocol go on record instead.
    """
    comptime assert (
        layout == "expert" or layout == "expert_padded"
    ), "slots='expert' has the output layouts expert and expert_padded only"
    var s = ep.s
    var epoch = ep.begin_wait(stage, ep.last_sent())
    var waiter = Waiter(ep.head, stage, s.virtual)
    for g in range(out_.expert_ids.size):
        out_.expert_ids[g] = group_name(s, g, ep.me)
    var blocks = s.n_local_experts() * s.n_ranks
    var memory = Scratch[DType.int32](blocks)
    var counts = memory.view()
    for b in range(blocks):
        if ep.head.failed():
            break
        counts[b] = Int32(
            message_count(
                ep,
                waiter,
                epoch,
                expert=b // s.n_ranks,
                source=b % s.n_ranks,
            )
        )
    if not ep.head.failed():
        _receive[F, layout](ep, counts, Rows[F, layout](out_), stage)
    if ep.head.failed():
        out_.clear[HostTeam]()
    end_wait(ep, epoch)
    _ = memory^


def _receive[
    F: TokenFormat, layout: StaticString
](
    ep: Endpoint[True],
    counts: View[DType.int32],
    rows: Rows[F, layout],
    stage: Int32,
) raises:
    var s = ep.s
    var out_ = rows.out
    var R = s.n_ranks
    var blocks = counts.size
    var total = 0
    for b in range(blocks):
        total += Int(counts[b])
    var row_memory = Scratch[DType.int32](total)
    var start_memory = Scratch[DType.int32](blocks)
    var base_memory = Scratch[DType.int32](blocks)
    var row = row_memory.view()
    var start = start_memory.view()
    var base = base_memory.view()
    _count_rows(ep, counts, base, row, start, out_.recv_num_tokens)

    var needed = row_starts[layout](s, start, out_.row_offsets, out_.counts)
    var room = min(rows.capacity, out_.src_info.size // 2)
    comptime if layout == "expert_padded":
        room = R * s.max_tokens
    if needed > room:
        ep.head.fail(KIND_CAPACITY, stage, value=needed, limit=room)
        return
    _number_rows(s, counts, base, start, row)
    out_.src_info.fill(-1)
    out_.row_map.fill(NO_ROW)
    out_.recv_weights.fill(0)

    var per_block = s.n_signals(s.max_tokens)
    var items = blocks * per_block
    var workers = n_workers(s, items, total * s.message_bytes)

    def work(item: Int) raises {imm}:
        var b = item // per_block
        var first = item % per_block * s.tokens_per_signal
        var end = min(first + s.tokens_per_signal, Int(counts[b]))
        for i in range(first, end):
            var message = message_of(ep, b, i)
            var source_token = b % R * s.max_tokens + token_of(message)
            var mask = mask_of(message)
            var at = Int(row[Int(base[b]) + i])
            while mask != 0:
                var k = Int(count_trailing_zeros(mask))
                mask &= mask - 1
                rows.put[HostTeam](payload(message), at)
                out_.src_info[2 * at] = Int32(source_token)
                out_.src_info[2 * at + 1] = Int32(k)
                if out_.row_map.present():
                    out_.row_map[source_token * s.top_k + k] = Int32(at)
                at += 1

    share(work, items, workers)
    _ = row_memory^
    _ = start_memory^
    _ = base_memory^


def _count_rows(
    ep: Endpoint[True],
    counts: View[DType.int32],
    base: View[DType.int32],
    row: View[DType.int32],
    per_group: View[DType.int32],
    num_tokens: View[DType.int32],
):
    """Read all headers: rows of each message, rows of each (source, expert), highest token of each source."""
    var R = ep.s.n_ranks
    var n_local = ep.s.n_local_experts()
    num_tokens.fill(0)
    var run = 0
    for b in range(counts.size):
        var e = b // R
        var r = b % R
        base[b] = Int32(run)
        for i in range(Int(counts[b])):
            var message = message_of(ep, b, i)
            var n = Int32(pop_count(mask_of(message)))
            row[run + i] = n
            per_group[r * n_local + e] += n
            if num_tokens.present():
                num_tokens[r] = max(num_tokens[r], Int32(token_of(message) + 1))
        run += Int(counts[b])


def _number_rows(
    s: Settings,
    counts: View[DType.int32],
    base: View[DType.int32],
    start: View[DType.int32],
    row: View[DType.int32],
):
    """Turn rows of each message into the first row of each message, in place."""
    for b in range(counts.size):
        var next = start[b % s.n_ranks * s.n_local_experts() + b // s.n_ranks]
        for i in range(Int(base[b]), Int(base[b] + counts[b])):
            var n = row[i]
            row[i] = next
            next += n
