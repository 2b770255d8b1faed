"""Dispatch of the reference: against a second implementation by sorting, and by hand."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from unit.cases import Case, cases, make_case

from ep_mojo.config import BlockwiseFP8, CustomFormat, EPConfig
from ep_mojo.dtypes import bfloat16_bits_to_float32, float32_to_bfloat16_bits
from ep_mojo.errors import CapacityError, DTypeError, ShapeError, UnsupportedError
from ep_mojo.reference import defined_rows, dequantize, dispatch, handle_differences, quantize, scales_by_row

SMALL = EPConfig(hidden_size=8, top_k=2, n_experts=4, max_tokens_per_rank=3, n_ranks=2)


def run(case: Case, **kw):
    return dispatch(case.cfg, case.xs, case.topk_ids, case.weights, case.num_tokens, **kw)


def by_sorting(case: Case, rank: int) -> dict:
    """Rows of one rank of the expert layouts from one sort of all pairs: group -> list of (source, token, k)."""
    cfg = case.cfg
    table = np.array(list(case.pairs()), np.int64).reshape(-1, 4)
    table = table[table[:, 3] // cfg.n_local_experts == rank]
    table = table[np.lexsort((table[:, 2], table[:, 1], table[:, 0], table[:, 3]))]
    return {
        e: table[table[:, 3] == e][:, :3].tolist() for e in range(cfg.n_experts) if e // cfg.n_local_experts == rank
    }


@settings(max_examples=150, deadline=None)
@given(cases(layouts=("expert", "expert_padded")))
def test_expert_layouts(case):
    cfg = case.cfg
    size = cfg.n_ranks * cfg.max_tokens_per_rank
    for rank, h in enumerate(run(case)):
        groups = by_sorting(case, rank)
        lists = list(groups.values())
        if cfg.shared_expert:
            lists.insert(0, [[rank, t, -1] for t in range(case.counts[rank])])
        assert h.counts.tolist() == [len(g) for g in lists]
        assert h.expert_ids.tolist() == [cfg.n_experts] * cfg.shared_expert + list(groups)
        tokens = h.tokens.reshape(cfg.rows_capacity, -1)
        used = np.zeros(cfg.rows_capacity, bool)
        row_map = np.full_like(h.row_map, -1)
        for g, group in enumerate(lists):
            start = int(h.row_offsets[g])
            assert start == g * size if cfg.output_layout == "expert_padded" else start % cfg.alignment == 0
            for row, (s, t, k) in enumerate(group, start):
                assert np.array_equal(tokens[row], case.xs[s][t])
                assert h.src_info[row].tolist() == [s * cfg.max_tokens_per_rank + t, k]
                used[row] = True
                if k >= 0:
                    row_map[s, t, k] = row
            if cfg.output_layout == "expert":
                padded = -(-len(group) // cfg.alignment) * cfg.alignment
                assert h.row_offsets[g + 1] - start == padded
                assert not tokens[start + len(group) : start + padded].any()
        assert np.array_equal(h.row_map, row_map)
        assert (h.src_info[~used] == -1).all()
        assert h.row_offsets.shape == (cfg.n_groups + 1,)
        assert h.row_offsets[-1] <= cfg.rows_capacity
        assert h.local_ids.shape == h.local_weights.shape == h.scales.shape == (0, 0)
        check_received(case, h)
        check_types(h)


@settings(max_examples=100, deadline=None)
@given(cases(layouts=("rank",)))
def test_rank_layout(case):
    cfg, n_local = case.cfg, case.cfg.n_local_experts
    for rank, h in enumerate(run(case)):
        chosen = sorted({(s, t) for s, t, _, e in case.pairs() if e // n_local == rank})
        assert h.row_offsets.tolist() == [sum(s < r for s, _ in chosen) for r in range(cfg.n_ranks + 1)]
        assert h.counts.tolist() == np.diff(h.row_offsets.astype(np.int64)).tolist()
        assert h.expert_ids.shape == (0,)
        first: dict = {}
        for s, t, k, e in case.pairs():
            if e // n_local == rank:
                first.setdefault((s, t), k)
        for row, (s, t) in enumerate(chosen):
            assert h.src_info[row].tolist() == [s * cfg.max_tokens_per_rank + t, -1]
            assert np.array_equal(h.tokens[row], case.xs[s][t])
            ids = [int(e) for e in case.topk_ids[s][t]]
            local = [e - rank * n_local if 0 <= e - rank * n_local < n_local else -1 for e in ids]
            assert h.local_ids[row].tolist() == local
            given_weights = np.ones(cfg.top_k, np.float32) if case.weights is None else case.weights[s][t]
            assert h.local_weights[row].tolist() == [
                w if e >= 0 else 0 for w, e in zip(given_weights, local, strict=True)
            ]
            want = np.full(cfg.top_k, -1)
            want[first[s, t]] = row
            assert h.row_map[s, t].tolist() == want.tolist()
        assert (h.row_map >= 0).sum() == len(chosen)
        assert (h.local_ids[len(chosen) :] == -1).all()
        assert not h.local_weights[len(chosen) :].any()
        assert (h.src_info[len(chosen) :] == -1).all()
        check_received(case, h)
        check_types(h)


@settings(max_examples=60, deadline=None)
@given(cases(layouts=("gathered",)))
def test_gathered_layout(case):
    """All tokens on all ranks, by source and without gaps, with what they have chosen."""
    cfg = case.cfg
    tokens = [(s, t) for s, n in enumerate(case.counts) for t in range(n)]
    for h in run(case):
        assert h.row_offsets.tolist() == np.cumsum([0, *case.counts]).tolist()
        assert h.counts.tolist() == h.recv_num_tokens.tolist() == case.counts
        assert h.local_ids.shape == h.local_weights.shape == (cfg.rows_capacity, cfg.top_k)
        for row, (s, t) in enumerate(tokens):
            assert h.src_info[row].tolist() == [s * cfg.max_tokens_per_rank + t, -1]
            assert np.array_equal(h.tokens[row], case.xs[s][t])
            chosen = [int(e) if 0 <= e < cfg.n_experts else -1 for e in case.topk_ids[s][t]]
            assert h.local_ids[row].tolist() == chosen
            weights = np.ones(cfg.top_k, np.float32) if case.weights is None else case.weights[s][t]
            assert np.array_equal(h.local_weights[row], weights)
        assert (h.local_ids[len(tokens) :] == -1).all()
        assert not h.local_weights[len(tokens) :].any()
        assert (h.src_info[len(tokens) :] == -1).all()
        assert h.expert_ids.size == h.row_map.size == h.recv_weights.size == 0
        check_types(h)


def check_received(case, h):
    cfg = case.cfg
    assert h.recv_num_tokens.tolist() == case.counts
    assert h.num_tokens == case.counts[h.rank]
    for s, n in enumerate(case.counts):
        want = np.ones((n, cfg.top_k), np.float32) if case.weights is None else case.weights[s][:n]
        assert np.array_equal(h.recv_weights[s, :n], want)
        assert not h.recv_weights[s, n:].any()
        assert (h.row_map[s, n:] == -1).all()
    assert h.topk_ids is case.topk_ids[h.rank]


def check_types(h):
    types = {
        "row_offsets": np.uint32,
        "counts": np.int32,
        "expert_ids": np.int32,
        "src_info": np.int32,
        "local_ids": np.int32,
    }
    types |= {"local_weights": np.float32, "recv_weights": np.float32, "row_map": np.int32, "recv_num_tokens": np.int32}
    for name, dtype in types.items():
        assert getattr(h, name).dtype == dtype, name


def test_by_hand():
    """R=2, E=4, K=2: rank 0 has the tokens a, b, c, rank 1 has d. c has no expert here, d chooses expert 1 twice."""
    xs = [np.arange(24, dtype=np.uint16).reshape(3, 8), np.full((1, 8), 99, np.uint16)]
    ids = [np.array([[3, 0], [1, 0], [-1, 4]], np.int32), np.array([[1, 1]], np.int64)]
    weights = [np.arange(6, dtype=np.float32).reshape(3, 2), np.full((1, 2), 9, np.float32)]
    h0, h1 = dispatch(SMALL, xs, ids, weights)
    assert h0.row_offsets.tolist() == [0, 2, 5]
    assert h0.src_info[:6].tolist() == [[0, 1], [1, 1], [1, 0], [3, 0], [3, 1], [-1, -1]]
    assert h0.tokens[:5, 0].tolist() == [0, 8, 8, 99, 99]
    assert h1.row_offsets.tolist() == [0, 0, 1]
    assert (h1.counts.tolist(), h1.expert_ids.tolist(), h1.tokens[0, 1]) == ([0, 1], [2, 3], 1)
    assert h0.row_map[0].tolist() == [[-1, 0], [2, 1], [-1, -1]]
    assert h0.row_map[1].tolist() == [[3, 4], [-1, -1], [-1, -1]]
    assert h0.recv_weights[1].tolist() == [[9, 9], [0, 0], [0, 0]]

    aligned = dispatch(SMALL.replace(alignment=4), xs, ids, weights)[0]
    assert aligned.row_offsets.tolist() == [0, 4, 8]
    assert aligned.src_info[:8, 1].tolist() == [1, 1, -1, -1, 0, 0, 1, -1]

    by_rank = dispatch(SMALL.replace(output_layout="rank"), xs, ids, weights)[0]
    assert by_rank.row_offsets.tolist() == [0, 2, 3]
    assert by_rank.local_ids[:3].tolist() == [[-1, 0], [1, 0], [1, 1]]
    assert by_rank.local_weights[:3].tolist() == [[0, 1], [2, 3], [9, 9]]
    assert by_rank.row_map[0].tolist() == [[-1, 0], [1, -1], [-1, -1]]

    padded = dispatch(SMALL.replace(output_layout="expert_padded"), xs, ids, weights)[0]
    assert padded.tokens.shape == (2, 6, 8)
    assert padded.counts.tolist() == [2, 3]
    assert padded.row_map[1, 0].tolist() == [7, 8]

    shared = dispatch(SMALL.replace(shared_expert=True), xs, ids, weights)[0]
    assert shared.row_offsets.tolist() == [0, 3, 5, 8]
    assert shared.expert_ids.tolist() == [4, 0, 1]
    assert shared.src_info[:3].tolist() == [[0, -1], [1, -1], [2, -1]]


def test_num_tokens_forms():
    case = make_case(SMALL, 0, ragged=False)
    want = dispatch(SMALL, case.xs, case.topk_ids, case.weights, [2, 0])
    for form in ([np.array([2], np.int32), np.array([0], np.int32)], [np.int64(2), 0]):
        got = dispatch(SMALL, case.xs, case.topk_ids, case.weights, form)
        assert all(not handle_differences(SMALL, w, g) for w, g in zip(want, got, strict=True))
    cut = dispatch(SMALL, *([a[: 2 - 2 * r] for r, a in enumerate(v)] for v in (case.xs, case.topk_ids, case.weights)))
    assert all(not handle_differences(SMALL, w, g) for w, g in zip(want, cut, strict=True))


def test_nan_and_inf_bits_are_carried():
    xs = [
        np.array([[0x7F80, 0xFF80, 0x7FC1, 0xFFFF, 0x7F81, 0x8000, 1, 0x8001]], np.uint16),
        np.zeros((0, 8), np.uint16),
    ]
    ids = [np.array([[2, 1]], np.int32), np.zeros((0, 2), np.int32)]
    for h in dispatch(SMALL, xs, ids):
        assert np.array_equal(h.tokens[0], xs[0][0])


def test_ml_dtypes_inputs():
    case = make_case(SMALL, 1)
    typed = [x.view(ml_dtypes.bfloat16) for x in case.xs]
    for want, got in zip(run(case), dispatch(SMALL, typed, case.topk_ids, case.weights, case.num_tokens), strict=True):
        assert not handle_differences(SMALL, want, got)


def fp8_case(fmt, seed=0, hidden=640, layout="expert"):
    cfg = EPConfig(
        hidden, 3, 6, 5, 3, dispatch_format=fmt, output_layout=layout, alignment=4 if layout == "expert" else 1
    )
    return make_case(cfg, seed)


@pytest.mark.parametrize("layout", ["expert", "rank"])
@pytest.mark.parametrize("scales_layout", ["row", "column"])
@pytest.mark.parametrize("scale", BlockwiseFP8.SCALES)
@pytest.mark.parametrize("factor", [None, 0.37, [1.0, 2.0, 3.0]], ids=str)
def test_fp8_rows(scale, scales_layout, layout, factor):
    case = fp8_case(BlockwiseFP8(scale, scales_layout), layout=layout)
    cfg = case.cfg
    for h in run(case, input_scale=factor):
        scales = h.scales.T if scales_layout == "column" else h.scales
        assert scales.shape == (cfg.rows_capacity, cfg.scales_per_token)
        assert h.scales.flags.c_contiguous
        for row, (code, _) in enumerate(h.src_info):
            if code < 0:
                assert not h.tokens[row].any()
                assert not scales[row].any()
                continue
            s, t = divmod(int(code), cfg.max_tokens_per_rank)
            f = 1 if factor is None else factor[s] if isinstance(factor, list) else factor
            q, want = quantize(bfloat16_bits_to_float32(case.xs[s][t : t + 1]) * np.float32(f), scale)
            assert np.array_equal(h.tokens[row], q[0])
            assert np.array_equal(scales[row], want[0])
        values = dequantize(cfg, h.tokens, scales)
        assert values.shape == (cfg.rows_capacity, cfg.hidden_size)


def test_fp8_padded_shapes():
    case = make_case(EPConfig(128, 1, 4, 3, 2, dispatch_format=BlockwiseFP8(), output_layout="expert_padded"), 0)
    for h in run(case):
        assert h.tokens.shape == (2, 6, 128)
        assert h.scales.shape == (12, 1)
        assert dequantize(case.cfg, h.tokens, h.scales).shape == (2, 6, 128)


def test_padded_rows_have_their_columns_of_scales_by_expert():
    def config(layout: str) -> EPConfig:
        fmt = BlockwiseFP8("float32", layout)
        return EPConfig(384, 1, 4, 3, 2, dispatch_format=fmt, output_layout="expert_padded")

    case = make_case(config("row"), 0)
    for want, got in zip(run(case), run(replace(case, cfg=config("column"))), strict=True):
        assert (want.scales.shape, got.scales.shape) == ((12, 3), (2 * 3, 6))
        for row, scales in enumerate(want.scales):
            assert np.array_equal(got.scales.reshape(2, 3, 6)[row // 6, :, row % 6], scales)
        assert np.array_equal(scales_by_row(config("column"), got.scales), want.scales)


@pytest.mark.parametrize("scale", ["float32", "ue8m0"])
def test_prequantised_tokens_pass_through(scale):
    case = fp8_case(BlockwiseFP8(scale))
    ready = [quantize(bfloat16_bits_to_float32(x), scale) for x in case.xs]
    got = dispatch(
        case.cfg, [q for q, _ in ready], case.topk_ids, case.weights, case.num_tokens, x_scales=[s for _, s in ready]
    )
    for want, h in zip(run(case), got, strict=True):
        assert not handle_differences(case.cfg, want, h)


def int8_encode(x):
    scale = np.abs(x).max(axis=1, initial=1e-9, keepdims=True) / 127
    return np.rint(x / scale).astype(np.int8), scale.astype(np.float32)


def test_custom_format():
    fmt = CustomFormat(
        "a.Int8", "int8", message_size=32, scale_dtype="float32", scale_count=1, scales_layout="column",
        encode=int8_encode, decode=lambda q, s: q.astype(np.float32) * s,
    )  # fmt: skip
    case = make_case(SMALL.replace(dispatch_format=fmt), 2)
    for h in run(case):
        assert h.tokens.dtype == np.int8
        assert h.scales.shape == (1, case.cfg.rows_capacity)
        values = dequantize(case.cfg, h.tokens, h.scales.T)
        for row in range(int(h.row_offsets[-1])):
            s, t = divmod(int(h.src_info[row, 0]), 3)
            assert np.allclose(values[row], bfloat16_bits_to_float32(case.xs[s][t]), atol=0.05)


def test_custom_format_without_functions():
    case = make_case(SMALL.replace(dispatch_format=CustomFormat("a.Int8", "int8", message_size=16)), 2)
    with pytest.raises(UnsupportedError, match="encode"):
        run(case)
    with pytest.raises(UnsupportedError, match="decode"):
        dequantize(case.cfg, np.zeros((1, 8), np.int8), np.zeros((1, 0), np.float32))


@pytest.mark.parametrize(("max_rows", "fits"), [(12, True), (11, False), (1, False)])
def test_capacity(max_rows, fits):
    cfg = SMALL.replace(max_rows=max_rows)
    case = make_case(cfg, 0, routing="one", ragged=False)
    if fits:
        assert run(case)[1].row_offsets[-1] == 12
        return
    with pytest.raises(CapacityError, match="rank 1.*12") as raised:
        run(case)
    assert raised.value.value == max_rows
    assert "12" in raised.value.allowed


def test_capacity_counts_padding():
    case = make_case(SMALL.replace(max_rows=12, alignment=5), 0, routing="one", ragged=False)
    with pytest.raises(CapacityError, match="15"):
        run(case)


def test_capacity_of_padded_groups():
    cfg = SMALL.replace(output_layout="expert_padded")
    with pytest.raises(CapacityError, match="12 rows") as raised:
        run(make_case(cfg, 0, routing="one", ragged=False))
    assert raised.value.value == 6


def test_capacity_of_rank_layout():
    cfg = SMALL.replace(output_layout="rank", max_rows=5)
    with pytest.raises(CapacityError, match="6"):
        run(make_case(cfg, 0, routing="one", ragged=False))


def test_defined_rows():
    case = make_case(SMALL.replace(alignment=4), 3, routing="uniform")
    for h in run(case):
        assert defined_rows(case.cfg, h).sum() == h.row_offsets[-1]
    case = make_case(SMALL.replace(output_layout="expert_padded"), 3, routing="uniform")
    for h in run(case):
        assert defined_rows(case.cfg, h).sum() == h.counts.sum()


def test_handle_differences_name_the_element():
    case = make_case(SMALL, 5, routing="uniform", ragged=False)
    want, got = run(case)[0], run(case)[0]
    assert handle_differences(SMALL, want, got) == []
    got.tokens[int(got.row_offsets[-1]) :] = 7  # unspecified
    assert handle_differences(SMALL, want, got) == []
    got.tokens[1, 3] ^= 1
    got.counts = got.counts.astype(np.int64)
    got.row_map = got.row_map[:1]
    lines = handle_differences(SMALL, want, got)
    assert len(lines) == 3
    assert lines[0].startswith("rank 0 tokens[1, 3] = ")
    assert "1 of 96 differ" in lines[0]
    assert "dtype int64" in lines[1]
    assert "shape [1, 3, 2]" in lines[2]


def test_handle_differences_of_column_scales():
    case = fp8_case(BlockwiseFP8("float32", "column"))
    want, got = run(case)[0], run(case)[0]
    assert handle_differences(case.cfg, want, got) == []
    got.scales[2, 0] += 1
    assert handle_differences(case.cfg, want, got)[0].startswith("rank 0 scales[0, 2]")


GOOD_X = [np.zeros((3, 8), np.uint16)] * 2
GOOD_IDS = [np.zeros((3, 2), np.int32)] * 2
BAD = [
    ({"xs": GOOD_X[:1]}, ShapeError, "len(x) = 1"),
    ({"xs": 3}, DTypeError, "x = 3"),
    ({"topk_ids": GOOD_IDS * 2}, ShapeError, "len(topk_ids) = 4"),
    ({"weights": [None]}, ShapeError, "len(weights)"),
    ({"xs": [GOOD_X[0], np.zeros((3, 8), np.float32)]}, DTypeError, "x[1] = float32 [3, 8]"),
    ({"xs": [GOOD_X[0], [[1, 2]]]}, DTypeError, "x[1]"),
    ({"num_tokens": [0, 4]}, ShapeError, "num_tokens[1] = 4"),
    ({"input_scale": [1.0]}, ShapeError, "input_scale"),
    ({"input_scale": 2.0}, UnsupportedError, "input_scale"),
    ({"x_scales": [np.zeros((3, 1), np.float32)] * 2}, UnsupportedError, "x_scales"),
]


@pytest.mark.parametrize(("changes", "cls", "text"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_input(changes, cls, text):
    with pytest.raises(cls) as raised:
        dispatch(SMALL, **{"xs": GOOD_X, "topk_ids": GOOD_IDS} | changes)
    assert text in str(raised.value)
    assert raised.value.remedy


def test_inputs_are_left_alone():
    case = make_case(SMALL, 9)
    before = [a.copy() for a in (*case.xs, *case.topk_ids, *case.weights)]
    run(case)
    assert all(np.array_equal(a, b) for a, b in zip(before, (*case.xs, *case.topk_ids, *case.weights), strict=True))
    assert float32_to_bfloat16_bits(np.zeros(1, np.float32))[0] == 0
