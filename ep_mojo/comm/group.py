"""A `torch.distributed` process group as a communicator needs it: who is in it, and how its processes agree.

Every call of the group that all processes make is here. It runs in a thread of its own, so that whoever waits for it
still sees a peer go and a Ctrl-C come; the group's own timeout bounds it. Nothing here moves tokens.
"""

from __future__ import annotations

import importlib
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from ..errors import (
    ConfigError,
    DTypeError,
    EPError,
    MissingDependencyError,
    OrderError,
    PeerLostError,
    PeerTimeoutError,
    UnsupportedError,
)
from .causes import raise_first
from .worker import portable, text_of

TICK_S = 0.05
"""How often who waits looks around."""
GRACE_S = 2.0
"""How long to look for a peer that is gone where the group has failed, and for an answer where a peer is gone."""
HOST_BACKENDS = ("gloo",)

Look = Callable[[], None]


class ProcessGroup:
    """One group, and this process's place in it.

    Attributes:
        group: The `torch.distributed` group.
        rank: This process's rank in it.
        size: How many processes it has.
    """

    def __init__(self, group: Any, look: Look):
        """`group`: None for the default one. `look`: called now and then while others are waited for. It may raise.

        Raises:
            MissingDependencyError: torch, or its `torch.distributed`, is not installed.
            OrderError: There is no process group yet.
            DTypeError, ConfigError: `group` is no group, or one that this process is not in.
            UnsupportedError: The group cannot move what is on the host.
        """
        dist = torch_distributed()
        if not dist.is_initialized():
            raise OrderError(
                "torch.distributed has no process group yet",
                allowed="a call after torch.distributed.init_process_group",
                remedy='call torch.distributed.init_process_group("gloo") first, in every process',
            )
        if group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ConfigError(
                "this process is not in the group",
                field="group",
                value=group,
                allowed="a group that this process belongs to",
                remedy="call it in the processes of the group only: those whose ranks new_group was given",
            )
        if group is None:
            group = dist.group.WORLD
        if not isinstance(group, dist.ProcessGroup):
            raise DTypeError.wrong_kind(
                "group",
                group,
                allowed="a torch.distributed.ProcessGroup, or None for the default group",
                remedy="pass what torch.distributed.new_group returned",
            )
        by_device = backends_of(group)
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        on_host = by_device.get("cpu") in HOST_BACKENDS
        if not on_host and by_device.get("cuda") != "nccl":
            raise UnsupportedError(
                "the group cannot move what is on the host",
                field="backend of the group",
                value=",".join(f"{device}:{backend}" for device, backend in by_device.items()),
                allowed="gloo, nccl, or cpu:gloo,cuda:nccl",
                remedy='call torch.distributed.init_process_group("cpu:gloo,cuda:nccl"), or pass '
                'group=torch.distributed.new_group(backend="gloo")',
            )
        self.group, self._on_host = group, on_host
        self._look = look

    def gather(self, value: Any, what: str) -> list[Any]:
        """Every rank's `value`, by rank, as soon as all have called this. `what` is for errors: "doing so and so".

        Raises:
            PeerTimeoutError: The group gave up: its timeout, or a process of it is gone.
            Exception: What `look` raised.
        """

        def call(given_up: threading.Event) -> list[Any]:
            if not self._on_host:
                return self._over_store(value, what, given_up)
            found = [None] * self.size
            torch_distributed().all_gather_object(found, value, group=self.group)
            return found

        return self._wait(call, what)

    def agree(self, make: Callable[[], Any], what: str) -> list[Any]:
        """What `make()` returned on every rank, by rank. Where it raised on one, that is raised on all ranks.

        Of several errors the one that explains most; `by_rank` has all of them. The rest as for `gather`.
        """
        own: Exception | None = None
        try:
            mine = True, make()
        except Exception as e:
            mine, own = (False, portable(e, f"rank {self.rank}")), e
        try:
            answers = self.gather(mine, what)
        except EPError as e:
            if own is None:
                raise
            raise own from e
        errors = {r: value for r, (ok, value) in enumerate(answers) if not ok}
        if own is not None:
            errors[self.rank] = own
        raise_first(errors)
        return [value for _, value in answers]

    def together(self, make: Callable[[], Any], what: str) -> Any:
        """What `make()` returned here, if it raised on no rank. Otherwise as `agree`."""
        kept = []
        self.agree(lambda: kept.append(make()), what)
        return kept[0]

    def from_first(self, make: Callable[[], Any], meanwhile: Callable[[], Any], what: str) -> Any:
        """What `make()` returned on rank 0, on all ranks; the others call `meanwhile`. Errors as for `agree`."""
        kept: list[Any] = []
        self.agree(lambda: kept.append(make()) if self.rank == 0 else kept.append(meanwhile()), what)
        found = kept if self.rank == 0 else [None]

        def call(given_up: threading.Event) -> None:
            dist = torch_distributed()
            if self._on_host:
                dist.broadcast_object_list(found, src=dist.get_global_rank(self.group, 0), group=self.group)
            else:
                found[0] = self._over_store(found[0], what, given_up)[0]

        self._wait(call, what)
        return found[0]

    def _over_store(self, value: Any, what: str, given_up: threading.Event) -> list[Any]:
        """Every rank's `value`, through the group's store: where the group only moves what is on GPUs.

        Not through a group over gloo of the same processes: torch names it after the number of groups that a process
        knows, so that ranks which belong to different numbers of groups would wait for each other for ever.
        """
        from .board import board_of

        options = [self.group._get_backend(device).options for device in self.group._device_types]
        timeouts = [o._timeout.total_seconds() for o in options if getattr(o, "_timeout", None) is not None]
        return board_of(self.group).agree(what, value, min(timeouts, default=0.0), given_up)

    def _wait(self, call: Callable[[threading.Event], Any], what: str) -> Any:
        given_up = threading.Event()
        try:
            return self._wait_for_answer(lambda: call(given_up), what)
        finally:
            given_up.set()

    def _wait_for_answer(self, call: Callable[[], Any], what: str) -> Any:
        self._look()
        answers: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

        def answer() -> None:
            try:
                answers.put((True, call()))
            except BaseException as e:
                answers.put((False, e))

        threading.Thread(target=answer, name="ep-mojo-group", daemon=True).start()
        gone: PeerLostError | None = None
        end = float("inf")
        while time.monotonic() < end:
            try:
                ok, value = answers.get(timeout=TICK_S)
            except queue.Empty:
                try:
                    self._look()
                except PeerLostError as e:
                    # A peer that has answered and gone on may go at once: its answer is on its way then.
                    gone, end = gone or e, min(end, time.monotonic() + GRACE_S)
                continue
            if ok:
                return value
            break
        if gone is not None:
            raise gone
        of_board = isinstance(value, (PeerLostError, PeerTimeoutError))
        if not isinstance(value, RuntimeError) and not of_board:  # what torch.distributed raises derives from the first
            raise value
        end = time.monotonic() + GRACE_S
        while time.monotonic() < end:  # the group may know of a lost peer a moment before this process does
            self._look()
            time.sleep(TICK_S)
        if of_board:
            raise value
        raise PeerTimeoutError(
            f"rank {self.rank}: the process group failed while {what}: {text_of(value)}",
            allowed="all processes of the group make the same calls in the same order, within the group's timeout",
            remedy="see what the other ranks did; make a new process group where a process is gone",
        ) from value


