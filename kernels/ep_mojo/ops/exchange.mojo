"""Dispatch and combine in one launch, and their sending halves, on every target: for the ops that make their
outputs (`dispatch.mojo`, `combine.mojo`) and those that are given them (`dispatch_into.mojo`,
`combine_into.mojo`)."""

from max.gpu.host import DeviceContext
from std.sys import size_of

from ..combine_tensors import CombineInput, CombineOutput
from ..cpu import expert_slots_combine, expert_slots_dispatch
from ..cpu.combine_async import combine_async
from ..cpu.dispatch_async import dispatch_async
from ..cpu.fused import combine, dispatch
from ..dispatch_tensors import DispatchInput, DispatchOutput
from ..formats import TokenFormat
from ..gpu import combine_async as gpu_combine_async
from ..gpu import dispatch_async as gpu_dispatch_async
from ..gpu import expert_slots_combine_async, expert_slots_dispatch_async
from ..gpu import fused as gpu_fused
from ..gpu.few_combine import few_combine, few_combine_async
from ..gpu.few_dispatch import few_dispatch, few_dispatch_async
from ..gpu.launch import Peers, uses_cells
from ..layout import STAGE_COMBINE_ASYNC, STAGE_DISPATCH_ASYNC
from .checks import (
    check_aligned,
    check_expert_rows,
    check_input,
    check_output,
    check_rows,
    check_sums,
    refuse_virtual,
)
from .tensors import rank_slots_only


def send_tokens[
    ids_dtype: DType,
    //,
    F: TokenFormat,
    encoded: Bool,
    slots: StaticString,
    target: StaticString,
](peers: Peers, input: DispatchInput[ids_dtype], ctx: DeviceContext) raises:
    """Sends tokens, if the tensors have the sizes that the settings ask for.

    Parameters:
        ids_dtype: Of the choices.
        F: The format.
        encoded: Whether tokens are in the format already.
        slots: Slot policy, "rank" or "expert".
        target: Where MAX runs the op.

    Args:
        peers: The rank's side.
        input: What to send.
        ctx: The device.

    Raises:
        ShapeError: As text in front of the message.
    """
    check_input[F, encoded, slots == "expert"](peers.s, input)
    comptime if target == "gpu":
        _check_aligned_input[F, encoded](input)
        comptime if slots == "expert":
            expert_slots_dispatch_async.dispatch_async[F, ids_dtype, encoded](
                peers, input, STAGE_DISPATCH_ASYNC, ctx
            )
        else:
            if uses_cells(ctx, peers.s.in_cells):
                few_dispatch_async[F, ids_dtype, encoded](
                    peers, input, STAGE_DISPATCH_ASYNC, ctx
                )
            elif uses_cells(ctx, peers.s.tables_in_cells):
                gpu_dispatch_async.dispatch_async[F, ids_dtype, encoded, True](
                    peers, input, STAGE_DISPATCH_ASYNC, ctx
                )
            else:
                gpu_dispatch_async.dispatch_async[F, ids_dtype, encoded, False](
                    peers, input, STAGE_DISPATCH_ASYNC, ctx
                )
    else:
        var ep = peers.endpoint[True, may_shrink=True]()
        comptime if slots == "expert":
            expert_slots_dispatch.dispatch_async[F, ids_dtype, encoded](
                ep, input, STAGE_DISPATCH_ASYNC
            )
        else:
            dispatch_async[F, ids_dtype, encoded](
                ep, input, STAGE_DISPATCH_ASYNC
            )


def _check_aligned_input[
    F: TokenFormat, encoded: Bool
](input: DispatchInput) raises:
    check_aligned("x", input.tokens)
    comptime if encoded and F.scales_per_token % 4 == 0:
        check_aligned("x_scales", input.scales)


def exchange[
    ids_dtype: DType,
    //,
    F: TokenFormat,
    encoded: Bool,
    layout: StaticString,
    slots: StaticString,
    target: StaticString,
](
    peers: Peers,
    input: DispatchInput[ids_dtype],
    output: DispatchOutput,
    ctx: DeviceContext,
) raises:
    """Sends and receives tokens, if the tensors have the sizes that the settings ask for.

    Parameters:
        ids_dtype: Of the choices.
        F: The format.
        encoded: Whether tokens are in the format already.
        layout: Output layout.
        slots: Slot policy: "rank".
        target: Where MAX runs the op.

    Args:
        peers: The rank's side.
        input: What to send.
        output: Where to receive.
        ctx: The device.

    Raises:
        ShapeError, OrderError: As text in front of the message.
    """
    check_input[F, encoded, slots == "expert"](peers.s, input)
    check_output[F, layout, slots == "expert"](peers.s, output)
    rank_slots_only[slots]()
    refuse_virtual(peers.s)
    comptime if target == "gpu":
        _check_aligned_input[F, encoded](input)
        check_aligned("tokens", output.tokens)
        if uses_cells(ctx, peers.s.in_cells):
            few_dispatch[F, ids_dtype, encoded, layout](
                peers, input, output, ctx
            )
        elif uses_cells(ctx, peers.s.tables_in_cells):
            gpu_fused.dispatch[
                F, ids_dtype, encoded, layout, layout != "gathered"
            ](peers, input, output, ctx)
        else:
            gpu_fused.dispatch[F, ids_dtype, encoded, layout, False](
                peers, input, output, ctx
            )
    else:
        var ep = peers.endpoint[True, may_shrink=True]()
        dispatch[F, ids_dtype, encoded, layout](ep, input, output)


