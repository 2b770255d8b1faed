"""What processes with a GPU each run: queues, events and captured graphs. Each call checks its own rank."""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist

from tests.torch import buffers, plain
from tests.torch.buffers import HIDDEN, LOCAL, TMAX, TOP_K, shared

WORST = 4 * TMAX


def burden() -> torch.Tensor:
    """Something that takes the current queue some milliseconds."""
    a = torch.ones(4096, 4096, dtype=torch.bfloat16)
    for _ in range(8):
        a = (a @ a).clamp_(-1, 1)
    return a


def check_queues(n: int, seed: int, side: bool) -> None:
    """A call begins behind its previous event, or all that its caller has queued; its results are good behind the
    current queue, or its event. Inputs may be overwritten and freed then; the memory of freed outputs is not reused
    while queues still read them."""
    if (b := shared(n)) is None:
        return
    me = b.rank
    with torch.cuda.stream(torch.cuda.Stream() if side else torch.cuda.current_stream()):
        for i, (wait, previous) in enumerate([(w, p) for w in (False, True) for p in (False, True)] * 3):
            s = buffers.step(n, seed + i)
            ys = plain.outputs(s, i)
            layout = plain.layout(b, s)
            kept = []
            for _ in range(3):
                x = torch.full(s.x[me].shape, float("nan"), dtype=torch.bfloat16)
                ids = torch.full_like(s.ids[me], -1)
                burden()
                x.copy_(s.x[me])
                ids.copy_(s.ids[me])
                how = {"async_finish": wait} | ({"previous_event": b.capture()} if previous else {})
                more = {"topk_idx": ids, "topk_weights": s.weights[me], "num_worst_tokens": WORST}
                recv_x, recv_ids, _, _, handle, event = b.dispatch(x, **layout, **more, **how)
                with event:
                    pass
                x.fill_(float("nan"))
                ids.fill_(-1)
                del x, ids
                y = torch.full((WORST, HIDDEN), float("nan"), dtype=torch.bfloat16)
                burden()
                y[: len(ys[me])] = ys[me]
                how = {"async_finish": wait} | ({"previous_event": b.capture()} if previous else {})
                combined, _, event = b.combine(y, handle, **how)
                with event:
                    pass
                y.fill_(float("nan"))
                burden()
                kept.append((recv_x.clone(), recv_ids.clone(), combined.clone()))  # behind the burden
                del recv_x, recv_ids, combined, y, handle
            rows = len(ys[me])
            for recv_x, recv_ids, combined in kept:
                plain.same("recv_x", recv_x[:rows], plain.received(s, me))
                plain.same("recv_topk_idx", recv_ids[:rows], plain.local_choices(s, me)[0])
                plain.same("combined", combined, plain.reduced(s, me, ys).bfloat16())


def check_memory(n: int, seed: int) -> None:
    """Tensors may be freed while queues still use them: those given to a call that has an event, those that it gave,
    and what a handle holds. Nobody waits for the host, and new tensors take the memory at once."""
    if (b := shared(n)) is None:
        return
    me = b.rank
    for i in range(8):
        s = buffers.step(n, seed + i)
        layout = plain.layout(b, s)
        more = {"topk_idx": s.ids[me], "topk_weights": s.weights[me], "num_worst_tokens": WORST}
        # Given: freed while MAX's queue has yet to read it, which begins behind a burden.
        x = s.x[me].clone()
        with torch.cuda.stream(b.get_comm_stream()):
            burden()
        recv_x, _, _, _, handle, event = b.dispatch(x, **layout, **more, async_finish=True)
        del x
        for _ in range(4):
            torch.full(s.x[me].shape, float("nan"), dtype=torch.bfloat16)
        with event:
            pass
        other = buffers.step(n, seed + 50 + i)
        next_layout = plain.layout(b, other)
        # Made: freed while the current queue has yet to read it; the next round does not wait for that.
        early = b.capture()
        burden()
        got, rows, count = recv_x.clone(), handle.recv_src_idx.clone(), handle.recv_count.clone()
        del recv_x, handle
        again = {"topk_idx": other.ids[me], "topk_weights": other.weights[me], "num_worst_tokens": WORST}
        b.dispatch(other.x[me], **next_layout, **again, previous_event=early, async_finish=True)
        torch.cuda.synchronize()
        want = plain.received(s, me)
        assert int(count) == len(want)
        plain.same("recv_x", got[: len(want)], want)
        token = [torch.arange(len(v), dtype=torch.int32)[:, None] for v in s.x]
        plain.same("recv_src_idx", rows[: len(want), None], plain.received(s, me, token))
        # A handle of the current queue, which MAX's has yet to read.
        rows, _, _, _, handle, _ = b.dispatch(s.x[me], **layout, **more)
        y, size = rows.clone(), handle.memory.shape
        want = b.combine(y, handle)[0]
        with torch.cuda.stream(b.get_comm_stream()):
            burden()
        combined, _, event = b.combine(y, handle, async_finish=True)
        del handle
        for _ in range(4):
            torch.full(size, 1 << 30, dtype=torch.int32)
        with event:
            pass
        plain.same("combined", combined, want)


