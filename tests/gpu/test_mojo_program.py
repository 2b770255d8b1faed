"""The seed-named functions with target "gpu", called from a Mojo program without Python."""

from pathlib import Path

from ep_mojo.kernels import find_compiler

ROOT = Path(__file__).resolve().parents[2]


def test_rounds_from_mojo_alone():
    """Whole rounds of bf16 and fp8, weights compiled in, a missing peer, a wrong order, a wrong K: see gpu_api.mojo."""
    program = ROOT / "tests" / "mojo" / "gpu_api.mojo"
    ran = find_compiler().run("run", "-I", ROOT / "kernels", "-I", ROOT / "tests" / "mojo", program, timeout=600)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "13 rounds of bf16, one of fp8, two failures, other K: all right" in ran.stdout
