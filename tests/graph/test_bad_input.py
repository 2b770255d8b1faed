"""Bad input: a named error that says what was given, what is allowed and what to do, before anything is written."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
from graph import together
from graph.building import CFG, IDS, ROWS, WEIGHTS, Building, memory_digest, x
from graph.stages import Engine
from graph.virtual import Play, random_round

import ep_mojo as ep
from ep_mojo import layout as offsets
from ep_mojo.graph import PendingDispatch
from ep_mojo.handle import handle_types

FP8 = CFG.replace(hidden_size=128, dispatch_format=ep.BlockwiseFP8())
UE8M0 = CFG.replace(hidden_size=128, dispatch_format=ep.BlockwiseFP8("ue8m0"))
POWER = CFG.replace(hidden_size=128, dispatch_format=ep.BlockwiseFP8("power_of_two"))


# While a graph is built


@dataclass
class Dispatch:
    """ep.dispatch with inputs of these types."""

    x: tuple = ("bfloat16", ["T", 8])
    ids: tuple = IDS
    weights: tuple | None = None
    num_tokens: tuple | None = None
    x_scales: tuple | None = None
    input_scale: tuple | None = None
    cfg: ep.EPConfig = CFG
    drop: str = ""
    n_sms: object = None

    def __call__(self):
        names = ["x", "ids", "weights", "num_tokens", "x_scales", "input_scale"]
        names = [n for n in names if getattr(self, n) is not None]
        building = Building(self.cfg)
        values = dict(zip(names, building.values(*(getattr(self, n) for n in names)), strict=True))
        if self.drop == "ranks":
            building.ranks = []
        elif self.drop:
            values[self.drop] = values[self.drop][:1]
        with building.graph:
            ep.dispatch(building.ranks, values.pop("x"), values.pop("ids"), **values, n_sms=self.n_sms)


@dataclass
class Combine:
    """ep.combine with inputs of these types, on a handle of `of`."""

    y: tuple = ("bfloat16", [ROWS, 8])
    reduce: str | None = None
    weights: tuple | None = None
    bias0: tuple | None = None
    bias1: tuple | None = None
    cfg: ep.EPConfig = CFG
    of: ep.EPConfig | None = None
    handle: str = ""
    drop: str = ""
    n_sms: object = None

    def __call__(self):
        of = self.of or self.cfg
        names = ["y", "weights", "bias0", "bias1"]
        names = [n for n in names if getattr(self, n) is not None]
        building = Building(self.cfg)
        flat = [(t.dtype.name, [int(d) for d in t.shape]) for t in handle_types(of)]
        inputs = building.values(*(getattr(self, n) for n in names), *flat, IDS)
        values = dict(zip(names, inputs[: len(names)], strict=True))
        with building.graph:
            flats = [[v[rank] for v in inputs[len(names) :]] for rank in range(2)]
            if self.handle == "short":
                flats = [f[:-1] for f in flats]
            handles = [ep.Handle.from_flat(of, f) for f in flats]
            if self.handle == "pending":
                handles = [PendingDispatch(f[-1], None, None) for f in flats]
            if self.drop == "handles":
                handles = handles[:1]
            elif self.drop:
                values[self.drop] = values[self.drop][:1]
            options = {"reduce": self.reduce, "n_sms": self.n_sms}
            ep.combine(building.ranks, values.pop("y"), handles, **options, **values)


def bind_too_few():
    building = Building(CFG)
    building.values()
    building.comm.bind(building.graph.inputs[1:])


def bind_another_config():
    building = Building(CFG)
    building.values()
    with ep.Communicator.cpu(CFG.replace(n_ranks=4)) as other:
        other.bind(building.graph.inputs)


RANK = CFG.replace(output_layout="rank")
E8 = ("uint8", ["T", 128])
BUILDING = {
    "x-float32": (Dispatch(x("float32")), ep.DTypeError, "xs = .*float32.*bfloat16.*cast xs"),
    "x-uint8-without-fp8": (Dispatch(x("uint8"), x_scales=WEIGHTS), ep.DTypeError, "xs = .*uint8.*Allowed: bfloat16"),
    "x-hidden": (Dispatch(x(shape=("T", 16))), ep.ShapeError, r"xs = .*16.*\[any, 8\].*reshape xs"),
    "x-vector": (Dispatch(x(shape=(8,)), ids=("int32", [1, 2])), ep.ShapeError, r"xs = \['8'\]"),
    "ids-float": (Dispatch(ids=("float32", ["T", 2])), ep.DTypeError, "topk_ids = .*float32.*int32 or int64"),
    "ids-int16": (Dispatch(ids=("int16", ["T", 2])), ep.DTypeError, "topk_ids = .*int16.*cast topk_ids"),
    "ids-top-k": (Dispatch(ids=("int32", ["T", 3])), ep.ShapeError, r"topk_ids = .*'3'.*2\]"),
    "ids-rows": (Dispatch(x(shape=(4, 8)), ids=("int32", [3, 2])), ep.ShapeError, r"topk_ids = .*\[4, 2\]"),
    "weights-bfloat16": (Dispatch(weights=("bfloat16", ["T", 2])), ep.DTypeError, "weights = .*bfloat16.*float32"),
    "weights-top-k": (Dispatch(weights=("float32", ["T", 1])), ep.ShapeError, "weights = .*'1'"),
    "num-tokens-int64": (Dispatch(num_tokens=("int64", [1])), ep.DTypeError, "num_tokens = .*int64.*int32"),
    "num-tokens-per-rank": (Dispatch(num_tokens=("int32", [2])), ep.ShapeError, r"num_tokens = .*'2'.*\[1\]"),
    "scales-with-bfloat16": (Dispatch(x_scales=WEIGHTS), ep.UnsupportedError, "x_scales = .*leave x_scales out"),
    "encoded-without-scales": (Dispatch(E8, cfg=FP8), ep.ShapeError, r"x_scales = .*\[T, 1\].*pass x_scales"),
    "encoded-power-of-two": (
        Dispatch(E8, x_scales=("float32", ["T", 1]), cfg=POWER),
        ep.DTypeError,
        "xs = .*uint8.*Allowed: bfloat16",
    ),
    "scales-columns": (Dispatch(E8, x_scales=("float32", ["T", 2]), cfg=FP8), ep.ShapeError, "x_scales = .*'2'"),
    "scales-dtype": (Dispatch(E8, x_scales=("float32", ["T", 1]), cfg=UE8M0), ep.DTypeError, "x_scales = .*int32"),
    "input-scale-bf16": (Dispatch(input_scale=("float32", [1])), ep.UnsupportedError, "input_scale = .*leave"),
    "input-scale-shape": (
        Dispatch(x(shape=("T", 128)), input_scale=("float32", [2]), cfg=FP8),
        ep.ShapeError,
        "input_scale = .*'2'",
    ),
    "one-x-for-two-ranks": (Dispatch(drop="x"), ep.ShapeError, "xs = '1 values'.*2: one for each rank"),
    "one-ids-for-two-ranks": (Dispatch(drop="ids"), ep.ShapeError, "topk_ids = '1 values'"),
    "one-weights": (Dispatch(weights=WEIGHTS, drop="weights"), ep.ShapeError, "weights = '1 values'.*one value a rank"),
    "no-sms": (Dispatch(n_sms=0), ep.ConfigError, "n_sms = 0.*1 to 1024.*None"),
    "sms-float": (Combine(n_sms=16.0), ep.ConfigError, "n_sms = 16.0.*integer"),
    "no-ranks": (Dispatch(drop="ranks"), ep.ShapeError, r"(xs|ranks) = .*"),
    "y-float32": (Combine(("float32", [ROWS, 8])), ep.DTypeError, "ys = .*float32.*bfloat16"),
    "y-rows": (Combine(("bfloat16", [ROWS - 1, 8])), ep.ShapeError, rf"ys = .*{ROWS - 1}.*\[{ROWS}, 8\]"),
    "y-hidden": (Combine(("bfloat16", [ROWS, 16])), ep.ShapeError, "ys = .*16"),
    "one-y": (Combine(drop="y"), ep.ShapeError, "ys = '1 values'"),
    "one-handle": (Combine(drop="handles"), ep.ShapeError, "handles = '1 values'"),
    "pending-as-handle": (Combine(handle="pending"), ep.OrderError, "handles = 'PendingDispatch'.*dispatch first"),
    "handle-of-another-config": (Combine(of=CFG.replace(num_buffers=3)), ep.ConfigError, "handles = .*num_buffers=3"),
    "handle-short": (Combine(handle="short"), ep.ShapeError, r"values = 11.*12.*flat\(\)"),
    "reduce-unknown": (Combine(reduce="sum"), ep.ConfigError, 'reduce = \'sum\'.*"expert" or "source".*EPConfig'),
    "reduce-not-the-configs": (
        Combine(reduce="source", cfg=CFG.replace(reduce="expert")),
        ep.ConfigError,
        "reduce = 'source'.*'expert'.*EPConfig",
    ),
    "weights-reduce-expert": (
        Combine(weights=WEIGHTS),
        ep.UnsupportedError,
        "weights = .*give the weights to dispatch",
    ),
    "weights-layout-rank": (
        Combine(("bfloat16", [RANK.rows_capacity, 8]), "source", WEIGHTS, cfg=RANK),
        ep.UnsupportedError,
        "weights = .*'rank'",
    ),
    "combine-weights-shape": (
        Combine(reduce="source", weights=("float32", ["T", 9])),
        ep.ShapeError,
        "weights = .*'9'",
    ),
    "one-bias": (Combine(bias0=x(), drop="bias0"), ep.ShapeError, "bias0 = '1 values'"),
    "bias-float16": (Combine(bias0=x("float16")), ep.DTypeError, "bias0 = .*float16.*bfloat16 or float32"),
    "bias-hidden": (Combine(bias1=x(shape=("T", 4))), ep.ShapeError, "bias1 = .*'4'"),
    "bias-mixed": (Combine(bias0=x(), bias1=x("float32")), ep.DTypeError, "bias1 = .*float32.*as bias0.*cast"),
    "bind-too-few": (bind_too_few, ep.ShapeError, "values = .*comm.num_inputs"),
    "bind-another-config": (bind_another_config, ep.ShapeError, r"values = .*comm.input_types\(\)"),
}


@pytest.mark.parametrize(("attempt", "error", "text"), BUILDING.values(), ids=BUILDING)
def test_building_a_graph(attempt, error, text):
    with pytest.raises(error, match=f"(?s){text}") as caught:
        attempt()
    assert caught.value.field
    assert caught.value.remedy
    assert "Remedy: " in str(caught.value)


# When a graph runs


@pytest.fixture(scope="module")
def make():
    """What makes the communicators: tests/gpu runs much of this file with another one."""
    return ep.Communicator.cpu


def add_dispatch(module, comm=None):
    """One dispatch over two ranks."""
    building = Building(CFG, comm, module)
    xs, ids, weights, n = building.values(x(), IDS, WEIGHTS, ("int32", [1]))
    with building.graph:
        handles = ep.dispatch(building.ranks, xs, ids, weights, num_tokens=n)
        building.graph.output(*(h.counts for h in handles))
    return building.comm, {"bad": building.graph}


together.needed(add_dispatch)


@pytest.fixture
def compiled(together):
    """The dispatch and its communicator."""
    return together["bad"]


def good():
    """Arguments by name: two ranks of four tokens."""
    return {
        "x": [np.zeros((4, 8), np.uint16)] * 2,
        "ids": [np.zeros((4, 2), np.int32)] * 2,
        "weights": [np.ones((4, 2), np.float32)] * 2,
        "num_tokens": [np.array([4], np.int32)] * 2,
    }


def with_rank1(name, value):
    args = good()
    args[name] = [args[name][0], value]
    return [v for values in args.values() for v in values]


def elsewhere(a):
    """Stands for a buffer on a GPU."""
    device = SimpleNamespace(label="gpu", id=0)
    return SimpleNamespace(_data_ptr=lambda: 0, device=device, dtype=SimpleNamespace(name="bfloat16"), shape=a.shape)


FULL = [v for values in good().values() for v in values]
RUNNING = {
    "too-few": (FULL[:-1], ep.ShapeError, r"len\(args\) = 7.*Allowed: 8"),
    "too-many": ([*FULL, FULL[0]], ep.ShapeError, r"len\(args\) = 9"),
    "x-float32": (with_rank1("x", np.zeros((4, 8), np.float32)), ep.DTypeError, "rank 1.*'float32'.*bfloat16"),
    "x-float64": (with_rank1("x", np.zeros((4, 8))), ep.DTypeError, "rank 1.*'float64'"),
    "x-list": (with_rank1("x", [[0] * 8] * 4), ep.DTypeError, r"'list'.*numpy\.asarray"),
    "x-none": (with_rank1("x", None), ep.DTypeError, "'NoneType'"),
    "x-hidden": (with_rank1("x", np.zeros((4, 9), np.uint16)), ep.ShapeError, "axis 1 has 9 elements, not 8"),
    "x-flat": (with_rank1("x", np.zeros(32, np.uint16)), ep.ShapeError, r"\[32\].*reshape"),
    "x-elsewhere": (with_rank1("x", elsewhere(np.zeros((4, 8)))), ep.DeviceError, r"'gpu:0'.*host.*x\.to\(CPU\(\)\)"),
    "x-rows": (with_rank1("x", np.zeros((3, 8), np.uint16)), ep.ShapeError, "T = 4|T = 3"),
    "ids-int64": (with_rank1("ids", np.zeros((4, 2), np.int64)), ep.DTypeError, "'int64'.*int32"),
    "ids-top-k": (with_rank1("ids", np.zeros((4, 3), np.int32)), ep.ShapeError, "axis 1 has 3 elements, not 2"),
    "weights-rows": (with_rank1("weights", np.ones((5, 2), np.float32)), ep.ShapeError, "axis 0 has 5"),
    "weights-dtype": (with_rank1("weights", np.ones((4, 2), np.float64)), ep.DTypeError, "'float64'.*float32"),
    "num-tokens-scalar": (with_rank1("num_tokens", np.int32(4)), ep.DTypeError, "'int32'.*asarray"),
    "num-tokens-two": (with_rank1("num_tokens", np.array([4, 4], np.int32)), ep.ShapeError, "axis 0 has 2"),
}


@pytest.mark.parametrize(("args", "error", "text"), RUNNING.values(), ids=RUNNING)
def test_running_a_graph(compiled, args, error, text):
    comm, model = compiled
    before = memory_digest(comm)
    with pytest.raises(error, match=f"(?s){text}") as caught:
        comm.execute(model, *args)
    assert caught.value.field
    assert "Remedy: " in str(caught.value)
    assert memory_digest(comm) == before
    assert_works(comm, model)


def assert_works(comm, model):
    counts = comm.execute(model, *FULL)
    assert [c.tolist() for c in counts] == [[16, 0], [0, 0]]


TOO_MANY = {"x": np.zeros((6, 8), np.uint16), "ids": np.zeros((6, 2), np.int32), "weights": np.ones((6, 2), np.float32)}
SIZES = {
    "tokens": (TOO_MANY, "rows of x = 6: rank 0, dispatch_async.*max_tokens_per_rank"),
    "num-tokens-over": ({"num_tokens": np.array([5], np.int32)}, "num_tokens = 5: rank 0.*0 to 4"),
    "num-tokens-below": ({"num_tokens": np.array([-1], np.int32)}, "num_tokens = -1: rank 0.*0 to 4"),
    "num-tokens-huge": ({"num_tokens": np.array([2**31 - 1], np.int32)}, "num_tokens = 2147483647"),
}


@pytest.mark.parametrize(("changes", "text"), SIZES.values(), ids=SIZES)
def test_sizes_that_only_the_op_sees(compiled, changes, text):
    """No payload moves; the failure goes on record, and the peers give zero rows."""
    comm, model = compiled
    args = good()
    args |= {name: [value] * 2 for name, value in changes.items()}
    before = memory_digest(comm, ["dispatch_recv", "combine_recv", "combine_count"])
    with pytest.raises(ep.ShapeError, match=f"(?s){text}.*reset"):
        comm.execute(model, *(v for values in args.values() for v in values))
    assert memory_digest(comm, ["dispatch_recv", "combine_recv", "combine_count"]) == before
    counts = comm.execute(model, *FULL, check=False)  # sticky
    assert not any(c.any() for c in counts)
    comm.reset()
    assert_works(comm, model)


HEAD = {
    "magic": (offsets.HEAD_MAGIC, 0, ep.CorruptHeadError, r"atomic_counters\.magic = 0"),
    "version": (offsets.HEAD_LAYOUT_VERSION, 99, ep.CorruptHeadError, "layout_version = 99"),
    "rank": (offsets.HEAD_MY_RANK, 1, ep.CorruptHeadError, "my_rank = 1"),
    "rank-out-of-range": (offsets.HEAD_MY_RANK, -7, ep.CorruptHeadError, "my_rank = -7"),
    "n-ranks": (offsets.HEAD_N_RANKS, 3, ep.CorruptHeadError, "n_ranks = 3"),
    "hash": (offsets.HEAD_CONFIG_HASH, 12345, ep.ConfigMismatchError, "config_hash = "),
}


@pytest.mark.parametrize(("index", "value", "error", "text"), HEAD.values(), ids=HEAD)
def test_corrupt_head(compiled, index, value, error, text):
    comm, model = compiled
    head = comm.memories[0].counters
    kept = int(head[index])
    try:
        head[index] = value
        before = memory_digest(comm)
        for attempt in (lambda: comm.execute(model, *FULL), comm.check, comm.reset):
            with pytest.raises(error, match=f"(?s){text}.*Remedy: "):
                attempt()
        assert memory_digest(comm) == before
    finally:
        head[index] = kept
    assert_works(comm, model)


IN_OPS = {
    "magic": (offsets.HEAD_MAGIC, 0, ep.CorruptHeadError, "magic 0 .*make a new communicator"),
    "version": (offsets.HEAD_LAYOUT_VERSION, 99, ep.CorruptHeadError, "version 99"),
    "rank": (offsets.HEAD_MY_RANK, 8, ep.CorruptHeadError, "rank 8"),
    "hash": (offsets.HEAD_CONFIG_HASH, 12345, ep.ConfigMismatchError, "another config"),
}


@pytest.mark.parametrize(("index", "value", "error", "text"), IN_OPS.values(), ids=IN_OPS)
def test_ops_refuse_a_corrupt_head_themselves(stages, index, value, error, text):
    """Also where nobody called `comm.check` first."""
    rnd = random_round(CFG, 0, ragged=False)
    with Engine(stages, CFG) as engine:
        for action in ("send", "receive", "send_back", "receive_back"):
            play = Play(engine, [rnd])
            play.handles[0] = rnd.handles
            play.shared[0] = [np.zeros((0, 0), np.uint16)] * 2
            head = engine.comm.memories[0].counters
            kept = int(head[index])
            head[index] = value
            before = memory_digest(engine.comm)
            with pytest.raises(error, match=text):
                play.step(action, 0)
            assert memory_digest(engine.comm) == before
            head[index] = kept
        assert not play_whole(engine, rnd)


def play_whole(engine, rnd):
    return Play(engine, [rnd]).run(np.random.default_rng(0))


def test_ops_refuse_the_settings_of_another_config(stages):
    """Tables and counters of one communicator, settings of another one."""
    rnd = random_round(CFG, 0, ragged=False)
    with Engine(stages, CFG) as engine, Engine(stages, CFG.replace(max_tokens_per_rank=500)) as other:
        engine.comm.inputs()[0] = other.comm.inputs()[0]
        before = memory_digest(engine.comm)
        for attempt in (lambda: engine.send(0, rnd.case.xs[0], rnd.case.topk_ids[0]), lambda: engine.receive(0)):
            with pytest.raises(ep.ConfigMismatchError, match="another config"):
                attempt()
        assert memory_digest(engine.comm) == before


def test_ops_refuse_another_reduce_mode(stages):
    """A window for K = 1 rows a token has no room for R = 2 partial sums."""
    cfg = CFG.replace(top_k=1, reduce="source")
    rnd = random_round(cfg, 0, reduce="source", ragged=False)
    with Engine(stages, cfg) as engine:
        handle = rnd.handles[0]
        before = memory_digest(engine.comm)
        with pytest.raises(ep.ShapeError, match="reduce = 2; allowed: 1; make graph and communicator"):
            engine.send_back(0, rnd.ys[0], handle, "expert")
        assert memory_digest(engine.comm) == before
        assert not play_whole(engine, rnd)


HANDLES = {
    "row": ("row_map", (0, 0, 0), lambda rows: rows, "row_map = {rows}.*0 to {last}"),
    "row-huge": ("row_map", (1, -1, -1), lambda rows: 2**31 - 1, "row_map = 2147483647.*0 to {last}"),
    "tokens": ("recv_num_tokens", 1, lambda rows: CFG.max_tokens_per_rank + 1, "recv_num_tokens = .*0 to"),
    "tokens-huge": ("recv_num_tokens", 1, lambda rows: 2**31 - 1, "recv_num_tokens = 2147483647.*0 to"),
    "tokens-negative": ("recv_num_tokens", 0, lambda rows: -1, "recv_num_tokens = -1"),
}


@pytest.mark.parametrize(("field", "at", "value", "text"), HANDLES.values(), ids=HANDLES)
@pytest.mark.parametrize("reduce", ["expert", "source"])
def test_a_handle_that_names_what_is_not_there(stages, reduce, field, at, value, text):
    """Nothing is read or sent; the peers are told; after reset the next round is right."""
    cfg = CFG.replace(reduce=reduce)
    rnd = random_round(cfg, 0, reduce=reduce, ragged=False)
    with Engine(stages, cfg) as engine:
        handle, rows = copy.copy(rnd.handles[0]), len(rnd.ys[0])
        changed = getattr(handle, field).copy()
        changed[at] = value(rows)
        setattr(handle, field, changed)
        before = memory_digest(engine.comm, ["dispatch_recv", "combine_recv", "dispatch_count"])
        with pytest.raises(ep.ShapeError, match=f"(?s){text.format(rows=rows, last=rows - 1)}.*handle of the dispatch"):
            engine.send_back(0, rnd.ys[0], handle, reduce)
            engine.comm.check()
        assert memory_digest(engine.comm, ["dispatch_recv", "combine_recv", "dispatch_count"]) == before
        engine.comm.reset()
        assert not play_whole(engine, rnd)


def test_a_graph_of_another_config(compiled, make):
    _, model = compiled
    with make(CFG.replace(n_ranks=1)) as other:
        before = memory_digest(other)
        with pytest.raises(ep.ShapeError, match=r"its last inputs = .*the same config"):
            other.execute(model, *FULL[::2])
        assert memory_digest(other) == before


@pytest.mark.parametrize(
    "changes", [{"hidden_size": 16}, {"top_k": 1}, {"max_tokens_per_rank": 4}, {"n_experts": 6}], ids=str
)
def test_a_graph_of_a_config_with_the_same_communicator_inputs(compiled, make, changes):
    """The graph's shapes tell nothing, so the ops refuse. As many tokens as Tmax are sent, before the wait refuses."""
    _, model = compiled
    parts = ["combine_recv", "combine_count", *(["dispatch_recv"] if "max_tokens_per_rank" not in changes else [])]
    with make(CFG.replace(**changes)) as other:
        before = memory_digest(other, parts)
        with pytest.raises(ep.ShapeError, match="same config"):
            other.execute(model, *FULL)
        assert memory_digest(other, parts) == before


def test_not_a_model(compiled):
    comm, _ = compiled
    with pytest.raises(ep.DTypeError, match=r"model = 'str'.*comm\.compile"):
        comm.execute("model", *FULL)
    with pytest.raises(ep.DTypeError, match=r"graph = 'str'.*Graph"):
        comm.compile("graph")


def test_after_destroy(compiled, make):
    _, model = compiled
    comm = make(CFG)
    comm.destroy()
    for attempt in (lambda: comm.execute(model, *FULL), comm.check, comm.reset, comm.inputs):
        with pytest.raises(ep.OrderError, match=r"destroyed.*make a new communicator"):
            attempt()
    comm.destroy()


def test_not_a_config(make):
    with pytest.raises(ep.ConfigError, match="cfg = 'dict'.*EPConfig"):
        make({"hidden_size": 8})
