"""`ep_mojo.torch` with a process and a GPU for each rank, over nccl: the checks of tests/torch, and queues, graphs.

EP_MOJO_TEST_RANKS says how many ranks; if there are more than GPUs, they share them, and kernels take turns: right, but
slow. By default there is a rank for each GPU.
"""

from __future__ import annotations

import os

import pytest

torch = pytest.importorskip("torch")

from tests.torch import (  # noqa: E402
    api_calls,
    buffer_calls,
    buffers,
    gather_calls,
    gpu_calls,
    launch,
    life_calls,
    low_latency_calls,
    normal_calls,
)
from tests.torch.launch import Died, Pool  # noqa: E402

COUNT = torch.cuda.device_count() if torch.cuda.is_available() else 0
N = min(int(os.environ.get("EP_MOJO_TEST_RANKS", COUNT)), 8) if COUNT else 0
SIZES = [[(7 * r + 3) % (buffers.TMAX + 1) for r in range(N)], [0] * N, [0, *[5] * (N - 1)], [buffers.TMAX] * N]

pytestmark = pytest.mark.skipif(N < 2, reason="needs two GPUs that torch sees, or one and EP_MOJO_TEST_RANKS=2")


@pytest.fixture(scope="module")
def ready():
    """A process for each GPU, and all graphs."""
    with Pool(N, backend="nccl") as pool:
        pool.run(buffers.prepare, timeout_s=900)
        yield pool


def test_normal_rounds(ready):
    for kind in ("mixed", "none", "one"):
        ready.run(normal_calls.check_layout, N, 5, kind)
    for seed in range(4):
        ready.run(normal_calls.check_round, N, seed)
    ready.run(normal_calls.check_round, N, 5, None, "mixed", 8, True)


def test_any_number_of_tokens_on_any_rank(ready):
    for seed, tokens in enumerate(SIZES):
        ready.run(normal_calls.check_round, N, seed, tokens)
        ready.run(normal_calls.check_without_topk, N, seed, tokens)
        ready.run(normal_calls.check_worst, N, seed, N * buffers.TMAX + 3, tokens)
        ready.run(low_latency_calls.check_round, N, seed, "bf16", tokens, "mixed", bool(seed % 2))


@pytest.mark.parametrize("scale", ["float32", "ue8m0"])
@pytest.mark.parametrize("strided", [False, True], ids=["rows", "columns"])
def test_quantised_tokens(ready, scale, strided):
    ready.run(normal_calls.check_fp8, N, 6, scale, strided)


def test_handles_and_equal_bytes(ready):
    ready.run(normal_calls.check_handle_again, N, 7)
    ready.run(normal_calls.check_same_bytes, N, 20)


@pytest.mark.parametrize("fmt", low_latency_calls.FORMATS)
@pytest.mark.parametrize("hook", [False, True], ids=["whole", "hook"])
def test_low_latency_rounds(ready, fmt, hook):
    for seed, how in enumerate(("", "out", "zero_copy", "")):
        ready.run(low_latency_calls.check_round, N, seed, fmt, None, "mixed", hook, how)


def test_hooks_and_modes(ready):
    ready.run(low_latency_calls.check_two_under_way, N, 1)
    ready.run(low_latency_calls.check_hooks_given_up, N, 1)
    ready.run(low_latency_calls.check_both_modes_in_turn, N, 1)


def test_masks(ready):
    assert max(ready.run(low_latency_calls.check_masked_by_hand, N)) < buffers.PATIENCE_S
    for clean in (False, True):
        ready.run(low_latency_calls.check_masked_for_a_while, N, clean)
    ready.run(low_latency_calls.check_bad_masks, N)
    ready.run(gpu_calls.check_capture_with_masks, N)


@pytest.mark.parametrize("hook", [False, True], ids=["whole", "hook"])
def test_ranks_that_do_not_come_or_fail_are_left_out(ready, hook):
    for lost in ([0], [N - 1], list(range(1, N, 2))):
        first, later = map(max, zip(*ready.run(low_latency_calls.check_late, N, lost, hook), strict=True))
        assert buffers.PATIENCE_S <= first < (len(lost) + 1) * buffers.PATIENCE_S
        assert later < buffers.PATIENCE_S
    assert max(ready.run(low_latency_calls.check_failed_peer, N)) < buffers.PATIENCE_S
    assert max(ready.run(low_latency_calls.check_back_too_late, N)) < buffers.PATIENCE_S


@pytest.mark.parametrize("hook", [False, True], ids=["whole", "hook"])
def test_a_rank_that_dies_is_left_out(hook):
    with Pool(N, backend="nccl") as pool:
        pool.run(buffers.prepare, timeout_s=900)
        found = pool.run(low_latency_calls.die_and_leave_the_others, 1, hook, raise_errors=False)
    assert isinstance(found[1], Died)
    for first, later in found[:1] + found[2:]:
        assert first < 2 * buffers.PATIENCE_S
        assert later < buffers.PATIENCE_S


