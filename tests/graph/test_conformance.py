"""Every format, output layout and reduce mode of virtual ranks, bit for bit against the reference."""

import numpy as np
import pytest
from graph.stages import COMBINE_TYPES, FORMATS, FP8_HIDDEN, LAYOUTS, REDUCE_MODES, Engine
from graph.virtual import Play, Round, random_round
from unit.cases import make_case

import ep_mojo as ep
from ep_mojo import layout as offsets
from ep_mojo import reference

BF16 = ep.BF16()


def config(hidden, layout, fmt=BF16, **fields):
    types = COMBINE_TYPES[hidden]
    sizes = {"top_k": 4, "n_experts": 12, "max_tokens_per_rank": 11, "n_ranks": 3}
    return ep.EPConfig(
        hidden_size=hidden,
        dispatch_format=fmt,
        output_layout=layout,
        combine_dtype=types[0],
        output_dtype=types[1],
        **sizes | fields,
    )


def play(models, cfg, rounds, seed=0):
    with Engine(models, cfg) as engine:
        differences = Play(engine, rounds).run(np.random.default_rng(seed))
        engine.comm.check()
    assert not differences, "\n".join(differences)


@pytest.mark.parametrize("reduce", REDUCE_MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_round(stages, fmt, layout, reduce):
    cfg = config(8 if fmt == BF16 else FP8_HIDDEN, layout, fmt)
    if layout == "expert":
        cfg = cfg.replace(alignment=8, shared_expert=True)
    play(stages, cfg, [random_round(cfg, seed, reduce=reduce, special=0.02) for seed in range(3)])


@pytest.mark.parametrize("reduce", REDUCE_MODES)
def test_float32_rows_and_a_hidden_size_between_vectors(stages, reduce):
    cfg = config(72, "expert", reduce=reduce)
    play(stages, cfg, [random_round(cfg, seed, reduce=reduce) for seed in range(3)])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_payload_than_one_worker_takes(stages, layout):
    cfg = config(
        FP8_HIDDEN, layout, ep.BlockwiseFP8(), max_tokens_per_rank=70, alignment=16 if layout == "expert" else 1
    )
    rounds = [
        random_round(cfg, seed, reduce=mode, ragged=False, special=0.05) for seed, mode in enumerate(REDUCE_MODES)
    ]
    play(stages, cfg, rounds)


@pytest.mark.parametrize("n_sms", [None, 30])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("most", [1030, 256], ids=["tables_stored", "tables_as_cells"])
def test_so_many_tokens_that_several_ctas_map_a_source(stages, most, layout, n_sms):
    """On a GPU: 4 pieces of a source, or 2. Some of them are empty, one ends in the middle of a chunk."""
    cfg = config(8, layout, top_k=8, max_tokens_per_rank=most, tokens_per_signal=5, n_sms=n_sms)
    assert cfg.table_room == (most == 256 and layout != "gathered")
    if layout == "expert":
        cfg = cfg.replace(alignment=8, shared_expert=True)
    rounds = [random_round(cfg, seed, ragged=False) for seed in range(3)]
    for rnd, tokens in zip(rounds[1:], [(0, most, 3), (most // 4 + 4, most // 2 + 2, most - 1)], strict=True):
        rnd.case.num_tokens = [np.array([n], np.int32) for n in tokens]
        rnd.solve()
    play(stages, cfg, rounds)


@pytest.mark.parametrize("tokens", [40, 120], ids=["few", "many"])
@pytest.mark.parametrize("n_sms", [1, 2])
def test_budget_of_workers(stages, n_sms, tokens):
    """On a GPU many tokens are mapped by CTAs together, here fewer than there are sources."""
    cfg = config(FP8_HIDDEN, "expert", ep.BlockwiseFP8(), max_tokens_per_rank=tokens, n_sms=n_sms, tokens_per_signal=3)
    play(stages, cfg, [random_round(cfg, 5, ragged=False)])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_chunks_for_each_worker(stages, layout):
    """On a GPU 1200 for 16 warps, which take them as they come free; in a round most are empty, in one a source's."""
    cfg = config(8, layout, max_tokens_per_rank=400, tokens_per_signal=1, n_sms=2)
    rounds = [random_round(cfg, seed, reduce=mode, ragged=False) for seed, mode in enumerate(2 * REDUCE_MODES)]
    for rnd, tokens in zip(rounds[1:], [(7, 0, 2), (400, 0, 399), (400, 400, 400)], strict=True):
        rnd.case.num_tokens = [np.array([n], np.int32) for n in tokens]
        rnd.solve()
    with Engine(stages, cfg) as engine:
        differences = Play(engine, rounds).run(np.random.default_rng(0))
        engine.comm.check()
        assert not differences, "\n".join(differences)
        assert not any(m.counters[offsets.TICKETS : offsets.TICKETS + 2].any() for m in engine.comm.memories)


@pytest.mark.parametrize("scale", ["float32", "ue8m0"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_that_are_quantised_already(stages, scale, layout):
    fmt = ep.BlockwiseFP8(scale)
    cfg = config(FP8_HIDDEN, layout, fmt)
    case = make_case(cfg.replace(output_layout="expert"), 3, "uniform")
    case.topk_ids = [
        np.argsort(np.random.default_rng(r).random((len(x), 12)))[:, :4].astype(np.int32) for r, x in enumerate(case.xs)
    ]
    case.cfg = cfg
    encoded = [reference.encode(cfg, x, None) for x in case.xs]
    case.xs, scales = [e[0] for e in encoded], [e[1] for e in encoded]
    play(stages, cfg, [Round(case, x_scales=scales).solve()])


@pytest.mark.parametrize("layout", ["expert", "expert_padded"])
@pytest.mark.parametrize("n_sms", [None, 1])
def test_blocks_of_more_messages_than_lanes(stages, layout, n_sms):
    """slots="expert": more messages from a source to an expert than a warp has lanes; tokens that choose one twice."""
    sizes = {"top_k": 3, "n_experts": 4, "max_tokens_per_rank": 150, "n_ranks": 2}
    cfg = ep.EPConfig(hidden_size=8, output_layout=layout, slots="expert", n_sms=n_sms, **sizes)
    rounds = [random_round(cfg, seed, reduce="source", routing="uniform", ragged=False) for seed in range(3)]
    if layout == "expert":
        rounds.append(random_round(cfg, 3, reduce="source"))
    play(stages, cfg, rounds)
