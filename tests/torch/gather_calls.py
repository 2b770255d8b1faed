"""What processes run for the tests of the all-gather dispatchers. Each call checks its own rank."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist

import ep_mojo.torch as ept
from ep_mojo import errors
from tests.torch import plain
from tests.torch.launch import kept

HIDDEN, TOPK, TMAX, EXPERTS = 64, 3, 64, 32
V, EQUAL = ept.AllGatherVDispatcher, ept.AllGatherDispatcher
TYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def make_groups() -> None:
    """Groups of the first 1, 2, ... processes."""
    for n in range(1, dist.get_world_size() + 1):
        kept["first", n] = dist.new_group(range(n))


def allocate(n: int, reduce_dtype: str = "bfloat16") -> bool:
    """Buffers over the first n ranks; whether this process is one of them."""
    if dist.get_rank() >= n:
        return False
    if kept.get("allocated") != (n, reduce_dtype):
        ept.AllGatherDispatcherBase.reduce_dtype = TYPES[reduce_dtype]
        V.allocate_buffers(TMAX, TOPK, HIDDEN, kept["first", n])
        kept["allocated"] = n, reduce_dtype
    return True


def draw(seed: int, counts: list[int]) -> SimpleNamespace:
    """Every rank's tokens, routes and probabilities."""
    g = plain.generator(seed)
    return SimpleNamespace(
        x=[torch.randn(t, HIDDEN, generator=g).bfloat16() for t in counts],
        ids=[torch.randint(0, EXPERTS, (t, TOPK), generator=g) for t in counts],
        probs=[torch.rand(t, TOPK, generator=g) for t in counts],
        # what the experts of each rank give for all tokens
        y=[torch.randn(sum(counts), HIDDEN, generator=g).to(ept.AllGatherDispatcherBase.reduce_dtype) for _ in counts],
    )


def wanted(s: SimpleNamespace, counts: list[int], me: int) -> torch.Tensor:
    """float32 sums of the own tokens' rows, ranks ascending, rounded once."""
    first = sum(counts[:me])
    total = torch.zeros(counts[me], HIDDEN)
    for y in s.y:
        total = total + y[first : first + counts[me]].float()
    return total.bfloat16()


def dispatcher(kind=V, **more):
    return kind(4, [0, 1, 2, 3], SimpleNamespace(), **more)


def check_gathered(d, s: SimpleNamespace, hidden, probs) -> None:
    n = sum(map(len, s.x))
    plain.same("hidden", hidden[:n], torch.cat(s.x))
    plain.same("probs", probs[:n], torch.cat(s.probs))
    plain.same("routing_map", d.routing_map[:n], torch.cat(s.ids))
    assert (d.routing_map[n:] == -1).all()


def check_steps(n: int, counts: list[int], reduce_dtype: str = "bfloat16") -> None:
    """Two layers a step, three steps: the first layer refreshes the metadata; experts write to the reduce buffer."""
    if not allocate(n, reduce_dtype):
        return
    me = dist.get_rank()
    layers = [dispatcher(runs_metadata_sync=i == 0) for i in range(2)]
    places = V._valid_tokens().data_ptr(), V._step_metadata.data_ptr(), V._get_rsv_tensor().data_ptr()
    for step in range(3):
        now = counts[step:] + counts[:step]
        for i, d in enumerate(layers):
            s = draw(10 * step + i, now)
            shape = (now[me], 1, HIDDEN)
            hidden, probs = d.dispatch_preprocess(s.x[me].view(shape), s.ids[me], s.probs[me])
            hidden, probs = d.token_dispatch(hidden, probs)
            hidden, none, probs = d.dispatch_postprocess(hidden, probs)
            assert none is None
            assert hidden.shape == (n * TMAX, HIDDEN)
            check_gathered(d, s, hidden, probs)
            assert V._step_metadata.tolist() == [sum(now), sum(now[:me]), max(now)]
            assert (int(V._rank_token_offset()), int(V._ep_max_tokens())) == (sum(now[:me]), max(now))
            rsv = V._get_rsv_tensor().fill_(float("nan"))
            rsv[: sum(now)] = s.y[me]
            back = d.token_combine(d.combine_preprocess(rsv))
            plain.same("reduced", d.combine_postprocess(back), wanted(s, now, me).view(shape))
    assert places == (V._valid_tokens().data_ptr(), V._step_metadata.data_ptr(), V._get_rsv_tensor().data_ptr())
    assert int(V._valid_tokens()) == sum(counts)


