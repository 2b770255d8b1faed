"""The command line: help, wrong arguments, files that are not what they should be. Nothing here compiles anything."""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ep_mojo import cli
from ep_mojo.errors import ConfigError, DTypeError, EPError, InputFileError, MissingDependencyError, ShapeError
from ep_mojo.programs import files, layer, plot

ROOT = Path(__file__).resolve().parents[2]
R, T, H, K, E, F = 2, 3, 8, 2, 4, 5


def good() -> dict[str, np.ndarray]:
    """Arrays of a valid input file."""
    rng = np.random.default_rng(0)
    return {
        "x": rng.standard_normal((R, T, H), dtype=np.float32),
        "topk_ids": rng.integers(0, E, (R, T, K)),
        "topk_weights": rng.random((R, T, K), dtype=np.float32),
        "num_tokens": np.array([T, 1]),
        "w_gate": np.zeros((E, F, H), np.float32),
        "w_up": np.zeros((E, F, H), np.float32),
        "w_down": np.zeros((E, H, F), np.float32),
    }


def without(*names):
    return {name: array for name, array in good().items() if name not in names}


EXPERTS = ("w_gate", "w_up", "w_down")
BAD_ARRAYS = {
    "no x": (InputFileError, without("x"), "lacks x"),
    "no ids, no weights": (InputFileError, without("topk_ids", "topk_weights"), "topk_ids, topk_weights"),
    "one FFN weight missing": (InputFileError, without("w_up"), "w_up missing"),
    "x of float64": (DTypeError, good() | {"x": np.zeros((R, T, H))}, "float64"),
    "x of two dimensions": (ShapeError, good() | {"x": np.zeros((T, H), np.float32)}, r"\[R, T, H\]"),
    "ids of float32": (DTypeError, good() | {"topk_ids": np.zeros((R, T, K), np.float32)}, "topk_ids"),
    "ids of other T": (ShapeError, good() | {"topk_ids": np.zeros((R, T + 1, K), int)}, r"\[2, 3, K\]"),
    "weights of other K": (ShapeError, good() | {"topk_weights": np.zeros((R, T, 9), np.float32)}, "topk_weights"),
    "weights of float64": (DTypeError, good() | {"topk_weights": np.zeros((R, T, K))}, "topk_weights"),
    "num_tokens over T": (ShapeError, good() | {"num_tokens": np.array([T + 1, 0])}, r"num_tokens\[0\]"),
    "num_tokens below 0": (ShapeError, good() | {"num_tokens": np.array([0, -1])}, r"num_tokens\[1\]"),
    "num_tokens of other R": (ShapeError, good() | {"num_tokens": np.zeros(5, int)}, "num_tokens"),
    "num_tokens of float": (DTypeError, good() | {"num_tokens": np.zeros(R)}, "num_tokens"),
    "w_up of another width": (ShapeError, good() | {"w_up": np.zeros((E, 1, H), np.float32)}, "w_up"),
    "w_down not transposed": (ShapeError, good() | {"w_down": np.zeros((E, F, H), np.float32)}, "w_down"),
    "w_gate of other H": (ShapeError, good() | {"w_gate": np.zeros((E, F, 9), np.float32)}, "w_gate"),
    "w_gate of float64": (DTypeError, good() | {"w_gate": np.zeros((E, F, H))}, "w_gate"),
    "n_experts unlike w_gate": (ShapeError, good() | {"n_experts": np.array(E + 1)}, "w_gate"),
    "n_experts a list": (ShapeError, without(*EXPERTS) | {"n_experts": np.array([4])}, "n_experts"),
    "an id beyond all limits": (ConfigError, without(*EXPERTS) | {"topk_ids": np.full((R, T, K), 5000)}, "5000"),
    "pickled objects": (InputFileError, good() | {"x": np.array([{}], object)}, "plain arrays"),
}


@pytest.mark.parametrize(("error", "arrays", "match"), BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_bad_arrays(tmp_path, error, arrays, match):
    path = tmp_path / "in.npz"
    np.savez(path, **arrays)
    with pytest.raises(error, match=match) as caught:
        files.read_job(path)
    assert "Remedy: " in str(caught.value)


def npz_bytes() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **good())
    return buffer.getvalue()


