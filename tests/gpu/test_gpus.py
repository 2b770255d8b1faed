"""Several GPUs, one rank on each: whole rounds bit for bit, replays, and a rank that never comes."""

import os
import time

import numpy as np
import pytest
from gpu.whole_graphs import MANY, MOST, VARIANTS, Machine, Variant, add_graph, arguments, differences
from graph.virtual import Round, random_round
from unit.cases import make_case

import ep_mojo as ep
from ep_mojo import layout as offsets
from ep_mojo.dtypes import bfloat16_bits_to_float32, float32_to_bfloat16_bits, to_buffer, to_numpy

FUSED = Variant("bf16", "expert", "expert", "fused")
SPLIT = Variant("bf16", "expert", "expert", "split")
BESIDE = Variant("bf16", "expert", "expert", "beside")
EXPERT_SLOTS = Variant("bf16", "expert", "source", "split", "expert")
FUSED_MANY = Variant("bf16", "expert", "expert", "fused", tokens=MANY)
SPLIT_MOST = Variant("bf16", "expert", "expert", "split", tokens=MOST)
FUSED_MOST = Variant("bf16", "expert", "expert", "fused", tokens=MOST)
BY_ROW = [Variant(f, y, "source", m) for f, y, m in (("bf16", "expert", "fused"), ("fp8-float32-row", "rank", "split"))]
"""Rows of choices, where there are few tokens."""
MODES = pytest.mark.parametrize(
    "variant",
    [FUSED, SPLIT, BESIDE, FUSED_MANY, FUSED_MOST, SPLIT_MOST],
    ids=["fused", "split", "beside", "fused_many", "fused_most", "split_most"],
)


def gpu_count():
    from max.driver import accelerator_count

    return accelerator_count()


RANKS = [int(r) for r in os.environ.get("EP_MOJO_TEST_GPUS", "2,3,4,5,6,7,8").split(",")]


@pytest.fixture(scope="session", params=RANKS)
def machine(request):
    """All graphs for R GPUs, compiled in one module."""
    from max.graph import Module

    R = request.param
    if gpu_count() < R:
        pytest.skip(f"needs {R} GPUs, here are {gpu_count()}")
    chosen = VARIANTS if R in (2, 8) else [v for v in VARIANTS if v.fmt == "bf16" or v.layout == "expert"][::3]
    chosen = [*chosen, *(v for v in VARIANTS if v.slots == "expert" and v.fmt == "bf16")]
    chosen = [
        *dict.fromkeys([FUSED, SPLIT, BESIDE, FUSED_MANY, FUSED_MOST, SPLIT_MOST, EXPERT_SLOTS, *BY_ROW, *chosen])
    ]
    module, made = Module(), Machine(R)
    graphs = {}
    for v in chosen:
        made.comms[v.name] = comm = ep.Communicator.gpus(v.config(R))
        graphs[v.name] = add_graph(module, v, comm)
    for v in (FUSED, SPLIT, BESIDE, EXPERT_SLOTS):
        comm = made.comms[v.name]
        graphs[f"{v.name}_60"] = add_graph(module, v, comm, f"{v.name}_60", rounds=60)
        graphs[f"{v.name}_first"] = add_graph(module, v, comm, f"{v.name}_first", ranks_in_it=[0])
    made.graphs = dict(zip(graphs, made.comms[FUSED.name].compile_all(list(graphs.values())), strict=True))
    made.variants = chosen
    yield made
    for comm in made.comms.values():
        comm.destroy()


def draw(variant, cfg, seed, routing="mixed", ragged=True) -> Round:
    """A round with weights, num_tokens and int32 ids, and without biases but that of mode "beside"."""
    rnd = random_round(cfg, seed, reduce=cfg.reduce, routing=routing, ragged=ragged and variant != BESIDE)
    plain = Round(rnd.case, cfg.reduce, ys=rnd.ys)
    plain.case.topk_ids = [i.astype(np.int32) for i in plain.case.topk_ids]
    return solved(variant, plain)


def solved(variant, rnd) -> Round:
    """Solve it, with the bias that a graph of the variant adds."""
    if variant == BESIDE:
        rnd.bias0 = [float32_to_bfloat16_bits(2 * bfloat16_bits_to_float32(x)) for x in rnd.case.xs]
    return rnd.solve()


def test_every_variant_bit_for_bit(machine):
    wrong = []
    for v in machine.variants:
        comm = machine.comms[v.name]
        for seed in range(4):
            rnd = draw(v, comm.cfg, seed, ragged=seed != 1)
            outputs = comm.execute(machine.graphs[v.name], *arguments(rnd))
            wrong += [f"{v.name}, seed {seed}: {text}" for text in differences(comm.cfg, rnd, outputs)]
    assert not wrong, "\n".join(wrong[:40])


@MODES
def test_many_rounds(machine, variant):
    """Rounds without a pause, with other T and routing each time; every one is compared."""
    comm = machine.comms[variant.name]
    pool = [
        draw(variant, comm.cfg, seed, routing)
        for seed, routing in enumerate(["mixed", "uniform", "one", "none", "mixed", "uniform"])
    ]
    rng = np.random.default_rng(0)
    for _ in range(25):
        order = [pool[i] for i in rng.integers(0, len(pool), 8)]
        runs = [
            comm.execute(machine.graphs[variant.name], *arguments(rnd), check=False, as_buffers=True) for rnd in order
        ]
        comm.check()
        for rnd, outputs in zip(order, runs, strict=True):
            assert not differences(comm.cfg, rnd, [to_numpy(o) for o in outputs])


