"""Low-latency mode of `ep_mojo.torch.Buffer`, on 2 and 4 processes over gloo: equal to plain torch bit for bit."""

from __future__ import annotations

import pytest

from tests.torch import buffers
from tests.torch import low_latency_calls as calls

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
def test_masks(ready, n):
    ready.run(calls.check_masks, n)
