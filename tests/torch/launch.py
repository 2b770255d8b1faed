"""Processes of a gloo or nccl group that run functions for tests: `run` for one, `Pool` for many with the same ones.

A process that does not answer in time is told to print its stacks, then all are killed. Functions are found by the name
or the file of their module, so they must be at its top level. What one leaves in `kept` the next one finds there.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

from ep_mojo.comm.causes import raise_first
from ep_mojo.comm.worker import FunctionRef, portable
from ep_mojo.errors import EPError

LOOPBACK = "lo" if sys.platform == "linux" else "lo0"
START_S = 120.0
"""How long processes may take to start: each imports torch."""
GROUP_TIMEOUT_S = 300.0
"""Of the process group."""

kept: dict[Any, Any] = {}
"""What functions keep for later ones, in each process."""


def torchrun(n: int, example: str, *args: str) -> str:
    """Run one of `python/examples` in `n` processes; what they printed. It must end well."""
    root = Path(__file__).parents[2]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    done = subprocess.run(
        [*command, root / "python" / "examples" / example, *args],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"GLOO_SOCKET_IFNAME": LOOPBACK, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Died(EPError, ConnectionError):
    """A process ended while a function ran in it."""


def run(n: int, fn: Callable[..., Any], *args: Any, timeout_s: float = 60.0, **how: Any) -> list[Any]:
    """Call `fn(*args)` in `n` fresh processes that are ranks 0 to n-1 of a gloo group. `how`: as for `Pool.run`."""
    with Pool(n) as pool:
        return pool.run(fn, *args, timeout_s=timeout_s, **how)


class Pool:
    """`n` processes with a default process group, which stay until `close`. Over nccl each has a GPU, where tensors are
    made: one of its own, or one that it shares if there are fewer GPUs than processes.

    Attributes:
        processes: The processes, by rank.
    """

    def __init__(self, n: int, init: bool = True, backend: str = "gloo"):
        """Start them. `init`: False leaves torch.distributed as it is. `backend`: "gloo" or "nccl"."""
        self._folder = tempfile.TemporaryDirectory(prefix="ep-mojo-test-")
        spawn = multiprocessing.get_context("spawn")
        self.processes, self._ends = [], []
        store = f"file://{self._folder.name}/store" if init else None
        for rank in range(n):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(
                target=_serve, args=(theirs, rank, n, self._stacks(rank), store, backend), daemon=True
            )
            process.start()
            theirs.close()
            self.processes.append(process)
            self._ends.append(ours)
        try:
            self._collect(range(n), time.monotonic() + START_S)
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """Process ids, by rank."""
        return [p.pid for p in self.processes]

    def run(
        self,
        fn: Callable[..., Any],
        *args: Any,
        per_rank: Sequence[Sequence[Any]] | None = None,
        ranks: Iterable[int] | None = None,
        timeout_s: float = 60.0,
        raise_errors: bool = True,
    ) -> list[Any]:
        """Call `fn(*args, *per_rank[rank])` in all processes at once, or in those of `ranks`.

        Returns:
            What the calls returned, by rank; None for ranks that were not called. With raise_errors=False an exception
            stands in its place, `Died` where the process has ended.

        Raises:
            Exception: What explains most of what the calls raised; `by_rank` has all.
            TimeoutError: Not all were done in time. All processes are killed then.
        """
        chosen = list(range(len(self._ends)) if ranks is None else ranks)
        ref = FunctionRef(fn.__module__, fn.__qualname__, os.path.abspath(fn.__code__.co_filename))
        for rank in chosen:
            packed = pickle.dumps((*args, *(per_rank[rank] if per_rank else ())))
            with contextlib.suppress(OSError):  # one that is gone: `_collect` says so
                self._ends[rank].send((ref, packed))
        answers = self._collect(chosen, time.monotonic() + timeout_s)
        if raise_errors:
            raise_first({r: value for r, (ok, value) in answers.items() if not ok})
        return [answers[r][1] if r in answers else None for r in range(len(self._ends))]

    def kill(self, rank: int) -> None:
        """Kill a process and wait until it is gone."""
        os.kill(self.pids[rank], signal.SIGKILL)
        self.processes[rank].join(10)

    def close(self) -> None:
        """Kill all processes."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for end in self._ends:
            end.close()
        self._folder.cleanup()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _collect(self, ranks: Iterable[int], deadline: float) -> dict[int, tuple[bool, Any]]:
        answers: dict[int, tuple[bool, Any]] = {}
        missing = {self._ends[r]: r for r in ranks}
        while missing:
            ready = connection.wait(list(missing), max(0.0, deadline - time.monotonic()))
            if not ready:
                self._give_up(sorted(missing.values()), answers)
            for end in ready:
                rank = missing.pop(end)
                try:
                    answers[rank] = end.recv()
                except (EOFError, OSError):
                    self.processes[rank].join(5)
                    answers[rank] = False, Died(f"rank {rank} ended with exit code {self.processes[rank].exitcode}")
        return answers

    def _give_up(self, late: list[int], answers: dict[int, tuple[bool, Any]]) -> None:
        for rank in late:
            with contextlib.suppress(OSError):
                os.kill(self.pids[rank], signal.SIGCONT)
                os.kill(self.pids[rank], signal.SIGUSR1)
        time.sleep(1)
        for process in self.processes:
            process.kill()
        failed = "".join(f"\nrank {r} raised {value!r}" for r, (ok, value) in answers.items() if not ok)
        stacks = "".join(f"\nrank {rank} was at\n{self._stacks(rank).read_text()}" for rank in late)
        raise TimeoutError(f"ranks {late} were not done in time{failed}{stacks}")

    def _stacks(self, rank: int) -> Path:
        return Path(self._folder.name, f"stacks-{rank}")


def _serve(end: connection.Connection, rank: int, n: int, stacks: Path, store: str | None, backend: str) -> None:
    faulthandler.register(signal.SIGUSR1, file=stacks.open("w"), all_threads=True)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        if backend == "nccl":
            gpu = rank % torch.cuda.device_count()
            if n > torch.cuda.device_count():
                _share_gpus(rank)
            torch.cuda.set_device(gpu)
            torch.set_default_device(f"cuda:{gpu}")
        if store is not None:
            from datetime import timedelta

            timeout = timedelta(seconds=GROUP_TIMEOUT_S)
            dist.init_process_group(backend, init_method=store, rank=rank, world_size=n, timeout=timeout)
        end.send((True, None))
    except BaseException as e:
        end.send((False, portable(e, f"rank {rank}")))
        return
    while True:
        try:
            ref, packed = end.recv()
        except EOFError:
            os._exit(0)
        end.send(_answer(ref, packed, rank))


def _share_gpus(rank: int) -> None:
    """Let ranks have one GPU: NCCL takes them for hosts of their own and goes over the loopback interface, torch maps
    memory of one GPU in several processes. Their kernels take turns on it."""
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    os.environ |= {"NCCL_HOSTID": f"ep-mojo-{rank}", "NCCL_SOCKET_IFNAME": LOOPBACK, "NCCL_IB_DISABLE": "1"}


def _answer(ref: FunctionRef, packed: bytes, rank: int) -> tuple[bool, Any]:
    try:
        value = ref.load()(*pickle.loads(packed))
        pickle.dumps(value)
        return True, value
    except BaseException as e:
        return False, portable(e, f"rank {rank}")
