"""How a launch stands to kernels on the device's other queues. Why that changes no order: docs/protocol.md.

    launched     `precedence`: a launch with a budget has the highest priority
    replayed     `head_start`: the other queue begins with a kernel that does nothing for a while, since a device graph
                 starts both queues at once and, as MAX instantiates it, heeds no priorities
"""

from max.gpu.host import DeviceContext, DeviceStream
from max.gpu.host.launch_attribute import (
    LaunchAttribute,
    LaunchAttributeID,
    LaunchAttributeValue,
)

from ..patience import clock_ns
from ..peers import opaque
from ..settings import Settings


def queue(ctx: DeviceContext, s: Settings) raises -> DeviceStream:
    """Where a launch goes: to the queue that the settings name, or else to MAX's own of the device.

    Args:
        ctx: The device.
        s: The settings, with `queue`.

    Returns:
        The queue.

    Raises:
        What the driver raises.
    """
    if s.queue == 0:
        return ctx.stream()
    return ctx.create_external_stream(opaque(s.queue))


def precedence(ctx: DeviceContext, s: Settings) raises -> List[LaunchAttribute]:
    """What lets a launch with a budget go first: it leaves the other SMs to kernels that need them longer.

    A kernel that was there before may have more CTAs to come than there are SMs. Without precedence the launch would
    begin behind all of them; with it its few CTAs take the first SMs that come free.

    Args:
        ctx: The device.
        s: The settings, with the budget `n_sms`.

    Returns:
        Attributes for `enqueue_function`; none without a budget, and where there are no such attributes.

    Raises:
        What the driver raises.
    """
    if s.n_sms == 0 or ctx.api() != "cuda":
        return []
    return [priority_of(ctx.stream_priority_range().greatest)]


def priority_of(priority: Int) -> LaunchAttribute:
    """The priority of a launch, as CUDA wants it: an int32 at the beginning of the value.

    Args:
        priority: In the range of the device's streams; less comes first.

    Returns:
        The attribute.
    """
    var value = LaunchAttributeValue()
    for i in range(4):
        value._storage[i] = UInt8((priority >> (8 * i)) & 0xFF)
    return LaunchAttribute(LaunchAttributeID.PRIORITY, value)


def pass_time(ns: Int64):
    """The kernel of `head_start`, for one thread.

    Args:
        ns: Nanoseconds.
    """
    var until = clock_ns() + Int(ns)
    while clock_ns() < until:
        pass


def head_start(ns: Int, ctx: DeviceContext) raises:
    """Let the device's other queues go ahead of what this one holds next.

    Args:
        ns: How long, in nanoseconds.
        ctx: The queue that waits.

    Raises:
        What the driver raises.
    """
    ctx.enqueue_function[pass_time](Int64(ns), grid_dim=1, block_dim=1)
