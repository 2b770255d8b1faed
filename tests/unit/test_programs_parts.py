"""Parts of the programs that need no graph: experts, dense reference, counted bytes, report text."""

from __future__ import annotations

import io

import numpy as np
import pytest
from unit.cases import make_case

from ep_mojo import layout, reference
from ep_mojo.config import EPConfig
from ep_mojo.dtypes import bfloat16_bits_to_float32
from ep_mojo.formats import BF16, BlockwiseFP8
from ep_mojo.programs import bench, measures, report
from ep_mojo.programs.experts import SwiGLU, dense_moe, expert_outputs, identity
from ep_mojo.programs.layer import FORMATS, float_tokens
from ep_mojo.programs.one_round import ROUNDING_LIMIT, failures
from ep_mojo.programs.progress import Progress, format_seconds

CFG = EPConfig(hidden_size=128, top_k=3, n_experts=6, max_tokens_per_rank=7, n_ranks=3, reduce="expert")


def one_round(cfg, case, ffn):
    """(outputs, dense reference, its size) of a round of the NumPy oracle."""
    handles = reference.dispatch(cfg, case.xs, case.topk_ids, case.weights)
    ys = [expert_outputs(cfg, r, h, ffn) for r, h in enumerate(handles)]
    outputs = np.concatenate(reference.combine(cfg, ys, handles))
    outputs = bfloat16_bits_to_float32(outputs) if outputs.dtype == np.uint16 else outputs
    x, ids, w = (np.concatenate(a) for a in (case.xs, case.topk_ids, case.weights))
    return outputs, *dense_moe(float_tokens(x, cfg), ids, w, cfg.n_experts, ffn)


@pytest.mark.parametrize("fmt", [*FORMATS.values(), BlockwiseFP8(scales_layout="column")], ids=lambda f: f.key())
@pytest.mark.parametrize("output_layout", ["expert", "expert_padded", "rank", "gathered"])
@pytest.mark.parametrize("experts", ["swiglu", "identity"])
def test_a_round_equals_the_dense_layer_up_to_rounding(fmt, output_layout, experts):
    routing = "uniform" if output_layout == "expert_padded" else "mixed"
    cfg = CFG.replace(dispatch_format=fmt, output_layout=output_layout, output_dtype="float32")
    case = make_case(cfg, seed=3, routing=routing, ragged=False)
    if output_layout == "expert_padded":  # no more rows of an expert than fit
        for ids in case.topk_ids:
            ids[:] = np.argsort(np.random.default_rng(5).random((len(ids), cfg.n_experts)), axis=1)[:, : cfg.top_k]
    ffn = identity if experts == "identity" else SwiGLU.random(1, cfg.n_experts, cfg.hidden_size, 4)
    got, want, size = one_round(cfg, case, ffn)
    error = np.linalg.norm(got - want, axis=1)
    assert (error <= ROUNDING_LIMIT * size).all()
    assert want.any()


def test_one_wrong_row_is_over_the_limit():
    case = make_case(CFG, seed=4, routing="uniform", ragged=False)
    handles = reference.dispatch(CFG, case.xs, case.topk_ids, case.weights)
    ys = [expert_outputs(CFG, r, h, identity) for r, h in enumerate(handles)]
    s, t = divmod(int(handles[0].src_info[0, 0]), CFG.max_tokens_per_rank)
    ys[0][0] = 0
    got = bfloat16_bits_to_float32(reference.combine(CFG, ys, handles)[s][t])
    x, ids, w = (a[s][t : t + 1] for a in (case.xs, case.topk_ids, case.weights))
    want, size = dense_moe(float_tokens(x, CFG), ids, w, CFG.n_experts, identity)
    assert np.linalg.norm(got - want[0]) > ROUNDING_LIMIT * size[0]


