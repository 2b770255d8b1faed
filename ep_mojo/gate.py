"""DeepSeek-V3's router in NumPy: which experts a token goes to, and with what weights.

Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 2.1.2, equations 13 to 16 with node-limited routing;
the published model has 256 experts, 8 groups of which 4 are kept, top 8, and scales the weights by 2.5.
"""

from __future__ import annotations

import numpy as np

from .errors import ConfigError, DTypeError, ShapeError
from .formats import check_int


def gate(
    x: np.ndarray,
    w_gate: np.ndarray,
    bias: np.ndarray | None = None,
    *,
    top_k: int = 8,
    n_groups: int = 8,
    top_groups: int = 4,
    routed_scaling_factor: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Choose top_k experts for each token.

        scores = sigmoid(x w_gate^T);  biased = scores + bias (the bias decides the choice and nothing else)
        score of a group = sum of the two best biased scores in it;  experts outside the best top_groups are left out
        ids = the top_k best biased scores;  weights = scores[ids] / sum(scores[ids]) * routed_scaling_factor

    Equal scores: the lower id wins.

    Args:
        x: float32 [T, H].
        w_gate: float32 [E, H].
        bias: float32 [E], or None for zeros.
        top_k: K, experts a token.
        n_groups: Groups of E / n_groups neighbouring experts.
        top_groups: Groups that a token may use.
        routed_scaling_factor: What the weights of a token sum to. DeepSeek-V3 uses 2.5.

    Returns:
        (topk_ids int32 [T, K], by falling biased score; topk_weights float32 [T, K]).

    Raises:
        ConfigError: The numbers do not fit together.
        ShapeError, DTypeError: An array does not fit.
    """
    x, w_gate = _float_array("x", x, 2), _float_array("w_gate", w_gate, 2)
    n_experts = w_gate.shape[0]
    if x.shape[1] != w_gate.shape[1]:
        raise ShapeError(
            field="w_gate",
            value=list(w_gate.shape),
            allowed=f"[E, {x.shape[1]}], as x has H = {x.shape[1]}",
            remedy="pass one row of H elements for each expert",
        )
    bias = np.zeros(n_experts, np.float32) if bias is None else _float_array("bias", bias, 1)
    if bias.shape != (n_experts,):
        raise ShapeError(
            field="bias", value=list(bias.shape), allowed=f"[{n_experts}]", remedy="pass one bias for each expert"
        )
    check_groups(n_experts, top_k, n_groups, top_groups)

    scores = sigmoid(x @ w_gate.T)
    biased = scores + bias
    size = n_experts // n_groups
    grouped = biased.reshape(-1, n_groups, size)
    best_two = np.sort(grouped, axis=2)[:, :, -2:]  # one value where a group is one expert
    kept = np.argsort(-best_two.sum(axis=2), axis=1, kind="stable")[:, :top_groups]
    allowed = np.zeros((x.shape[0], n_groups), bool)
    np.put_along_axis(allowed, kept, True, axis=1)
    candidates = np.where(allowed[:, :, None], grouped, -np.inf).reshape(-1, n_experts)
    ids = np.argsort(-candidates, axis=1, kind="stable")[:, :top_k]
    chosen = np.take_along_axis(scores, ids, axis=1)
    total = chosen.sum(axis=1, keepdims=True) + np.float32(1e-20)
    return ids.astype(np.int32), chosen / total * np.float32(routed_scaling_factor)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) in float32, without overflow."""
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + small), small / (1 + small)).astype(np.float32)


def check_groups(n_experts: int, top_k: int, n_groups: int, top_groups: int) -> None:
    """Check that the groups are equal in size and hold enough experts.

    Raises:
        ConfigError: Names the number, what is allowed, and what to do.
    """
    check_int("n_groups", n_groups, 1, n_experts)
    check_int("top_groups", top_groups, 1, n_groups)
    if n_experts % n_groups:
        raise ConfigError(
            field="n_groups",
            value=n_groups,
            allowed=f"a divisor of n_experts = {n_experts}",
            remedy="choose groups of equal size",
        )
    reachable = n_experts // n_groups * top_groups
    check_int(
        "top_k", top_k, 1, reachable, f"use at most {reachable}, the experts of {top_groups} groups, or more groups"
    )


def default_groups(n_experts: int, top_k: int) -> tuple[int, int]:
    """(n_groups, top_groups) in the manner of DeepSeek-V3: 8 and 4 where the experts allow it, else fewer groups."""
    for n_groups in (8, 4, 2):
        if n_experts % n_groups == 0 and n_experts // 2 >= top_k:
            return n_groups, n_groups // 2
    return 1, 1


def _float_array(name: str, array: np.ndarray, ndim: int) -> np.ndarray:
    if not isinstance(array, np.ndarray) or array.dtype != np.float32:
        given = array.dtype.name if isinstance(array, np.ndarray) else type(array).__name__
        raise DTypeError(field=name, value=given, allowed="a NumPy array of float32", remedy="convert it first")
    if array.ndim != ndim:
        raise ShapeError(field=name, value=list(array.shape), allowed=f"{ndim} dimensions", remedy="reshape it")
    return array
