"""Arguments of the wrong kind while a graph is built: named errors on every communicator, not Python's own."""

import pytest
from graph.building import CFG, IDS, ROWS, WEIGHTS, Building, x

import ep_mojo as ep

FP8 = CFG.replace(hidden_size=128, dispatch_format=ep.BlockwiseFP8())
MAKE = {"cpu": ep.Communicator.cpu, "gpus": ep.Communicator.planned}


@pytest.fixture(params=MAKE)
def comm(request):
    with MAKE[request.param](CFG) as made:
        yield made


def building_of(comm):
    """A graph in the making and x, ids and weights of each rank."""
    building = Building(comm.cfg, comm)
    return building, *building.values(x(), IDS, WEIGHTS)


DISPATCH = {
    "num-tokens-ints": ({"num_tokens": [3] * 2}, ep.DTypeError, r"num_tokens\[0\] = 3.*tensor of the graph"),
    "num-tokens-int": ({"num_tokens": 3}, ep.DTypeError, "num_tokens = 3.*a list of 2: one for each rank"),
    "xs-no-list": ({"xs": "first"}, ep.DTypeError, "xs = 'TensorValue'.*a list of 2"),
    "xs-none": ({"xs": None}, ep.DTypeError, "xs = None.*a list of 2"),
    "ids-nones": ({"topk_ids": [None] * 2}, ep.DTypeError, r"topk_ids\[0\] = None.*tensor of the graph"),
    "weights-a-dict": ({"weights": {}}, ep.DTypeError, "weights = 'dict'"),
    "ranks-a-communicator": ({"ranks": "comm"}, ep.DTypeError, r"ranks = '\w+Communicator'.*comm\.bind"),
    "ranks-numbers": ({"ranks": [0, 1]}, ep.DTypeError, r"ranks = \[0, 1\].*comm\.bind"),
}


@pytest.mark.parametrize("call", [ep.dispatch, ep.dispatch_async], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("changes", "error", "text"), DISPATCH.values(), ids=DISPATCH)
def test_dispatch(comm, call, changes, error, text):
    building, xs, ids, weights = building_of(comm)
    given = {"ranks": building.ranks, "xs": xs, "topk_ids": ids, "weights": weights} | changes
    given["xs"] = xs[0] if given["xs"] == "first" else given["xs"]
    given["ranks"] = comm if given["ranks"] == "comm" else given["ranks"]
    with building.graph, pytest.raises(error, match=f"(?s){text}.*Remedy: "):
        call(given.pop("ranks"), given.pop("xs"), given.pop("topk_ids"), **given)


def test_halves_in_each_others_place(comm):
    building, xs, ids, weights = building_of(comm)
    with building.graph:
        pending = ep.dispatch_async(building.ranks, xs, ids, weights)
        handles = ep.dispatch_wait(building.ranks, pending)
        with pytest.raises(ep.OrderError, match="pending = 'Handle'.*dispatch_async"):
            ep.dispatch_wait(building.ranks, handles)
        with pytest.raises(ep.OrderError, match="pending = 'PendingDispatch'.*combine_async"):
            ep.combine_wait(building.ranks, pending)
        with pytest.raises(ep.DTypeError, match=r"ys\[1\] = 2.0.*tensor of the graph"):
            ep.combine(building.ranks, [handles[0].tokens, 2.0], handles)
        with pytest.raises(ep.DTypeError, match="handles = 'Handle'.*a list of 2"):
            ep.combine(building.ranks, [h.tokens for h in handles], handles[0])
        with pytest.raises(ep.DTypeError, match=r"ranks = '\w+'.*comm\.bind"):
            ep.combine(comm, [h.tokens for h in handles], handles)


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_quantised_rows_need_their_scales(make):
    """Not "cast ys": the sums would be wrong, and nobody would say so."""
    with make(FP8) as comm:
        building = Building(FP8, comm)
        xs, ids = building.values(x(shape=("T", 128)), IDS)
        with building.graph:
            handles = ep.dispatch(building.ranks, xs, ids)
            with pytest.raises(
                ep.DTypeError, match="ys = .*quantised.*multiply them by h.scales.*cast alone"
            ) as caught:
                ep.combine(building.ranks, [h.tokens for h in handles], handles)
    assert caught.value.allowed == "bfloat16"
    assert "before the call" not in str(caught.value)


def test_rows_of_another_dtype_are_to_be_cast(comm):
    building, xs, ids, _ = building_of(comm)
    with building.graph:
        handles = ep.dispatch(building.ranks, xs, ids)
        rows = [h.tokens.cast(ep_float32()) for h in handles]
        assert [int(d) for d in rows[0].shape] == [ROWS, 8]
        with pytest.raises(ep.DTypeError, match="ys = 'float32'.*cast ys before the call"):
            ep.combine(building.ranks, rows, handles)


def ep_float32():
    from max.dtype import DType

    return DType.float32


BODIES = {
    "too few": (lambda *vs: vs[:1], ep.ShapeError, "results of body = '1 values'.*2: one for each of result_types"),
    "one alone": (lambda *vs: vs[0], ep.ShapeError, "results of body = '1 values'"),
    "nothing": (lambda *vs: None, ep.ShapeError, "results of body = '1 values'"),
    "numbers": (lambda *vs: [1, 2], ep.DTypeError, r"results of body\[0\] = 1.*tensor of the graph"),
    "dtype": (lambda *vs: [v.cast(ep_float32()) for v in vs], ep.DTypeError, r"another dtype than result_types\[0\]"),
    "shape": (lambda *vs: [vs[0], vs[1][:, :4]], ep.ShapeError, r"another shape than result_types\[1\]"),
}


@pytest.mark.parametrize(("body", "error", "text"), BODIES.values(), ids=BODIES)
def test_beside_takes_what_result_types_say(comm, body, error, text):
    building, xs, *_ = building_of(comm)
    with building.graph, pytest.raises(error, match=f"(?s){text}"):
        ep.beside(building.ranks, xs, body, result_types=[v.type for v in xs])


def test_beside_needs_lists(comm):
    building, xs, *_ = building_of(comm)
    with building.graph:
        for given, types, text in (
            (xs[0], [xs[0].type], "inputs = 'TensorValue'.*a list"),
            ([1, 2], [], r"inputs\[0\] = 1"),
            (xs, xs[0].type, "result_types = 'TensorType'"),
        ):
            with pytest.raises(ep.DTypeError, match=text):
                ep.beside(building.ranks, given, lambda *vs: vs, result_types=types)
        with pytest.raises(ep.DTypeError, match=r"ranks = .*comm\.bind"):
            ep.beside(comm, xs, lambda *vs: vs, result_types=[v.type for v in xs])
