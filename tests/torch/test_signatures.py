"""Calls take what programs for DeepEP and Megatron-Core's inference dispatchers pass, in that order; and sizes hold."""

from __future__ import annotations

import inspect

import pytest

import ep_mojo.torch as ept

BUFFER = {
    "__init__": (
        "group num_nvl_bytes num_rdma_bytes low_latency_mode num_qps_per_rank allow_nvlink_for_low_latency_mode "
        "allow_mnnvl explicitly_destroy enable_shrink comm"
    ),
    "get_dispatch_layout": "topk_idx num_experts previous_event async_finish allocate_on_comm_stream",
    "dispatch": (
        "x handle num_tokens_per_rank num_tokens_per_rdma_rank is_token_in_rank num_tokens_per_expert topk_idx "
        "topk_weights expert_alignment num_worst_tokens config previous_event async_finish allocate_on_comm_stream"
    ),
    "combine": "x handle topk_weights bias config previous_event async_finish allocate_on_comm_stream",
    "low_latency_dispatch": (
        "x topk_idx num_max_dispatch_tokens_per_rank num_experts cumulative_local_expert_recv_stats "
        "dispatch_wait_recv_cost_stats use_fp8 round_scale use_ue8m0 async_finish return_recv_hook"
    ),
    "low_latency_combine": (
        "x topk_idx topk_weights handle use_logfmt zero_copy async_finish return_recv_hook out "
        "combine_wait_recv_cost_stats"
    ),
    "get_low_latency_rdma_size_hint": "num_max_dispatch_tokens_per_rank hidden num_ranks num_experts",
    "clean_low_latency_buffer": "num_max_dispatch_tokens_per_rank hidden num_experts",
    "get_next_low_latency_combine_buffer": "handle",
    "low_latency_update_mask_buffer": "rank_to_mask mask",
    "low_latency_query_mask_buffer": "mask_status",
    "low_latency_clean_mask_buffer": "",
    "get_local_buffer_tensor": "dtype size offset use_rdma_buffer",
    "set_num_sms": "new_num_sms",
    "get_dispatch_config": "num_ranks",
    "get_combine_config": "num_ranks",
    "get_comm_stream": "",
    "capture": "",
    "destroy": "",
}
DISPATCHER = {
    "__init__": "num_local_experts local_expert_indices config pg_collection runs_metadata_sync",
    "allocate_buffers": "per_rank_worst_case_token_count topk hidden_size ep_group",
    "update_metadata": "local_tokens",
    "dispatch_preprocess": "hidden_states routing_map probs",
    "token_dispatch": "hidden_states probs",
    "dispatch_postprocess": "hidden_states probs",
    "combine_preprocess": "expert_output",
    "token_combine": "hidden_states",
    "combine_postprocess": "hidden_states",
}
CALLS = [
    *((ept.Buffer, *row) for row in BUFFER.items()),
    *((kind, *row) for kind in (ept.AllGatherDispatcher, ept.AllGatherVDispatcher) for row in DISPATCHER.items()),
]


@pytest.mark.parametrize(("kind", "name", "wanted"), CALLS, ids=[f"{kind.__name__}.{name}" for kind, name, _ in CALLS])
def test_parameters(kind, name, wanted):
    found = list(inspect.signature(getattr(kind, name)).parameters)
    assert [p for p in found if p != "self"] == wanted.split()


@pytest.mark.parametrize("ranks", [2, 3, 4, 6, 8])
def test_low_latency_windows_are_small(ranks):
    """Of 128 tokens of 7168 channels, in bfloat16: below 64 MB a rank."""
    experts = 256 // ranks * ranks
    assert ept.Buffer.get_low_latency_rdma_size_hint(128, 7168, ranks, experts) < 64e6


def test_buffers_defaults():
    """Those that callers rely on."""
    parameters = inspect.signature(ept.Buffer.low_latency_dispatch).parameters
    assert parameters["use_fp8"].default is True
    assert inspect.signature(ept.Buffer.dispatch).parameters["expert_alignment"].default == 1
    assert ept.Buffer.num_sms == 20
