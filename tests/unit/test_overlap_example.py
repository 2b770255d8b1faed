"""The overlap example without a GPU: which graphs it makes, that it notices a wrong result, table and picture."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ep_mojo.dtypes import bfloat16_bits_to_float32, float32_to_bfloat16_bits
from ep_mojo.programs.gpu_round import draw

PATH = Path(__file__).parents[2] / "python" / "examples" / "overlap_shared_expert.py"
SIZES = {"ranks": 2, "tokens": 24, "hidden": 64, "intermediate": 32, "experts": 4, "top_k": 2}
OPTIONS = {"sms": "8,0", "fused_sms": "32", "timeline_sms": 8, "gpu": 1, "head_start_us": 20}


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("overlap_shared_expert", PATH)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


class Machine:
    """What the GPUs would give, in NumPy; `spoil` names a layer whose replays are wrong in one element."""

    def __init__(self, example, spoil=""):
        self.opts, self.R, self.spoil = SimpleNamespace(**SIZES, **OPTIONS), SIZES["ranks"], spoil
        self.models = dict.fromkeys(example.layers(self.opts))
        self.given, self.matrices = draw(example.shape(self.opts)), example.matrices(self.opts)
        floats = [bfloat16_bits_to_float32(a) for a in (*self.given[: self.R], *self.matrices)]
        *xs, up, down = floats
        weights = self.given[2 * self.R :]
        self.rounds = [x * w.sum(axis=1, keepdims=True) for x, w in zip(xs, weights, strict=True)]
        halves = [np.split(x @ up.T, 2, axis=1) for x in xs]
        self.expert = [(g / (1 + np.exp(-g)) * u) @ down.T for g, u in halves]
        self.times = [np.array([1, 2, 4, 5, 9, 0, 0, 0]) * 1000 + r for r in range(self.R)]

    def run(self, layer):
        parts = [p for p, wanted in ((self.rounds, layer.round), (self.expert, layer.expert)) if wanted]
        ys = [float32_to_bfloat16_bits(sum(p)) for p in zip(*parts, strict=True)]
        steps = [np.array([1000 * s + r]) for r in range(self.R) for s in (1, 3, 4, 6)]
        return [*ys, *(steps if layer.marked else [])]

    def replay(self, layer):
        outputs = self.run(layer)
        outputs[0][0, 0] ^= layer.name == self.spoil
        return outputs

    def arrays(self, outputs):
        return outputs


def test_layers(example):
    names = [layer.name for layer in example.layers(SimpleNamespace(**OPTIONS))]
    assert names[:4] == ["fused", "split", "after", "fused_after"]
    assert names[4:7] == ["split_beside_sms8_head20", "split_beside_head20", "fused_beside_sms32_head20"]
    assert names[7:] == ["fused_beside_sms32", "fused_after_marked", "split_beside_sms8_head20_marked"]
    titles = {layer.name: layer.title for layer in example.layers(SimpleNamespace(**OPTIONS))}
    assert titles["split_beside_head20"] == "overlapped, dispatch_async on all SMs"
    assert titles["fused_beside_sms32"] == "overlapped, dispatch on 32 SMs, no head start"


def test_a_wrong_element_is_found(example):
    right = example.check(Machine(example))
    assert right["right"]
    assert max(right["round error"], right["expert error"], right["sum error"]) < 5e-3
    wrong = example.check(Machine(example, spoil="split_beside_sms8_head20"))
    assert not wrong["right"]
    assert {name: n for name, n in wrong["differing"].items() if n} == {"split_beside_sms8_head20, replayed": 1}


def test_timeline(example, tmp_path):
    machine = Machine(example)
    lines = {layer.title: example.timeline(machine, layer) for layer in example.drawn(machine.opts)}
    after, beside = lines.values()
    assert [bar["kernel"] for bar in after] == ["dispatch", "combine", *example.EXPERT_BARS]
    spans = {bar["kernel"]: (bar["begin_us"], bar["end_us"]) for bar in beside}
    assert spans["send"] == (0, 1)
    assert spans["wait"] == (1, 3)
    assert spans["combine"] == (4, 8)
    assert spans["gate and up"] == (0, 2)
    assert spans["down"] == (3, 5)
    pytest.importorskip("matplotlib")
    example.draw_timelines(lines, tmp_path / "t.png", "title")
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_table(example, capsys):
    machine = Machine(example)
    us = {"fused": 100, "after": 60, "fused_after": 155, "split_beside_sms8_head20": 130}
    times = {
        layer: {"median_us": us.get(layer.name, 170), "eager_us": us.get(layer.name, 170) + 5, "p99_us": 200.0}
        for layer in machine.models
        if not layer.marked
    }
    best = example.show(times, example.check(machine), "here")
    assert best == {"layer": "split_beside_sms8_head20", "how": "replayed", "us": 130, "faster": True}
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith("8 SMs, replayed: 130 µs, 25 µs less than one after the other, 30 less than the two alone")
    next(t for layer, t in times.items() if layer.name == "split_beside_head20")["eager_us"] = 120
    assert example.show(times, example.check(machine), "here")["how"] == "launched one by one"
