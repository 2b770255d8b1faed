"""The GPU's dispatch_async with ExpertSlots: one message for each distinct (token, expert).

    every CTA      takes a run of consecutive tokens, each of its warps a part of that run. From the ids of all earlier
                   tokens it counts, in shared memory, the messages that go to each expert before each warp's part
    every warp     brings a token into shared memory, encodes it there once, and stores the message to each of its
                   experts at once: the lane of an expert's first choice writes header and slot
    CTA, last      counts all messages and publishes count[e][me] = (epoch, n) for every (expert, rank)

So slots rise with the tokens, whoever comes first, and nothing is waited for. The signals cover what other CTAs have
stored: each thread's stores are complete before it counts itself in, and the last CTA publishes after the last came.
Why the buffers are free: `expert_launch.mojo`.
"""

from max.gpu import (
    WARP_SIZE,
    block_dim,
    block_idx,
    grid_dim,
    lane_id,
    thread_idx,
)
from max.gpu.host import DeviceContext
from max.gpu.sync import barrier, syncwarp
from std.atomic import Atomic, Ordering
from std.sys import is_amd_gpu

from ..dispatch_tensors import DispatchInput, InputScales
from ..expert_launch import begin_send, end_dispatch_send
from ..expert_messages import payload, routed_masks, write_header
from ..formats import TokenFormat
from ..launch import Endpoint
from ..layout import align_up, expert_slot_offset
from ..peers import View, window_view
from ..routing import NO_EXPERT, normal_id
from ..settings import Settings
from ..team import WarpTeam
from ..tokens import given_tokens, token_count
from .dispatch_async import slot_bytes
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
from .precedence import precedence, queue
from .routing import AHEAD, ballot, run_of, same_lanes
from .shared_memory import SLOT_ALIGNMENT
from .shared_rows import (
    finish_stores,
    order_for_bulk,
    release_slots,
    store_row,
)


@always_inline
def warp_bytes[F: TokenFormat](n_experts: Int) -> Int:
    """Shared memory of a warp: a token, its message, and the next slot of each expert.

    Parameters:
        F: The format.

    Args:
        n_experts: E.

    Returns:
        Bytes.
    """
    return 2 * slot_bytes[F]() + align_up(4 * n_experts, SLOT_ALIGNMENT)


@always_inline
def next_slots[
    F: TokenFormat
](n_experts: Int, of_warp: Int) -> View[DType.int32]:
    """A warp's words for the experts.

    Parameters:
        F: The format.

    Args:
        n_experts: E.
        of_warp: A warp of this CTA.

    Returns:
        Int32 [E], in shared memory.
    """
    var away = (of_warp - warp_index()) * warp_bytes[F](n_experts)
    return window_view[DType.int32](
        warp_memory(warp_bytes[F](n_experts)),
        away + 2 * slot_bytes[F](),
        n_experts,
    )


def _count[
    ids_dtype: DType
](
    s: Settings,
    ids: View[ids_dtype],
    first: Int,
    end: Int,
    counts: View[DType.int32],
):
    """Add the messages of some tokens to the counts; one warp calls this, as many tokens at a time as have lanes."""
    comptime scope = "workgroup" if is_amd_gpu() else "block"
    var K = s.top_k
    var lane = Int(lane_id())
    var at_once = WARP_SIZE // K
    var mine = lane // K
    var below = (UInt64(1) << UInt64(lane)) - 1
    for base in range(first, end, AHEAD * at_once):
        var found = Array[Int16, AHEAD](fill=NO_EXPERT)
        comptime for u in range(AHEAD):  # all loads first
            var t = base + u * at_once + mine
            if mine < at_once and t < end:
                found[u] = normal_id(
                    ids[t * K + lane - mine * K].cast[DType.int64](),
                    s.n_experts,
                )
        comptime for u in range(AHEAD):
            var id = found[u]
            var key = Int32(mine << 16) | Int32(id)
            var same = same_lanes(key if id >= 0 else Int32(-1 - lane))
            if id >= 0 and same & below == 0:
                _ = Atomic[Int32, scope=scope].fetch_add[
                    ordering=Ordering.RELAXED
                ](counts.ptr.unsafe_offset(Int(id)), Int32(1))


