"""Free memory: the machine's, less what a container's limit takes away; file cache counts as free."""

from __future__ import annotations

import os

import pytest

from ep_mojo import memory

GIB = 1 << 30
MEMINFO = "MemTotal:       16777216 kB\nMemFree:  1 kB\nMemAvailable:    8388608 kB\nHugePages_Total:       0\n"
STAT = f"anon 5\ninactive_file {GIB}\nactive_file {GIB}\nfile {9 * GIB}\n"
STAT_1 = f"inactive_file 5\ntotal_inactive_file {GIB}\ntotal_active_file {GIB}\n"
NO_LIMIT = 9223372036854771712


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Write files of /proc and /sys/fs/cgroup: `machine({path: text}, own=...)`."""

    def write(files, own="0::/\n", meminfo=MEMINFO):
        for path, text in {**{f"groups/{p}": t for p, t in files.items()}, "own": own, "meminfo": meminfo}.items():
            if text is not None:
                os.makedirs(os.path.dirname(tmp_path / path), exist_ok=True)
                (tmp_path / path).write_text(str(text))
        monkeypatch.setattr(memory, "MEMINFO", str(tmp_path / "meminfo"))
        monkeypatch.setattr(memory, "OWN_GROUPS", str(tmp_path / "own"))
        monkeypatch.setattr(memory, "GROUPS", str(tmp_path / "groups"))

    return write


def group(path, limit, used, stat=STAT, version=2):
    limit_name, used_name, _ = memory.VERSION_2 if version == 2 else memory.VERSION_1
    files = {limit_name: limit, used_name: used, "memory.stat": stat}
    return {os.path.join(path, name): text for name, text in files.items()}


V1 = {"stat": STAT_1, "version": 1}
IN_SLICE = "0::/user/shell\n"
CASES = {
    "no_group": ({}, "0::/\n", 16, 8),
    "no_limit": (group("", "max", 3 * GIB), "0::/\n", 16, 8),
    "container": (group("", 4 * GIB, 3 * GIB), "0::/\n", 4, 3),
    "more_cache_than_usage": (group("", 4 * GIB, GIB), "0::/\n", 4, 4),
    "over_the_limit": (group("", 4 * GIB, 9 * GIB), "0::/\n", 4, 0),
    "machine_is_less": (group("", 64 * GIB, 3 * GIB), "0::/\n", 16, 8),
    "no_stat": (group("", 4 * GIB, 3 * GIB, stat=None), "0::/\n", 4, 1),
    "own_group": (group("user/shell", 4 * GIB, 3 * GIB), IN_SLICE, 4, 3),
    "a_group_above": (group("user", 5 * GIB, 3 * GIB) | group("user/shell", "max", 0), IN_SLICE, 5, 4),
    "somebody_elses": (group("other", GIB, GIB), IN_SLICE, 16, 8),
    "version_1": (group("memory", 4 * GIB, 3 * GIB, **V1), "4:memory:/host/path\n2:cpu:/\n", 4, 3),
    "version_1_no_limit": (group("memory", NO_LIMIT, 3 * GIB, **V1), "4:memory:/\n0::/\n", 16, 8),
    "version_1_own_group": (group("memory/a/b", 2 * GIB, 3 * GIB, **V1), "4:memory:/a/b\n", 2, 1),
    "no_list_of_groups": (group("", 4 * GIB, 3 * GIB), None, 4, 3),
    "not_a_list_of_groups": (group("", 4 * GIB, 3 * GIB), "?\n", 4, 3),
}


@pytest.mark.parametrize(("files", "own", "total", "available"), CASES.values(), ids=CASES)
def test_limits(machine, files, own, total, available):
    machine(files, own)
    assert memory.total_bytes() == total * GIB
    assert memory.available_bytes() == available * GIB


def test_without_proc_nobody_knows_what_is_free(machine):
    machine({}, own=None, meminfo=None)
    assert memory.available_bytes() is None
    total = memory.total_bytes()
    assert total is None or total > 0


def test_this_machine():
    total, available = memory.total_bytes(), memory.available_bytes()
    assert total is None or total > 0
    assert available is None or 0 < available <= total
