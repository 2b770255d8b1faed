"""What processes run for the tests of normal mode. Each call checks its own rank, and raises where it is wrong."""

from __future__ import annotations

import torch

from ep_mojo.dtypes import bfloat16_bits_to_float32
from ep_mojo.reference import fp8
from tests.torch import buffers, plain
from tests.torch.buffers import TOP_K, shared


def check_layout(n: int, seed: int, kind: str) -> None:
    if (b := shared(n)) is None:
        return
    s = buffers.step(n, seed, kind=kind)
    ids = s.ids[b.rank]
    per_rank, per_rdma_rank, per_expert, in_rank, event = b.get_dispatch_layout(ids, s.n_experts, async_finish=True)
    event.current_stream_wait()
    want = torch.stack([(s.local(r, b.rank) >= 0).any(1) for r in range(n)], 1)
    plain.same("is_token_in_rank", in_rank, want)
    plain.same("num_tokens_per_rank", per_rank, want.sum(0).int())
    plain.same("num_tokens_per_expert", per_expert, torch.bincount(ids[ids >= 0], minlength=s.n_experts).int())
    assert per_rdma_rank is None


def check_round(n: int, seed: int, tokens=None, kind="mixed", alignment=1, strided=False) -> None:
    """Dispatch, then combine with 0, 1 and 2 biases and with weights."""
    if (b := shared(n)) is None:
        return
    s = buffers.step(n, seed, tokens, kind)
    me = b.rank
    x, ids, weights = s.x[me], s.ids[me], s.weights[me]
    if strided:
        x, ids, weights = (torch.stack([v, v], 2)[..., 0] for v in (x, ids, weights))
        assert not x.is_contiguous()
    recv_x, recv_ids, recv_weights, counts, handle, _ = b.dispatch(
        x, topk_idx=ids, topk_weights=weights, expert_alignment=alignment, **plain.layout(b, s)
    )
    want_ids, want_weights = plain.local_choices(s, me)
    plain.same("recv_x", recv_x, plain.received(s, me))
    plain.same("recv_topk_idx", recv_ids, want_ids)
    plain.same("recv_topk_weights", recv_weights, want_weights)
    assert counts == rows_of_experts(s, me, alignment)
    token = [torch.arange(len(v), dtype=torch.int32)[:, None] for v in s.x]
    plain.same("recv_src_idx", handle.recv_src_idx[:, None], plain.received(s, me, token))
    assert handle.num_recv_tokens == int(handle.recv_count) == len(recv_x)
    ys = plain.outputs(s, seed + 1)
    ids.fill_(0)  # the handle has copies
    check_combine(b, buffers.step(n, seed, tokens, kind), handle, ys, strided)


