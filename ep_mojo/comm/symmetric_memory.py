"""The memory of ranks that have a GPU and a process each: torch's symmetric memory.

Every rank allocates a block of the same size; `rendezvous` maps all of them in all processes. A block has the parts of
`windows.py` at the same offsets. Kernels write to peers through those mappings; the host sees copies of its own rank's
memory. A mapping keeps the memory behind it, also when its owner has gone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .. import layout
from ..config import EPConfig
from ..dtypes import to_buffer
from ..errors import DeviceError, DeviceMemoryError, UnsupportedError
from . import windows
from .device_memory import DeviceMemory
from .windows import RankMemory

if TYPE_CHECKING:
    import torch
    from max.driver import Buffer, Device
    from max.graph import DeviceRef


SHARING = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"
"""torch's variable of the environment that lets ranks have one GPU, where their kernels take turns: slow."""


_mapped = 0
"""How often this process has mapped the memory of a group."""


class Offer(NamedTuple):
    """What a rank says of its block.

    Attributes:
        gpu: The GPU's unique name.
        mapped: How often the rank's process has mapped the memory of a group before.
    """

    gpu: str
    mapped: int


def check_offers(offers: Sequence[Offer]) -> None:
    """Raise, on all ranks alike, unless they can map each other's blocks.

    torch numbers the exchanges of a process, whatever group they are of; ranks whose numbers differ would wait for each
    other for ever.

    Raises:
        DeviceError: Two ranks have one GPU.
        UnsupportedError: Their processes have mapped the memory of groups differently often.
    """
    gpus = [offer.gpu for offer in offers]
    for rank, gpu in enumerate(gpus):
        if gpus.index(gpu) != rank and os.environ.get(SHARING) != "1":
            raise DeviceError(
                f"ranks {gpus.index(gpu)} and {rank} have one GPU",
                field=f"device of rank {rank}",
                value=gpu,
                allowed=f"a GPU for each rank; for tests, {SHARING}=1 lets them share one",
                remedy="call torch.cuda.set_device(local_rank) first, or pass the device",
            )
    for rank, offer in enumerate(offers):
        if offer.mapped != offers[0].mapped:
            raise UnsupportedError(
                f"rank 0 has made windows {offers[0].mapped} times before, rank {rank} {offer.mapped} times",
                field=f"windows made by rank {rank}",
                value=offer.mapped,
                allowed=f"{offers[0].mapped}: torch's symmetric memory needs equal numbers on all ranks of a group",
                remedy="let every process make as many communicators and Buffers: groups of all ranks first, then "
                "such that each process is in equally many",
            )


class BlockMemory(DeviceMemory):
    """A rank's memory in a block that torch allocated, here or in a peer's process.

    Attributes:
        rank: Whose it is.
        block: uint8, flat, on the GPU of this process's rank.
        mapping: What keeps it mapped.
    """

    def __init__(self, cfg: EPConfig, rank: int, block: torch.Tensor):
        self.cfg, self.rank, self.block = cfg, rank, block
        self.mapping: Any = None
        self.header = np.zeros(windows.HEADER_BYTES, np.uint8)  # nobody writes it: peers are on other GPUs
        self._identity = b""
        self._offsets, _ = windows.part_offsets(cfg)
        self._sizes = windows.part_bytes(cfg)

    def part(self, name: str) -> torch.Tensor:
        """A part, uint8: the memory itself."""
        return self.block[self._offsets[name] : self._offsets[name] + self._sizes[name]]

    def window(self, part: str) -> np.ndarray:
        """See `DeviceMemory.window`."""
        return self.part(part).cpu().numpy()

    def address(self, part: str) -> int:
        """Address of a part, for kernels of this process."""
        return self.block.data_ptr() + self._offsets[part]

    def write(self, part: str, values: np.ndarray, at: int = 0) -> None:
        """See `DeviceMemory.write`."""
        import torch

        given = torch.from_numpy(np.ascontiguousarray(values).view(np.uint8).copy())
        with torch.inference_mode():  # where the block may have been mapped
            self.part(part)[at : at + given.numel()].copy_(given)

    def synchronize(self) -> None:
        """See `DeviceMemory.synchronize`."""
        import torch

        torch.cuda.synchronize(self.block.device)


class FailureNote:
    """A word of host memory in which the kernels of a rank note that one of them has failed: known without waiting."""

    def __init__(self, own: BlockMemory):
        """Make it, and tell the kernels where it is. The GPU must have nothing to do for the rank."""
        import torch

        self._word = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=True)
        self._seen = self._word.numpy()
        own.put_address(layout.HEAD_NOTE, self._word.data_ptr())

    def set(self) -> None:
        """Note what the host itself has put on record."""
        self._seen[0] = 1

    @property
    def failed(self) -> bool:
        """Whether a launch has failed."""
        return bool(self._seen[0])

    def clear(self) -> None:
        """Forget it. The GPU must have nothing to do for the rank."""
        self._seen[0] = 0


