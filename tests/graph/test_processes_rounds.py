"""Rounds with a process for each rank: split, fused, delayed, overlapping; equal to the reference bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
from graph import rounds

import ep_mojo as ep

CFG = rounds.CFG
N_ROUNDS = 1000
NO_DELAY = 0, 0.0
DELAYS = 0.2, 0.003
"""Share of the stages before which a rank sleeps, and the longest sleep in seconds."""


@pytest.fixture(scope="module")
def comm():
    with ep.Communicator.processes(CFG) as made:
        yield made


@pytest.fixture(scope="module")
def models(comm):
    return rounds.build(comm)


@pytest.fixture(scope="module")
def steps():
    """Twelve rounds with different T, so that neighbours never fit by accident."""
    return rounds.make_steps(CFG, 12, seed=1)


def per_rank(steps, seed, delays):
    return [[(seed, rank, *delays), mine] for rank, mine in enumerate(steps)]


def expect_right(results):
    """No differences; returns the digests of the ranks."""
    found = [text for differences, _ in results for text in differences]
    assert not found, "\n".join(found)
    return [digest for _, digest in results]


@pytest.fixture(scope="module")
def digests(comm, models, steps):
    """What 1,000 fused rounds with random delays give."""
    return expect_right(comm.run(rounds.play_fused, models["round"], N_ROUNDS, per_rank=per_rank(steps, 1, DELAYS)))


def test_a_thousand_fused_rounds_with_delays(digests):
    assert len(set(digests)) == 4


def test_a_thousand_split_rounds_overlapping_with_delays(comm, models, steps, digests):
    """The four stages in a random order, the same on all ranks, with up to num_buffers rounds in flight."""
    schedule = rounds.make_schedule(N_ROUNDS, CFG.num_buffers, seed=2)
    in_flight, most = 0, 0
    for stage, _ in schedule:
        in_flight += {"send": 1, "receive": -1}.get(stage, 0)
        most = max(most, in_flight)
    assert most == CFG.num_buffers
    got = expect_right(comm.run(rounds.play_split, models, schedule, per_rank=per_rank(steps, 2, DELAYS)))
    assert got == digests, "split and fused must give the same bytes"


@pytest.mark.parametrize("first", range(4))
def test_ranks_that_start_in_any_order_give_the_same_bytes(comm, models, steps, first):
    late = [[0.05 * ((rank + first) % 4), *extra] for rank, extra in enumerate(per_rank(steps, first, NO_DELAY))]
    got = expect_right(comm.run(start_late, models["round"], len(steps[0]), per_rank=late))
    once = expect_right(
        comm.run(rounds.play_fused, models["round"], len(steps[0]), per_rank=per_rank(steps, 9, DELAYS))
    )
    assert got == once


def start_late(comm, model, n_rounds, seconds, delays, steps):
    import time

    time.sleep(seconds)
    return rounds.play_fused(comm, model, n_rounds, delays, steps)


def test_fused_halves_are_the_round(comm, models, steps):
    """Fused dispatch and fused combine as graphs of their own, through the parent."""
    for i in range(4):
        mine = [s[i] for s in steps]
        flat = comm.execute(
            models["dispatch"], *(s.x for s in mine), *(s.ids for s in mine), *(s.weights for s in mine)
        )
        flat_of = [flat[r::4] for r in range(4)]
        for r in range(4):
            assert not rounds.compare(CFG, mine[r], flat_of[r])
        ys = comm.execute(models["combine"], *flat, *(s.weights for s in mine))
        for r in range(4):
            assert not rounds.compare(CFG, mine[r], None, ys[r])


def test_a_handle_can_be_used_again_and_again(comm, models, steps):
    """Later rounds reuse every buffer; the handle of the first one still gives the same rows."""
    first = comm.run(rounds_between, models, 5, per_rank=[[s] for s in steps])
    for differences in first:
        assert not differences, "\n".join(differences)


def rounds_between(comm, models, n, steps):
    kept = comm.execute_local(models["dispatch"], *steps[0].inputs)
    copies = [np.copy(a) for a in kept]
    found = []
    for i in range(1, n):
        other = comm.execute_local(models["dispatch"], *steps[i].inputs)
        for step, flat in ((steps[0], kept), (steps[i], other), (steps[0], kept)):
            (y,) = comm.execute_local(models["combine"], *flat, step.weights)
            found += rounds.compare(comm.cfg, step, None, y)
    if any(a.tobytes() != b.tobytes() for a, b in zip(kept, copies, strict=True)):
        found.append("later rounds changed the handle")
    return found


@pytest.mark.parametrize("stage", ["send", "send_back"])
def test_one_round_too_many_in_flight_is_an_order_error(comm, models, steps, stage):
    errors = comm.run(send_too_many, models, stage, per_rank=[[s] for s in steps], raise_errors=False)
    name = {"send": "dispatch_async", "send_back": "combine_async"}[stage]
    for rank, error in enumerate(errors):
        assert isinstance(error, ep.OrderError), error
        assert f"rank {rank}, {name}: more than num_buffers = 2 rounds are in flight" in str(error)
    with pytest.raises(ep.OrderError):
        comm.check()
    comm.reset()
    expect_right(comm.run(rounds.play_fused, models["round"], 3, per_rank=per_rank(steps, 0, NO_DELAY)))


def send_too_many(comm, models, stage, steps):
    handle = comm.execute_local(models["dispatch"], *steps[0].inputs)
    arguments = steps[0].inputs if stage == "send" else (*handle, steps[0].weights)
    for _ in range(comm.cfg.num_buffers + 1):
        comm.execute_local(models[stage], *arguments)


@pytest.mark.parametrize("stage", ["receive", "receive_back"])
def test_a_wait_without_a_send_is_an_order_error(comm, models, steps, stage):
    errors = comm.run(wait_for_nothing, models, stage, per_rank=[[s] for s in steps], raise_errors=False)
    for error in errors:
        assert isinstance(error, ep.OrderError), error
        assert "nothing was sent" in str(error)
    comm.reset()
    expect_right(comm.run(rounds.play_fused, models["round"], 3, per_rank=per_rank(steps, 0, NO_DELAY)))


def wait_for_nothing(comm, models, stage, steps):
    handle = comm.execute_local(models["dispatch"], *steps[0].inputs)
    arguments = (steps[0].ids, steps[0].weights) if stage == "receive" else (*handle, steps[0].weights)
    comm.execute_local(models[stage], *arguments)
