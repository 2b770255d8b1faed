"""The Megatron-Core adapter: its MoE layer with stock experts over our dispatchers, 2 processes over gloo."""

from __future__ import annotations

import pytest

pytest.importorskip(
    "megatron.core", reason="megatron-core is not installed: pip install --no-deps megatron-core==0.16.1"
)

from tests.torch import megatron_calls as calls
from tests.torch.launch import Pool


@pytest.fixture(scope="module")
def two():
    with Pool(2) as pool:
        pool.run(calls.begin, 2)
        yield pool


@pytest.mark.parametrize("reduce_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("topk", [1, 3])
@pytest.mark.parametrize("kind", ["any", "equal"])
def test_like_megatrons_own(two, kind, topk, reduce_dtype):
    two.run(calls.check_like_megatron, kind, topk, reduce_dtype, timeout_s=300)


def test_counts(two):
    two.run(calls.check_counts, "any", [[4, 4], [7, 1], [0, 3], [16, 16], [0, 0], [2, 5]], timeout_s=300)
    two.run(calls.check_counts, "equal", [[4, 4], [16, 16], [1, 1]], timeout_s=300)


@pytest.mark.parametrize("probs", ["fp32", None])
@pytest.mark.parametrize("inference", [True, False])
def test_modes(two, probs, inference):
    two.run(calls.check_counts, "any", [[4, 2], [1, 3]], probs, inference, timeout_s=300)


def test_shared_experts(two):
    two.run(calls.check_shared_experts, timeout_s=300)


def test_transformer_layer(two):
    two.run(calls.check_transformer_layer, timeout_s=300)


def test_ids(two):
    two.run(calls.check_ids, timeout_s=300)


@pytest.mark.skipif(
    not hasattr(calls.MoELayer, "_setup_inference_mode"), reason="this megatron-core has no dispatchers for inference"
)
def test_inference_mode(two):
    two.run(calls.check_inference_mode, timeout_s=300)


def test_choices(two):
    two.run(calls.check_choices)


def test_refused(two):
    two.run(calls.check_settings_refused)
    two.run(calls.check_steps_refused, timeout_s=300)
    two.run(calls.check_unequal_refused, timeout_s=300)


def test_one_rank_for_experts(two):
    try:
        two.run(calls.begin, 1)
        two.run(calls.check_counts, "any", [[4], [9], [0]], timeout_s=300)
    finally:
        two.run(calls.begin, 2)
