"""Notices that the process of a peer is gone, and speaks for it: waits on it end at once, whatever the deadline.

Each process watches its peers by their pidfds, in a thread that sleeps otherwise. A peer that left (`destroy`, a normal
end) has said so in the block header; the thread looks there once a second. Where the system has no pidfds, the deadline
names a peer that is gone.

What a peer has sent before it went stays good: a rank that ends after its last round must not spoil that round for
others. So FAILED goes only where no round of that peer is yet to be received, and into the other places later.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import weakref
from collections.abc import Sequence
from typing import Any

from .. import layout
from . import shm
from .windows import RankMemory

DIED, LEFT = 1, 2
"""Values of a lost flag: the process is gone, or has given up its communicator."""
LOOK_MS = 1000
RETRY_MS = 20
"""How often to look at the flags, and at rounds that are still to be received."""

KNOWN_PIDS: weakref.WeakKeyDictionary[Any, list[int]] = weakref.WeakKeyDictionary()
"""Processes by rank, of `torch.distributed` groups that had a communicator: nobody need wait for one that is gone."""


class PeerWatch:
    """Watches the processes of a communicator's peers."""

    def __init__(self, pids: Sequence[int], me: int):
        """`pids`: of all ranks; `me`: the own rank.

        Raises:
            SharedMemoryError: There are no file descriptors left.
        """
        self._pidfds: dict[int, int] = {}
        self._gone: set[int] = set()
        self._thread: threading.Thread | None = None
        self._wake = -1
        try:
            for rank, pid in enumerate(pids):
                if rank != me:
                    self._open(rank, pid, me)
        except BaseException:
            self.stop()
            raise

    def _open(self, rank: int, pid: int, me: int) -> None:
        if not hasattr(os, "pidfd_open"):
            return
        try:
            self._pidfds[os.pidfd_open(pid)] = rank
        except ProcessLookupError:
            self._gone.add(rank)
        except OSError as e:
            if named := shm.no_descriptors(me, e):
                raise named from e
            # else a kernel or a sandbox without pidfds

    def gone(self) -> set[int]:
        """Ranks whose process is gone."""
        poller = select.poll()
        ranks = dict(self._pidfds)
        for fd in ranks:
            poller.register(fd, select.POLLIN)
        # A descriptor that is closed meanwhile, by a destroy() of another thread, is POLLNVAL.
        self._gone |= {ranks[fd] for fd, event in poller.poll(0) if event & select.POLLIN}
        return set(self._gone)

    def start(self, memories: Sequence[RankMemory], me: int) -> None:
        """Begin to speak for those that go. `memories`: all blocks, mapped here."""
        waker, self._wake = os.pipe()
        self._thread = threading.Thread(
            target=_watch, args=(dict(self._pidfds), set(self._gone), waker, list(memories), me), name="ep-mojo-peers"
        )
        self._thread.daemon = True
        self._thread.start()

    def stop(self) -> None:
        """End the thread, close everything. Can be called again."""
        thread, self._thread = self._thread, None
        if thread is not None:
            os.write(self._wake, b".")
            if thread is not threading.current_thread():
                thread.join()
            os.close(self._wake)
        while self._pidfds:
            with contextlib.suppress(OSError):
                os.close(self._pidfds.popitem()[0])


def _watch(pidfds: dict[int, int], gone: set[int], waker: int, memories: list[RankMemory], me: int) -> None:
    flags = shm.lost_flags(memories[me])
    poller = select.poll()
    for fd in (waker, *pidfds):
        poller.register(fd, select.POLLIN)
    pending: set[int] = set()
    seen: set[int] = set()
    try:
        while True:
            for rank in gone:
                for memory in memories:  # first all flags: whoever sees a failure then knows why
                    if not shm.lost_flags(memory)[rank]:
                        shm.lost_flags(memory)[rank] = DIED
            new = {r for r, flag in enumerate(flags) if flag} - seen
            seen |= new
            pending = {r for r in pending | new if not _speak_for(r, memories, me)}
            fds = [fd for fd, _ in poller.poll(RETRY_MS if pending else LOOK_MS)]
            if waker in fds:
                return
            gone = {pidfds[fd] for fd in fds}
            for fd in fds:
                poller.unregister(fd)
    finally:
        os.close(waker)


def _speak_for(rank: int, memories: Sequence[RankMemory], me: int) -> bool:
    sent = layout.read_epochs(memories[rank].counters)
    return memories[me].publish_departure(rank, sent)