@pytest.mark.parametrize("more", [-1, 0, 1], ids=["one", "as_many_as_ranks", "one_more"])
def test_few_tokens_on_few_sms(machine, more):
    """With R CTAs or fewer each sends, maps and copies in turn; with one more that one sends for all."""
    cfg = FUSED.config(machine.n_ranks, n_sms=machine.n_ranks + more if more >= 0 else 1)
    with ep.Communicator.gpus(cfg) as comm:
        for seed in range(4):
            rnd = draw(FUSED, cfg, seed)
            outputs = comm.execute(machine.graphs[FUSED.name], *arguments(rnd))
            assert not differences(cfg, rnd, outputs)


@pytest.mark.parametrize("variant", [FUSED_MOST, SPLIT_MOST], ids=["fused", "split"])
@pytest.mark.parametrize("more", [0, 1], ids=["together", "apart"])
def test_warps_take_many_chunks_each(machine, variant, more):
    """Every warp sends, then copies; or, with more than 2R CTAs, some send while others copy."""
    R = machine.n_ranks
    cfg = variant.config(R, n_sms=2 * R + 1 if more else R, tokens_per_signal=1)
    with ep.Communicator.gpus(cfg) as comm:
        for seed in range(4):
            rnd = draw(variant, cfg, seed, ragged=seed != 1)
            outputs = comm.execute(machine.graphs[variant.name], *arguments(rnd))
            assert not differences(cfg, rnd, outputs)
        assert not any(m.counters[offsets.TICKETS : offsets.TICKETS + 2].any() for m in comm.memories)


@MODES
def test_a_captured_round_replays_with_other_tokens(machine, variant):
    """The same launches again, with new tokens, routing, weights, and `num_tokens` from 0 to Tmax."""
    comm = machine.comms[variant.name]
    cfg, model = comm.cfg, machine.graphs[variant.name].model
    rounds = []
    for seed in range(6):
        case = make_case(cfg, seed, "mixed" if seed % 2 else "uniform", ragged=False)
        case.topk_ids = [i.astype(np.int32) for i in case.topk_ids]
        rng = np.random.default_rng(seed)
        top = cfg.max_tokens_per_rank
        case.num_tokens = [np.array([(0, top)[seed] if seed < 2 else rng.integers(0, top + 1)], np.int32)] * cfg.n_ranks
        rounds.append(solved(variant, Round(case, cfg.reduce)))
    specs = comm._specs(machine.graphs[variant.name])
    places = [comm.devices[i % cfg.n_ranks] for i in range(len(specs))]

    def buffers(rnd):
        return [to_buffer(a, s.dtype).to(d) for a, s, d in zip(arguments(rnd), specs, places, strict=True)]

    fixed = buffers(rounds[0])
    given = [*fixed, *comm.inputs()]
    model.execute(*given)
    comm.check()
    outputs = model.capture(7, *given)
    comm.check()
    for i in np.random.default_rng(1).integers(0, len(rounds), 60):
        for target, source in zip(fixed, buffers(rounds[i]), strict=True):
            target.inplace_copy_from(source)
        model.replay(7, *given)
        comm.check()
        assert not differences(cfg, rounds[i], [to_numpy(o) for o in outputs])
    model.release_captured_graph(7)


@pytest.mark.parametrize(
    "variant", [FUSED, SPLIT, BESIDE, EXPERT_SLOTS], ids=["fused", "split", "beside", "expert_slots"]
)
def test_a_rank_that_never_comes(machine, variant):
    """Rank 0 alone: PeerTimeoutError within the deadline, and after a reset the next round is right."""
    base = machine.comms[variant.name]
    with ep.Communicator.gpus(base.cfg.replace(timeout_s=1.0)) as comm:
        rnd = draw(variant, comm.cfg, 3, ragged=False)
        start = time.monotonic()
        with pytest.raises(ep.PeerTimeoutError, match=r"rank 0.*rank [1-9]"):
            comm.execute(machine.graphs[f"{variant.name}_first"], *arguments(rnd))
        assert time.monotonic() - start < 6
        start = time.monotonic()
        with pytest.raises(ep.PeerTimeoutError):  # 60 rounds end within two deadlines, not sixty
            comm.execute(machine.graphs[f"{variant.name}_60"], *arguments(rnd))
        assert time.monotonic() - start < 6
        comm.reset()
        outputs = comm.execute(machine.graphs[variant.name], *arguments(rnd))
        assert not differences(comm.cfg, rnd, outputs)
        comm.execute(machine.graphs[f"{variant.name}_60"], *arguments(rnd))


def test_devices_are_checked(machine):
    cfg = FUSED.config(2)
    with pytest.raises(ep.DeviceError, match="2 different GPUs"):
        ep.Communicator.gpus(cfg, [0])
    with pytest.raises(ep.DeviceError, match="2 different GPUs"):
        ep.Communicator.gpus(cfg, [0, 0])
    with pytest.raises(ep.DeviceError, match="GPUs 0 to"):
        ep.Communicator.gpus(cfg, [0, 99])
