"""The memory of a rank on a GPU: counters and the four windows, and what `reset` writes there.

The same parts as in `windows.py`. The host sees copies: `counters` is one, made when it is asked for, behind everything
that the device's queue holds. In `BufferMemory` each part is a MAX buffer of its own.
"""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .. import layout
from ..config import EPConfig
from ..errors import DeviceError, DeviceMemoryError, DTypeError
from .planned import COMPILING_AHEAD
from .windows import PARTS, RankMemory, part_bytes, restart_counters

if TYPE_CHECKING:
    from max.driver import Buffer, Device

CLEARED_AT_ONCE = 1 << 24
"""Bytes of zeros that the host sends to a device in one copy."""


class DeviceMemory(RankMemory):
    """One rank's windows and counters in the memory of a GPU."""

    @property
    def counters(self) -> np.ndarray:
        """A copy of `atomic_counters`, int32 [counters_words(cfg)]."""
        return self.window("counters").view(np.int32)

    @abstractmethod
    def window(self, part: str) -> np.ndarray:
        """A copy of a part, uint8."""

    @abstractmethod
    def write(self, part: str, values: np.ndarray, at: int = 0) -> None:
        """Overwrite a part from byte `at` on."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""

    def put_words(self, part: str, where: Sequence[int], value: int) -> None:
        """See `RankMemory.put_words`. Peers may write to other words of the part meanwhile."""
        for word in where:
            self.write(part, np.array([value], np.uint64), 8 * int(word))
        self.synchronize()

    def put_epochs(self, epoch: int) -> None:
        """See `RankMemory.put_epochs`."""
        counters = self.counters
        layout.put_epochs(counters, epoch)
        self.write("counters", counters)
        self.synchronize()

    def restart(self, epoch: int) -> None:
        """See `RankMemory.restart`."""
        if self.cfg.rows_in_cells:  # what nobody has read would be taken for rows of a later round
            self._clear("combine_recv")
        if self.cfg.slots == "rank":
            credits = np.full(self.cfg.n_ranks, layout.word(epoch, 0), np.uint64)
            for name in ("dispatch_count", "combine_count"):
                self.write(name, credits)
        self.synchronize()
        counters = self.counters  # last: a rank with a record goes on with nothing
        restart_counters(counters, epoch)
        self.write("counters", counters)
        self.synchronize()

    def _clear(self, part: str) -> None:
        size = part_bytes(self.cfg)[part]
        zeros = np.zeros(min(size, CLEARED_AT_ONCE), np.uint8)
        for at in range(0, size, CLEARED_AT_ONCE):
            self.write(part, zeros[: size - at], at)

    def put_address(self, index: int, address: int) -> None:
        """See `RankMemory.put_address`."""
        counters = self.counters
        layout.put_address(counters, index, address)
        self.write("counters", counters)
        self.synchronize()

    def record_abort(self) -> None:
        """See `RankMemory.record_abort`."""
        counters = self.counters
        if self.abort_counters(counters):
            self.write("counters", counters)
            self.synchronize()


class BufferMemory(DeviceMemory):
    """A rank's memory that this process allocates with MAX.

    Attributes:
        rank: Whose it is.
        device: Where it is.
        buffers: By the names of `windows.PARTS`: int32 for "counters", uint8 for the windows.
    """

    def __init__(self, cfg: EPConfig, rank: int, device: Device):
        """Allocate them: windows zero, epochs 0.

        Raises:
            DeviceMemoryError: There is not enough memory on the device.
        """
        from max.driver import Buffer
        from max.dtype import DType

        self.cfg, self.rank, self.device = cfg, rank, device
        self._identity = b""
        sizes = part_bytes(cfg)
        head = np.zeros(layout.counters_words(cfg), np.int32)
        layout.write_head(head, cfg, rank)
        self.buffers: dict[str, Buffer] = {}
        try:
            self.buffers["counters"] = Buffer.from_numpy(head).to(device)
            for name in PARTS[1:]:
                self.buffers[name] = Buffer.zeros([sizes[name]], DType.uint8, device)
        except (ValueError, RuntimeError) as e:
            raise DeviceMemoryError(
                f"rank {rank}: no memory for its windows on {device.label}:{device.id} ({e})",
                field="bytes needed",
                value=sum(sizes.values()),
                allowed="what the device has free",
                remedy="lower max_tokens_per_rank, hidden_size, num_buffers or n_ranks",
            ) from e
        device.synchronize()

    def window(self, part: str) -> np.ndarray:
        """See `DeviceMemory.window`."""
        from max.driver import CPU

        return self.buffers[part].to(CPU()).to_numpy().copy().view(np.uint8)

    def address(self, part: str) -> int:
        """Device address of a part."""
        return self.buffers[part]._data_ptr()

    def write(self, part: str, values: np.ndarray, at: int = 0) -> None:
        """See `DeviceMemory.write`."""
        from max.driver import Buffer

        target = self.buffers[part]
        values = np.ascontiguousarray(values).view(np.int32 if part == "counters" else np.uint8)
        first = at // values.itemsize
        target[first : first + values.size].inplace_copy_from(Buffer.from_numpy(values))

    def synchronize(self) -> None:
        """See `DeviceMemory.synchronize`."""
        self.device.synchronize()


def accelerators(devices: Sequence[Device | int] | None, count: int) -> list[Device]:
    """`count` different GPUs that can reach one another.

    Args:
        devices: GPUs, or their numbers; None: the first ones.
        count: How many there must be.

    Raises:
        DTypeError: Not a list of GPUs or numbers.
        DeviceError: Too few or too many, one twice, none of that number, a host device, or no peer access; or GPUs that
            are only virtual.
    """
    from max.driver import Accelerator, accelerator_count, enable_all_peer_access, is_virtual_device_mode

    there = accelerator_count()
    if devices is None:
        _check_enough(count, there)
        devices = range(count)
    if not isinstance(devices, Sequence) or isinstance(devices, (str, bytes)):
        raise DTypeError(
            field="devices",
            value=devices if isinstance(devices, (int, str)) else type(devices).__name__,
            allowed="a list of GPUs or of their numbers, one for each rank",
            remedy=f"pass {list(range(count))}, or leave it out for the first {count}",
        )
    if is_virtual_device_mode():
        raise DeviceError(
            "these GPUs are virtual (set_virtual_device_count): graphs are compiled for them, nothing runs there",
            field="devices",
            value=[str(d) for d in devices],
            allowed="GPUs of this machine",
            remedy=f"use Communicator.planned to compile: {COMPILING_AHEAD}",
        )
    found = []
    for d in devices:
        index = operator.index(d) if hasattr(d, "__index__") else getattr(d, "id", None)
        if getattr(d, "is_host", False) or not isinstance(index, int) or not 0 <= index < there:
            raise DeviceError(
                field="devices",
                value=str(d),
                allowed=f"GPUs 0 to {there - 1}" if there else "a GPU; MAX sees none here",
                remedy="see `python -m ep_mojo.doctor`, or use Communicator.cpu",
            )
        found.append(Accelerator(index))
    if len({d.id for d in found}) != count or len(found) != count:
        raise DeviceError(
            field="devices",
            value=[d.id for d in found],
            allowed=f"{count} different GPUs, one for each rank; MAX sees {there}",
            remedy="pass cfg.n_ranks devices, or Communicator.one_gpu for ranks that share one",
        )
    for a in found:
        for b in found:
            if a.id != b.id and not a.can_access(b):
                raise DeviceError(
                    f"GPU {a.id} cannot reach the memory of GPU {b.id}",
                    field="devices",
                    value=[d.id for d in found],
                    allowed="GPUs of one node with peer access to one another",
                    remedy="choose GPUs that share NVLink or PCIe peer access (nvidia-smi topo -p2p r)",
                )
    if count > 1:
        enable_all_peer_access()
    return found


def _check_enough(count: int, there: int) -> None:
    """Raise `DeviceError` where there are fewer GPUs than ranks."""
    if count <= there:
        return
    virtual, fewer = ("one_gpu", f"choose n_ranks up to {there}, ") if there else ("cpu", "")
    raise DeviceError(
        f"needs {count} GPU{'s' * (count > 1)}; MAX sees {there} here",
        field="n_ranks",
        value=count,
        allowed=f"up to {there}, a rank on each GPU" if there else "a machine with GPUs",
        remedy=f"see `python -m ep_mojo.doctor`; {fewer}use Communicator.{virtual} for virtual ranks, "
        f"or compile ahead: {COMPILING_AHEAD}",
    )
