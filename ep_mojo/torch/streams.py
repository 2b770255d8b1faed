"""Queues and events: when a call's work begins, and what its caller may rely on when it returns.

`Queue` is what a `Buffer` asks of a device. On the host a call returns when its work is done, so an event is done when
it is made, and waiting for it is nothing. On a GPU rounds run in the order of the calls, on whatever queues they are.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

from ..comm.group import backends_of
from ..comm.queues import launches_elsewhere
from ..errors import ConfigError, DTypeError, OrderError, UnsupportedError

DEFAULT_STREAM = 1
"""What CUDA takes for the default stream where 0 would mean none (cudaStreamLegacy)."""


class EventHandle:
    """A point in a queue of this process: all work given to it before.

    Args:
        stream: The queue, as torch knows it; None: the current one.

    Attributes:
        event: A `torch.cuda.Event`; None where no GPU is in use: on the host that point has been reached already.
    """

    def __init__(self, stream: torch.cuda.Stream | None = None) -> None:
        self.event: torch.cuda.Event | None = None
        if torch.cuda.is_initialized():
            self.event = torch.cuda.Event()
            self.event.record(stream)

    def current_stream_wait(self) -> None:
        """Let the current queue wait for that point."""
        if self.event is not None:
            torch.cuda.current_stream().wait_event(self.event)


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
            raise DTypeError.wrong_kind("event", event, allowed="an EventHandle or None", remedy="use Buffer.capture()")
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

    def wait(self) -> None:
        """`current_stream_wait`, if there is an event."""
        if self.event is not None:
            self.event.current_stream_wait()

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(self, *exc: object) -> None:
        self.wait()


class Work:
    """The work of one call, in a `with`; then `finish`. This one's is done, or queued, where its caller is.

    Tensors made in the `with` belong to the queue of the work. On the host a call returns when its work is done.

    Args:
        before: Begin after it, and after all that the current queue was given.
        gives_event: Whether the caller wants an event to wait for.
    """

    __slots__ = ("_before", "_gives_event")

    def __init__(self, before: EventOverlap | None = None, gives_event: bool = False):
        self._before, self._gives_event = before, gives_event

    def __enter__(self) -> None:
        if self._before is not None:
            self._before.wait()

    def __exit__(self, kind: object, raised: BaseException | None, trace: object) -> None:
        pass

    def finish(self, given: Any = (), made: Any = ()) -> EventOverlap:
        """End the call: let the caller's queue wait for the work, or give an event to wait for instead.

        Args:
            given: Tensors of the caller that the work reads or writes; tuples of them, and None, too.
            made: Tensors that the work has made, and the caller gets.
        """
        return EventOverlap(EventHandle(), (given, made)) if self._gives_event else EventOverlap()


class Queue:
    """What launches of a device have in common. This one is the host's: there is nothing to order.

    Attributes:
        device: The device of all tensors.
    """

    def __init__(self, device: torch.device):
        self.device = device

    @property
    def stream(self) -> Any:
        """The communication queue, as torch knows it: that of work with an event."""
        return torch.cpu.current_stream()

    def working(self, previous_event: EventOverlap | None = None, async_finish: bool = False) -> Work:
        """The work of one call. With an event, before it or from it, the caller's queue may do other things meanwhile.

        Args:
            previous_event: Begin after it, and not after all that the caller has queued.
            async_finish: Give an event, and do not let the caller's queue wait.
        """
        return Work(previous_event, async_finish)

    def launching(self) -> AbstractContextManager[int]:
        """Around a launch: gives what the driver knows the current queue by, 0 on the host."""
        return nullcontext(0)

    def current(self) -> int:
        """What the driver knows the current queue by; 0 for the default one, and on the host."""
        return 0

    def use_here(self, made_on: int, *tensors: Any) -> None:
        """Tell the allocator that the current queue uses tensors that were made on another.

        Args:
            made_on: What `current` was then.
            tensors: The tensors; tuples of them, and None, too.
        """


class GPUQueue(Queue):
    """The launches of one GPU.

    They go to the caller's current queue, so that a call costs the host no events; work with events goes to a queue of
    its own, MAX's. Wherever they go, they run in the order of the calls: a launch waits for the one before if that was
    elsewhere.

    The memory of a tensor is given back when its last user on the host is gone, not when queues are done with it: so
    the allocator is told which other queue uses it. Then neither side has to keep anything alive for the other.
    """

    def __init__(self, device: torch.device):
        super().__init__(device)
        from max.driver import Accelerator

        self._accelerator = Accelerator(device.index)
        handle = self._accelerator.default_queue.native_stream_handle
        self._stream = torch.cuda.ExternalStream(handle, device=device)
        self._mark, self._marking = torch.cuda.Event(), threading.Lock()
        self._last: dict[bool, torch.cuda.Stream | None] = {False: self._stream, True: None}
        self._turn = threading.Lock()
        launches_elsewhere(device.index, self._rejoined)

    @property
    def stream(self) -> torch.cuda.Stream:
        """See `Queue.stream`."""
        return self._stream

    def working(self, previous_event: EventOverlap | None = None, async_finish: bool = False) -> Work:
        """See `Queue.working`."""
        if previous_event is None and not async_finish:
            return _HERE
        return _Aside(self, None if previous_event is None else previous_event.event, async_finish)

    @contextmanager
    def _rejoined(self) -> Iterator[None]:
        with torch.cuda.stream(self._stream), self.launching():
            yield

    def launching(self) -> AbstractContextManager[int]:
        """See `Queue.launching`. One thread at a time; the launch runs after all before."""
        return _Turn(self)

    def follow(self, first: torch.cuda.Stream, then: torch.cuda.Stream) -> None:
        """Let one queue wait for what another has been given."""
        with self._marking:  # who waits for the event takes what was recorded last
            self._mark.record(first)
            then.wait_event(self._mark)

    def current(self) -> int:
        """See `Queue.current`. Every call asks; `torch.cuda.current_stream` makes an object for it, in 2 to 4 us."""
        return torch._C._cuda_getCurrentRawStream(self.device.index)

    def here(self) -> tuple[int, bool]:
        """`current`, and whether what that queue gets is captured."""
        index = self.device.index
        if torch.cuda.current_device() == index:
            return self.current(), torch.cuda.is_current_stream_capturing()
        return self.current(), self.is_capturing(torch.cuda.current_stream(index))

    def is_capturing(self, stream: torch.cuda.Stream) -> bool:
        """Whether what `stream` gets is captured."""
        if torch.cuda.current_device() == self.device.index and stream == torch.cuda.current_stream():
            return torch.cuda.is_current_stream_capturing()
        with torch.cuda.stream(stream):
            return torch.cuda.is_current_stream_capturing()

    def use_here(self, made_on: int, *tensors: Any) -> None:
        """See `Queue.use_here`."""
        if made_on != self.current():
            _record(tensors, torch.cuda.current_stream(self.device.index))


_HERE = Work()


class _Turn:
    """See `GPUQueue.launching`. A class: a generator costs every launch a microsecond more."""

    __slots__ = ("_queue",)

    def __init__(self, queue: GPUQueue):
        self._queue = queue

    def __enter__(self) -> int:
        queue = self._queue
        queue._turn.acquire()
        try:
            handle, captured = queue.here()
            last = queue._last[captured]  # what is not captured is no part of a capture
            if last is None or handle != last.cuda_stream:
                here = torch.cuda.current_stream(queue.device.index)
                if last is not None and queue.is_capturing(last) == captured:
                    queue.follow(last, here)
                queue._last[captured] = here
            return handle or DEFAULT_STREAM
        except BaseException:
            queue._turn.release()
            raise

    def __exit__(self, *exc: object) -> None:
        self._queue._turn.release()


class _Aside(Work):
    """Work on MAX's queue. Without `torch.cuda.stream`: every call would wait for both of its queues."""

    __slots__ = ("_caller", "_device", "_event", "_queue")

    def __init__(self, queue: GPUQueue, before: EventHandle | None, gives_event: bool):
        super().__init__(None, gives_event)
        self._queue, self._event = queue, before

    def __enter__(self) -> None:
        queue, before = self._queue, self._event
        self._caller = torch.cuda.current_stream(queue.device.index)
        known = before is not None and before.event is not None
        if known:
            queue.stream.wait_event(before.event)
        if not known or torch.cuda.is_current_stream_capturing():  # an event from before a capture is no part of it
            queue.follow(self._caller, queue.stream)
        self._device = torch.cuda.current_device()
        torch.cuda.set_stream(queue.stream)  # and makes its device the current one

    def __exit__(self, kind: object, raised: BaseException | None, trace: object) -> None:
        queue = self._queue
        torch.cuda.set_stream(self._caller)
        if self._device != queue.device.index:
            torch.cuda.set_device(self._device)
        if raised is not None:
            queue.follow(queue.stream, self._caller)  # what was launched may still read what the caller lets go

    def finish(self, given: Any = (), made: Any = ()) -> EventOverlap:
        """See `Work.finish`."""
        queue, caller = self._queue, torch.cuda.current_stream(self._queue.device.index)
        _record(made, caller)
        if not self._gives_event:
            queue.follow(queue.stream, caller)
            return EventOverlap()
        _record(given, queue.stream)
        return EventOverlap(EventHandle(queue.stream))


