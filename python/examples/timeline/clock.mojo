"""Two ops of one thread that store the device's clock: how far a queue had come, and when.

An op stores the time at which all that its queue held before it was done. It has the highest launch priority, so that
it does not stand behind what other queues still have to start. Clocks of different GPUs are not compared.
"""

import extensibility
from extensibility import InputTensor, OutputTensor, _MutableInputTensor
from max.gpu.host import DeviceContext
from max.gpu.host.launch_attribute import (
    LaunchAttribute,
    LaunchAttributeID,
    LaunchAttributeValue,
)
from std.time import global_perf_counter_ns


def store_time(address: Int64):
    """The kernel.

    Args:
        address: Where to, an Int64 in device memory.
    """
    var to = Pointer[Int64, MutUntrackedOrigin](
        unsafe_from_address=Int(address)
    )
    to[] = Int64(global_perf_counter_ns())


def note_time(address: Int, ctx: DeviceContext) raises:
    """Launch it.

    Args:
        address: Where to, an Int64 in device memory.
        ctx: The device.

    Raises:
        What the driver raises.
    """
    var first = List[LaunchAttribute]()
    if ctx.api() == "cuda":
        var value = LaunchAttributeValue()  # an int32 at its beginning
        var priority = ctx.stream_priority_range().greatest
        for i in range(4):
            value._storage[i] = UInt8((priority >> (8 * i)) & 0xFF)
        first.append(LaunchAttribute(LaunchAttributeID.PRIORITY, value))
    ctx.enqueue_function[store_time](
        Int64(address), grid_dim=1, block_dim=1, attributes=first^
    )


@extensibility.register("timeline_mark")
struct TimelineMark:
    """Stores the time, in the order of the ops that share `order`."""

    @staticmethod
    def execute[
        index: Int
    ](
        order: _MutableInputTensor[dtype=DType.int32, rank=1, ...],
        times: _MutableInputTensor[dtype=DType.int64, rank=1, ...],
        after: InputTensor[...],
        ctx: DeviceContext,
    ) raises:
        """Stores the time, in the order of the ops that share `order`.

        Parameters:
            index: Which word of `times`.

        Args:
            order: The communicator's.
            times: Nanoseconds.
            after: A tensor that is to be there first.
            ctx: The device.

        Raises:
            What the driver raises.
        """
        note_time(Int(times.unsafe_ptr()) + 8 * index, ctx)


@extensibility.register("timeline_now")
struct TimelineNow:
    """Stores the time at which a tensor is there."""

    @staticmethod
    def execute(
        time: OutputTensor[dtype=DType.int64, rank=1, ...],
        after: InputTensor[...],
        ctx: DeviceContext,
    ) raises:
        """Stores the time at which a tensor is there.

        Args:
            time: Nanoseconds [1].
            after: The tensor.
            ctx: The device.

        Raises:
            What the driver raises.
        """
        note_time(Int(time.unsafe_ptr()), ctx)
