"""The programs for GPUs where there are none, or asked for what is not there: one message, exit status 2."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "python"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a program on a machine with so many GPUs; returns what it says on stderr, its exit status being 2."""
    driver = pytest.importorskip("max.driver")

    def run(path, *argv, gpus=0):
        monkeypatch.setattr(driver, "accelerator_count", lambda: gpus)
        monkeypatch.setattr(sys, "argv", [path, *argv])
        spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
        monkeypatch.setitem(sys.modules, spec.name, module := importlib.util.module_from_spec(spec))
        spec.loader.exec_module(module)
        try:
            status = module.main(list(argv))
        except SystemExit as ended:
            status = ended.code
        assert status == 2
        err = capsys.readouterr().err
        assert "Traceback" not in err
        return err

    return run


def test_names_of_steps(run):
    err = run("tools/gpu_check.py", "--only", "TYPO")
    assert "--only = 'TYPO'" in err
    assert "one GPU; Mojo program; " in err
    err = run("tools/gpu_check.py", "--only", "memcheck", "--skip", "memcheck")
    assert "leave no step. Steps: one GPU; " in err


def test_names_of_cases(run):
    err = run("tools/gpu_stress.py", "--only", "fused", "--only", "TYPO")
    assert "--only = 'TYPO'" in err
    assert "fp8 fused" in err
    assert "--artefact holds the graphs of all cases" in run(
        "tools/gpu_stress.py", "--only", "fused", "--artefact", "F"
    )


RUN = ("examples/overlap_shared_expert.py", "benchmarks/compare_max_builtin.py")


@pytest.mark.parametrize("path", RUN)
def test_no_gpus_or_too_few(run, path):
    assert "DeviceError: --ranks = 'all': MAX sees 0 GPUs here" in run(path, "run")
    assert "--ranks = 4: MAX sees 1 GPU here. Allowed: up to 1." in run(path, "run", "--ranks", "4", gpus=1)
    assert "ConfigError: --ranks = 99" in run(path, "run", "--ranks", "99", gpus=8)


def test_memory_without_gpus(run, monkeypatch):
    path = "tools/gpu_memory.py"
    monkeypatch.syspath_prepend(ROOT / "tools")
    assert "DeviceError: --ranks = 'all': MAX sees 0 GPUs here" in run(path)
    assert "'all'. Allowed: round, gather" in run(path, "--parts", "all")
    assert "GPUs that torch sees = 0. Allowed: 2. Remedy: use --parts round" in run(path, gpus=2)


def test_timeline_without_gpus_or_matplotlib(run, monkeypatch):
    path = "benchmarks/timeline.py"
    assert "DeviceError: --ranks = 'all': MAX sees 0 GPUs here" in run(path)
    assert "'fp9'. Allowed: bf16, fp8" in run(path, "--formats", "fp9")
    assert "hidden_size = 200" in run(path, "--formats", "fp8", "--hidden", "200", gpus=2)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "MissingDependencyError: --plot needs matplotlib" in run(path, "--plot", "a.png", gpus=2)


def test_no_matplotlib(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "MissingDependencyError: the time line needs matplotlib" in run(RUN[0], "run", gpus=2)


OPTIONS = {
    "no folder": (["compile"], "needs --mefs DIR"),
    "tokens": (["run", "--tokens", "128,x"], "'128,x'. Allowed: whole numbers"),
    "formats": (["run", "--formats", "fp9"], "'fp9'. Allowed: bf16, fp8"),
    "modes": (["run", "--modes", "both"], "'both'. Allowed: fused, split"),
}


@pytest.mark.parametrize(("argv", "text"), OPTIONS.values(), ids=OPTIONS)
def test_options_of_the_comparison(run, argv, text):
    assert text in run(RUN[1], *argv)
