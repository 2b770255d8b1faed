"""Inputs are checked before anything is written: named errors with field, value, what is allowed and what to do."""

import ml_dtypes
import numpy as np
import pytest

from ep_mojo import dtypes
from ep_mojo.config import BF16, BlockwiseFP8, EPConfig
from ep_mojo.errors import DTypeError, ShapeError, UnsupportedError
from ep_mojo.validate import check_array, check_bias, check_expert_rows, check_inputs, check_num_tokens

CFG = EPConfig(hidden_size=256, top_k=3, n_experts=8, max_tokens_per_rank=6, n_ranks=2)
FP8 = CFG.replace(dispatch_format=BlockwiseFP8())
X = np.zeros((4, 256), np.uint16)
IDS = np.zeros((4, 3), np.int32)
WEIGHTS = np.zeros((4, 3), np.float32)
Q, SCALES = np.zeros((4, 256), np.uint8), np.zeros((4, 2), np.float32)


def test_good_inputs():
    assert check_inputs(CFG, 0, X, IDS) == 4
    assert check_inputs(CFG, 1, X, IDS.astype(np.int64), WEIGHTS, 2) == 2
    assert check_inputs(CFG, 1, X, IDS, WEIGHTS, np.array([3], np.int32)) == 3
    assert check_inputs(CFG, 1, X, IDS, WEIGHTS, np.int64(0)) == 0
    assert check_inputs(CFG, 0, X.view(ml_dtypes.bfloat16), IDS) == 4
    assert check_inputs(CFG, 0, X[:0], IDS[:0], WEIGHTS[:0]) == 0
    assert check_inputs(FP8, 0, X, IDS) == 4
    assert check_inputs(FP8, 0, Q, IDS, x_scales=SCALES) == 4
    assert check_inputs(FP8, 0, Q.view(ml_dtypes.float8_e4m3fn), IDS, x_scales=SCALES) == 4
    ue8m0 = FP8.replace(dispatch_format=BlockwiseFP8("ue8m0"))
    assert check_inputs(ue8m0, 0, Q, IDS, x_scales=np.zeros((4, 1), np.int32)) == 4


def test_buffers():
    x, ids, n = dtypes.to_buffer(X, "bfloat16"), dtypes.to_buffer(IDS), dtypes.to_buffer(np.array([2], np.int32))
    assert check_inputs(CFG, 0, x, ids, dtypes.to_buffer(WEIGHTS), n) == 4
    with pytest.raises(DTypeError, match="uint16"):
        check_inputs(CFG, 0, dtypes.to_buffer(X), ids)
    with pytest.raises(ShapeError, match=r"topk_ids\[0\]"):
        check_inputs(CFG, 0, x, dtypes.to_buffer(IDS[:3]))


