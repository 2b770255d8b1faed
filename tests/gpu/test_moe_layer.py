"""The example of a whole MoE layer, on as many GPUs as there are: it checks itself, here at a small size."""

import json

import pytest
from gpu import programs
from gpu.programs import ROOT

SIZES = {"tokens": 96, "hidden": 512, "width": 256, "top-k": 4, "calls": 20}


def test_moe_layer(tmp_path):
    from max.driver import accelerator_count

    R = min(accelerator_count(), 8)
    if R < 2:
        pytest.skip(f"needs 2 GPUs, here are {R}")
    path = tmp_path / "moe_layer.json"
    options = [
        text for name, value in (SIZES | {"ranks": R, "experts": 16 * R}).items() for text in (f"--{name}", value)
    ]
    programs.run(ROOT / "python/examples/moe_layer.py", *options, "--output", path, timeout=1500)
    ways = json.loads(path.read_text())["ways"]
    assert set(ways) == {"batched", "grouped"}
    for way in ways.values():
        assert way["ok"]
        assert way["ids_that_differ"] == way["weights_that_differ"] == way["tensors_that_differ"] == 0
        assert 0 < way["mean_error"] <= way["max_error"] < 2**-6
        assert 0 < way["median_us"] <= way["p99_us"]
