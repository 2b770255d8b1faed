"""The GPU's dispatch_wait: messages become output rows.

    CTA r < R      maps source r: awaits its header, counts its rows, publishes that in the own counters; when all
                   sources are counted, works out where each group begins and gives every choice its row; publishes
    every warp     takes chunks of a source: awaits map and signal, brings each message into shared memory once, and
                   copies it to its rows from there

Then all that no row fills is marked, and the last CTA gives the buffer back and counts the epoch. Rows are in the
contract's order, because each source is mapped by itself (see `routing.mojo`).
"""

from max.gpu import block_dim, block_idx, grid_dim, lane_id, thread_idx
from max.gpu.host import DeviceContext, FuncAttribute
from max.gpu.primitives import warp
from max.gpu.sync import barrier, syncwarp
from std.bit import count_trailing_zeros

from ..dispatch_tensors import DispatchOutput, Rows, localise, table_ids
from ..formats import TokenFormat
from ..launch import Endpoint
from ..layout import (
    CHUNK_HEADER,
    KIND_CAPACITY,
    WORK_COUNTED,
    WORK_COUNTS,
    WORK_MAPPED,
    align_up,
    message_offset,
)
from ..peers import View, window_view
from ..routing import NO_ROW, group_name
from ..signal import NO_SIGNAL, Waiter, publish, word
from ..team import WarpTeam, copy_bytes, zero_bytes
from .launch import (
    MAX_WARPS,
    ByValue,
    Peers,
    Shape,
    first_item,
    is_last_cta,
    item_stride,
    may_go_on,
    told,
    warp_index,
    warp_memory,
    warp_slot,
    warps,
)
from .routing import Histogram, ballot, count_source, map_source, start_rows
from .shared_rows import SLOT_ALIGNMENT, RowSlot


@always_inline
def receive[
    F: TokenFormat, layout: StaticString
](ep: Endpoint[True], out_: DispatchOutput, sent: UInt64, stage: Int32):
    """Receive; the body of the split and the fused kernel.

    Parameters:
        F: The format.
        layout: Output layout.

    Args:
        ep: The rank.
        out_: The outputs.
        sent: The epoch of the last send, one of this very launch included.
        stage: `STAGE_*`, for the failure record.
    """
    var epoch = ep.next_wait()
    var waiter = Waiter(ep.head, stage, ep.s.virtual)
    if thread_idx.x == 0:
        _ = ep.begin_wait(stage, sent)
    if may_go_on(ep.head):
        if Int(block_idx.x) < ep.s.n_ranks:
            _map[F, layout](ep, epoch, waiter, out_, stage)
        _copy[F, layout](ep, epoch, waiter, Rows[F](out_))
    if is_last_cta(ep, sending=False) and warp_index() == 0:
        if ep.head.failed():
            out_.clear[WarpTeam]()
        ep.end_wait[WarpTeam](epoch)


@always_inline
def _map[
    F: TokenFormat, layout: StaticString
](
    ep: Endpoint[True],
    epoch: UInt64,
    waiter: Waiter,
    out_: DispatchOutput,
    stage: Int32,
):
    """Map the sources of this CTA: r = its index, and further ones where there are fewer CTAs than ranks."""
    var s = ep.s
    var own = ep.head.base
    var buffer = ep.buffer(epoch)
    var groups = 1 if layout == "rank" else s.n_groups()
    var hist = Histogram(groups)
    var counts = window_view[DType.int32](
        own, 4 * WORK_COUNTS, s.n_ranks * groups
    )
    var first = Int(block_idx.x)
    var stride = Int(grid_dim.x)
    var several = first + stride < s.n_ranks
    for r in range(first, s.n_ranks, stride):
        var T = NO_SIGNAL
        if thread_idx.x == 0:
            T = ep.header_of(waiter, epoch, r)
        T = told(T)
        if T == NO_SIGNAL:
            return
        count_source[layout](
            s,
            table_ids(ep, buffer, r),
            T,
            r,
            ep.me,
            hist,
            counts.part(r * groups, groups),
        )
        if thread_idx.x == 0:
            out_.recv_num_tokens[r] = Int32(T)
            publish(own, 4 * WORK_COUNTED + 8 * r, word(epoch, T))
    for r in range(first, s.n_ranks, stride):
        if not _all_counted(ep, waiter, epoch):
            return
        var T = Int(out_.recv_num_tokens[r])
        if several:
            count_source[layout](
                s,
                table_ids(ep, buffer, r),
                T,
                r,
                ep.me,
                hist,
                counts.part(r * groups, groups),
            )
        var fits = 0
        if warp_index() == 0:
            var offsets = out_.row_offsets if r == 0 else View[DType.uint32]()
            var needed = start_rows[layout](
                s, counts, r, hist, offsets, out_.counts
            )
            var room = (
                s.n_ranks * s.max_tokens if layout
                == "expert_padded" else out_.tokens.size // F.token_bytes
            )
            fits = Int(needed <= room)
            if thread_idx.x == 0 and fits == 0:
                ep.head.fail(KIND_CAPACITY, stage, value=needed, limit=room)
        if told(fits) == 0:
            return
        var block = s.max_tokens * s.top_k
        map_source[layout](
            s,
            table_ids(ep, buffer, r),
            T,
            r,
            ep.me,
            hist,
            out_.row_map.part(r * block, block),
            out_.src_info,
        )
        _keep_weights(ep, buffer, r, T, out_)
        if r == 0:
            for g in range(
                Int(thread_idx.x), out_.expert_ids.size, Int(block_dim.x)
            ):
                out_.expert_ids[g] = group_name(s, g, ep.me)
        barrier()
        if thread_idx.x == 0:
            publish(own, 4 * WORK_MAPPED + 8 * r, word(epoch, T))


