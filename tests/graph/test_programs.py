"""`ep-mojo demo`, `run` and `bench` from the command line to the result, on small shapes.

All of them use one config, so that each graph is compiled once: dispatch and combine in bfloat16 and with fp8, and the
encoder of the benchmark.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from ep_mojo import cli
from ep_mojo.dtypes import bfloat16_bits_to_float32, float32_to_bfloat16_bits
from ep_mojo.programs import bench, one_round

R, T, H, E, K = 2, 6, 128, 8, 2
SHAPE = ["--ranks", str(R), "--tokens", str(T), "--hidden", str(H), "--experts", str(E), "--top-k", str(K)]


@pytest.fixture
def input_file(tmp_path):
    """(path, arrays) of an input file: bfloat16 tokens, ids in and out of range, one rank with fewer tokens."""
    rng = np.random.default_rng(0)
    arrays = {
        "x": float32_to_bfloat16_bits(rng.standard_normal((R, T, H), dtype=np.float32)),
        "topk_ids": rng.integers(-1, E + 1, (R, T, K)),
        "topk_weights": rng.random((R, T, K), dtype=np.float32),
        "num_tokens": np.array([T, 2]),
        "n_experts": np.array(E),
    }
    np.savez(tmp_path / "in.npz", **arrays)
    return tmp_path / "in.npz", arrays


@pytest.mark.parametrize("fmt", ["fp8", "bf16"])
def test_demo(fmt, capsys):
    assert cli.main(["demo", *SHAPE, "--format", fmt, "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["ok"]
    assert ("format" in result["error"]) == (fmt == "fp8")
    assert 0 < result["error"]["rounding"]["largest"] <= result["error"]["rounding"]["limit"]
    assert sum(result["rows_per_expert"]) == R * T * K
    assert np.shape(result["traffic_tokens"]) == (R, R)
    assert set(result["seconds"]) == {"dispatch", "experts", "combine"}
    assert result["bytes"]["ours"]["combine"] <= result["bytes"]["per_expert"]["combine"]
    assert "Combine: " in err


def test_demo_for_people(capsys):
    assert cli.main(["demo", *SHAPE]) == 0
    out = capsys.readouterr().out
    for words in ("from 1", "rank 1:", "dispatch", "per expert", "worst", "All right"):
        assert words in out


def test_demo_that_is_off_exits_with_1(capsys, monkeypatch):
    monkeypatch.setattr(one_round, "ROUNDING_LIMIT", 1e-9)
    assert cli.main(["demo", *SHAPE]) == 1
    assert "TOO LARGE" in capsys.readouterr().out


def test_run_gives_each_token_the_weighted_sum_of_itself(input_file, tmp_path, capsys):
    path, arrays = input_file
    output = tmp_path / "out.npz"
    assert cli.main(["run", "--input", str(path), "--output", str(output), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["ok"]
    with np.load(output) as written:
        out, traffic, rows = (written[name] for name in ("out", "traffic", "rows_per_expert"))
    valid = (arrays["topk_ids"] >= 0) & (arrays["topk_ids"] < E)
    valid &= np.arange(T)[None, :, None] < arrays["num_tokens"][:, None, None]
    factor = np.where(valid, arrays["topk_weights"], 0).sum(axis=2, keepdims=True)
    assert out.dtype == np.uint16
    want = bfloat16_bits_to_float32(arrays["x"]) * factor
    np.testing.assert_allclose(bfloat16_bits_to_float32(out), want, rtol=3 * 2.0**-8)
    assert not out[1, 2:].any()
    assert rows.sum() == valid.sum()
    owners = arrays["topk_ids"] // (E // R)
    for s in range(R):
        for r in range(R):
            assert traffic[s, r] == ((owners[s] == r) & valid[s]).any(axis=1).sum()


def test_run_that_is_off_writes_nothing(input_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(one_round, "ROUNDING_LIMIT", 1e-9)
    output = tmp_path / "out.npz"
    assert cli.main(["run", "--input", str(input_file[0]), "--output", str(output)]) == 1
    assert not output.exists()
    assert "nothing was written" in capsys.readouterr().out


def test_run_carries_tokens_that_are_not_finite(input_file, tmp_path, capsys):
    path, arrays = input_file
    arrays["x"][0, 0, :2] = 0x7F80, 0x7FC0
    arrays["topk_ids"][0, 0] = 0, 1
    np.savez(path, **arrays)
    output = tmp_path / "out.npz"
    assert cli.main(["run", "--input", str(path), "--output", str(output)]) == 0
    assert "Left out: 1 token whose reference is not finite" in capsys.readouterr().out
    with np.load(output) as written:
        out = bfloat16_bits_to_float32(written["out"][0, 0])
    assert np.isinf(out[0])
    assert np.isnan(out[1])
    assert np.isfinite(out[2:]).all()


def test_bench(tmp_path, capsys):
    file = tmp_path / "bench.json"
    assert cli.main(["bench", *SHAPE, "--repeats", "2", "--output", str(file)]) == 0
    out = capsys.readouterr().out
    assert "equal to the reference bit for bit" in out
    assert "bf16 round, times NumPy's speed" in out
    assert "goals are for the default shape" in out
    assert "NOT MET" not in out
    result = json.loads(file.read_text())
    assert {r["name"] for r in result["ratios"]} == set(bench.GOALS)
    for windows in result["windows"].values():
        assert windows["allocated"] == windows["total"]
    rank, expert = (result["windows"][s]["dispatch_payload"] for s in ("rank", "expert"))
    # Of "rank" one of two buffers, and without room for cells; of "expert" 16 bytes of header a message.
    assert expert == (E // R) * (rank // 2 // 2) + (E // R) * R * T * 16
    assert all(s["p10"] <= s["median"] <= s["p90"] for s in result["seconds"].values())


def test_bench_times_nothing_that_is_wrong(capsys, monkeypatch):
    monkeypatch.setattr(bench.reference, "output_difference", lambda name, want, got: f"{name}: differs")
    assert cli.main(["bench", *SHAPE, "--repeats", "2"]) == 1
    assert "WRONG" in capsys.readouterr().out
