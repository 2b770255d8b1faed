"""The op that `ep_mojo.beside` puts in front of work on a device's second queue."""

import extensibility
from extensibility import InputTensor, _MutableInputTensor
from max.gpu.host import DeviceContext

from ..gpu.precedence import head_start


@extensibility.register("ep_mojo_head_start")
struct HeadStart:
    """Passes some time on its queue, so that launches on others come first."""

    @staticmethod
    def execute[
        microseconds: Int, target: StaticString
    ](
        scratch: _MutableInputTensor[dtype=DType.int32, rank=1, ...],
        after: InputTensor[...],
        ctx: DeviceContext,
    ) raises:
        """Passes some time on its queue, so that launches on others come first.

        Parameters:
            microseconds: How long.
            target: Where MAX runs the op.

        Args:
            scratch: Any buffer: MAX keeps an op that has no result only if it may write one.
            after: What the work takes, so that this comes when the work may begin.
            ctx: The device.

        Raises:
            What the driver raises.
        """
        comptime assert target == "gpu", "ep_mojo: only GPUs have other queues"
        head_start(1000 * microseconds, ctx)
