"""The GPU's combine_wait with ExpertSlots: the source sums the rows of its tokens' choices.

Every CTA awaits the words of all experts; then each warp sums tokens, over the choices that dispatch_async has sent,
k ascending. Why the order holds: `expert_launch.mojo`.
"""

from max.gpu import WARP_SIZE, block_dim, lane_id, thread_idx
from max.gpu.host import DeviceContext
from max.gpu.sync import barrier, syncwarp
from std.bit import count_trailing_zeros
from std.utils import IndexList

from ..combine_tensors import (
    EPILOGUE_WIDTH,
    CombineOutput,
    Epilogue,
    RouterWeights,
    Terms,
    begin_token,
    row_bytes,
    sum_terms,
)
from ..expert_launch import end_wait, rows_arrived
from ..expert_messages import routed_masks
from ..launch import Endpoint
from ..layout import row_offset
from ..numeric import load_f32
from ..settings import Settings
from ..signal import Waiter
from ..team import WarpTeam, zero_bytes
from ..tokens import given_tokens, tokens_fit
from .combine_wait import zero_output
from .receive_sums import MAX_PARTS
from .launch import ByValue, Peers, Shape, is_last_cta, may_go_on
from .precedence import precedence, queue
from .share import Share


@always_inline
def receive_back[
    dtype: DType,
    out_dtype: DType,
    bias_dtype: DType,
    ids_dtype: DType,
    hidden: Int,
    weights: Optional[RouterWeights] = None,
    epilogue: Optional[Epilogue] = None,
](ep: Endpoint[False], x: CombineOutput[ids_dtype], stage: Int32, given: Int,):
    """Receive and sum; the body of the kernel.

    Parameters:
        dtype: Type on the wire.
        out_dtype: Type of the output.
        bias_dtype: Type of both biases.
        ids_dtype: Type of the ids, which are not read.
        hidden: H.
        weights: The router's weights, in place of `x.weights`.
        epilogue: Takes the sums of every token after they were stored.

    Args:
        ep: The rank.
        x: Its tokens.
        stage: `STAGE_*`, for the failure record.
        given: T of the launch.
    """
    comptime out_bytes = row_bytes[out_dtype, hidden]()
    var s = ep.s
    var epoch = ep.next_wait()
    var waiter = Waiter(ep.head, stage, s.virtual)
    if thread_idx.x == 0:
        _ = ep.begin_wait(stage, ep.last_sent())
        _ = tokens_fit(ep, stage, x.rows, given)
    if may_go_on(ep.head):
        for e in range(Int(thread_idx.x), s.n_experts, Int(block_dim.x)):
            if not rows_arrived(ep, waiter, epoch, e):
                break
        barrier()  # any thread may have failed; thread 0 must not look before
        if may_go_on(ep.head):
            _sum_tokens[
                dtype,
                out_dtype,
                bias_dtype,
                ids_dtype,
                hidden,
                weights,
                epilogue,
            ](ep, x, given)
        var share = Share()
        for t in range(given + share.first, x.rows, share.stride):
            zero_bytes[WarpTeam](x.y.bytes(t * out_bytes), out_bytes)
    if is_last_cta(ep, sending=False):
        if ep.head.failed():
            zero_output[out_bytes](x)
        if thread_idx.x == 0:
            end_wait(ep, epoch)


