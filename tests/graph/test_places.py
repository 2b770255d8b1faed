"""Graph values that are not where their rank is: named while the graph is built. The GPUs here are only planned."""

import pytest
from graph.building import CFG, IDS, ROWS, WEIGHTS, Building, x

import ep_mojo as ep
from ep_mojo.handle import handle_types


def on_gpus(place, name, function="dispatch"):
    """Ranks on GPUs that are not there; `name` is somewhere else."""
    from max.graph import DeviceRef

    building = Building(CFG, ep.Communicator.planned(CFG))
    elsewhere = [DeviceRef.CPU() if place == "host" else DeviceRef.GPU(0)]
    kinds = {
        "x": x(),
        "ids": IDS,
        "weights": WEIGHTS,
        "num_tokens": ("int32", [1]),
        "y": x(shape=(ROWS, 8)),
        "bias0": x(),
    }
    kinds |= {f"h{i}": (t.dtype.name, [int(d) for d in t.shape]) for i, t in enumerate(handle_types(CFG))}
    types = [(*kind, *(elsewhere if name == key else [])) for key, kind in kinds.items()]
    values = dict(zip(kinds, building.values(*types), strict=True))
    with building.graph:
        if function == "dispatch":
            ep.dispatch(building.ranks, values["x"], values["ids"], values["weights"], num_tokens=values["num_tokens"])
        flat = [values[f"h{i}"] for i in range(len(kinds) - 6)]
        handles = [ep.Handle.from_flat(CFG, [*(v[r] for v in flat), values["ids"][r]]) for r in range(2)]
        ep.combine(building.ranks, values["y"], handles, bias0=values["bias0"])


PLACES = {
    "x-host": ("host", "x", "dispatch", r"xs = .*cpu.*rank 0.*Allowed: .*gpu:0.*xs\[0\]\.to"),
    "x-of-rank-1-on-gpu-0": ("gpu", "x", "dispatch", r"xs = .*gpu:0.*rank 1.*Allowed: .*gpu:1"),
    "ids": ("host", "ids", "dispatch", "topk_ids = "),
    "weights": ("gpu", "weights", "dispatch", "weights = .*rank 1"),
    "num-tokens": ("host", "num_tokens", "dispatch", "num_tokens = "),
    "y": ("gpu", "y", "combine", "ys = .*rank 1"),
    "src-info": ("host", "h5", "combine", r"handles\.src_info = "),
    "row-map": ("host", "h9", "combine", r"handles\.row_map = "),
    "bias": ("gpu", "bias0", "combine", "bias0 = .*rank 1"),
}


@pytest.mark.parametrize(("place", "name", "function", "text"), PLACES.values(), ids=PLACES)
def test_values_on_another_device(place, name, function, text):
    with pytest.raises(ep.DeviceError, match=f"(?s){text}") as caught:
        on_gpus(place, name, function)
    assert "Remedy: " in str(caught.value)
