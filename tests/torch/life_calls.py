"""What processes run for the tests of a Buffer's settings, sizes, and end."""

from __future__ import annotations

import gc
import os
import warnings
import weakref

import torch
import torch.distributed as dist

import ep_mojo.torch as ept
from ep_mojo import errors
from tests.torch import buffers, plain
from tests.torch.buffer_calls import raises
from tests.torch.buffers import HIDDEN, TMAX, shared
from tests.torch.launch import kept


def check_sizes_and_settings(n: int) -> None:
    """Size hints are what windows take, and what they are for fits."""
    if (b := shared(n)) is None:
        return
    config = ept.Buffer.get_dispatch_config(n)
    assert (config.num_sms, ept.Buffer.get_combine_config(n)) == (ept.Buffer.num_sms, config)
    assert config.get_rdma_buffer_size_hint(2 * HIDDEN, n) == 0
    ept.Buffer.set_num_sms(24)
    assert ept.Buffer.get_dispatch_config(n) == ept.Config(24)
    ept.Buffer.set_num_sms(config.num_sms)
    on_host = torch.get_default_device().type == "cpu"
    assert isinstance(b.get_comm_stream(), type(torch.cpu.current_stream()) if on_host else torch.cuda.Stream)
    assert b.is_sm90_compiled() is True
    hint = ept.Config().get_nvl_buffer_size_hint(2 * HIDDEN, n)
    assert buffers.sizes.max_tokens(hint, 2 * HIDDEN, n) == 8192
    room, s = buffers.bytes_of(n, 600), buffers.step(n, 1)  # windows of so many tokens have no room for cells
    b = ept.Buffer(kept["group", n], **room)
    buffers.dispatch(b, s)
    most = buffers.sizes.max_tokens(room["num_nvl_bytes"], 2 * HIDDEN, n)
    window = b.get_local_buffer_tensor(torch.bfloat16, (n, most, HIDDEN))
    tokens = plain.rows(s, b.rank, 0)
    plain.same("messages of rank 0", window[0][tokens], s.x[0][tokens])
    assert b.get_local_buffer_tensor(torch.bfloat16, (3,), HIDDEN).data_ptr() == window.data_ptr() + 2 * HIDDEN
    assert b.get_local_buffer_tensor(torch.int32).numel() >= n * most * HIDDEN // 2
    raises(errors.ShapeError, lambda: b.get_local_buffer_tensor(torch.uint8, (1 << 40,)), "size")
    raises(errors.ConfigError, lambda: b.get_local_buffer_tensor(torch.uint8, (-1,)), "size")
    assert b.get_local_buffer_tensor(torch.uint8, 16).shape == (16,)
    raises(errors.DTypeError, lambda: b.get_local_buffer_tensor("bf16"), "dtype")
    b.destroy()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def mappings() -> int:
    with open("/proc/self/maps") as f:
        return sum(1 for _ in f)


def check_after_destroy(n: int) -> None:
    """Every call but destroy names what has happened."""
    if dist.get_rank() >= n:
        return
    b, s = ept.Buffer(kept["group", n], **buffers.bytes_of(n), enable_shrink=True), buffers.step(n, 1)
    me = b.rank
    handle = buffers.dispatch(b, s)[4]
    found = b.low_latency_dispatch(s.x[me], s.ids[me], TMAX, s.n_experts, use_fp8=False, return_recv_hook=True)
    layout = plain.layout(b, s)
    b.destroy()
    y = torch.zeros(handle.num_recv_tokens, HIDDEN, dtype=torch.bfloat16)
    rows = found[0]
    for call in (
        b.get_comm_stream,
        b.reset,
        b.low_latency_clean_mask_buffer,
        found[4],
        lambda: b.get_local_buffer_tensor(torch.uint8),
        lambda: b.get_dispatch_layout(s.ids[me], s.n_experts),
        lambda: b.dispatch(s.x[me], topk_idx=s.ids[me], topk_weights=s.weights[me], **layout),
        lambda: b.dispatch(s.x[me], handle=handle),
        lambda: b.combine(y, handle),
        lambda: b.clean_low_latency_buffer(TMAX, HIDDEN, s.n_experts),
        lambda: b.low_latency_dispatch(s.x[me], s.ids[me], TMAX, s.n_experts),
        lambda: b.low_latency_combine(rows, s.ids[me], s.weights[me], found[2]),
        lambda: b.get_next_low_latency_combine_buffer(found[2]),
    ):
        raises(errors.OrderError, call, "destroyed")
    b.destroy()


def check_life(n: int, cycles: int) -> None:
    """Made and destroyed many times, in both ways, with a round of each mode now and then; nothing stays behind."""
    if dist.get_rank() >= n:
        return
    s = buffers.step(n, 1)
    counts, refs = [], []
    for i in range(cycles):
        by_hand = i % 2 == 0
        b = ept.Buffer(kept["group", n], **buffers.bytes_of(n), explicitly_destroy=by_hand)
        refs.append(weakref.ref(b))
        if i % 4 < 2:
            buffers.dispatch(b, s)
            b.low_latency_dispatch(s.x[b.rank], s.ids[b.rank], TMAX, s.n_experts, use_fp8=False)
        if by_hand:
            b.destroy()
            b.destroy()
        del b
        assert refs[-1]() is None, "something holds the Buffer"
        if i in (cycles // 4, cycles - 1):
            gc.collect()
            dist.barrier(group=kept["group", n])
            counts.append((open_files(), mappings()))
    (files, maps), (files_after, maps_after) = counts
    assert files_after <= files + 2, f"open files: {files}, then {files_after}"
    assert maps_after <= maps + 8, f"mappings: {maps}, then {maps_after}"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        b = ept.Buffer(kept["group", n], explicitly_destroy=True)
        del b
    assert [w.category for w in seen] == [ResourceWarning]