@always_inline
def _clear[F: TokenFormat](n_experts: Int):
    """Zero the words of all warps; the whole CTA calls this."""
    var mine = next_slots[F](n_experts, warp_index())
    for e in range(Int(lane_id()), n_experts, WARP_SIZE):
        mine[e] = 0
    syncwarp()


def _count_all[
    F: TokenFormat, ids_dtype: DType
](s: Settings, ids: View[ids_dtype], tokens: Int):
    """Leave in the first warp's words the messages of the first `tokens` tokens, in the others' 0; the whole CTA
    calls this."""
    _clear[F](s.n_experts)
    var run = run_of(tokens)
    _count(s, ids, run[0], run[1], next_slots[F](s.n_experts, warp_index()))
    barrier()
    for e in range(Int(thread_idx.x), s.n_experts, Int(block_dim.x)):
        var sum: Int32 = 0
        for w in range(warps()):
            var words = next_slots[F](s.n_experts, w)
            sum += words[e]
            words[e] = 0
        next_slots[F](s.n_experts, 0)[e] = sum
    barrier()


def _number[
    F: TokenFormat, ids_dtype: DType
](s: Settings, ids: View[ids_dtype], first: Int, end: Int):
    """Leave in each warp's words the slots of its part of tokens `first` to `end`; the whole CTA calls this."""
    _count_all[F](s, ids, first)
    var run = run_of(end - first)
    if warp_index() + 1 < warps():
        _count(
            s,
            ids,
            first + run[0],
            first + run[1],
            next_slots[F](s.n_experts, warp_index() + 1),
        )
    barrier()
    for e in range(Int(thread_idx.x), s.n_experts, Int(block_dim.x)):
        var sum: Int32 = 0
        for w in range(warps()):
            var words = next_slots[F](s.n_experts, w)
            sum += words[e]
            words[e] = sum
    barrier()


@always_inline
def send[
    F: TokenFormat,
    ids_dtype: DType,
    encoded: Bool,
    input_scales: Optional[InputScales] = None,
](ep: Endpoint[True], x: DispatchInput[ids_dtype], stage: Int32):
    """Send; the body of the kernel.

    Parameters:
        F: The format.
        ids_dtype: Type of the ids.
        encoded: Whether `x.tokens` and `x.scales` are in the format already.
        input_scales: Input scales that are compiled in, in place of `x.factor`.

    Args:
        ep: The rank.
        x: Its tokens; `x.weights` is not read.
        stage: `STAGE_*`, for the failure record.
    """
    var s = ep.s
    var epoch = ep.last_sent() + 1
    if thread_idx.x == 0:
        _ = begin_send(ep, stage)
        _ = token_count(ep, stage, x.rows, x.num_tokens)
    var T = given_tokens(x.rows, x.num_tokens)
    if may_go_on(ep.head):
        var each = (T + Int(grid_dim.x) - 1) // Int(grid_dim.x)
        var first = min(T, Int(block_idx.x) * each)
        var end = min(T, first + each)
        if first < end:
            _number[F](s, x.ids, first, end)
            var run = run_of(end - first)
            _send_tokens[F, ids_dtype, encoded, input_scales](
                ep, x, first + run[0], first + run[1]
            )
        var threads = Int(grid_dim.x * block_dim.x)
        var thread = Int(block_idx.x * block_dim.x + thread_idx.x)
        var masks = routed_masks(ep)
        for t in range(T + thread, s.max_tokens, threads):
            masks[t] = 0
    if is_last_cta(ep, sending=True):
        if not ep.head.failed():
            _count_all[F](s, x.ids, T)
        end_dispatch_send(
            ep,
            epoch,
            next_slots[F](s.n_experts, 0),
            Int(thread_idx.x),
            Int(block_dim.x),
        )