@always_inline
def _sum_tokens[
    dtype: DType,
    out_dtype: DType,
    bias_dtype: DType,
    ids_dtype: DType,
    hidden: Int,
    weights: Optional[RouterWeights],
    epilogue: Optional[Epilogue],
](ep: Endpoint[False], x: CombineOutput[ids_dtype], T: Int):
    """Sum the rows of each token; several warps share one where there are few and nobody wants the sums."""
    comptime out_bytes = row_bytes[out_dtype, hidden]()
    var s = ep.s
    var window = ep.recv[ep.me]
    var masks = routed_masks(ep)
    var share = Share()
    var parts = 1
    comptime if not epilogue:
        parts = max(1, min(MAX_PARTS, share.stride // max(1, T)))
    for i in range(share.first, T * parts, share.stride):
        var part = i // T
        var t = i - part * T
        var terms = Terms()
        begin_token[dtype, bias_dtype, ids_dtype, hidden](terms, x, t)
        var left = masks[t]
        while left != 0:
            var k = Int(count_trailing_zeros(left))
            left &= left - 1
            var w = x.weight(t, k, s.top_k)
            comptime if weights:
                comptime weight_of = weights.value()
                w = weight_of[1](t, k)[0]
            terms.add(window.unsafe_offset(row_offset(s, 0, t, k)), w)
        var y = x.y.bytes(t * out_bytes)
        sum_terms[WarpTeam, dtype, bias_dtype, out_dtype, hidden](
            terms, y, part, parts
        )
        comptime if epilogue:
            comptime take = epilogue.value()
            comptime W = EPILOGUE_WIDTH
            syncwarp()
            for i in range(Int(lane_id()) * W, hidden, WARP_SIZE * W):
                take[out_dtype, W](
                    IndexList[2](t, i),
                    load_f32[out_dtype, W](y, i).cast[out_dtype](),
                )


def wait_shape(ctx: DeviceContext, s: Settings, tokens: Int) raises -> Shape:
    """Size of a launch of combine_wait.

    Args:
        ctx: The device.
        s: The settings.
        tokens: Rows of the output.

    Returns:
        The size.

    Raises:
        What the driver raises.
    """
    return Shape(ctx, s, items=max(1, tokens), warp_bytes=0)


def expert_slots_combine_wait_stage[
    dtype: DType,
    out_dtype: DType,
    bias_dtype: DType,
    ids_dtype: DType,
    hidden: Int,
](
    peers: ByValue[Peers],
    output: ByValue[CombineOutput[ids_dtype]],
    stage: Int32,
):
    """The kernel of combine_wait.

    Parameters:
        dtype: Type on the wire.
        out_dtype: Type of the output.
        bias_dtype: Type of both biases.
        ids_dtype: Type of the ids, which are not read.
        hidden: H.

    Args:
        peers: The rank's side.
        output: Its tokens.
        stage: `STAGE_*`.
    """
    if peers.value.valid():
        receive_back[dtype, out_dtype, bias_dtype, ids_dtype, hidden](
            peers.value.endpoint[False](),
            output.value,
            stage,
            given_tokens(output.value.rows, output.value.num_tokens),
        )
    else:
        zero_output[row_bytes[out_dtype, hidden]()](output.value)


def combine_wait[
    dtype: DType,
    out_dtype: DType,
    bias_dtype: DType,
    ids_dtype: DType,
    hidden: Int,
](
    peers: Peers,
    x: CombineOutput[ids_dtype],
    stage: Int32,
    ctx: DeviceContext,
) raises:
    """Launch combine_wait.

    Parameters:
        dtype: Type on the wire.
        out_dtype: Type of the output.
        bias_dtype: Type of both biases.
        ids_dtype: Type of the ids, which are not read.
        hidden: H.

    Args:
        peers: The rank's side.
        x: Its tokens, in device memory.
        stage: `STAGE_*`.
        ctx: The device.

    Raises:
        What the driver raises.
    """
    var shape = wait_shape(ctx, peers.s, x.rows)
    queue(ctx, peers.s).enqueue_function(
        ctx.compile_function[
            expert_slots_combine_wait_stage[
                dtype, out_dtype, bias_dtype, ids_dtype, hidden
            ]
        ](),
        ByValue(peers),
        ByValue(x),
        stage,
        grid_dim=shape.ctas,
        block_dim=shape.threads,
        shared_mem_bytes=shape.shared_bytes,
        attributes=precedence(ctx, peers.s),
    )
