"""One thread at a time may use a communicator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import OrderError

if TYPE_CHECKING:
    from .base import Communicator


class Exclusive:
    """`with` it, a thread has the communicator for itself. A class: a generator costs a launch a microsecond more.

    Raises:
        OrderError: Another thread has it, or it was destroyed.
    """

    __slots__ = ("_comm",)

    def __init__(self, comm: Communicator):
        self._comm = comm

    def __enter__(self) -> None:
        self._comm._live()
        if not self._comm._state.lock.acquire(blocking=False):
            raise OrderError(
                "another thread is using this communicator",
                allowed="one thread at a time",
                remedy="use a lock, or a communicator for each thread; on GPUs their runs take turns",
            )

    def __exit__(self, *exc: object) -> None:
        self._comm._state.lock.release()
