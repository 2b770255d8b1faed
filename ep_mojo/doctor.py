"""`ep-mojo doctor`: what this machine has, what is missing, and how to mend it.

Starts on nothing but the standard library and always prints, also where MAX or NumPy is absent or broken. Every check
is one line: "ok", "note" (optional, or good to know) or "MISSING" (required), with a remedy where there is something to
do. The exit status is 1 when something required is missing. Run it as `ep-mojo doctor` or `python -m ep_mojo.doctor`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Callable

# Tested equal to pyproject.toml.
MAX_VERSION = "26.7"
MIN_PYTHON = (3, 11)
TOO_NEW_PYTHON = (3, 15)
PLATFORMS = (("Linux", "x86_64"), ("Linux", "aarch64"), ("Darwin", "arm64"))

PIP = f"{shlex.quote(sys.executable or 'python3')} -m pip install"  # for the Python that runs, whichever is on PATH
GIB = 1 << 30
LOW_SHARED_MEMORY = 256 << 20
LOW_MEMORY = 4 * GIB
LOW_DISK = 1 * GIB
GPU_PROBE = """
from max import driver
count = driver.accelerator_count()
gpus = [driver.Accelerator(i) for i in range(count)]
apart = [f"{a.id}-{b.id}" for a in gpus for b in gpus if a.id != b.id and not a.can_access(b)]
names = (driver.accelerator_api(), driver.accelerator_architecture_name()) if count else ("-", "-")
print(count, *names, ",".join(apart) or "-")
"""
TRIED = {
    "sm_90": "tested on H100 and H200",
    "sm_100": "only compiled for this architecture, not tested on one",
    "gfx942": "only compiled for this architecture, not tested on one",
}
"""By the beginning of an architecture's name: what README.md, "Support", says of it."""


@dataclass
class Check:
    """One line of the report: `status` is "ok", "note" or "missing"; `remedy` is empty where there is nothing to do."""

    name: str
    status: str
    detail: str
    remedy: str = ""


def check_python() -> Check:
    """Python's version against what MAX has wheels for."""
    version = platform.python_version()
    if MIN_PYTHON <= sys.version_info[:2] < TOO_NEW_PYTHON:
        return Check("python", "ok", f"{version} ({sys.executable})")
    span = f"3.{MIN_PYTHON[1]} to 3.{TOO_NEW_PYTHON[1] - 1}"
    return Check("python", "missing", f"{version}; needed is {span}", f"install Python {span} and use that")


def check_platform() -> Check:
    """Operating system and processor against what MAX is built for."""
    here = (platform.system(), platform.machine())
    detail = f"{here[0]} {platform.release()}, {here[1]}"
    if here in PLATFORMS:
        return Check("platform", "ok", detail)
    names = ", ".join(" ".join(pair) for pair in PLATFORMS)
    return Check("platform", "missing", detail, f"MAX runs on {names}; on Windows use WSL 2")


def check_max() -> Check:
    """Whether MAX is there, of the version that the kernels are written for, and can be imported."""
    remedy = f"{PIP} 'max=={MAX_VERSION}.*'"
    try:
        version = importlib.metadata.version("max")
    except importlib.metadata.PackageNotFoundError:
        return Check("max", "missing", "not installed", remedy)
    if version.split(".")[:2] != MAX_VERSION.split("."):
        return Check("max", "missing", f"{version}; needed is {MAX_VERSION}.*", remedy)
    problem = _run_python("import max.engine, max.graph")[1]
    if problem:
        return Check("max", "missing", f"{version}, but importing it fails: {problem}", f"{remedy} --force-reinstall")
    return Check("max", "ok", version)


def check_numpy() -> Check:
    """Whether NumPy is there and can be imported."""
    return _check_package("numpy", "numpy", "missing", "numpy", "")


def check_compiler() -> Check:
    """Whether the Mojo compiler runs, and whether it is the one that this MAX wants."""
    from .errors import EPError
    from .kernels import find_compiler

    try:
        compiler = find_compiler()
    except EPError as error:
        first = str(error).split(". Remedy:")[0].replace("\n", ";")
        return Check("mojo", "missing", first, error.remedy or "")
    detail = f"{compiler.version} ({compiler.command[0]})"
    try:
        wanted = importlib.metadata.version("mojo-compiler")
    except importlib.metadata.PackageNotFoundError:  # a conda environment does not have it as a Python package
        return Check("mojo", "ok", detail)
    if wanted not in compiler.version.split():
        remedy = "take the other mojo off PATH, or " + f"{PIP} --force-reinstall 'mojo-compiler=={wanted}'"
        return Check("mojo", "missing", f"{detail}; this MAX needs {wanted}", remedy)
    return Check("mojo", "ok", detail)


