"""Blocks in shared memory: headers checked, sizes reserved, no names left behind."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from ep_mojo import layout
from ep_mojo.comm import Communicator, shm, windows
from ep_mojo.config import EPConfig
from ep_mojo.errors import ConfigMismatchError, CorruptHeadError, SharedMemoryError
from ep_mojo.formats import BlockwiseFP8

CFG = EPConfig(hidden_size=128, top_k=2, n_experts=6, max_tokens_per_rank=5, n_ranks=3)


@pytest.fixture
def block():
    """A block of rank 1 of group 77: descriptor and memory."""
    fds = []
    memory = shm.create(CFG, 1, 77, fds)
    yield fds[0], memory
    shm.close_all(fds)


def test_two_mappings_are_one_memory(block):
    fd, memory = block
    other = shm.attach(fd, CFG, 1, 77, my_rank=0)
    layout.check_head(other.counters, CFG, 1)
    for i, name in enumerate(windows.PARTS):
        getattr(memory, name).view(np.uint8)[-1] = i + 1
        assert getattr(other, name).view(np.uint8)[-1] == i + 1, name
        assert memory.address(name) != other.address(name)
        assert other.address(name) % 4096 == 0
    shm.lost_flags(memory)[2] = 1
    assert shm.lost_flags(other).tolist() == [0, 0, 1]
    shm.check_header(other, 77, 0)


def test_the_block_is_reserved_and_private(block):
    fd, _ = block
    stat = os.fstat(fd)
    assert stat.st_size >= windows.block_bytes(CFG)
    assert stat.st_mode & 0o777 == 0o600
    if sys.platform == "linux":
        assert stat.st_blocks * 512 >= windows.block_bytes(CFG), "pages must be there before anyone writes"
        assert stat.st_nlink == 0, "the block must have no name"


def test_without_unnamed_files_the_name_goes_at_once(monkeypatch):
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    before = set(os.listdir(shm.SHM_DIR)) if os.path.isdir(shm.SHM_DIR) else set()
    fds = []
    memory = shm.create(CFG, 0, 1, fds)
    assert os.fstat(fds[0]).st_nlink == 0
    assert os.fstat(fds[0]).st_mode & 0o777 == 0o600
    shm.check_header(memory, 1, 2)
    shm.close_all(fds)
    if os.path.isdir(shm.SHM_DIR):
        assert {n for n in os.listdir(shm.SHM_DIR) if n.startswith("epmojo")} <= before


DAMAGE = {
    "magic": (0, CorruptHeadError, "magic.*rank 0 found a damaged header in the block of rank 1"),
    "version": (8, CorruptHeadError, "layout_version"),
    "rank": (12, CorruptHeadError, "rank = -?[0-9]+"),
    "n_ranks": (16, ConfigMismatchError, "rank 1 was made for .* ranks"),
    "hash": (24, ConfigMismatchError, f"{CFG.config_hash():#x}"),
    "group": (32, CorruptHeadError, "group"),
    "bytes": (40, CorruptHeadError, "bytes"),
    "part": (72, CorruptHeadError, "bytes"),
}


@pytest.mark.parametrize(("offset", "error", "match"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_headers_are_named(block, offset, error, match):
    fd, memory = block
    memory.header[offset] ^= 0x55
    with pytest.raises(error, match=match):
        shm.attach(fd, CFG, 1, 77, my_rank=0)


def test_another_config_names_both_ranks_and_values(block):
    fd, _ = block
    other = CFG.replace(dispatch_format=BlockwiseFP8())
    with pytest.raises(ConfigMismatchError, match="rank 1 was made.*rank 2") as caught:
        shm.attach(fd, other, 1, 77, my_rank=2)
    assert f"{CFG.config_hash():#x}" in str(caught.value)
    assert f"{other.config_hash():#x}" in str(caught.value)


def test_a_truncated_segment_is_named_not_mapped(block):
    fd, memory = block
    with pytest.raises(SharedMemoryError, match=f"rank 0 cannot map.*{windows.block_bytes(CFG)} bytes"):
        fd2 = os.memfd_create("short") if hasattr(os, "memfd_create") else os.open(os.devnull, os.O_RDWR)
        try:
            shm.attach(fd2, CFG, 1, 77, my_rank=0)
        finally:
            os.close(fd2)


def test_too_little_memory_says_how_much(monkeypatch):
    need = 3 * windows.block_bytes(CFG)
    monkeypatch.setattr(shm, "free_bytes", lambda: need - 1)
    gc.collect()  # what earlier tests have left
    before = len(os.listdir("/dev/fd"))
    with pytest.raises(SharedMemoryError, match=f"bytes needed = {need}.*at most {need - 1} bytes free.*--shm-size"):
        Communicator.processes(CFG)
    monkeypatch.setattr(shm, "free_bytes", lambda: need)
    fds = []
    memories, _ = shm.create_all(CFG, fds)
    assert [m.rank for m in memories] == [0, 1, 2]
    shm.close_all(fds)
    del memories
    assert len(os.listdir("/dev/fd")) == before


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs posix_fallocate")
def test_memory_that_is_taken_meanwhile_is_no_bus_error(monkeypatch):
    calls = []

    def full(fd, offset, size):
        calls.append(size)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    gc.collect()  # what earlier tests have left
    before = len(os.listdir("/dev/fd"))
    with pytest.raises(SharedMemoryError, match="rank 1: .*No space left"):
        Communicator.processes(CFG)
    assert calls == [windows.block_bytes(CFG)] * 2
    assert len(os.listdir("/dev/fd")) == before


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs posix_fallocate")
def test_an_interrupt_while_memory_is_reserved_leaves_nothing(monkeypatch):
    sizes = []

    def interrupted(fd, offset, size):
        sizes.append(size)
        if len(sizes) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(os, "posix_fallocate", interrupted)
    gc.collect()  # what earlier tests have left
    before = len(os.listdir("/dev/fd"))
    with pytest.raises(KeyboardInterrupt):
        Communicator.processes(CFG)
    assert len(os.listdir("/dev/fd")) == before


@pytest.mark.parametrize("call", ["open", "mmap"])
def test_no_more_file_descriptors_are_no_lack_of_memory(monkeypatch, call):
    def fail(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    if call == "open" and not (hasattr(os, "O_TMPFILE") and os.path.isdir(shm.SHM_DIR)):
        pytest.skip("needs O_TMPFILE in /dev/shm")
    monkeypatch.setattr(*{"open": (shm.os, "open"), "mmap": (shm.mmap, "mmap")}[call], fail)
    gc.collect()  # what earlier tests have left
    before = len(os.listdir("/dev/fd"))
    with pytest.raises(SharedMemoryError, match="rank 0: this process has no file descriptors left.*ulimit -n"):
        Communicator.processes(CFG)
    assert len(os.listdir("/dev/fd")) == before


def test_free_bytes_of_this_machine():
    free = shm.free_bytes()
    assert free is None or free > 0


def test_free_bytes_is_the_least_of_what_limits_it(monkeypatch):
    monkeypatch.setattr(shm, "available_bytes", lambda: 4096)
    assert shm.free_bytes() in (0, 4096)
    monkeypatch.setattr(shm, "available_bytes", lambda: None)
    monkeypatch.setattr(shm, "SHM_DIR", "/nowhere")
    assert shm.free_bytes() is None


SMALL_SHM = """
    import sys; sys.path[:] = {path!r}
    from ep_mojo.comm import Communicator
    from ep_mojo.config import EPConfig
    from ep_mojo.errors import SharedMemoryError
    from ep_mojo.comm import shm
    cfg = EPConfig(hidden_size=8192, top_k=2, n_experts=4, max_tokens_per_rank=32, n_ranks=2)
    try:
        Communicator.processes(cfg)
    except SharedMemoryError as e:
        print("before:", e)
    shm.free_bytes = lambda: None
    try:
        Communicator.processes(cfg)
    except SharedMemoryError as e:
        print("inside:", e)
    Communicator.processes(cfg.replace(hidden_size=8)).destroy()
    print("small works")
"""


def test_a_really_full_dev_shm():
    """In a mount namespace of its own, /dev/shm holds 2 MB."""
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    code = textwrap.dedent(SMALL_SHM.format(path=sys.path))
    mount = 'mount -t tmpfs -o size=2m tmpfs /dev/shm || exit 77; exec "$0" -c "$1"'
    done = subprocess.run(
        ["unshare", "-m", "-r", "sh", "-c", mount, sys.executable, code], capture_output=True, text=True, timeout=120
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"no mount namespace here: {done.stderr.strip()[:200]}")
    assert done.returncode == 0, done.stderr
    assert "before: bytes needed = " in done.stdout
    assert "at most 2097152 bytes free" in done.stdout
    assert "inside: " in done.stdout
    assert "No space left on device" in done.stdout
    assert "small works" in done.stdout
