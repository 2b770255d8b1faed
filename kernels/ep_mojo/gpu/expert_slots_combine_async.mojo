"""The GPU's combine_async with ExpertSlots: every expert row travels by itself.

Each warp takes 32 rows at a time and stores each row that `src_info` names a token for to that token's source, slot
(token, k). The last CTA publishes for each own expert, on every rank, that its rows are there. A pair that names no
token goes on record before its row is read. Why the order holds: `expert_launch.mojo`.
"""

from max.gpu import WARP_SIZE, block_dim, lane_id, thread_idx
from max.gpu.host import DeviceContext
from std.bit import count_trailing_zeros

from ..combine_tensors import row_bytes
from ..expert_launch import begin_send, end_combine_send
from ..launch import Endpoint
from ..layout import (
    FIELD_SRC_INFO,
    KIND_SHAPE,
    align_up,
    row_offset,
)
from ..peers import View
from ..settings import Settings
from .launch import (
    ByValue,
    Peers,
    Shape,
    is_last_cta,
    may_go_on,
    warp_memory,
    warp_slot,
)
from .precedence import precedence, queue
from .routing import ballot
from .share import Share
from .shared_memory import SLOT_ALIGNMENT
from .shared_rows import (
    finish_stores,
    order_for_bulk,
    release_slots,
    store_row,
)


@always_inline
def _slot_bytes[dtype: DType, hidden: Int]() -> Int:
    """Shared memory for a row."""
    return align_up(row_bytes[dtype, hidden](), SLOT_ALIGNMENT)


@always_inline
def send_back[
    dtype: DType, hidden: Int
](
    ep: Endpoint[False],
    rows: View[DType.uint8],
    src_info: View[DType.int32],
    stage: Int32,
):
    """Send; the body of the kernel.

    Parameters:
        dtype: Type of the rows, and on the wire.
        hidden: H.

    Args:
        ep: The rank.
        rows: Expert rows [rows, H] as bytes, in the rows of dispatch_wait.
        src_info: Int32 [rows, 2] of dispatch_wait.
        stage: `STAGE_*`, for the failure record.
    """
    var epoch = ep.last_sent() + 1
    if thread_idx.x == 0:
        _ = begin_send(ep, stage)
    if may_go_on(ep.head):
        _send_rows[dtype, hidden](ep, rows, src_info, stage)
    if is_last_cta(ep, sending=True):
        end_combine_send(ep, epoch, Int(thread_idx.x), Int(block_dim.x))


@always_inline
def _send_rows[
    dtype: DType, hidden: Int
](
    ep: Endpoint[False],
    rows: View[DType.uint8],
    src_info: View[DType.int32],
    stage: Int32,
):
    """Store the rows, 32 at a time."""
    comptime size = row_bytes[dtype, hidden]()
    order_for_bulk()
    var s = ep.s
    var n = min(src_info.size // 2, rows.size // size)
    var limit = s.n_ranks * s.max_tokens
    var lane = Int(lane_id())
    var slot = warp_slot(
        warp_memory(_slot_bytes[dtype, hidden]()), sending=True
    )
    var share = Share()
    var pieces = (n + WARP_SIZE - 1) // WARP_SIZE
    for piece in range(share.first, pieces, share.stride):
        var row = piece * WARP_SIZE + lane
        var from_ = -1
        var k = -1
        if row < n:
            from_ = Int(src_info[2 * row])
            k = Int(src_info[2 * row + 1])
        var given = 0 <= from_ < limit and 0 <= k < s.top_k
        var wrong = not given and not (from_ == -1 and k == -1)
        if ballot(wrong) != 0:
            if wrong:
                ep.head.fail(
                    KIND_SHAPE,
                    stage,
                    chunk=FIELD_SRC_INFO,
                    value=from_,
                    limit=limit - 1,
                )
            break
        var to = ep.recv[ep.me]
        if given:
            to = ep.recv[from_ // s.max_tokens].unsafe_offset(
                row_offset(s, 0, from_ % s.max_tokens, k)
            )
        var left = ballot(given)
        while left != 0:
            var i = Int(count_trailing_zeros(left))
            left &= left - 1
            release_slots()
            slot.load[size](rows.bytes((piece * WARP_SIZE + i) * size))
            store_row[size](slot.row, UInt32(1) << UInt32(i), to)
    finish_stores()


def async_shape[
    dtype: DType, hidden: Int
](ctx: DeviceContext, s: Settings, rows: Int) raises -> Shape:
    """Size of a launch of combine_async.

    Parameters:
        dtype: Type of the rows.
        hidden: H.

    Args:
        ctx: The device.
        s: The settings.
        rows: Rows.

    Returns:
        The size.

    Raises:
        UnsupportedError as text in front of the message.
    """
    return Shape(
        ctx,
        s,
        items=max(1, rows // WARP_SIZE),
        warp_bytes=_slot_bytes[dtype, hidden](),
    )


def expert_slots_combine_async_stage[
    dtype: DType, hidden: Int
](
    peers: ByValue[Peers],
    rows: ByValue[View[DType.uint8]],
    src_info: ByValue[View[DType.int32]],
    stage: Int32,
):
    """The kernel of combine_async.

    Parameters:
        dtype: Type of the rows, and on the wire.
        hidden: H.

    Args:
        peers: The rank's side.
        rows: Expert rows [rows, H] as bytes.
        src_info: Int32 [rows, 2] of dispatch_wait.
        stage: `STAGE_*`.
    """
    if peers.value.valid():
        send_back[dtype, hidden](
            peers.value.endpoint[False](), rows.value, src_info.value, stage
        )


def combine_async[
    dtype: DType, hidden: Int
](
    peers: Peers,
    rows: View[DType.uint8],
    src_info: View[DType.int32],
    stage: Int32,
    ctx: DeviceContext,
) raises:
    """Launch combine_async.

    Parameters:
        dtype: Type of the rows, and on the wire.
        hidden: H.

    Args:
        peers: The rank's side.
        rows: Expert rows [rows, H] as bytes, in device memory.
        src_info: Int32 [rows, 2] of dispatch_wait, in device memory.
        stage: `STAGE_*`.
        ctx: The device.

    Raises:
        UnsupportedError as text in front of the message, or what the driver raises.
    """
    var shape = async_shape[dtype, hidden](ctx, peers.s, src_info.size // 2)
    queue(ctx, peers.s).enqueue_function(
        ctx.compile_function[expert_slots_combine_async_stage[dtype, hidden]](
            func_attribute=shape.memory()
        ),
        ByValue(peers),
        ByValue(rows),
        ByValue(src_info),
        stage,
        grid_dim=shape.ctas,
        block_dim=shape.threads,
        shared_mem_bytes=shape.shared_bytes,
        attributes=precedence(ctx, peers.s),
    )
