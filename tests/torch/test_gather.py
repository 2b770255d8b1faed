"""The all-gather dispatchers of `ep_mojo.torch`, on 1 to 8 processes over gloo: equal bit for bit to plain torch."""

from __future__ import annotations

import pytest

import ep_mojo.torch as ept
from tests.torch import gather_calls as calls
from tests.torch.launch import Died, Pool

MEMBERS = {
    ept.AllGatherDispatcherBase: (
        "_valid_tokens_tensor _host_valid_tokens_estimate _valid_tokens _get_host_valid_tokens_estimate "
        "allocate_valid_tokens_tensor update_metadata"
    ),
    ept.AllGatherDispatcher: (
        "_use_allgather_v _local_tokens_per_rank allocate_buffers update_metadata token_dispatch dispatch_postprocess "
        "combine_preprocess token_combine dispatch_preprocess combine_postprocess"
    ),
    ept.AllGatherVDispatcher: (
        "_step_metadata _per_rank_worst_case_token_count _symm_agv_hidden _symm_agv_routing _symm_agv_probs _symm_rsv "
        "_get_rsv_tensor _rank_token_offset _ep_max_tokens _delete_buffers allocate_buffers update_metadata "
        "dispatch_preprocess token_dispatch dispatch_postprocess combine_preprocess token_combine combine_postprocess "
        "set_shared_experts _external_shared_expert_launch"
    ),
}
"""What programs written for Megatron-Core's inference dispatchers use."""


@pytest.fixture(scope="module")
def eight():
    with Pool(8) as pool:
        pool.run(calls.make_groups)
        yield pool


@pytest.mark.parametrize("kind", MEMBERS)
def test_members(kind):
    missing = [name for name in MEMBERS[kind].split() if not hasattr(kind, name)]
    assert not missing
    assert issubclass(kind, ept.AllGatherDispatcherBase)


@pytest.mark.parametrize("n", range(1, 9))
def test_steps(eight, n):
    for counts in ([8 * (r + 1) for r in range(n)], [16] * n, [5 * (r % 2) for r in range(n)], [calls.TMAX] * n):
        eight.run(calls.check_steps, n, counts, timeout_s=300)
    eight.run(calls.check_device_counts, n)
    eight.run(calls.check_equal_counts, n)


@pytest.mark.parametrize("n", [1, 3, 8])
def test_rows_in_float32(eight, n):
    eight.run(calls.check_steps, n, [8 * (r + 1) for r in range(n)], "float32", timeout_s=300)


def test_shared_experts(eight):
    eight.run(calls.check_shared_experts, 4, timeout_s=300)


def test_unequal_counts_where_they_are_to_be_equal(eight):
    eight.run(calls.check_unequal_counts, 3, timeout_s=300)


def test_metadata_is_fired(eight):
    eight.run(calls.check_metadata, 3, timeout_s=300)


def test_few_choices(eight):
    eight.run(calls.check_few_choices, 2, timeout_s=300)


def test_a_rank_that_dies():
    with Pool(3) as pool:
        pool.run(calls.make_groups)
        found = pool.run(calls.die_between_steps, 1, raise_errors=False, timeout_s=300)
    assert isinstance(found[1], Died)
    for name, took in (found[0], found[2]):
        assert name in ("PeerLostError", "PeerTimeoutError")
        assert took < 15


def test_bad_input(eight):
    eight.run(calls.check_bad_input, 2, timeout_s=300)
    eight.run(calls.check_buffers, 2, timeout_s=300)
