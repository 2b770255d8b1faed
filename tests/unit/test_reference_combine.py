"""Combine of the reference: scalar by scalar in exact arithmetic, against dense sums, and by hand."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.cases import cases, make_case
from unit.exact_float import exact_fma, same_float32

from ep_mojo.config import EPConfig
from ep_mojo.dtypes import bfloat16_bits_to_float32, float32_to_bfloat16_bits, round_to_bfloat16
from ep_mojo.errors import ConfigError, DTypeError, ShapeError, UnsupportedError
from ep_mojo.reference import cast_rows, combine, dispatch, output_difference, reduce_mode

SMALL = EPConfig(8, 2, 4, 3, 2, combine_dtype="float32", output_dtype="float32")


def expert_rows(cfg, handles, seed):
    rng = np.random.default_rng(seed)
    rows = (rng.normal(size=(*h.tokens.shape[:-1], cfg.hidden_size)).astype(np.float32) for h in handles)
    return [cast_rows(cfg, r) for r in rows]


def widen(a):
    return bfloat16_bits_to_float32(a) if a.dtype == np.uint16 else a


def scalar_combine(case, handles, ys, mode, biases, s, t, channel, weights):
    """One output element, step by step with Python floats and exact fma."""
    cfg = case.cfg
    rows = [widen(y).reshape(-1, cfg.hidden_size) for y in ys]
    add = lambda a, b: exact_fma(a, 1.0, b) if a or b else 0.0  # noqa: E731
    acc = 0.0
    for bias in biases:
        if bias is not None:
            acc = add(float(widen(bias[s])[t, channel]), acc)
    if cfg.shared_expert:
        acc = add(float(rows[s][t, channel]), acc)
    partials: dict[int, float] = {}
    if cfg.output_layout == "gathered":
        before = sum(case.counts[:s])
        partials = {r: float(rows[r][before + t, channel]) for r in range(cfg.n_ranks)}
        case = replace(case, topk_ids=[ids[:, :0] for ids in case.topk_ids])
    for k, e in enumerate(case.topk_ids[s][t].tolist()):
        if not 0 <= e < cfg.n_experts:
            continue
        r = e // cfg.n_local_experts
        if cfg.output_layout == "rank":
            if r not in partials:
                partials[r] = float(rows[r][handles[r].row_map[s, t, k], channel])
            continue
        w = 1.0 if weights is None else float(weights[s][t, k])
        x = float(rows[r][handles[r].row_map[s, t, k], channel])
        if mode == "source":
            acc = exact_fma(w, x, acc)
        else:
            partials[r] = exact_fma(w, x, partials.get(r, 0.0))
    for r in sorted(partials):
        p = partials[r]
        if cfg.combine_dtype == "bfloat16":
            p = float(round_to_bfloat16(np.array([p], np.float32))[0])
        acc = exact_fma(p, 1.0, acc)
    return acc


DTYPES = st.sampled_from(["bfloat16", "float32"])


@settings(max_examples=150, deadline=None)
@given(cases(), DTYPES, DTYPES, st.sampled_from(["expert", "source"]), st.integers(0, 3), st.integers(0, 2**32))
def test_against_scalars(case, combine_dtype, output_dtype, mode, n_biases, seed):
    cfg = case.cfg = case.cfg.replace(combine_dtype=combine_dtype, output_dtype=output_dtype)
    handles = dispatch(cfg, case.xs, case.topk_ids, case.weights, case.num_tokens)
    ys = expert_rows(cfg, handles, seed)
    rng = np.random.default_rng(seed)
    biases = [
        [rng.normal(size=x.shape).astype(np.float32) for x in case.xs] if n_biases & (1 << i) else None for i in (0, 1)
    ]
    if biases[1] is not None:
        biases[1] = [float32_to_bfloat16_bits(b) for b in biases[1]]
    outs = combine(cfg, ys, handles, reduce=mode, bias0=biases[0], bias1=biases[1])
    for s, out in enumerate(outs):
        assert out.shape == case.xs[s].shape
        assert out.dtype == (np.uint16 if output_dtype == "bfloat16" else np.float32)
        n = case.counts[s]
        assert not out[n:].any()
        for t in range(n):
            channel = int(rng.integers(cfg.hidden_size))
            want = scalar_combine(case, handles, ys, mode, biases, s, t, channel, case.weights)
            if output_dtype == "bfloat16":
                assert out[t, channel] == float32_to_bfloat16_bits(np.array([want], np.float32))[0]
            else:
                assert same_float32(out[t, channel], want)


@settings(max_examples=40, deadline=None)
@given(cases(layouts=("expert", "expert_padded")), st.sampled_from(["expert", "source"]))
def test_identity_experts_with_integers(case, mode):
    """Small integers and weights: every sum is exact, so it must equal the dense sum."""
    cfg = case.cfg = case.cfg.replace(combine_dtype="float32", output_dtype="float32", shared_expert=False)
    case.xs = [float32_to_bfloat16_bits(np.round(bfloat16_bits_to_float32(x) * 4)) for x in case.xs]
    if case.weights is not None:
        case.weights = [np.round(w * 4).astype(np.float32) for w in case.weights]
    handles = dispatch(cfg, case.xs, case.topk_ids, case.weights, case.num_tokens)
    outs = combine(cfg, [bfloat16_bits_to_float32(h.tokens) for h in handles], handles, reduce=mode)
    for s, out in enumerate(outs):
        ids = case.topk_ids[s]
        valid = (ids >= 0) & (ids < cfg.n_experts) & (np.arange(ids.shape[0]) < case.counts[s])[:, None]
        total = (valid * (1 if case.weights is None else case.weights[s])).sum(axis=1, keepdims=True)
        assert np.array_equal(out, bfloat16_bits_to_float32(case.xs[s]) * total)


def one_token(cfg, ids, weights=None):
    """Rank 0 has one token with these ids, the others none."""
    empty = [np.zeros((0, cfg.top_k), np.int32)] * (cfg.n_ranks - 1)
    xs = [np.zeros((1, 8), np.uint16)] + [np.zeros((0, 8), np.uint16)] * (cfg.n_ranks - 1)
    all_weights = None
    if weights is not None:
        all_weights = [np.array([weights], np.float32)] + [np.zeros((0, cfg.top_k), np.float32)] * (cfg.n_ranks - 1)
    return dispatch(cfg, xs, [np.array([ids], np.int32), *empty], all_weights)


def filled(cfg, handles, values):
    """Expert rows: every row of rank r holds values[r]."""
    shapes = [(*h.tokens.shape[:-1], cfg.hidden_size) for h in handles]
    return [cast_rows(cfg, np.full(s, v, np.float32)) for s, v in zip(shapes, values, strict=True)]


def test_partial_sums_are_rounded_to_the_wire():
    """1 + 2^-8 needs 9 bits: the wire in bfloat16 loses the last one, with reduce="source" it survives."""
    cfg = EPConfig(8, 2, 4, 3, 2, output_dtype="float32")
    handles = one_token(cfg, [0, 0], [1.0, 2.0**-8])
    ys = filled(cfg, handles, [1.0, 0.0])
    assert combine(cfg, ys, handles, reduce="expert")[0][0, 0] == 1
    assert combine(cfg, ys, handles, reduce="source")[0][0, 0] == 1 + 2**-8
    wide = cfg.replace(combine_dtype="float32")
    assert combine(wide, filled(wide, handles, [1.0, 0.0]), handles, reduce="expert")[0][0, 0] == 1 + 2**-8


def test_order_of_ranks_and_choices():
    """2^24 + 1 + 1: the order shows in float32."""
    cfg = EPConfig(8, 3, 3, 2, 3, combine_dtype="float32", output_dtype="float32")
    handles = one_token(cfg, [2, 1, 0])
    ys = filled(cfg, handles, [1.0, 1.0, 2.0**24])
    assert combine(cfg, ys, handles, reduce="expert")[0][0, 0] == 2**24 + 2  # (1 + 1) + 2^24
    assert combine(cfg, ys, handles, reduce="source")[0][0, 0] == 2**24  # (2^24 + 1) + 1


def test_products_are_not_rounded():
    w = np.float32(1 + 2**-12)
    handles = one_token(SMALL, [0, 1], [w, 1.0])
    ys = filled(SMALL, handles, [0.0, 0.0])
    ys[0][:] = w
    ys[0][handles[0].row_map[0, 0, 1]] = np.float32(-1)
    got = combine(SMALL, ys, handles, reduce="source")[0][0, 0]
    assert got == np.float32(np.float64(w) * np.float64(w)) - 1
    ys[0][handles[0].row_map[0, 0, 0]] = np.float32(-1)
    ys[0][handles[0].row_map[0, 0, 1]] = w
    handles[0].weights[0] = 1, w
    exact = np.float64(w) * np.float64(w) - 1
    assert combine(SMALL, ys, handles, reduce="source")[0][0, 0] == exact


def test_biases_come_first_and_tokens_without_expert_get_them():
    handles = one_token(SMALL, [-1, 4])
    ys = filled(SMALL, handles, [np.nan, np.nan])
    bias0 = [np.full((1, 8), 2, np.float32), np.zeros((0, 8), np.float32)]
    bias1 = [np.full((1, 8), 0x4040, np.uint16), np.zeros((0, 8), np.uint16)]  # 3.0
    assert combine(SMALL, ys, handles)[0].tolist() == [[0.0] * 8]
    assert combine(SMALL, ys, handles, bias0=bias0)[0][0, 0] == 2
    assert combine(SMALL, ys, handles, bias0=bias0, bias1=bias1)[0][0, 0] == 5
    assert combine(SMALL, ys, handles, bias1=[bias1[0], None])[0][0, 0] == 3


def test_rows_past_num_tokens_are_zero():
    case = make_case(SMALL, 0, routing="uniform", ragged=False)
    handles = dispatch(SMALL, case.xs, case.topk_ids, case.weights, [1, 0])
    bias = [np.ones((3, 8), np.float32)] * 2
    outs = combine(SMALL, expert_rows(SMALL, handles, 0), handles, bias0=bias)
    assert outs[0][0].any()
    assert not outs[0][1:].any()
    assert not outs[1].any()


def test_shared_rows():
    cfg = SMALL.replace(shared_expert=True, alignment=4)
    case = make_case(cfg, 0, routing="none", ragged=False)
    handles = dispatch(cfg, case.xs, case.topk_ids)
    ys = expert_rows(cfg, handles, 1)
    for y, out in zip(ys, combine(cfg, ys, handles), strict=True):
        assert np.array_equal(out, y[:3])


def test_rank_layout_is_unweighted():
    cfg = SMALL.replace(output_layout="rank")
    handles = one_token(cfg, [3, 0], [0.25, 0.5])
    ys = filled(cfg, handles, [10.0, 100.0])
    for mode in ("expert", "source"):
        assert combine(cfg, ys, handles, reduce=mode)[0][0, 0] == 110


def test_weights_at_combine():
    handles = one_token(SMALL, [3, 0])
    ys = filled(SMALL, handles, [10.0, 100.0])
    none = np.zeros((0, 2), np.float32)
    weights = [np.array([[0.5, 2.0]], np.float32), none]
    assert combine(SMALL, ys, handles, reduce="source", weights=weights)[0][0, 0] == 70
    assert combine(SMALL, ys, handles, reduce="source")[0][0, 0] == 110
    with pytest.raises(UnsupportedError, match="source"):
        combine(SMALL, ys, handles, reduce="expert", weights=weights)
    with pytest.raises(UnsupportedError, match="rank"):
        combine(SMALL.replace(output_layout="rank", max_rows=12), ys, handles, reduce="source", weights=weights)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_infinities_and_nan(value):
    handles = one_token(SMALL, [3, 0], [1.0, 0.0])
    ys = filled(SMALL, handles, [value, 1.0])
    assert np.isnan(combine(SMALL, ys, handles, reduce="expert")[0]).all()  # 0 * inf
    ys = filled(SMALL, handles, [1.0, value])
    got = combine(SMALL, ys, handles, reduce="expert")[0][0, 0]
    assert same_float32(got, value)


def test_reduce_mode():
    assert reduce_mode(SMALL) == "expert"
    assert reduce_mode(SMALL, "source") == "source"
    assert reduce_mode(SMALL.replace(reduce="source")) == "source"
    assert reduce_mode(SMALL.replace(slots="expert")) == "source"
    with pytest.raises(ConfigError, match="reduce = 'expert'"):
        reduce_mode(SMALL.replace(reduce="source"), "expert")
    with pytest.raises(ConfigError, match="sum"):
        reduce_mode(SMALL, "sum")


def test_expert_slots_give_the_same():
    case = make_case(SMALL, 4)
    outs = []
    for cfg in (SMALL, SMALL.replace(slots="expert")):
        handles = dispatch(cfg, case.xs, case.topk_ids, case.weights, case.num_tokens)
        outs.append(combine(cfg, expert_rows(cfg, handles, 2), handles, reduce="source"))
    assert all(np.array_equal(a, b) for a, b in zip(*outs, strict=True))


def test_handles_can_be_used_again():
    case = make_case(SMALL, 4)
    handles = dispatch(SMALL, case.xs, case.topk_ids, case.weights, case.num_tokens)
    ys = expert_rows(SMALL, handles, 2)
    first, second = combine(SMALL, ys, handles), combine(SMALL, ys, handles)
    assert all(output_difference("out", a, b) is None for a, b in zip(first, second, strict=True))


BAD_Y = [
    (np.zeros((12, 16), np.float32), ShapeError),
    (np.zeros((11, 8), np.float32), ShapeError),
    (np.zeros((12, 8), np.uint16), DTypeError),
    (np.zeros((12, 8)), DTypeError),
    (None, DTypeError),
]


@pytest.mark.parametrize(("bad", "cls"), BAD_Y, ids=lambda v: getattr(v, "__name__", ""))
def test_bad_rows(bad, cls):
    case = make_case(SMALL, 0)
    handles = dispatch(SMALL, case.xs, case.topk_ids)
    with pytest.raises(cls, match=r"y\[1\]"):
        combine(SMALL, [np.zeros((12, 8), np.float32), bad], handles)


def test_bad_bias_and_weights():
    case = make_case(SMALL, 0, ragged=False)
    handles = dispatch(SMALL, case.xs, case.topk_ids)
    ys = expert_rows(SMALL, handles, 0)
    with pytest.raises(ShapeError, match=r"bias0\[0\]"):
        combine(SMALL, ys, handles, bias0=[np.zeros((8,), np.float32)] * 2)
    with pytest.raises(DTypeError, match=r"bias1\[0\]"):
        combine(SMALL, ys, handles, bias1=[np.zeros((3, 8), np.float64)] * 2)
    with pytest.raises(ShapeError, match=r"weights\[1\]"):
        good = np.zeros((3, 2), np.float32)
        combine(SMALL, ys, handles, reduce="source", weights=[good, good[:2]])
    with pytest.raises(ShapeError, match="len"):
        combine(SMALL, ys[:1], handles)


def test_output_difference():
    a = np.array([[1.0, np.nan]], np.float32)
    b = np.array([[1.0, -np.nan]], np.float32)
    assert output_difference("out", a, b) is None
    assert output_difference("out", a, a + 1).startswith("out[0, 0] = 2.0, expected 1.0 (1 of 2")
    assert "dtype" in output_difference("out", a, a.astype(np.float64))
    assert "shape" in output_difference("out", a, a[0])
    zero = np.zeros(1, np.float32)
    assert "out[0]" in output_difference("out", zero, -zero)
    assert output_difference("out", np.array([0x7FC0], np.uint16), np.array([0xFFC1], np.uint16)) is None
    assert output_difference("out", np.array([0x7FC0], np.uint16), np.array([0x7F80], np.uint16))
