"""The tests of virtual ranks on the host, on one GPU: the same configs, rounds and reference, the GPU's stages."""

import numpy as np
import pytest
from graph.stages import REDUCE_MODES, Engine
from graph.test_conformance import (  # noqa: F401
    test_blocks_of_more_messages_than_lanes,
    test_budget_of_workers,
    test_float32_rows_and_a_hidden_size_between_vectors,
    test_many_chunks_for_each_worker,
    test_more_payload_than_one_worker_takes,
    test_round,
    test_so_many_tokens_that_several_ctas_map_a_source,
    test_tokens_that_are_quantised_already,
)
from graph.test_ops_alone import test_ops_refuse_windows_of_the_other_slot_policy  # noqa: F401
from graph.test_order import (  # noqa: F401
    CFG,
    assert_right,
    fails,
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
from graph.virtual import Play, random_round

import ep_mojo as ep


@pytest.fixture(params=[CFG.max_tokens_per_rank, 171, 683], ids=["as_cells", "not_messages", "with_signals"])
def engine(request, stages):
    """In place of that of `test_order`: with few tokens, and with room for more and for many, kernels are others."""
    with Engine(stages, CFG.replace(max_tokens_per_rank=request.param)) as made:
        yield made


def sent_back(engine, reduce, rnd=None):
    """A round up to combine_async."""
    play = Play(engine, [rnd or random_round(engine.cfg, 5, reduce=reduce, routing="uniform", ragged=False)])
    for action in ("send", "receive", "send_back"):
        for rank in range(engine.cfg.n_ranks):
            play.step(action, rank)
    assert not play.differences
    return play


def refused_until_reset(engine, play, ids, error, text):
    """Rank 1 sums with other choices than it has sent with: nothing comes of it, and after a reset nothing is left."""
    play.rounds[0].case.topk_ids[1] = ids
    for rank in range(engine.cfg.n_ranks):
        play.step("receive_back", rank)
    assert not play.outputs[0][1].any()
    fails(engine, error, text, [1])
    engine.comm.reset()
    for seed in range(3):
        assert_right(engine, seed)


@pytest.mark.parametrize("reduce", REDUCE_MODES)
def test_combine_awaits_fewer_rows_than_come(engine, reduce):
    """What nobody reads would lie there for a later round: an error, and nothing of it is left after a reset."""
    if not engine.cfg.rows_in_cells:
        pytest.skip("rows travel with signals, and what nobody reads is written over")
    play = sent_back(engine, reduce)
    ids = play.rounds[0].case.topk_ids[1].copy()
    ids[0] = -1
    text = "rows that rank . sends back = .*rank 1, combine_wait.*topk_ids"
    refused_until_reset(engine, play, ids, ep.ShapeError, text)


def test_combine_awaits_as_many_sums_as_come_but_others(engine):
    """Choices of two tokens are exchanged: virtual ranks wait for nothing, so one that is not there is out of order."""
    if not engine.cfg.rows_in_cells:
        pytest.skip("rows travel with signals, and whatever lies in a slot is added up")
    play = sent_back(engine, "expert")
    ids = play.rounds[0].case.topk_ids[1].copy()
    ranks = [set(row // engine.cfg.n_local_experts) for row in ids]
    other = next(t for t, found in enumerate(ranks) if found != ranks[0])
    ids[[0, other]] = ids[[other, 0]]
    refused_until_reset(engine, play, ids, ep.OrderError, "rank 1, combine_wait")


@pytest.mark.parametrize("reduce", REDUCE_MODES)
def test_rows_that_are_what_an_empty_place_stands_for(engine, reduce):
    """`full_cell` in cell.mojo: 16 bytes of bfloat16 NaNs."""
    pattern = np.array([0x7FFF, 0xFFFF, 0xFFFF, 0x7FFF, 0xFFFF, 0x7FFF, 0x7FFF, 0xFFFF], np.uint16)
    rnd = random_round(engine.cfg, 5, reduce=reduce, routing="uniform", ragged=False)
    rnd.ys = [np.broadcast_to(pattern, y.shape).copy() for y in rnd.ys]
    play = sent_back(engine, reduce, rnd)
    for rank in range(engine.cfg.n_ranks):
        play.step("receive_back", rank)
        y, awaited = play.outputs[0][rank], (rnd.case.topk_ids[rank] >= 0).any(axis=1)
        assert ((y[: len(awaited)][awaited] & 0x7FFF) > 0x7F80).all()  # NaN
    engine.comm.check()
    assert_right(engine)
