"""What processes run for the tests of Buffers as such: bad input, failures, events, the end."""

from __future__ import annotations

import copy
import os
import time
import weakref

import pytest
import torch
import torch.distributed as dist

import ep_mojo.torch as ept
from ep_mojo import errors
from ep_mojo.comm import board
from tests.torch import buffers, plain
from tests.torch import low_latency_calls as low
from tests.torch import normal_calls as normal
from tests.torch.buffers import HIDDEN, LOCAL, TMAX, TOP_K, shared
from tests.torch.launch import kept


def raises(error, call, *words: str) -> None:
    """Run `call`, and raise unless it raises this error, whose text names all `words`."""
    with pytest.raises(errors.EPError) as found:
        call()
    assert type(found.value) is error, f"{found.type.__name__}: {found.value}"
    missing = [w for w in words if w not in str(found.value)]
    assert not missing, f"{missing} not in: {found.value}"


# Bad input


def bad_arguments_of_normal_mode(b, s) -> dict:
    """Name -> (error, field, call), all on this rank alone."""
    me, n = b.rank, b.group_size
    x, ids, weights, layout = s.x[me], s.ids[me], s.weights[me], plain.layout(b, s)
    fp8, scales = x.to(torch.float8_e4m3fn), torch.ones(len(x), HIDDEN // 128)
    top = {"topk_idx": ids, "topk_weights": weights}

    def dispatch(tokens=x, **changed):
        return lambda: b.dispatch(tokens, **{**layout, **top, **changed})

    elsewhere = torch.empty(x.shape, dtype=torch.bfloat16, device="meta")
    return {
        "x float32": (errors.DTypeError, "x", dispatch(x.float())),
        "x list": (errors.DTypeError, "x", dispatch(3)),
        "x 1-d": (errors.ShapeError, "x", dispatch(x[0])),
        "x elsewhere": (errors.DeviceError, "x", dispatch(elsewhere)),
        "x sparse": (errors.DTypeError, "x", dispatch(x.to_sparse())),
        "x three": (errors.ShapeError, "x", dispatch((fp8, scales, scales))),
        "H odd": (errors.ConfigError, "hidden_size", dispatch(x[:, :12])),
        "fp8 H": (errors.ConfigError, "hidden_size", dispatch((fp8[:, :64], scales[:, :1]))),
        "fp8 bf16": (errors.DTypeError, "x[0]", dispatch((x, scales))),
        "fp8 scales": (errors.ShapeError, "x[1]", dispatch((fp8, scales[:, :1]))),
        "fp8 scales rows": (errors.ShapeError, "x[1]", dispatch((fp8, scales[1:]))),
        "fp8 scales dtype": (errors.DTypeError, "x[1]", dispatch((fp8, scales.double()))),
        "ids int32": (errors.DTypeError, "topk_idx", dispatch(topk_idx=ids.int())),
        "ids rows": (errors.ShapeError, "topk_idx", dispatch(topk_idx=ids[1:], topk_weights=weights[1:])),
        "no weights": (errors.ShapeError, "topk_weights", dispatch(topk_weights=None)),
        "no ids": (errors.ShapeError, "topk_idx", dispatch(topk_idx=None)),
        "weights dtype": (errors.DTypeError, "topk_weights", dispatch(topk_weights=weights.double())),
        "weights shape": (errors.ShapeError, "topk_weights", dispatch(topk_weights=weights[:, :1])),
        "K": (
            errors.ConfigError,
            "top_k",
            dispatch(topk_idx=ids[:, :1].expand(-1, 33), topk_weights=weights[:, :1].expand(-1, 33)),
        ),
        "no layout": (errors.ShapeError, "is_token_in_rank", dispatch(is_token_in_rank=None)),
        "in rank": (
            errors.ShapeError,
            "is_token_in_rank",
            dispatch(is_token_in_rank=layout["is_token_in_rank"][:, :1]),
        ),
        "per rank": (errors.DTypeError, "num_tokens_per_rank", dispatch(num_tokens_per_rank=torch.zeros(n))),
        "E": (errors.ConfigError, "num_experts", dispatch(num_tokens_per_expert=torch.zeros(n + 1, dtype=torch.int32))),
        "rdma": (errors.UnsupportedError, "num_tokens_per_rdma_rank", dispatch(num_tokens_per_rdma_rank=ids)),
        "alignment": (errors.ConfigError, "expert_alignment", dispatch(expert_alignment=0)),
        "worst": (errors.ConfigError, "num_worst_tokens", dispatch(num_worst_tokens=-1)),
        "config": (errors.DTypeError, "config", dispatch(config=20)),
        "event": (errors.DTypeError, "previous_event", dispatch(previous_event=1)),
        "allocate": (errors.ConfigError, "allocate_on_comm_stream", dispatch(allocate_on_comm_stream=True)),
        "handle": (errors.DTypeError, "handle", lambda: b.dispatch(x, handle=(1, 2))),
        "layout ids": (errors.DTypeError, "topk_idx", lambda: b.get_dispatch_layout(ids.float(), s.n_experts)),
        "layout E": (errors.ConfigError, "num_experts", lambda: b.get_dispatch_layout(ids, s.n_experts + 1)),
    }


def bad_arguments_with_a_handle(b, s, handle, other) -> dict:
    me = b.rank
    x, y = s.x[me], torch.zeros(handle.num_recv_tokens, HIDDEN, dtype=torch.bfloat16)
    long = torch.zeros(handle.num_recv_tokens + 1, TOP_K)
    return {
        "top-k too": (errors.ShapeError, "topk_idx", lambda: b.dispatch(x, handle=handle, topk_idx=s.ids[me])),
        "T": (errors.ShapeError, "x", lambda: b.dispatch(x[1:], handle=handle)),
        "other": (errors.OrderError, "another Buffer", lambda: b.dispatch(x, handle=other)),
        "combine other": (errors.OrderError, "another Buffer", lambda: b.combine(y, other)),
        "combine handle": (errors.DTypeError, "handle", lambda: b.combine(y, None)),
        "y rows": (errors.ShapeError, "x", lambda: b.combine(y[1:], handle)),
        "y H": (errors.ShapeError, "x", lambda: b.combine(y[:, 8:], handle)),
        "y dtype": (errors.DTypeError, "x", lambda: b.combine(y.float(), handle)),
        "weights": (errors.ShapeError, "topk_weights", lambda: b.combine(y, handle, topk_weights=long)),
        "weights dtype": (
            errors.DTypeError,
            "topk_weights",
            lambda: b.combine(y, handle, topk_weights=long[1:].double()),
        ),
        "no weights": (errors.ConfigError, "topk_weights", lambda: b.combine(y, handle, topk_weights=long[1:, :0])),
        "bias": (errors.ShapeError, "bias[0]", lambda: b.combine(y, handle, bias=x[1:])),
        "bias dtype": (errors.DTypeError, "bias[1]", lambda: b.combine(y, handle, bias=(x, x.float()))),
        "biases": (errors.ShapeError, "bias", lambda: b.combine(y, handle, bias=(x, x, x))),
    }


def bad_arguments_of_low_latency_mode(b, s, handle, other) -> dict:
    me, E = b.rank, s.n_experts
    x, ids, weights = s.x[me], s.ids[me], s.weights[me]
    rows = torch.zeros(LOCAL, b.group_size * TMAX, HIDDEN, dtype=torch.bfloat16)

    def dispatch(tokens=x, choices=ids, most=TMAX, experts=E, **more):
        return lambda: b.low_latency_dispatch(tokens, choices, most, experts, **more)

    def combine(y=rows, choices=ids, w=weights, h=handle, **more):
        return lambda: b.low_latency_combine(y, choices, w, h, **more)

    stats = torch.zeros(LOCAL + 1, dtype=torch.int32)
    return {
        "x dtype": (errors.DTypeError, "x", dispatch(x.float())),
        "ids dtype": (errors.DTypeError, "topk_idx", dispatch(choices=ids.int())),
        "ids rows": (errors.ShapeError, "topk_idx", dispatch(choices=ids[1:])),
        "bytes": (errors.CapacityError, "num_rdma_bytes", dispatch(most=100 * TMAX)),
        "Tmax": (errors.ConfigError, "num_max_dispatch_tokens_per_rank", dispatch(most=0)),
        "E": (errors.ConfigError, "num_experts", dispatch(experts=E + 1)),
        "Tmax type": (errors.ConfigError, "num_max_dispatch_tokens_per_rank", dispatch(most=float(TMAX))),
        "E type": (errors.ConfigError, "num_experts", dispatch(experts=float(E))),
        "E unhashable": (errors.ConfigError, "num_experts", dispatch(experts=[E])),
        "H": (errors.ConfigError, "hidden_size", dispatch(x[:, :64].contiguous())),
        "ue8m0": (errors.ConfigError, "use_ue8m0", dispatch(use_ue8m0=True)),
        "round": (errors.ConfigError, "round_scale", dispatch(use_fp8=False, round_scale=True)),
        "stats": (errors.ShapeError, "cumulative_local_expert_recv_stats",
        dispatch(cumulative_local_expert_recv_stats=stats)), "cost": (errors.UnsupportedError, "cost_stats",
        dispatch(dispatch_wait_recv_cost_stats=stats)), "hook and event": (errors.ConfigError, "async_finish",
        dispatch(async_finish=True, return_recv_hook=True)), "logfmt": (errors.UnsupportedError, "use_logfmt",
        combine(use_logfmt=True)), "y": (errors.ShapeError, "x", combine(rows[:, 1:])),
        "y dtype": (errors.DTypeError, "x", combine(rows.float())),
        "choices": (errors.ShapeError, "topk_idx", combine(choices=ids[:, :1])),
        "w": (errors.DTypeError, "topk_weights", combine(w=weights.bfloat16())),
        "out": (errors.ShapeError, "out", combine(out=x[1:])),
        "out strides": (errors.ShapeError, "out", combine(out=torch.stack([x, x], 2)[..., 0])),
        "zero copy": (errors.OrderError, "zero_copy", combine(zero_copy=True)),
        "tuple": (errors.DTypeError, "handle", combine(h=tuple(handle))),
        "other": (errors.OrderError, "another Buffer", combine(h=other)),
        "clean": (errors.CapacityError, "num_rdma_bytes", lambda: b.clean_low_latency_buffer(1 << 16, HIDDEN, E)),
        "stats strides": (errors.ShapeError, "cumulative_local_expert_recv_stats",
        dispatch(cumulative_local_expert_recv_stats=torch.zeros(1, dtype=torch.int32).expand(LOCAL))),
        "copy": (errors.UnsupportedError, "copy", lambda: copy.copy(b)),
        "deep copy": (errors.UnsupportedError, "copy", lambda: copy.deepcopy([b])),
    }  # fmt: skip


def check_bad_input(n: int) -> int:
    """Rank 0 passes all that is wrong, the others nothing; then everybody's rounds are right at once."""
    if (b := shared(n)) is None:
        return 0
    s = buffers.step(n, 2)
    handle = buffers.dispatch(b, s)[4]
    low_handle = b.low_latency_dispatch(s.x[b.rank], s.ids[b.rank], TMAX, s.n_experts, use_fp8=False)[2]
    other = ept.Buffer(kept["group", n], **buffers.bytes_of(n))
    others = buffers.dispatch(other, s)[4]
    low_other = other.low_latency_dispatch(s.x[b.rank], s.ids[b.rank], TMAX, s.n_experts, use_fp8=False)[2]
    found = {}
    if b.rank == 0:
        found |= bad_arguments_of_normal_mode(b, s)
        found |= {f"handle {k}": v for k, v in bad_arguments_with_a_handle(b, s, handle, others).items()}
        low_latency = bad_arguments_of_low_latency_mode(b, s, low_handle, low_other)
        found |= {f"low {k}": v for k, v in low_latency.items()}
        for name, (error, field, call) in found.items():
            try:
                raises(error, call, field)
            except AssertionError as e:
                raise AssertionError(f"{name}: {e}") from e
    normal.check_round(n, 3)
    low.check_round(n, 3, "bf16")
    other.destroy()
    return len(found)


def check_bad_buffers() -> None:
    """Arguments of a Buffer that are wrong on all ranks."""
    group = dist.group.WORLD
    for error, field, call in (
        (errors.DTypeError, "group", lambda: ept.Buffer(None)),
        (errors.ConfigError, "timeout_s", lambda: type("Hasty", (ept.Buffer,), {"timeout_s": -1.0})(group)),
        (errors.ConfigError, "make_timeout_s", lambda: type("Odd", (ept.Buffer,), {"make_timeout_s": "1"})(group)),
        (errors.UnsupportedError, "comm", lambda: ept.Buffer(None, comm=3)),
        (errors.ConfigError, "num_nvl_bytes", lambda: ept.Buffer(group, -1)),
        (errors.ConfigError, "num_rdma_bytes", lambda: ept.Buffer(group, 0, 2.5)),
        (errors.ConfigError, "num_qps_per_rank", lambda: ept.Buffer(group, num_qps_per_rank=0)),
        (errors.UnsupportedError, "nvlink", lambda: ept.Buffer(group, allow_nvlink_for_low_latency_mode=False)),
        (errors.ConfigError, "num_sms", lambda: ept.Config(0)),
        (errors.ConfigError, "new_num_sms", lambda: ept.Buffer.set_num_sms(3)),
        (errors.ConfigError, "num_ranks", lambda: ept.Buffer.get_dispatch_config(9)),
        (errors.ConfigError, "num_ranks", lambda: ept.Config().get_nvl_buffer_size_hint(64, 0)),
        (errors.ConfigError, "n_experts", lambda: ept.Buffer.get_low_latency_rdma_size_hint(8, 64, 4, 5)),
    ):
        raises(error, call, field)


def check_mismatch(n: int) -> None:
    """What ranks must agree on is compared, and is an error on all ranks."""
    if (b := shared(n)) is None:
        return
    me, group = b.rank, kept["group", n]
    raises(errors.ConfigMismatchError, lambda: ept.Buffer(group, 1 << (20 + me)), "num_nvl_bytes")
    raises(errors.ConfigMismatchError, lambda: ept.Buffer(group, 1 << 20, low_latency_mode=me == 0), "low_latency_mode")
    with_other_k = plain.draw(1, [4] * n, HIDDEN, 1 + min(me, 1), LOCAL * n)
    raises(errors.ConfigMismatchError, lambda: buffers.dispatch(b, with_other_k), "config")
    with_other_e = plain.draw(1, [4] * n, HIDDEN, TOP_K, n * (LOCAL + 1 + (me == n - 1)))
    raises(errors.ConfigMismatchError, lambda: buffers.dispatch(b, with_other_e), "config")
    normal.check_round(n, 1)


def check_plain_buffer(n: int) -> None:
    """A Buffer without low_latency_mode, without bytes, without enable_shrink says what it lacks."""
    if dist.get_rank() >= n:
        return
    b = ept.Buffer(kept["group", n])
    s = buffers.step(n, 1)
    raises(errors.CapacityError, lambda: buffers.dispatch(b, s), "num_nvl_bytes")
    raises(errors.ConfigError, lambda: b.clean_low_latency_buffer(1, 64, n), "low_latency_mode")
    raises(errors.OrderError, lambda: b.get_local_buffer_tensor(torch.uint8), "windows")
    b.destroy()
    b = ept.Buffer(kept["group", n], low_latency_mode=True)
    raises(errors.ConfigError, b.low_latency_clean_mask_buffer, "enable_shrink")
    b.destroy()


# Failures


def check_too_many_tokens(n: int, rank: int, hook: bool) -> float:
    """T over the maximum on one rank: a CapacityError on all ranks at once; that many bytes do; reset mends it."""
    if (b := shared(n)) is None:
        return 0.0
    s = buffers.step(n, 1, [TMAX + 9 if r == rank else 3 for r in range(n)])
    began = time.monotonic()
    needed = buffers.sizes.bytes_for(TMAX + 9, 2 * HIDDEN, n)
    raises(errors.CapacityError, lambda: buffers.dispatch(b, s), f"rank {rank}", f"{TMAX + 9} tokens", str(needed))
    b.reset()
    normal.check_without_topk(n, 1)
    raises(errors.CapacityError, lambda: b.dispatch(s.x[b.rank], **plain.layout(b, s)), f"rank {rank}")
    b.reset()
    normal.check_without_topk(n, 1)
    more = {"use_fp8": False, "return_recv_hook": hook}

    def dispatch():
        result = b.low_latency_dispatch(s.x[b.rank], s.ids[b.rank], TMAX, s.n_experts, **more)
        result[4]() if hook else None
        b.check()

    raises(errors.CapacityError, dispatch, f"rank {rank}", "num_max_dispatch_tokens_per_rank")
    took = time.monotonic() - began
    b.reset()
    normal.check_round(n, 1)
    low.check_round(n, 1, "bf16", hook=hook)
    bigger = ept.Buffer(kept["group", n], needed)
    plain.same("recv_x", buffers.dispatch(bigger, s)[0], plain.received(s, b.rank))
    bigger.destroy()
    return took


def check_worst_too_small(n: int) -> None:
    """More rows than num_worst_tokens: an error on the rank that gets them, and after reset all is well."""
    if (b := shared(n)) is None:
        return
    s = buffers.step(n, 1, [TMAX] * n, "one")

    def dispatch():
        buffers.dispatch(b, s, num_worst_tokens=TMAX)
        b.check()

    if b.rank == 0:  # owns the expert that all tokens go to
        raises(errors.CapacityError, dispatch, "rows", "num_worst_tokens", "reset() of the Buffer")
    else:  # its own round goes well, unless it hears of the failure before it is done
        try:
            dispatch()
        except errors.EPError as e:
            if not (e.peer_failed and "rank 0" in str(e)):
                raise
    b.reset()
    normal.check_round(n, 1)


def check_lives(n: int) -> None:
    """A group that was made again finds nothing that the first one has agreed on, also on a rank that is early."""
    if dist.get_rank() >= n:
        return
    group = kept["group", n]
    for life in range(3):
        made = board.Board(group)
        for turn in range(2):
            if dist.get_rank() == life % n:
                time.sleep(0.2)
            assert made.agree("testing", (life, turn, made.rank), 20.0) == [(life, turn, r) for r in range(n)]


def check_destroyed_group() -> None:
    """A group that was destroyed has no Buffer."""
    group = dist.new_group(range(dist.get_world_size()))
    dist.barrier(group=group)
    dist.destroy_process_group(group)
    raises(errors.OrderError, lambda: ept.Buffer(group), "group", "destroyed")


def check_missing_rank(rank: int) -> float:
    """One rank does not come: the others raise within the deadline, name it, and go on after reset."""
    n, before = dist.get_world_size(), ept.Buffer.timeout_s
    ept.Buffer.timeout_s = 2.0
    try:
        b = ept.Buffer(kept["group", n], **buffers.bytes_of(n))
    finally:
        ept.Buffer.timeout_s = before
    s = buffers.step(n, 1)
    buffers.dispatch(b, s)
    began = time.monotonic()
    if b.rank != rank:
        with pytest.raises(errors.PeerTimeoutError) as found:
            buffers.dispatch(b, s)
        assert f"rank {rank}" in str(found.value) or found.value.peer_failed
    took = time.monotonic() - began
    dist.barrier()
    b.reset()
    plain.same("recv_x", buffers.dispatch(b, s)[0], plain.received(s, b.rank))
    agreed = b._session.board
    if b.rank != rank:  # nor does it come to agree on something
        raises(errors.PeerTimeoutError, lambda: agreed.agree("testing", 1, 0.5), f"rank {rank} did not come")
    dist.barrier()
    assert agreed.agree("testing", b.rank, 5.0) == list(range(n))
    b.destroy()
    return took


def die_in_the_middle(rank: int) -> tuple[str, float]:
    """In processes of their own: one ends between two rounds; the others say so, and can end their Buffers."""
    b = ept.Buffer(dist.group.WORLD, **buffers.bytes_of(dist.get_world_size()))
    s = buffers.step(b.group_size, 1)
    buffers.dispatch(b, s)
    if b.rank == rank:
        os._exit(9)
    began = time.monotonic()
    try:
        buffers.dispatch(b, s)
        buffers.dispatch(b, s)
    except (errors.PeerLostError, errors.PeerTimeoutError) as e:
        took, name = time.monotonic() - began, type(e).__name__
        b.destroy()
        began = time.monotonic()
        with pytest.raises(errors.PeerLostError, match=f"rank {rank} is gone"):  # and not after `make_timeout_s`
            ept.Buffer(dist.group.WORLD, **buffers.bytes_of(dist.get_world_size()))
        assert time.monotonic() - began < buffers.PATIENCE_S
        return name, took
    raise AssertionError("no error")


# Events and the end


def check_events(n: int) -> None:
    """Events in all combinations; tensors that an event keeps; the with statement."""
    if (b := shared(n)) is None:
        return
    s = buffers.step(n, 1)
    me, ys = b.rank, plain.outputs(s, 1)
    for async_finish in (False, True):
        for previous in (None, b.capture(), ept.EventOverlap()):
            for allocate in (False, True) if async_finish and previous is not None else (False,):
                how = {"previous_event": previous, "async_finish": async_finish, "allocate_on_comm_stream": allocate}
                layout = b.get_dispatch_layout(s.ids[me], s.n_experts, **how)
                recv_x, *_, handle, event = buffers.dispatch(b, s, **how)
                combined, _, last = b.combine(ys[me], handle, **how)
                for each in (layout[-1], event, last):
                    if async_finish:
                        each.current_stream_wait()
                    else:
                        raises(errors.OrderError, each.current_stream_wait, "async_finish")
                        with each:
                            pass  # nothing to wait for is no error here
                plain.same("recv_x", recv_x, plain.received(s, me))
                plain.same("combined", combined, plain.reduced(s, me, ys).bfloat16())
    if not s.x[me].is_cuda:  # there the allocator knows who reads it
        x = s.x[me].clone()
        seen = weakref.ref(x)
        event = buffers.dispatch(b, s, x, async_finish=True)[-1]
        del x
        assert seen() is not None, "the event keeps what the work reads"
        with event:
            pass
        del event
        assert seen() is None
    raises(errors.DTypeError, lambda: ept.EventOverlap(3), "event")
    kept_alive = torch.zeros(3)
    overlap = ept.utils.EventOverlap(ept.EventHandle(), (kept_alive,))
    seen = weakref.ref(kept_alive)
    del kept_alive
    overlap.current_stream_wait()
    assert seen() is not None
    del overlap
    assert seen() is None