def check_device_counts(n: int) -> None:
    """A count on the device masks padding; it changes without a new call of anything else."""
    if not allocate(n):
        return
    me, d = dist.get_rank(), dispatcher()
    count = torch.zeros(1, dtype=torch.int32)
    V.set_local_tokens(count)
    try:
        for step in range(4):
            now = [(5 * r + 7 * step) % (TMAX + 1) for r in range(n)]
            s = draw(step, now)
            count.fill_(now[me])
            x = torch.full((TMAX, HIDDEN), float("nan"), dtype=torch.bfloat16)
            ids, probs = torch.full((TMAX, TOPK), 7), torch.full((TMAX, TOPK), 9.0)
            x[: now[me]], ids[: now[me]], probs[: now[me]] = s.x[me], s.ids[me], s.probs[me]
            hidden, probs = d.token_dispatch(*d.dispatch_preprocess(x, ids, probs))
            check_gathered(d, s, hidden, probs)
            assert int(V._valid_tokens()) == sum(now)
            back = d.token_combine(s.y[me])
            plain.same("reduced", back[: now[me]], wanted(s, now, me))
            assert (back[now[me] :] == 0).all()
    finally:
        V.set_local_tokens(None)


def check_replays(n: int, replays: int) -> None:
    """On GPUs: a captured step, replayed with other tokens and counts; between replays steps run uncaptured."""
    if not allocate(n):
        return
    me, layers = dist.get_rank(), [dispatcher(runs_metadata_sync=i == 0) for i in range(2)]
    count = torch.zeros(1, dtype=torch.int32)
    x = torch.zeros(TMAX, HIDDEN, dtype=torch.bfloat16)
    ids, probs = torch.zeros(TMAX, TOPK, dtype=torch.int64), torch.zeros(TMAX, TOPK)

    def run():
        found = []
        for d in layers:
            hidden, weights = d.token_dispatch(*d.dispatch_preprocess(x, ids, probs))
            rsv = V._get_rsv_tensor().copy_(hidden)
            out = d.combine_postprocess(d.token_combine(rsv))
            found.append((hidden.clone(), weights.clone(), d.routing_map.clone(), V._step_metadata.clone(), out))
        return found

    V.set_local_tokens(count)
    try:
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = run()
        for step in range(replays):
            now = [(5 * r + 7 * step) % (TMAX + 1) for r in range(n)]
            s = draw(step, now)
            count.fill_(now[me])
            for whole, part in ((x, s.x[me]), (ids, s.ids[me]), (probs, s.probs[me])):
                whole[: now[me]] = part
            graph.replay()
            for d, (hidden, weights, routes, metadata, out) in zip(layers, found, strict=True):
                d.routing_map = routes
                check_gathered(d, s, hidden, weights)
                assert metadata.tolist() == [sum(now), sum(now[:me]), max(now)]
                plain.same("reduced", out[: now[me]], (s.x[me].float() * n).bfloat16())
            if step % 10 == 0:
                run()
        V.check()
    finally:
        V.set_local_tokens(None)


def check_refused_in_capture(n: int) -> None:
    """On GPUs: buffers cannot be made inside a capture, nor can the host wait for counts; the capture goes on."""
    if not allocate(n):
        return
    s, me = draw(1, [4] * n), dist.get_rank()
    late, d = dispatcher(EQUAL), dispatcher()
    step(d, s.x[me], s.ids[me], s.probs[me])
    kept_tensors = V._valid_tokens_tensor
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            with pytest.raises(errors.OrderError, match="inside a capture"):
                V.allocate_buffers(TMAX, TOPK, HIDDEN, kept["first", n])
            ept.AllGatherDispatcherBase._valid_tokens_tensor = None
            with pytest.raises(errors.OrderError, match="inside a capture"):
                V.allocate_valid_tokens_tensor()
            ept.AllGatherDispatcherBase._valid_tokens_tensor = kept_tensors
            EQUAL._use_allgather_v = True
            with pytest.raises(errors.OrderError, match="inside a capture"):
                step(late, s.x[me], s.ids[me], s.probs[me])
            EQUAL._use_allgather_v = False
            found = step(d, s.x[me], s.ids[me], s.probs[me])
    finally:
        ept.AllGatherDispatcherBase._valid_tokens_tensor, EQUAL._use_allgather_v = kept_tensors, False
    graph.replay()
    check_gathered(d, s, *found)


