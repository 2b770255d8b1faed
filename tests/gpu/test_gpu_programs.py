"""The programs that time GPUs, at small sizes: they check themselves, and their figures are there."""

import json

import pytest
from gpu import programs
from gpu.programs import ROOT

SIZES = ["--hidden", "512", "--experts", "64", "--top-k", "4", "--tokens", "24,300"]


def run(tmp_path, *command):
    from max.driver import accelerator_count

    if accelerator_count() < 2:
        pytest.skip(f"needs 2 GPUs, here are {accelerator_count()}")
    path = tmp_path / "figures.json"
    programs.run(*command, "--ranks", "2", *SIZES, "--output", path, timeout=500)
    return json.loads(path.read_text())["cases"]


def test_bench(tmp_path):
    cases = run(tmp_path, "-m", "ep_mojo", "bench", "--backend", "gpus")
    assert len(cases) == 4
    for case in cases:
        assert case["wrong"] == ""
        assert case["link_us"] > 0
        assert 0 < case["median_us"] <= case["p99_us"]
        assert case["host_paced_us"] > 0


def test_timeline(tmp_path):
    cases = run(tmp_path, ROOT / "python/benchmarks/timeline.py", "--rounds", "5")
    assert len(cases) == 4
    for case in cases:
        marks = case["marks"]
        last = [
            marks[name]["last"] for name in ("begun", "opened", "header seen", "rows mapped", "rows written", "ended")
        ]
        assert last == sorted(last)
        assert marks["ended"]["last"] <= marks["combine begun"]["first"]
        assert marks["combine sum ready"]["first"] <= marks["combine token written"]["last"]
        assert marks["combine ended"]["last"] < 1e5
