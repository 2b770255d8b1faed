"""The ep-mojo package: expert-parallel dispatch and combine. Import from here; the ops of MAX graphs register
themselves."""

from .api import (
    EPLocalSyncCounters,
    TokenHandler,
    combine_async_kernel,
    combine_async_shape,
    combine_wait_kernel,
    combine_wait_shape,
    dispatch_async_kernel,
    dispatch_async_shape,
    dispatch_wait_kernel,
    dispatch_wait_shape,
    ep_combine_async_kernel_api,
    ep_combine_wait_kernel_api,
    ep_dispatch_async_kernel_api,
    ep_dispatch_wait_kernel_api,
)
from .formats import BF16, BlockwiseFP8, TokenFormat, spread_scales
from .peers import Bytes, View, typed
from .settings import Settings
from .layout import counters_words
from .setup import (
    check_counters,
    combine_count_bytes,
    combine_recv_bytes,
    dispatch_count_bytes,
    dispatch_recv_bytes,
    expert_slots_settings,
    init_counters,
)
from .team import HostTeam, Team, copy_bytes, zero_bytes
from . import ops