@pytest.mark.parametrize("name", buffers.CONFIGS)
def test_own_interface(ready, name):
    for seed in range(3):
        ready.run(api_calls.check_api, N, name, seed, torch.int64, True)


def test_compile_library_gradients(ready):
    ready.run(api_calls.check_compiled, N, "aot_eager", timeout_s=300)
    ready.run(api_calls.check_library, N)
    ready.run(api_calls.check_gradients, N)
    ready.run(api_calls.check_gradients_of_each, N)


def test_graphs_between_rounds_of_tensors(ready):
    ready.run(api_calls.check_execute_between, N, timeout_s=300)


def test_bad_input_is_named_and_hangs_nobody(ready):
    assert ready.run(buffer_calls.check_bad_input, N)[0] > 60
    ready.run(buffer_calls.check_bad_buffers)
    ready.run(buffer_calls.check_mismatch, N)
    ready.run(api_calls.check_api_bad_input, N)


@pytest.mark.parametrize("hook", [False, True], ids=["whole", "hook"])
def test_too_many_tokens_on_one_rank(ready, hook):
    assert max(ready.run(buffer_calls.check_too_many_tokens, N, N - 1, hook)) < 10


def test_failures(ready):
    ready.run(buffer_calls.check_worst_too_small, N)
    assert 1 < max(ready.run(buffer_calls.check_missing_rank, N - 1)) < 8


def test_a_rank_that_dies():
    with Pool(N, backend="nccl") as pool:
        pool.run(buffers.prepare, timeout_s=900)
        found = pool.run(buffer_calls.die_in_the_middle, 1, raise_errors=False)
    name, took = found[0]
    assert name in ("PeerLostError", "PeerTimeoutError")
    assert took < 40, "later than the deadline"
    assert isinstance(found[1], Died)


@pytest.mark.parametrize("side", [False, True], ids=["default", "side"])
def test_queues(ready, side):
    ready.run(gpu_calls.check_queues, N, 11, side)
    ready.run(buffer_calls.check_events, N)


def test_memory_of_tensors(ready):
    ready.run(gpu_calls.check_memory, N, 21)
    ready.run(gpu_calls.check_inference_mode, N)
    ready.run(gpu_calls.check_abort, N)
    ready.run(api_calls.check_forgotten, N)


@pytest.mark.parametrize("kind", gpu_calls.ROUNDS)
def test_captured_rounds(ready, kind):
    ready.run(gpu_calls.check_capture, N, kind)


def test_what_captures_cannot_take(ready):
    ready.run(gpu_calls.check_refused_in_capture, N, timeout_s=120)


def test_all_gather_dispatchers(ready):
    ready.run(gather_calls.make_groups)
    for counts in ([8 * (r + 1) for r in range(N)], [16] * N, [5 * (r % 2) for r in range(N)]):
        ready.run(gather_calls.check_steps, N, counts, timeout_s=120)
    ready.run(gather_calls.check_device_counts, N)
    ready.run(gather_calls.check_equal_counts, N)
    ready.run(gather_calls.check_replays, N, 100)
    ready.run(gather_calls.check_refused_in_capture, N)
    ready.run(gather_calls.check_steps, N, [8] * N, "float32", timeout_s=300)
    ready.run(gather_calls.check_shared_experts, N, timeout_s=300)
    ready.run(gather_calls.check_metadata, N, timeout_s=300)
    ready.run(gather_calls.check_bad_input, N, timeout_s=300)


def test_a_rank_that_dies_between_steps():
    with Pool(N, backend="nccl") as pool:
        pool.run(gather_calls.make_groups)
        found = pool.run(gather_calls.die_between_steps, 1, raise_errors=False, timeout_s=300)
    assert isinstance(found[1], Died)
    assert found[0][0] in ("PeerLostError", "PeerTimeoutError")
    assert found[0][1] < 15


def test_settings_and_the_end(ready):
    ready.run(life_calls.check_sizes_and_settings, N)
    ready.run(life_calls.check_after_destroy, N)


@pytest.mark.skipif(N > COUNT, reason="the example takes a GPU for each rank")
def test_the_example_under_torchrun():
    """A layer and its gradients against a dense one."""
    printed = launch.torchrun(N, "torch_moe_layer.py", "--train")
    assert printed.count("gradient of x 0.00") == N, printed


def test_two_hundred_buffers_leave_nothing_behind(ready):
    ready.run(life_calls.check_life, N, 40, timeout_s=200)
    lost = ready.run(gpu_calls.check_leaks, N, 200, timeout_s=300)
    assert max(lost) < 8 << 20, f"bytes lost: {lost}"
