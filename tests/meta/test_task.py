"""The script ./task: listing, refusals, arguments, with pixi and without, and the .venv that it makes and mends."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PIXI_TOML = """
[tasks.show]
description = "Print the arguments"
cmd = "python -c 'import sys; print(sys.argv[1:])'"
[tasks.where]
description = "Print where it runs and with what"
cmd = ["python", "-c", "import os; print(os.getcwd(), os.environ['VIRTUAL_ENV'], os.environ['PATH'].split(':')[0])"]
[tasks.two]
description = "Two in a row"
cmd = "echo two && echo more"
depends-on = ["one"]
[tasks.one]
description = "First"
cmd = "echo one"
depends-on = ["zero"]
[tasks.zero]
cmd = "echo zero"
[tasks.all]
description = "Everything"
depends-on = ["one", "fails", "two"]
[tasks.fails]
description = "Fail"
cmd = "exit 7"
[tasks.lost]
description = "Depends on nothing real"
depends-on = ["nowhere"]
"""
PYPROJECT = """
[build-system]
requires = ["hatchling"]
[project]
name = "toy"
dependencies = ["numpy"]
"""


@pytest.fixture
def project(tmp_path, task_module, monkeypatch):
    """A small project with a copy of ./task; `task_module` works on it."""
    root = tmp_path / "my project"  # a blank in the path on purpose
    root.mkdir()
    shutil.copy(ROOT / "task", root / "task")
    (root / "pixi.toml").write_text(PIXI_TOML)
    (root / "pyproject.toml").write_text(PYPROJECT)
    venv = root / ".venv"
    for name, value in {
        "ROOT": root,
        "VENV": venv,
        "STAMP": venv / "ep-mojo-ready.json",
        "OURS": venv / "ep-mojo-made-by-task",
    }.items():
        monkeypatch.setattr(task_module, name, str(value))
    return root


@pytest.fixture
def ready(project, task_module):
    """The same with a .venv that counts as installed."""
    make_ready(project, task_module)
    return project


def make_ready(project, task_module):
    binaries = project / ".venv" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "python").symlink_to(sys.executable)
    version = "{}.{}".format(*sys.version_info[:2])
    stamp = {"packages": task_module.wanted_packages(), "root": str(project), "python": version}
    (project / ".venv" / "ep-mojo-ready.json").write_text(json.dumps(stamp))


def run(project: Path, *args: str, path: str | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "EP_MOJO_RUNNER"} | env
    environment["PATH"] = path or "/usr/bin:/bin"
    command = [sys.executable, str(project / "task"), *args]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", timeout=60)


def fake_pixi(directory: Path, version: str) -> str:
    """A directory for PATH with a `pixi` that says `version` and prints its arguments, one a line."""
    directory.mkdir()
    script = directory / "pixi"
    script.write_text(
        f'#!/bin/sh\nif [ "$1" = --version ]; then echo "{version}"; else for a in "$@"; do echo "[$a]"; done; fi\n'
    )
    script.chmod(0o755)
    return f"{directory}:/usr/bin:/bin"


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_lists_the_tasks(args):
    done = run(ROOT, *args)
    assert done.returncode == 0
    for name in ("demo", "test", "gpu-compile", "wheel"):
        assert f"  {name} " in done.stdout
    assert "Run the Mojo tests" in done.stdout


def test_is_executable_and_needs_no_packages():
    done = subprocess.run([sys.executable, "-I", "-S", str(ROOT / "task")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert os.access(ROOT / "task", os.X_OK)


def test_unknown_task_lists_those_that_exist(project):
    done = run(project, "tset")
    assert done.returncode == 2
    assert "'tset'" in done.stderr
    assert "Print the arguments" in done.stderr
    assert not (project / ".venv").exists()


def test_runs_in_the_venv_from_any_directory(ready):
    done = run(ready, "where")
    assert done.returncode == 0, done.stderr
    venv = ready / ".venv"
    assert done.stdout.strip() == f"{ready} {venv} {venv / 'bin'}"


def test_arguments_reach_the_task_unchanged(ready):
    args = ["-k", "a or b", "--json", "it's", "$HOME", ""]
    done = run(ready, "show", *args)
    assert done.stdout.strip() == str(args), done.stderr


def test_a_leading_double_dash_is_dropped(ready, tmp_path):
    assert run(ready, "show", "--", "--help", "--").stdout.strip() == "['--help', '--']"
    assert run(ready, "zero", "--").returncode == 0
    with_pixi = run(ready, "show", "--", "--help", path=fake_pixi(tmp_path / "bin", "pixi 0.60.0"))
    assert with_pixi.stdout.splitlines()[-2:] == ["[show]", "[--help]"]


def test_dependencies_run_first_and_once(ready):
    done = run(ready, "two", "three")
    assert done.stdout.split("\n") == ["zero", "one", "two", "more three", ""]


def test_a_failure_ends_the_run_with_its_status(ready):
    done = run(ready, "all")
    assert done.returncode == 7
    assert done.stdout.split() == ["zero", "one"]
    assert "fails failed" in done.stderr


def test_arguments_for_a_task_without_command(ready):
    done = run(ready, "all", "-k", "x")
    assert done.returncode == 2
    assert "takes no arguments" in done.stderr


def test_a_dependency_that_does_not_exist(ready):
    done = run(ready, "lost")
    assert done.returncode == 1
    assert "'nowhere'" in done.stderr


def test_uses_pixi_where_it_is_installed(project, tmp_path):
    done = run(project, "show", "-k", "a b", "--json", path=fake_pixi(tmp_path / "bin", "pixi 0.60.0"))
    assert done.returncode == 0, done.stderr
    wanted = ["run", "--manifest-path", str(project / "pixi.toml"), "show", "-k", "a b", "--json"]
    assert done.stdout.splitlines() == [f"[{word}]" for word in wanted]
    assert not (project / ".venv").exists()


def test_ignores_another_program_called_pixi(ready, tmp_path):
    done = run(ready, "show", "x", path=fake_pixi(tmp_path / "bin", "Pixiv downloader 1.0"))
    assert done.stdout.strip() == "['x']", done.stderr


def test_the_runner_can_be_chosen(ready, tmp_path):
    path = fake_pixi(tmp_path / "bin", "pixi 0.60.0")
    assert run(ready, "show", "x", path=path, EP_MOJO_RUNNER="venv").stdout.strip() == "['x']"
    assert "no pixi on PATH" in run(ready, "show", EP_MOJO_RUNNER="pixi").stderr
    assert run(ready, "show", EP_MOJO_RUNNER="conda").returncode == 2


def test_broken_pixi_toml(project):
    (project / "pixi.toml").write_text("[tasks\n")
    done = run(project, "show")
    assert done.returncode == 1
    assert "cannot read pixi.toml" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_old_python_is_told_so(task_module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18, "final", 0))
    monkeypatch.setattr(task_module.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="1"):
        task_module.use_a_fitting_python()
    assert "Python 3.9 does not fit: MAX needs 3.11 to 3.14" in capsys.readouterr().err


class Installer:
    """Stands in for `subprocess.call`: makes the .venv, and answers pip with a status or an exception."""

    def __init__(self, project: Path, pip_status: int | BaseException = 0):
        self.project, self.pip_status, self.calls = project, pip_status, []

    def __call__(self, command, **_options):
        self.calls.append("pip" if "pip" in command else "venv")
        if "pip" in command:
            if isinstance(self.pip_status, BaseException):
                raise self.pip_status
            return self.pip_status
        (self.project / ".venv" / "bin").mkdir()
        (self.project / ".venv" / "bin" / "python").symlink_to(sys.executable)
        return 0


def install(task_module, monkeypatch, installer):
    monkeypatch.setattr(task_module.subprocess, "call", installer)
    task_module.install()
    return installer.calls


def test_installs_once(project, task_module, monkeypatch):
    assert install(task_module, monkeypatch, Installer(project)) == ["venv", "pip"]
    assert install(task_module, monkeypatch, Installer(project)) == []


def test_updates_when_the_requirements_change(ready, task_module, monkeypatch):
    assert install(task_module, monkeypatch, Installer(ready)) == []
    (ready / "pyproject.toml").write_text(PYPROJECT.replace("numpy", "numpy>=2"))
    assert install(task_module, monkeypatch, Installer(ready)) == ["pip"]
    assert install(task_module, monkeypatch, Installer(ready)) == []


@pytest.mark.parametrize("first", [KeyboardInterrupt(), 1])
def test_the_run_after_one_that_did_not_finish_repairs(project, task_module, monkeypatch, first):
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        install(task_module, monkeypatch, Installer(project, first))
    (project / ".venv" / "half").write_text("left over")
    assert install(task_module, monkeypatch, Installer(project)) == ["venv", "pip"]
    assert not (project / ".venv" / "half").exists()
    assert install(task_module, monkeypatch, Installer(project)) == []


def test_an_interrupted_update_makes_the_venv_again(project, task_module, monkeypatch):
    install(task_module, monkeypatch, Installer(project))
    (project / "pyproject.toml").write_text(PYPROJECT.replace("numpy", "numpy>=2"))
    with pytest.raises(KeyboardInterrupt):
        install(task_module, monkeypatch, Installer(project, KeyboardInterrupt()))
    assert install(task_module, monkeypatch, Installer(project)) == ["venv", "pip"]


@pytest.mark.parametrize("harm", ["python is gone", "moved", "stamp is garbage"])
def test_a_broken_venv_is_made_again(project, task_module, monkeypatch, harm):
    install(task_module, monkeypatch, Installer(project))
    stamp = project / ".venv" / "ep-mojo-ready.json"
    if harm == "python is gone":
        (project / ".venv" / "bin" / "python").unlink()
    elif harm == "moved":
        stamp.write_text(json.dumps(json.loads(stamp.read_text()) | {"root": "/elsewhere"}))
    else:
        stamp.write_text("{")
    assert install(task_module, monkeypatch, Installer(project)) == ["venv", "pip"]


def test_somebody_elses_venv_is_left_alone(project, task_module, monkeypatch, capsys):
    (project / ".venv").mkdir()
    (project / ".venv" / "precious").write_text("x")
    with pytest.raises(SystemExit):
        install(task_module, monkeypatch, Installer(project))
    assert "was not made by ./task" in capsys.readouterr().err
    assert (project / ".venv" / "precious").exists()


def test_a_failed_installation_says_what_to_do(project, task_module, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        install(task_module, monkeypatch, Installer(project, 1))
    text = capsys.readouterr().err
    assert "Remedy" in text
    assert "ep_mojo.doctor" in text
