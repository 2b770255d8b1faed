"""Build the Mojo kernels once, and hand the precompiled package to MAX.

The wheel carries Mojo sources, because a precompiled package fits exactly one compiler version. The first use compiles
them into <cache>/kernels/<key>/ep_mojo.mojoc, where <cache> is $EP_MOJO_CACHE, else $XDG_CACHE_HOME/ep-mojo, else
~/.cache/ep-mojo, and <key> is a digest of every source, the compiler's version and MAX's. A package is complete as soon
as it is visible (it is built elsewhere and renamed); a file lock lets one of several processes build while the others
wait. Beside it lies its digest, ep_mojo.mojoc.sha256: a package that does not fit it was damaged, and is built again.

Formats of your own (`extra_sources`) are compiled into the same package, since MAX wants all custom ops in one. They
become `ep_mojo.user_formats.NAME`, in a copy: the installed sources are never touched.

Needs the standard library only, so that `ep_mojo.doctor` can use it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import keyword
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .errors import ConfigError, KernelBuildError

PACKAGE = "ep_mojo"
CACHE_VARIABLE = "EP_MOJO_CACHE"
TRAIT = "TokenFormat"
MOJO_KEYWORDS = {"comptime", "fn", "let", "mut", "out", "read", "ref", "struct", "trait", "var"}  # besides Python's
_RUN_MOJO = "import sys; from mojo.run import subprocess_run_mojo as run; sys.exit(run(sys.argv[1:]).returncode)"
_built: dict[str, Path] = {}  # key -> package, of this process


def kernel_library(extra_sources: Sequence[str | os.PathLike] = ()) -> Path:
    """Path of the precompiled kernels, for `Graph(custom_extensions=[...])`. Compiles them if no cached package fits.

    Args:
        extra_sources: Token formats of your own. Each is a directory that is a Mojo package (it holds `__init__.mojo`),
            or one `.mojo` file, with at least one struct that conforms to the trait `TokenFormat`. Its name without
            `.mojo` is NAME in `CustomFormat(struct="NAME.Struct")`. Inside, write `from ep_mojo import ...` for what
            ep_mojo offers and relative imports for the package's own modules.

    Returns:
        A file `ep_mojo.mojoc`. It stays valid for as long as the sources and the compiler stay what they are.

    Raises:
        ConfigError: An entry of `extra_sources` is not such a directory or file; nothing was compiled.
        KernelBuildError: No compiler was found, it reported errors (the text holds them), or no cache can be written.
    """
    sources, compiler, key = _wanted(extra_sources)
    path = _built.get(key)
    if path is None or not path.exists():
        path = _built[key] = _cached_or_built(key, sources, compiler)
    return path


def cached_library(extra_sources: Sequence[str | os.PathLike] = ()) -> Path | None:
    """What `kernel_library` would return without compiling, or None if it would have to compile first. Same errors."""
    key = _wanted(extra_sources)[2]
    path = _built.get(key, cached_path(key))
    return path if _is_complete(path) else None


def damaged_library(extra_sources: Sequence[str | os.PathLike] = ()) -> Path | None:
    """The cached package if it is not as it was built, so that `kernel_library` compiles it again. Same errors."""
    path = cached_path(_wanted(extra_sources)[2])
    return path if path.exists() and not _is_complete(path) else None


def _wanted(extra_sources: Sequence[str | os.PathLike]) -> tuple[dict[str, bytes], Compiler, str]:
    sources = _read_sources(kernel_sources(), _user_sources(extra_sources))
    compiler = find_compiler()
    return sources, compiler, cache_key(sources, compiler.version)


# --- Sources ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UserFormat:
    """One struct of `extra_sources`: "name.struct" in Python, defined in ep_mojo.user_formats.`module`."""

    name: str
    struct: str
    module: str


@dataclass(frozen=True)
class _UserSource:
    """One entry of `extra_sources`, validated. `files` maps paths below user_formats/ to their contents."""

    name: str
    path: Path
    files: dict[str, bytes]
    formats: tuple[UserFormat, ...]


def kernel_sources() -> Path:
    """The directory of the Mojo package: inside the installed wheel, or kernels/ep_mojo of a checkout."""
    here = Path(__file__).resolve().parent
    for root in (here / "_kernels", here.parent / "kernels"):
        if (root / PACKAGE / "__init__.mojo").is_file():
            return root / PACKAGE
    raise KernelBuildError(
        f"the Mojo sources are neither in {here / '_kernels'} nor in {here.parent / 'kernels'}",
        remedy="install ep-mojo again: pip install --force-reinstall --no-deps . in the checkout",
    )


def cache_key(sources: dict[str, bytes], compiler_version: str) -> str:
    """Digest (32 hex digits) of everything that decides what the compiler makes: file names, contents and versions."""
    digest = hashlib.sha256()
    for part in (compiler_version, _version_of("max"), _version_of("max-mojo-libs")):
        digest.update(f"{len(part)}:{part}".encode())
    for name, text in sorted(sources.items()):
        digest.update(f"{len(name)}:{name}{len(text)}:".encode() + text)
    return digest.hexdigest()[:32]


def _read_sources(package: Path, users: Sequence[_UserSource]) -> dict[str, bytes]:
    """Path below the assembled root package -> contents."""
    sources = _mojo_files(package)
    if users:
        formats = [entry for user in users for entry in user.formats]
        sources["formats/user.mojo"] = _user_formats_source(formats).encode()
        sources["user_formats/__init__.mojo"] = b'"""Formats given with `kernel_library(extra_sources=...)`."""\n'
        for user in users:
            sources.update({f"user_formats/{name}": text for name, text in user.files.items()})
    return sources


def _user_formats_source(entries: Sequence[UserFormat]) -> str:
    """Text of formats/user.mojo: what makes the op parameter format="NAME.Struct" find the struct.

    A struct takes one parameter, the hidden size.
    """
    imports, choice, names = [], "BF16[hidden]", []
    for entry in entries:
        alias = f"{entry.name}__{entry.struct}"
        imports.append(f"from {PACKAGE}.user_formats.{entry.module} import {entry.struct} as {alias}")
        choice = f'{alias}[hidden] if name == "{entry.name}.{entry.struct}" else ({choice})'
        names.append(f'name == "{entry.name}.{entry.struct}"')
    return f'''"""Formats given with `kernel_library(extra_sources=...)`. Generated: do not edit."""

from .bf16 import BF16
from .token_format import TokenFormat
{chr(10).join(imports)}

comptime UserFormat[name: StaticString, hidden: Int]: TokenFormat = {choice}


def known[name: StaticString]() -> Bool:
    return {" or ".join(names) or "False"}
'''


def _user_sources(extra_sources: Sequence[str | os.PathLike]) -> list[_UserSource]:
    if isinstance(extra_sources, (str, os.PathLike)):
        raise _bad_source(extra_sources, "a list of paths is expected", "a list", "write extra_sources=[path]")
    users: dict[str, _UserSource] = {}
    for given in extra_sources:
        user = _user_source(given)
        if user.name in users:
            other = users[user.name].path
            raise _bad_source(given, f"{other} has the same name", "names that differ", "rename one of the two")
        users[user.name] = user
    return list(users.values())


def _user_source(given: str | os.PathLike) -> _UserSource:
    path = Path(given).expanduser().resolve()
    name = path.stem if path.suffix == ".mojo" else path.name
    if path.is_file() and path.suffix == ".mojo":
        files = {path.name: path.read_bytes()}
    elif path.is_dir():
        files = {f"{name}/{below}": text for below, text in _mojo_files(path).items()}
        if f"{name}/__init__.mojo" not in files:
            remedy = "add an __init__.mojo (it may be empty), or pass a single .mojo file"
            raise _bad_source(given, "the directory holds no __init__.mojo", "a Mojo package", remedy)
    else:
        what = "it is neither a directory nor a .mojo file" if path.exists() else "there is no such file or directory"
        raise _bad_source(given, what, "a directory that is a Mojo package, or a .mojo file", "check the path")
    if not (name.isascii() and name.isidentifier()) or keyword.iskeyword(name) or name in MOJO_KEYWORDS:
        allowed = "letters, digits and _, not beginning with a digit, no keyword"
        raise _bad_source(given, f"{name!r} cannot be the name of a Mojo package", allowed, "rename it")
    formats: dict[str, UserFormat] = {}
    for below, text in sorted(files.items()):
        source = text.decode("utf-8", "replace")
        if re.search(rf"^\s*(from|import)\s+{name}\b", source, re.MULTILINE):
            what = f"{below} imports {name!r} by its absolute name, which changes when it is compiled with ep_mojo"
            raise _bad_source(given, what, "relative imports inside the package", "write `from .module import ...`")
        module = below.removesuffix(".mojo").removesuffix("/__init__").replace("/", ".")
        for struct in _structs_with_trait(source):
            if struct in formats:
                what = f"struct {struct} is defined in {formats[struct].module} and in {module}"
                raise _bad_source(given, what, "struct names that differ within one package", "rename one of the two")
            formats[struct] = UserFormat(name, struct, module)
    if not formats:
        remedy = f"declare one: struct MyFormat({TRAIT}): ..."
        raise _bad_source(given, f"no struct in it conforms to {TRAIT}", "at least one such struct", remedy)
    return _UserSource(name, path, files, tuple(formats.values()))


def _structs_with_trait(source: str) -> list[str]:
    """Names of the top-level structs whose list of traits holds `TokenFormat`."""
    found = []
    for match in re.finditer(r"^struct\s+(\w+)\s*", source, re.MULTILINE):
        rest = source[match.end() :]
        if rest.startswith("["):
            rest = rest[_closing(rest) :].lstrip()
        if rest.startswith("(") and re.search(rf"\b{TRAIT}\b", rest[: _closing(rest)]):
            found.append(match[1])
    return found


def _closing(text: str) -> int:
    """Index just after the bracket that closes the one at text[0]."""
    depth = 0
    for index, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth == 0:
            return index + 1
    return len(text)


def _mojo_files(root: Path) -> dict[str, bytes]:
    files = sorted(path for path in root.rglob("*.mojo") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def _bad_source(value: object, what: str, allowed: str, remedy: str) -> ConfigError:
    shown = os.fspath(value) if isinstance(value, os.PathLike) else value
    return ConfigError(what, field="extra_sources", value=shown, allowed=allowed, remedy=remedy)


# --- Compiler --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compiler:
    """A mojo command that runs: `command` is put before the arguments, `version` is what it says of itself."""

    command: tuple[str, ...]
    version: str

    def run(self, *args: str | os.PathLike, **options) -> subprocess.CompletedProcess[str]:
        """Run it and capture its output as text."""
        options = {"capture_output": True, "text": True, "errors": "replace", "stdin": subprocess.DEVNULL} | options
        return subprocess.run([*self.command, *map(os.fspath, args)], **options)


def compiler_report(done: subprocess.CompletedProcess[str]) -> str:
    """What a mojo command printed, for people: without noise, long lines and long listings cut."""
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "Crashpad" not in line]
    lines = [line if len(line) <= 400 else f"{line[:380]} ..." for line in lines]
    if len(lines) > 120:
        lines = [*lines[:80], f"... {len(lines) - 110} lines left out ...", *lines[-30:]]
    return "\n".join(lines).strip() or "(it printed nothing)"


@cache
def find_compiler() -> Compiler:
    """The Mojo compiler of this Python environment, or else the one on PATH.

    Raises:
        KernelBuildError: There is none that runs. The text says where it looked.
    """
    tried = []
    for command in _compiler_commands():
        try:
            done = Compiler(command, "").run("--version", timeout=120)
        except (OSError, subprocess.TimeoutExpired) as error:
            tried.append(f"  {command[0]}: {error}")
            continue
        version = done.stdout.strip()
        if done.returncode == 0 and version.lower().startswith("mojo"):
            return Compiler(command, version)
        tried.append(f"  {command[0]}: exit status {done.returncode}: {(done.stderr or version).strip()[-200:]}")
    raise KernelBuildError(
        "no Mojo compiler runs here"
        + ("\n" + "\n".join(tried) if tried else ": none was found beside Python or on PATH"),
        remedy="pip install 'max==26.7.*' (it brings the compiler) into the environment of this Python",
    )


def _compiler_commands() -> list[tuple[str, ...]]:
    directories = [os.path.dirname(sys.executable), sysconfig.get_path("scripts")]
    with contextlib.suppress(KeyError):  # no such scheme on this platform
        directories.append(sysconfig.get_path("scripts", f"{os.name}_user"))
    scripts = [os.path.join(directory, "mojo") for directory in dict.fromkeys(directories) if directory]
    commands = [(script,) for script in scripts if os.access(script, os.X_OK)]
    if sys.executable and importlib.util.find_spec("mojo"):
        commands.append((sys.executable, "-c", _RUN_MOJO))
    on_path = shutil.which("mojo")
    if on_path and (on_path,) not in commands:
        commands.append((on_path,))
    return commands


def _version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "none"


# --- Cache -----------------------------------------------------------------------------------------------------------


def cache_directory() -> Path:
    """Where built packages are kept. It need not exist yet."""
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    if base and os.path.isabs(base):  # the XDG rule: a relative path counts as none
        return Path(base) / "ep-mojo"
    try:
        return Path.home() / ".cache" / "ep-mojo"
    except RuntimeError:  # no home directory is known, as in a container with a user of its own
        return Path("/.cache/ep-mojo")


def cached_path(key: str) -> Path:
    """Where the package of this key is, once it is built."""
    return cache_directory() / "kernels" / key / f"{PACKAGE}.mojoc"


def _cached_or_built(key: str, sources: dict[str, bytes], compiler: Compiler) -> Path:
    if _is_complete(cached_path(key)):  # also in a cache that is read-only
        return cached_path(key)
    directory = _writable(cache_directory() / "kernels" / key)
    target = directory / f"{PACKAGE}.mojoc"
    with _locked(directory / "lock") as alone:
        if _is_complete(target):
            return target
        if alone:
            for left_over in directory.glob("build-*"):  # of a process that was killed
                shutil.rmtree(left_over, ignore_errors=True)
        try:
            _build(sources, compiler, target)
        except OSError as error:
            raise KernelBuildError(
                f"cannot write to the kernel cache {directory}: {error}",
                remedy=f"free some space there, or set {CACHE_VARIABLE} to another directory",
            ) from error
    return target


def _is_complete(path: Path) -> bool:
    """Whether the package is there, as it was built."""
    try:
        return _digest_path(path).read_text().strip() == _digest(path)
    except (OSError, ValueError):
        return False


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _writable(directory: Path) -> Path:
    """The directory, made; or, where the default cache cannot be written, a private one among the temporary files."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return directory
    except OSError as error:
        remedy = f"set {CACHE_VARIABLE} to a directory that you may write to"
        problem = f"the kernel cache {directory} cannot be written: {error}"
        if os.environ.get(CACHE_VARIABLE):
            raise KernelBuildError(problem, remedy=remedy) from error
        root = Path(tempfile.gettempdir()) / f"ep-mojo-{os.getuid()}"
        try:
            root.mkdir(mode=0o700, exist_ok=True)
            status = root.lstat()
            # Kernels are code: never load them from a directory that somebody else could have prepared.
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
                raise PermissionError(f"{root} is not a private directory of this user")
            instead = root / "kernels" / directory.name
            instead.mkdir(parents=True, exist_ok=True)
        except OSError as second:
            raise KernelBuildError(f"{problem}; nor can {root}: {second}", remedy=remedy) from second
        warnings.warn(f"{problem}. Using {root} instead. Remedy: {remedy}.", RuntimeWarning, stacklevel=5)
        return instead


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Wait for an exclusive lock on a file. Yields False where the file system has none: renaming is atomic anyway."""
    import fcntl

    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            alone = True
        except OSError:
            alone = False
        yield alone


def _build(sources: dict[str, bytes], compiler: Compiler, target: Path) -> None:
    """Compile exactly the bytes whose digest is the key, beside the target, then rename the result to the target."""
    work = Path(tempfile.mkdtemp(prefix="build-", dir=target.parent))
    try:
        for name, text in sources.items():
            file = work / PACKAGE / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(text)
        out = work / "out" / target.name  # its stem is the package's name
        out.parent.mkdir()
        done = compiler.run("precompile", "-I", work, work / PACKAGE, "-o", out)
        if done.returncode != 0 or not out.is_file() or not out.stat().st_size:
            report = compiler_report(done).replace(f"{work}{os.sep}", "")
            raise KernelBuildError(
                f"the Mojo kernels did not compile (exit status {done.returncode}, {compiler.version})\n{report}",
                remedy="mend the reported lines if they are in user_formats/ (your extra_sources); otherwise compare "
                "the installed versions with the required ones: python -m ep_mojo.doctor",
            )
        _digest_path(out).write_text(_digest(out))
        os.replace(_digest_path(out), _digest_path(target))  # between the two, readers find no package that fits
        os.replace(out, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
