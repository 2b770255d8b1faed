"""Order: the same bytes in any order; stages in a wrong order, overflows and what comes after them."""

import numpy as np
import pytest
from graph.stages import COMBINE_TYPES, FP8_HIDDEN, LAYOUTS, REDUCE_MODES, Engine
from graph.virtual import ACTIONS, Play, random_round

import ep_mojo as ep
from ep_mojo import layout as offsets

CFG = ep.EPConfig(hidden_size=8, top_k=3, n_experts=6, max_tokens_per_rank=7, n_ranks=3)


@pytest.fixture
def engine(stages):
    with Engine(stages, CFG) as made:
        yield made


def play_in_order(engine, rounds, order=None):
    """All ranks of one stage, then the next stage."""
    play = Play(engine, rounds)
    for _ in rounds:
        for action in ACTIONS:
            for rank in range(engine.cfg.n_ranks) if order is None else order:
                play.step(action, rank)
    return play


def assert_right(engine, seed=99):
    """A whole round without a difference."""
    play = play_in_order(engine, [random_round(engine.cfg, seed)])
    engine.comm.check()
    assert not play.differences, "\n".join(play.differences)


def assert_no_rows(handle, rank, cfg=CFG):
    """What a failed dispatch_wait gives."""
    assert not handle.counts.any()
    assert not handle.row_offsets.any()
    assert not handle.recv_num_tokens.any()
    assert not handle.recv_weights.any()
    assert (handle.row_map == -1).all()
    assert (handle.src_info == -1).all()
    assert (handle.local_ids == -1).all()
    assert not handle.local_weights.any()


def fails(engine, error, match, ranks):
    """The named error, on exactly these ranks."""
    with pytest.raises(error, match=match) as caught:
        engine.comm.check()
    assert sorted(caught.value.by_rank) == sorted(ranks)
    return caught.value


# The same bytes