def check_cache() -> Check:
    """Whether the kernel cache can be written, and the room it has."""
    from .kernels import CACHE_VARIABLE, cache_directory

    directory = cache_directory()
    existing = directory
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        where = "nothing can be written there" if existing.is_dir() else f"{existing} is not a directory"
        # Without the variable, kernels.py falls back to a private directory under the temporary one.
        status = "missing" if os.environ.get(CACHE_VARIABLE) else "note"
        return Check("kernel cache", status, f"{directory}: {where}", f"set {CACHE_VARIABLE} to a directory of yours")
    free = shutil.disk_usage(existing).free
    if free < LOW_DISK:
        remedy = f"free some space, or set {CACHE_VARIABLE} to a directory on another disk"
        return Check("kernel cache", "note", f"{directory}, only {_size(free)} free", remedy)
    return Check("kernel cache", "ok", f"{directory}, {_size(free)} free")


def check_kernels() -> Check:
    """Whether the kernels are built, or can be."""
    from .errors import EPError
    from .kernels import cached_library, damaged_library, find_compiler, kernel_sources

    try:
        sources = kernel_sources()
    except EPError as error:
        return Check("kernels", "missing", str(error).split(". Remedy:")[0], error.remedy or "")
    try:
        find_compiler()
        path, damaged = cached_library(), damaged_library()
    except EPError:
        return Check("kernels", "missing", f"sources in {sources}, but nothing to compile them with", "see mojo above")
    if damaged is not None:
        return Check("kernels", "note", f"damaged: {damaged}", "nothing: they are compiled again on the next use")
    if path is None:
        return Check("kernels", "ok", f"sources in {sources}; compiled on first use (a few seconds)")
    return Check("kernels", "ok", f"compiled: {path}")


def check_shared_memory() -> Check:
    """The room for windows shared between processes (`Communicator.processes`)."""
    if not os.path.isdir("/dev/shm"):
        return Check("shared memory", "note", "there is no /dev/shm here; its room cannot be seen")
    usage = shutil.disk_usage("/dev/shm")
    detail = f"/dev/shm: {_size(usage.free)} free of {_size(usage.total)}"
    if not os.access("/dev/shm", os.W_OK):
        return Check("shared memory", "note", detail + ", not writable", "Communicator.processes needs to write there")
    if usage.free < LOW_SHARED_MEMORY:
        remedy = "for Communicator.processes enlarge it: docker run --shm-size=2g, or mount -o remount,size=2g /dev/shm"
        return Check("shared memory", "note", detail, remedy)
    return Check("shared memory", "ok", detail)


def check_cpu() -> Check:
    """Cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Check("cpu", "ok", f"{cores} {'core' if cores == 1 else 'cores'}")


def check_memory() -> Check:
    """Memory that is available now, a container's limit included."""
    total, available = _memory()
    if total is None:
        return Check("memory", "note", "unknown")
    detail = f"{_size(available)} available of {_size(total)}"
    if available < LOW_MEMORY:
        remedy = "compiling a graph takes about 3 GiB: close other programs, or raise the container's limit"
        return Check("memory", "note", detail, remedy)
    return Check("memory", "ok", detail)


def check_gpus() -> Check:
    """GPUs that MAX sees, whether they reach one another, and whether their kind was tested. None is no fault."""
    if importlib.util.find_spec("max") is None:
        return Check("gpus", "note", "not looked for: MAX is missing")
    text, problem = _run_python(GPU_PROBE)
    if problem:
        return Check("gpus", "note", f"MAX could not look for them: {problem}", "only needed to run on GPUs")
    count, api, architecture, apart = text.split()[-4:]
    if count == "0":
        return Check("gpus", "note", "none; the CPU is used")
    tried = next((words for start, words in TRIED.items() if architecture.startswith(start)), "")
    detail = f"{count} x {architecture} ({api}), {tried or 'an architecture that was never tried'}"
    remedy = (
        "" if tried else "see whether it compiles and runs: .venv/bin/python python/tools/gpu_check.py in the checkout"
    )
    if apart != "-":
        detail += f"; no peer access: {_first(apart.split(','))}"
        remedy = "Communicator.gpus needs GPUs that reach one another: nvidia-smi topo -p2p r shows which do"
    elif count != "1":
        detail += "; all pairs reach each other"
    return Check("gpus", "ok" if tried and apart == "-" else "note", detail, remedy)


