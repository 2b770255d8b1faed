"""The tests of virtual ranks on the host, on one GPU: the same configs, rounds and reference, the GPU's stages."""

import pytest
from graph.stages import Engine
from graph.test_conformance import (  # noqa: F401
    test_blocks_of_more_messages_than_lanes,
    test_budget_of_workers,
    test_float32_rows_and_a_hidden_size_between_vectors,
    test_more_payload_than_one_worker_takes,
    test_round,
    test_so_many_tokens_that_several_ctas_map_a_source,
    test_tokens_that_are_quantised_already,
)
from graph.test_ops_alone import test_ops_refuse_windows_of_the_other_slot_policy  # noqa: F401
from graph.test_order import (  # noqa: F401
    CFG,
    test_a_buffer_that_a_peer_still_reads,
    test_a_handle_outlives_later_rounds,
    test_a_handle_serves_twice,
    test_alignment_counts_as_rows,
    test_buffers_wrap,
    test_combine_wait_although_a_peer_has_not_sent,
    test_combine_wait_before_async,
    test_failure_is_sticky_and_spreads_by_name,
    test_more_rows_than_max_rows,
    test_one_combine_too_many_in_flight,
    test_one_dispatch_too_many_in_flight,
    test_repeats_overflow_expert_padded,
    test_reset_brings_ranks_together_that_are_rounds_apart,
    test_the_number_of_workers_changes_nothing,
    test_two_runs_and_any_order_of_ranks_give_the_same_bytes,
    test_wait_although_a_peer_has_not_sent,
    test_wait_before_async,
)
from graph.test_properties import (  # noqa: F401
    test_bf16,
    test_expert_slots,
    test_expert_slots_with_every_bit_of_a_choice_mask,
    test_fp8,
    test_payload_is_carried_unchanged_in_bf16,
    test_smallest_fp8,
)


@pytest.fixture(params=[CFG.max_tokens_per_rank, 171], ids=["as_cells", "with_signals"])
def engine(request, stages):
    """In place of that of `test_order`: with few tokens, and with room for many, kernels are others."""
    with Engine(stages, CFG.replace(max_tokens_per_rank=request.param)) as made:
        yield made
