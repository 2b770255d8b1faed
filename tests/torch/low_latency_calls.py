"""What processes run for the tests of low-latency mode. Each call checks its own rank, and raises where it is wrong."""

from __future__ import annotations

import gc
import os
import time
import weakref

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ep_mojo.dtypes import bfloat16_bits_to_float32, float32_to_bfloat16_bits
from ep_mojo.errors import CapacityError, ConfigError, DTypeError, OrderError, ShapeError
from ep_mojo.reference import fp8
from ep_mojo.reference.arithmetic import fma
from tests.torch import buffers, plain
from tests.torch.buffers import HIDDEN, LOCAL, TMAX, shared

FORMATS = {
    "bf16": {"use_fp8": False},
    "fp8": {},
    "power_of_two": {"round_scale": True},
    "ue8m0": {"round_scale": True, "use_ue8m0": True},
}
SCALES = {"fp8": "float32", "power_of_two": "power_of_two", "ue8m0": "ue8m0"}


def floats(x: torch.Tensor) -> np.ndarray:
    return bfloat16_bits_to_float32(x.contiguous().view(torch.uint16).cpu().numpy())


def rows_of(s: plain.Step, expert: int) -> list[torch.Tensor]:
    """(token, k) of the rows of an expert, int64 [n, 2] for each source rank."""
    return [(ids == expert).nonzero() for ids in s.ids]


def sent(s: plain.Step, fmt: str) -> list[tuple[torch.Tensor, ...]]:
    """Every rank's tokens on the wire: (tokens,), or (tokens, scales)."""
    if fmt == "bf16":
        return [(x,) for x in s.x]
    made = [fp8.quantize(floats(x), SCALES[fmt]) for x in s.x]
    return [(plain.from_numpy(q).view(torch.float8_e4m3fn), plain.from_numpy(f.copy())) for q, f in made]