def exchange_sums[
    wire_dtype: DType,
    out_dtype: DType,
    bias_dtype: DType,
    ids_dtype: DType,
    hidden: Int,
    layout: StaticString,
    reduce: StaticString,
    slots: StaticString,
    target: StaticString,
](
    peers: Peers,
    input: CombineInput,
    output: CombineOutput[ids_dtype],
    ctx: DeviceContext,
) raises:
    """Sends back, receives and sums expert rows, if the tensors have the sizes that the settings ask for.

    Parameters:
        wire_dtype: Of the rows that travel.
        out_dtype: Of the sums.
        bias_dtype: Of the biases.
        ids_dtype: Of the choices.
        hidden: H.
        layout: Output layout.
        reduce: Reduce mode, "expert" or "source".
        slots: Slot policy: "rank".
        target: Where MAX runs the op.

    Args:
        peers: The rank's side.
        input: What to send back.
        output: Where to, and what is added.
        ctx: The device.

    Raises:
        ShapeError, OrderError: As text in front of the message.
    """
    comptime wire = hidden * size_of[Scalar[wire_dtype]]()
    check_rows[layout, reduce](peers.s, input, wire)
    check_sums[layout, reduce, slots == "expert"](
        peers.s,
        output,
        wire,
        hidden * size_of[Scalar[out_dtype]](),
        hidden * size_of[Scalar[bias_dtype]](),
    )
    rank_slots_only[slots]()
    refuse_virtual(peers.s)
    comptime if target == "gpu":
        check_aligned("rows", input.rows)
        check_aligned("y", output.y)
        check_aligned("bias0", output.bias0)
        check_aligned("bias1", output.bias1)
        if uses_cells(ctx, peers.s.rows_in_cells):
            few_combine[
                wire_dtype,
                out_dtype,
                bias_dtype,
                ids_dtype,
                hidden,
                layout,
                reduce,
            ](peers, input, output, ctx)
        else:
            gpu_fused.combine[
                wire_dtype,
                out_dtype,
                bias_dtype,
                ids_dtype,
                hidden,
                layout,
                reduce,
            ](peers, input, output, ctx)
    else:
        var ep = peers.endpoint[False, may_shrink=True]()
        combine[
            wire_dtype, out_dtype, bias_dtype, ids_dtype, hidden, layout, reduce
        ](ep, input, output)


def send_rows[
    dtype: DType,
    hidden: Int,
    layout: StaticString,
    reduce: StaticString,
    slots: StaticString,
    target: StaticString,
](peers: Peers, input: CombineInput, ctx: DeviceContext,) raises:
    """Sends expert rows back, if the tensors have the sizes that the settings ask for.

    Parameters:
        dtype: Of the rows.
        hidden: H.
        layout: Output layout.
        reduce: Reduce mode, "expert" or "source".
        slots: Slot policy, "rank" or "expert".
        target: Where MAX runs the op.

    Args:
        peers: The rank's side.
        input: What to send back; with slots "expert" the handle's src_info is its row_map.
        ctx: The device.

    Raises:
        ShapeError: As text in front of the message.
    """
    comptime wire = hidden * size_of[Scalar[dtype]]()
    comptime if slots == "expert":
        check_expert_rows(peers.s, input.rows, input.row_map, wire)
    else:
        check_rows[layout, reduce](peers.s, input, wire)
    comptime if target == "gpu":
        check_aligned("rows", input.rows)
        comptime if slots == "expert":
            expert_slots_combine_async.combine_async[dtype, hidden](
                peers, input.rows, input.row_map, STAGE_COMBINE_ASYNC, ctx
            )
        else:
            if uses_cells(ctx, peers.s.rows_in_cells):
                few_combine_async[dtype, hidden, layout, reduce](
                    peers, input, STAGE_COMBINE_ASYNC, ctx
                )
            else:
                gpu_combine_async.combine_async[dtype, hidden, layout, reduce](
                    peers, input, STAGE_COMBINE_ASYNC, ctx
                )
    else:
        var ep = peers.endpoint[False, may_shrink=True]()
        comptime if slots == "expert":
            expert_slots_combine.combine_async[dtype, hidden](
                ep, input.rows, input.row_map, STAGE_COMBINE_ASYNC
            )
        else:
            combine_async[dtype, hidden, layout, reduce](
                ep, input, STAGE_COMBINE_ASYNC
            )
