"""The memory of a rank on the host: one block with the counters and the four windows, and what `reset` writes there.

A block, every part starting at a multiple of 4096 bytes:

    header           4096 bytes, used by `shm.py` only
    counters         int32, see `ep_mojo/layout.py`
    dispatch_count, combine_count, dispatch_recv, combine_recv      the windows that peers write

`Communicator.cpu` keeps the blocks in the memory of its process, `Communicator.processes` in POSIX shared memory. Sizes
and offsets follow from the config alone, so that every process finds the same places.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence

import numpy as np

from .. import layout
from ..config import EPConfig
from ..errors import EPError, SharedMemoryError
from ..memory import available_bytes
from ..records import record_to_error

PAGE = 4096
HEADER_BYTES = PAGE
PARTS = ("counters", "dispatch_count", "combine_count", "dispatch_recv", "combine_recv")
ORDER_WORDS = 8
"""int32 words of the buffer that orders the ops of a graph."""
LAST_EPOCH = (1 << 40) - 1

TABLES = (
    ("dispatch_send_ptrs", None),
    ("dispatch_recv_ptrs", "dispatch_recv"),
    ("dispatch_count_ptrs", "dispatch_count"),
    ("combine_send_ptrs", None),
    ("combine_recv_ptrs", "combine_recv"),
    ("combine_count_ptrs", "combine_count"),
)
"""Pointer tables in the order of a communicator's inputs, and the window whose addresses each holds (None: zeros)."""
REMEDY = (
    "lower max_tokens_per_rank, hidden_size, num_buffers or n_ranks; or close other programs, or raise the container's "
    "memory limit"
)


def part_bytes(cfg: EPConfig) -> dict[str, int]:
    """Bytes of each part of a block, without the rounding up to pages."""
    dispatch, combine = layout.DispatchWindow(cfg), layout.CombineWindow(cfg)
    return {
        "counters": 4 * layout.counters_words(cfg),
        "dispatch_count": dispatch.count_bytes,
        "combine_count": combine.count_bytes,
        "dispatch_recv": dispatch.recv_bytes,
        "combine_recv": combine.recv_bytes,
    }


def part_offsets(cfg: EPConfig) -> tuple[dict[str, int], int]:
    """Byte offset of each part of a block, and the size of the block."""
    offsets, end = {}, HEADER_BYTES
    sizes = part_bytes(cfg)
    for name in PARTS:
        offsets[name] = end
        end += layout.align_up(sizes[name], PAGE)
    return offsets, end


def block_bytes(cfg: EPConfig) -> int:
    """Bytes of one rank's block."""
    return part_offsets(cfg)[1]


