"""`ep-mojo doctor` starts on bare Python, always prints, and exits 1 with the remedy when something is missing."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ep_mojo import doctor

ROOT = Path(__file__).resolve().parents[2]
NAMES = {"python", "platform", "max", "numpy", "mojo", "kernel cache", "kernels", "shared memory", "cpu", "memory"}


def bare(*args: str, path: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the doctor with nothing but the standard library: no site-packages, no mojo on PATH."""
    code = (
        f"import sys; sys.path.insert(0, {str(path)!r}); from ep_mojo.doctor import main; sys.exit(main(sys.argv[1:]))"
    )
    # The base interpreter: beside a virtual environment's own python lies its mojo command.
    python = getattr(sys, "_base_executable", None) or sys.executable
    environment = {"PATH": "/nowhere", "HOME": os.environ.get("HOME", "/"), **env}
    command = [python, "-I", "-S", "-c", code, *args]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def statuses(report: dict) -> dict[str, str]:
    return {check["name"]: check["status"] for check in report["checks"]}


def test_bare_python_gets_the_whole_report_and_the_remedies():
    done = bare()
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].startswith("ep-mojo ")
    for name in NAMES:
        assert any(line[9:].startswith(f"{name} ") for line in lines), f"no line about {name}"
    python = shlex.quote(getattr(sys, "_base_executable", None) or sys.executable)
    index = next(i for i, line in enumerate(lines) if line.startswith("MISSING  max "))
    assert "-> " in lines[index + 1]
    assert f"-> {python} -m pip install 'max=={doctor.MAX_VERSION}.*'" in lines[index + 1]
    assert lines[-1].startswith("Missing: max, numpy, ")


def test_bare_python_json():
    done = bare("--json")
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert report["ok"] is False
    missing = [check for check in report["checks"] if check["status"] == "missing"]
    assert {"max", "numpy", "mojo"} <= {check["name"] for check in missing}
    assert all(check["remedy"] for check in missing)
    assert statuses(report)["gpus"] == "note"


def test_prints_even_where_the_kernels_are_missing(tmp_path):
    package = tmp_path / "ep_mojo"
    package.mkdir()
    for name in ("__init__.py", "doctor.py", "errors.py", "kernels.py"):
        (package / name).write_bytes((ROOT / "ep_mojo" / name).read_bytes())
    report = json.loads(bare("--json", path=tmp_path).stdout)
    assert statuses(report)["kernels"] == "missing"


def test_prints_even_where_its_own_package_is_damaged(tmp_path):
    package = tmp_path / "ep_mojo"
    package.mkdir()
    for name in ("__init__.py", "doctor.py"):
        (package / name).write_bytes((ROOT / "ep_mojo" / name).read_bytes())
    (package / "kernels.py").write_text("import nothing_like_this\n")
    done = bare(path=tmp_path)
    assert done.returncode == 1
    assert "the check itself failed" in done.stdout
    assert "memory" in done.stdout


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    report = json.loads(bare("--json", EP_MOJO_CACHE=str(tmp_path / "file" / "x")).stdout)
    (check,) = [check for check in report["checks"] if check["name"] == "kernel cache"]
    assert check["status"] == "missing"
    assert "EP_MOJO_CACHE" in check["remedy"]


