"""The fused stages on a GPU: both halves in one launch, for ranks that run at the same time.

Every CTA sends its part, then receives: what others send is copied to its rows while the rest is still under way.
Nothing of the sending half waits for a peer's receiving half of the same round.
"""

from max.gpu.host import DeviceContext, FuncAttribute

from ..combine_tensors import CombineInput, CombineOutput, row_bytes
from ..dispatch_tensors import DispatchInput, DispatchOutput
from ..formats import TokenFormat
from ..layout import STAGE_COMBINE, STAGE_DISPATCH
from ..team import WarpTeam
from .combine_async import send_back
from .combine_async import slot_bytes as row_slot_bytes
from .combine_wait import receive_back, zero_output
from .dispatch_async import send
from .dispatch_async import slot_bytes as token_slot_bytes
from .dispatch_wait import cta_bytes, receive
from .launch import ByValue, Peers, Shape


def dispatch_stage[
    F: TokenFormat, ids_dtype: DType, encoded: Bool, layout: StaticString
](
    peers: ByValue[Peers],
    input: ByValue[DispatchInput[ids_dtype]],
    output: ByValue[DispatchOutput],
):
    """The kernel of dispatch.

    Parameters:
        F: The format.
        ids_dtype: Type of the ids.
        encoded: Whether tokens are in the format already.
        layout: Output layout.

    Args:
        peers: The rank's side.
        input: Its tokens.
        output: The outputs.
    """
    if peers.value.valid():
        var ep = peers.value.endpoint[True]()
        var sent = ep.last_sent() + 1
        send[F, ids_dtype, encoded](ep, input.value, STAGE_DISPATCH)
        receive[F, layout](ep, output.value, sent, STAGE_DISPATCH)
    else:
        output.value.clear[WarpTeam]()


def dispatch[
    F: TokenFormat, ids_dtype: DType, encoded: Bool, layout: StaticString
](
    peers: Peers,
    x: DispatchInput[ids_dtype],
    out_: DispatchOutput,
    ctx: DeviceContext,
) raises:
    """Launch it.

    Parameters:
        F: The format.
        ids_dtype: Type of the ids.
        encoded: Whether tokens are in the format already.
        layout: Output layout.

    Args:
        peers: The rank's side.
        x: Its tokens, in device memory.
        out_: The outputs, in device memory.
        ctx: The device.

    Raises:
        UnsupportedError as text in front of the message, or what the driver raises.
    """
    var s = peers.s
    var shape = Shape(
        ctx,
        s,
        items=s.n_ranks * s.n_signals(s.max_tokens),
        warp_bytes=2 * token_slot_bytes[F](),
        cta_bytes=cta_bytes[layout](peers),
    )
    ctx.enqueue_function[dispatch_stage[F, ids_dtype, encoded, layout]](
        ByValue(peers),
        ByValue(x),
        ByValue(out_),
        grid_dim=shape.ctas,
        block_dim=shape.threads,
        shared_mem_bytes=shape.shared_bytes,
        func_attribute=FuncAttribute.MAX_DYNAMIC_SHARED_SIZE_BYTES(
            UInt32(shape.shared_bytes)
        ),
    )


def combine_stage[
    dtype: DType,
    out_dtype: DType,
    bias_dtype: DType,
    ids_dtype: DType,
    hidden: Int,
    layout: StaticString,
    reduce: StaticString,
](
    peers: ByValue[Peers],
    input: ByValue[CombineInput],
    output: ByValue[CombineOutput[ids_dtype]],
):
    """The kernel of combine.

    Parameters:
        dtype: Type on the wire.
        out_dtype: Type of the output.
        bias_dtype: Type of both biases.
        ids_dtype: Type of the ids.
        hidden: H.
        layout: Output layout of the dispatch.
        reduce: "expert" or "source".

    Args:
        peers: The rank's side.
        input: The expert rows.
        output: The rank's tokens.
    """
    if peers.value.valid():
        var ep = peers.value.endpoint[False]()
        var sent = ep.last_sent() + 1
        send_back[dtype, hidden, layout, reduce](ep, input.value, STAGE_COMBINE)
        var y = output.value
        if y.shared_rows.present():
            y.shared_rows = input.value.rows  # the copy may not be there yet
        receive_back[
            dtype, out_dtype, bias_dtype, ids_dtype, hidden, layout, reduce
        ](ep, y, sent, STAGE_COMBINE)
    else:
        zero_output[row_bytes[out_dtype, hidden]()](output.value)


def combine[
    dtype: DType,
    out_dtype: DType,
    bias_dtype: DType,
    ids_dtype: DType,
    hidden: Int,
    layout: StaticString,
    reduce: StaticString,
](
    peers: Peers,
    x: CombineInput,
    y: CombineOutput[ids_dtype],
    ctx: DeviceContext,
) raises:
    """Launch it.

    Parameters:
        dtype: Type on the wire.
        out_dtype: Type of the output.
        bias_dtype: Type of both biases.
        ids_dtype: Type of the ids.
        hidden: H.
        layout: Output layout of the dispatch.
        reduce: "expert" or "source".

    Args:
        peers: The rank's side.
        x: The expert rows, in device memory.
        y: The rank's tokens, in device memory.
        ctx: The device.

    Raises:
        UnsupportedError as text in front of the message, or what the driver raises.
    """
    var s = peers.s
    var shape = Shape(
        ctx,
        s,
        items=s.n_ranks * s.n_signals(s.max_tokens),
        warp_bytes=row_slot_bytes[dtype, hidden](),
    )
    ctx.enqueue_function[
        combine_stage[
            dtype, out_dtype, bias_dtype, ids_dtype, hidden, layout, reduce
        ]
    ](
        ByValue(peers),
        ByValue(x),
        ByValue(y),
        grid_dim=shape.ctas,
        block_dim=shape.threads,
        shared_mem_bytes=shape.shared_bytes,
        func_attribute=FuncAttribute.MAX_DYNAMIC_SHARED_SIZE_BYTES(
            UInt32(shape.shared_bytes)
        ),
    )