@pytest.mark.parametrize("reduce", REDUCE_MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_runs_and_any_order_of_ranks_give_the_same_bytes(stages, layout, reduce):
    cfg = CFG.replace(output_layout=layout, n_ranks=3)
    rounds = [random_round(cfg, seed, reduce=reduce, special=0.05) for seed in range(2)]
    seen = set()
    for order in ([0, 1, 2], [0, 1, 2], [2, 1, 0], [1, 2, 0]):
        with Engine(stages, cfg) as engine:
            seen.add(play_in_order(engine, rounds, order).all_bytes())
    for seed in range(4):
        with Engine(stages, cfg) as engine:
            play = Play(engine, rounds)
            play.run(np.random.default_rng(seed))
            seen.add(play.all_bytes())
    assert len(seen) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_number_of_workers_changes_nothing(stages, layout):
    types = COMBINE_TYPES[FP8_HIDDEN]
    seen = set()
    for n_sms in (1, 2, None):
        cfg = CFG.replace(
            hidden_size=FP8_HIDDEN,
            dispatch_format=ep.BlockwiseFP8(),
            output_layout=layout,
            max_tokens_per_rank=120,
            combine_dtype=types[0],
            output_dtype=types[1],
            n_sms=n_sms,
        )
        with Engine(stages, cfg) as engine:
            seen.add(play_in_order(engine, [random_round(cfg, 1, ragged=False)]).all_bytes())
    assert len(seen) == 1


def test_buffers_wrap(stages):
    cfg = CFG.replace(num_buffers=3)
    with Engine(stages, cfg) as engine:
        differences = Play(engine, [random_round(cfg, seed) for seed in range(20)]).run(np.random.default_rng(0))
        engine.comm.check()
        assert all(offsets.read_epochs(m.counters) == (20, 20, 20, 20) for m in engine.comm.memories)
    assert not differences


def test_a_handle_outlives_later_rounds(engine):
    """Combine with the handle of the first round after three more have gone through the same buffers."""
    rounds = [random_round(engine.cfg, seed) for seed in range(4)]
    play = Play(engine, rounds)
    for _ in rounds:
        for action in ("send", "receive"):
            for rank in range(3):
                play.step(action, rank)
    for _ in rounds:
        for action in ("send_back", "receive_back"):
            for rank in range(3):
                play.step(action, rank)
    engine.comm.check()
    assert not play.differences


def test_a_handle_serves_twice(engine):
    rnd = random_round(engine.cfg, 7)
    play = play_in_order(engine, [rnd])
    again = Play(engine, [rnd])
    again.handles = play.handles
    for action in ("send_back", "receive_back"):
        for rank in range(3):
            again.step(action, rank)
    engine.comm.check()
    assert not again.differences
    assert [y.tobytes() for y in again.outputs[0]] == [y.tobytes() for y in play.outputs[0]]


# A wrong order


def test_wait_before_async(engine):
    assert_no_rows(engine.receive(1), 1)
    fails(engine, ep.OrderError, r"rank 1, dispatch_wait: nothing was sent.*\*_async first.*comm\.reset\(\)", [1])
    engine.comm.reset()
    assert_right(engine)


def test_combine_wait_before_async(engine):
    rnd = random_round(engine.cfg, 3)
    x = rnd.case.xs[0]
    ids = rnd.case.topk_ids[0].astype(np.int32)
    y = engine.receive_back(0, ids, np.zeros((0, 0), np.uint16))
    assert y.shape == x.shape
    assert not y.any()
    fails(engine, ep.OrderError, r"rank 0, combine_wait: nothing was sent", [0])
    engine.comm.reset()
    assert_right(engine)


def test_wait_although_a_peer_has_not_sent(engine):
    play = Play(engine, [random_round(engine.cfg, 0)])
    for rank in (0, 2):
        play.step("send", rank)
    assert_no_rows(engine.receive(2), 2)
    fails(engine, ep.OrderError, r"rank 2, dispatch_wait: the header of rank 1 is not there", [2])
    engine.comm.reset()
    assert_right(engine)


def test_combine_wait_although_a_peer_has_not_sent(engine):
    rnd = random_round(engine.cfg, 0, routing="uniform", ragged=False)
    play = Play(engine, [rnd])
    for action, ranks in (("send", (0, 1, 2)), ("receive", (0, 1, 2)), ("send_back", (0, 1))):
        for rank in ranks:
            play.step(action, rank)
    play.step("receive_back", 0)
    assert not play.outputs[0][0].any()
    fails(engine, ep.OrderError, r"rank 0, combine_wait: the header of rank 2 is not there", [0])
    engine.comm.reset()
    assert_right(engine)


@pytest.mark.parametrize("buffers", [1, 2, 4])
def test_one_dispatch_too_many_in_flight(stages, buffers):
    cfg = CFG.replace(num_buffers=buffers)
    with Engine(stages, cfg) as engine:
        rounds = [random_round(cfg, seed) for seed in range(buffers + 1)]
        play = Play(engine, rounds)
        for _ in range(buffers):
            for rank in range(3):
                play.step("send", rank)
        engine.comm.check()
        play.step("send", 1)
        fails(engine, ep.OrderError, rf"rank 1, dispatch_async: more than num_buffers = {buffers}.*num_buffers", [1])
        assert_no_rows(engine.receive(1), 1)
        engine.comm.reset()
        assert_right(engine)


def test_one_combine_too_many_in_flight(engine):
    rounds = [random_round(engine.cfg, seed) for seed in range(3)]
    play = Play(engine, rounds)
    for _ in rounds:
        for action in ("send", "receive"):
            for rank in range(3):
                play.step(action, rank)
    for _ in rounds:
        play.step("send_back", 0)
    fails(engine, ep.OrderError, r"rank 0, combine_async: more than num_buffers = 2", [0])
    engine.comm.reset()
    assert_right(engine)


def test_a_buffer_that_a_peer_still_reads(engine):
    """Rank 0 is two rounds ahead of rank 1, and may not overwrite what rank 1 has not read yet."""
    rounds = [random_round(engine.cfg, seed) for seed in range(3)]
    play = Play(engine, rounds)
    for _ in range(2):
        for rank in range(3):
            play.step("send", rank)
        for rank in (0, 2):
            play.step("receive", rank)
    play.step("send", 0)
    fails(engine, ep.OrderError, r"rank 0, dispatch_async: the credit of rank 1 is not there", [0])
    engine.comm.reset()
    assert_right(engine)


def test_failure_is_sticky_and_spreads_by_name(engine):
    engine.receive(1)  # an OrderError, on record at rank 1
    play = Play(engine, [random_round(engine.cfg, 0, routing="uniform", ragged=False)])
    for rank in range(3):
        play.step("send", rank)
    for rank in range(3):
        play.step("receive", rank)
        assert_no_rows(play.handles[0][rank], rank)
    for rank in range(3):
        play.step("send_back", rank)
    for rank in range(3):
        play.step("receive_back", rank)
        assert not play.outputs[0][rank].any()
    error = fails(engine, ep.OrderError, r"rank 1, dispatch_wait", [0, 1, 2])
    for rank in (0, 2):
        assert isinstance(error.by_rank[rank], ep.PeerTimeoutError)
        assert "rank 1 failed" in str(error.by_rank[rank])
    engine.comm.reset()
    assert_right(engine)


# Overflow


@pytest.mark.parametrize("layout", ["expert", "rank", "gathered"])
def test_more_rows_than_max_rows(stages, layout):
    full = CFG.replace(output_layout=layout)
    rnd = random_round(full, 1, routing="uniform", ragged=False)
    needed = [int(h.row_offsets[-1]) for h in rnd.handles]
    worst = max(needed)
    with Engine(stages, full.replace(max_rows=worst)) as engine:  # just enough
        fitting = random_round(engine.cfg, 1, routing="uniform", ragged=False)
        assert not play_in_order(engine, [fitting]).differences
        engine.comm.check()
    cfg = full.replace(max_rows=worst - 1)
    with Engine(stages, cfg) as engine:
        play = Play(engine, [rnd])
        over = [r for r in range(3) if needed[r] > cfg.max_rows]
        for rank in range(3):
            play.step("send", rank)
        handles = [engine.receive(rank) for rank in range(3)]
        for rank in over:
            assert_no_rows(handles[rank], rank, cfg)
        text = rf"max_rows = {cfg.max_rows}: rank {over[0]}, dispatch_wait: {worst} rows.*at least {worst}.*reset"
        error = fails(engine, ep.CapacityError, text, error_ranks(engine))
        assert set(over) <= set(error.by_rank)
        engine.receive(over[0])
        fails(engine, ep.CapacityError, text, error_ranks(engine))  # sticky
        engine.comm.reset()
        small = random_round(cfg, 4, routing="none")
        assert not play_in_order(engine, [small]).differences
        engine.comm.check()


def error_ranks(engine):
    return [m.rank for m in engine.comm.memories if m.error() is not None]


def test_repeats_overflow_expert_padded(stages):
    """R * Tmax rows an expert are enough unless tokens choose it more than once."""
    cfg = CFG.replace(output_layout="expert_padded", top_k=2)
    rnd = random_round(cfg, 1, routing="uniform", ragged=False)
    for ids in rnd.case.topk_ids:
        ids[:] = 4
    with Engine(stages, cfg) as engine:
        play = Play(engine, [rnd])
        for rank in range(3):
            play.step("send", rank)
        handles = [engine.receive(rank) for rank in range(3)]
        assert_no_rows(handles[2], 2)
        assert not handles[0].counts.any()
        fails(engine, ep.CapacityError, r"= 21: rank 2, dispatch_wait: 42 rows arrived.*at least 42.*reset", [2])
        engine.comm.reset()
        assert_right(engine)


def test_alignment_counts_as_rows(stages):
    cfg = CFG.replace(alignment=16, max_rows=31)
    rnd = random_round(CFG.replace(alignment=16), 1, routing="uniform", ragged=False)
    with Engine(stages, cfg) as engine:
        play = Play(engine, [rnd])
        for rank in range(3):
            play.step("send", rank)
        assert_no_rows(engine.receive(0), 0)
        needed = int(rnd.handles[0].row_offsets[-1])
        fails(engine, ep.CapacityError, rf"max_rows = 31: rank 0, dispatch_wait: {needed} rows", [0])


def test_reset_brings_ranks_together_that_are_rounds_apart(engine):
    rounds = [random_round(engine.cfg, seed) for seed in range(2)]
    play = Play(engine, rounds)
    for rank in range(3):
        play.step("send", rank)
    play.step("receive", 0)
    play.step("send", 0)
    engine.comm.reset()
    for m in engine.comm.memories:
        assert offsets.read_epochs(m.counters) == (2, 2, 2, 2)
    assert_right(engine)
    assert_right(engine, 5)
