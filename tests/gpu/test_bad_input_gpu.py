"""Bad input on one GPU, virtual ranks: a named error or the documented skip, and nothing written where nothing belongs.

The host's tables, run on a GPU. All windows here are longer than they should be; what is behind their end stays zero.
After every failure `comm.reset()` brings a round that is right.
"""

import copy

import numpy as np
import pytest
from gpu.guards import assert_guards, longer_windows, set_word
from graph import stages as stages_module
from graph import test_bad_input as host
from graph.test_aborted_runs import (
    BAD,
    bad_arguments,
    expect_no_refusal_before_any_has_begun,
    expect_refusal_until_reset,
    expect_right_round,
    whole_round,
)
from graph.test_aborted_runs import CFG as ABORTED
from graph.test_bad_input import (  # noqa: F401
    memory_digest,
    test_a_graph_of_a_config_with_the_same_communicator_inputs,
    test_a_graph_of_another_config,
    test_after_destroy,
    test_not_a_config,
    test_not_a_model,
    test_ops_refuse_another_reduce_mode,
    test_sizes_that_only_the_op_sees,
)
from graph.test_ops_alone import ONE, add_fused, test_fused_ops_refuse_virtual_ranks  # noqa: F401
from graph.virtual import Play, Round, random_round
from unit.cases import make_case

import ep_mojo as ep
from ep_mojo import layout as offsets
from ep_mojo.dtypes import to_buffer

CFG = host.CFG


@pytest.fixture(scope="module", autouse=True)
def _guarded():
    with longer_windows():
        yield


@pytest.fixture(scope="module")
def make():
    """What the host's tests make communicators with here."""
    return ep.Communicator.one_gpu


@pytest.fixture(scope="module")
def compiled(make):
    """One dispatch over two ranks, and its communicator."""
    with make(CFG) as comm:
        (graph,) = host.add_dispatch(None, comm)[1].values()
        yield comm, comm.compile(graph)


@pytest.fixture(scope="module")
def stages():
    """The stages that this file needs."""
    sizes = [stages_module.Send(8), stages_module.Send(8, ids="int64"), stages_module.Receive(8)]
    for reduce in stages_module.REDUCE_MODES:
        sizes += [stages_module.SendBack(8, "expert", reduce), stages_module.ReceiveBack(8, "expert", reduce)]
    sizes += [stages_module.ReceiveBack(8, ids="int64"), stages_module.ReceiveBack(8, reduce="source", ids="int64")]
    return stages_module.compile_all(sizes, gpu=True)


@pytest.fixture(scope="module")
def fused(make):
    """A fused dispatch and a fused combine, compiled for a rank that has a GPU to itself."""
    with make(ONE) as comm:
        graphs = add_fused(None, comm)[1]
        yield {name: (comm, model) for name, model in zip(graphs, comm.compile_all([*graphs.values()]), strict=True)}


ARGUMENTS = {name: row for name, row in host.RUNNING.items() if name != "x-elsewhere"}