def test_swiglu_is_the_formula_and_repeats_with_its_seed():
    ffn = SwiGLU.random(7, 3, 16, 4)
    again = SwiGLU.random(7, 3, 16, 4)
    assert all((a == b).all() for a, b in zip(vars(ffn).values(), vars(again).values(), strict=True))
    x = np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32)
    g, u = x @ ffn.w_gate[1].T, x @ ffn.w_up[1].T
    np.testing.assert_allclose(ffn(1, x), (g / (1 + np.exp(-g)) * u) @ ffn.w_down[1].T, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("output_layout", ["expert", "expert_padded", "rank", "gathered"])
def test_traffic_and_rows_as_seen_by_the_receivers(output_layout):
    cfg = CFG.replace(output_layout=output_layout, top_k=2)
    case = make_case(cfg, seed=6, routing="uniform", ragged=True)
    for ids in case.topk_ids:  # distinct experts, so that the padded layout holds them
        ids[:, 1] = (ids[:, 0] + 1) % cfg.n_experts
    case.num_tokens = None
    handles = reference.dispatch(cfg, case.xs, case.topk_ids, case.weights)
    traffic, rows = np.zeros((3, 3), int), np.zeros(cfg.n_experts, int)
    for s, ids in enumerate(case.topk_ids):
        for row in ids:
            owners = {int(e) // cfg.n_local_experts for e in row}
            for r in range(3) if output_layout == "gathered" else owners:
                traffic[s, r] += 1
            for e in row:
                rows[e] += 1
    assert report.traffic_matrix(cfg, handles).tolist() == traffic.tolist()
    assert report.rows_per_expert(cfg, handles).tolist() == rows.tolist()


def test_bytes_against_counting_one_by_one():
    case = make_case(CFG.replace(dispatch_format=BlockwiseFP8()), seed=8, ragged=True)
    cfg = case.cfg
    pairs = messages = rows = tables = 0
    for s, ids in enumerate(case.topk_ids):
        tables += 2 * len(ids) * cfg.top_k * 6
        for row in ids:
            away = [int(e) for e in row if 0 <= e < cfg.n_experts and e // cfg.n_local_experts != s]
            pairs += len({e // cfg.n_local_experts for e in away})
            messages += len(set(away))
            rows += len(away)
    found = report.bytes_moved(cfg, case.topk_ids)
    assert found["ours"]["dispatch"] == pairs * (128 + 16) + tables
    assert found["ours"]["combine"] == pairs * 256
    assert found["per_expert"] == {
        "dispatch": messages * (128 + 32),
        "combine": rows * 256,
        "total": messages * (128 + 32) + rows * 256,
    }


@pytest.mark.parametrize("slots", ["rank", "expert"])
@pytest.mark.parametrize("fmt", [BF16(), BlockwiseFP8()], ids=lambda f: f.key())
@pytest.mark.parametrize("tokens", [37, 137], ids=["few", "many"])
def test_window_formulas_equal_the_layout(slots, fmt, tokens):
    cfg = EPConfig(
        hidden_size=256,
        top_k=5,
        n_experts=12,
        max_tokens_per_rank=tokens,
        n_ranks=3,
        dispatch_format=fmt,
        slots=slots,
        tokens_per_signal=4,
    )
    found = measures.window_bytes(cfg)
    dispatch, combine = layout.DispatchWindow(cfg), layout.CombineWindow(cfg)
    assert found["dispatch_payload"] == dispatch.recv_bytes
    assert found["combine_payload"] == combine.recv_bytes
    assert found["total"] == dispatch.total_bytes + combine.total_bytes


def test_bytes_of_a_round():
    cfg = CFG.replace(top_k=2)
    ids = [np.array([[0, 1], [2, 5]], np.int32), np.zeros((0, 2), np.int32), np.array([[4, 5]], np.int32)]
    # 3 tokens; pairs with other ranks: only token 1 of rank 0, with ranks 1 and 2; 6 rows.
    found = measures.round_bytes(cfg, ids)
    assert found["read"] == 3 * 256 + 2 * 256 + 6 * 256 + 2 * 256
    assert found["written"] == 2 * 256 + 6 * 256 + 2 * 256 + 3 * 256
    assert found["copy"] == found["read"]


def test_failures_count_nan_as_failed():
    errors = {"rounding": {"largest": float("nan"), "limit": 1.0}, "format": {"largest": 0.5, "limit": 1.0}}
    assert failures(errors) == ["rounding"]


def test_bars_in_unicode_and_in_ascii():
    utf8, ascii_ = (io.TextIOWrapper(io.BytesIO(), encoding=e) for e in ("utf-8", "ascii"))
    assert report.bars(np.array([0, 1, 100]), utf8) == " ▁█"
    assert report.bars(np.array([0, 1, 100]), ascii_) == " 19"
    assert report.bars(np.zeros(3, int), ascii_) == "   "


def test_figures_for_people():
    assert [report.size(n) for n in (0, 160, 154_112, 213_500_000)] == ["0.0 kB", "0.2 kB", "154.1 kB", "213.5 MB"]
    assert [report.number_of(n, "token") for n in (0, 1, 2)] == ["0 tokens", "1 token", "2 tokens"]
    numbers = (0, 0.0123, 0.153, 1.56, 17.1, 198.2)
    assert [report.two_digits(x) for x in numbers] == ["0.0", "0.012", "0.15", "1.6", "17", "198"]


@pytest.mark.parametrize(("default", "verdict"), [(True, "NOT MET"), (False, "")])
def test_goals_are_for_the_default_shape(default, verdict):
    text = bench.goals_text(bench.goals(dict.fromkeys(bench.GOALS, 0.1), default), default)
    for name, goal in bench.GOALS.items():
        (line,) = (line for line in text.splitlines() if name in line)
        assert line.endswith(verdict or str(goal))
    assert ("goals are for the default shape" in text) != default


def test_progress_names_steps_and_adds_up():
    stream = io.StringIO()
    progress = Progress(stream)
    for _ in range(2):
        with progress.step("work", "Doing work"):
            pass
    assert stream.getvalue().count("Doing work ... ") == 2
    assert set(progress.seconds) == {"work"}
    with pytest.raises(ZeroDivisionError), progress.step("other"):
        raise ZeroDivisionError
    assert "other" not in progress.seconds
    assert [format_seconds(s) for s in (12.34, 0.0456, 0.000078)] == ["12.3 s", "45.6 ms", "78 us"]
