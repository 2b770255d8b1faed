"""Rounds of `Communicator.process_group` over gloo: equal to the reference bit by bit."""

from __future__ import annotations

import pytest

from tests.torch import group_calls as calls

DELAYS = 0.2, 0.003
"""Share of the stages before which a rank sleeps, and the longest sleep in seconds."""
NO_DELAY = 0.0, 0.0


def expect_right(results, n):
    """No differences on `n` ranks; returns the digests."""
    results = [r for r in results if r is not None]
    found = [text for differences, _ in results for text in differences]
    assert not found, "\n".join(found)
    assert len(results) == n
    return [digest for _, digest in results]


@pytest.mark.parametrize("n", [2, 3, 4])
def test_rounds_are_the_reference(built, n):
    digests = expect_right(built.run(calls.play, n, 200, n, False, DELAYS), n)
    assert len(set(digests)) == n


def test_split_rounds_that_overlap_give_what_fused_ones_give(built):
    """The four stages in a random order, with up to num_buffers rounds in flight."""
    split = expect_right(built.run(calls.play, 4, 200, 4, True, DELAYS), 4)
    assert split == expect_right(built.run(calls.play, 4, 200, 4, False, NO_DELAY), 4)


def test_rounds_with_a_message_for_each_expert(built):
    expect_right(built.run(calls.play, "expert", 200, 1, False, DELAYS), 2)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_any_number_of_tokens_on_any_rank(built, n):
    """None on a rank, on all but one, on all; and as many as there may be."""
    full = [6] * n
    sizes = [full, [0] * n, full, *([t * (r == i) for r in range(n)] for i in range(n) for t in (6, 1)), full]
    sizes += [[6 - t for t in each] for each in sizes]
    assert built.run(calls.play_sizes, n, sizes)[:n] == [[]] * n


def test_communicators_of_overlapping_groups_take_turns(built):
    for seed in range(3):
        for key in (2, 4, "expert", 3):
            expect_right(built.run(calls.play, key, 5, seed, False, NO_DELAY), calls.KEYS[key].n_ranks)


def test_buffers_in_and_out(built):
    assert built.run(calls.as_buffers, 4) == [[]] * 4


@pytest.mark.parametrize("by_expert", [False, True], ids=["rank_slots", "expert_slots"])
def test_a_rank_that_leaves_early_spoils_nothing(built, by_expert):
    """Each destroys its communicator after its last round while others may still receive what it sent."""
    results = built.run(calls.leave_after_rounds, 40, 5, by_expert, timeout_s=120)
    assert results == [[]] * 4