@pytest.mark.parametrize(("args", "error", "text"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_that_do_not_fit(compiled, args, error, text):
    host.test_running_a_graph(compiled, args, error, text)
    assert_guards(compiled[0])


def test_a_buffer_of_the_host(compiled):
    comm, model = compiled
    before = memory_digest(comm)
    args = [*host.FULL]
    args[1] = to_buffer(args[1], "bfloat16")
    with pytest.raises(ep.DeviceError, match=r"input 0 of rank 1.*'host'.*Allowed: gpu:0.*NumPy array"):
        comm.execute(model, *args)
    assert memory_digest(comm) == before
    args[1] = args[1].to(comm.devices[1])
    assert [c.tolist() for c in comm.execute(model, *args)] == [[16, 0], [0, 0]]


HEADS = {
    "magic": (offsets.HEAD_MAGIC, 0, ep.CorruptHeadError, r"atomic_counters\.magic = 0"),
    "version": (offsets.HEAD_LAYOUT_VERSION, 99, ep.CorruptHeadError, "layout_version = 99"),
    "rank": (offsets.HEAD_MY_RANK, 8, ep.CorruptHeadError, "my_rank = 8"),
    "rank-negative": (offsets.HEAD_MY_RANK, -7, ep.CorruptHeadError, "my_rank = -7"),
    "hash": (offsets.HEAD_CONFIG_HASH, 12345, ep.ConfigMismatchError, "config_hash = "),
}


@pytest.mark.parametrize(("index", "value", "error", "text"), HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("action", ["send", "receive", "send_back", "receive_back"])
def test_a_kernel_leaves_a_wrong_head_alone(stages, action, index, value, error, text):
    """It writes nothing but "no rows" into its outputs; the host names what is wrong."""
    rnd = random_round(CFG, 0, ragged=False)
    with stages_module.Engine(stages, CFG) as engine:
        play = Play(engine, [rnd])
        play.handles[0], play.shared[0] = rnd.handles, [np.zeros((0, 0), np.uint16)] * 2
        memory = engine.comm.memories[0]
        kept = set_word(memory, index, value)
        before = memory_digest(engine.comm)
        if action == "receive":
            handle = engine.receive(0)
            assert not handle.counts.any()
            assert not handle.row_offsets.any()
            assert (handle.row_map == -1).all()
        else:
            play.step(action, 0)
        assert memory_digest(engine.comm) == before
        if action == "receive_back":
            assert not play.outputs[0][0].any()
        for attempt in (engine.comm.check, engine.comm.reset):
            with pytest.raises(error, match=f"(?s){text}.*Remedy: "):
                attempt()
        set_word(memory, index, kept)
        engine.comm.reset()
        assert not host.play_whole(engine, rnd)
        engine.comm.check()
        assert_guards(engine.comm)


def test_a_kernel_leaves_the_settings_of_another_config_alone(stages):
    """Tables and counters of one communicator, settings of another one: no launch counts, nothing moves."""
    rnd = random_round(CFG, 0, ragged=False)
    with (
        stages_module.Engine(stages, CFG) as engine,
        stages_module.Engine(stages, CFG.replace(tokens_per_signal=CFG.tokens_per_signal + 1)) as other,
    ):
        own = engine.comm.inputs()[0]
        engine.comm.inputs()[0] = other.comm.inputs()[0]
        before = memory_digest(engine.comm)
        engine.send(0, rnd.case.xs[0], rnd.case.topk_ids[0])
        assert not engine.receive(0).counts.any()
        assert memory_digest(engine.comm) == before
        engine.comm.inputs()[0] = own
        assert not host.play_whole(engine, rnd)


@pytest.mark.parametrize(("field", "at", "value", "text"), host.HANDLES.values(), ids=host.HANDLES)
@pytest.mark.parametrize("reduce", ["expert", "source"])
def test_a_handle_that_names_what_is_not_there(stages, reduce, field, at, value, text):
    """No such row is read; other rows may have left, into slots of their own."""
    cfg = CFG.replace(reduce=reduce)
    rnd = random_round(cfg, 0, reduce=reduce, ragged=False)
    with stages_module.Engine(stages, cfg) as engine:
        handle, rows = copy.copy(rnd.handles[0]), len(rnd.ys[0])
        changed = getattr(handle, field).copy()
        changed[at] = value(rows)
        setattr(handle, field, changed)
        before = memory_digest(engine.comm, ["dispatch_recv", "dispatch_count"])
        engine.send_back(0, rnd.ys[0], handle, reduce)
        with pytest.raises(ep.ShapeError, match=f"(?s){text.format(rows=rows, last=rows - 1)}.*handle of the dispatch"):
            engine.comm.check()
        assert memory_digest(engine.comm, ["dispatch_recv", "dispatch_count"]) == before
        assert_guards(engine.comm)
        engine.comm.reset()
        assert not host.play_whole(engine, rnd)


EXTREMES = [-1, -2, 4, 5, 100, 2**15, 2**16 - 1, 2**16, 2**31 - 1, -(2**31), 2**32, 2**32 + 1, -(2**32), 2**63 - 1]


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_ids_that_are_no_expert(stages, dtype):
    """Skipped, in dispatch and in combine; what is valid again without its upper half too."""
    fits = [e for e in EXTREMES if dtype == "int64" or -(2**31) <= e < 2**31]
    with stages_module.Engine(stages, CFG) as engine:
        for seed in range(4):
            case = make_case(CFG, seed, "uniform", ragged=False)
            rng = np.random.default_rng(seed)
            case.topk_ids = [ids.astype(dtype) for ids in case.topk_ids]
            for ids in case.topk_ids:
                chosen = rng.random(ids.shape) < (1.0 if seed == 3 else 0.5)
                ids[chosen] = rng.choice(np.array(fits, dtype), ids.shape)[chosen]
            assert not host.play_whole(engine, Round(case).solve())
        engine.comm.check()
        assert_guards(engine.comm)


@pytest.fixture(scope="module", params=["rank", "expert"])
def aborted(request):
    with ep.Communicator.one_gpu(ABORTED.replace(slots=request.param)) as comm:
        yield comm, comm.compile(whole_round(comm, None, f"aborted_{request.param}"))


@pytest.mark.parametrize("what", BAD)
def test_an_op_that_raises_in_the_middle_of_a_run(aborted, what):
    comm, model = aborted
    expect_right_round(comm, model, 7)
    with pytest.raises(ep.ShapeError, match=BAD[what]):
        comm.execute(model, *bad_arguments(what, 1))
    expect_refusal_until_reset(comm, model)
    assert_guards(comm)


def test_an_op_that_raises_before_any_has_begun(aborted):
    expect_no_refusal_before_any_has_begun(*aborted)
