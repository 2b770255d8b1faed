"""Custom ops of `gpu_stress.py`: rounds whose inputs are made on the device, and whose results are checked there."""

import extensibility
from extensibility import (
    InputTensor,
    ManagedTensorSlice,
    OutputTensor,
    _MutableInputTensor,
)
from max.gpu.host import DeviceContext
from std.sys import size_of

from .experts import Experts
from .gathered import Gathered
from .jobs import launch
from .law import Words
from .rows import Rows
from .work import Advance, Array1, Delay, Fault, Fill, Sums


@always_inline
def words(t: ManagedTensorSlice) -> Words:
    """A tensor of int64.

    Args:
        t: The tensor.

    Returns:
        Its first word.
    """
    return Words(unsafe_from_address=Int(t.unsafe_ptr()))


@always_inline
def array[dtype: DType](t: ManagedTensorSlice) -> Array1[dtype]:
    """A tensor's memory as elements of a type.

    Parameters:
        dtype: The type.

    Args:
        t: The tensor.

    Returns:
        The elements.
    """
    comptime size = size_of[Scalar[t.dtype]]()
    return Array1[dtype](
        Int(t.unsafe_ptr()), t.size() * size // size_of[Scalar[dtype]]()
    )


@extensibility.register("ep_stress_fill")
struct FillOp:
    """Makes the inputs of the next round, and goes on to the one after."""

    @staticmethod
    def execute[
        target: StaticString
    ](
        x: OutputTensor[dtype=DType.bfloat16, rank=2, ...],
        ids: OutputTensor[dtype=DType.int32, rank=2, ...],
        weights: OutputTensor[dtype=DType.float32, rank=2, ...],
        num_tokens: OutputTensor[dtype=DType.int32, rank=1, ...],
        info: OutputTensor[dtype=DType.int64, rank=1, ...],
        law: _MutableInputTensor[dtype=DType.int64, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        """Makes the inputs of the next round, and goes on to the one after.

        Parameters:
            target: Where MAX runs the op.

        Args:
            x: Tokens [Tmax, H].
            ids: Choices [Tmax, K].
            weights: Weights [Tmax, K].
            num_tokens: T [1].
            info: The law of this round.
            law: The rank's law.
            ctx: The device.

        Raises:
            What the driver raises.
        """
        var job = Fill(
            words(law),
            words(info),
            array[DType.uint16](x),
            array[DType.int32](ids),
            array[DType.float32](weights),
            array[DType.int32](num_tokens),
        )
        launch[Fill, target](job, ctx)
        launch[Advance, target](Advance(words(law)), ctx, 1)


@extensibility.register("ep_stress_delay")
struct DelayOp:
    """Stops the rank for a while."""

    @staticmethod
    def execute[
        stage: Int, target: StaticString
    ](
        order: _MutableInputTensor[dtype=DType.int32, rank=1, ...],
        info: InputTensor[dtype=DType.int64, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        """Stops the rank for a while.

        Parameters:
            stage: Which place of the round.
            target: Where MAX runs the op.

        Args:
            order: Shared by all ops of a graph.
            info: The round.
            ctx: The device.

        Raises:
            What the driver raises.
        """
        launch[Delay, target](Delay(words(info), stage), ctx, 1)


@extensibility.register("ep_stress_fault")
struct FaultOp:
    """Spoils a byte of a tensor, if the findings ask for it."""

    @staticmethod
    def execute[
        place: Int, target: StaticString
    ](
        order: _MutableInputTensor[dtype=DType.int32, rank=1, ...],
        findings: _MutableInputTensor[dtype=DType.int64, rank=1, ...],
        info: InputTensor[dtype=DType.int64, rank=1, ...],
        victim: InputTensor[...],
        ctx: DeviceContext,
    ) raises:
        """Spoils a byte of a tensor, if the findings ask for it.

        Parameters:
            place: Which place of the round.
            target: Where MAX runs the op.

        Args:
            order: Shared by all ops of a graph.
            findings: With the wish.
            info: The round.
            victim: The tensor.
            ctx: The device.

        Raises:
            What the driver raises.
        """
        var job = Fault(
            words(info), words(findings), array[DType.uint8](victim), place
        )
        launch[Fault, target](job, ctx, 1)


@extensibility.register("ep_stress_experts")
struct ExpertsOp:
    """Checks a dispatch, and multiplies its rows by their experts' numbers."""

    @staticmethod
    def execute[
        fp8: Bool, target: StaticString
    ](
        y: OutputTensor[dtype=DType.bfloat16, ...],
        order: _MutableInputTensor[dtype=DType.int32, rank=1, ...],
        findings: _MutableInputTensor[dtype=DType.int64, rank=1, ...],
        info: InputTensor[dtype=DType.int64, rank=1, ...],
        tokens: InputTensor[...],
        scales: InputTensor[dtype=DType.float32, rank=2, ...],
        row_offsets: InputTensor[dtype=DType.uint32, rank=1, ...],
        counts: InputTensor[dtype=DType.int32, rank=1, ...],
        expert_ids: InputTensor[dtype=DType.int32, rank=1, ...],
        src_info: InputTensor[dtype=DType.int32, rank=2, ...],
        recv_weights: InputTensor[dtype=DType.float32, rank=3, ...],
        row_map: InputTensor[dtype=DType.int32, rank=3, ...],
        recv_num_tokens: InputTensor[dtype=DType.int32, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        """Checks a dispatch, and multiplies its rows by their experts' numbers.

        Parameters:
            fp8: Whether rows are fp8 with scales.
            target: Where MAX runs the op.

        Args:
            y: Rows for combine; NaN where dispatch gave none.
            order: Shared by all ops of a graph.
            findings: What was found.
            info: The round.
            tokens: From the handle.
            scales: From the handle.
            row_offsets: From the handle.
            counts: From the handle.
            expert_ids: From the handle.
            src_info: From the handle.
            recv_weights: From the handle.
            row_map: From the handle.
            recv_num_tokens: From the handle.
            ctx: The device.

        Raises:
            What the driver raises.
        """
        var rows = Rows[fp8](
            words(findings),
            array[DType.uint8](tokens),
            array[DType.float32](scales),
            array[DType.uint16](y),
        )
        var job = Experts[fp8](
            words(info),
            words(findings),
            rows,
            array[DType.uint32](row_offsets),
            array[DType.int32](counts),
            array[DType.int32](expert_ids),
            array[DType.int32](src_info),
            array[DType.float32](recv_weights),
            array[DType.int32](row_map),
            array[DType.int32](recv_num_tokens),
        )
        launch[Experts[fp8], target](job, ctx)


@extensibility.register("ep_stress_gathered")
struct GatheredOp:
    """Checks an all-gather-v, and multiplies its rows by the rank's numbers."""

    @staticmethod
    def execute[
        fp8: Bool, target: StaticString
    ](
        y: OutputTensor[dtype=DType.bfloat16, ...],
        order: _MutableInputTensor[dtype=DType.int32, rank=1, ...],
        findings: _MutableInputTensor[dtype=DType.int64, rank=1, ...],
        info: InputTensor[dtype=DType.int64, rank=1, ...],
        tokens: InputTensor[...],
        scales: InputTensor[dtype=DType.float32, rank=2, ...],
        row_offsets: InputTensor[dtype=DType.uint32, rank=1, ...],
        counts: InputTensor[dtype=DType.int32, rank=1, ...],
        src_info: InputTensor[dtype=DType.int32, rank=2, ...],
        all_ids: InputTensor[dtype=DType.int32, rank=2, ...],
        all_weights: InputTensor[dtype=DType.float32, rank=2, ...],
        recv_num_tokens: InputTensor[dtype=DType.int32, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        """Checks an all-gather-v, and multiplies its rows by the rank's numbers.

        Parameters:
            fp8: Whether rows are fp8 with scales.
            target: Where MAX runs the op.

        Args:
            y: Rows for reduce-scatter-v; NaN where the gather gave none.
            order: Shared by all ops of a graph.
            findings: What was found.
            info: The round.
            tokens: From the handle.
            scales: From the handle.
            row_offsets: From the handle.
            counts: From the handle.
            src_info: From the handle.
            all_ids: From the handle.
            all_weights: From the handle.
            recv_num_tokens: From the handle.
            ctx: The device.

        Raises:
            What the driver raises.
        """
        var rows = Rows[fp8](
            words(findings),
            array[DType.uint8](tokens),
            array[DType.float32](scales),
            array[DType.uint16](y),
        )
        var job = Gathered[fp8](
            words(info),
            words(findings),
            rows,
            array[DType.uint32](row_offsets),
            array[DType.int32](counts),
            array[DType.int32](src_info),
            array[DType.int32](all_ids),
            array[DType.float32](all_weights),
            array[DType.int32](recv_num_tokens),
        )
        launch[Gathered[fp8], target](job, ctx)


@extensibility.register("ep_stress_sums")
struct SumsOp:
    """Checks a combine."""

    @staticmethod
    def execute[
        target: StaticString
    ](
        order: _MutableInputTensor[dtype=DType.int32, rank=1, ...],
        findings: _MutableInputTensor[dtype=DType.int64, rank=1, ...],
        info: InputTensor[dtype=DType.int64, rank=1, ...],
        y: InputTensor[dtype=DType.bfloat16, rank=2, ...],
        ctx: DeviceContext,
    ) raises:
        """Checks a combine.

        Parameters:
            target: Where MAX runs the op.

        Args:
            order: Shared by all ops of a graph.
            findings: What was found.
            info: The round.
            y: The sums.
            ctx: The device.

        Raises:
            What the driver raises.
        """
        var job = Sums(words(info), words(findings), array[DType.uint16](y))
        launch[Sums, target](job, ctx)
