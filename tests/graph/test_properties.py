"""Drawn configs and routings, several rounds in flight, ranks in any order: always equal to the reference."""

import numpy as np
import pytest
from graph.stages import COMBINE_TYPES, EXPERT_SLOTS_FORMATS, FORMATS, FP8_HIDDEN, LAYOUTS, Engine, hidden_of
from graph.virtual import Play, random_round
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ep_mojo as ep

PROPERTIES = settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def configs(draw, hidden, fmt, layout, slots="rank"):
    """Configs of one compiled variant: everything that is known at run time only."""
    n_ranks = draw(st.integers(1, 8))
    types = COMBINE_TYPES[hidden]
    fields = {
        "top_k": draw(st.one_of(st.integers(int(layout != "gathered"), 4), st.integers(1, 32), st.just(32))),
        "n_experts": n_ranks * draw(st.integers(1, 5)),
        "max_tokens_per_rank": draw(st.integers(1, 9)),
        "tokens_per_signal": draw(st.integers(1, 9)),
    }
    if slots == "rank":
        fields["num_buffers"] = draw(st.integers(1, 4))
        fields["reduce"] = draw(st.sampled_from(["expert", "source", None]))
    if slots == "rank" and layout == "expert":
        fields["alignment"] = draw(st.sampled_from([1, 1, 4, 7]))
        fields["shared_expert"] = draw(st.booleans())
    return ep.EPConfig(
        hidden_size=hidden,
        n_ranks=n_ranks,
        dispatch_format=fmt,
        output_layout=layout,
        slots=slots,
        combine_dtype=types[0],
        output_dtype=types[1],
        **fields,
    )


@st.composite
def games(draw, variants):
    """A config, what its rounds are made from, and the seed of the order in which the ranks play them."""
    cfg = draw(configs(*draw(st.sampled_from(variants))))
    rounds = [
        {
            "seed": draw(SEEDS),
            "routing": draw(st.sampled_from(["mixed", "uniform", "one", "none"])),
            "reduce": cfg.reduce or draw(st.sampled_from(["expert", "source"])),
            "weights": draw(st.booleans()),
            "ragged": draw(st.booleans()),
            "special": draw(st.sampled_from([0.0, 0.0, 0.05, 1.0])),
        }
        for _ in range(draw(st.integers(1, 5)))
    ]
    return cfg, rounds, draw(SEEDS)


def check(stages, cfg, rounds, seed):
    with Engine(stages, cfg) as engine:
        differences = Play(engine, rounds).run(np.random.default_rng(seed))
        engine.comm.check()
    assert not differences, "\n".join(differences)


BF16 = [(8, ep.BF16(), layout) for layout in LAYOUTS]
EXPERT_SLOTS = [
    (hidden_of(fmt), fmt, layout, "expert")
    for fmt in EXPERT_SLOTS_FORMATS.values()
    for layout in ("expert", "expert_padded")
]
FP8 = [(FP8_HIDDEN, fmt, layout) for fmt in FORMATS.values() if fmt != ep.BF16() for _, _, layout in BF16]


@settings(PROPERTIES, max_examples=60)
@given(game=games(BF16))
def test_bf16(stages, game):
    cfg, rounds, seed = game
    check(stages, cfg, [random_round(cfg, **fields) for fields in rounds], seed)


@settings(PROPERTIES, max_examples=60)
@given(game=games(FP8))
def test_fp8(stages, game):
    cfg, rounds, seed = game
    check(stages, cfg, [random_round(cfg, **fields) for fields in rounds], seed)


@settings(PROPERTIES, max_examples=60)
@given(game=games(EXPERT_SLOTS))
def test_expert_slots(stages, game):
    cfg, rounds, seed = game
    check(stages, cfg, [random_round(cfg, **fields) for fields in rounds], seed)


@pytest.mark.parametrize("fmt", EXPERT_SLOTS_FORMATS.values(), ids=EXPERT_SLOTS_FORMATS)
@pytest.mark.parametrize("n_ranks", [1, 3])
def test_expert_slots_with_every_bit_of_a_choice_mask(stages, fmt, n_ranks):
    """K = 32: one expert for all choices of a token, experts in turn, and the last choice alone."""
    types = COMBINE_TYPES[hidden_of(fmt)]
    cfg = ep.EPConfig(
        hidden_size=hidden_of(fmt),
        top_k=32,
        n_experts=2 * n_ranks,
        max_tokens_per_rank=5,
        n_ranks=n_ranks,
        dispatch_format=fmt,
        slots="expert",
        combine_dtype=types[0],
        output_dtype=types[1],
    )
    rounds = [random_round(cfg, seed, reduce="source", ragged=False) for seed in range(3)]
    alone = np.where(np.arange(32) == 31, 0, -1)
    for rnd, ids in zip(rounds, [np.full(32, cfg.n_experts - 1), np.arange(32) % cfg.n_experts, alone], strict=True):
        rnd.case.topk_ids = [np.tile(ids, (len(x), 1)).astype(np.int32) for x in rnd.case.xs]
        rnd.case.num_tokens = None
        rnd.solve()
        masked = [h.src_info[:, 1] for h in rnd.handles]
        assert sum((m == 31).sum() for m in masked) == 5 * n_ranks
    check(stages, cfg, rounds, 0)


@settings(PROPERTIES, max_examples=20)
@given(
    seed=SEEDS,
    n_ranks=st.integers(1, 8),
    reduce=st.sampled_from(["expert", "source"]),
    special=st.sampled_from([0.0, 0.1]),
)
def test_smallest_fp8(stages, seed, n_ranks, reduce, special):
    """One block of 128 channels: all four stages."""
    cfg = ep.EPConfig(
        hidden_size=128,
        top_k=3,
        n_experts=n_ranks,
        max_tokens_per_rank=5,
        n_ranks=n_ranks,
        dispatch_format=ep.BlockwiseFP8(),
    )
    check(stages, cfg, [random_round(cfg, seed, reduce=reduce, special=special)], seed)


@settings(PROPERTIES, max_examples=20)
@given(seed=SEEDS, n_ranks=st.integers(1, 8), reduce=st.sampled_from(["expert", "source"]))
def test_payload_is_carried_unchanged_in_bf16(stages, seed, n_ranks, reduce):
    """Random bit patterns, most of which no arithmetic would leave alone."""
    cfg = ep.EPConfig(
        hidden_size=8, top_k=2, n_experts=2 * n_ranks, max_tokens_per_rank=6, n_ranks=n_ranks, reduce=reduce
    )
    rnd = random_round(cfg, seed, reduce=reduce, ragged=False)
    rng = np.random.default_rng(seed)
    rnd.case.xs = [rng.integers(0, 1 << 16, x.shape).astype(np.uint16) for x in rnd.case.xs]
    rnd.ys = [rng.integers(0, 1 << 16, y.shape).astype(np.uint16) for y in rnd.ys]
    check(stages, cfg, [rnd.solve()], seed)
