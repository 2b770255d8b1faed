"""How much memory this machine has and can still give, a container's limit included. Standard library alone."""

from __future__ import annotations

import os
from collections.abc import Iterator

MEMINFO = "/proc/meminfo"
OWN_GROUPS = "/proc/self/cgroup"
GROUPS = "/sys/fs/cgroup"
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
VERSION_2 = ("memory.max", "memory.current", ("inactive_file", "active_file"))
"""Of a control group: the files of limit and usage, and what of the usage is file cache, which goes when needed."""


def total_bytes() -> int | None:
    """Bytes of memory that this process can have at most, or None where the system does not tell."""
    known = [limit for limit, _ in _limits()]
    machine = _meminfo().get("MemTotal")
    if machine is None:
        try:
            machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, OSError, ValueError):
            return None
    return min(machine, *known) if known else machine


def available_bytes() -> int | None:
    """Bytes that can still be allocated without swapping, or None where the system does not tell (macOS)."""
    known = [max(limit - used, 0) for limit, used in _limits()]
    machine = _meminfo().get("MemAvailable")
    return min([*known, *([] if machine is None else [machine])], default=None)


def _meminfo() -> dict[str, int]:
    try:
        with open(MEMINFO, encoding="ascii") as file:
            pairs = (line.split(":", 1) for line in file)
            return {name: int(rest.split()[0]) * 1024 for name, rest in pairs}
    except (OSError, ValueError, IndexError):
        return {}


def _limits() -> Iterator[tuple[int, int]]:
    """(limit, usage) in bytes of every control group around this process that has a limit. Usage is without file cache.

    A container sees its own group where others see the root, and may not see the path that it has on the host; so
    paths that are not there are passed over.
    """
    paths = {GROUPS: VERSION_2, os.path.join(GROUPS, "memory"): VERSION_1}
    try:
        with open(OWN_GROUPS, encoding="utf-8") as file:
            own = [line.rstrip("\n").split(":", 2) for line in file]
    except OSError:
        own = []
    for _, controllers, path in (entry for entry in own if len(entry) == 3):
        if controllers not in ("", "memory"):
            continue
        root, version = (os.path.join(GROUPS, "memory"), VERSION_1) if controllers else (GROUPS, VERSION_2)
        parts = [part for part in path.split("/") if part]
        paths |= {os.path.join(root, *parts[:n]): version for n in range(1, len(parts) + 1)}
    for path, (limit_name, usage_name, cache_names) in paths.items():
        try:
            limit = int(_read(path, limit_name))  # "max" is none
            usage = int(_read(path, usage_name))
        except (OSError, ValueError):
            continue
        yield limit, max(usage - _file_cache(path, cache_names), 0)


def _file_cache(path: str, names: tuple[str, ...]) -> int:
    try:
        fields = dict(line.split() for line in _read(path, "memory.stat").splitlines())
        return sum(int(fields.get(name, 0)) for name in names)
    except (OSError, ValueError):
        return 0


def _read(path: str, name: str) -> str:
    with open(os.path.join(path, name), encoding="ascii") as file:
        return file.read()