def check_equal_counts(n: int) -> None:
    """AllGatherDispatcher: R*T rows; with _use_allgather_v as many as there are tokens."""
    if not allocate(n):
        return
    me, d = dist.get_rank(), dispatcher(EQUAL)
    for now, any_counts in (
        ([8] * n, False),
        ([TMAX] * n, False),
        ([(r * 9) % 20 for r in range(n)], True),
        ([0] * n, True),
    ):
        EQUAL._use_allgather_v = any_counts
        s = draw(3, now)
        hidden, probs = d.token_dispatch(*d.dispatch_preprocess(s.x[me], s.ids[me], s.probs[me]))
        assert len(hidden) == len(probs) == len(d.routing_map) == sum(now)
        check_gathered(d, s, hidden, probs)
        plain.same("reduced", d.token_combine(s.y[me]), wanted(s, now, me))
        if any_counts:
            assert EQUAL._local_tokens_per_rank == now
            assert EQUAL._get_host_valid_tokens_estimate() == sum(now)
    ept.AllGatherDispatcherBase._local_tokens_per_rank = None
    late = dispatcher(EQUAL, runs_metadata_sync=False)
    with pytest.raises(errors.OrderError, match="runs_metadata_sync"):
        step(late, s.x[me], s.ids[me], s.probs[me])
    EQUAL._use_allgather_v = False


def check_unequal_counts(n: int) -> None:
    """Ranks that have other numbers of tokens, where all were to have as many: an error on all; then all is well."""
    if not allocate(n):
        return
    for now in ([4 * (r + 1) for r in range(n)], [4, 8, 0][:n]):
        s, me, d = draw(4, now), dist.get_rank(), dispatcher(EQUAL)
        with pytest.raises(errors.ShapeError, match="_use_allgather_v"):
            step(d, s.x[me], s.ids[me], s.probs[me])
        check_steps(n, now)


class Watching(V):
    """Notes what its metadata is refreshed for."""

    seen: ClassVar[list[int]] = []

    def update_metadata(self, local_tokens: int) -> None:
        self.seen.append(local_tokens)
        super().update_metadata(local_tokens)


def check_metadata(n: int) -> None:
    """The first instance's token_dispatch fires `update_metadata`, an override too; by itself it asks all ranks."""
    if not allocate(n):
        return
    me, layers = dist.get_rank(), [dispatcher(Watching, runs_metadata_sync=i == 0) for i in range(2)]
    for turn, now in enumerate(([5 + r for r in range(n)], [3] * n)):
        for d in layers:
            s = draw(turn, now)
            step(d, s.x[me], s.ids[me].int(), s.probs[me])
            plain.same("float64 rows", d.token_combine(s.y[me].double()), wanted(s, now, me))
        assert Watching.seen == [now[me]]
        Watching.seen.clear()
        assert V._step_metadata.tolist() == [sum(now), sum(now[:me]), max(now)]
    other = [2 + 3 * r for r in range(n)]
    layers[0].update_metadata(other[me])
    assert V._step_metadata.tolist() == [sum(other), sum(other[:me]), max(other)]
    Watching.seen.clear()


