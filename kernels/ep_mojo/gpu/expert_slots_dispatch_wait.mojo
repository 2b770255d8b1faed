"""The GPU's dispatch_wait with ExpertSlots: messages become output rows. A block is what one source has sent to one of
this rank's experts; there are E of them.

    every warp     awaits the counts of its blocks, reads their headers, marks a part of the outputs as empty, and
                   publishes in the own counters how many rows a block gives beyond one for each message
    every CTA      awaits that of all blocks; now it knows where each begins, (expert, source) ascending
    every warp     takes 32 messages of a block at a time: brings each into shared memory once, copies it to its rows

Nothing is given out by arrival, and no row is written before all CTAs have marked their parts.
"""

from max.gpu import WARP_SIZE, block_dim, block_idx, lane_id, thread_idx
from max.gpu.host import DeviceContext
from max.gpu.primitives import warp
from max.gpu.sync import barrier, syncwarp
from std.bit import count_trailing_zeros, pop_count

from ..dispatch_tensors import DispatchOutput, Rows
from ..expert_launch import end_wait, message_count
from ..expert_messages import mask_of, message_of, payload, token_of
from ..formats import TokenFormat
from ..launch import Endpoint
from ..layout import KIND_CAPACITY, expert_rows
from ..peers import View, window_view
from ..routing import NO_ROW
from ..settings import Settings
from ..signal import NO_SIGNAL, Waiter, note, word
from ..team import WarpTeam
from .dispatch_wait import give_nothing, slot_bytes
from .launch import (
    ByValue,
    Peers,
    Shape,
    is_last_cta,
    may_go_on,
    warp_index,
    warp_memory,
    warp_slot,
    warps,
)
from .mapping import name_groups
from .notes import await_note
from .precedence import precedence, queue
from .routing import ballot
from .share import Share
from .shared_rows import order_for_bulk


struct Blocks(Movable):
    """What every CTA knows of all blocks, in shared memory behind the row slots."""

    var n: Int
    """E = L * R."""
    var messages: View[DType.int32]
    """[E]: messages of each block."""
    var extra: View[DType.int32]
    """[E]: rows that they give beyond one each."""
    var first: View[DType.int32]
    """[E]: rows of all blocks before."""

    def __init__(out self, s: Settings, warp_bytes: Int):
        """Take the memory.

        Args:
            s: The settings.
            warp_bytes: Shared memory that the launch has for each warp.
        """
        var behind = (warps() - warp_index()) * warp_bytes
        var base = warp_memory(warp_bytes, behind)
        self.n = s.n_experts
        self.messages = window_view[DType.int32](base, 0, self.n)
        self.extra = window_view[DType.int32](base, 4 * self.n, self.n)
        self.first = window_view[DType.int32](base, 8 * self.n, self.n)

    @staticmethod
    def bytes(n_experts: Int) -> Int:
        """Shared memory that it needs.

        Args:
            n_experts: E.

        Returns:
            Bytes.
        """
        return 12 * n_experts

    @always_inline
    def end(self, block: Int) -> Int:
        """Rows of all blocks up to one.

        Args:
            block: The block.

        Returns:
            Rows before the next.
        """
        return Int(self.first[block] + self.messages[block] + self.extra[block])


