"""Queues and events: when a call's work begins, and what its caller may rely on when it returns.

`Queue` is what a `Buffer` asks of a device. On the host a call returns when its work is done, so an event is done when
it is made, and waiting for it is nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from ..errors import ConfigError, DTypeError, OrderError, UnsupportedError


class EventHandle:
    """A point in the current queue of this process: all work given to it before."""

    def current_stream_wait(self) -> None:
        """Let the current queue wait for that point. On the host it has been reached already."""


class EventOverlap:
    """An event, and tensors that have to live until it has been waited for.

    Use it in a `with` statement to put other work between the call and the wait: the wait comes at the end.

    Args:
        event: An `EventHandle`, or None: there is nothing to wait for.
        extra_tensors: Kept alive as long as this object.

    Raises:
        DTypeError: `event` is something else.
    """

    def __init__(self, event: EventHandle | None = None, extra_tensors: Sequence[Any] | None = None):
        if event is not None and not isinstance(event, EventHandle):
            raise DTypeError(
                field="event",
                value=type(event).__name__,
                allowed="an EventHandle or None",
                remedy="use Buffer.capture()",
            )
        self.event = event
        self.extra_tensors = None if extra_tensors is None else tuple(extra_tensors)

    def current_stream_wait(self) -> None:
        """Let the current queue wait for the event.

        Raises:
            OrderError: There is no event: the call was made without async_finish.
        """
        if self.event is None:
            raise OrderError(
                "there is no event to wait for",
                field="event",
                value=None,
                allowed="an event of a call with async_finish=True, or of Buffer.capture()",
                remedy="leave the wait out: without async_finish the current queue waits already",
            )
        self.event.current_stream_wait()

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.event is not None:
            self.current_stream_wait()


class Queue:
    """Where a rank's rounds run. This one is the host's: a round is done when its call returns.

    Attributes:
        device: The device of all tensors.
    """

    def __init__(self, device: torch.device):
        self.device = device

    @property
    def stream(self) -> Any:
        """The queue as torch knows it."""
        return torch.cpu.current_stream()

    @contextmanager
    def working(self, previous_event: EventOverlap | None, allocate_here: bool) -> Iterator[None]:
        """Around the work of one call: it begins after `previous_event`, or after all that the caller has queued.

        Args:
            previous_event: What to wait for; None: the caller's current queue.
            allocate_here: Whether outputs belong to this queue, and not to the caller's.
        """
        if previous_event is not None and previous_event.event is not None:
            previous_event.event.current_stream_wait()
        yield

    def finish(self, async_finish: bool, tensors: Sequence[Any] = ()) -> EventOverlap:
        """End a call: let the caller's queue wait for the work, or give an event to wait for instead.

        Args:
            async_finish: Give an event, and keep `tensors` until it is gone.
            tensors: What the work reads and writes.
        """
        return EventOverlap(EventHandle(), tensors) if async_finish else EventOverlap()


def device_of(group: dist.ProcessGroup) -> torch.device:
    """Where the tensors of a group's ranks are.

    Raises:
        UnsupportedError: The group has another backend than gloo.
    """
    backend = dist.get_backend(group)
    if backend != "gloo":
        raise UnsupportedError(
            "tensors are in host memory",
            field="group",
            value=f"backend {backend}",
            allowed="backend gloo",
            remedy='init_process_group("gloo"), or new_group(backend="gloo")',
        )
    return torch.device("cpu")


def queue_for(device: torch.device) -> Queue:
    """The queue of a device."""
    return Queue(device)


def check_events(previous_event: Any, async_finish: bool, allocate_on_comm_stream: bool) -> None:
    """Raise unless these three go together.

    Raises:
        DTypeError: `previous_event` is no `EventOverlap`.
        ConfigError: Outputs of the communication queue without an event on both sides.
    """
    if previous_event is not None and not isinstance(previous_event, EventOverlap):
        raise DTypeError(
            field="previous_event",
            value=type(previous_event).__name__,
            allowed="an EventOverlap or None",
            remedy="use Buffer.capture(), or the event of an earlier call",
        )
    if allocate_on_comm_stream and (previous_event is None or not async_finish):
        raise ConfigError(
            "outputs cannot belong to the communication queue when the caller's queue is waited for",
            field="allocate_on_comm_stream",
            value=True,
            allowed="with previous_event and async_finish=True",
            remedy="pass both, or leave it out",
        )
