"""Where the windows of a process group's ranks live, and how a rank gets at its peers': one class a kind of memory.
`HostProvider` is here, the one for GPUs in `symmetric_memory.py`.

A provider makes the block of the own rank, says in an offer how others find it, and maps the others' from their offers.
It also has what else depends on the kind of memory: devices, the buffers behind a graph's inputs, waiting.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ..config import EPConfig
from ..errors import DeviceError, SharedMemoryError, UnsupportedError
from . import shm
from .base import host_inputs
from .windows import RankMemory

if TYPE_CHECKING:
    from max.driver import Buffer, Device
    from max.graph import DeviceRef

PROC_FD = "/proc/self/fd"


class MemoryProvider(Protocol):
    """The memory of one rank of a process group. The methods of construction are called in this order, by all ranks."""

    compiles_once: bool
    """Whether all ranks can run what rank 0 has compiled."""
    on_host: bool
    """Whether a launch is over when it returns, and the host sees all memory as it is."""

    def check_free(self, cfg: EPConfig) -> None:
        """Raise unless all ranks' windows fit. Nobody has allocated anything yet."""

    def create(self, cfg: EPConfig, rank: int, group: int) -> Any:
        """Make the own block; returns an offer that can be pickled. `group` tells communicators from one another."""

    def attach(self, offers: Sequence[Any]) -> list[RankMemory]:
        """The blocks of all ranks, mapped here. `offers`: every rank's, by rank."""

    def close(self) -> None:
        """Give up what only construction needed, as far as it came. All ranks have attached, or one has failed."""

    def device_ref(self) -> DeviceRef:
        """Where the rank's tensors are."""

    def session_devices(self) -> list[Device]:
        """What graphs are compiled for."""

    def inputs(self, cfg: EPConfig, memories: Sequence[RankMemory], rank: int) -> list[Buffer]:
        """The buffers behind `Communicator.input_types`."""

    def synchronize(self) -> None:
        """Wait until the rank's memory shows all that it has run."""

    def capturing(self) -> bool:
        """Whether launches are being captured, so that nothing may be waited for."""


class HostProvider:
    """POSIX shared memory: ranks are processes of one host."""

    compiles_once = True
    on_host = True

    def __init__(self):
        """Make nothing yet."""
        self._fds: list[int] = []
        self._names: list[str] = []
        self._own: RankMemory | None = None
        self._group = 0

    def check_free(self, cfg: EPConfig) -> None:
        """See `MemoryProvider`.

        Raises:
            SharedMemoryError: They do not fit, with the bytes needed and free.
        """
        shm.check_free(cfg)

    def create(self, cfg: EPConfig, rank: int, group: int) -> str:
        """See `MemoryProvider`. The offer is a path.

        Raises:
            SharedMemoryError: There is not enough shared memory, or there are no more file descriptors.
        """
        by_proc = os.path.isdir(PROC_FD)
        self._group = group
        self._own = shm.create(cfg, rank, group, self._fds, None if by_proc else self._names)
        return f"/proc/{os.getpid()}/fd/{self._fds[0]}" if by_proc else self._names[0]

    def attach(self, offers: Sequence[str]) -> list[RankMemory]:
        """See `MemoryProvider`.

        Raises:
            SharedMemoryError: A peer's block cannot be opened or mapped.
            CorruptHeadError, ConfigMismatchError: It is not what this config makes.
        """
        return [self._own if r == self._own.rank else self._map(r, path) for r, path in enumerate(offers)]

    def _map(self, rank: int, path: str) -> RankMemory:
        own = self._own
        try:
            self._fds.append(shm.open_path(path))
        except OSError as e:
            raise shm.no_descriptors(own.rank, e) or SharedMemoryError(
                f"rank {own.rank} cannot open the windows of rank {rank} ({e})",
                field="segment",
                value=path,
                allowed="a process of the same user and container that is still running",
                remedy="start all ranks alike: one user, one container, one /proc",
            ) from e
        memory = shm.attach(self._fds[-1], own.cfg, rank, self._group, own.rank)
        os.close(self._fds.pop())
        return memory

    def close(self) -> None:
        """See `MemoryProvider`."""
        shm.close_all(self._fds)
        shm.unlink_all(self._names)
        self._own = None  # the communicator has it

    def device_ref(self) -> DeviceRef:
        """The host."""
        from max.graph import DeviceRef

        return DeviceRef.CPU()

    def session_devices(self) -> list[Device]:
        """The host."""
        from max.driver import CPU

        return [CPU()]

    def inputs(self, cfg: EPConfig, memories: Sequence[RankMemory], rank: int) -> list[Buffer]:
        """See `MemoryProvider`."""
        return host_inputs(cfg, False, memories, [rank])

    def synchronize(self) -> None:
        """Runs on the host are over when they return."""

    def capturing(self) -> bool:
        """No."""
        return False


def provider_for(device: Any, group: Any) -> MemoryProvider:
    """The provider for `device`: None, a name as "cpu" or "cuda", or a `torch.device`; `group`: of torch.distributed.

    Raises:
        UnsupportedError: A device whose memory no provider knows yet.
        DeviceError: No device.
    """
    import torch

    try:
        kind = "cpu" if device is None else torch.device(device).type
    except (RuntimeError, TypeError, ValueError) as e:
        raise DeviceError(
            field="device", value=device, allowed='None, "cpu", "cuda" or a torch.device', remedy='pass device="cpu"'
        ) from e
    if kind == "cpu":
        return HostProvider()
    if kind != "cuda":
        raise UnsupportedError(
            field="device",
            value=str(device),
            allowed='None, "cpu" or "cuda"',
            remedy="leave it out for the host",
        )
    from .symmetric_memory import SymmetricMemoryProvider

    return SymmetricMemoryProvider(torch.device(device), group)


def host_id() -> str:
    """What processes have in common that can share memory: this boot of a machine, and their namespace of processes."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as f:
            return f"{platform.node()} boot {f.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()