@always_inline
def receive[
    F: TokenFormat, layout: StaticString
](ep: Endpoint[True], out_: DispatchOutput, stage: Int32):
    """Receive; the body of the kernel.

    Parameters:
        F: The format.
        layout: Output layout: "expert" or "expert_padded".

    Args:
        ep: The rank.
        out_: The outputs; `recv_weights`, `row_map`, `recv_num_tokens` and `counts` may be of size 0.
        stage: `STAGE_*`, for the failure record.
    """
    comptime assert (
        layout == "expert" or layout == "expert_padded"
    ), "slots='expert' has the output layouts expert and expert_padded only"
    var epoch = ep.next_wait()
    var waiter = Waiter(ep.head, stage, ep.s.virtual)
    var blocks = Blocks(ep.s, slot_bytes[F]())
    name_groups(ep, out_)
    if thread_idx.x == 0:
        _ = ep.begin_wait(stage, ep.last_sent())
    if may_go_on(ep.head):
        _count_blocks(ep, epoch, waiter, out_)
        if _gather_blocks(ep, epoch, waiter, blocks):
            _sum_blocks(blocks)
            var needed = _group_rows[layout](ep, blocks, out_)
            var rows = Rows[F, layout](out_)
            var room = min(rows.capacity, out_.src_info.size // 2)
            comptime if layout == "expert_padded":
                room = ep.s.n_ranks * ep.s.max_tokens
            if needed <= room:
                _copy_messages[F, layout](ep, blocks, rows)
            elif thread_idx.x == 0:
                ep.head.fail(KIND_CAPACITY, stage, value=needed, limit=room)
    if is_last_cta(ep, sending=False) and warp_index() == 0:
        if ep.head.failed():
            out_.clear[WarpTeam]()
        if lane_id() == 0:
            end_wait(ep, epoch)


@always_inline
def _count_blocks(
    ep: Endpoint[True], epoch: UInt64, waiter: Waiter, out_: DispatchOutput
):
    """Read the headers of the calling warp's blocks; mark its part of the outputs as empty; publish."""
    var R = ep.s.n_ranks
    var lane = Int(lane_id())
    var share = Share()
    var n = ep.s.n_experts
    for b in range(share.first, n, share.stride):
        var messages = message_count(
            ep, waiter, epoch, expert=b // R, source=b % R
        )
        if ballot(messages == NO_SIGNAL) != 0:
            return
        var extra: Int32 = 0
        for i in range(lane, messages, WARP_SIZE):
            extra += Int32(pop_count(mask_of(message_of(ep, b, i)))) - 1
        extra = warp.sum(extra)
        var me = b * WARP_SIZE + lane
        var all = n * WARP_SIZE
        for i in range(me, out_.src_info.size, all):
            out_.src_info[i] = -1
        for i in range(me, out_.row_map.size, all):
            out_.row_map[i] = NO_ROW
        for i in range(me, out_.recv_weights.size, all):
            out_.recv_weights[i] = 0
        syncwarp()
        if lane == 0:
            note(
                ep.head.base,
                4 * expert_rows(ep.s) + 8 * b,
                word(epoch, Int(extra)),
            )


@always_inline
def _gather_blocks(
    ep: Endpoint[True], epoch: UInt64, waiter: Waiter, blocks: Blocks
) -> Bool:
    """Await all blocks; the whole CTA calls this. False when the rank has failed."""
    var R = ep.s.n_ranks
    for b in range(Int(thread_idx.x), blocks.n, Int(block_dim.x)):
        var r = b % R  # b is (expert, source); a record names the source
        var messages = message_count(ep, waiter, epoch, expert=b // R, source=r)
        if messages == NO_SIGNAL:
            break
        var words = expert_rows(ep.s) + 2 * (b - r)  # of the expert
        var extra = await_note(ep, waiter, epoch, words, r, peer=r)
        if extra == NO_SIGNAL:
            break
        blocks.messages[b] = Int32(messages)
        blocks.extra[b] = Int32(extra)
    barrier()  # any thread may have failed; thread 0 must not look before
    return may_go_on(ep.head)


@always_inline
def _sum_blocks(blocks: Blocks):
    """Say of each block how many rows come before it; the whole CTA calls this."""
    if warp_index() == 0:
        var carry: Int32 = 0
        for base in range(0, blocks.n, WARP_SIZE):
            var b = base + Int(lane_id())
            var rows: Int32 = 0
            if b < blocks.n:
                rows = blocks.messages[b] + blocks.extra[b]
            var before = warp.prefix_sum[exclusive=True](rows)
            if b < blocks.n:
                blocks.first[b] = carry + before
            carry += warp.sum(rows)
    barrier()


@always_inline
def _group_rows[
    layout: StaticString
](ep: Endpoint[True], blocks: Blocks, out_: DispatchOutput) -> Int:
    """By the first CTA: where groups begin, what sources sent. Gives the rows to be held; padded: those of a group."""
    var R = ep.s.n_ranks
    var n_local = ep.s.n_local
    var writes = block_idx.x == 0
    var largest = 0
    for e in range(n_local):
        var first = Int(blocks.first[e * R])
        var n = blocks.end(e * R + R - 1) - first
        largest = max(largest, n)
        if writes and e % Int(block_dim.x) == Int(thread_idx.x):
            comptime if layout == "expert_padded":
                first = e * R * ep.s.max_tokens
            out_.row_offsets[e] = UInt32(first)
            if out_.counts.present():
                out_.counts[e] = Int32(n)
    var total = blocks.end(blocks.n - 1)
    comptime if layout == "expert_padded":
        total = n_local * R * ep.s.max_tokens
    if writes and thread_idx.x == 0:
        out_.row_offsets[n_local] = UInt32(total)
    if writes and out_.recv_num_tokens.present():
        for r in range(warp_index(), R, warps()):
            var tokens: Int32 = 0
            for e in range(Int(lane_id()), n_local, WARP_SIZE):
                var b = e * R + r
                var n = Int(blocks.messages[b])
                if n > 0:
                    var last = token_of(message_of(ep, b, n - 1))
                    tokens = max(tokens, Int32(last + 1))
            tokens = warp.max(tokens)
            if lane_id() == 0:
                out_.recv_num_tokens[r] = tokens
    comptime if layout == "expert_padded":
        return largest
    return total


@always_inline
def _copy_messages[
    F: TokenFormat, layout: StaticString
](ep: Endpoint[True], blocks: Blocks, rows: Rows[F, layout]):
    """Copy messages to their rows, 32 of a block at a time."""
    order_for_bulk()
    var s = ep.s
    var R = s.n_ranks
    var lane = Int(lane_id())
    var slot = warp_slot(warp_memory(slot_bytes[F]()), sending=False)
    var per_block = (s.max_tokens + WARP_SIZE - 1) // WARP_SIZE
    var share = Share()
    for item in range(share.first, blocks.n * per_block, share.stride):
        var b = item // per_block
        var n = Int(blocks.messages[b])
        var begin = (item - b * per_block) * WARP_SIZE
        if begin >= n:
            continue
        var row = Int(blocks.first[b]) + begin
        if blocks.extra[b] != 0:
            var earlier: Int32 = 0
            for i in range(lane, begin, WARP_SIZE):
                earlier += Int32(pop_count(mask_of(message_of(ep, b, i)))) - 1
            row += Int(warp.sum(earlier))
        comptime if layout == "expert_padded":
            var e = b // R
            row += e * R * s.max_tokens - Int(blocks.first[e * R])
        var mask: UInt32 = 0
        var source_token = 0
        if begin + lane < n:
            var mine = message_of(ep, b, begin + lane)
            mask = mask_of(mine)
            source_token = b % R * s.max_tokens + token_of(mine)
        var rows_here = Int32(pop_count(mask))
        var mine = row + Int(warp.prefix_sum[exclusive=True](rows_here))
        _note_rows(s, rows.out, mask, source_token, mine)
        for j in range(min(WARP_SIZE, n - begin)):
            var at = Int(warp.shuffle_idx(Int32(mine), UInt32(j)))
            slot.load[F.message_bytes](payload(message_of(ep, b, begin + j)))
            for i in range(Int(warp.shuffle_idx(rows_here, UInt32(j)))):
                rows.put[WarpTeam](slot.row, at + i)


@always_inline
def _note_rows(
    s: Settings,
    out_: DispatchOutput,
    mask: UInt32,
    source_token: Int,
    first: Int,
):
    """Say where the rows of the calling lane's message come from."""
    var row = first
    var left = mask
    while left != 0:
        var k = Int(count_trailing_zeros(left))
        left &= left - 1
        out_.src_info[2 * row] = Int32(source_token)
        out_.src_info[2 * row + 1] = Int32(k)
        if out_.row_map.present():
            out_.row_map[source_token * s.top_k + k] = Int32(row)
        row += 1


def wait_shape[F: TokenFormat](ctx: DeviceContext, s: Settings) raises -> Shape:
    """Size of the launch.

    Parameters:
        F: The format.

    Args:
        ctx: The device.
        s: The settings.

    Returns:
        The size.

    Raises:
        UnsupportedError as text in front of the message.
    """
    return Shape(
        ctx,
        s,
        items=s.n_experts * s.n_signals(s.max_tokens),
        warp_bytes=slot_bytes[F](),
        behind=Blocks.bytes(s.n_experts),
    )


def expert_slots_dispatch_wait_stage[
    F: TokenFormat, layout: StaticString
](peers: ByValue[Peers], output: ByValue[DispatchOutput], stage: Int32):
    """The kernel.

    Parameters:
        F: The format.
        layout: Output layout: "expert" or "expert_padded".

    Args:
        peers: The rank's side.
        output: The outputs.
        stage: `STAGE_*`.
    """
    if peers.value.valid():
        receive[F, layout](peers.value.endpoint[True](), output.value, stage)
    else:
        give_nothing(output.value)


def dispatch_wait[
    F: TokenFormat, layout: StaticString
](
    peers: Peers, output: DispatchOutput, stage: Int32, ctx: DeviceContext
) raises:
    """Launch it.

    Parameters:
        F: The format.
        layout: Output layout: "expert" or "expert_padded".

    Args:
        peers: The rank's side.
        output: The outputs, in device memory.
        stage: `STAGE_*`.
        ctx: The device.

    Raises:
        UnsupportedError as text in front of the message, or what the driver raises.
    """
    var shape = wait_shape[F](ctx, peers.s)
    queue(ctx, peers.s).enqueue_function(
        ctx.compile_function[expert_slots_dispatch_wait_stage[F, layout]](
            func_attribute=shape.memory()
        ),
        ByValue(peers),
        ByValue(output),
        stage,
        grid_dim=shape.ctas,
        block_dim=shape.threads,
        shared_mem_bytes=shape.shared_bytes,
        attributes=precedence(ctx, peers.s),
    )
