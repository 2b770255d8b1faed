"""Normal mode of `ep_mojo.torch.Buffer`, on 2 and 4 processes over gloo, against plain torch: equal bit for bit."""

from __future__ import annotations

import pytest

from tests.torch import normal_calls as calls

RANKS = 2, 4


@pytest.mark.parametrize("n", RANKS)
@pytest.mark.parametrize("kind", ["mixed", "none", "one"])
def test_layout(pool, n, kind):
    pool.run(calls.check_layout, n, 5, kind)


@pytest.mark.parametrize("n", RANKS)
def test_rounds(pool, n):
    pool.run(calls.check_round, n, 1, timeout_s=180)
    for seed in range(2, 10):
        pool.run(calls.check_round, n, seed)