BAD = [
    ({"x": X.astype(np.float32)}, DTypeError, "x[1] = float32 [4, 256]", "bfloat16 (as uint16"),
    ({"x": X.tolist()}, DTypeError, "x[1]", "list is not an array"),
    ({"x": None}, DTypeError, "x[1] = None", "bfloat16"),
    ({"x": X[:, :128]}, ShapeError, "x[1] = uint16 [4, 128]", "[T, 256]"),
    ({"x": X[0]}, ShapeError, "x[1] = uint16 [256]", "[T, 256]"),
    ({"x": X[None]}, ShapeError, "x[1]", "[T, 256]"),
    ({"x": np.zeros((7, 256), np.uint16)}, ShapeError, "x[1]", "max_tokens_per_rank = 6"),
    ({"x": Q}, DTypeError, "x[1] = uint8", "bfloat16"),
    ({"topk_ids": IDS.astype(np.int16)}, DTypeError, "topk_ids[1]", "int32 or int64"),
    ({"topk_ids": IDS.astype(np.uint32)}, DTypeError, "topk_ids[1]", "int32 or int64"),
    ({"topk_ids": IDS.astype(np.float32)}, DTypeError, "topk_ids[1]", "int32"),
    ({"topk_ids": IDS[:3]}, ShapeError, "topk_ids[1]", "[4, 3]"),
    ({"topk_ids": IDS[:, :2]}, ShapeError, "topk_ids[1]", "[4, 3]"),
    ({"topk_ids": None}, DTypeError, "topk_ids[1]", "int32"),
    ({"weights": WEIGHTS.astype(np.float64)}, DTypeError, "weights[1]", "float32"),
    ({"weights": X[:, :3]}, DTypeError, "weights[1]", "float32"),
    ({"weights": WEIGHTS[:2]}, ShapeError, "weights[1]", "[4, 3]"),
    ({"num_tokens": 5}, ShapeError, "num_tokens[1] = 5", "0 to 4"),
    ({"num_tokens": -1}, ShapeError, "num_tokens[1] = -1", "0 to 4"),
    ({"num_tokens": np.array([9], np.int32)}, ShapeError, "num_tokens[1] = 9", "0 to 4"),
    ({"num_tokens": np.array([1, 2], np.int32)}, ShapeError, "num_tokens[1]", "[1]"),
    ({"num_tokens": np.array([1], np.int64)}, DTypeError, "num_tokens[1]", "int32"),
    ({"num_tokens": True}, DTypeError, "num_tokens[1]", "int32"),
    ({"num_tokens": 2.0}, DTypeError, "num_tokens[1]", "int32"),
]
BAD_FP8 = [
    ({"x": Q, "x_scales": SCALES[:, :1]}, ShapeError, "x_scales[1]", "[4, 2]"),
    ({"x": Q, "x_scales": SCALES.astype(np.float64)}, DTypeError, "x_scales[1]", "float32"),
    ({"x": X, "x_scales": SCALES}, DTypeError, "x[1]", "float8_e4m3fn (as uint8"),
    ({"x": Q}, DTypeError, "x[1]", "bfloat16"),
]


@pytest.mark.parametrize(("changes", "cls", "given", "allowed"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_inputs(changes, cls, given, allowed):
    check_bad(CFG, changes, cls, given, allowed)


@pytest.mark.parametrize(("changes", "cls", "given", "allowed"), BAD_FP8, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_fp8_inputs(changes, cls, given, allowed):
    check_bad(FP8, changes, cls, given, allowed)


def check_bad(cfg, changes, cls, given, allowed):
    with pytest.raises(cls) as raised:
        check_inputs(cfg, 1, **{"x": X, "topk_ids": IDS, "weights": WEIGHTS} | changes)
    assert str(raised.value).startswith(given)
    assert allowed in str(raised.value)
    assert raised.value.remedy


@pytest.mark.parametrize("fmt", [BF16(), BlockwiseFP8("power_of_two")], ids=lambda f: f.key())
def test_formats_without_prequantised_input(fmt):
    with pytest.raises(UnsupportedError, match="x_scales"):
        check_inputs(CFG.replace(dispatch_format=fmt), 0, Q, IDS, x_scales=SCALES)


def test_expert_rows():
    check_expert_rows(CFG, 0, np.zeros((36, 256), np.uint16))
    check_expert_rows(CFG.replace(combine_dtype="float32"), 0, np.zeros((36, 256), np.float32))
    padded = CFG.replace(output_layout="expert_padded")
    check_expert_rows(padded, 0, np.zeros((4, 12, 256), np.uint16))
    with pytest.raises(ShapeError, match=r"\[4, 12, 256\]"):
        check_expert_rows(padded, 0, np.zeros((48, 256), np.uint16))


def test_bias():
    check_bias(CFG, 0, "bias0", X, 4)
    check_bias(CFG, 0, "bias0", X.astype(np.float32), 4)
    with pytest.raises(ShapeError, match=r"bias0\[1\]"):
        check_bias(CFG, 1, "bias0", X, 3)


def test_num_tokens_of_nothing():
    assert check_num_tokens("n", None, 0) == 0
    assert check_num_tokens("n", 0, 0) == 0


def test_check_array_with_free_sizes():
    check_array("a", np.zeros((1, 2, 3), np.float32), ["float32"], ["n", 2, "m"])
    with pytest.raises(ShapeError, match=r"Allowed: \[n, 4, m\]"):
        check_array("a", np.zeros((1, 2, 3), np.float32), ["float32"], ["n", 4, "m"])
