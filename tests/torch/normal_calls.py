"""What processes run for the tests of normal mode. Each call checks its own rank, and raises where it is wrong."""

from __future__ import annotations

import torch
import torch.distributed as dist

import ep_mojo.torch as ept
from tests.torch import plain
from tests.torch.launch import kept

HIDDEN, TOP_K, LOCAL = 64, 3, 4
TMAX = 40


def group(n: int):
    """The group of the first n processes; all processes of the pool call this together the first time."""
    if ("group", n) not in kept:
        kept["group", n] = dist.group.WORLD if n == dist.get_world_size() else dist.new_group(list(range(n)))
    return kept["group", n]


def nvl_bytes(n: int, tokens: int = TMAX, hidden: int = HIDDEN) -> int:
    """`num_nvl_bytes` for Tmax tokens."""
    from ep_mojo.torch.sizes import bytes_for

    return bytes_for(tokens, 2 * hidden, n)


def buffer(n: int) -> ept.Buffer | None:
    """The buffer over n ranks that calls share; None where this process is none of them."""
    made = group(n)
    if dist.get_rank() >= n:
        return None
    if ("buffer", n) not in kept:
        kept["buffer", n] = ept.Buffer(made, nvl_bytes(n))
    return kept["buffer", n]


def step_of(n: int, seed: int, sizes=None, kind="mixed", hidden=HIDDEN) -> plain.Step:
    sizes = [(seed * 7 + 11 * r) % TMAX + 1 for r in range(n)] if sizes is None else sizes
    return plain.draw(seed, sizes, hidden, TOP_K, LOCAL * n, kind)


def check_layout(n: int, seed: int, kind: str) -> None:
    if (b := buffer(n)) is None:
        return
    step = step_of(n, seed, kind=kind)
    ids = step.ids[b.rank]
    per_rank, per_rdma_rank, per_expert, in_rank, event = b.get_dispatch_layout(ids, step.n_experts, async_finish=True)
    event.current_stream_wait()
    want = torch.stack([(step.local(r, b.rank) >= 0).any(1) for r in range(n)], 1)
    plain.same("is_token_in_rank", in_rank, want)
    plain.same("num_tokens_per_rank", per_rank, want.sum(0).int())
    plain.same("num_tokens_per_expert", per_expert, torch.bincount(ids[ids >= 0], minlength=step.n_experts).int())
    assert per_rdma_rank is None


def check_round(n: int, seed: int, sizes=None, kind="mixed", alignment=1, strided=False) -> None:
    """Dispatch, combine with 0, 1 and 2 biases and with weights."""
    if (b := buffer(n)) is None:
        return
    step = step_of(n, seed, sizes, kind)
    me = b.rank
    x, ids, weights = step.x[me], step.ids[me], step.weights[me]
    if strided:
        x, ids, weights = (torch.stack([v, v], 2)[..., 0] for v in (x, ids, weights))
        assert not (x.is_contiguous() and x.numel())
    recv_x, recv_ids, recv_weights, counts, handle, _ = b.dispatch(
        x, topk_idx=ids, topk_weights=weights, expert_alignment=alignment, **plain.layout(b, step)
    )
    want_ids, want_weights = plain.local_choices(step, me)
    plain.same("recv_x", recv_x, plain.received(step, me))
    plain.same("recv_topk_idx", recv_ids, want_ids)
    plain.same("recv_topk_weights", recv_weights, want_weights)
    true = torch.bincount(want_ids[want_ids >= 0], minlength=step.n_local).tolist()
    assert counts == [-(-c // alignment) * alignment for c in true]
    token = [torch.arange(len(v), dtype=torch.int32)[:, None] for v in step.x]
    plain.same("recv_src_idx", handle.recv_src_idx[:, None], plain.received(step, me, token))
    assert handle.num_recv_tokens == int(handle.recv_count) == len(recv_x)

    ys = plain.outputs(step, seed + 1)
    biases = tuple(torch.randn(x.shape, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(2))
    for given in (None, biases[0], (biases[0],), biases, (biases[0], None)):
        listed = [v for v in (given if isinstance(given, tuple) else (given,)) if v is not None]
        combined, none, _ = b.combine(ys[me], handle, bias=given)
        plain.same(f"{len(listed)} biases", combined, plain.reduced(step, me, ys, tuple(listed)).bfloat16())
        assert none is None
    sent = plain.outputs(step, seed + 2, torch.float32, TOP_K)
    combined, summed, _ = b.combine(ys[me], handle, topk_weights=sent[me])
    plain.same("combined with weights", combined, plain.reduced(step, me, ys).bfloat16())
    plain.same("combined weights", summed, plain.reduced(step, me, sent))