class RankMemory:
    """One rank's block, seen as arrays. Keeps the memory alive.

    Attributes:
        rank: Whose block it is.
        counters: int32 [counters_words(cfg)].
        header: uint8 [4096].
        dispatch_count, combine_count, dispatch_recv, combine_recv: uint8 [bytes of the window].
    """

    header: np.ndarray
    counters: np.ndarray
    dispatch_count: np.ndarray
    combine_count: np.ndarray
    dispatch_recv: np.ndarray
    combine_recv: np.ndarray

    def __init__(self, cfg: EPConfig, rank: int, block: mmap.mmap):
        """See the parts of `block` (at least `block_bytes(cfg)`, page-aligned) as arrays."""
        self.cfg = cfg
        self.rank = rank
        offsets, total = part_offsets(cfg)
        memory = np.frombuffer(block, np.uint8, count=total)
        self.header = memory[:HEADER_BYTES]
        for name, size in part_bytes(cfg).items():
            setattr(self, name, memory[offsets[name] : offsets[name] + size])
        self.counters = self.counters.view(np.int32)
        self._identity = b""

    def check_head(self) -> None:
        """Raise `CorruptHeadError` or `ConfigMismatchError` unless the counters head is this rank's. Cheap if it is."""
        identity = self.counters[: layout.HEAD_DISPATCH_SENT].tobytes()
        if identity != self._identity:
            layout.check_head(self.counters, self.cfg, self.rank)
            self._identity = identity

    def address(self, part: str) -> int:
        """Address of a part in this process."""
        return getattr(self, part).ctypes.data

    def error(self) -> EPError | None:
        """The named error of this rank's record, or None."""
        record = layout.decode_record(self.counters)
        if record is None:
            return None
        error = record_to_error(record, self.cfg)
        if record.kind == layout.KIND_PEER_FAILED:
            error.peer_failed = True  # a consequence: the peer's own error says more
        return error

    def epochs(self) -> bytes:
        """The rank's four epochs, to compare with another moment's; `layout.read_epochs` gives the numbers."""
        return self.counters[layout.HEAD_DISPATCH_SENT : layout.HEAD_COMBINE_WAITED + 2].tobytes()

    def put_words(self, part: str, where: Sequence[int], value: int) -> None:
        """Write `value` to words of a window, which is seen as uint64."""
        getattr(self, part).view(np.uint64)[np.asarray(where, np.int64)] = value

    def put_epochs(self, epoch: int) -> None:
        """Let all of the rank's own epochs be this one. It must not be inside an op."""
        layout.put_epochs(self.counters, epoch)

    def put_address(self, index: int, address: int) -> None:
        """Tell the rank's launches where something is, see `layout.put_address`. It must not be inside an op."""
        layout.put_address(self.counters, index, address)

    def record_abort(self) -> None:
        """Put on record that an op raised in the middle of a run, unless an earlier failure is there already.

        The rank must not be inside an op. Every later launch then fails as after any other failure, until `restart`.
        """
        self.abort_counters(self.counters)

    def abort_counters(self, counters: np.ndarray) -> bool:
        """Write the record of `record_abort` into `counters`; returns whether there was none yet."""
        if counters[layout.REC_STATE] != 0:
            return False
        counters[layout.REC_STATE : layout.REC_END] = 0
        counters[layout.REC_KIND] = layout.KIND_ABORTED
        counters[layout.REC_RANK] = self.rank
        counters[layout.REC_PEER] = -1
        counters[layout.REC_STATE] = 2
        return True

    def publish_failure(self, peer: int, epoch: int = LAST_EPOCH) -> None:
        """Say in the place of `peer` that it has failed, in this epoch and all before it.

        Waits of this rank on that peer then end at once, whatever the deadline.

        Args:
            peer: Who has failed.
            epoch: The last epoch for which that holds. By default all that will ever be, which `restart` does not
                undo: for communicators that have lost a process and so will never work again. Any other one is undone
                by a `restart` that is not below it.
        """
        for part, places in self._failure_places(peer):
            self.put_words(part, sum(places, []), layout.word(epoch, layout.FAILED))

    def publish_departure(self, peer: int, sent: Sequence[int]) -> bool:
        """`publish_failure` for a peer that sends no more, but not in place of what it has sent.

        Rounds of it that this rank has yet to receive stay good, so their places are left out.

        Args:
            peer: Who has gone.
            sent: Its epochs, as `layout.read_epochs` gives them.

        Returns:
            Whether no place was left out; otherwise call it again when this rank has gone on.
        """
        own, buffers, complete = layout.read_epochs(self.counters), self.cfg.num_buffers, True
        for side, (part, places) in enumerate(self._failure_places(peer)):
            first, last = own[2 * side + 1] + 1, sent[2 * side]
            # A peer that aborted is further ahead than its buffers allow: it has said FAILED itself.
            kept = {e % buffers for e in range(first, last + 1)} if last - first < buffers else set()
            words = sum((where for b, where in enumerate(places) if b not in kept), [])
            self.put_words(part, words, layout.word(LAST_EPOCH, layout.FAILED))
            complete &= not kept
        return complete

    def _failure_places(self, peer: int) -> list[tuple[str, list[list[int]]]]:
        """Of dispatch and of combine: the count window, and by buffer the words of it where `peer` says FAILED."""
        dispatch, combine = layout.DispatchWindow(self.cfg), layout.CombineWindow(self.cfg)
        if self.cfg.slots == "rank":
            buffers = range(self.cfg.num_buffers)
            offsets = [[dispatch.header(b, peer)] for b in buffers], [[combine.header(b, peer)] for b in buffers]
        else:
            experts = range(self.cfg.n_local_experts)
            first = peer * self.cfg.n_local_experts
            offsets = (
                [[dispatch.expert_count(e, peer) for e in experts]],
                [[combine.expert_signal(first + e) for e in experts]],
            )
        return [
            (part, [[offset // 8 for offset in where] for where in places])
            for part, places in zip(("dispatch_count", "combine_count"), offsets, strict=True)
        ]

    def restart(self, epoch: int) -> None:
        """Write what a new round after `epoch` needs: epochs, everybody's credits, no error record."""
        if self.cfg.slots == "rank":
            for window in (self.dispatch_count, self.combine_count):
                window[: 8 * self.cfg.n_ranks].view(np.uint64)[:] = layout.word(epoch, 0)
        restart_counters(self.counters, epoch)


def restart_counters(counters: np.ndarray, epoch: int) -> None:
    """Let a rank's own counters say that all rounds up to `epoch` are done, and that nothing has failed."""
    layout.put_epochs(counters, epoch)
    layout.clear_record(counters)
    for first, words in ((layout.ARRIVED, 4), (layout.TICKETS, 2)):  # 0 between launches
        counters[first : first + words] = 0


def allocate(cfg: EPConfig, rank: int) -> RankMemory:
    """A fresh block in this process's own memory: windows zero, epochs 0.

    Raises:
        SharedMemoryError: There is not enough address space.
    """
    size = block_bytes(cfg)
    try:
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError, OverflowError) as e:
        raise SharedMemoryError(
            f"rank {rank}: no memory for its windows ({e})",
            field="bytes needed",
            value=size,
            allowed="what the machine has free",
            remedy=REMEDY,
        ) from e
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages: slower, no worse
            block.madvise(mmap.MADV_HUGEPAGE)
    memory = RankMemory(cfg, rank, block)
    layout.write_head(memory.counters, cfg, rank)
    return memory


def allocate_all(cfg: EPConfig) -> list[RankMemory]:
    """The blocks of all ranks in this process's own memory, after a look whether they fit.

    Pages come when they are first written, so without that look too little memory would kill the process in some round.

    Raises:
        SharedMemoryError: They do not fit, with the bytes needed and free; nothing is mapped then.
    """
    need, free = cfg.n_ranks * block_bytes(cfg), available_bytes()
    if free is not None and need > free:
        raise SharedMemoryError(
            f"the windows of {cfg.n_ranks} ranks do not fit into memory",
            field="bytes needed",
            value=need,
            allowed=f"at most {free} bytes free",
            remedy=REMEDY,
        )
    return [allocate(cfg, rank) for rank in range(cfg.n_ranks)]


def pointer_tables(memories: Sequence[RankMemory]) -> list[np.ndarray]:
    """The six pointer tables, uint64 [R], in the order of `TABLES`: window addresses in this process."""
    return [np.array([m.address(part) if part else 0 for m in memories], np.uint64) for _, part in TABLES]


def settings_array(cfg: EPConfig, virtual: bool) -> np.ndarray:
    """The settings tensor, int64 [SETTINGS_WORDS]."""
    return np.array(cfg.settings(virtual), np.int64)


def check_heads(memories: Sequence[RankMemory]) -> None:
    """`RankMemory.check_head` of all."""
    for m in memories:
        m.check_head()


def restart_all(memories: Sequence[RankMemory]) -> int:
    """Agree on one epoch, no lower than any rank's, and write it everywhere. Nobody may be inside an op.

    Returns:
        The epoch; the next round is one more.

    Raises:
        CorruptHeadError, ConfigMismatchError: A counters head is damaged; nothing is written then.
    """
    check_heads(memories)
    epoch = max(e for m in memories for e in layout.read_epochs(m.counters))
    for m in memories:
        m.restart(epoch)
    return epoch


def abort_alone(own: RankMemory, memories: Sequence[RankMemory]) -> None:
    """Give up this rank's part of the rounds in progress: an op of it raised, and its peers may wait for what it owes.

    Every peer reads FAILED in all epochs that it may be waiting for, and the rank's own epochs move on to the last of
    them, so that `restart_all` agrees on none below it. That peer cannot be further ahead: it sends at most B rounds
    before this rank's credit, and waits for no round that it has not sent.

    Args:
        own: The block of the rank, which must not be inside an op.
        memories: All blocks, mapped in the process of that rank.
    """
    own.record_abort()
    epoch = max(layout.read_epochs(own.counters)) + 1 + own.cfg.num_buffers
    own.put_epochs(epoch)
    for memory in memories:
        memory.publish_failure(own.rank, epoch)
