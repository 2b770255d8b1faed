"""`kernel_library`: what the cache key covers, who builds, what a failure leaves behind, and formats of one's own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ep_mojo import kernels
from ep_mojo.errors import ConfigError, KernelBuildError

ROOT = Path(__file__).resolve().parents[2]
# A compiler that writes the names of the sources it was given. Its log gets a line for each compilation.
STUB = """#!{python}
import os, pathlib, sys, time
work, package, out = pathlib.Path(sys.argv[3]), pathlib.Path(sys.argv[4]), pathlib.Path(sys.argv[6])
assert sys.argv[1:3] == ["precompile", "-I"] and sys.argv[5] == "-o" and package.parent == work, sys.argv
with open({log!r}, "a") as log:
    log.write("compiled\\n")
names = sorted(str(path.relative_to(package)) for path in package.rglob("*.mojo"))
mode = os.environ.get("STUB_MODE")
if mode == "fail":
    sys.exit(f"Failed to initialize Crashpad.\\n{{package}}/__init__.mojo:1:1: error: no such thing")
out.write_text("half")
time.sleep(600 if mode == "hang" else {seconds})
out.write_text("\\n".join(names) if mode != "empty" else "")
"""
FORMAT = """
from ep_mojo import TokenFormat
struct {name}[hidden: Int = 8, names: List[String] = []](
    Copyable, TokenFormat
):
    pass
struct Helper(Copyable):
    pass
