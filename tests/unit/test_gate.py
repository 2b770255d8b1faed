"""DeepSeek-V3's gate against the same rule written out token by token."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ep_mojo.errors import ConfigError, DTypeError, ShapeError
from ep_mojo.gate import default_groups, gate


def slow_gate(x, w_gate, bias, top_k, n_groups, top_groups, factor):
    """One token: (ids, weights), in plain Python floats."""
    scores = [1 / (1 + math.exp(-float(np.dot(w, x)))) for w in w_gate]
    biased = [s + float(b) for s, b in zip(scores, bias, strict=True)]
    size = len(scores) // n_groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(n_groups)]
    by_score = sorted(groups, key=lambda group: -sum(sorted((biased[e] for e in group), reverse=True)[:2]))
    candidates = [e for group in by_score[:top_groups] for e in group]
    ids = sorted(candidates, key=lambda e: -biased[e])[:top_k]
    total = sum(scores[e] for e in ids)
    return ids, [scores[e] / total * factor for e in ids]


@pytest.mark.parametrize(
    ("n_experts", "top_k", "n_groups", "top_groups"), [(256, 8, 8, 4), (16, 3, 4, 2), (6, 2, 6, 2)]
)
def test_gate_follows_the_rule(n_experts, top_k, n_groups, top_groups):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 32), dtype=np.float32)
    w = rng.standard_normal((n_experts, 32), dtype=np.float32) / np.float32(6)
    bias = rng.standard_normal(n_experts, dtype=np.float32) * np.float32(0.1)
    options = {"top_k": top_k, "n_groups": n_groups, "top_groups": top_groups}
    ids, weights = gate(x, w, bias, routed_scaling_factor=2.5, **options)
    assert ids.dtype == np.int32
    assert weights.dtype == np.float32
    for t in range(len(x)):
        want_ids, want_weights = slow_gate(x[t], w, bias, top_k, n_groups, top_groups, 2.5)
        assert ids[t].tolist() == want_ids
        np.testing.assert_allclose(weights[t], want_weights, rtol=1e-5)


def test_bias_decides_the_choice_but_not_the_weights():
    x = np.ones((1, 1), np.float32)
    w = np.array([[0.0], [1.0], [2.0], [3.0]], np.float32)
    bias = np.array([10, 10, 0, 0], np.float32)
    ids, weights = gate(x, w, bias, top_k=2, n_groups=1, top_groups=1)
    assert ids.tolist() == [[1, 0]]
    score = 1 / (1 + np.exp(-np.array([1.0, 0.0])))
    np.testing.assert_allclose(weights[0], score / score.sum(), rtol=1e-6)


def test_equal_scores_take_the_lower_id():
    ids, weights = gate(np.zeros((2, 4), np.float32), np.zeros((16, 4), np.float32))
    assert ids.tolist() == [list(range(8))] * 2
    np.testing.assert_allclose(weights, 1 / 8, rtol=1e-6)


def test_no_tokens():
    ids, weights = gate(np.zeros((0, 4), np.float32), np.zeros((16, 4), np.float32))
    assert ids.shape == weights.shape == (0, 8)


def test_large_logits_do_not_overflow():
    x = np.full((1, 1), 1e4, np.float32)
    with np.errstate(over="raise"):
        _, weights = gate(x, np.array([[1.0], [-1.0]], np.float32), top_k=2, n_groups=1, top_groups=1)
    assert weights.tolist() == [[1.0, 0.0]]


X, W = np.zeros((2, 4), np.float32), np.zeros((16, 4), np.float32)


@pytest.mark.parametrize(
    ("error", "x", "w", "options"),
    [
        (ConfigError, X, W, {"n_groups": 3}),
        (ConfigError, X, W, {"n_groups": 0}),
        (ConfigError, X, W, {"top_groups": 9}),
        (ConfigError, X, W, {"top_k": 9}),
        (ConfigError, X, W, {"top_k": 0}),
        (ShapeError, X[:, :3], W, {}),
        (ShapeError, X[0], W, {}),
        (ShapeError, X, W, {"bias": np.zeros(3, np.float32)}),
        (DTypeError, X.astype(np.float64), W, {}),
        (DTypeError, X.tolist(), W, {}),
    ],
)
def test_bad_arguments(error, x, w, options):
    with pytest.raises(error, match="Allowed"):
        gate(x, w, **options)


@pytest.mark.parametrize(
    ("n_experts", "top_k", "want"), [(256, 8, (8, 4)), (4, 2, (4, 2)), (4, 4, (1, 1)), (6, 3, (2, 1)), (1, 1, (1, 1))]
)
def test_default_groups(n_experts, top_k, want):
    assert default_groups(n_experts, top_k) == want