@always_inline
def _all_counted(ep: Endpoint[True], waiter: Waiter, epoch: UInt64) -> Bool:
    """Await the counts of all sources; the whole CTA calls this."""
    var counted = True
    if warp_index() == 0:
        var lane = Int(lane_id())
        if lane < ep.s.n_ranks:
            var T = _in_launch(ep, waiter, epoch, WORK_COUNTED, lane)
            counted = T != NO_SIGNAL
        counted = ballot(not counted) == 0
    return told(Int(counted)) != 0


@always_inline
def _in_launch(
    ep: Endpoint[True], waiter: Waiter, epoch: UInt64, words: Int, source: Int
) -> Int:
    """Await what another CTA of this launch publishes about a source: the source's T, or `NO_SIGNAL`."""
    var offset = 4 * words + 8 * source
    var spinning = waiter
    spinning.virtual = False  # who publishes it runs at the same time
    return spinning.reach(
        ep.head.base,
        offset,
        epoch,
        peer=source,
        chunk=CHUNK_HEADER,
        header=offset,
    )


@always_inline
def _keep_weights(
    ep: Endpoint[True], buffer: Int, source: Int, T: Int, out_: DispatchOutput
):
    """Copy a source's weights out of the window; the whole CTA calls this."""
    var block = ep.s.max_tokens * ep.s.top_k
    var n = T * ep.s.top_k
    var given = window_view[DType.float32](
        ep.own_count(), ep.window.table_weights(buffer, source), block
    )
    var kept = out_.recv_weights.part(source * block, block)
    for i in range(Int(thread_idx.x), block, Int(block_dim.x)):
        kept[i] = given[i] if i < n else Float32(0)


@always_inline
def _copy[
    F: TokenFormat, layout: StaticString
](ep: Endpoint[True], epoch: UInt64, waiter: Waiter, rows: Rows[F]):
    """Copy messages to their rows as they arrive, then mark what no row fills."""
    var s = ep.s
    var out_ = rows.out
    var buffer = ep.buffer(epoch)
    var slot = warp_slot(warp_memory(0, slot_bytes[F]()), sending=False)
    var lane = Int(lane_id())
    var block = s.max_tokens * s.top_k
    var items = s.n_ranks * s.n_signals(s.max_tokens)
    var window = ep.recv[ep.me]
    var mapped: Int32 = -1  # lane r: T of source r, once it is mapped
    barrier()  # the histogram and the slots share memory
    for i in range(first_item(), items, item_stride()):
        var r = (ep.me + i) % s.n_ranks
        var chunk = i // s.n_ranks
        var T = Int(warp.shuffle_idx(mapped, UInt32(r)))
        if T < 0:
            T = _in_launch(ep, waiter, epoch, WORK_MAPPED, r)
            if ballot(T == NO_SIGNAL) != 0:
                return
            if lane == r:
                mapped = Int32(T)
        var begin = chunk * s.tokens_per_signal
        if begin >= T:
            continue
        if ballot(not ep.chunk_of(waiter, epoch, r, chunk)) != 0:
            return
        for t in range(begin, min(begin + s.tokens_per_signal, T)):
            var row = NO_ROW
            if lane < s.top_k:
                row = out_.row_map[r * block + t * s.top_k + lane]
            var left = ballot(row >= 0)
            var shared = s.shared_expert and r == ep.me
            if left == 0 and not shared:
                continue
            slot.load[F.message_bytes](
                window.unsafe_offset(message_offset(s, buffer, r, t))
            )
            while left != 0:
                var from_ = UInt32(count_trailing_zeros(left))
                var to = Int(warp.shuffle_idx(row, from_))
                left &= left - 1
                rows.put[WarpTeam](slot.row, to)
                comptime if layout == "rank":
                    localise[WarpTeam](ep, buffer, r, t, to, out_)
            if shared:
                rows.put[WarpTeam](slot.row, t)
                if lane == 0:
                    out_.src_info[2 * t] = Int32(r * s.max_tokens + t)
                    out_.src_info[2 * t + 1] = -1
    for r in range(s.n_ranks):
        if (
            ballot(_in_launch(ep, waiter, epoch, WORK_MAPPED, r) == NO_SIGNAL)
            != 0
        ):
            return
    _mark_rest[F, layout](s.n_ranks, rows)


