"""The fused stages on the host: both halves in one launch, for ranks of their own process.

The receiving half copies what other ranks send while they still send; nothing of it waits for a peer's receiving half.
Virtual ranks share one queue, so a rank that waits there would wait for sends that stand behind it.
"""

from ..combine_tensors import CombineInput, CombineOutput
from ..dispatch_tensors import DispatchInput, DispatchOutput
from ..formats import TokenFormat
from ..launch import Endpoint
from ..layout import STAGE_COMBINE, STAGE_DISPATCH
from ..settings import Settings
from .combine_async import combine_async
from .combine_wait import combine_wait
from .dispatch_async import dispatch_async
from .dispatch_wait import dispatch_wait


def refuse_virtual(s: Settings) raises:
    """Virtual ranks cannot run fused stages.

    Args:
        s: The settings.

    Raises:
        OrderError: As text in front of the message.
    """
    if s.virtual:
        raise Error(
            "ep_mojo.OrderError: fused stages need ranks that run at the same time; with virtual ranks use"
            " dispatch_async, dispatch_wait, combine_async and combine_wait"
        )


def dispatch[
    F: TokenFormat, ids_dtype: DType, encoded: Bool, layout: StaticString
](ep: Endpoint[True], x: DispatchInput[ids_dtype], out_: DispatchOutput) raises:
    """Send and receive.

    Parameters:
        F: The format.
        ids_dtype: Type of the ids.
        encoded: Whether tokens are in the format already.
        layout: Output layout.

    Args:
        ep: The rank.
        x: Its tokens.
        out_: The outputs.

    Raises:
        OrderError with virtual ranks, as text in front of the message.
    """
    refuse_virtual(ep.s)
    dispatch_async[F, ids_dtype, encoded](ep, x, STAGE_DISPATCH)
    dispatch_wait[F, layout](ep, out_, STAGE_DISPATCH)


def combine[
    dtype: DType,
    out_dtype: DType,
    bias_dtype: DType,
    ids_dtype: DType,
    hidden: Int,
    layout: StaticString,
    reduce: StaticString,
](ep: Endpoint[False], x: CombineInput, y: CombineOutput[ids_dtype]) raises:
    """Send and receive.

    Parameters:
        dtype: Type on the wire.
        out_dtype: Type of the output.
        bias_dtype: Type of both biases.
        ids_dtype: Type of the ids.
        hidden: H.
        layout: Output layout of the dispatch.
        reduce: "expert" or "source".

    Args:
        ep: The rank.
        x: The expert rows.
        y: The rank's tokens.

    Raises:
        OrderError with virtual ranks, as text in front of the message.
    """
    refuse_virtual(ep.s)
    combine_async[dtype, hidden, layout, reduce](ep, x, STAGE_COMBINE)
    combine_wait[
        dtype, out_dtype, bias_dtype, ids_dtype, hidden, layout, reduce
    ](ep, y, STAGE_COMBINE)
