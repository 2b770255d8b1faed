"""The wheel brings the Mojo sources with it, and the installed package builds its kernels from them."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import ep_mojo, ep_mojo.kernels
print(ep_mojo.__file__)
print(ep_mojo.kernels.kernel_sources())
print(ep_mojo.kernel_library())
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A directory that holds what the wheel holds."""
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", directory / "dist"]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = (directory / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(directory / "site")
    return directory / "site"


def mojo_files(directory):
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*.mojo")}


def test_the_wheel_holds_every_mojo_and_python_source_and_nothing_else(installed):
    assert mojo_files(installed / "ep_mojo" / "_kernels" / "ep_mojo") == mojo_files(ROOT / "kernels" / "ep_mojo")
    tops = {path.name for path in installed.iterdir()}
    assert {name for name in tops if not name.endswith(".dist-info")} == {"ep_mojo"}
    packed = {p.relative_to(installed).as_posix() for p in (installed / "ep_mojo").rglob("*.py")}
    assert packed == {p.relative_to(ROOT).as_posix() for p in (ROOT / "ep_mojo").rglob("*.py")}
    assert (installed / "ep_mojo" / "py.typed").is_file()


def test_the_installed_package_builds_its_kernels_from_the_wheel(installed, tmp_path):
    """In a directory and with a cache of its own: nothing of the checkout is in reach."""
    environment = os.environ | {"PYTHONPATH": str(installed), "EP_MOJO_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    package, sources, library = map(Path, done.stdout.split())
    assert package == installed / "ep_mojo" / "__init__.py"
    assert sources == installed / "ep_mojo" / "_kernels" / "ep_mojo"
    assert library.is_relative_to(tmp_path / "cache")
    assert library.stat().st_size > 0
