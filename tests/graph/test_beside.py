"""Work beside the ranks' ops, as the graph has it; the GPUs here are only planned."""

import pytest
from graph.building import CFG, Building, x

import ep_mojo as ep

SEQUENCE, HEAD_START = "mo.sequence", "ep_mojo_head_start"


def text_of(building) -> str:
    """The graph in MLIR."""
    return str(building.graph._mlir_op)


def build(comm=None, take=slice(None), **options):
    """A graph that doubles x beside nothing; `take`: the ranks whose x is passed."""
    building = Building(CFG, comm)
    (xs,) = building.values(x())
    with building.graph:
        types = [v.type for v in xs]
        found = ep.beside(building.ranks, xs[take], lambda *vs: [v + v for v in vs], result_types=types, **options)
        building.graph.output(*found)
    return text_of(building)


def test_gpus_have_a_second_queue_that_begins_later():
    text = build(ep.Communicator.planned(CFG))
    assert text.count(SEQUENCE) == 1
    assert text.count(HEAD_START) == 2  # one a device
    assert text.index(SEQUENCE) < text.index(HEAD_START) < text.index("mo.add")
    assert "microseconds = 20" in text


def test_one_device_is_paused_once():
    assert build(ep.Communicator.planned(CFG, virtual=True), head_start_us=7).count(HEAD_START) == 1


def test_no_head_start():
    text = build(ep.Communicator.planned(CFG), head_start_us=0)
    assert SEQUENCE in text
    assert HEAD_START not in text


def test_the_host_has_one_queue():
    text = build()
    assert "mo.add" in text
    assert SEQUENCE not in text


WRONG = {
    "negative": ({"head_start_us": -1}, ep.ConfigError, "head_start_us = -1.*0 to 10000"),
    "a second": ({"head_start_us": 1_000_000}, ep.ConfigError, "head_start_us = 1000000"),
    "one rank only": ({"take": slice(1)}, ep.DeviceError, "inputs = .*none on .*gpu:1.*each rank's device"),
}


@pytest.mark.parametrize(("options", "error", "text"), WRONG.values(), ids=WRONG)
def test_bad_arguments(options, error, text):
    with pytest.raises(error, match=f"(?s){text}"):
        build(ep.Communicator.planned(CFG), **options)
