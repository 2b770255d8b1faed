"""The fused stages on the host: both halves in one launch, for ranks of their own process.

The receiving half copies what other ranks send while they still send; nothing of it waits for a peer's receiving
half. Virtual ranks share one queue, so a rank that waits there would wait for sends that stand behind it: the ops
refuse them.
"""

from ..combine_tensors import CombineInput, CombineOutput
from ..dispatch_tensors import DispatchInput, DispatchOutput
from ..formats import TokenFormat
from ..launch import Endpoint
from ..layout import STAGE_COMBINE, STAGE_DISPATCH
from .combine_async import combine_async
from .combine_wait import combine_wait
from .dispatch_async import dispatch_async
from .dispatch_wait import dispatch_wait


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
        What the worker pool raises; failures of the protocol go on record instead.
    """
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
        What the worker pool raises; failures of the protocol go on record instead.
    """
    combine_async[dtype, hidden, layout, reduce](ep, x, STAGE_COMBINE)
    combine_wait[
        dtype, out_dtype, bias_dtype, ids_dtype, hidden, layout, reduce
    ](ep, y, STAGE_COMBINE)