def flip_inside_x(data: bytes) -> bytes:
    at = data.index(b"x.npy") + 300
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def one_member(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


def npy_bytes() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, good()["x"])
    return buffer.getvalue()


def huge_header() -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": (2, 3, 1 << 50)})
    return buffer.getvalue()


BAD_FILES = {
    "empty": b"",
    "text": b"hello, this is no archive",
    "npy": npy_bytes(),
    "cut in half": npz_bytes()[: len(npz_bytes()) // 2],
    "last byte missing": npz_bytes()[:-1],
    "a flipped byte": flip_inside_x(npz_bytes()),
    "x is no npy": one_member("x.npy", b"nonsense"),
    "x has a broken header": one_member("x.npy", b"\x93NUMPY\x01\x00\x10\x00{'descr': (((((\n"),
    "x has an impossible size": one_member("x.npy", huge_header()),
}


@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES)
def test_files_that_are_no_npz(tmp_path, content):
    path = tmp_path / "in.npz"
    path.write_bytes(content)
    with pytest.raises(InputFileError, match="in.npz") as caught:
        files.read_job(path)
    assert "Remedy: " in str(caught.value)


@pytest.mark.parametrize("name", ["missing.npz", "."], ids=["missing", "directory"])
def test_paths_that_are_no_files(tmp_path, name):
    with pytest.raises(InputFileError, match="check the path"):
        files.read_job(tmp_path / name)


def test_a_good_file(tmp_path, capsys):
    arrays = good()
    arrays["topk_ids"][0, 0, 0] = -7
    arrays["topk_ids"][1, 0, 1] = E
    arrays["x"] = arrays["x"].astype(">f4")
    np.savez(tmp_path / "in.npz", **arrays, something_else=np.zeros(3))
    job = files.read_job(tmp_path / "in.npz")
    assert job.x.dtype == np.float32
    assert (job.x == arrays["x"]).all()
    assert job.topk_ids.dtype == np.int32
    assert job.topk_ids[0, 0, 0] == job.topk_ids[1, 0, 1] == -1
    assert (job.n_experts, job.num_tokens) == (E, [T, 1])
    assert "not used: something_else" in capsys.readouterr().err


def test_number_of_experts_without_weights(tmp_path):
    arrays = without(*EXPERTS)
    arrays["topk_ids"][:] = 2
    np.savez(tmp_path / "in.npz", **arrays)
    assert files.read_job(tmp_path / "in.npz").n_experts == 4  # 3, rounded up to a multiple of R
    np.savez(tmp_path / "in.npz", **arrays, n_experts=np.array(6))
    assert files.read_job(tmp_path / "in.npz").n_experts == 6


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "out.npz"
    files.write_atomically(path, {"out": np.arange(3)})
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(InputFileError, match="No space left"):
        files.write_atomically(path, {"out": np.arange(4)})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["out.npz"]


