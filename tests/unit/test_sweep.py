"""The sweep over sizes, budgets and routings without a GPU: what it draws, compiles, and prints."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ep_mojo.errors import ConfigError, KernelBuildError
from ep_mojo.programs.gpu_round import ROUTINGS, Round, draw

FOLDER = Path(__file__).parents[2] / "python" / "benchmarks"
CASE = Round(ranks=4, tokens=500, fmt="bf16", fused=True, hidden=8, experts=64, top_k=8)


@pytest.fixture
def sweep(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    spec = importlib.util.spec_from_file_location("sweep", FOLDER / "sweep.py")
    monkeypatch.setitem(sys.modules, "sweep", module := importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("compare_max_builtin", None)


def ids_of(routing, case=CASE):
    return draw(case, routing=routing)[case.ranks : 2 * case.ranks]


@pytest.mark.parametrize("routing", ROUTINGS)
def test_choices_are_different_experts(routing):
    for ids in ids_of(routing):
        assert ids.dtype == np.int32
        assert ids.shape == (500, 8)
        assert ids.min() >= 0
        assert ids.max() < 64
        assert all(len(set(token)) == 8 for token in ids.tolist())


def test_routings_are_as_they_say():
    counts = {r: np.bincount(np.concatenate(ids_of(r)).ravel(), minlength=64) for r in ROUTINGS}
    assert counts["uniform"].min() > 0.7 * counts["uniform"].mean()
    assert counts["one"][16:].sum() == 0
    assert counts["one"][:16].min() > 0
    assert counts["zipf"].max() > 4 * counts["zipf"].mean()
    groups = {len({e // 8 for e in token}) for token in np.concatenate(ids_of("grouped")).tolist()}
    assert max(groups) <= 4 < max(len({e // 8 for e in t}) for t in np.concatenate(ids_of("uniform")).tolist())
    hottest = [np.bincount(ids.ravel(), minlength=64).argmax() for ids in ids_of("zipf")]
    assert len(set(hottest)) == 1  # of all ranks


def test_no_such_routing():
    with pytest.raises(ConfigError, match=r"routing = 'all'. Allowed: uniform, grouped, zipf, one"):
        draw(CASE, routing="all")
    with pytest.raises(ConfigError, match="top_k = 8"):
        draw(Round(4, 5, "bf16", True, 8, 16, 8), routing="one")


def row(part, system, tokens=128, routing="uniform", sms=0, us=80.0, **more):
    case = {"system": system, "tokens": tokens, "fmt": "bf16", "name": f"{system}_{tokens}"}
    times = {"median_us": us, "p99_us": us + 1, "host_paced_us": us + 2, "error": 1e-3}
    return {"part": part, "case": case, "routing": routing, "sms": sms, "gb_s": 100.0} | times | more


def test_tables_and_plots(sweep, tmp_path):
    rows = [
        row("tokens", "ours"),
        row("tokens", "max", us=120.0),
        {k: v for k, v in row("tokens", "links", us=40.0).items() if k != "error"},
        row("SMs", "ours", sms=24, ep_kernels_us=70.0),
        row("routing", "ours", routing="zipf", error=float("nan")),
    ]
    text = sweep.tables(rows)
    (line,) = (line.split() for line in text.splitlines() if "1.50 x" in line)
    assert line == ["128", "80.0", "81.0", "82.0", "-", "120.0", "121.0", "122.0", "-", "1.50", "x", "40.0"]
    assert "128 zipf" in text
    assert text.endswith("WRONG: ours_128")
    pytest.importorskip("matplotlib")
    sweep.draw_plots(rows, tmp_path, "title")
    assert {p.name for p in tmp_path.iterdir()} == {"tokens.png", "sms.png"}


def test_each_graph_is_compiled_once_and_failures_are_told(sweep, tmp_path, monkeypatch):
    commands = []

    def run(command, **_):
        commands.append(command)
        return type("Done", (), {"returncode": int("--systems=max" in command), "stderr": "no such thing"})

    monkeypatch.setattr(sweep.subprocess, "run", run)
    monkeypatch.setattr("max.driver.Accelerator", lambda i: i)
    opts = sweep.arguments(["--output", "x", "--jobs", "1"])
    bench = sweep.Bench(opts, 2, tmp_path)
    ours = bench.case(16, "bf16", "ours")
    bench.compile([ours, ours])
    there = tmp_path / bench.case(32, "bf16", "ours").name
    there.mkdir()
    assert not sweep.compare.is_compiled(tmp_path, bench.case(32, "bf16", "ours"))
    (there / f"{there.name}-0.mef").touch()
    assert not sweep.compare.is_compiled(tmp_path, bench.case(32, "bf16", "ours")), "nothing holds the queues"
    (there / "hold_r2-0.mef").touch()
    bench.compile([bench.case(32, "bf16", "ours")])
    (command,) = commands
    wanted = {"compile", "--ranks=2", "--tokens=16", "--formats=bf16", "--systems=ours", f"--mefs={tmp_path}"}
    assert wanted <= {*command}
    with pytest.raises(KernelBuildError, match=r"not compiled: max_bf16\S*: no such thing"):
        bench.compile([bench.case(16, "bf16", "max")])


def test_a_round_is_checked_before_it_is_timed_and_after(sweep, monkeypatch):
    compare, calls = sweep.compare, []
    case = compare.Case(2, 5, "bf16", True, 8, 4, 2)
    note = {name: lambda *_, name=name: calls.append(name) for name in ("execute", "release_captured_graph", "check")}
    comm = SimpleNamespace(cfg=case.config(), check=note["check"])
    monkeypatch.setattr(compare, "on_devices", lambda arrays, devices: arrays)
    monkeypatch.setattr(compare, "error_of", lambda *_: calls.append("error") or 1e-3)
    monkeypatch.setattr(compare, "replay_times", lambda *_: calls.append("timed") or {"median_us": 10.0})
    loaded = compare.Loaded(SimpleNamespace(**note), [], None, comm)
    found = compare.measure(case, loaded, [], routing="one", profile=False)
    assert calls == ["execute", "check", "error", "timed", "release_captured_graph", "check"]
    message, table = 16, 2 * 5 * 2 * 6  # all of rank 1's tokens go to rank 0, and come back
    assert found["gb_s"] == pytest.approx((5 * message * 2 + table) / 2 / 10e-6 / 1e9)
    assert (found["error"], found["case"]["name"]) == (1e-3, case.name)
