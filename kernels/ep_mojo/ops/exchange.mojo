"""Dispatch and combine in one launch, and the sending half of combine, on every target: for the ops that make their
outputs (`dispatch.mojo`, `combine.mojo`) and those that are given them (`dispatch_into.mojo`,
`combine_into.mojo`)."""

from extensibility import ManagedTensorSlice
from max.gpu.host import DeviceContext
from std.sys import size_of

from ..combine_tensors import CombineInput, CombineOutput
from ..cpu import expert_slots_combine
from ..cpu.combine_async import combine_async
from ..cpu.fused import combine, dispatch
from ..dispatch_tensors import DispatchInput, DispatchOutput
from ..formats import TokenFormat
from ..gpu import combine_async as gpu_combine_async
from ..gpu import expert_slots_combine_async
from ..gpu import fused as gpu_fused
from ..launch import Endpoint
from ..layout import STAGE_COMBINE_ASYNC
from ..settings import Settings
from .checks import (
    check_aligned,
    check_expert_rows,
    check_input,
    check_output,
    check_rows,
    check_sums,
    refuse_virtual,
)
from .tensors import gpu_peers, rank_slots_only, whole


def exchange[
    ids_dtype: DType,
    //,
    F: TokenFormat,
    encoded: Bool,
    layout: StaticString,
    slots: StaticString,
    target: StaticString,
](
    s: Settings,
    input: DispatchInput[ids_dtype],
    output: DispatchOutput,
    settings: ManagedTensorSlice,
    counters: ManagedTensorSlice,
    recv_ptrs: ManagedTensorSlice,
    recv_count_ptrs: ManagedTensorSlice,
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
        s: The settings.
        input: What to send.
        output: Where to receive.
        settings: Int64 [17], host.
        counters: The rank's `atomic_counters`.
        recv_ptrs: Uint64 [R], host: recv windows.
        recv_count_ptrs: Uint64 [R], host: count windows.
        ctx: The device.

    Raises:
        ShapeError, OrderError: As text in front of the message.
    """
    check_input[F, encoded, slots == "expert"](s, input)
    check_output[F, layout, slots == "expert"](s, output)
    rank_slots_only[slots]()
    refuse_virtual(s)
    comptime if target == "gpu":
        check_aligned("x", input.tokens)
        comptime if encoded and F.scales_per_token % 4 == 0:
            check_aligned("x_scales", input.scales)
        check_aligned("tokens", output.tokens)
        gpu_fused.dispatch[F, ids_dtype, encoded, layout](
            gpu_peers(s, settings, counters, recv_ptrs, recv_count_ptrs),
            input,
            output,
            ctx,
        )
    else:
        var ep = Endpoint[True](
            whole[DType.int32](counters),
            s,
            whole[DType.uint64](recv_ptrs),
            whole[DType.uint64](recv_count_ptrs),
        )
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
    s: Settings,
    input: CombineInput,
    output: CombineOutput[ids_dtype],
    settings: ManagedTensorSlice,
    counters: ManagedTensorSlice,
    recv_ptrs: ManagedTensorSlice,
    recv_count_ptrs: ManagedTensorSlice,
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
        s: The settings.
        input: What to send back.
        output: Where to, and what is added.
        settings: Int64 [17], host.
        counters: The rank's `atomic_counters`.
        recv_ptrs: Uint64 [R], host: recv windows.
        recv_count_ptrs: Uint64 [R], host: count windows.
        ctx: The device.

    Raises:
        ShapeError, OrderError: As text in front of the message.
    """
    comptime wire = hidden * size_of[Scalar[wire_dtype]]()
    check_rows[layout, reduce](s, input, wire)
    check_sums[layout, reduce, slots == "expert"](
        s,
        output,
        wire,
        hidden * size_of[Scalar[out_dtype]](),
        hidden * size_of[Scalar[bias_dtype]](),
    )
    rank_slots_only[slots]()
    refuse_virtual(s)
    comptime if target == "gpu":
        check_aligned("rows", input.rows)
        check_aligned("y", output.y)
        check_aligned("bias0", output.bias0)
        check_aligned("bias1", output.bias1)
        gpu_fused.combine[
            wire_dtype, out_dtype, bias_dtype, ids_dtype, hidden, layout, reduce
        ](
            gpu_peers(s, settings, counters, recv_ptrs, recv_count_ptrs),
            input,
            output,
            ctx,
        )
    else:
        var ep = Endpoint[False](
            whole[DType.int32](counters),
            s,
            whole[DType.uint64](recv_ptrs),
            whole[DType.uint64](recv_count_ptrs),
        )
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
](
    s: Settings,
    input: CombineInput,
    settings: ManagedTensorSlice,
    counters: ManagedTensorSlice,
    recv_ptrs: ManagedTensorSlice,
    recv_count_ptrs: ManagedTensorSlice,
    ctx: DeviceContext,
) raises:
    """Sends expert rows back, if the tensors have the sizes that the settings ask for.

    Parameters:
        dtype: Of the rows.
        hidden: H.
        layout: Output layout.
        reduce: Reduce mode, "expert" or "source".
        slots: Slot policy, "rank" or "expert".
        target: Where MAX runs the op.

    Args:
        s: The settings.
        input: What to send back; with slots "expert" the handle's src_info is its row_map.
        settings: Int64 [17], host.
        counters: The rank's `atomic_counters`.
        recv_ptrs: Uint64 [R], host: recv windows.
        recv_count_ptrs: Uint64 [R], host: count windows.
        ctx: The device.

    Raises:
        ShapeError: As text in front of the message.
    """
    comptime wire = hidden * size_of[Scalar[dtype]]()
    comptime if slots == "expert":
        check_expert_rows(s, input.rows, input.row_map, wire)
    else:
        check_rows[layout, reduce](s, input, wire)
    comptime if target == "gpu":
        check_aligned("rows", input.rows)
        var peers = gpu_peers(s, settings, counters, recv_ptrs, recv_count_ptrs)
        comptime if slots == "expert":
            expert_slots_combine_async.combine_async[dtype, hidden](
                peers, input.rows, input.row_map, STAGE_COMBINE_ASYNC, ctx
            )
        else:
            gpu_combine_async.combine_async[dtype, hidden, layout, reduce](
                peers, input, STAGE_COMBINE_ASYNC, ctx
            )
    else:
        var ep = Endpoint[False](
            whole[DType.int32](counters),
            s,
            whole[DType.uint64](recv_ptrs),
            whole[DType.uint64](recv_count_ptrs),
        )
        comptime if slots == "expert":
            expert_slots_combine.combine_async[dtype, hidden](
                ep, input.rows, input.row_map, STAGE_COMBINE_ASYNC
            )
        else:
            combine_async[dtype, hidden, layout, reduce](
                ep, input, STAGE_COMBINE_ASYNC
            )
