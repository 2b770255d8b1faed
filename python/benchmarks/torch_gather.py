"""All-gather and reduce-scatter dispatchers on the GPUs of this machine, a process for each, against NCCL.

    torch_gather.py --output torch_gather.json

For each T of --tokens, the same on all ranks, by graph replay: the gather and the reduction of bfloat16 rows by
themselves, against all_gather_into_tensor and reduce_scatter_tensor of the same bytes; and a step of a layer, with
counts, routes and probabilities, against what NCCL takes for those tensors. `link` is the time that the bytes of the
gather need at --rate GB/s: (R - 1) * T * H * 2 bytes into a GPU. Results are checked first: gathered rows bit for bit
against NCCL's, sums against float32 sums in order of ranks.
"""

from __future__ import annotations

import argparse
import sys

import torch
import torch.distributed as dist
from torch_ranks import Rank, add_arguments, run

from ep_mojo.programs import options
from ep_mojo.torch import AllGatherVDispatcher as Dispatcher

EXPERTS = 256


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=options.numbers, default="1,4,16,64,128,512", help="T (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=8, help="choices a token (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=342, help="GB/s of the links (default: %(default)s)")
    add_arguments(parser)
    return parser.parse_args(argv)


def measure(me: Rank) -> None:
    """One process."""
    o, n = me.opts, me.n_ranks
    Dispatcher.allocate_buffers(max(o.tokens), o.top_k, o.hidden, dist.group.WORLD)
    d = Dispatcher(EXPERTS // n, list(range(EXPERTS // n)))
    made = Dispatcher._made()["tokens"]
    for T in o.tokens:
        g = torch.Generator(me.device).manual_seed(me.rank)
        x = torch.randn(T, o.hidden, generator=g, device=me.device).bfloat16()
        ids = torch.randint(EXPERTS, (T, o.top_k), generator=g, device=me.device)
        probs = torch.rand(T, o.top_k, generator=g, device=me.device)
        rows = x.new_empty(n * T, o.hidden)
        all_ids, all_probs = ids.new_empty(n * T, o.top_k), probs.new_empty(n * T, o.top_k)
        own = x.new_empty(T, o.hidden)

        def nccl_step(x=x, ids=ids, probs=probs, rows=rows, all_ids=all_ids, all_probs=all_probs, own=own):
            for into, part in ((rows, x), (all_ids, ids), (all_probs, probs)):
                dist.all_gather_into_tensor(into, part)
            dist.reduce_scatter_tensor(own, rows)

        def step(x=x, ids=ids, probs=probs):
            hidden, _ = d.token_dispatch(*d.dispatch_preprocess(x, ids, probs))
            return d.combine_postprocess(d.token_combine(hidden))

        nccl_step()
        dist.all_gather_into_tensor(rows, x)
        reduced = step()
        me.check(f"gathered, T={T}", made.rows[: n * T], rows)
        me.check(f"routes, T={T}", d.routing_map[: n * T], all_ids)
        me.check(f"reduced, T={T}", reduced, (x.float() * n).bfloat16())
        sent = made.rows.clone()
        me.note(
            f"T={T}",
            gather_us=me.replay_time(lambda x=x, ids=ids, probs=probs: made.gather(x, ids, probs)),
            nccl_gather_us=me.replay_time(lambda x=x, rows=rows: dist.all_gather_into_tensor(rows, x)),
            reduce_us=me.replay_time(lambda sent=sent: made.reduce(sent)),
            nccl_reduce_us=me.replay_time(lambda rows=rows, own=own: dist.reduce_scatter_tensor(own, rows)),
            step_us=me.replay_time(step),
            nccl_step_us=me.replay_time(nccl_step),
            link_us=(n - 1) * T * o.hidden * 2 / o.rate / 1e3,
        )
    Dispatcher.check()
    torch.cuda.synchronize()
    Dispatcher._delete_buffers()


if __name__ == "__main__":
    sys.exit(run(arguments(None), measure))