@always_inline
def _send_tokens[
    F: TokenFormat,
    ids_dtype: DType,
    encoded: Bool,
    input_scales: Optional[InputScales],
](ep: Endpoint[True], x: DispatchInput[ids_dtype], first: Int, end: Int):
    """Store the messages of the calling warp's tokens; its words hold the next slots."""
    comptime size = slot_bytes[F]()
    var s = ep.s
    var bytes = warp_bytes[F](s.n_experts)
    var token = warp_slot(warp_memory(bytes), sending=True)
    var message = warp_memory(bytes, size)
    var slots = next_slots[F](s.n_experts, warp_index())
    var masks = routed_masks(ep)
    var factor = x.factor[0] if x.factor.present() else Float32(1)
    comptime if input_scales:
        comptime scale_of = input_scales.value()
        factor = scale_of[DType.float32](0)
    order_for_bulk()
    var lane = Int(lane_id())
    var below = (UInt64(1) << UInt64(lane)) - 1
    for t in range(first, end):
        var id = NO_EXPERT
        if lane < s.top_k:
            id = normal_id(
                x.ids[t * s.top_k + lane].cast[DType.int64](), s.n_experts
            )
        var same = same_lanes(Int32(id) if id >= 0 else Int32(-1 - lane))
        var leads = id >= 0 and same & below == 0
        var leaders = ballot(leads)
        var routed = ballot(id >= 0)
        if lane == 0:
            masks[t] = routed.cast[DType.uint32]()
        if leaders == 0:
            continue
        release_slots()
        comptime if encoded:
            x.write[F, True, WarpTeam](t, message)
        else:
            token.load[2 * F.hidden_size](x.tokens.bytes(t * 2 * F.hidden_size))
            F.encode[WarpTeam](token.row, factor, message)
        var to = ep.recv[ep.me]
        if leads:
            var e = Int(id)
            var slot = Int(slots[e])
            slots[e] = Int32(slot + 1)
            to = ep.recv[e // s.n_local].unsafe_offset(
                expert_slot_offset(s, e % s.n_local, ep.me, slot)
            )
            write_header(to, t, same.cast[DType.uint32]())
        store_row[F.message_bytes](
            message, leaders.cast[DType.uint32](), payload(to)
        )
    finish_stores()


def async_shape[
    F: TokenFormat
](ctx: DeviceContext, s: Settings, tokens: Int) raises -> Shape:
    """Size of the launch.

    Parameters:
        F: The format.

    Args:
        ctx: The device.
        s: The settings.
        tokens: T.

    Returns:
        The size.

    Raises:
        UnsupportedError as text in front of the message.
    """
    return Shape(
        ctx, s, items=max(1, tokens), warp_bytes=warp_bytes[F](s.n_experts)
    )


def expert_slots_dispatch_async_stage[
    F: TokenFormat, ids_dtype: DType, encoded: Bool
](
    peers: ByValue[Peers],
    input: ByValue[DispatchInput[ids_dtype]],
    stage: Int32,
):
    """The kernel.

    Parameters:
        F: The format.
        ids_dtype: Type of the ids.
        encoded: Whether tokens are in the format already.

    Args:
        peers: The rank's side.
        input: Its tokens.
        stage: `STAGE_*`.
    """
    if peers.value.valid():
        send[F, ids_dtype, encoded](
            peers.value.endpoint[True](), input.value, stage
        )


def dispatch_async[
    F: TokenFormat, ids_dtype: DType, encoded: Bool
](
    peers: Peers,
    x: DispatchInput[ids_dtype],
    stage: Int32,
    ctx: DeviceContext,
) raises:
    """Launch it.

    Parameters:
        F: The format.
        ids_dtype: Type of the ids.
        encoded: Whether tokens are in the format already.

    Args:
        peers: The rank's side.
        x: Its tokens, in device memory.
        stage: `STAGE_*`.
        ctx: The device.

    Raises:
        UnsupportedError as text in front of the message, or what the driver raises.
    """
    var shape = async_shape[F](ctx, peers.s, x.rows)
    queue(ctx, peers.s).enqueue_function(
        ctx.compile_function[
            expert_slots_dispatch_async_stage[F, ids_dtype, encoded]
        ](func_attribute=shape.memory()),
        ByValue(peers),
        ByValue(x),
        stage,
        grid_dim=shape.ctas,
        block_dim=shape.threads,
        shared_mem_bytes=shape.shared_bytes,
        attributes=precedence(ctx, peers.s),
    )
