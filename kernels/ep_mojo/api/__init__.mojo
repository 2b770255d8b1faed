"""The seed-named functions: the four stages of ExpertSlots for Mojo programs, on the host and on GPUs.

Everything is a compile-time parameter; sizes of windows and the head of `atomic_counters` come from `setup.mojo`, or
from a Python communicator with slots="expert". With target "cpu" all tensors are in host memory, `context` is not
used, and a function returns when its stage is done. With target "gpu" tensors are in the memory of `context`'s
device, but for the tables of addresses, which are in host memory; stages are launched on its stream. Functions raise
where an argument is wrong; what peers cause goes on record (`check_counters`, on a copy of the counters in host
memory), and so does there what a GPU finds out by itself.
"""

from .combine import ep_combine_async_kernel_api, ep_combine_wait_kernel_api
from .combine_kernels import (
    combine_async_kernel,
    combine_async_shape,
    combine_wait_kernel,
    combine_wait_shape,
)
from .counters import EPLocalSyncCounters
from .dispatch import ep_dispatch_async_kernel_api, ep_dispatch_wait_kernel_api
from .dispatch_kernels import (
    dispatch_async_kernel,
    dispatch_async_shape,
    dispatch_wait_kernel,
    dispatch_wait_shape,
)
from .target import check_target
from .token_handler import TokenHandler
