"""`ep_mojo.torch.Buffer` on the GPUs of this machine, a process for each: time, host time, memory, against NCCL.

    torch_buffer.py --output torch_buffer.json

1. normal mode      layout, dispatch and combine of --large tokens a rank for each budget of --sms, and along a handle
2. NCCL             all-to-all of the same rows, there and back, which neither sorts nor sums them
3. low latency      dispatch and combine of --small tokens a rank: by graph replay, and the host's time of eager calls,
                    one after the other (of that MAX's run of a graph: max_us) and by themselves

Results are checked first: with identity experts a token comes back as the sum over its ranks (normal mode) or of its
weights times itself (low latency). Medians over calls, the slowest rank's. Prints a table last; exit status 1 where a
result is wrong, 2 without GPUs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch_ranks import Rank, add_arguments, run

import ep_mojo.torch as ept
from ep_mojo.programs import options

ERROR_LIMIT = 5e-3
PARTS = "low_latency", "normal"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", type=int, default=4096, help="tokens in normal mode (default: %(default)s)")
    parser.add_argument("--small", type=int, default=128, help="tokens in low-latency mode (default: %(default)s)")
    parser.add_argument("--experts", type=int, default=256, help="of all ranks (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=8, help="choices a token (default: %(default)s)")
    parser.add_argument(
        "--parts",
        type=options.words(*PARTS),
        default=",".join(PARTS),
        help="what to measure: low_latency, normal (default: %(default)s)",
    )
    parser.add_argument("--sms", type=options.numbers, default="24,64,128", help="budgets (default: %(default)s)")
    add_arguments(parser)
    return parser.parse_args(argv)


class Measures:
    """What one process measures."""

    def __init__(self, me: Rank):
        self.opts, self.me = me.opts, me

    def inputs(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x bfloat16 [T, H], ids int64 [T, K] without repetitions, weights float32 [T, K] that add up to 1."""
        o, device = self.opts, self.me.device
        g = torch.Generator(device).manual_seed(self.me.rank)
        x = torch.randn(tokens, o.hidden, generator=g, device=device).bfloat16()
        scores = torch.rand(tokens, o.experts, generator=g, device=device)
        weights, ids = scores.topk(o.top_k, 1)
        return x, ids, weights / weights.sum(1, keepdim=True)

    def check(self, name: str, got: torch.Tensor, want: torch.Tensor) -> None:
        """Note a result that is wrong."""
        self.me.check(name, got, want, ERROR_LIMIT)

    def note_host(self, name: str, call: Callable[[], Any]) -> None:
        """Note the host's time of a call, in a row of calls, of that MAX's, and by itself."""
        me = self.me
        me.note(
            f"{name}: the host", host_us=me.host_time(call), max_us=me.max_time(call), idle_us=me.host_time(call, 1)
        )

    def normal(self) -> None:
        """Normal mode, and NCCL with the same rows."""
        o = self.opts
        x, ids, weights = self.inputs(o.large)
        size = ept.sizes.bytes_for(o.large, 2 * o.hidden, self.me.n_ranks)
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

            self.me.note(
                f"normal T={o.large} bf16, {sms} SMs",
                round_us=self.me.time(round_),
                again_us=self.me.time(again),
                dispatch_us=self.me.time(lambda h=handle, c=config: buffer.dispatch(x, handle=h, config=c)),
                combine_us=self.me.time(lambda h=handle, r=recv_x, c=config: buffer.combine(r, h, config=c)),
            )
        config = ept.Config(o.sms[0])
        self.note_host("normal, dispatch along a handle", lambda: buffer.dispatch(x, handle=handle, config=config))
        self.note_host("normal, combine", lambda: buffer.combine(recv_x, handle, config=config))
        self.nccl(x, in_rank)
        buffer.destroy()

    def nccl(self, x: torch.Tensor, in_rank: torch.Tensor) -> None:
        """The same rows there and back by torch's all-to-all."""
        sent = in_rank.sum(0)
        got = torch.empty_like(sent)
        dist.all_to_all_single(got, sent)
        rows = torch.cat([x[in_rank[:, r]] for r in range(self.me.n_ranks)])
        here = rows.new_empty(int(got.sum()), x.shape[1])
        out, into = sent.tolist(), got.tolist()

        def there_and_back():
            dist.all_to_all_single(here, rows, into, out)
            dist.all_to_all_single(rows, here, out, into)

        self.me.note(f"NCCL all-to-all of the same rows, T={x.shape[0]}", round_us=self.me.time(there_and_back))

    def low_latency(self) -> None:
        """Low-latency mode, replayed, and the host's time of eager calls."""
        o = self.opts
        x, ids, weights = self.inputs(o.small)
        size = ept.Buffer.get_low_latency_rdma_size_hint(o.small, o.hidden, self.me.n_ranks, o.experts)
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
            self.me.note(
                f"low latency T={o.small} {'fp8' if fp8 else 'bf16'}",
                round_us=self.me.time(graph.replay),
                eager_us=self.me.time(round_),
                replay_host_us=self.me.host_time(graph.replay),
            )
            self.note_host(f"low latency, dispatch {'fp8' if fp8 else 'bf16'}", dispatch)
        self.note_host("low latency, combine", lambda: buffer.low_latency_combine(rows, ids, weights, handle))
        buffer.check()
        window = buffer._session.made()[0].comm.memories[self.me.rank].block.numel()
        self.me.note(f"low latency, window of a rank, T={o.small}", megabytes=window / 1e6)
        buffer.destroy()


def measure(me: Rank) -> None:
    """One process."""
    for part in me.opts.parts:
        getattr(Measures(me), part)()


if __name__ == "__main__":
    sys.exit(run(arguments(None), measure))
