"""What a compiled graph takes, checked by name before anything runs: element types, shapes, devices.

A symbolic dimension must have one value wherever it occurs. The communicator's own inputs are not among these.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np

from ..dtypes import as_bits, storage_dtype, to_buffer
from ..errors import ConfigError, DeviceError, DTypeError, ShapeError


@dataclass(frozen=True)
class InputSpec:
    """Type of one graph input.

    Attributes:
        dtype: MAX element type, for example "bfloat16".
        dims: Sizes: a number, a symbol's name, or None for any size.
        place: Where it is: "host", or "gpu:0".
    """

    dtype: str
    dims: tuple[int | str | None, ...]
    place: str = "host"

    @functools.cached_property
    def storage(self) -> np.dtype:
        """NumPy type of the elements' bits."""
        return storage_dtype(self.dtype)

    def fits(self, other: InputSpec) -> bool:
        """Whether a tensor of the spec `other` can be given for this one, whose named and open sizes may be any."""
        same = (self.dtype, self.place, len(self.dims)) == (other.dtype, other.place, len(other.dims))
        return same and all(d == o for d, o in zip(self.dims, other.dims, strict=True) if isinstance(d, int))

    def __str__(self) -> str:
        where = "" if self.place == "host" else f" on {self.place}"
        return f"{self.dtype} [{', '.join('?' if d is None else str(d) for d in self.dims)}]{where}"


def place(device: Any) -> str:
    """The name of a `Device` or `DeviceRef`: "host", or "gpu:0"."""
    kind = getattr(device, "label", None) or getattr(device.device_type, "value", str(device.device_type))
    return "host" if kind == "cpu" else f"{kind}:{device.id}"


def graph_specs(graph: Any) -> list[InputSpec]:
    """Specs of all inputs of a `max.graph.Graph`."""
    return [
        InputSpec(value.type.dtype.name, tuple(map(_dim, value.type.shape)), place(value.type.device))
        for value in graph.inputs
    ]


def model_specs(model: Any) -> list[InputSpec]:
    """Specs of all inputs of a loaded `max.engine.Model` of the host; its symbols have no names."""
    return [InputSpec(spec.dtype.name, tuple(spec.shape or ())) for spec in model.input_metadata]


def _dim(dim: Any) -> int | str | None:
    try:
        return int(dim)
    except TypeError:
        return getattr(dim, "name", None)


def check_args(specs: Sequence[InputSpec], args: Sequence[Any], labels: Sequence[str]) -> list[Any]:
    """`args` as contiguous bit-pattern arrays (or MAX buffers as they came), if they fit `specs`.

    Args:
        specs: One for each argument.
        args: NumPy arrays (bfloat16 as uint16 bits, float8 as uint8 bits, or ml_dtypes), of any byte order, or host MAX
            buffers.
        labels: What to call each argument in an error.

    Raises:
        ShapeError: Wrong number of arguments, wrong rank or size, or one symbol with two sizes.
        DTypeError: Wrong element type, or not an array.
        DeviceError: A buffer that is not in host memory.
    """
    if len(args) != len(specs):
        raise ShapeError(
            "wrong number of arguments",
            field="len(args)",
            value=len(args),
            allowed=f"{len(specs)}: {', '.join(map(str, specs))}",
            remedy="pass the graph's own inputs in order, kind by kind over all ranks; comm.inputs() is added for you",
        )
    symbols: dict[str, tuple[int, str]] = {}
    return [_check_one(*each, symbols) for each in zip(specs, args, labels, strict=True)]


def _check_one(spec: InputSpec, arg: Any, label: str, symbols: dict[str, tuple[int, str]]) -> Any:
    if isinstance(arg, np.ndarray):
        if not arg.dtype.isnative:
            arg = arg.astype(arg.dtype.newbyteorder("="))
        # Plain bit patterns say nothing but their width; a type of ml_dtypes must be the graph's own.
        fits = arg.dtype == spec.storage or arg.dtype.name == spec.dtype
        value = np.ascontiguousarray(as_bits(arg)).reshape(arg.shape) if fits else None
    elif hasattr(arg, "_data_ptr") and hasattr(arg, "device"):
        fits, value = arg.dtype.name == spec.dtype, arg
        if place(arg.device) != spec.place:
            raise DeviceError(
                field=label,
                value=place(arg.device),
                allowed=spec.place,
                remedy="move it: x.to(CPU())" if spec.place == "host" else "move it, or pass a NumPy array",
            )
        if not arg.is_contiguous:
            raise ShapeError(field=label, value="strided", allowed="contiguous", remedy="pass x.contiguous()")
    else:
        raise DTypeError.wrong_kind(
            label, arg, allowed="a NumPy array or a max.driver.Buffer", remedy="convert it with numpy.asarray"
        )
    if not fits:
        storage = spec.storage.name
        bits_too = "" if storage == spec.dtype else f" (in NumPy: {storage} bit patterns, or ml_dtypes.{spec.dtype})"
        raise DTypeError(field=label, value=arg.dtype.name, allowed=spec.dtype + bits_too, remedy="convert it first")
    shape = tuple(int(n) for n in arg.shape)
    if len(shape) != len(spec.dims):
        raise ShapeError(field=label, value=list(shape), allowed=str(spec), remedy="reshape it")
    for axis, (size, dim) in enumerate(zip(shape, spec.dims, strict=True)):
        if isinstance(dim, str):
            expected, first = symbols.setdefault(dim, (size, label))
            why = f" ({dim} = {expected} by {first})"
        else:
            expected, why = size if dim is None else dim, ""
        if size != expected:
            raise ShapeError(
                f"axis {axis} has {size} elements, not {expected}{why}",
                field=label,
                value=list(shape),
                allowed=str(spec),
                remedy="pass arrays of matching shapes",
            )
    return value


def chosen_ranks(ranks: Any, n_ranks: int) -> list[int]:
    """The argument `ranks` of a call, sorted and each once; None means all.

    Raises:
        ConfigError: Not an iterable of ranks.
    """
    if ranks is None:
        return list(range(n_ranks))
    given = list(ranks) if isinstance(ranks, Iterable) else None
    if given is None or any(isinstance(r, bool) or not isinstance(r, Integral) or not 0 <= r < n_ranks for r in given):
        raise ConfigError(
            field="ranks",
            value=ranks if given is None else given,
            allowed=f"a list of integers, 0 to {n_ranks - 1}",
            remedy="name existing ranks, or leave it out for all",
        )
    return sorted({int(r) for r in given})


def make_buffers(specs: Sequence[InputSpec], values: Sequence[Any]) -> list[Any]:
    """MAX buffers of what `check_args` returned."""
    return [_buffer(s, v) if isinstance(v, np.ndarray) else v for s, v in zip(specs, values, strict=True)]


def _buffer(spec: InputSpec, value: np.ndarray) -> Any:
    buffer = to_buffer(value, spec.dtype)
    if spec.place == "host":
        return buffer
    from max.driver import Accelerator

    return buffer.to(Accelerator(int(spec.place.partition(":")[2])))
