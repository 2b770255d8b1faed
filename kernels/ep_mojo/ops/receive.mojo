"""The receiving halves of dispatch and combine on every target and with both slot policies, for the ops that make their
outputs (`dispatch.mojo`, `combine.mojo`) and those that are given them (`dispatch_into.mojo`,
`combine_into.mojo`)."""

from max.gpu.host import DeviceContext
from std.sys import size_of

from ..combine_tensors import CombineOutput
from ..cpu import expert_slots_combine, expert_slots_dispatch
from ..cpu.combine_wait import combine_wait
from ..cpu.dispatch_wait import dispatch_wait
from ..dispatch_tensors import DispatchOutput
from ..formats import TokenFormat
from ..gpu import combine_wait as gpu_combine_wait
from ..gpu import dispatch_wait as gpu_dispatch_wait
from ..gpu import expert_slots_combine_wait, expert_slots_dispatch_wait
from ..gpu.few_combine import few_combine_wait
from ..gpu.few_dispatch import few_dispatch_wait
from ..gpu.launch import Peers, uses_cells
from ..layout import STAGE_COMBINE_WAIT, STAGE_DISPATCH_WAIT
from .checks import check_aligned, check_output, check_sums


def receive[
    F: TokenFormat,
    layout: StaticString,
    slots: StaticString,
    target: StaticString,
](peers: Peers, output: DispatchOutput, ctx: DeviceContext,) raises:
    """Receives tokens, if the outputs have the sizes that the settings ask for.

    Parameters:
        F: The format.
        layout: Output layout.
        slots: Slot policy, "rank" or "expert".
        target: Where MAX runs the op.

    Args:
        peers: The rank's side.
        output: Where to.
        ctx: The device.

    Raises:
        ShapeError: As text in front of the message.
    """
    check_output[F, layout, slots == "expert"](peers.s, output)
    comptime if target == "gpu":
        comptime if slots == "expert":
            expert_slots_dispatch_wait.dispatch_wait[F, layout](
                peers, output, STAGE_DISPATCH_WAIT, ctx
            )
        else:
            if uses_cells(ctx, peers.s.in_cells):
                few_dispatch_wait[F, layout](
                    peers, output, STAGE_DISPATCH_WAIT, ctx
                )
            elif uses_cells(ctx, peers.s.tables_in_cells):
                gpu_dispatch_wait.dispatch_wait[
                    F, layout, layout != "gathered"
                ](peers, output, STAGE_DISPATCH_WAIT, ctx)
            else:
                gpu_dispatch_wait.dispatch_wait[F, layout, False](
                    peers, output, STAGE_DISPATCH_WAIT, ctx
                )
    else:
        var ep = peers.endpoint[True, may_shrink=True]()
        comptime if slots == "expert":
            expert_slots_dispatch.dispatch_wait[F, layout](
                ep, output, STAGE_DISPATCH_WAIT
            )
        else:
            dispatch_wait[F, layout](ep, output, STAGE_DISPATCH_WAIT)


def receive_sums[
    wire_dtype: DType,
    out_dtype: DType,
    bias_dtype: DType,
    ids_dtype: DType,
    hidden: Int,
    layout: StaticString,
    reduce: StaticString,
    slots: StaticString,
    target: StaticString,
](peers: Peers, output: CombineOutput[ids_dtype], ctx: DeviceContext,) raises:
    """Receives and sums expert rows, if the tensors have the sizes that the settings ask for.

    Parameters:
        wire_dtype: Of the rows that travel.
        out_dtype: Of the sums.
        bias_dtype: Of the biases.
        ids_dtype: Of the choices.
        hidden: H.
        layout: Output layout.
        reduce: Reduce mode, "expert" or "source".
        slots: Slot policy, "rank" or "expert".
        target: Where MAX runs the op.

    Args:
        peers: The rank's side.
        output: Where to, and what is added.
        ctx: The device.

    Raises:
        ShapeError: As text in front of the message.
    """
    check_sums[layout, reduce, slots == "expert"](
        peers.s,
        output,
        hidden * size_of[Scalar[wire_dtype]](),
        hidden * size_of[Scalar[out_dtype]](),
        hidden * size_of[Scalar[bias_dtype]](),
    )
    comptime if target == "gpu":
        check_aligned("bias0", output.bias0)
        check_aligned("bias1", output.bias1)
        comptime if slots == "expert":
            expert_slots_combine_wait.combine_wait[
                wire_dtype, out_dtype, bias_dtype, ids_dtype, hidden
            ](peers, output, STAGE_COMBINE_WAIT, ctx)
        else:
            if uses_cells(ctx, peers.s.rows_in_cells):
                few_combine_wait[
                    wire_dtype,
                    out_dtype,
                    bias_dtype,
                    ids_dtype,
                    hidden,
                    layout,
                    reduce,
                ](peers, output, STAGE_COMBINE_WAIT, ctx)
            else:
                gpu_combine_wait.combine_wait[
                    wire_dtype,
                    out_dtype,
                    bias_dtype,
                    ids_dtype,
                    hidden,
                    layout,
                    reduce,
                ](peers, output, STAGE_COMBINE_WAIT, ctx)
    else:
        var ep = peers.endpoint[False, may_shrink=True]()
        comptime if slots == "expert":
            expert_slots_combine.combine_wait[
                wire_dtype, out_dtype, bias_dtype, ids_dtype, hidden
            ](ep, output, STAGE_COMBINE_WAIT)
        else:
            combine_wait[
                wire_dtype,
                out_dtype,
                bias_dtype,
                ids_dtype,
                hidden,
                layout,
                reduce,
            ](ep, output, STAGE_COMBINE_WAIT)
