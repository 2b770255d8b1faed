"""`ep_mojo.torch.Buffer` on the GPUs of this machine, a process for each: time, host time, memory, against NCCL.

    torch_buffer.py --output torch_buffer.json

1. normal mode      layout, dispatch and combine of --large tokens a rank for each budget of --sms, and along a handle
2. NCCL             all-to-all of the same rows, there and back, which neither sorts nor sums them
3. low latency      dispatch and combine of --small tokens a rank: by graph replay, and the host's time of eager calls

Results are checked first: with identity experts a token comes back as the sum over its ranks (normal mode) or of its
weights times itself (low latency). Medians over calls, the slowest rank's. Prints a table last; exit status 1 where a
result is wrong, 2 without GPUs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import ep_mojo.torch as ept
from ep_mojo.programs import options, report
from ep_mojo.programs.measures import git_commit

ERROR_LIMIT = 5e-3


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=0, help="GPUs to use (default: all)")
    parser.add_argument("--large", type=int, default=4096, help="tokens in normal mode (default: %(default)s)")
    parser.add_argument("--small", type=int, default=128, help="tokens in low-latency mode (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=7168, help="channels (default: %(default)s)")
    parser.add_argument("--experts", type=int, default=256, help="of all ranks (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=8, help="choices a token (default: %(default)s)")
    parser.add_argument("--sms", type=options.numbers, default="24,64,128", help="budgets (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=30, help="calls timed (default: %(default)s)")
    parser.add_argument("--output", metavar="FILE.json", help="write the results as JSON")
    return parser.parse_args(argv)


class Rank:
    """One process: its inputs, and how it measures.

    Attributes:
        rows: What was measured: name, then figures.
        wrong: Names of results that were wrong.
    """

    def __init__(self, opts: argparse.Namespace, rank: int, n_ranks: int):
        self.opts, self.rank, self.n_ranks = opts, rank, n_ranks
        self.device = torch.device("cuda", rank)
        self.rows: list[dict[str, Any]] = []
        self.wrong: list[str] = []

    def inputs(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x bfloat16 [T, H], ids int64 [T, K] without repetitions, weights float32 [T, K] that add up to 1."""
        o, g = self.opts, torch.Generator(self.device).manual_seed(self.rank)
        x = torch.randn(tokens, o.hidden, generator=g, device=self.device).bfloat16()
        scores = torch.rand(tokens, o.experts, generator=g, device=self.device)
        weights, ids = scores.topk(o.top_k, 1)
        return x, ids, weights / weights.sum(1, keepdim=True)

    def check(self, name: str, got: torch.Tensor, want: torch.Tensor) -> None:
        """Note a result that is wrong."""
        error = (got.float() - want.float()).norm() / want.float().norm()
        if not error < ERROR_LIMIT:
            self.wrong.append(f"{name} on rank {self.rank}: relative error {float(error):.2e}")

    def time(self, call: Callable[[], Any]) -> float:
        """Median µs of a call on the GPU, ranks starting together; calls follow one another without a gap."""
        for _ in range(3):
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

    def host_time(self, call: Callable[[], Any]) -> float:
        """Median µs until a call returns, the GPU being idle."""
        found = []
        for _ in range(self.opts.repeats):
            torch.cuda.synchronize()
            dist.barrier()
            torch.cuda.synchronize()
            began = time.perf_counter()
            call()
            found.append((time.perf_counter() - began) * 1e6)
        torch.cuda.synchronize()
        return statistics.median(found)

    def note(self, name: str, **figures: float) -> None:
        """Keep the slowest rank's figures."""
        values = torch.tensor(list(figures.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        self.rows.append({"name": name} | dict(zip(figures, values.tolist(), strict=True)))

    def normal(self) -> None:
        """Normal mode, and NCCL with the same rows."""
        o = self.opts
        x, ids, weights = self.inputs(o.large)
        size = ept.sizes.bytes_for(o.large, 2 * o.hidden, self.n_ranks)
        buffer = ept.Buffer(dist.group.WORLD, size)
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, o.experts)
        layout = {"num_tokens_per_rank": per_rank, "is_token_in_rank": in_rank, "num_tokens_per_expert": per_expert}
        top = {"topk_idx": ids, "topk_weights": weights}
        want = x.float() * in_rank.sum(1, keepdim=True)
        for sms in o.sms:
            config = ept.Config(sms)

            def dispatch(config=config):
                return buffer.dispatch(x, **layout, **top, config=config)

            recv_x, *_, handle, _ = dispatch()
            self.check(f"normal, {sms} SMs", buffer.combine(recv_x, handle, config=config)[0], want)

            def again(config=config, handle=handle):
                rows = buffer.dispatch(x, handle=handle, config=config)[0]
                return buffer.combine(rows, handle, config=config)[0]

            self.check(f"normal again, {sms} SMs", again(), want)

            def round_(config=config):
                rows, *_, h, _ = dispatch(config)
                buffer.combine(rows, h, config=config)

            self.note(
                f"normal T={o.large} bf16, {sms} SMs",
                round_us=self.time(round_),
                again_us=self.time(again),
                dispatch_us=self.time(lambda h=handle, c=config: buffer.dispatch(x, handle=h, config=c)),
                combine_us=self.time(lambda h=handle, r=recv_x, c=config: buffer.combine(r, h, config=c)),
            )
        config = ept.Config(o.sms[0])
        host = self.host_time(lambda: buffer.dispatch(x, handle=handle, config=config))
        self.note("normal, host time of dispatch along a handle", host_us=host)
        host = self.host_time(lambda: buffer.combine(recv_x, handle, config=config))
        self.note("normal, host time of combine", host_us=host)
        self.nccl(x, in_rank)
        buffer.destroy()

    def nccl(self, x: torch.Tensor, in_rank: torch.Tensor) -> None:
        """The same rows there and back by torch's all-to-all."""
        sent = in_rank.sum(0)
        got = torch.empty_like(sent)
        dist.all_to_all_single(got, sent)
        rows = torch.cat([x[in_rank[:, r]] for r in range(self.n_ranks)])
        here = rows.new_empty(int(got.sum()), x.shape[1])
        out, into = sent.tolist(), got.tolist()

        def there_and_back():
            dist.all_to_all_single(here, rows, into, out)
            dist.all_to_all_single(rows, here, out, into)

        self.note(f"NCCL all-to-all of the same rows, T={x.shape[0]}", round_us=self.time(there_and_back))

    def low_latency(self) -> None:
        """Low-latency mode, replayed, and the host's time of eager calls."""
        o = self.opts
        x, ids, weights = self.inputs(o.small)
        size = ept.Buffer.get_low_latency_rdma_size_hint(o.small, o.hidden, self.n_ranks, o.experts)
        buffer = ept.Buffer(dist.group.WORLD, 0, size, low_latency_mode=True)
        rows = None
        for fp8 in (False, True):

            def dispatch(fp8=fp8):
                return buffer.low_latency_dispatch(x, ids, o.small, o.experts, use_fp8=fp8)

            recv_x, _, handle, _, _ = dispatch()
            if not fp8:
                rows = recv_x
            self.check("low latency", buffer.low_latency_combine(rows, ids, weights, handle)[0], x)

            def round_(dispatch=dispatch, rows=rows):
                _, _, h, _, _ = dispatch()
                return buffer.low_latency_combine(rows, ids, weights, h)[0]

            round_()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                combined = round_()
            combined.zero_()
            graph.replay()
            self.check("low latency, replayed", combined, x)
            self.note(
                f"low latency T={o.small} {'fp8' if fp8 else 'bf16'}",
                round_us=self.time(graph.replay),
                eager_us=self.time(round_),
                host_us=self.host_time(dispatch),
                replay_host_us=self.host_time(graph.replay),
            )
        host = self.host_time(lambda: buffer.low_latency_combine(rows, ids, weights, handle))
        self.note("low latency, host time of combine", host_us=host)
        buffer.check()
        window = buffer._session.made()[0].comm.memories[self.rank].block.numel()
        self.note(f"low latency, window of a rank, T={o.small}", megabytes=window / 1e6)
        buffer.destroy()


def serve(rank: int, n_ranks: int, opts: argparse.Namespace, folder: str) -> None:
    """One process."""
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{folder}/store", rank=rank, world_size=n_ranks)
    me = Rank(opts, rank, n_ranks)
    me.low_latency()
    me.normal()
    Path(folder, f"{rank}.json").write_text(json.dumps({"rows": me.rows, "wrong": me.wrong}))
    dist.barrier()
    dist.destroy_process_group()


def main(argv: list[str] | None = None) -> int:
    """Start the processes, and print what they found."""
    opts = arguments(argv)
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    n_ranks = opts.ranks or min(there, 8)
    if n_ranks < 2 or n_ranks > there:
        print(f"needs two GPUs or more, and as many as --ranks says; torch sees {there}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(serve, (n_ranks, opts, folder), n_ranks)
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(n_ranks)]
    wrong = [text for each in found for text in each["wrong"]]
    rows = found[0]["rows"]
    if opts.output:
        about = {"gpu": torch.cuda.get_device_name(0), "ranks": n_ranks, "commit": git_commit()}
        sizes = {name: getattr(opts, name) for name in ("large", "small", "hidden", "experts", "top_k", "repeats")}
        Path(opts.output).write_text(json.dumps(about | sizes | {"rows": rows, "wrong": wrong}, indent=1) + "\n")
    lines = [[r["name"], "  ".join(f"{k} {v:.1f}" for k, v in r.items() if k != "name")] for r in rows]
    print(report.table([f"{n_ranks} x {torch.cuda.get_device_name(0)}", "slowest rank's median"], lines))
    print("\n".join(f"WRONG: {text}" for text in wrong), end="\n" if wrong else "")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
