"""Worker processes as their parent sees them: start, ask, collect answers, notice deaths, end.

A worker is a fresh interpreter with the parent's `sys.path`, so that no start method and no `__main__` guard matters.
It ends by itself when its control socket closes, however the parent went. A request is (number, verb, payload), its
answer (number, ok, value or exception). Requests are numbered 1, 2, ... Answers that nobody waits for any more are
dropped by number. Who waits looks around four times a second.
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

from ..errors import EPError, PeerLostError, PeerTimeoutError
from .channel import TICK_S, Channel, ChannelError
from .signals import deferred

BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from ep_mojo.comm.worker import main; main(int(sys.argv[1]), int(sys.argv[3]))"
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
                    [
                        *(sys.executable, "-c", BOOT, str(theirs.fileno())),
                        *(json.dumps([str(p) for p in sys.path]), str(os.getpid())),
                    ],
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

    def request(self, verb: str, *payload: Any, fds: Sequence[int] = (), look: Look | None = None) -> int:
        """Send a request; returns its number. A worker that is gone is marked, not raised.

        A large one waits until the worker reads, which one that still writes an answer does not: let it answer first.
        `look` is called with this worker meanwhile. Where it or a signal handler raises, `collect` sends the rest.

        Raises:
            Exception: The payload cannot be pickled; nothing was sent.
        """
        with deferred():
            self.channel.post((self.sent + 1, verb, payload), fds)
            self.sent += 1
        try:
            self.channel.flush(lambda: None if look is None else look([self]))
        except ChannelError:
            self.bury()
        return self.sent

    def push(self) -> bool:
        """Send what is left of requests as far as the worker takes it; returns whether that is all."""
        try:
            return self.channel.push()
        except ChannelError:
            self.bury()
            return True

    def poll(self) -> tuple[int, bool, Any] | None:
        """The next answer if it is there: (number, ok, value). A worker that is gone is marked and gives None."""
        if not self.alive:
            return None
        if self._answer is None:
            try:
                with deferred():
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


Look = Callable[[Sequence[Worker]], None]
"""Called now and then with the workers that are waited for. It may raise."""


class Patience:
    """A `Look` that ends the waiting for a worker whose process has been stopped for too long.

    What runs may take any time, as functions of users do. A process that is stopped by SIGSTOP does nothing, and its
    peers have given up after that time. A debugger's stop is another state, and does not count.
    """

    def __init__(self, timeout_s: float, ranks: Sequence[Worker]):
        """`timeout_s`: how long it may be stopped, 0 = for ever. `ranks`: all workers, by rank."""
        self.timeout_s = timeout_s
        self.ranks = ranks
        self._since: dict[int, float] = {}

    def __call__(self, waited_for: Sequence[Worker]) -> None:
        """Raise `PeerTimeoutError` if one of these workers has been stopped for longer than allowed."""
        now = time.monotonic()
        stopped = {w.process.pid: now for w in waited_for if self.timeout_s and process_state(w.process.pid) == "T"}
        self._since = {pid: self._since.get(pid, begin) for pid, begin in stopped.items()}
        late = [pid for pid, begin in self._since.items() if now - begin > self.timeout_s]
        if late:
            rank, pid = min((r, w.process.pid) for r, w in enumerate(self.ranks) if w.process.pid in late)
            raise PeerTimeoutError(
                f"rank {rank}: its process (pid {pid}) has been stopped, as by SIGSTOP, for more than timeout_s = "
                f"{self.timeout_s:g} s",
                remedy=f"let it go on (kill -CONT {pid}) and call comm.reset(), or give up with comm.destroy()",
            )


def process_state(pid: int) -> str | None:
    """State of a process as in ps: "R", "S", "T" for stopped, ... None where the system does not tell."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            return f.read().rpartition(b")")[2].split()[0].decode()
    except (OSError, IndexError):
        return None


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
    look: Look | None = None,
) -> dict[int, tuple[bool, Any]]:
    """Wait for the answers to requests, and see to it that deaths are noticed meanwhile.

    Args:
        workers: All of them, by rank.
        numbers: The request number to wait for, by rank.
        on_lost: Called with the rank of every worker, waited for or not, that turns out to be gone.
        deadline: `time.monotonic()` at which to stop; ranks without an answer are left out then.
        look: Called now and then with the workers that have not answered.

    Returns:
        (ok, value or exception) by rank; a rank that is gone gives its `PeerLostError`.
    """
    answers: dict[int, tuple[bool, Any]] = {}

    def lose(rank: int) -> None:
        answers[rank] = False, lost_error(rank, workers[rank])
        on_lost(rank)

    with selectors.DefaultSelector() as selector:
        for rank, worker in enumerate(workers):
            if worker.alive:
                write = selectors.EVENT_WRITE if worker.channel.pending else 0
                selector.register(worker.channel, selectors.EVENT_READ | write, rank)
            else:
                lose(rank)
        next_look = time.monotonic() + TICK_S
        while not numbers.keys() <= answers.keys():
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                break
            if now >= next_look:
                for rank in numbers.keys() - answers.keys():
                    if not workers[rank].alive:  # a destroy() of another thread, or of a signal handler
                        lose(rank)
                if look is not None:
                    look([workers[r] for r in sorted(numbers.keys() - answers.keys())])
                next_look = now + TICK_S
            until = next_look if deadline is None else min(next_look, deadline)
            for key, events in selector.select(max(0.0, until - now)):
                rank = key.data
                if events & selectors.EVENT_WRITE and workers[rank].push() and workers[rank].alive:
                    selector.modify(key.fileobj, selectors.EVENT_READ, rank)
                answer = workers[rank].poll()
                if not workers[rank].alive:
                    selector.unregister(key.fileobj)
                    lose(rank)
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