def check_shared_experts(n: int) -> None:
    """What the shared experts give is added, once."""
    if not allocate(n):
        return
    me, d, now = dist.get_rank(), dispatcher(), [6] * n
    d.set_shared_experts(lambda x: x * 2)
    for _ in range(2):
        s = draw(5, now)
        hidden, probs = d.dispatch_preprocess(s.x[me], s.ids[me], s.probs[me])
        d.token_dispatch(hidden, probs)
        out = d.combine_postprocess(d.token_combine(s.y[me]))
        plain.same("with shared experts", out, wanted(s, now, me) + s.x[me] * 2)
    try:
        V._external_shared_expert_launch = True  # the layer runs them, and adds what they give
        hidden, probs = d.dispatch_preprocess(s.x[me], s.ids[me], s.probs[me])
        d.token_dispatch(hidden, probs)
        plain.same("without", d.combine_postprocess(d.token_combine(s.y[me])), wanted(s, now, me))
    finally:
        V._external_shared_expert_launch = False


def check_bad_input(n: int) -> None:
    """What is wrong is named on the rank that passes it, before anything is sent; the next step is right."""
    if not allocate(n):
        return
    s, d = draw(1, [4] * n), dispatcher()
    x, ids, probs = s.x[0], s.ids[0], s.probs[0]
    more = torch.zeros(TMAX + 1, HIDDEN, dtype=torch.bfloat16)
    wrong = {
        "no routes": (errors.OrderError, "routes", lambda: dispatcher().token_dispatch(x, probs)),
        "dtype": (errors.DTypeError, "hidden_states", lambda: step(d, x.float(), ids, probs)),
        "hidden": (errors.ShapeError, "hidden_states", lambda: step(d, x[:, 8:], ids, probs)),
        "topk": (errors.ShapeError, "routing_map", lambda: step(d, x, ids[:, :1], probs)),
        "probs": (errors.DTypeError, "probs", lambda: step(d, x, ids, probs.double())),
        "worst case": (
            errors.CapacityError,
            "tokens of this rank",
            lambda: step(d, more, ids.new_zeros(TMAX + 1, TOPK), probs.new_zeros(TMAX + 1, TOPK)),
        ),
        "experts": (errors.ShapeError, "local_expert_indices", lambda: V(3, [1])),
        "no experts": (errors.ShapeError, "local_expert_indices", lambda: V(3, None)),
        "no tokens": (errors.DTypeError, "hidden_states", lambda: d.dispatch_preprocess(None, ids, probs)),
        "one number": (errors.ShapeError, "hidden_states", lambda: d.dispatch_preprocess(x[0, 0], ids, probs)),
        "names": (errors.ConfigError, "local_expert_indices", lambda: V(2, ["a", "b"])),
        "no rows": (errors.DTypeError, "hidden_states", lambda: d.token_combine(None)),
        "whole numbers": (errors.DTypeError, "hidden_states", lambda: d.token_combine(x.int())),
        "other rows": (errors.ShapeError, "hidden_states", lambda: again(d, x, ids, probs)),
        "fewer than none": (errors.ConfigError, "local_tokens", lambda: d.update_metadata(-1)),
        "more than Tmax": (errors.ConfigError, "local_tokens", lambda: d.update_metadata(TMAX + 1)),
        "no number": (errors.ConfigError, "local_tokens", lambda: d.update_metadata(2.5)),
        "count": (errors.DTypeError, "count", lambda: V.set_local_tokens(torch.zeros(1))),
        "rows": (errors.ShapeError, "hidden_states", lambda: d.token_combine(x[:, 8:])),
    }
    for name, (error, word, call) in wrong.items():
        with pytest.raises(errors.EPError) as found:
            call()
        assert type(found.value) is error, f"{name}: {found.value!r}"
        assert word in str(found.value), f"{name}: {found.value}"
    check_steps(n, [4] * n)


def again(d, x, ids, probs):
    d.dispatch_preprocess(x, ids, probs)
    d.combine_postprocess(x[1:])


def step(d, x, ids, probs):
    return d.token_dispatch(*d.dispatch_preprocess(x, ids, probs))


