"""PyTorch front end: a `Buffer` that programs written for DeepEP can use, and a smaller interface of the package's own.

    import ep_mojo.torch as deep_ep            # in place of: import deep_ep

One process is one rank, in a `torch.distributed` group. The ops are the package's MAX custom ops; tensors pass to MAX
and back without a copy. docs/torch.md says who owns what, and what each call maps to. Torch is imported here and
nowhere else in the package, so `import ep_mojo` works without it.
"""

from __future__ import annotations

from ..errors import MissingDependencyError

try:
    import torch
except ImportError as error:
    raise MissingDependencyError(
        "ep_mojo.torch needs PyTorch",
        field="torch",
        value="not installed",
        allowed="2.6 or newer",
        remedy="pip install torch, or '.[torch]' in the checkout",
    ) from error

from . import autograd, utils
from .api import Handle, combine, dispatch
from .buffer import Buffer
from .dispatcher_base import AllGatherDispatcherBase
from .dispatchers import AllGatherDispatcher, AllGatherVDispatcher
from .sizes import Config
from .streams import EventHandle, EventOverlap

topk_idx_t = torch.int64
"""Element type of `topk_idx`."""

__all__ = [
    "AllGatherDispatcher",
    "AllGatherDispatcherBase",
    "AllGatherVDispatcher",
    "Buffer",
    "Config",
    "EventHandle",
    "EventOverlap",
    "Handle",
    "autograd",
    "combine",
    "dispatch",
    "topk_idx_t",
    "utils",
]
