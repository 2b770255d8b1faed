"""Expert-parallel dispatch and combine for Mixture-of-Experts inference, written in Mojo for MAX.

`import ep_mojo as ep` costs next to nothing: each name below is loaded from its module when it is first used, so that
`ep_mojo.doctor` and `ep_mojo.errors` work without MAX and without NumPy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    "config": ("EPConfig",),
    "formats": ("BF16", "BlockwiseFP8", "CustomFormat", "TokenFormat"),
    "comm": ("Communicator",),
    "graph": (
        "Handle",
        "beside",
        "combine",
        "combine_async",
        "combine_wait",
        "dispatch",
        "dispatch_async",
        "dispatch_wait",
    ),
    "gather": (
        "all_gather_v",
        "all_gather_v_async",
        "all_gather_v_wait",
        "reduce_scatter_v",
        "reduce_scatter_v_async",
        "reduce_scatter_v_wait",
    ),
    "kernels": ("kernel_library",),
    "errors": (
        "CapacityError",
        "ConfigError",
        "ConfigMismatchError",
        "CorruptHeadError",
        "DTypeError",
        "DeviceError",
        "DeviceMemoryError",
        "EPError",
        "InputFileError",
        "KernelBuildError",
        "MissingDependencyError",
        "OrderError",
        "PeerLostError",
        "PeerTimeoutError",
        "ShapeError",
        "SharedMemoryError",
        "UnsupportedError",
    ),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
_SUBMODULES = ("comm", "config", "dtypes", "errors", "formats", "gather", "graph", "kernels", "layout", "reference")

__all__ = [
    "BF16",
    "BlockwiseFP8",
    "CapacityError",
    "Communicator",
    "ConfigError",
    "ConfigMismatchError",
    "CorruptHeadError",
    "CustomFormat",
    "DTypeError",
    "DeviceError",
    "DeviceMemoryError",
    "EPConfig",
    "EPError",
    "Handle",
    "InputFileError",
    "KernelBuildError",
    "MissingDependencyError",
    "OrderError",
    "PeerLostError",
    "PeerTimeoutError",
    "ShapeError",
    "SharedMemoryError",
    "TokenFormat",
    "UnsupportedError",
    "__version__",
    "beside",
    "combine",
    "combine_async",
    "combine_wait",
    "dispatch",
    "dispatch_async",
    "dispatch_wait",
    "kernel_library",
    "all_gather_v",
    "all_gather_v_async",
    "all_gather_v_wait",
    "reduce_scatter_v",
    "reduce_scatter_v_async",
    "reduce_scatter_v_wait",
]

if TYPE_CHECKING:
    from .comm import Communicator
    from .config import EPConfig
    from .errors import (
        CapacityError,
        ConfigError,
        ConfigMismatchError,
        CorruptHeadError,
        DeviceError,
        DeviceMemoryError,
        DTypeError,
        EPError,
        InputFileError,
        KernelBuildError,
        MissingDependencyError,
        OrderError,
        PeerLostError,
        PeerTimeoutError,
        ShapeError,
        SharedMemoryError,
        UnsupportedError,
    )
    from .formats import BF16, BlockwiseFP8, CustomFormat, TokenFormat
    from .gather import (
        all_gather_v,
        all_gather_v_async,
        all_gather_v_wait,
        reduce_scatter_v,
        reduce_scatter_v_async,
        reduce_scatter_v_wait,
    )
    from .graph import Handle, beside, combine, combine_async, combine_wait, dispatch, dispatch_async, dispatch_wait
    from .kernels import kernel_library


def __getattr__(name: str) -> Any:
    """Load a public name, or a submodule, on first use."""
    if name in _SUBMODULES:
        return _load(name)
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(_load(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def _load(module: str) -> Any:
    try:
        return importlib.import_module(f"{__name__}.{module}")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("max", "numpy"):
            raise
        from .errors import MissingDependencyError

        raise MissingDependencyError(
            f"ep_mojo.{module} needs the package {missing!r}, which is not installed here",
            remedy="pip install . in the checkout brings it; `python -m ep_mojo.doctor` shows what is missing",
        ) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF, *_SUBMODULES})