def die_between_steps(rank: int) -> tuple[str, float]:
    """In processes of their own: one ends between two steps; the others say so within the deadline."""
    n, before = dist.get_world_size(), ept.AllGatherDispatcherBase.timeout_s
    ept.AllGatherDispatcherBase.timeout_s = 5.0
    allocate(n)
    ept.AllGatherDispatcherBase.timeout_s = before
    s, d, me = draw(1, [4] * n), dispatcher(), dist.get_rank()
    step(d, s.x[me], s.ids[me], s.probs[me])
    V.check()
    if me == rank:
        os._exit(9)
    began = time.monotonic()
    with pytest.raises((errors.PeerLostError, errors.PeerTimeoutError)) as found:
        for _ in range(4):
            step(d, s.x[me], s.ids[me], s.probs[me])
            V.check()
    assert f"rank {rank}" in str(found.value) or found.value.peer_failed, found.value
    V._delete_buffers()
    return type(found.value).__name__, time.monotonic() - began


def check_buffers(n: int) -> None:
    """No buffers, other numbers on some rank, numbers out of range; then all is well."""
    if dist.get_rank() >= n:
        return
    V._delete_buffers()
    kept.pop("allocated", None)
    d, s = dispatcher(), draw(1, [4])
    for call in (
        lambda: step(d, s.x[0], s.ids[0], s.probs[0]),
        lambda: d.token_combine(s.x[0]),
        lambda: d.update_metadata(4),
        V._valid_tokens,
        lambda: V.set_local_tokens(None),
    ):
        with pytest.raises(errors.OrderError, match="allocate_buffers"):
            call()
    assert V._get_rsv_tensor() is None
    with torch.inference_mode():
        V.allocate_valid_tokens_tensor()
        place = V._valid_tokens_tensor.data_ptr()
        V.allocate_buffers(TMAX, TOPK, HIDDEN, kept["first", n])
    assert V._valid_tokens().data_ptr() == place
    with pytest.raises(errors.ConfigError, match="hidden_size"):
        V.allocate_buffers(TMAX, TOPK, HIDDEN + 1, kept["first", n])  # those that are there stay
    with pytest.raises(errors.DTypeError, match="ep_group"):
        V.allocate_buffers(TMAX, TOPK, HIDDEN, None)
    for name, value in (("reduce_dtype", torch.float16), ("timeout_s", -1), ("make_timeout_s", "1")):
        with pytest.raises((errors.DTypeError, errors.ConfigError), match=name):
            type("Other", (V,), {name: value}).allocate_buffers(TMAX, TOPK, HIDDEN, kept["first", n])
    with pytest.raises(errors.OrderError, match="nothing has been gathered"):
        d.token_combine(s.x[0])
    wrong = V(2, [-1, 3])
    with pytest.raises(errors.ConfigError, match="local_expert_indices"):
        step(wrong, s.x[0], s.ids[0], s.probs[0])
    kept["allocated"] = n, "bfloat16"
    check_steps(n, [4] * n)  # what was made in inference mode can be written outside of it
    V._delete_buffers()
    kept.pop("allocated")
    group, me = kept["first", n], dist.get_rank()
    for arguments in ((TMAX + me, TOPK, HIDDEN), (TMAX, TOPK + 2 * me, HIDDEN), (TMAX, TOPK, HIDDEN + 8 * me)):
        with pytest.raises(errors.ConfigMismatchError):
            V.allocate_buffers(*arguments, group)
        V._delete_buffers()
    for arguments in ((0, TOPK, HIDDEN), (TMAX, 0, HIDDEN), (TMAX, TOPK, HIDDEN + 1)):
        with pytest.raises(errors.ConfigError):
            V.allocate_buffers(*arguments, group)
        V._delete_buffers()
    check_steps(n, [3] * n)


def check_few_choices(n: int) -> None:
    """Routes of 1 and 2 choices are as wide as counts are: one graph gathers both."""
    if dist.get_rank() >= n:
        return
    kept.pop("allocated", None)
    me, d = dist.get_rank(), dispatcher()
    for topk in (1, 2):
        V.allocate_buffers(TMAX, topk, HIDDEN, kept["first", n])
        s = draw(topk, [3 + r for r in range(n)])
        s.ids, s.probs = ([each[:, :topk].contiguous() for each in parts] for parts in (s.ids, s.probs))
        check_gathered(d, s, *step(d, s.x[me], s.ids[me], s.probs[me]))
    check_steps(n, [3] * n)