def optional_checks() -> list[Check]:
    """Packages of the extras that something uses."""
    return [
        _check_package("matplotlib", "matplotlib", "note", "matplotlib", "only for plots of ep-mojo bench"),
        _check_package("ml_dtypes", "ml_dtypes", "note", "ml_dtypes", "only for the fp8 figures of ep-mojo bench"),
        _check_package("torch", "torch", "note", "torch", "only for Communicator.process_group and ep_mojo.torch"),
    ]


CHECKS: tuple[Callable[[], Check], ...] = (
    check_python,
    check_platform,
    check_max,
    check_numpy,
    check_compiler,
    check_cache,
    check_kernels,
    check_shared_memory,
    check_cpu,
    check_memory,
    check_gpus,
)


def run_checks() -> list[Check]:
    """All checks in order. A check that fails itself becomes a line of its own; the others still run."""
    checks = []
    for function in CHECKS:
        try:
            checks.append(function())
        except Exception as error:
            name = function.__name__.replace("check_", "").replace("_", " ")
            detail = f"the check itself failed: {type(error).__name__}: {error}"
            checks.append(Check(name, "missing", detail, "mend what is missing above, then run this again"))
    return checks + optional_checks()


def report(checks: list[Check]) -> str:
    """The lines that people read."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        label = "MISSING" if check.status == "missing" else check.status
        lines.append(f"{label:<7}  {check.name:<{width}}  {check.detail}")
        if check.remedy:
            lines.append(f"{'':<7}  {'':<{width}}  -> {check.remedy}")
    missing = [check.name for check in checks if check.status == "missing"]
    verdict = f"Missing: {', '.join(missing)}. Mend them in this order." if missing else "Everything required is here."
    return "\n".join([*lines, "", verdict])


def main(argv: list[str] | None = None) -> int:
    """Print the report; `--json` prints {"ok", "version", "checks": [{"name", "status", "detail", "remedy"}]} instead.

    Returns:
        0 when everything required is there, else 1.
    """
    parser = argparse.ArgumentParser(
        prog="ep-mojo doctor",
        description="Show what this machine has, what is missing, and how to mend it. Exit status 1: something is.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    args = parser.parse_args(argv)
    from . import __version__

    checks = run_checks()
    ok = all(check.status != "missing" for check in checks)
    if args.json:
        text = json.dumps({"ok": ok, "version": __version__, "checks": [asdict(check) for check in checks]}, indent=2)
    else:
        text = f"ep-mojo {__version__}\n{report(checks)}"
    return _print(text) or (0 if ok else 1)


def _print(text: str) -> int:
    """Print, also where nobody reads on (`| head -1`) or nothing can be written (`> /dev/full`: then returns 1)."""
    try:
        print(text, flush=True)
        return 0
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes when it ends
        if isinstance(error, BrokenPipeError):
            return 0
        print(f"ep-mojo: the report cannot be written: {error}. Remedy: write it elsewhere.", file=sys.stderr)
        return 1


def _check_package(name: str, module: str, status_if_absent: str, requirement: str, purpose: str) -> Check:
    remedy = f"{PIP} {requirement}"
    if importlib.util.find_spec(module) is None:
        return Check(name, status_if_absent, "not installed" + (f"; {purpose}" if purpose else ""), remedy)
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        version = "version unknown"
    # Optional packages are not imported: that can take seconds.
    problem = _run_python(f"import {module}")[1] if status_if_absent == "missing" else ""
    if problem:
        detail = f"{version}, but importing it fails: {problem}"
        return Check(name, status_if_absent, detail, f"{remedy} --force-reinstall")
    return Check(name, "ok", version)


def _run_python(code: str) -> tuple[str, str]:
    """(output, problem) of a Python process of its own, so that a crash or a hang in a library ends as a line here."""
    flags = [flag for flag, on in (("-S", sys.flags.no_site), ("-I", sys.flags.isolated)) if on]
    try:
        done = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", str(error)
    if done.returncode == 0:
        return done.stdout, ""
    return done.stdout, (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def _first(names: list[str], most: int = 6) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _memory() -> tuple[int | None, int]:
    """(total, available) bytes; (None, 0) where the system does not tell. Where only the total is known, it twice."""
    from .memory import available_bytes, total_bytes

    total, available = total_bytes(), available_bytes()
    if total is None:
        return None, 0
    return total, total if available is None else available


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / (1 << 20):.0f} MiB"


if __name__ == "__main__":
    sys.exit(main())
