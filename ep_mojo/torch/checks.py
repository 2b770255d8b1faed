"""What tensors a call takes, checked by name before anything is sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import DeviceError, DTypeError, ShapeError


def check_tensor(
    name: str, value: Any, dtypes: Sequence[torch.dtype], shape: Sequence[int | None], device: torch.device
) -> torch.Tensor:
    """`value`, if it is a tensor of one of these dtypes, this shape (None: any size) and on this device.

    Raises:
        DTypeError, ShapeError, DeviceError: It is not.
    """
    if not isinstance(value, torch.Tensor):
        raise DTypeError.wrong_kind(name, value, allowed="a torch.Tensor", remedy=f"pass {name} as one")
    if value.dtype not in dtypes:
        allowed = " or ".join(str(d) for d in dtypes)
        raise DTypeError(field=name, value=str(value.dtype), allowed=allowed, remedy=f"convert {name} first")
    sizes = value.shape
    fits = len(sizes) == len(shape)
    for got, want in zip(sizes, shape, strict=False):
        fits = fits and (want is None or want == got)
    if not fits:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ShapeError(field=name, value=list(sizes), allowed=f"[{wanted}]", remedy=f"reshape {name}")
    place = value.device
    if place != device and (place.type != device.type or device.index is not None):
        raise DeviceError(
            field=name,
            value=str(value.device),
            allowed=str(device),
            remedy=f"move it there: {name}.to({str(device)!r})",
        )
    if value.layout != torch.strided:
        raise DTypeError(field=name, value=str(value.layout), allowed="a dense tensor", remedy=f"use {name}.to_dense()")
    if value.data_ptr() == 0 and value.numel():
        raise DTypeError(
            "the tensor has no memory of its own",
            field=name,
            value=type(value).__name__,
            allowed="a tensor with memory on this device",
            remedy="pass the tensor that it wraps",
        )
    return value


def check_writable(name: str, tensor: torch.Tensor) -> None:
    """Raise `ShapeError` where elements of a tensor share memory, `DTypeError` where torch refuses to write it here."""
    if any(n > 1 and stride == 0 for n, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ShapeError(
            field=name,
            value="expanded",
            allowed="a tensor with memory for each element",
            remedy="pass one of its own: it is written",
        )
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise DTypeError(
            "a tensor of inference mode cannot be written outside of it",
            field=name,
            value="an inference tensor",
            allowed="an ordinary tensor",
            remedy="make it outside of torch.inference_mode",
        )
