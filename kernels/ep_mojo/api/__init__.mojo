"""The seed-named host functions: the four stages of ExpertSlots, for Mojo programs.

Everything is a compile-time parameter; sizes of windows and the head of `atomic_counters` come from `setup.mojo`, or from a
Python communicator with slots="expert". `context` names the device and is not used on the host. Stages raise where an
argument is wrong; what peers cause goes on record (`check_counters`).
"""

from .combine import ep_combine_async_kernel_api, ep_combine_wait_kernel_api
from .dispatch import (
    TokenHandler,
    ep_dispatch_async_kernel_api,
    ep_dispatch_wait_kernel_api,
)
from .target import check_target