def _record(values: Any, stream: torch.cuda.Stream) -> None:
    """Tell the allocator that a queue uses tensors, or tuples of them, and None."""
    if isinstance(values, torch.Tensor):
        values.record_stream(stream)
    elif isinstance(values, (tuple, list)):
        for value in values:
            _record(value, stream)


def check_group(name: str, group: Any) -> dist.ProcessGroup:
    """`group`, an argument of that name, if it is one. Raises `DTypeError` where it is not."""
    if not isinstance(group, dist.ProcessGroup):
        raise DTypeError.wrong_kind(
            name,
            group,
            allowed="a torch.distributed process group",
            remedy="call init_process_group, and pass dist.group.WORLD or what new_group returned",
        )
    return group


def device_of(group: dist.ProcessGroup) -> torch.device:
    """Where the tensors of a group's ranks are: with nccl the current GPU, with gloo alone the host.

    Raises:
        OrderError: The group was destroyed.
        UnsupportedError: The group has another backend.
    """
    by_device = backends_of(group)
    if by_device.get("cuda") == "nccl" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if by_device.get("cpu") != "gloo":
        raise UnsupportedError(
            "tensors are on GPUs with nccl, and in host memory with gloo",
            field="group",
            value=f"backend {dist.get_backend(group)}",
            allowed="backend nccl or gloo",
            remedy='init_process_group("nccl"), or "gloo" for tensors on the host',
        )
    return torch.device("cpu")


def check_not_capturing(device: torch.device, what: str, remedy: str) -> None:
    """Raise `OrderError` inside the capture of a CUDA graph, where `what` cannot be."""
    if device.type != "cuda":
        return
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            raise OrderError(f"{what} inside a capture", allowed="outside of captures", remedy=remedy)


@functools.cache
def queue_for(device: torch.device) -> Queue:
    """The queue of a device, the same for all who ask."""
    return Queue(device) if device.type == "cpu" else GPUQueue(device)


def check_events(previous_event: Any, async_finish: bool, allocate_on_comm_stream: bool) -> None:
    """Raise unless these three go together.

    Raises:
        DTypeError: `previous_event` is no `EventOverlap`.
        ConfigError: Outputs of the communication queue without an event on both sides.
    """
    if previous_event is not None and not isinstance(previous_event, EventOverlap):
        raise DTypeError.wrong_kind(
            "previous_event",
            previous_event,
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