def check_inference_mode(n: int) -> None:
    """Windows that were made in inference mode can be reset outside of it."""
    import ep_mojo.torch as ept
    from tests.torch.launch import kept

    s = buffers.step(n, 1)
    b = ept.Buffer(kept["group", n], **buffers.bytes_of(n))
    with torch.inference_mode():
        plain.same("inside", buffers.dispatch(b, s)[0], plain.received(s, b.rank))
    b.reset()
    plain.same("outside", buffers.dispatch(b, s)[0], plain.received(s, b.rank))
    b.destroy()


def check_abort(n: int) -> None:
    """What an op refused on the host is raised by the next call, too, until a reset."""
    import pytest

    from ep_mojo import errors

    if (b := shared(n)) is None:
        return
    s = buffers.step(n, 1)
    buffers.dispatch(b, s)
    rounds = b._session.made()[0]
    with pytest.raises(errors.EPError):
        graphs = next(g for g, stage in rounds._stages if stage == "dispatch")
        wrong = torch.empty(1, dtype=torch.int32)
        rounds.run(graphs, "dispatch", None, None, wrong, s.x[b.rank], None, s.ids[b.rank], s.weights[b.rank])
    with pytest.raises(errors.EPError):
        rounds.glance()
    b.reset()
    plain.same("recv_x", buffers.dispatch(b, s)[0], plain.received(s, b.rank))


def low_latency_round(b, x, ids, weights, fmt):
    recv_x, count, handle, _, hook = b.low_latency_dispatch(
        x, ids, TMAX, LOCAL * b.group_size, use_fp8=fmt == "fp8", return_recv_hook=fmt == "hook"
    )
    if hook is not None:
        hook()
    rows = (recv_x[0].float() * recv_x[1].repeat_interleave(128, 2)).bfloat16() if fmt == "fp8" else recv_x
    combined, _, hook = b.low_latency_combine(rows * 2, ids, weights, handle, return_recv_hook=fmt == "hook")
    if hook is not None:
        hook()
    return count, combined


def normal_round(b, x, ids, weights, fmt):
    layout = plain.layout_of(b, ids, LOCAL * b.group_size)
    more = {"topk_idx": ids, "topk_weights": weights, "num_worst_tokens": WORST}
    recv_x, recv_ids, recv_weights, _, handle, _ = b.dispatch(x, **layout, **more)
    y = (recv_x.float() * recv_weights.sum(1, keepdim=True)).bfloat16()
    combined, summed, _ = b.combine(y, handle, topk_weights=recv_weights)
    return handle.recv_count, recv_ids, combined, summed


ROUNDS = {"bf16": low_latency_round, "fp8": low_latency_round, "hook": low_latency_round, "normal": normal_round}


def check_capture(n: int, kind: str) -> None:
    """A captured round, replayed with other tokens and routes, gives what the same calls give uncaptured; between
    replays rounds run uncaptured."""
    if (b := shared(n)) is None:
        return
    me, run, tokens = b.rank, ROUNDS[kind], TMAX - 3
    x = torch.zeros(tokens, HIDDEN, dtype=torch.bfloat16)
    ids, weights = torch.zeros(tokens, TOP_K, dtype=torch.int64), torch.zeros(tokens, TOP_K)

    def fill(seed: int) -> None:
        s = plain.draw(seed, [tokens] * n, HIDDEN, TOP_K, LOCAL * n)
        x.copy_(s.x[me])
        ids.copy_(s.ids[me])
        weights.copy_(s.weights[me])

    fill(0)
    run(b, x, ids, weights, kind)  # windows and graphs are made before
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(b, x, ids, weights, kind)
    for seed in range(20):
        fill(seed)
        graph.replay()
        got = [t.clone() for t in out]
        want = run(b, x, ids, weights, kind)
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            plain.same(f"{kind} {i}, replay {seed}", g, w)
    for _ in range(20):  # replays right behind one another
        graph.replay()
    torch.cuda.synchronize()
    b.check()
    dist.barrier()