def summed(s: plain.Step, source: int, ys: list[torch.Tensor], lost: list[int] | None = None) -> torch.Tensor:
    """bfloat16 [T, H]: weight times row, k ascending, one rounding per fma, one at the end. Ranks that are `lost` have
    received, but send nothing back."""
    n_tokens, top_k = s.ids[source].shape
    total = np.zeros((n_tokens, HIDDEN), np.float32)
    values, all_ids, all_weights = [floats(y) for y in ys], s.ids[source].cpu(), s.weights[source].cpu()
    by_expert = {e: [r.cpu() for r in rows_of(s, e)] for e in range(s.n_experts)}
    for t in range(n_tokens):
        for k in range(top_k):
            expert = int(all_ids[t, k])
            if not 0 <= expert < s.n_experts or expert // LOCAL in (lost or []):
                continue
            rows = by_expert[expert]
            mine = (rows[source] == torch.tensor([t, k], device="cpu")).all(1).nonzero()
            row = sum(len(r) for r in rows[:source]) + int(mine)
            w = np.float32(all_weights[t, k].item())
            total[t] = fma(w, values[expert // LOCAL][expert % LOCAL, row], total[t])
    return plain.from_numpy(float32_to_bfloat16_bits(total)).view(torch.bfloat16)


def expert_rows(n: int, seed: int) -> list[torch.Tensor]:
    """Some expert output for each rank, NaN where nothing may read it."""
    g = plain.generator(seed)
    return [torch.randn(LOCAL, n * TMAX, HIDDEN, generator=g).bfloat16() for _ in range(n)]


def check_received(b, s: plain.Step, fmt: str, recv_x, count, handle) -> None:
    packed = recv_x if isinstance(recv_x, tuple) else (recv_x,)
    wire = sent(s, fmt)
    assert packed[0].shape == (LOCAL, b.group_size * TMAX, HIDDEN)
    if fmt != "bf16":
        rows, per_row = packed[1].shape[1:]
        assert packed[1].stride() == (per_row * rows, 1, rows), "a block for each expert, scales of rows side by side"
    src_info, layout_range, *rest = handle
    assert rest == [TMAX, HIDDEN, s.n_experts]
    assert (src_info.dtype, layout_range.dtype) == (torch.int32, torch.int64)
    for i in range(LOCAL):
        rows = rows_of(s, b.rank * LOCAL + i)
        n = sum(map(len, rows))
        assert int(count[i]) == n
        for part, value in enumerate(packed):
            want = torch.cat([wire[r][part][rows[r][:, 0]] for r in range(b.group_size)])
            plain.same(f"expert {i}, part {part}", value[i, :n], want)
        plain.same(f"src_info of {i}", src_info[i, :n], torch.cat(rows)[:, 0].int())
        assert (src_info[i, n:] == -1).all()
        begins = np.cumsum([0, *map(len, rows)])[:-1]
        assert layout_range[i].tolist() == [int(at) << 32 | len(r) for at, r in zip(begins, rows, strict=True)]


def check_round(n: int, seed: int, fmt: str, tokens=None, kind="mixed", hook=False, how="") -> None:
    """A round: dispatch with or without a hook, then combine; `how`: "out", "zero_copy", or neither."""
    if (b := shared(n)) is None:
        return
    s = buffers.step(n, seed, tokens, kind)
    me = b.rank
    stats = torch.arange(LOCAL, dtype=torch.int32)
    later = {"return_recv_hook": True} if hook else {"async_finish": True}
    recv_x, count, handle, event, receive = b.low_latency_dispatch(
        s.x[me], s.ids[me], TMAX, s.n_experts, cumulative_local_expert_recv_stats=stats, **FORMATS[fmt], **later
    )
    if hook:
        seen = recv_x[0] if fmt != "bf16" else recv_x
        before = seen.data_ptr(), count.data_ptr()
        receive()
        assert before == (seen.data_ptr(), count.data_ptr())
    else:
        assert receive is None
        event.current_stream_wait()
    check_received(b, s, fmt, recv_x, count, handle)
    plain.same("stats", stats, count + torch.arange(LOCAL, dtype=torch.int32))
    ys = expert_rows(n, seed)
    y, more = ys[me], {}
    if how == "zero_copy":
        b.get_next_low_latency_combine_buffer(handle).copy_(y)
        y, more = torch.full_like(y, float("nan")), {"zero_copy": True}
    elif how == "out":
        more["out"] = torch.full(s.x[me].shape, float("nan"), dtype=torch.bfloat16)
    ids, weights = s.ids[me].clone(), s.weights[me].clone()
    combined, event, receive = b.low_latency_combine(y, ids, weights, handle, **more, **later)
    if hook:
        ids.fill_(-1)  # they may change behind the call
        weights.fill_(0)
    receive() if hook else event.current_stream_wait()
    plain.same("combined", combined, summed(s, me, ys))
    if how == "out":
        assert combined is more["out"]


def check_two_under_way(n: int, seed: int) -> None:
    """Two dispatches before the first is received, then two combines; hooks out of order and twice are refused."""
    if (b := shared(n)) is None:
        return
    steps = [buffers.step(n, seed + i) for i in range(2)]
    me = b.rank
    hooked = {"use_fp8": False, "return_recv_hook": True}
    found = [b.low_latency_dispatch(s.x[me], s.ids[me], TMAX, s.n_experts, **hooked) for s in steps]
    for more in (hooked, {"use_fp8": False}):
        refused(b.low_latency_dispatch, steps[0].x[me], steps[0].ids[me], TMAX, steps[0].n_experts, **more)
    refused(found[1][4])
    refused(lambda: found[0][2][0])
    ys = [expert_rows(n, seed + i) for i in range(2)]
    refused(b.low_latency_combine, ys[0][me], steps[0].ids[me], steps[0].weights[me], found[0][2])
    for s, (recv_x, count, handle, _, hook) in zip(steps, found, strict=True):
        hook()
        check_received(b, s, "bf16", recv_x, count, handle)
        refused(hook)
    back = [
        b.low_latency_combine(y[me], s.ids[me], s.weights[me], f[2], return_recv_hook=True)
        for y, s, f in zip(ys, steps, found, strict=True)
    ]
    refused(b.low_latency_combine, ys[0][me], steps[0].ids[me], steps[0].weights[me], found[0][2])
    for y, s, (combined, _, hook) in zip(ys, steps, back, strict=True):
        hook()
        plain.same("combined", combined, summed(s, me, y))


def check_hooks_given_up(n: int, seed: int) -> None:
    """A hook from before a reset takes nothing from the next round; rounds leave nothing to Python's collector."""
    if (b := shared(n)) is None:
        return
    s, me = buffers.step(n, seed), b.rank
    given = s.x[me], s.ids[me], TMAX, s.n_experts
    hooked = {"use_fp8": False, "return_recv_hook": True}
    *_, old = b.low_latency_dispatch(*given, **hooked)
    b.reset()
    refused(old)
    recv_x, count, handle, _, hook = b.low_latency_dispatch(*given, **hooked)
    refused(old)
    hook()
    check_received(b, s, "bf16", recv_x, count, handle)
    seen = weakref.ref(handle)
    was_on = gc.isenabled()
    gc.disable()
    try:
        del recv_x, count, handle, hook, _
        assert seen() is None
    finally:
        if was_on:
            gc.enable()


def refused(call, *args, **more) -> None:
    try:
        call(*args, **more)
    except OrderError:
        return
    raise AssertionError("not refused")


def check_both_modes_in_turn(n: int, seed: int) -> None:
    """Rounds of one mode leave nothing behind that the other would have to clean."""
    from tests.torch import normal_calls

    for i in range(3):
        normal_calls.check_round(n, seed + i)
        if (b := shared(n)) is not None:
            b.clean_low_latency_buffer(TMAX, HIDDEN, LOCAL * n)
        check_round(n, seed + i, "bf16", hook=i == 1)


# Masks


def without(s: plain.Step, lost: list[int]) -> plain.Step:
    """The step as it is without these ranks: they have no tokens, and their experts are nobody's choice."""
    here = [0 if r in lost else len(x) for r, x in enumerate(s.x)]
    ids = [torch.where(torch.isin(i // LOCAL, torch.tensor(lost)), -1, i) for i in s.ids]
    cut = [[v[:t] for v, t in zip(values, here, strict=True)] for values in (s.x, ids, s.weights)]
    return plain.Step(s.n_experts, *cut)


def round_without(b, seed: int, lost: list[int], fmt: str = "bf16", hook: bool = False) -> float:
    """A round that is right without these ranks; the seconds it took."""
    s, me = buffers.step(b.group_size, seed), b.rank
    want, ys = without(s, lost), expert_rows(b.group_size, seed)
    began = time.monotonic()
    recv_x, count, handle, _, receive = b.low_latency_dispatch(
        s.x[me], s.ids[me], TMAX, s.n_experts, **FORMATS[fmt], return_recv_hook=hook
    )
    receive() if hook else None
    combined, _, receive = b.low_latency_combine(ys[me], s.ids[me], s.weights[me], handle, return_recv_hook=hook)
    receive() if hook else None
    seen = masks(b)  # waits for a GPU
    took = time.monotonic() - began
    check_received(b, want, fmt, recv_x, count, handle)
    plain.same("combined", combined, summed(want, me, ys))
    assert seen == [int(r in lost) for r in range(b.group_size)]
    b.check()
    return took


def masks(b) -> list[int]:
    status = torch.full((b.group_size,), 7, dtype=torch.int32)
    b.low_latency_query_mask_buffer(status)
    return status.tolist()


def all_kinds(b) -> None:
    """A round of all ranks of each kind that is used later: they are made together."""
    for fmt in ("bf16", "fp8"):
        for hook in (False, True):
            round_without(b, 1, [], fmt, hook)


def several_rounds(b, lost: list[int]) -> float:
    """Of each kind, more than there are buffers; the longest."""
    kinds = [(fmt, hook) for fmt in ("bf16", "fp8") for hook in (False, True)]
    return max(round_without(b, 10 + i, lost, *kind) for i, kind in enumerate(3 * kinds))


def check_masked_by_hand(n: int) -> float:
    """The last rank makes no calls, and the others leave it out; the longest round. After `reset` it is back."""
    if (b := buffers.shrinking(n)) is None:
        return 0.0
    all_kinds(b)
    took, lost = 0.0, n - 1
    if b.rank != lost:
        b.low_latency_update_mask_buffer(lost, True)
        took = several_rounds(b, [lost])
    dist.barrier(group=b.group)
    b.reset()
    round_without(b, 2, [])
    return took


def check_masked_for_a_while(n: int, clean: bool) -> None:
    """Ranks that leave each other out, and make as many rounds, go on together when the masks are taken away."""
    if (b := buffers.shrinking(n)) is None:
        return
    all_kinds(b)
    lost = [n - 1] if b.rank != n - 1 else list(range(n - 1))
    for rank in lost:
        b.low_latency_update_mask_buffer(rank, True)
    several_rounds(b, lost)
    if clean:
        b.low_latency_clean_mask_buffer()
    else:
        for rank in lost:
            b.low_latency_update_mask_buffer(rank, False)
    dist.barrier(group=b.group)
    several_rounds(b, [])


def check_late(n: int, lost: list[int], hook: bool) -> tuple[float, float]:
    """Ranks that do not come are left out after the deadline; seconds of that round, and of the longest one later."""
    if (b := buffers.shrinking(n)) is None:
        return 0.0, 0.0
    all_kinds(b)
    first = later = 0.0
    dist.barrier(group=b.group)
    if b.rank not in lost:
        first = round_without(b, 3, lost, "bf16", hook)
        later = several_rounds(b, lost)
    dist.barrier(group=b.group)
    b.reset()
    round_without(b, 2, [])
    return first, later


def check_back_too_late(n: int) -> float:
    """The last rank sends nothing back until the others have gone on without it. Then it leaves them out, and nothing
    of it comes to slots that belong to others by then. Seconds that it takes."""
    if (b := buffers.shrinking(n)) is None:
        return 0.0
    all_kinds(b)
    s, me, ys = buffers.step(n, 4), b.rank, expert_rows(n, 4)
    found = b.low_latency_dispatch(s.x[me], s.ids[me], TMAX, s.n_experts, use_fp8=False)
    check_received(b, s, "bf16", *found[:3])
    took, lost, back = 0.0, n - 1, (ys[me], s.ids[me], s.weights[me], found[2])
    if me == lost:
        dist.barrier(group=b.group)
        began = time.monotonic()
        combined = b.low_latency_combine(*back)[0]
        assert masks(b) == [1] * lost + [0]
        took = time.monotonic() - began
        plain.same("combined", combined, summed(s, me, ys, list(range(lost))))
        dist.barrier(group=b.group)
    else:
        plain.same("combined", b.low_latency_combine(*back)[0], summed(s, me, ys, [lost]))
        several_rounds(b, [lost])
        before = [memory.copy() for memory in slots(b)]
        dist.barrier(group=b.group)
        dist.barrier(group=b.group)
        for was, now in zip(before, slots(b), strict=True):
            assert (was == now).all(), "a row that nobody waits for"
    b.reset()
    round_without(b, 2, [])
    return took


def slots(b) -> list[np.ndarray]:
    """The combine windows of this rank."""
    own = [rounds.comm.memories[b.rank] for rounds in b._session.made()]
    return [m.window("combine_recv") if hasattr(m, "window") else m.combine_recv for m in own]


def check_failed_peer(n: int) -> float:
    """Too many tokens on one rank are an error there; the others leave it out at once. Until `reset` on all."""
    if (b := buffers.shrinking(n)) is None:
        return 0.0
    all_kinds(b)
    began = time.monotonic()
    if b.rank == 0:
        x = torch.zeros(TMAX + 1, HIDDEN, dtype=torch.bfloat16)
        ids = torch.zeros(TMAX + 1, buffers.TOP_K, dtype=torch.int64)
        with pytest.raises(CapacityError, match="rank 0"):
            b.low_latency_dispatch(x, ids, TMAX, LOCAL * n, use_fp8=False)
            b.check()
    else:
        round_without(b, 3, [0])
    took = time.monotonic() - began
    dist.barrier(group=b.group)
    b.reset()
    round_without(b, 2, [])
    return took


def die_and_leave_the_others(rank: int, hook: bool) -> tuple[float, float]:
    """In processes of their own: one ends, with `hook` when it has sent a round that nobody has received yet. The
    others go on; seconds of the first round without it, and of the longest one later."""
    b = buffers.patient(dist.group.WORLD, buffers.PATIENCE_S)
    all_kinds(b)
    s, me, ys = buffers.step(b.group_size, 4), b.rank, expert_rows(b.group_size, 4)
    found = b.low_latency_dispatch(s.x[me], s.ids[me], TMAX, s.n_experts, use_fp8=False, return_recv_hook=hook)
    b.check()
    if hook:
        dist.barrier()
    if me == rank:
        os._exit(9)
    began = time.monotonic()
    recv_x, count, handle, _, receive = found
    receive() if hook else None
    combined, _, _ = b.low_latency_combine(ys[me], s.ids[me], s.weights[me], handle)
    assert masks(b) == [int(r == rank) for r in range(b.group_size)]
    took = time.monotonic() - began
    check_received(b, s, "bf16", recv_x, count, handle)  # what it sent is there
    plain.same("combined", combined, summed(s, me, ys, [rank]))
    later = several_rounds(b, [rank])
    b.destroy()
    return took, later


def check_bad_masks(n: int) -> None:
    """What cannot be masked is named; without enable_shrink nothing can."""
    if (b := buffers.shrinking(n)) is None:
        return
    me, before = b.rank, masks(b)
    for rank, word in ((me, "leave itself out"), (n, f"0 to {n - 1}"), (-1, f"0 to {n - 1}"), ("0", "rank_to_mask")):
        with pytest.raises(ConfigError, match=word):
            b.low_latency_update_mask_buffer(rank, True)
    b.low_latency_update_mask_buffer(me, False)
    with pytest.raises(ShapeError, match="mask_status"):
        b.low_latency_query_mask_buffer(torch.zeros(n + 1, dtype=torch.int32))
    with pytest.raises(DTypeError, match="mask_status"):
        b.low_latency_query_mask_buffer(torch.zeros(n, dtype=torch.int64))
    assert masks(b) == before == [0] * n
    plain_one = shared(n)
    for call in (
        lambda: plain_one.low_latency_update_mask_buffer((me + 1) % n, True),
        lambda: plain_one.low_latency_query_mask_buffer(torch.zeros(n, dtype=torch.int32)),
        plain_one.low_latency_clean_mask_buffer,
    ):
        with pytest.raises(ConfigError, match="enable_shrink=True"):
            call()
