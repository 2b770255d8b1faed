"""Low-latency mode of `ep_mojo.torch.Buffer`, on 2 and 4 processes over gloo: equal to plain torch bit for bit."""

from __future__ import annotations

import pytest

from tests.torch import buffers
from tests.torch import low_latency_calls as calls
from tests.torch.buffers import PATIENCE_S
from tests.torch.launch import Died, Pool

RANKS = 2, 4


@pytest.mark.parametrize("n", RANKS)
@pytest.mark.parametrize("fmt", calls.FORMATS)
@pytest.mark.parametrize("hook", [False, True], ids=["whole", "hook"])
def test_rounds(ready, n, fmt, hook):
    for seed, how in enumerate(("", "out", "zero_copy", "")):
        ready.run(calls.check_round, n, seed, fmt, None, "mixed", hook, how)


@pytest.mark.parametrize("n", RANKS)
def test_any_number_of_tokens_on_any_rank(ready, n):
    for seed, tokens in enumerate(buffers.SIZES[n]):
        ready.run(calls.check_round, n, seed, "bf16", tokens, "mixed", bool(seed % 2))


@pytest.mark.parametrize("n", RANKS)
@pytest.mark.parametrize("kind", ["none", "one"])
def test_no_choice_at_all_and_one_for_all(ready, n, kind):
    tokens = [buffers.TMAX // buffers.TOP_K] * n  # expert 0 gets up to R * Tmax rows
    ready.run(calls.check_round, n, 1, "bf16", tokens, kind)


@pytest.mark.parametrize("n", RANKS)
def test_two_rounds_under_way(ready, n):
    ready.run(calls.check_two_under_way, n, 1)


@pytest.mark.parametrize("n", RANKS)
def test_hooks_given_up(ready, n):
    ready.run(calls.check_hooks_given_up, n, 1)


@pytest.mark.parametrize("n", RANKS)
def test_both_modes_in_turn(ready, n):
    ready.run(calls.check_both_modes_in_turn, n, 1)


@pytest.mark.parametrize("n", RANKS)
def test_a_rank_masked_by_hand(ready, n):
    assert max(ready.run(calls.check_masked_by_hand, n)) < PATIENCE_S, "nothing is awaited of it"


@pytest.mark.parametrize("n", RANKS)
@pytest.mark.parametrize("clean", [False, True], ids=["one by one", "at once"])
def test_masked_for_a_while(ready, n, clean):
    ready.run(calls.check_masked_for_a_while, n, clean)


@pytest.mark.parametrize(("n", "lost"), [(2, [0]), (4, [3]), (4, [0, 2])])
@pytest.mark.parametrize("hook", [False, True], ids=["whole", "hook"])
def test_ranks_that_do_not_come_are_left_out(ready, n, lost, hook):
    first, later = map(max, zip(*ready.run(calls.check_late, n, lost, hook), strict=True))
    assert PATIENCE_S <= first < (len(lost) + 1) * PATIENCE_S
    assert later < PATIENCE_S, "once is enough"


@pytest.mark.parametrize("n", RANKS)
def test_a_rank_that_comes_back_too_late(ready, n):
    assert max(ready.run(calls.check_back_too_late, n)) < PATIENCE_S


@pytest.mark.parametrize("n", RANKS)
def test_a_rank_that_fails_is_left_out(ready, n):
    assert max(ready.run(calls.check_failed_peer, n)) < PATIENCE_S


@pytest.mark.parametrize("hook", [False, True], ids=["whole", "hook"])
def test_a_rank_that_dies_is_left_out(hook):
    with Pool(3) as pool:
        pool.run(buffers.prepare, timeout_s=600)
        found = pool.run(calls.die_and_leave_the_others, 1, hook, raise_errors=False)
    assert isinstance(found[1], Died)
    for rank in (0, 2):
        first, later = found[rank]
        assert first < 2 * PATIENCE_S
        assert later < PATIENCE_S


@pytest.mark.parametrize("n", RANKS)
def test_masks_that_cannot_be(ready, n):
    ready.run(calls.check_bad_masks, n)
