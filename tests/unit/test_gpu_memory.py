"""Formulas and verdicts of `gpu_memory.py`, which need no GPU."""

import importlib
import math
from pathlib import Path

import numpy as np
import pytest

from ep_mojo.comm import windows
from ep_mojo.config import EPConfig
from ep_mojo.handle import HANDLE_TENSORS, handle_shapes
from ep_mojo.programs import measures
from ep_mojo.programs.gpu_round import Round

TOOLS = Path(__file__).parents[2] / "python" / "tools"
KIB = 1 << 10


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("gpu_memory")


@pytest.mark.parametrize("ranks", [1, 4, 8])
def test_formula_of_a_round(ranks):
    cfg = Round(ranks, 4096, "bf16", True, 7168, 256, 8).config()
    found = measures.round_memory(cfg)
    assert 0 <= sum(windows.part_bytes(cfg).values()) - found["windows"] < 2048 * KIB  # counters
    assert found["inputs"] == 4096 * (7168 * 2 + 8 * 4 + 8 * 4)
    rows, pairs = ranks * 4096 * 8, ranks * 4096 * 8
    small = 4 * (256 // ranks + 1) + 4 * (256 // ranks) * 2 + 4 * ranks
    assert found["outputs"] == rows * (14336 + 8) + pairs * 8 + small + 4096 * 14336


@pytest.mark.parametrize(("ranks", "tokens"), [(2, 512), (8, 512), (8, 16)])
def test_formula_of_the_gather(ranks, tokens):
    """Against the config of `Gathering`; 8 times 16 tokens are few."""
    hidden, top_k = 7168, 8
    cfg = EPConfig(
        hidden_size=hidden,
        top_k=top_k,
        n_experts=2048,
        max_tokens_per_rank=tokens,
        n_ranks=ranks,
        output_layout="gathered",
        num_buffers=2,
        tokens_per_signal=1,
    )
    found = measures.gather_memory(ranks, tokens, hidden, top_k)
    assert 0 <= windows.block_bytes(cfg) - found["windows"] < 128 * KIB  # counters, credits, headers, and pages
    given = {"tokens": 2, "local_ids": 4, "local_weights": 4, "src_info": 4}
    shapes = dict(zip(HANDLE_TENSORS, handle_shapes(cfg), strict=True))
    rows = sum(size * math.prod(shapes[name][1]) for name, size in given.items())
    assert found["buffers"] == rows + ranks * tokens * hidden * 2
    assert found["step"] == tokens * (14336 + 8 * 8 + 8 * 4) + ranks * tokens * 8 * 8 + tokens * 14336


def test_verdicts(tool, monkeypatch, tmp_path, capsys):
    pytest.importorskip("max.driver")
    formula = {"windows": 3 * tool.MIB, "inputs": tool.MIB}
    before, made = np.array([500, 600]) * tool.MIB, np.array([505, 605]) * tool.MIB

    def rows(peak):
        return tool.rows_of("round", 0, formula, before, made, before + np.array(peak) * tool.MIB)

    assert [r["over"] for r in rows([68, 69])] == [False, True]
    monkeypatch.setattr("max.driver.accelerator_count", lambda: 2)
    calls = []
    monkeypatch.setattr(tool, "in_processes", lambda measure, of, pool: calls.append((of, pool)) or rows([9, peak]))
    for peak, status, word in ((10, 0, "within"), (70, 1, "OVER")):
        output = tmp_path / f"{peak}.json"
        assert tool.main(["--parts", "round", "--output", str(output)]) == status
        lines = capsys.readouterr().out.splitlines()
        assert lines[-2].split() == ["round,", "GPU", "1", "600.0", "5.0", f"{peak}.0", "4.0", "68.0", word]
        assert lines[-1] == "round: windows 3.0, inputs 1.0"
        assert f'"peak": {peak * tool.MIB}' in output.read_text()
    ((case, rounds),), pool = calls[0]
    assert (case.ranks, case.tokens, rounds) == (2, 4096, 5)
    assert int(pool["SIZE"]) == sum(measures.round_memory(case.config()).values()) + tool.POOL_SLACK


def test_too_little_memory_is_a_verdict(tool, monkeypatch):
    class Gpus:
        def __init__(self, ordinals):
            self.count = len(ordinals)

        def used(self):
            return np.full(self.count, 100)

    def no_memory(*_):
        raise ValueError("Memory manager cannot satisfy allocation (chunk)")

    monkeypatch.setattr(tool, "Gpus", Gpus)
    monkeypatch.setattr("ep_mojo.Communicator.gpus", no_memory)
    found = tool.measure_round(Round(2, 16, "bf16", True, 512, 8, 2), 1)
    assert [(r["gpu"], r["over"]) for r in found] == [(0, True), (1, True)]
    assert "Memory manager cannot satisfy" in tool.text_of(found)


def test_no_driver(tool, monkeypatch):
    def missing(name):
        raise OSError(f"{name}: no such file")

    monkeypatch.setattr("ctypes.CDLL", missing)
    with pytest.raises(tool.DeviceError, match=r"libcuda.so.1: no such file. Remedy: run on NVIDIA GPUs"):
        tool.Gpus([0])
