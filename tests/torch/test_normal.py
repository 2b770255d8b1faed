"""Normal mode of `ep_mojo.torch.Buffer`, on 2 and 4 processes over gloo, against plain torch: equal bit for bit."""

from __future__ import annotations

import pytest

from tests.torch import buffers
from tests.torch import normal_calls as calls

RANKS = 2, 4


@pytest.mark.parametrize("n", RANKS)
@pytest.mark.parametrize("kind", ["mixed", "none", "one"])
def test_layout(ready, n, kind):
    ready.run(calls.check_layout, n, 5, kind)


@pytest.mark.parametrize("n", RANKS)
def test_rounds(ready, n):
    for seed in range(1, 9):
        ready.run(calls.check_round, n, seed)


@pytest.mark.parametrize("n", RANKS)
def test_any_number_of_tokens_on_any_rank(ready, n):
    for seed, tokens in enumerate(buffers.SIZES[n]):
        ready.run(calls.check_round, n, seed, tokens)
        ready.run(calls.check_without_topk, n, seed, tokens)
        ready.run(calls.check_negated, n, seed)


@pytest.mark.parametrize("n", RANKS)
@pytest.mark.parametrize("kind", ["none", "one"])
def test_no_choice_at_all_and_one_for_all(ready, n, kind):
    ready.run(calls.check_round, n, 4, None, kind, 16)


@pytest.mark.parametrize("n", RANKS)
def test_strides_and_alignment(ready, n):
    ready.run(calls.check_round, n, 5, None, "mixed", 8, True)


@pytest.mark.parametrize("n", RANKS)
@pytest.mark.parametrize("scale", ["float32", "ue8m0"])
@pytest.mark.parametrize("strided", [False, True], ids=["rows", "columns"])
def test_quantised_tokens(ready, n, scale, strided):
    ready.run(calls.check_fp8, n, 6, scale, strided)


@pytest.mark.parametrize("n", RANKS)
def test_handles_can_be_used_again(ready, n):
    ready.run(calls.check_handle_again, n, 7)


@pytest.mark.parametrize("n", RANKS)
def test_outputs_for_the_worst_case(ready, n):
    for seed, tokens in enumerate([None, *buffers.SIZES[n]]):
        ready.run(calls.check_worst, n, seed, 4 * buffers.TMAX + 3, tokens)


@pytest.mark.parametrize("n", RANKS)
def test_equal_inputs_give_equal_bytes(ready, n):
    ready.run(calls.check_same_bytes, n, 20)