def test_complete_environment_passes():
    done = subprocess.run(
        [sys.executable, "-m", "ep_mojo.doctor", "--json"], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    report = json.loads(done.stdout)
    assert {name for name, status in statuses(report).items() if status == "missing"} == set()
    assert report["ok"] is True
    assert done.returncode == 0
    assert set(statuses(report)) >= NAMES | {"gpus", "matplotlib", "ml_dtypes"}


def test_help():
    done = bare("--help")
    assert done.returncode == 0
    assert "--json" in done.stdout


@pytest.mark.parametrize(
    ("function", "module", "name", "value", "words"),
    [
        (doctor.check_python, sys, "version_info", (3, 10, 1, "final", 0), "3.11 to 3.14"),
        (doctor.check_platform, doctor.platform, "machine", lambda: "riscv64", "MAX runs on"),
        (doctor.check_max, doctor.importlib.metadata, "version", lambda name: "25.1.0", "max==26.7.*"),
        (doctor.check_max, doctor, "_run_python", lambda code: ("", "libfoo.so: not found"), "--force-reinstall"),
        (doctor.check_compiler, doctor.importlib.metadata, "version", lambda name: "9.9.9", "mojo-compiler==9.9.9"),
    ],
)
def test_wrong_things_are_named_with_a_remedy(monkeypatch, function, module, name, value, words):
    monkeypatch.setattr(module, name, value)
    check = function()
    assert check.status == "missing"
    assert words in check.remedy


@pytest.mark.parametrize(
    ("output", "status", "words"),
    [
        (("0 - - -\n", ""), "note", "none; the CPU is used"),
        (("1 cuda sm_90a -\n", ""), "ok", "1 x sm_90a (cuda), tested on H100 and H200"),
        (("8 cuda sm_90a -\n", ""), "ok", "8 x sm_90a (cuda), tested on H100 and H200; all pairs reach each other"),
        (("2 cuda sm_100a -\n", ""), "ok", "only compiled for this architecture, not tested on one; all pairs"),
        (("2 hip gfx942 -\n", ""), "ok", "(hip), only compiled"),
        (("1 cuda sm_80 -\n", ""), "note", "1 x sm_80 (cuda), an architecture that was never tried"),
        (("4 cuda sm_90a 0-2,2-0\n", ""), "note", "no peer access: 0-2, 2-0"),
        (("8 cuda sm_90a " + ",".join(f"0-{i}" for i in range(1, 8)) + "\n", ""), "note", "0-5, 0-6 and 1 more"),
        (("", "driver too old"), "note", "driver too old"),
    ],
)
def test_gpus_are_information(monkeypatch, output, status, words):
    monkeypatch.setattr(doctor, "_run_python", lambda code: output)
    check = doctor.check_gpus()
    assert (check.status, words in check.detail) == (status, True)
    assert bool(check.remedy) == (status == "note" and "none" not in check.detail)


def test_the_probe_of_gpus_runs():
    """It asks for every pair; where there are no GPUs, for none."""
    text, problem = doctor._run_python(doctor.GPU_PROBE)
    assert (problem, len(text.split())) == ("", 4)


def test_the_readme_names_the_architectures_that_doctor_knows():
    readme = (ROOT / "README.md").read_text()
    for start, words in doctor.TRIED.items():
        assert start in readme or all(name in readme for name in words.split()[2::2])


def test_small_shared_memory_and_memory_are_notes(monkeypatch):
    usage = doctor.shutil._ntuple_diskusage(64 << 20, 0, 64 << 20)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(doctor.os.path, "isdir", lambda path: True)
    assert "--shm-size" in doctor.check_shared_memory().remedy
    monkeypatch.setattr(doctor, "_memory", lambda: (8 << 30, 1 << 30))
    assert doctor.check_memory().status == "note"


def test_a_damaged_package_is_reported(monkeypatch, tmp_path):
    from ep_mojo import kernels

    monkeypatch.setattr(kernels, "find_compiler", lambda: kernels.Compiler(("/nowhere/mojo",), "Mojo 0"))
    monkeypatch.setenv(kernels.CACHE_VARIABLE, str(tmp_path))
    path = kernels.cached_path(kernels._wanted(())[2])
    path.parent.mkdir(parents=True)
    path.write_text("half a pack")
    check = doctor.check_kernels()
    assert (check.status, check.detail) == ("note", f"damaged: {path}")
    assert "compiled again" in check.remedy


@pytest.mark.parametrize("args", [[], ["--json"]], ids=["lines", "json"])
@pytest.mark.parametrize("out", ["closed", "full"])
def test_output_that_cannot_be_written_gives_no_traceback(out, args):
    if out == "full":
        if not os.path.exists("/dev/full"):
            pytest.skip("needs /dev/full")
        where = os.open("/dev/full", os.O_WRONLY)
    else:
        end, where = os.pipe()
        os.close(end)
    code = f"import ep_mojo.doctor as d; d.CHECKS = (d.check_python,); raise SystemExit(d.main({args!r}))"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=where, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=60
        )
    finally:
        os.close(where)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    if out == "full":
        assert done.returncode == 1
        assert done.stderr.startswith("ep-mojo: the report cannot be written: ")
    else:
        assert (done.returncode, done.stderr) == (0, "")