@always_inline
def _mark_rest[
    F: TokenFormat, layout: StaticString
](n_ranks: Int, rows: Rows[F]):
    """Say of all rows that hold nothing that they do: padding between groups, and what is behind the last group."""
    var out_ = rows.out
    var groups = out_.row_offsets.size - 1
    comptime if layout != "rank":
        for g in range(first_item(), groups, item_stride()):
            var begin = Int(out_.row_offsets[g]) + Int(out_.counts[g])
            var end = Int(out_.row_offsets[g + 1])
            for row in range(begin + Int(lane_id()), end, WarpTeam.lanes):
                out_.src_info[2 * row] = -1
                out_.src_info[2 * row + 1] = -1
            comptime if layout == "expert":
                rows.zero_padding[WarpTeam](g)
    var used = Int(out_.row_offsets[groups])
    var thread = Int(block_idx.x) * Int(block_dim.x) + Int(thread_idx.x)
    var threads = Int(grid_dim.x) * Int(block_dim.x)
    for i in range(2 * used + thread, out_.src_info.size, threads):
        out_.src_info[i] = -1
    comptime if layout == "rank":
        var K = out_.local_ids.size // max(1, rows.capacity)
        for i in range(used * K + thread, out_.local_ids.size, threads):
            out_.local_ids[i] = -1
            out_.local_weights[i] = 0


@always_inline
def slot_bytes[F: TokenFormat]() -> Int:
    """Shared memory for a message.

    Parameters:
        F: The format.

    Returns:
        Bytes of one row slot.
    """
    return align_up(F.message_bytes, SLOT_ALIGNMENT)


def dispatch_wait_stage[
    F: TokenFormat, layout: StaticString
](peers: ByValue[Peers], output: ByValue[DispatchOutput], stage: Int32):
    """The kernel.

    Parameters:
        F: The format.
        layout: Output layout.

    Args:
        peers: The rank's side.
        output: The outputs.
        stage: `STAGE_*`.
    """
    if peers.value.valid():
        var ep = peers.value.endpoint[True]()
        receive[F, layout](ep, output.value, ep.last_sent(), stage)
    elif block_idx.x == 0 and warp_index() == 0:
        output.value.clear[WarpTeam]()


def cta_bytes[layout: StaticString](peers: Peers) -> Int:
    """Shared memory of the histogram.

    Parameters:
        layout: Output layout.

    Args:
        peers: The rank's side.

    Returns:
        Bytes.
    """
    var groups = 1 if layout == "rank" else peers.s.n_groups()
    return Histogram.bytes(groups, MAX_WARPS)


def dispatch_wait[
    F: TokenFormat, layout: StaticString
](
    peers: Peers, output: DispatchOutput, stage: Int32, ctx: DeviceContext
) raises:
    """Launch it.

    Parameters:
        F: The format.
        layout: Output layout.

    Args:
        peers: The rank's side.
        output: The outputs, in device memory.
        stage: `STAGE_*`.
        ctx: The device.

    Raises:
        UnsupportedError as text in front of the message, or what the driver raises.
    """
    var shape = Shape(
        ctx,
        peers.s,
        items=peers.s.n_ranks * peers.s.n_signals(peers.s.max_tokens),
        warp_bytes=slot_bytes[F](),
        cta_bytes=cta_bytes[layout](peers),
    )
    ctx.enqueue_function[dispatch_wait_stage[F, layout]](
        ByValue(peers),
        ByValue(output),
        stage,
        grid_dim=shape.ctas,
        block_dim=shape.threads,
        shared_mem_bytes=shape.shared_bytes,
        func_attribute=FuncAttribute.MAX_DYNAMIC_SHARED_SIZE_BYTES(
            UInt32(shape.shared_bytes)
        ),
    )
