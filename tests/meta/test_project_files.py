"""pixi.toml, pyproject.toml, the README and the rest of the repository agree with one another."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import ep_mojo
from ep_mojo import doctor

ROOT = Path(__file__).resolve().parents[2]
PIXI = tomllib.loads((ROOT / "pixi.toml").read_text())
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TASKS = {
    "demo",
    "test",
    "test-mojo",
    "lint",
    "format",
    "format-check",
    "check",
    "doctor",
    "bench",
    "gpu-compile",
    "wheel",
}
TEXT_SUFFIXES = {"", ".cfg", ".json", ".md", ".mojo", ".py", ".sh", ".svg", ".toml", ".txt", ".yaml", ".yml"}
MAX_LINES = {".mojo": 400, ".py": 500}
# Spelled in parts, so that this file passes its own test.
FORBIDDEN = ["/" + "work/", "py" + "pi.org", "files.python" + "hosted", "/" + "root/"]


def project_files() -> list[Path]:
    """Files that git tracks or would track; without git, all that are not in a directory of built things."""
    try:
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
        paths = [ROOT / name for name in names if name]
    except (OSError, subprocess.CalledProcessError):
        skip = {".git", ".venv", ".pixi", "build", "dist", "__pycache__"}
        paths = [path for path in ROOT.rglob("*") if not skip & set(path.relative_to(ROOT).parts)]
        paths = [path for path in paths if not any(part.endswith("_cache") for part in path.parts)]
    return [path for path in paths if path.is_file() and path.suffix in TEXT_SUFFIXES]


@pytest.fixture(scope="module")
def readme() -> str:
    path = ROOT / "README.md"
    assert path.is_file(), "README.md is missing"
    return path.read_text()


def requirement_name(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement)[0].lower().replace("_", "-")


def test_pixi_has_exactly_the_tasks_of_the_project():
    assert set(PIXI["tasks"]) == TASKS


@pytest.mark.parametrize("name", sorted(PIXI["tasks"]))
def test_every_task_says_what_it_does_and_does_it(name):
    task = PIXI["tasks"][name]
    assert len(task.get("description", "")) > 20
    assert ("cmd" in task) != ("depends-on" in task)
    assert set(task.get("depends-on", [])) <= set(PIXI["tasks"])


def test_check_runs_every_gate():
    assert PIXI["tasks"]["check"]["depends-on"] == ["format-check", "lint", "test-mojo", "test"]


def test_files_that_tasks_run_exist():
    for name, task in PIXI["tasks"].items():
        for word in str(task.get("cmd", "")).split():
            if "/" in word and not word.startswith(("/dev/", "http")):
                assert (ROOT / word).exists(), f"task {name}: {word} does not exist"


def test_pixi_workspace():
    workspace = PIXI["workspace"]
    assert set(workspace["platforms"]) == {"linux-64", "linux-aarch64", "osx-arm64"}
    assert workspace["channels"][0] == "conda-forge"
    assert any("modular" in channel for channel in workspace["channels"])
    assert {"max", "modular", "numpy", "pytest"} <= set(PIXI["dependencies"])
    assert (ROOT / workspace["license-file"]).read_text().lstrip().startswith("Apache License")


def test_versions_agree():
    assert PIXI["workspace"]["version"] == ep_mojo.__version__
    assert PYPROJECT["tool"]["hatch"]["version"]["path"] == "ep_mojo/__init__.py"
    assert "version" in PYPROJECT["project"]["dynamic"]
    assert re.search(rf"^## .*\b{re.escape(ep_mojo.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert PIXI["workspace"]["name"] == PYPROJECT["project"]["name"] == "ep-mojo"
    assert PIXI["workspace"]["description"] == PYPROJECT["project"]["description"]


def test_python_versions_agree(task_module):
    (low, high) = doctor.MIN_PYTHON, doctor.TOO_NEW_PYTHON
    wanted = f">={low[0]}.{low[1]},<{high[0]}.{high[1]}"
    assert PYPROJECT["project"]["requires-python"] == PIXI["dependencies"]["python"] == wanted
    assert (low, high) == (task_module.MIN_PYTHON, task_module.TOO_NEW_PYTHON)


def test_run_time_dependencies_are_max_and_numpy_only():
    assert PYPROJECT["project"]["dependencies"] == [f"max=={doctor.MAX_VERSION}.*", "numpy"]
    assert PIXI["dependencies"]["max"] == PIXI["dependencies"]["modular"] == f"{doctor.MAX_VERSION}.*"
    assert f"mblack=={doctor.MAX_VERSION}.*" in PYPROJECT["project"]["optional-dependencies"]["dev"]


def test_extras():
    extras = PYPROJECT["project"]["optional-dependencies"]
    assert set(extras) == {"torch", "plots", "bench", "dev"}
    assert [requirement_name(item) for item in extras["plots"]] == ["matplotlib"]
    assert [requirement_name(item) for item in extras["bench"]] == ["ml-dtypes"]
    assert [requirement_name(item) for item in extras["torch"]] == ["torch"]


def test_pixi_and_the_dev_extra_install_the_same_tools():
    extras = PYPROJECT["project"]["optional-dependencies"]
    from_pip = {requirement_name(item) for name in ("dev", "plots", "bench") for item in extras[name]} - {"ep-mojo"}
    from_pip |= {requirement_name(item) for item in PYPROJECT["project"]["dependencies"]}
    from_pixi = {requirement_name(item) for item in PIXI["dependencies"]} - {"python"}
    other_names = {"matplotlib-base": "matplotlib", "pytorch-cpu": "torch"}
    assert from_pip - {"mblack"} | {"modular"} == {other_names.get(name, name) for name in from_pixi}
    assert f"torch=={PIXI['dependencies']['pytorch-cpu']}" in extras["dev"]


def test_platforms_agree():
    names = {("Linux", "x86_64"): "linux-64", ("Linux", "aarch64"): "linux-aarch64", ("Darwin", "arm64"): "osx-arm64"}
    assert {names[platform] for platform in doctor.PLATFORMS} == set(PIXI["workspace"]["platforms"])


def test_command_and_mojo_sources_are_packaged():
    assert PYPROJECT["project"]["scripts"] == {"ep-mojo": "ep_mojo.cli:main"}
    wheel = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert set(wheel["only-include"]) == {"ep_mojo", "kernels/ep_mojo"}
    assert wheel["sources"] == {"kernels/ep_mojo": "ep_mojo/_kernels/ep_mojo"}
    assert (ROOT / "ep_mojo" / "py.typed").is_file()


def test_public_names_are_spelled_alike():
    lists = ep_mojo._MODULE_OF, ep_mojo.__all__, static_imports()
    assert sorted(lists[0]) == sorted(set(lists[1]) - {"__version__"}) == sorted(lists[2])
    from ep_mojo import errors

    classes = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert set(ep_mojo._NAMES["errors"]) == classes


def static_imports() -> list[str]:
    """Names that ep_mojo/__init__.py imports for type checkers."""
    import ast

    tree = ast.parse((ROOT / "ep_mojo" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    return [alias.name for node in block.body for alias in node.names]


@pytest.mark.parametrize("name", ep_mojo.__all__)
def test_every_public_name_loads_and_is_documented(name):
    value = getattr(ep_mojo, name)
    assert name == "__version__" or value.__doc__


def test_unknown_public_name():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = ep_mojo.no_such_name


def test_import_is_light():
    import sys

    code = "import sys, ep_mojo, ep_mojo.errors, ep_mojo.kernels, ep_mojo.doctor; print(*sys.modules)"
    modules = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split()
    assert not {"numpy", "max", "torch", "mojo"} & set(modules)


def test_readme_names_every_task(readme):
    assert "./task demo" in readme
    assert "./task test" in readme
    missing = [name for name in PIXI["tasks"] if not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", readme)]
    assert not missing, f"README.md does not mention the tasks {missing}"


def test_readme_names_only_tasks_that_exist(readme):
    assert set(re.findall(r"\./task ([a-z][\w-]*)", readme)) <= set(PIXI["tasks"])


def test_readme_names_every_program_and_every_array_that_run_needs(readme):
    from ep_mojo import cli
    from ep_mojo.programs import files

    assert set(re.findall(r"^\| `ep-mojo (\w+)", readme, re.MULTILINE)) == set(cli.PROGRAMS)
    assert set(re.findall(r"`([a-z_]+)`", readme)) >= {*files.REQUIRED, "num_tokens", *files.EXPERT_WEIGHTS}


def test_readme_names_the_commands_that_the_venv_has(readme):
    assert set(re.findall(r"\.venv/bin/([\w-]+)", readme)) == {"python", *PYPROJECT["project"]["scripts"]}


def test_readme_agrees_about_versions(readme):
    pythons = {f"3.{doctor.MIN_PYTHON[1]} to 3.{doctor.TOO_NEW_PYTHON[1] - 1}"}
    assert set(re.findall(r"Python (3[\w. ]*\d)", readme)) == pythons
    for found in re.findall(r"max==([\d.]+)", readme):
        assert found.rstrip(".").startswith(doctor.MAX_VERSION)
    for extra in re.findall(r"'(?:ep-mojo|\.)\[([\w,]+)\]'", readme):
        assert set(extra.split(",")) <= set(PYPROJECT["project"]["optional-dependencies"])


def test_links_of_the_documents_lead_somewhere():
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md")]:
        text = re.sub(r"(?s)^```.*?^```", "", document.read_text(), flags=re.MULTILINE)  # Mojo's S[n](Trait) is no link
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            if not re.match(r"[a-z]+:", target):
                assert (document.parent / target).exists(), f"{document.name} links to {target}, which does not exist"


@pytest.mark.parametrize("suffix", sorted(MAX_LINES))
def test_files_are_short(suffix):
    lengths = {path: len(path.read_text().splitlines()) for path in project_files() if path.suffix == suffix}
    too_long = {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > MAX_LINES[suffix]}
    assert lengths
    assert not too_long, f"longer than {MAX_LINES[suffix]} lines: {too_long}"


def test_lines_of_mojo_are_short():
    """Of Python ruff says so; mblack leaves docstrings alone."""
    found = [
        f"{path.relative_to(ROOT)}:{i}"
        for path in project_files()
        if path.suffix == ".mojo"
        for i, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 120
    ]
    assert not found


def test_no_file_names_a_place_that_it_should_not():
    found = []
    for path in project_files():
        text = path.read_text(errors="replace").lower()
        found += [f"{path.relative_to(ROOT)}: {word}" for word in FORBIDDEN if word in text]
    assert not found


def test_no_lock_file():
    assert not [path.name for path in project_files() if path.name in ("pixi.lock", "uv.lock", "poetry.lock")]


def test_ci_runs_the_two_tasks():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert "set -euo pipefail" in lines
    assert [line.split() for line in lines if line.startswith("./task")] == [
        ["./task", "check"],
        ["./task", "gpu-compile"],
    ]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    assert (ROOT / "task").stat().st_mode & 0o111


def test_gpu_tests_skip_where_there_is_no_gpu():
    import sys

    from max.driver import accelerator_count

    if accelerator_count():
        pytest.skip("there are GPUs here")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert re.search(r"^\d+ skipped in ", done.stdout, re.MULTILINE), done.stdout[-400:]