"""


class Workbench:
    """A small Mojo package, a stub compiler and an empty cache."""

    def __init__(self, root: Path, seconds: float = 0.0):
        self.root, self.cache, self.log = root, root / "cache", root / "log"
        self.package = root / "kernels" / "ep_mojo"
        (self.package / "formats").mkdir(parents=True)
        (self.package / "__init__.mojo").write_text("from .formats import TokenFormat\n")
        (self.package / "formats" / "__init__.mojo").write_text("from .user import x\n")
        (self.package / "formats" / "user.mojo").write_text("# none\n")
        self.stub = root / "mojo"
        self.stub.write_text(STUB.format(python=sys.executable, log=str(self.log), seconds=seconds))
        self.stub.chmod(0o755)

    @property
    def compilations(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0

    def format(self, name: str, text: str = "", **files: str) -> Path:
        """A package with a format, or with the given text in its __init__.mojo."""
        directory = self.root / "formats" / name
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "__init__.mojo").write_text(text or FORMAT.format(name="Mine"))
        for file, content in files.items():
            (directory / f"{file}.mojo").write_text(content)
        return directory


@pytest.fixture
def bench(tmp_path, monkeypatch):
    workbench = Workbench(tmp_path)
    monkeypatch.setenv(kernels.CACHE_VARIABLE, str(workbench.cache))
    monkeypatch.setattr(kernels, "_built", {})
    monkeypatch.setattr(kernels, "kernel_sources", lambda: workbench.package)
    monkeypatch.setattr(kernels, "find_compiler", lambda: kernels.Compiler((str(workbench.stub),), "Mojo 0 (stub)"))
    return workbench


def contents(path: Path) -> list[str]:
    return path.read_text().split("\n")


def test_builds_once_and_is_found_again(bench, monkeypatch):
    assert kernels.cached_library() is None
    path = kernels.kernel_library()
    assert path.name == "ep_mojo.mojoc"
    assert path.is_relative_to(bench.cache)
    assert contents(path) == ["__init__.mojo", "formats/__init__.mojo", "formats/user.mojo"]
    assert kernels.kernel_library() == kernels.cached_library() == path
    monkeypatch.setattr(kernels, "_built", {})  # as in a new process
    assert kernels.kernel_library() == path
    assert bench.compilations == 1
    assert sorted(file.name for file in path.parent.iterdir()) == ["ep_mojo.mojoc", "ep_mojo.mojoc.sha256", "lock"]


def test_a_deleted_cache_is_filled_again(bench):
    kernels.kernel_library().unlink()
    assert kernels.kernel_library().exists()
    assert bench.compilations == 2


DAMAGE = {
    "truncated": lambda path: os.truncate(path, 5),
    "empty": lambda path: os.truncate(path, 0),
    "garbage": lambda path: path.write_bytes(bytes(len(path.read_bytes()))),
    "no_digest": lambda path: path.with_name(path.name + ".sha256").unlink(),
    "other_digest": lambda path: path.with_name(path.name + ".sha256").write_bytes(b"\xff"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_package_is_built_again(bench, monkeypatch, damage):
    path = kernels.kernel_library()
    good = path.read_bytes()
    assert kernels.damaged_library() is None
    damage(path)
    monkeypatch.setattr(kernels, "_built", {})  # as in a new process
    assert kernels.cached_library() is None
    assert kernels.damaged_library() == path
    assert kernels.kernel_library() == path
    assert path.read_bytes() == good
    assert bench.compilations == 2
    assert kernels.damaged_library() is None


def test_key_covers_names_contents_and_versions(monkeypatch):
    base = {"a.mojo": b"x", "b.mojo": b"y"}
    variants = [
        ({"a.mojo": b"x", "c.mojo": b"y"}, "1"),
        ({"a.mojo": b"x", "b.mojo": b"z"}, "1"),
        ({"a.mojo": b"xb.mojo", "": b"y"}, "1"),
        ({"a.mojo": b"y", "b.mojo": b"x"}, "1"),
        ({"a.mojo": b"x"}, "1"),
        (base, "2"),
    ]
    keys = {kernels.cache_key(sources, version) for sources, version in [(base, "1"), *variants]}
    assert len(keys) == 1 + len(variants)
    assert kernels.cache_key(dict(reversed(base.items())), "1") == kernels.cache_key(base, "1")
    monkeypatch.setattr(kernels, "_version_of", lambda name: "another MAX")
    assert kernels.cache_key(base, "1") not in keys


def test_an_edit_gives_another_package(bench):
    first = kernels.kernel_library()
    (bench.package / "new.mojo").write_text("")
    second = kernels.kernel_library()
    assert second != first
    assert "new.mojo" in contents(second)
    assert first.exists()  # another process may still be using it


def worker(bench: Workbench, code: str = "print(k.kernel_library())", **env: str) -> subprocess.Popen[str]:
    program = (
        "import sys, pathlib, ep_mojo.kernels as k\n"
        f"k.kernel_sources = lambda: pathlib.Path({str(bench.package)!r})\n"
        f"k.find_compiler = lambda: k.Compiler(({str(bench.stub)!r},), 'Mojo 0 (stub)')\n{code}"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), kernels.CACHE_VARIABLE: str(bench.cache)} | env
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", program], env=environment, start_new_session=True, **pipes)


def test_eight_processes_at_once_compile_once(tmp_path):
    bench = Workbench(tmp_path, seconds=1.0)
    # Every process looks at the file the moment it gets the path: it must be whole.
    code = "path = k.kernel_library(); print(path); print(path.read_text().count('mojo'))"
    processes = [worker(bench, code) for _ in range(8)]
    results = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0] * 8, results
    assert len({out for out, _ in results}) == 1
    assert results[0][0].split()[-1] == "3"
    assert bench.compilations == 1


def test_a_killed_build_leaves_nothing_that_is_used(bench):
    process = worker(bench, STUB_MODE="hang")
    deadline = time.monotonic() + 30
    while not list(bench.cache.glob("kernels/*/build-*/out/*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert list(bench.cache.glob("kernels/*/build-*/out/*"))
    os.killpg(process.pid, 9)
    process.communicate(timeout=30)
    assert kernels.cached_library() is None
    assert contents(kernels.kernel_library())[0] == "__init__.mojo"
    assert not list(bench.cache.glob("kernels/*/build-*"))


def test_compiler_errors_are_shown(bench, monkeypatch):
    monkeypatch.setenv("STUB_MODE", "fail")
    with pytest.raises(KernelBuildError) as caught:
        kernels.kernel_library()
    text = str(caught.value)
    assert "\nep_mojo/__init__.mojo:1:1: error: no such thing" in text
    assert "Mojo 0 (stub)" in text
    assert "Remedy" in text
    assert "Crashpad" not in text
    assert kernels.cached_library() is None
    monkeypatch.delenv("STUB_MODE")
    assert kernels.kernel_library().exists()


def test_an_empty_result_is_an_error(bench, monkeypatch):
    monkeypatch.setenv("STUB_MODE", "empty")
    with pytest.raises(KernelBuildError):
        kernels.kernel_library()
    assert kernels.cached_library() is None


def test_a_given_cache_that_cannot_be_written_is_an_error(bench, monkeypatch):
    (bench.root / "file").write_text("")
    monkeypatch.setenv(kernels.CACHE_VARIABLE, str(bench.root / "file" / "below"))
    with pytest.raises(KernelBuildError, match="set EP_MOJO_CACHE"):
        kernels.kernel_library()
    assert bench.compilations == 0


def test_a_default_cache_that_cannot_be_written_is_replaced_with_a_warning(bench, monkeypatch):
    (bench.root / "file").write_text("")
    temporary = bench.root / "tmp"
    temporary.mkdir()
    monkeypatch.delenv(kernels.CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(bench.root / "file"))
    monkeypatch.setattr(kernels.tempfile, "gettempdir", lambda: str(temporary))
    with pytest.warns(RuntimeWarning, match="EP_MOJO_CACHE"):
        path = kernels.kernel_library()
    assert path.is_relative_to(temporary)
    (private,) = temporary.iterdir()
    assert private.stat().st_mode & 0o777 == 0o700
    private.chmod(0o777)  # somebody else could have put a package there
    monkeypatch.setattr(kernels, "_built", {})
    with pytest.raises(KernelBuildError, match="not a private directory"):
        kernels.kernel_library()


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv(kernels.CACHE_VARIABLE, "~/x")
    assert kernels.cache_directory() == Path.home() / "x"
    monkeypatch.delenv(kernels.CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/y")
    assert kernels.cache_directory() == Path("/y/ep-mojo")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert kernels.cache_directory() == Path.home() / ".cache" / "ep-mojo"


# --- Formats of one's own ---


def test_formats_are_assembled_into_one_package(bench):
    directory = bench.format("mine", sub=FORMAT.format(name="Other"))
    single = bench.root / "single.mojo"
    single.write_text(FORMAT.format(name="Alone"))
    path = kernels.kernel_library([directory, str(single)])
    assert path != kernels.kernel_library()
    below = {name for name in contents(path) if name.startswith("user_formats")}
    names = {"__init__.mojo", "mine/__init__.mojo", "mine/sub.mojo", "single.mojo"}
    assert below == {f"user_formats/{name}" for name in names}
    assert (bench.package / "formats" / "user.mojo").read_text() == "# none\n"
    (directory / "sub.mojo").write_text(FORMAT.format(name="Changed"))
    assert kernels.kernel_library([directory, single]) != path


def test_structs_are_found(bench):
    directory = bench.format("mine", "from .sub import Other", sub=FORMAT.format(name="Other"))
    (user,) = kernels._user_sources([directory])
    assert user.formats == (kernels.UserFormat("mine", "Other", "mine.sub"),)
    source = kernels._user_formats_source(user.formats)
    assert "ep_mojo.user_formats.mine.sub" in source
    assert "Other" in source


@pytest.mark.parametrize(
    ("name", "files", "words"),
    [
        ("absent", None, "there is no such file"),
        ("no_init", {"sub": "x"}, "holds no __init__.mojo"),
        ("my-format", {"__init__": FORMAT.format(name="A")}, "cannot be the name of a Mojo package"),
        ("trait", {"__init__": FORMAT.format(name="A")}, "cannot be the name of a Mojo package"),
        ("empty", {"__init__": ""}, "no struct in it conforms to TokenFormat"),
        ("other_trait", {"__init__": "struct A(Copyable):\n    pass\n"}, "no struct in it conforms to TokenFormat"),
        ("twice", {"__init__": FORMAT.format(name="A"), "b": FORMAT.format(name="A")}, "struct A is defined in"),
        ("itself", {"__init__": "from itself.sub import A", "sub": FORMAT.format(name="A")}, "absolute name"),
    ],
)
def test_bad_extra_sources(bench, name, files, words):
    directory = bench.root / name
    if files is not None:
        directory.mkdir()
        for file, text in files.items():
            (directory / f"{file}.mojo").write_text(text)
    with pytest.raises(ConfigError) as caught:
        kernels.kernel_library([directory])
    assert words in str(caught.value)
    assert f"extra_sources = '{directory}'" in str(caught.value)
    assert "Remedy" in str(caught.value)
    assert bench.compilations == 0


def test_bad_lists_of_extra_sources(bench):
    first, second = bench.format("mine"), bench.root / "mine.mojo"
    second.write_text(FORMAT.format(name="A"))
    with pytest.raises(ConfigError, match="has the same name"):
        kernels.kernel_library([first, second])
    with pytest.raises(ConfigError, match="a list of paths"):
        kernels.kernel_library(str(first))
    with pytest.raises(ConfigError, match="neither a directory nor"):
        (bench.root / "text.txt").write_text("")
        kernels.kernel_library([bench.root / "text.txt"])


# --- The compiler ---


def test_the_installed_compiler_is_found():
    compiler = kernels.find_compiler()
    assert compiler.version.lower().startswith("mojo")


def test_every_way_to_the_compiler_works():
    commands = kernels._compiler_commands()
    assert (sys.executable, "-c", kernels._RUN_MOJO) in commands
    for command in commands:
        assert kernels.Compiler(command, "").run("--version").returncode == 0


def test_no_compiler(monkeypatch):
    monkeypatch.setattr(kernels, "_compiler_commands", lambda: [("/nowhere/mojo",), ("/bin/false",)])
    with pytest.raises(KernelBuildError) as caught:
        kernels.find_compiler.__wrapped__()
    assert "/nowhere/mojo" in str(caught.value)
    assert "/bin/false: exit status 1" in str(caught.value)
    assert "pip install 'max==" in str(caught.value)


def test_the_real_compiler_builds_a_package_with_a_format(tmp_path, monkeypatch):
    compiler = kernels.find_compiler()
    bench = Workbench(tmp_path)
    (bench.package / "__init__.mojo").write_text('"""Toy."""\nfrom .formats import TokenFormat\n')
    (bench.package / "formats" / "__init__.mojo").write_text("from .base import TokenFormat\n")
    (bench.package / "formats" / "base.mojo").write_text(
        "trait TokenFormat:\n    @staticmethod\n    def size() -> Int:\n        ...\n"
    )
    good = "from ep_mojo import TokenFormat\nstruct A(TokenFormat):\n    @staticmethod\n    def size() -> Int:\n"
    directory = bench.format("mine", f"{good}        return 3\n")
    monkeypatch.setenv(kernels.CACHE_VARIABLE, str(bench.cache))
    monkeypatch.setattr(kernels, "kernel_sources", lambda: bench.package)
    # formats/user.mojo of the real kernels needs the real trait: only the assembly is of interest here.
    imports = "from ep_mojo.user_formats.mine import A\n"
    monkeypatch.setattr(kernels, "_user_formats_source", lambda entries: imports)
    path = kernels.kernel_library([directory])
    program = tmp_path / "main.mojo"
    program.write_text("from ep_mojo.formats.user import A\ndef main():\n    print('size', A.size())\n")
    done = compiler.run("run", "-I", path.parent, program)
    assert "size 3" in done.stdout, done.stderr
    bench.format("mine", f"{good}        return oops\n")
    with pytest.raises(KernelBuildError, match=r"ep_mojo/user_formats/mine/__init__.mojo:5:\d+: error"):
        kernels.kernel_library([directory])
