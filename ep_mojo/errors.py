"""Named errors. Each says what was given, what is allowed and what to do.

Every error derives from `EPError` and, where Python has a natural counterpart, from that too, so that `except
ValueError` around a config works as expected. Errors survive pickling: they travel between the processes of
`Communicator.processes`.
"""

from __future__ import annotations

import re
from typing import Any, Self


class EPError(Exception):
    """Base of all errors of this package.

    Attributes:
        field: Name of the offending field, argument or tensor, or None.
        value: What was given, or None. Shown in the message by its repr.
        allowed: What is allowed, in words, or None.
        remedy: What to do, in words, or None.
    """

    field: str | None = None
    value: Any = None
    allowed: str | None = None
    remedy: str | None = None

    def __init__(
        self,
        message: str = "",
        *,
        field: str | None = None,
        value: Any = None,
        allowed: str | None = None,
        remedy: str | None = None,
    ):
        """Compose the text: "field = value: message. Allowed: ... Remedy: ..."; parts that are absent are left out."""
        text = message
        if field is not None:
            text = f"{field} = {_short(value)}" + (f": {message}" if message else "")
        for label, part in (("Allowed", allowed), ("Remedy", remedy)):
            if part:
                text = f"{text.rstrip('. ')}. {label}: {part}"
        super().__init__(text if not (allowed or remedy) or text.endswith(".") else text + ".")
        # Attributes that are not given stay class attributes, so that unpickling restores exactly what was set.
        for name, given in (("field", field), ("value", value), ("allowed", allowed), ("remedy", remedy)):
            if given is not None:
                setattr(self, name, given)

    @classmethod
    def wrong_kind(cls, field: str, given: Any, *, allowed: str, remedy: str) -> Self:
        """For an argument whose kind is wrong: the text has the name of that in place of the value."""
        return cls(field=field, value=type(given).__name__, allowed=allowed, remedy=remedy)


class ConfigError(EPError, ValueError):
    """A field of `EPConfig` or of a token format is out of range, or two fields contradict each other."""


class ShapeError(EPError, ValueError):
    """A tensor has a wrong shape, or a size is over a limit of the config. Pass tensors of the documented shape."""


class DTypeError(EPError, TypeError):
    """A tensor has a wrong element type, or an argument a wrong kind. Convert it first; nothing is cast silently."""


class DeviceError(EPError, RuntimeError):
    """A tensor lives on a device other than the communicator's, or there is no such device. Move it first."""


class CapacityError(EPError, RuntimeError):
    """More rows arrived than the output holds. Raise `max_rows` (None = worst case), then call `comm.reset()`.

    Attributes:
        rows: How many arrived at the rank, 0 where it is not known.
    """

    rows: int = 0


class OrderError(EPError, RuntimeError):
    """Stages were called in a wrong order, or more rounds were begun than there are buffers."""


class PeerTimeoutError(EPError, TimeoutError):
    """A peer did not signal within the deadline, or failed itself. Once it is back, call `comm.reset()`."""


class PeerLostError(EPError, ConnectionError):
    """The process of a peer is gone. Call `comm.destroy()` and make a communicator over the ranks that are left."""


class ConfigMismatchError(EPError, ValueError):
    """Two ranks, or a compiled graph and its communicator, disagree about the config. Use one config everywhere."""


class CorruptHeadError(EPError, RuntimeError):
    """The head of `atomic_counters` is not one that this version wrote. Make a new communicator."""


class SharedMemoryError(EPError, OSError):
    """Shared memory could not be reserved, or an attached segment is not what it should be. The text says how much."""


class DeviceMemoryError(EPError, MemoryError):
    """A GPU has not enough memory for the windows."""


class InputFileError(EPError, ValueError):
    """An input file is missing, truncated, not what its name says, or lacks an array."""


class KernelBuildError(EPError, RuntimeError):
    """The Mojo kernels did not compile. The text holds the compiler's output; `ep-mojo doctor` says what is missing."""


class MissingDependencyError(EPError, ImportError):
    """A package that this feature needs is not installed. The text names the pip command."""


class UnsupportedError(EPError, NotImplementedError):
    """The combination is valid in itself, and not implemented. The text names what to use instead."""


def error_class(name: str) -> type[EPError] | None:
    """The error class of this module called `name`, or None."""
    found = globals().get(name)
    return found if isinstance(found, type) and issubclass(found, EPError) else None


def error_from_text(text: str) -> EPError | None:
    """The named error inside a message such as "... ep_mojo.OrderError: what happened ...", or None.

    Kernels raise plain errors whose text begins with "ep_mojo.<ErrorName>: "; the framework may put words and traces
    around it.
    """
    for found in re.finditer(r"\bep_mojo\.([A-Za-z]+): ?", text):
        cls = error_class(found[1])
        if cls is not None:
            return cls(text[found.end() :].split("\n", 1)[0].strip())
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
