"""Ops of combine that get everything by address, the sums too; `call.mojo` has the block. For programs that own the
memory, as PyTorch's do. What dispatch left beside rows and scales comes in one block of its own (`handle_memory.mojo`).

Tensors, in order:

    y [T, H] | rows | the rest of the handle | topk_ids [T, K] | weights [T, K], with reduce "source" |
    bfloat16 biases [T, H] or absent | the same | num_tokens [1] or absent: T
"""

import extensibility
from extensibility import InputTensor, _MutableInputTensor
from max.gpu.host import DeviceContext
from std.sys import size_of

from ..combine_tensors import CombineInput, CombineOutput
from ..handle_memory import packed_input
from ..peers import View
from ..settings import Settings
from .call import Call
from .checks import check_aligned, require_at_most
from .exchange import exchange_sums, send_rows
from .receive import receive_sums

comptime N_TENSORS = 8
"""Tensors of a call."""
comptime BIAS = DType.bfloat16
"""Element type of biases."""


def _input[
    layout: StaticString
](call: Call, s: Settings) raises -> CombineInput:
    """What is sent back."""
    var memory = call.tensor[DType.int32](2)
    var absent = View[DType.uint8]()
    var packed = packed_input[layout](s, call.raw(1), memory, absent)
    require_at_most("memory: words needed", packed[1], memory.size)
    return packed[0]


def _output[
    hidden: Int, out_dtype: DType, ids_dtype: DType
](call: Call) -> CombineOutput[ids_dtype]:
    """What is added up, and where it goes."""
    var y = call.raw(0)
    return CombineOutput[ids_dtype](
        y,
        y.size // (hidden * size_of[Scalar[out_dtype]]()),
        call.tensor[ids_dtype](3),
        call.tensor[DType.float32](4),
        call.tensor[DType.int32](7),
        call.raw(5),
        call.raw(6),
        View[DType.uint8](),
    )


@extensibility.register("ep_mojo_combine_from")
struct CombineFrom:
    """Sends expert rows of the caller back; returns when all have left."""

    @staticmethod
    def execute[
        hidden: Int,
        layout: StaticString,
        reduce: StaticString,
        wire: DType,
        target: StaticString,
    ](
        order: _MutableInputTensor[dtype=DType.int32, rank=1, ...],
        call: InputTensor[dtype=DType.int64, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        """Sends expert rows of the caller back; returns when all have left.

        Parameters:
            hidden: H.
            layout: Output layout.
            reduce: Reduce mode, "expert" or "source".
            wire: Element type of rows.
            target: Where MAX runs the op.

        Args:
            order: Shared by all ops of a graph.
            call: Int64, host: `call.mojo`.
            ctx: The device.

        Raises:
            CorruptHeadError, ConfigMismatchError, ShapeError: As text in front of the message.
        """
        var given = Call(call, N_TENSORS)
        var peers = given.peers[target]()
        send_rows[wire, hidden, layout, reduce, "rank", target](
            peers, _input[layout](given, peers.s), ctx
        )


@extensibility.register("ep_mojo_combine_wait_into")
struct CombineWaitInto:
    """Receives and sums expert rows into a tensor of the caller."""

    @staticmethod
    def execute[
        hidden: Int,
        layout: StaticString,
        reduce: StaticString,
        wire: DType,
        sums: DType,
        ids: DType,
        target: StaticString,
    ](
        order: _MutableInputTensor[dtype=DType.int32, rank=1, ...],
        call: InputTensor[dtype=DType.int64, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        """Receives and sums expert rows into a tensor of the caller.

        Parameters:
            hidden: H.
            layout: Output layout.
            reduce: Reduce mode, "expert" or "source".
            wire: Element type of rows.
            sums: Element type of y.
            ids: Element type of topk_ids.
            target: Where MAX runs the op.

        Args:
            order: Shared by all ops of a graph.
            call: Int64, host: `call.mojo`.
            ctx: The device.

        Raises:
            CorruptHeadError, ConfigMismatchError, ShapeError: As text in front of the message.
        """
        var given = Call(call, N_TENSORS)
        var peers = given.peers[target]()
        comptime if target == "gpu":
            check_aligned("y", given.raw(0))
        receive_sums[
            wire, sums, BIAS, ids, hidden, layout, reduce, "rank", target
        ](peers, _output[hidden, sums, ids](given), ctx)


@extensibility.register("ep_mojo_combine_into")
struct CombineInto:
    """Sends back, receives and sums expert rows in one launch, into a tensor of the caller."""

    @staticmethod
    def execute[
        hidden: Int,
        layout: StaticString,
        reduce: StaticString,
        wire: DType,
        sums: DType,
        ids: DType,
        target: StaticString,
    ](
        order: _MutableInputTensor[dtype=DType.int32, rank=1, ...],
        call: InputTensor[dtype=DType.int64, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        """Sends back, receives and sums expert rows in one launch, into a tensor of the caller.

        Parameters:
            hidden: H.
            layout: Output layout.
            reduce: Reduce mode, "expert" or "source".
            wire: Element type of rows.
            sums: Element type of y.
            ids: Element type of topk_ids.
            target: Where MAX runs the op.

        Args:
            order: Shared by all ops of a graph.
            call: Int64, host: `call.mojo`.
            ctx: The device.

        Raises:
            CorruptHeadError, ConfigMismatchError, ShapeError, OrderError: As text in front of the message.
        """
        var given = Call(call, N_TENSORS)
        var peers = given.peers[target]()
        exchange_sums[
            wire, sums, BIAS, ids, hidden, layout, reduce, "rank", target
        ](
            peers,
            _input[layout](given, peers.s),
            _output[hidden, sums, ids](given),
            ctx,
        )