class SymmetricMemoryProvider:
    """See `MemoryProvider`: a GPU and a process for each rank, all of one host."""

    compiles_once = False  # the number of the GPU is part of what is compiled
    on_host = False

    def __init__(self, device: torch.device, group: Any):
        """`device`: of this process, without a number the current one; `group`: of torch.distributed.

        Raises:
            DeviceError: There is no such GPU.
        """
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = device.index
        if index is None and count:
            index = torch.cuda.current_device()
        if index is None or index >= count:
            raise DeviceError(
                field="device",
                value=str(device),
                allowed=f"GPUs 0 to {count - 1}" if count else "a machine with GPUs; torch sees none here",
                remedy='see `python -m ep_mojo.doctor`, or pass device="cpu"',
            )
        self.device, self._group = torch.device("cuda", index), group
        self._own: BlockMemory | None = None
        self._block: torch.Tensor | None = None

    def check_free(self, cfg: EPConfig) -> None:
        """See `MemoryProvider`.

        Raises:
            DeviceMemoryError: The own block does not fit, with the bytes needed and free.
        """
        import torch

        need, (free, _) = windows.block_bytes(cfg), torch.cuda.mem_get_info(self.device)
        if need > free:  # torch may only keep it for later
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info(self.device)
        if need > free:
            raise _too_small(need, f"at most {free} bytes free on {self.device}", "the windows do not fit")

    def create(self, cfg: EPConfig, rank: int, group: int) -> Offer:
        """See `MemoryProvider`.

        Raises:
            DeviceMemoryError: There is not enough memory.
        """
        import torch
        import torch.distributed._symmetric_memory as symmetric_memory

        size = windows.block_bytes(cfg)
        try:
            self._block = symmetric_memory.empty(size, dtype=torch.uint8, device=self.device)
        except RuntimeError as e:
            raise _too_small(size, f"what {self.device} has free", f"rank {rank}: {e}") from e
        self._block.zero_()
        self._own = BlockMemory(cfg, rank, self._block)
        head = np.zeros(layout.counters_words(cfg), np.int32)
        layout.write_head(head, cfg, rank)
        self._own.write("counters", head)
        self._own.synchronize()
        return Offer(str(torch.cuda.get_device_properties(self.device).uuid), _mapped)

    def attach(self, offers: Sequence[Offer]) -> list[RankMemory]:
        """See `MemoryProvider`.

        Raises:
            DeviceError: Two ranks have one GPU, or one GPU cannot reach another.
            UnsupportedError: See `check_offers`.
        """
        import torch
        import torch.distributed._symmetric_memory as symmetric_memory

        global _mapped
        check_offers(offers)
        own, _mapped = self._own, _mapped + 1
        try:
            mapping = symmetric_memory.rendezvous(self._block, self._group)
            blocks = [
                self._block if r == own.rank else mapping.get_buffer(r, self._block.shape, torch.uint8)
                for r in range(len(offers))
            ]
        except RuntimeError as e:
            raise DeviceError(
                f"rank {own.rank} cannot map the memory of its peers ({e})",
                field="device",
                value=str(self.device),
                allowed="GPUs of one node with peer access to one another",
                remedy="see nvidia-smi topo -p2p r, and that containers share /proc and the GPUs",
            ) from e
        memories = [own if r == own.rank else BlockMemory(own.cfg, r, block) for r, block in enumerate(blocks)]
        for memory in memories:
            memory.mapping = mapping
        return memories

    def close(self) -> None:
        """See `MemoryProvider`."""
        self._own = self._block = None  # the communicator has it

    def device_ref(self) -> DeviceRef:
        """The GPU."""
        from max.graph import DeviceRef

        return DeviceRef.GPU(self.device.index)

    def accelerator(self) -> Device:
        """The GPU, as MAX has it."""
        from max.driver import Accelerator

        return Accelerator(self.device.index)

    def session_devices(self) -> list[Device]:
        """Host and GPU."""
        from max.driver import CPU

        return [CPU(), self.accelerator()]

    def inputs(self, cfg: EPConfig, memories: Sequence[RankMemory], rank: int) -> list[Buffer]:
        """See `MemoryProvider`."""
        import torch
        from max.driver import Buffer

        tables = [windows.settings_array(cfg, False), *windows.pointer_tables(memories)]
        with torch.cuda.device(self.device), torch.inference_mode(False):  # they outlive the mode they are made in
            # Of torch's memory: for a word of its own MAX would take 256 MiB of the GPU.
            order = Buffer.from_dlpack(torch.zeros(windows.ORDER_WORDS, dtype=torch.int32, device=self.device))
            counters = Buffer.from_dlpack(memories[rank].part("counters").view(torch.int32))
        self.synchronize()
        return [*map(to_buffer, tables), order, counters]

    def synchronize(self) -> None:
        """Wait for the GPU."""
        import torch

        torch.cuda.synchronize(self.device)

    def capturing(self) -> bool:
        """See `MemoryProvider`."""
        import torch

        with torch.cuda.device(self.device):
            return torch.cuda.is_current_stream_capturing()


def _too_small(need: int, allowed: str, what: str) -> DeviceMemoryError:
    return DeviceMemoryError(
        what,
        field="bytes needed",
        value=need,
        allowed=allowed,
        remedy="lower max_tokens_per_rank, hidden_size, num_buffers or n_ranks",
    )
