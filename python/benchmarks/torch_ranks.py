"""What benchmarks with a process and a GPU for each rank share: starting the processes, times, the table."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ep_mojo.comm import one_rank
from ep_mojo.programs import report
from ep_mojo.programs.measures import git_commit

WARMUP = 3
HOST_CALLS = 256
"""Calls whose host time is taken: a median of few says more of caches than of calls."""
BUSY_WAIT = "MODULAR_THREAD_BUSY_WAIT_US", "MODULAR_RUNTIME_THREAD_BUSY_WAIT_TIME_US"
"""MAX aborts unless both say the same."""


class Rank:
    """One process, and how it measures.

    Attributes:
        opts: The command line.
        rank, n_ranks: This process among all.
        device: Its GPU.
        rows: What was measured: name, then figures.
        wrong: Names of results that were wrong.
    """

    def __init__(self, opts: argparse.Namespace, rank: int, n_ranks: int):
        self.opts, self.rank, self.n_ranks = opts, rank, n_ranks
        self.device = torch.device("cuda", rank)
        self.rows: list[dict[str, Any]] = []
        self.wrong: list[str] = []

    def check(self, name: str, got: torch.Tensor, want: torch.Tensor, limit: float = 0.0) -> None:
        """Note a result that is wrong: not equal, or with a relative error over `limit`."""
        if not torch.equal(got, want):
            error = (got.float() - want.float()).norm() / want.float().norm()
            if not error < limit:
                self.wrong.append(f"{name} on rank {self.rank}: relative error {float(error):.2e}")

    def time(self, call: Callable[[], Any]) -> float:
        """Median µs of a call on the GPU, ranks starting together; calls follow one another without a gap."""
        for _ in range(WARMUP):
            call()
        torch.cuda.synchronize()
        dist.barrier()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(self.opts.repeats + 1)]
        marks[0].record()
        for mark in marks[1:]:
            call()
            mark.record()
        torch.cuda.synchronize()
        return statistics.median(a.elapsed_time(b) * 1e3 for a, b in zip(marks, marks[1:], strict=False))

    def replay_time(self, call: Callable[[], Any], times: int = 8) -> float:
        """Median µs of a call, of which `times` are captured and replayed together."""
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(times):
                call()
        return self.time(graph.replay) / times

    def host_time(self, call: Callable[[], Any], row: int = 8) -> float:
        """Median µs until a call returns, of `row` calls one after the other; then the GPUs catch up. With 1 every call
        comes to an idle host and GPU."""
        found = []
        for i in range(HOST_CALLS):
            if i % row == 0:
                torch.cuda.synchronize()
                dist.barrier()
                torch.cuda.synchronize()
            began = time.perf_counter()
            call()
            found.append((time.perf_counter() - began) * 1e6)
        torch.cuda.synchronize()
        return statistics.median(found)

    def max_time(self, call: Callable[[], Any]) -> float:
        """Of `host_time`, µs in which MAX runs the graph that the call launches: its work, and the driver's."""
        found, run = [], one_rank.run_buffers

        def timed(*args: Any) -> Any:
            began = time.perf_counter()
            try:
                return run(*args)
            finally:
                found.append((time.perf_counter() - began) * 1e6)

        one_rank.run_buffers = timed
        try:
            self.host_time(call)
        finally:
            one_rank.run_buffers = run
        return statistics.median(found)

    def note(self, name: str, **figures: float) -> None:
        """Keep the slowest rank's figures."""
        values = torch.tensor(list(figures.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        self.rows.append({"name": name} | dict(zip(figures, values.tolist(), strict=True)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What all of them take."""
    parser.add_argument("--ranks", type=int, default=0, help="GPUs to use (default: all)")
    parser.add_argument("--hidden", type=int, default=7168, help="channels (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=32, help="calls timed on GPUs (default: %(default)s)")
    parser.add_argument(
        "--busy-wait",
        type=int,
        metavar="US",
        help="how long MAX's worker threads look for work before they sleep (default: MAX's, 200)",
    )
    parser.add_argument(
        "--cores",
        type=int,
        metavar="N",
        help="bind each process to so many cores of its own: MAX makes a worker thread for each core that it may use",
    )
    parser.add_argument("--output", metavar="FILE.json", help="write the results as JSON")


def run(opts: argparse.Namespace, body: Callable[[Rank], None]) -> int:
    """Run `body`, a function at the top level of its module, in a process for each GPU; print what was found.

    Returns:
        The exit status: 1 where a result was wrong, 2 without GPUs.
    """
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    n_ranks = opts.ranks or min(there, 8)
    if n_ranks < 2 or n_ranks > there:
        print(f"needs two GPUs or more, and as many as --ranks says; torch sees {there}", file=sys.stderr)
        return 2
    allowed = len(os.sched_getaffinity(0))
    if opts.cores is not None and not 1 <= opts.cores <= allowed // n_ranks:
        print(
            f"--cores {opts.cores}: from 1 to {allowed // n_ranks}, for {allowed} cores and {n_ranks} ranks",
            file=sys.stderr,
        )
        return 2
    if opts.busy_wait is not None:  # the processes inherit it; see docs/torch.md
        os.environ.update(dict.fromkeys(BUSY_WAIT, str(opts.busy_wait)))
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_serve, (n_ranks, opts, body, folder), n_ranks)
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(n_ranks)]
    wrong = [text for each in found for text in each["wrong"]]
    rows = found[0]["rows"]
    if opts.output:
        about = {"gpu": torch.cuda.get_device_name(0), "ranks": n_ranks, "commit": git_commit()}
        sizes = {"host_calls": HOST_CALLS} | {
            name: value for name, value in vars(opts).items() if name not in ("ranks", "output")
        }
        Path(opts.output).write_text(json.dumps(about | sizes | {"rows": rows, "wrong": wrong}, indent=1) + "\n")
    lines = [[r["name"], "  ".join(f"{k} {v:.1f}" for k, v in r.items() if k != "name")] for r in rows]
    print(report.table([f"{n_ranks} x {torch.cuda.get_device_name(0)}", "slowest rank's median"], lines))
    print("\n".join(f"WRONG: {text}" for text in wrong), end="\n" if wrong else "")
    return int(bool(wrong))


def _serve(rank: int, n_ranks: int, opts: argparse.Namespace, body: Callable[[Rank], None], folder: str) -> None:
    if opts.cores is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[rank * opts.cores :][: opts.cores])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{folder}/store", rank=rank, world_size=n_ranks)
    me = Rank(opts, rank, n_ranks)
    body(me)
    Path(folder, f"{rank}.json").write_text(json.dumps({"rows": me.rows, "wrong": me.wrong}))
    dist.barrier()
    dist.destroy_process_group()