@pytest.mark.parametrize("output", ["nowhere/out.npz", "."])
def test_output_that_cannot_be_written_is_found_before_the_work(tmp_path, output, capsys):
    np.savez(tmp_path / "in.npz", **good())
    status = cli.main(["run", "--input", str(tmp_path / "in.npz"), "--output", str(tmp_path / output)])
    assert status == 2
    assert "InputFileError: --output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["demo", "--ranks", "9"], "--ranks = 9"),
        (["demo", "--ranks", "3"], "--experts = 256. Allowed: a multiple of --ranks = 3. Remedy: pad the number of "),
        (["demo", "--ranks", "3"], "or choose --ranks that divides it."),
        (["demo", "--hidden", "100"], "--hidden = 100"),
        (["demo", "--hidden", "200"], "pad the hidden size or use --format bf16."),
        (["bench", "--hidden", "200"], "Remedy: pad the hidden size."),
        (["demo", "--top-k", "33"], "--top-k = 33"),
        (["demo", "--tokens", "0"], "--tokens = 0"),
        (["demo", "--seed", "-1"], "--seed = -1. Allowed: an integer from 0 to 4294967295. Remedy: choose --seed in"),
        (["demo", "--experts", "4", "--top-k", "8"], "--top-k = 8"),
        (["bench", "--repeats", "0"], "--repeats = 0"),
        (["bench", "--experts", "4", "--top-k", "8"], "--top-k = 8"),
        (["bench", "--plot", "/nowhere/at/all.png"], "--plot = '/nowhere/at/all.png'"),
        (["bench", "--output", "/nowhere/at/all.json"], "--output = '/nowhere/at/all.json'"),
        (["run", "--input", "/nowhere.npz", "--output", "out.npz"], "--input = '/nowhere.npz'"),
        (["run", "--input", "/top_k/n_ranks.npz", "--output", "out.npz"], "--input = '/top_k/n_ranks.npz'"),
    ],
    ids=" ".join,
)
def test_errors_are_one_message_and_status_2(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Remedy: " in err
    assert "Traceback" not in err


def test_errors_of_run_name_the_sizes_of_the_file(tmp_path, capsys):
    arrays = without(*EXPERTS) | {"x": np.zeros((R, T, 7), np.float32)}
    np.savez(tmp_path / "in.npz", **arrays)
    assert cli.main(["run", "--input", str(tmp_path / "in.npz"), "--output", str(tmp_path / "out.npz")]) == 2
    assert "ConfigError: H of x = 7. Allowed: an integer from 8" in capsys.readouterr().err


@pytest.mark.parametrize("program", [[], *([p] for p in cli.PROGRAMS)], ids=lambda p: " ".join(p) or "all")
def test_help(program, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([*program, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "usage: ep-mojo" in text
    assert program == [] or "--json" in text


def test_unknown_program_or_option():
    for argv in ([], ["dance"], ["demo", "--colour"], ["run"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(argv)
        assert ended.value.code == 2


def test_an_unknown_option_shows_the_usage_of_its_program(capsys):
    with pytest.raises(SystemExit):
        cli.main(["demo", "--colour"])
    said = capsys.readouterr().err
    assert said.startswith("usage: ep-mojo demo")
    assert "unrecognized arguments: --colour" in said


def test_formats_and_layouts_are_those_of_the_package():
    from ep_mojo.config import OUTPUT_LAYOUTS

    assert tuple(cli.FORMATS) == ("fp8", "fp8-power-of-two", "fp8-ue8m0", "bf16")
    assert set(cli.FORMATS) == set(layer.FORMATS)
    assert cli.LAYOUTS == OUTPUT_LAYOUTS


def test_help_and_doctor_need_only_the_standard_library():
    """-S leaves site-packages out: neither NumPy nor MAX can be found."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = [sys.executable, "-S", "-m", "ep_mojo"]
    options = {"capture_output": True, "text": True, "env": environment, "cwd": ROOT, "timeout": 120}
    for argv in (["--help"], ["demo", "--help"], ["run", "--help"], ["bench", "--help"], ["--version"]):
        assert subprocess.run([*run, *argv], **options).returncode == 0
    demo = subprocess.run([*run, "demo"], **options)
    assert demo.returncode == 2
    assert "MissingDependencyError" in demo.stderr
    assert "'numpy'" in demo.stderr
    assert "Traceback" not in demo.stderr
    doctor = subprocess.run([*run, "doctor", "--json"], **options)
    assert doctor.returncode == 1
    assert not json.loads(doctor.stdout)["ok"]


def test_plot_without_matplotlib_names_the_python_that_runs(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError) as caught:
        plot.require_matplotlib()
    assert str(caught.value).endswith(f"Remedy: {shlex.quote(sys.executable)} -m pip install matplotlib.")


def test_errors_in_the_middle_are_reported_too(monkeypatch, capsys):
    def fail(program):
        raise EPError("something broke", remedy="mend it")

    monkeypatch.setattr(cli, "_program", fail)
    assert cli.main(["demo"]) == 2
    assert capsys.readouterr().err == "ep-mojo: EPError: something broke. Remedy: mend it.\n"


def test_interrupt(monkeypatch, capsys):
    def interrupt(program):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_program", interrupt)
    assert cli.main(["demo"]) == 130
    assert "interrupted" in capsys.readouterr().err