def check_capture_with_masks(n: int) -> None:
    """A captured round sees masks that were changed after the capture: by hand, by a replay that has missed a rank, and
    by a reset."""
    from tests.torch.low_latency_calls import masks

    if (b := buffers.shrinking(n)) is None:
        return
    lost, group = n - 1, b.group
    s = plain.draw(5, [TMAX - 3] * n, HIDDEN, TOP_K, LOCAL * n)
    given = s.x[b.rank], s.ids[b.rank], s.weights[b.rank]
    low_latency_round(b, *given, "bf16")  # windows and graphs are made before
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = low_latency_round(b, *given, "bf16")

    def replayed() -> list[torch.Tensor]:
        graph.replay()
        return [t.clone() for t in out]

    def same(which: str, got, want) -> None:
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            plain.same(f"{which} {i}", g, w)

    whole = low_latency_round(b, *given, "bf16")
    same("whole", replayed(), whole)
    for by_hand in (True, False):
        dist.barrier(group=group)
        if b.rank != lost:
            if by_hand:
                b.low_latency_update_mask_buffer(lost, True)
            first = replayed()  # waits for the last rank, unless it is masked
            assert masks(b) == [int(r == lost) for r in range(n)]
            without = low_latency_round(b, *given, "bf16")
            same("without", first, without)
            assert (without[0] < whole[0]).any()
            same("again", replayed(), without)
        dist.barrier(group=group)
        b.reset()
        same("after reset", replayed(), whole)
    torch.cuda.synchronize()
    b.check()
    dist.barrier(group=group)


def check_leaks(n: int, cycles: int) -> int:
    """Bytes that the GPU has less after so many Buffers."""
    import ep_mojo.torch as ept
    from tests.torch.launch import kept

    s, free = buffers.step(n, 1), []
    for i in range(cycles):
        b = ept.Buffer(kept["group", n], **buffers.bytes_of(n))
        buffers.dispatch(b, s)
        b.destroy()
        del b
        if i in (cycles // 4, cycles - 1):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            dist.barrier()
            free.append(torch.cuda.mem_get_info()[0])
    return free[0] - free[1]


def check_refused_in_capture(n: int) -> None:
    """What would make windows or graphs, or let the host wait, is refused by name inside a capture, and nothing is
    sent; the same capture then takes a round that is right."""
    import ep_mojo as ep
    import ep_mojo.torch as ept
    from ep_mojo import errors
    from tests.torch.buffer_calls import raises
    from tests.torch.launch import kept

    if (b := shared(n)) is None:
        return
    made = [buffers.api_config(n, "expert"), kept["group", n]]
    used, unused = (ep.Communicator.process_group(*made, device="cuda") for _ in range(2))
    s = buffers.step(n, 1, [TMAX - 3] * n)
    x, ids, weights = s.x[b.rank], s.ids[b.rank], s.weights[b.rank]
    run = functools.partial(low_latency_round, b, x, ids, weights, "bf16")
    want = run()
    layout = plain.layout(b, s)
    ept.dispatch(used, x, ids, weights)
    one = {"topk_idx": ids[:, :1], "topk_weights": weights[:, :1]}
    refused = [
        lambda: b.low_latency_dispatch(x, ids[:, :1], TMAX, LOCAL * n),  # windows of another kind
        lambda: b.dispatch(x, **one, num_worst_tokens=WORST, **layout),
        lambda: ept.Buffer(kept["group", n], **buffers.bytes_of(n)),
        lambda: ep.Communicator.process_group(*made, device="cuda"),
        lambda: ept.dispatch(unused, x, ids, weights),
        lambda: ept.dispatch(used, x, ids.int(), weights),  # another graph
        lambda: buffers.dispatch(b, s),  # waits for counts
        b.check,
        b.reset,
        used.check,
    ]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in refused:
            raises(errors.OrderError, call, "inside a capture")
        out = run()
    for _ in range(3):
        graph.replay()
        for got, wanted in zip(out, want, strict=True):
            plain.same("replayed", got, wanted)
    b.check()
    for comm in (used, unused):
        comm.destroy()
