"""The GPU's combine_wait: what came back is summed into the tokens' outputs.

Each warp takes chunks of G own tokens, the first one by its number, further ones as it comes free (`Turns`). For a
chunk it awaits the signals of the ranks that own one of its tokens' experts, lane r that of rank r, then sums every
token from the window in float32: biases, shared row, then the rows of k ascending or of ranks ascending, rounded
once. Rows past T come back zero. The last CTA gives the buffer back. Few tokens come as cells: `few_combine.mojo`.
"""

from max.gpu import lane_id, thread_idx
from max.gpu.host import DeviceContext
from max.gpu.sync import syncwarp

from ..combine_tensors import (
    CombineOutput,
    check_header,
    row_bytes,
    travels_by_row,
)
from ..launch import Endpoint
from ..routing import may_shrink
from ..signal import MASKED, NO_SIGNAL
from ..team import WarpTeam, zero_bytes
from ..tokens import given_tokens, tokens_fit
from .launch import (
    ByValue,
    Peers,
    Shape,
    is_last_cta,
    may_go_on,
    warp_index,
    warps,
)
from .precedence import precedence, queue
from .receive_sums import receive_sums
from .routing import ballot
from .share import LATE, Share
from .slices import combine_bytes
from .turns import clear_tickets


@always_inline
def open_receive_back(
    ep: Endpoint[False], x: CombineOutput, sent: UInt64, stage: Int32
):
    """Open the receiving half; one thread of a CTA calls this. Afterwards `head.failed()` says whether to go on.

    Args:
        ep: The rank.
        x: Its tokens.
        sent: The epoch of the last send, one of this very launch included.
        stage: `STAGE_*`, for the failure record.
    """
    _ = ep.begin_wait(stage, sent)
    _ = tokens_fit(ep, stage, x.rows, given_tokens(x.rows, x.num_tokens))


@always_inline
def receive_back[
    dtype: DType,
    out_dtype: DType,
    bias_dtype: DType,
    ids_dtype: DType,
    hidden: Int,
    layout: StaticString,
    reduce: StaticString,
](
    ep: Endpoint[False],
    x: CombineOutput[ids_dtype],
    epoch: UInt64,
    stage: Int32,
    share: Share,
):
    """Receive and sum, in a launch that may go on.

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
        epoch: The launch's epoch.
        stage: `STAGE_*`, for the failure record.
        share: The calling warp's first chunk, or `LATE`; and how many warps have one.
    """
    comptime out_bytes = row_bytes[out_dtype, hidden]()
    comptime by_row = travels_by_row[layout, reduce]()
    var waiter = ep.waiter(stage)
    var T = given_tokens(x.rows, x.num_tokens)
    if share.first != LATE:
        for t in range(T + share.first, x.rows, share.stride):
            zero_bytes[WarpTeam](x.y.bytes(t * out_bytes), out_bytes)
    var fine = True
    var masked = False
    if Int(lane_id()) < ep.s.n_ranks:
        var peer = Int(lane_id())
        var header = ep.header_of(waiter, epoch, peer)
        fine = header != NO_SIGNAL
        masked = header == MASKED
        if fine and not masked:
            fine = check_header(ep, stage, peer, header, T, by_row)
    if ballot(not fine) == 0:
        syncwarp()
        receive_sums[dtype, out_dtype, bias_dtype, ids_dtype, hidden, by_row](
            ep, x, T, epoch, waiter, UInt32(ballot(masked)), share
        )


@always_inline
def close_receive_back[
    out_bytes: Int
](ep: Endpoint[False], x: CombineOutput, epoch: UInt64, failed: Bool):
    """Close the receiving half, and set its tickets to 0, which launches of few tokens take none of; the last CTA calls
    this.

    Parameters:
        out_bytes: Bytes of a row.

    Args:
        ep: The rank.
        x: Its tokens.
        epoch: The launch's epoch.
        failed: `head.failed()`, the same for all threads.
    """
    if failed:
        zero_output[out_bytes](x)
    if warp_index() == 0:
        clear_tickets(ep)
        ep.end_wait[WarpTeam](epoch, failed)


@always_inline
def zero_output[out_bytes: Int](x: CombineOutput):
    """Zero all rows, by one CTA.

    Parameters:
        out_bytes: Bytes of a row.

    Args:
        x: The outputs.
    """
    for t in range(warp_index(), x.rows, warps()):
        zero_bytes[WarpTeam](x.y.bytes(t * out_bytes), out_bytes)


def combine_wait_stage[
    dtype: DType,
    out_dtype: DType,
    bias_dtype: DType,
    ids_dtype: DType,
    hidden: Int,
    layout: StaticString,
    reduce: StaticString,
](
    peers: ByValue[Peers],
    output: ByValue[CombineOutput[ids_dtype]],
    stage: Int32,
):
    """The kernel.

    Parameters:
        dtype: Type on the wire, and of the shared expert's rows.
        out_dtype: Type of the output.
        bias_dtype: Type of both biases.
        ids_dtype: Type of the ids.
        hidden: H.
        layout: Output layout of the dispatch.
        reduce: "expert" or "source".

    Args:
        peers: The rank's side.
        output: Its tokens.
        stage: `STAGE_*`.
    """
    comptime out_bytes = row_bytes[out_dtype, hidden]()
    if not peers.value.valid():
        zero_output[out_bytes](output.value)
        return
    var ep = peers.value.endpoint[
        False, may_shrink[layout]() and reduce == "source"
    ]()
    var epoch = ep.next_wait()
    if thread_idx.x == 0:
        open_receive_back(ep, output.value, ep.last_sent(), stage)
    if may_go_on(ep.head):
        receive_back[
            dtype, out_dtype, bias_dtype, ids_dtype, hidden, layout, reduce
        ](ep, output.value, epoch, stage, Share())
    if is_last_cta(ep, sending=False):
        close_receive_back[out_bytes](ep, output.value, epoch, ep.head.failed())


def combine_wait[
    dtype: DType,
    out_dtype: DType,
    bias_dtype: DType,
    ids_dtype: DType,
    hidden: Int,
    layout: StaticString,
    reduce: StaticString,
](
    peers: Peers,
    x: CombineOutput[ids_dtype],
    stage: Int32,
    ctx: DeviceContext,
) raises:
    """Launch it.

    Parameters:
        dtype: Type on the wire, and of the shared expert's rows.
        out_dtype: Type of the output.
        bias_dtype: Type of both biases.
        ids_dtype: Type of the ids.
        hidden: H.
        layout: Output layout of the dispatch.
        reduce: "expert" or "source".

    Args:
        peers: The rank's side.
        x: Its tokens, in device memory.
        stage: `STAGE_*`.
        ctx: The device.

    Raises:
        What the driver raises.
    """
    var shape = Shape(
        ctx,
        peers.s,
        items=max(1, x.rows),
        warp_bytes=combine_bytes[dtype, hidden](),
    )
    queue(ctx, peers.s).enqueue_function(
        ctx.compile_function[
            combine_wait_stage[
                dtype, out_dtype, bias_dtype, ids_dtype, hidden, layout, reduce
            ]
        ](func_attribute=shape.memory()),
        ByValue(peers),
        ByValue(x),
        stage,
        grid_dim=shape.ctas,
        block_dim=shape.threads,
        shared_mem_bytes=shape.shared_bytes,
        attributes=precedence(ctx, peers.s),
    )