def backends_of(group: Any) -> dict[str, str]:
    """The backend of a group for each kind of device: "cpu" and "cuda" to "gloo" or "nccl", say.

    Raises:
        OrderError: The group was destroyed.
    """
    try:
        backends = str(torch_distributed().get_backend_config(group))
    except Exception as e:  # of several kinds, none of them documented
        raise OrderError(
            f"torch.distributed does not know the group any more ({text_of(e)})",
            field="group",
            value="destroyed",
            allowed="a group before torch.distributed.destroy_process_group",
            remedy="make a new group",
        ) from e
    return dict(part.split(":", 1) for part in backends.split(",") if ":" in part)


def torch_distributed() -> Any:
    """The module `torch.distributed`, imported when it is first needed.

    Raises:
        MissingDependencyError: torch is not installed, or was built without it.
    """
    try:
        dist = importlib.import_module("torch.distributed")
    except ModuleNotFoundError as e:
        if (e.name or "").partition(".")[0] != "torch":
            raise
        raise MissingDependencyError(
            "process groups need the package 'torch', which is not installed here",
            remedy="pip install torch, or '.[torch]' in the checkout",
        ) from e
    if not dist.is_available():
        raise MissingDependencyError(
            "this torch was built without torch.distributed",
            remedy="install another build of torch: pip install torch",
        )
    return dist
