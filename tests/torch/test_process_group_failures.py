"""`Communicator.process_group` when something goes wrong in a round: named errors in time, and what helps then."""

from __future__ import annotations

import os
import re
import signal

import pytest

from tests.torch import group_calls as calls
from tests.torch.launch import Died, Pool

DEADLINE_S = 1.0
SLACK_S = 4.0
"""Scheduling on a busy machine."""
AT_ONCE_S = 10.0
"""Far below the deadline of 60 s."""
RIGHT = [(None, "")]


@pytest.fixture
def impatient(built):
    """A communicator of 4 ranks, kept as "impatient", whose deadline is short."""
    built.run(calls.open_comm, "impatient", calls.CFGS[4].replace(timeout_s=DEADLINE_S))
    yield built
    built.run(calls.close_comm, "impatient")


def texts(outcomes):
    return [[(name, text) for name, text, _ in each] for each in outcomes]


def expect_reset_to_help(pool, key="impatient"):
    for each in texts(pool.run(calls.try_calls, key, ["reset", "check", "round", "round"])):
        assert each == [(None, "")] * 4


# Nobody is gone


def test_a_rank_that_does_not_come(impatient):
    results = impatient.run(calls.try_calls, "impatient", ["round", "check", "round"], ranks=[0, 1, 3])
    for rank in (0, 1, 3):
        (name, text, seconds), checked, again = results[rank]
        assert name == "PeerTimeoutError"
        assert text.startswith(f"rank {rank}, dispatch")
        assert seconds < DEADLINE_S + SLACK_S
        assert checked[:2] == again[:2] == (name, text), "the first failure stays on record"
        assert again[2] < DEADLINE_S, "after a failure nothing waits"
    assert any("from rank 2 within 1 s" in results[rank][0][1] for rank in (0, 1, 3))
    expect_reset_to_help(impatient)


def test_reset_after_uneven_numbers_of_rounds(impatient):
    for rank, n in ((0, 3), (3, 1)):
        impatient.run(calls.try_calls, "impatient", ["round"] * n, ranks=[rank])
    expect_reset_to_help(impatient)


def test_a_rank_that_is_stopped(impatient):
    """It goes on where it was stopped, and finds that its peers have failed."""
    os.kill(impatient.pids[1], signal.SIGSTOP)
    try:
        results = impatient.run(calls.try_calls, "impatient", ["round"], ranks=[0, 2, 3])
    finally:
        os.kill(impatient.pids[1], signal.SIGCONT)
    for rank in (0, 2, 3):
        ((name, text, seconds),) = results[rank]
        assert (name, seconds < DEADLINE_S + SLACK_S) == ("PeerTimeoutError", True), text
    ((name, text, seconds),) = impatient.run(calls.try_calls, "impatient", ["round"], ranks=[1])[1]
    assert name == "PeerTimeoutError"
    assert re.search("rank [023] failed", text)
    expect_reset_to_help(impatient)


def test_too_many_tokens_on_a_rank(built):
    built.run(calls.open_comm, "patient", calls.CFGS[4])
    results = built.run(calls.too_many_tokens, "patient", 1)
    assert results[1][0] == "ShapeError"
    assert "rows of x = 7" in results[1][1]
    for rank in (0, 2, 3):
        assert results[rank][0] == "PeerTimeoutError"
        assert results[rank][2] < AT_ONCE_S
    expect_reset_to_help(built, "patient")
    built.run(calls.close_comm, "patient")


@pytest.mark.parametrize("what", ["ids", "bias"])
def test_an_op_that_raises_on_one_rank(built, what):
    """In dispatch or in combine: its peers fail at once, and after reset the next round is right."""
    results = built.run(calls.raise_in_an_op, what, 1)
    for rank, (first, again, right) in enumerate(results[:3]):
        expected = ("ShapeError", "OrderError") if rank == 1 else ("PeerTimeoutError", "PeerTimeoutError")
        assert (first[0], again[0]) == expected, (first, again)
        assert first[2] < AT_ONCE_S
        assert right


# Somebody is gone


def expect_lost(result, rank, lost, words):
    name, text, seconds = result
    assert name == "PeerLostError", text
    assert text.startswith(f"rank {rank}: ")
    assert f"rank {lost} {words}" in text
    assert "process group of the ranks that are left" in text
    assert seconds < AT_ONCE_S


def test_a_rank_that_destroyed_its_communicator_is_missed_at_once(built):
    built.run(calls.open_comm, "left", calls.CFGS[4].replace(timeout_s=0))
    assert texts(built.run(calls.try_calls, "left", ["round"])) == [RIGHT] * 4
    built.run(calls.close_comm, "left", ranks=[2])
    results = built.run(calls.try_calls, "left", ["check", "round", "check", "reset", "compile"], ranks=[0, 1, 3])
    for rank in (0, 1, 3):
        checked, *failed = results[rank]
        assert checked[0] is None, "nobody has waited for it yet"
        for each in failed:
            expect_lost(each, rank, 2, "has ended or destroyed its communicator")
    built.run(calls.close_comm, "left")


@pytest.fixture(scope="module")
def dying():
    """Processes of their own, which the test kills one after the other."""
    with Pool(4) as pool:
        pool.run(calls.build, timeout_s=240)
        yield pool


def test_ranks_that_go_one_after_the_other(dying):
    """One ends after its part of a round, one is killed between dispatch and combine, one in the middle of a round."""
    results = dying.run(calls.end_after_a_round, 4, 3, raise_errors=False)
    assert isinstance(results[3], Died)
    for rank in range(3):
        lost, result = results[rank]
        assert lost == [3]
        expect_lost(result, rank, 3, "is gone")
        expect_everything_to_be_lost(dying, 4, rank, 3)

    dying.run(calls.open_comm, "for_ever", calls.CFGS[3].replace(timeout_s=0), ranks=[0, 1, 2])
    results = dying.run(calls.killed_between, "for_ever", 2, ranks=[0, 1, 2], raise_errors=False)
    assert isinstance(results[2], Died)
    for rank in range(2):
        expect_lost(results[rank], rank, 2, "is gone")
        expect_everything_to_be_lost(dying, "for_ever", rank, 2)
    fresh = dying.run(calls.survivors_start_again, "for_ever", [0, 1], ranks=[0, 1])
    assert fresh[:2] == [0, 1]

    results = dying.run(calls.rounds_until_killed, "fresh", 0, ranks=[0, 1], raise_errors=False)
    assert isinstance(results[0], Died)
    expect_lost(results[1], 1, 0, "is gone")
    expect_everything_to_be_lost(dying, "fresh", 1, 0)


def expect_everything_to_be_lost(pool, key, rank, lost):
    for result in pool.run(calls.try_calls, key, ["check", "reset", "round", "compile", "make"], ranks=[rank])[rank]:
        expect_lost(result, rank, lost, "is gone")
    assert pool.run(calls.try_calls, key, ["destroy", "destroy"], ranks=[rank])[rank][1][0] is None


def test_a_rank_that_dies_while_others_wait_for_it():
    """In reset, and before it introduces itself to a later communicator: nobody waits for the group's timeout."""
    with Pool(3) as pool:
        pool.run(calls.open_comm, 3, calls.CFGS[3])
        results = pool.run(calls.reset_in_vain, 3, 1, raise_errors=False)
        assert isinstance(results[1], Died)
        again = pool.run(calls.try_calls, 3, ["make"], ranks=[0, 2])
        for rank in (0, 2):
            expect_lost(results[rank], rank, 1, "is gone")
            expect_lost(again[rank][0], rank, 1, "is gone")
