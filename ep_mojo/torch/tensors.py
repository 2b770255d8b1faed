"""Tensors for rounds: what a dispatch writes, and how tensors become MAX buffers: the same memory, by DLPack."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.dlpack import to_dlpack

from ..config import EPConfig
from ..errors import UnsupportedError
from ..handle import HANDLE_TENSORS, handle_shapes

if TYPE_CHECKING:
    from max.driver import Buffer

BITS = {torch.float8_e4m3fn: torch.uint8}
"""What graphs have in place of types that MAX does not have on the host."""
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "int32": torch.int32,
    "uint32": torch.uint32,
    "float8_e4m3fn": torch.float8_e4m3fn,
}
"""Types of the tensors of a handle."""
KEPT = 256
ALIGNMENT = 16
"""Of rows, for the kernels on GPUs."""


def received_types(cfg: EPConfig, rows: int | None = None) -> list[tuple[torch.dtype, list[int]]]:
    """(dtype, shape) of the tensors of `HANDLE_TENSORS`, with `rows` rows (None: those of the config).

    Raises:
        UnsupportedError: torch has no tensors of the config's format.
    """
    return [(dtype, list(shape)) for dtype, shape in _received_types(cfg, rows)]


@functools.lru_cache(KEPT)
def _received_types(cfg: EPConfig, rows: int | None) -> list[tuple[torch.dtype, list[int]]]:
    found = handle_shapes(cfg, rows)
    if any(dtype not in DTYPES for dtype, _ in found):
        raise UnsupportedError(
            "torch has no tensors of this format",
            field="cfg.dispatch_format",
            value=cfg.dispatch_format,
            allowed="BF16 or BlockwiseFP8",
            remedy="use MAX graphs for a format of your own",
        )
    return [(DTYPES[dtype], shape) for dtype, shape in found]


def empty_received(cfg: EPConfig, device: torch.device, rows: int | None = None) -> dict[str, torch.Tensor]:
    """Tensors for a dispatch to write, by the names of `HANDLE_TENSORS`."""
    types = _received_types(cfg, rows)
    return {
        name: torch.empty(shape, dtype=dtype, device=device)
        for name, (dtype, shape) in zip(HANDLE_TENSORS, types, strict=True)
    }


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as graphs take it, itself or a copy: contiguous, on GPUs from a multiple of `ALIGNMENT` bytes on."""
    tensor = tensor.detach().contiguous()
    if tensor.is_cuda and tensor.data_ptr() % ALIGNMENT:
        tensor = tensor.clone()
    return tensor


def signed(offsets: torch.Tensor) -> torch.Tensor:
    """uint32 as int32: row offsets are below 2^31, and torch can do little with unsigned numbers."""
    return offsets.view(torch.int32)


def to_buffers(tensors: Sequence[Any], device: torch.device) -> list[Buffer]:
    """Contiguous tensors as MAX buffers over the same memory; `device`: where all of them are."""
    if device.type == "cpu":
        return list(map(_to_buffer, tensors))
    if torch.cuda.current_device() == device.index:
        return list(map(_to_buffer, tensors))
    with torch.cuda.device(device):
        return list(map(_to_buffer, tensors))


def _to_buffer(tensor: torch.Tensor) -> Buffer:
    from max.driver import Buffer

    return Buffer.from_dlpack(_Exported(tensor.detach()))


class _Exported:
    """A tensor for DLPack, without what `torch.Tensor.__dlpack__` does beside: who calls orders the queues itself."""

    __slots__ = ("_tensor",)

    def __init__(self, tensor: torch.Tensor):
        self._tensor = tensor.view(BITS[tensor.dtype]) if tensor.dtype in BITS else tensor

    def __dlpack__(self, **_: Any) -> Any:
        return to_dlpack(self._tensor)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._tensor.__dlpack_device__()
