"""What the ranks of a group tell one another outside of rounds, through the group's key-value store.

Unlike a collective of the group, every wait here ends at the deadline, so that a rank which never comes is named and
hangs nobody, and at once where its process is known to be gone; and a rank may leave a note that others look for
without waiting.
"""

from __future__ import annotations

import pickle
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_process_group_store

from ..errors import ConfigMismatchError, PeerLostError, PeerTimeoutError
from .watch import KNOWN_PIDS, PeerWatch

GRACE_S = 0.2
POLL_S = 0.001
"""How often who waits asks the store."""
LOOK_S = 0.1
"""How often who waits looks at the processes of the others."""

_boards: weakref.WeakKeyDictionary[Any, Board] = weakref.WeakKeyDictionary()


class Board:
    """One for each group and process.

    Attributes:
        rank, size: This process in the group.
    """

    def __init__(self, group: dist.ProcessGroup):
        """Use `board_of`: agreements of a group are numbered, all in one sequence."""
        self.rank, self.size = group.rank(), group.size()
        store = dist.PrefixStore("ep_mojo", _get_process_group_store(group))
        # A group that is made again may find the store of the first one, and what was agreed there.
        with _named():
            life = store.add(f"lives/{self.rank}", 1)
        self._store = dist.PrefixStore(f"life {life}", store)
        self._agreements, self._turn = 0, threading.Lock()
        self._group = weakref.ref(group)
        self._watch: PeerWatch | None = None

    def agree(self, what: str, value: Any, timeout_s: float, given_up: threading.Event | None = None) -> list[Any]:
        """All ranks' values, in order of rank. Every rank calls this with its own, in the same order of calls.

        Args:
            what: What the ranks are about to do, for errors; all have to name the same.
            value: Anything that can be pickled.
            timeout_s: How long to wait for the others; 0 = for ever.
            given_up: Set by another thread, when nobody needs the answer any more.

        Raises:
            PeerTimeoutError: A rank did not come, or this call was given up.
            PeerLostError: The process that has the group's store is gone; or that of a rank which did not come, where
                the group has had a communicator.
            ConfigMismatchError: A rank came with something else in mind.
        """
        with self._turn, _named():
            number = self._agreements
            before = str(number - 1) if number else None
            found = self._gather(str(number), before, (what, value), what, timeout_s, given_up or threading.Event())
            self._agreements += 1
        if any(name != what for name, _ in found):
            raise ConfigMismatchError(
                f"rank {self.rank}: ranks call different things: "
                + "; ".join(f"rank {r}: {name}" for r, (name, _) in enumerate(found)),
                remedy="make the same calls in the same order on every rank of the group",
            )
        return [value for _, value in found]

    def exchange(self, name: str, turn: int, what: str, value: Any, timeout_s: float) -> list[Any]:
        """All ranks' values, in order of rank, outside of the sequence of agreements: a rank that does not come to this
        does not keep the others from agreeing later.

        Args:
            name: Of what is exchanged; the same on all ranks.
            turn: 0, 1, ... for each name; the same on all ranks. Who comes to one has had the one before.
            what: What the ranks are doing, for errors.
            value: Anything that can be pickled.
            timeout_s: How long to wait for the others; 0 = for ever.

        Raises:
            PeerTimeoutError, PeerLostError: See `agree`.
        """
        with self._turn, _named():
            before = f"{name}/{turn - 1}" if turn else None
            return self._gather(f"{name}/{turn}", before, value, what, timeout_s, threading.Event())

    def _gather(
        self, key: str, before: str | None, value: Any, what: str, timeout_s: float, given_up: threading.Event
    ) -> list[Any]:
        """What all ranks set for a key; what this one has set for the key before goes."""
        mine = f"{key}/{self.rank}"
        self._store.set(mine, pickle.dumps(value))
        keys = [f"{key}/{r}" for r in range(self.size)]
        end = time.monotonic() + (timeout_s or float("inf"))
        look = time.monotonic() + LOOK_S
        while not self._store.check(keys):  # not `wait`: another thread of this process may want the store meanwhile
            now = time.monotonic()
            if now < end and not given_up.wait(POLL_S):
                if now > look:
                    look = now + LOOK_S
                    self._look(what, keys)
                continue
            missing = self._missing(keys)
            if not given_up.is_set():
                time.sleep(GRACE_S)  # who gives up at the same time is to see who came, too
                if self._store.check(keys):  # and who comes in it has come
                    break
            self._store.delete_key(mine)
            raise PeerTimeoutError(
                f"rank {self.rank}: {what}: in {timeout_s:g} s rank {', '.join(map(str, missing))} did not come, or "
                "has given up",
                remedy="make the same calls with the same sizes on every rank of the group",
            )
        found = [pickle.loads(self._store.get(key)) for key in keys]
        # Whoever waits for this key has read the one before it.
        if before is not None:
            self._store.delete_key(f"{before}/{self.rank}")
        return found

    def _missing(self, keys: list[str]) -> list[int]:
        return [r for r, key in enumerate(keys) if not self._store.check([key])]

    def _look(self, what: str, keys: list[str]) -> None:
        """Raise where the process of a rank is gone that has not come."""
        if self._watch is None:
            group = self._group()
            if group is None or group not in KNOWN_PIDS:
                return
            self._watch = PeerWatch(KNOWN_PIDS[group], self.rank)
            weakref.finalize(self, self._watch.stop)
        gone = self._watch.gone()
        # What one has said before it went is good; the store is asked only where one is gone.
        if gone and (lost := sorted(gone.intersection(self._missing(keys)))):
            self._store.delete_key(keys[self.rank])
            raise PeerLostError(
                f"rank {self.rank}: {what}: the process of rank {', '.join(map(str, lost))} is gone",
                remedy="make a new process group, of the ranks that are left",
            )

    def agree_on(self, what: str, value: dict[str, Any], timeout_s: float) -> str:
        """`agree` on equal values. Returns a name for what was agreed: the same on all ranks, and never used again.

        Raises:
            ConfigMismatchError: On all ranks alike; names what differs, and how.
        """
        found = self.agree(what, value, timeout_s)
        for name in value:
            given = [f.get(name) for f in found]
            if any(g != given[0] for g in given):
                raise ConfigMismatchError(
                    f"{what}: ranks differ: " + ", ".join(f"rank {r}: {g!r}" for r, g in enumerate(given)),
                    field=name,
                    value=value[name],
                    allowed="the same on every rank",
                    remedy=f"pass one {name} everywhere",
                )
        return f"agreed/{self._agreements}"

    def leave(self, key: str, text: str) -> None:
        """Leave a note of this rank. Whoever looks for it after this call finds it."""
        with _named():
            self._store.set(f"{key}/{self.rank}", text)
            self._store.get(f"{key}/{self.rank}")  # a set may still be under way when it returns

    def take_back(self, key: str) -> None:
        """Remove this rank's note."""
        with _named():
            self._store.delete_key(f"{key}/{self.rank}")

    def notes(self, key: str) -> dict[int, str]:
        """The notes that ranks have left, by rank. Waits for nothing."""
        keys = {r: f"{key}/{r}" for r in range(self.size)}
        with _named():
            return {r: self._store.get(k).decode() for r, k in keys.items() if self._store.check([k])}


@contextmanager
def _named() -> Iterator[None]:
    """Name what the store raises when there is nobody to ask any more."""
    try:
        yield
    except RuntimeError as e:  # what the store raises derives from it
        raise PeerLostError(
            f"the group's store cannot be asked ({e})",
            allowed="a process of rank 0 that is there, which has the store of most groups",
            remedy="make a new process group, of the ranks that are left",
        ) from e


def board_of(group: dist.ProcessGroup) -> Board:
    """The board of a group."""
    if group not in _boards:
        _boards[group] = Board(group)
    return _boards[group]
