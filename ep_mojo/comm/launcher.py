"""Worker processes as their parent sees them: start, ask, collect answers, notice deaths, end.

A worker is a fresh interpreter with the parent's `sys.path`, so that no start method and no `__main__` guard matters.
It ends by itself when its control socket closes, however the parent went. A request is (number, verb, payload), its
answer (number, ok, value or exception). Answers that nobody waits for any more are dropped by number.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..errors import EPError, PeerLostError
from .channel import Channel, ChannelError

BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from ep_mojo.comm.worker import main; main(int(sys.argv[1]))"
)
LOST_REMEDY = "destroy() this communicator, or make one over the others: Communicator.processes(cfg, workers_of=comm)"
LEAVE_S = 5.0
"""How long a worker may take to end before it is killed."""
REAP_S = 2.0
"""How long to wait for the exit status of a worker whose socket is closed."""


class Worker:
    """One worker process.

    Attributes:
        process: The process.
        alive: False once its socket has closed or broken.
        sent: Number of the last request.
        answered: Number of the last answer.
    """

    def __init__(self):
        """Start the process. It answers the first request when its interpreter is up."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with theirs:
                self.process = subprocess.Popen(
                    [sys.executable, "-c", BOOT, str(theirs.fileno()), json.dumps([str(p) for p in sys.path])],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,  # a Ctrl-C in the terminal is the parent's to handle
                )
        except BaseException:
            ours.close()
            raise
        self.channel = Channel(ours)
        self.alive = True
        self.sent = self.answered = 0
        self._answer: list[Any] | None = None

    def request(self, verb: str, *payload: Any, fds: Sequence[int] = ()) -> int:
        """Send a request; returns its number. A worker that is gone is marked, not raised.

        A large one waits until the worker reads, which one that still writes an answer does not: let it answer first.

        Raises:
            Exception: The payload cannot be pickled; nothing was sent.
        """
        whole = self.channel.sent
        self.sent += 1
        try:
            self.channel.send((self.sent, verb, payload), fds)
        except ChannelError:
            self.bury()
        except BaseException:
            if self.channel.broken:  # cut in the middle of the message: nothing can follow it
                self.bury()
            elif self.channel.sent == whole:  # a Ctrl-C may come when it has just been sent
                self.sent -= 1
            raise
        return self.sent

    def poll(self) -> tuple[int, bool, Any] | None:
        """The next answer if it is there: (number, ok, value). A worker that is gone is marked and gives None."""
        if not self.alive:
            return None
        if self._answer is None:
            try:
                self._answer = self.channel.receive(wait=False)
            except ChannelError:
                self.bury()
        if self._answer is None:
            return None
        # Kept until its number is known: a Ctrl-C in between must not make it an answer that never comes.
        number, ok, value = _decode(self._answer, self.sent)
        self.answered, self._answer = number, None
        return number, ok, value

    def bury(self) -> None:
        """Mark the worker as gone and make sure that it is."""
        self.alive = False
        self.channel.close()
        try:
            self.process.wait(REAP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def fate(self) -> str:
        """How the process ended, in words."""
        code = self.process.poll()
        if code is None:
            return "is running"
        if code < 0:
            try:
                return f"was killed by {signal.Signals(-code).name}"
            except ValueError:
                return f"was killed by signal {-code}"
        return f"ended with exit code {code}"


def _decode(parts: list[Any], expected: int) -> tuple[int, bool, Any]:
    try:
        return Channel.decode(parts)
    except Exception as e:
        return expected, False, EPError(f"the answer of a worker cannot be unpickled here: {type(e).__name__}: {e}")


def lost_error(rank: int, worker: Worker) -> PeerLostError:
    """The error for a worker that is gone. `rank` is also its attribute."""
    error = PeerLostError(
        f"rank {rank}: its process (pid {worker.process.pid}) {worker.fate()}",
        remedy=LOST_REMEDY,
    )
    error.rank = rank  # type: ignore[attr-defined]
    return error


def collect(
    workers: Sequence[Worker],
    numbers: dict[int, int],
    on_lost: Callable[[int], None],
    deadline: float | None = None,
) -> dict[int, tuple[bool, Any]]:
    """Wait for the answers to requests, and see to it that deaths are noticed meanwhile.

    Args:
        workers: All of them, by rank.
        numbers: The request number to wait for, by rank.
        on_lost: Called with the rank of every worker, waited for or not, that turns out to be gone.
        deadline: `time.monotonic()` at which to stop; ranks without an answer are left out then.

    Returns:
        (ok, value or exception) by rank; a rank that is gone gives its `PeerLostError`.
    """
    answers: dict[int, tuple[bool, Any]] = {}
    with selectors.DefaultSelector() as selector:
        for rank, worker in enumerate(workers):
            if worker.alive:
                selector.register(worker.channel, selectors.EVENT_READ, rank)
            else:
                answers[rank] = False, lost_error(rank, worker)
                on_lost(rank)
        while not numbers.keys() <= answers.keys():
            wait = None if deadline is None else deadline - time.monotonic()
            if wait is not None and wait <= 0:
                break
            for key, _ in selector.select(wait):
                rank = key.data
                answer = workers[rank].poll()
                if not workers[rank].alive:
                    selector.unregister(key.fileobj)
                    answers[rank] = False, lost_error(rank, workers[rank])
                    on_lost(rank)
                elif answer is not None and answer[0] == numbers.get(rank):
                    answers[rank] = answer[1:]
    return {rank: answers[rank] for rank in numbers if rank in answers}


def dismiss(workers: Iterable[Worker]) -> None:
    """End workers: close their sockets, wait, kill those that stay. Never raises."""
    workers = list(workers)
    for worker in workers:
        worker.alive = False
        with contextlib.suppress(OSError):
            worker.channel.close()
    end = time.monotonic() + LEAVE_S
    for worker in workers:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            try:
                worker.process.wait(max(0.0, end - time.monotonic()))
            except BaseException:
                worker.process.kill()
                worker.process.wait()
                raise


def dismiss_at_exit(workers: list[Worker], pid: int) -> None:
    """`dismiss`, unless this is a forked copy of the process that started the workers."""
    if os.getpid() == pid:
        dismiss(workers)