def rows_of_experts(s, me: int, alignment: int) -> list[int]:
    """Rows of each local expert, rounded up."""
    ids = plain.local_choices(s, me)[0]
    true = torch.bincount(ids[ids >= 0], minlength=s.n_local).tolist()
    return [-(-c // alignment) * alignment for c in true]


def check_combine(b, s, handle, ys, strided=False) -> None:
    me = b.rank
    y = torch.stack([ys[me], ys[me]], 2)[..., 1] if strided else ys[me]
    biases = tuple(torch.randn(s.x[me].shape, generator=plain.generator(i)).bfloat16() for i in range(2))
    for given in (None, biases[0], (biases[0],), biases, (biases[0], None)):
        listed = [v for v in (given if isinstance(given, tuple) else (given,)) if v is not None]
        combined, none, _ = b.combine(y, handle, bias=given)
        plain.same(f"{len(listed)} biases", combined, plain.reduced(s, me, ys, tuple(listed)).bfloat16())
        assert none is None
    for width in (TOP_K, 1):
        sent = plain.outputs(s, width, torch.float32, width)
        combined, summed, _ = b.combine(y, handle, topk_weights=sent[me])
        plain.same("combined with weights", combined, plain.reduced(s, me, ys).bfloat16())
        plain.same("combined weights", summed, plain.reduced(s, me, sent))


def check_fp8(n: int, seed: int, scale: str, strided: bool) -> None:
    """Tokens that are quantised already travel as they are, with their scales."""
    if (b := shared(n)) is None:
        return
    s = buffers.step(n, seed)
    quantised = [fp8.quantize(bfloat16_bits_to_float32(x.view(torch.uint16).cpu().numpy()), scale) for x in s.x]
    tokens = [plain.from_numpy(q).view(torch.float8_e4m3fn) for q, _ in quantised]
    scales = [plain.from_numpy(f.copy()) for _, f in quantised]
    given = tokens[b.rank], scales[b.rank].t().contiguous().t() if strided else scales[b.rank]
    (recv_x, recv_scales), recv_ids, _, _, handle, _ = buffers.dispatch(b, s, given)
    plain.same("recv_x", recv_x, plain.received(s, b.rank, tokens))
    plain.same("recv_scales", recv_scales, plain.received(s, b.rank, scales))
    plain.same("recv_topk_idx", recv_ids, plain.local_choices(s, b.rank)[0])
    again = b.dispatch(given, handle=handle)[0]
    plain.same("again x", again[0], recv_x)
    plain.same("again scales", again[1], recv_scales)
    plain.same("again bfloat16", b.dispatch(s.x[b.rank], handle=handle)[0], plain.received(s, b.rank))
    ys = plain.outputs(s, seed)
    plain.same("combined", b.combine(ys[b.rank], handle)[0], plain.reduced(s, b.rank, ys).bfloat16())


def check_handle_again(n: int, seed: int) -> None:
    """Handles stay good while other rounds run; a dispatch along a handle gives rows and nothing else."""
    if (b := shared(n)) is None:
        return
    first, second = buffers.step(n, seed), buffers.step(n, seed + 1)
    handles = [buffers.dispatch(b, s)[4] for s in (first, second)]
    for turn, (s, handle) in enumerate([*zip((first, second), handles, strict=True)] * 3):
        other = [torch.randn(x.shape, generator=plain.generator(turn + r)).bfloat16() for r, x in enumerate(s.x)]
        recv_x, *rest = b.dispatch(other[b.rank], handle=handle)
        plain.same("recv_x", recv_x, plain.received(s, b.rank, other))
        assert rest[:-1] == [None] * 4
        ys = plain.outputs(s, turn)
        plain.same("combined", b.combine(ys[b.rank], handle)[0], plain.reduced(s, b.rank, ys).bfloat16())


def check_worst(n: int, seed: int, worst: int, tokens=None) -> None:
    """num_worst_tokens: outputs of that size, their tail without ids; and everything else as without it."""
    if (b := shared(n)) is None:
        return
    s = buffers.step(n, seed, tokens)
    recv_x, recv_ids, recv_weights, counts, handle, _ = buffers.dispatch(b, s, num_worst_tokens=worst)
    rows = len(plain.received(s, b.rank))
    want_ids, want_weights = plain.local_choices(s, b.rank)
    assert recv_x.shape[0] == handle.num_recv_tokens == worst
    assert counts == []
    assert int(handle.recv_count) == rows
    plain.same("recv_x", recv_x[:rows], plain.received(s, b.rank))
    plain.same("recv_topk_idx", recv_ids, torch.cat([want_ids, torch.full((worst - rows, TOP_K), -1)]))
    plain.same("recv_topk_weights", recv_weights, torch.cat([want_weights, torch.zeros(worst - rows, TOP_K)]))
    ys = plain.outputs(s, seed)
    padded = torch.cat([ys[b.rank], torch.full((worst - rows, ys[0].shape[1]), float("nan"), dtype=torch.bfloat16)])
    plain.same("combined", b.combine(padded, handle)[0], plain.reduced(s, b.rank, ys).bfloat16())
    plain.same("again", b.dispatch(s.x[b.rank], handle=handle)[0][:rows], plain.received(s, b.rank))


def check_without_topk(n: int, seed: int, tokens=None) -> None:
    """Only is_token_in_rank: the same rows and counts, no top-k."""
    if (b := shared(n)) is None:
        return
    s = buffers.step(n, seed, tokens)
    layout = plain.layout(b, s)
    layout["is_token_in_rank"] = layout["is_token_in_rank"].t().contiguous().t()
    recv_x, recv_ids, recv_weights, counts, handle, _ = b.dispatch(s.x[b.rank], expert_alignment=4, **layout)
    plain.same("recv_x", recv_x, plain.received(s, b.rank))
    assert (recv_ids, recv_weights) == (None, None)
    assert counts == rows_of_experts(s, b.rank, 4)
    check_combine(b, s, handle, plain.outputs(s, seed))


def check_negated(n: int, seed: int) -> None:
    """Tensors of which torch has only noted that they are negated."""
    if (b := shared(n)) is None:
        return
    s = buffers.step(n, seed)
    lazy = torch._neg_view(s.x[b.rank])
    assert lazy.is_neg()
    assert lazy.is_contiguous()
    recv_x, *_, handle, _ = buffers.dispatch(b, s, x=lazy)
    want = plain.received(s, b.rank)
    plain.same("recv_x", recv_x, -want)
    plain.same("combined", b.combine(torch._neg_view(recv_x), handle)[0], b.combine(want, handle)[0])


def check_same_bytes(n: int, repeats: int) -> None:
    """Rounds with equal inputs are equal byte for byte, whatever the budget of threads."""
    if (b := shared(n)) is None:
        return
    s = buffers.step(n, 3)
    seen = set()
    for i in range(repeats):
        config = None if i % 2 else buffers.ept.Config(num_sms=1 + i)
        recv_x, _, recv_weights, _, handle, _ = buffers.dispatch(b, s, config=config)
        combined, summed, _ = b.combine(recv_x, handle, topk_weights=recv_weights, config=config)
        seen.add(tuple(t.contiguous().view(torch.uint8).cpu().numpy().tobytes() for t in (recv_x, combined, summed)))
    assert len(seen) == 1
