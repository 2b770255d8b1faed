"""A rank's block in POSIX shared memory: mapped by every rank, made by the parent of the workers or by the rank itself.

The memory never outlives the processes that map it. On Linux a block has no name at any moment (O_TMPFILE in /dev/shm);
elsewhere the name goes in the same breath in which it was made. Workers get file descriptors over their control
sockets; ranks of a process group open their peers' descriptors by /proc, or the block by its name where there is no
/proc: then the name goes when all have it. Pages are reserved when the block is made, so that a full /dev/shm is a
`SharedMemoryError` there and not a bus error later.

Header of a block (first page; little endian):

    0       magic "EPMOJSHM", u32 layout version, i32 rank, u32 n_ranks, u32 0, u64 config hash, u64 group,
            u64 bytes of the block, u64 bytes of each part in the order of `windows.PARTS`
    1024    u8 [R] lost: 1 once the process of that rank is gone, 2 once it has left by itself; written by the parent,
            or by any rank of a process group
"""

from __future__ import annotations

import errno
import mmap
import os
import secrets
import struct

import numpy as np

from .. import layout
from ..config import EPConfig
from ..errors import ConfigMismatchError, CorruptHeadError, SharedMemoryError
from ..memory import available_bytes
from . import windows
from .signals import deferred
from .windows import RankMemory

SHM_DIR = "/dev/shm"
MAGIC = b"EPMOJSHM"
HEADER = struct.Struct("<8sIiIIQQQ5Q")
LOST_OFFSET = 1024
NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)
REMEDY = (
    "lower max_tokens_per_rank, num_buffers or n_ranks; or enlarge shared memory "
    "(docker run --shm-size=..., mount -o remount,size=... /dev/shm)"
)


def new_group() -> int:
    """A random number that tells the blocks of one communicator from those of others."""
    return secrets.randbits(63)


def create(cfg: EPConfig, rank: int, group: int, fds: list[int], names: list[str] | None = None) -> RankMemory:
    """Make and reserve a rank's block: windows zero, header and counters head written.

    Args:
        cfg: The config.
        rank: Whose block it is.
        group: From `new_group`.
        fds: The block's file descriptor is appended, as soon as there is one; the caller closes it, come what may.
        names: Where given, the block gets a name, which is appended; the caller unlinks it, come what may.

    Raises:
        SharedMemoryError: There is not enough shared memory, or there are no more file descriptors.
    """
    size = windows.block_bytes(cfg)
    try:
        with deferred():
            fds.append(_open_unnamed() if names is None else _open_named(names))
    except (OSError, ImportError) as e:
        raise no_descriptors(rank, e) or SharedMemoryError(
            f"rank {rank}: shared memory cannot be opened ({e})",
            field="bytes needed",
            value=size,
            allowed=f"a writable {SHM_DIR}",
            remedy="mount a tmpfs there, or use Communicator.cpu",
        ) from e
    try:
        _reserve(fds[-1], size)
        memory = RankMemory(cfg, rank, mmap.mmap(fds[-1], size))
    except (OSError, ValueError, OverflowError) as e:
        raise no_descriptors(rank, e) or _too_small(size, free_bytes(), f"rank {rank}: {e}") from e
    header = HEADER.pack(
        MAGIC, layout.LAYOUT_VERSION, rank, cfg.n_ranks, 0, cfg.config_hash(), group, size, *_sizes(cfg)
    )
    memory.header[: HEADER.size] = np.frombuffer(header, np.uint8)
    layout.write_head(memory.counters, cfg, rank)
    return memory


def check_free(cfg: EPConfig) -> None:
    """Raise `SharedMemoryError` if the blocks of all ranks do not fit, with the bytes needed and free."""
    need, free = cfg.n_ranks * windows.block_bytes(cfg), free_bytes()
    if free is not None and need > free:
        raise _too_small(need, free, f"{cfg.n_ranks} ranks")


def create_all(cfg: EPConfig, fds: list[int]) -> tuple[list[RankMemory], int]:
    """Make the blocks of all ranks, after a look whether they fit.

    Args:
        cfg: The config.
        fds: The blocks' file descriptors are appended; the caller closes them, also after an error or a Ctrl-C.

    Returns:
        The blocks, and the group.

    Raises:
        SharedMemoryError: They do not fit, with the bytes needed and free; or there are no more file descriptors.
    """
    check_free(cfg)
    group = new_group()
    return [create(cfg, rank, group, fds) for rank in range(cfg.n_ranks)], group


def attach(fd: int, cfg: EPConfig, rank: int, group: int, my_rank: int) -> RankMemory:
    """Map the block of `rank` in the process of `my_rank`. The descriptor can be closed afterwards.

    Raises:
        SharedMemoryError: The segment is shorter than the config says.
        CorruptHeadError: The header is not one that this version wrote for this rank and communicator.
        ConfigMismatchError: The block was made for another config.
    """
    size = windows.block_bytes(cfg)
    try:
        given = os.fstat(fd).st_size
        if given < size:
            raise ValueError(f"{given} bytes")
        block = mmap.mmap(fd, size)
    except (OSError, ValueError) as e:
        raise SharedMemoryError(
            f"rank {my_rank} cannot map the windows of rank {rank}",
            field="segment",
            value=str(e),
            allowed=f"{size} bytes",
            remedy="make a new communicator with one config for all ranks",
        ) from e
    memory = RankMemory(cfg, rank, block)
    check_header(memory, group, my_rank)
    return memory


def check_header(memory: RankMemory, group: int, my_rank: int) -> None:
    """Check a block's header against what its config and rank say; see `attach` for the errors."""
    cfg, rank = memory.cfg, memory.rank
    magic, version, owner, n_ranks, _, config_hash, seen_group, size, *sizes = HEADER.unpack(
        memory.header[: HEADER.size].tobytes()
    )
    for name, seen, expected in (
        ("magic", magic, MAGIC),
        ("layout_version", version, layout.LAYOUT_VERSION),
        ("rank", owner, rank),
    ):
        if seen != expected:
            raise _corrupt(my_rank, rank, name, seen, expected)
    if config_hash != cfg.config_hash() or n_ranks != cfg.n_ranks:
        raise ConfigMismatchError(
            f"rank {rank} was made for {n_ranks} ranks with config hash {config_hash:#x}, rank {my_rank} for "
            f"{cfg.n_ranks} ranks with {cfg.config_hash():#x}",
            field=f"config of rank {rank}",
            value=hex(config_hash),
            allowed=hex(cfg.config_hash()),
            remedy="give every rank the same EPConfig",
        )
    for name, seen, expected in (
        ("group", seen_group, group),
        ("bytes", (size, *sizes), (windows.block_bytes(cfg), *_sizes(cfg))),
    ):
        if seen != expected:
            raise _corrupt(my_rank, rank, name, seen, expected)


def lost_flags(memory: RankMemory) -> np.ndarray:
    """uint8 [R], a view: which ranks' processes are gone."""
    return memory.header[LOST_OFFSET : LOST_OFFSET + memory.cfg.n_ranks]


def free_bytes() -> int | None:
    """Bytes that shared memory can still take: free in /dev/shm, on the machine and in the container. None: unknown."""
    known = [available_bytes()]
    try:
        stat = os.statvfs(SHM_DIR)
        known.append(stat.f_bavail * stat.f_frsize)
    except OSError:
        pass
    return min((n for n in known if n is not None), default=None)


def open_path(path: str) -> int:
    """A descriptor of a peer's block, by /proc or by name. Raises OSError."""
    if path.startswith("/proc/"):
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    import _posixshmem

    return _posixshmem.shm_open(path, os.O_RDWR, mode=0o600)


def unlink_all(names: list[str]) -> None:
    """Take the names of blocks away, and empty the list."""
    import _posixshmem

    with deferred():
        while names:
            _posixshmem.shm_unlink(names.pop())


def close_all(fds: list[int]) -> None:
    """Close file descriptors, and empty the list."""
    with deferred():
        while fds:
            os.close(fds.pop())


def no_descriptors(rank: int, error: Exception) -> SharedMemoryError | None:
    """The error where it is file descriptors that have run out."""
    if getattr(error, "errno", None) not in NO_DESCRIPTORS:
        return None
    whose = "this process" if error.errno == errno.EMFILE else "this machine"
    return SharedMemoryError(
        f"rank {rank}: {whose} has no file descriptors left for shared memory ({error})",
        remedy="close files and sockets, or allow more: ulimit -n",
    )


def _open_unnamed() -> int:
    if hasattr(os, "O_TMPFILE") and os.path.isdir(SHM_DIR):
        try:
            return os.open(SHM_DIR, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as e:
            if e.errno in NO_DESCRIPTORS:
                raise
            # else a file system without O_TMPFILE
    names: list[str] = []
    try:
        return _open_named(names)
    finally:
        unlink_all(names)


def _open_named(names: list[str]) -> int:
    import _posixshmem

    name = f"/epmojo-{secrets.token_hex(8)}"
    fd = _posixshmem.shm_open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR, mode=0o600)
    names.append(name)
    return fd


def _reserve(fd: int, size: int) -> None:
    os.ftruncate(fd, size)
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, size)


def _sizes(cfg: EPConfig) -> list[int]:
    sizes = windows.part_bytes(cfg)
    return [sizes[name] for name in windows.PARTS]


def _too_small(need: int, free: int | None, what: str) -> SharedMemoryError:
    return SharedMemoryError(
        f"the windows do not fit into shared memory ({what})",
        field="bytes needed",
        value=need,
        allowed=f"at most {free} bytes free" if free is not None else "what is free",
        remedy=REMEDY,
    )


def _corrupt(my_rank: int, rank: int, name: str, seen: object, expected: object) -> CorruptHeadError:
    return CorruptHeadError(
        f"rank {my_rank} found a damaged header in the block of rank {rank}",
        field=name,
        value=seen,
        allowed=str(expected),
        remedy="make a new communicator; nothing else may write to its memory",
    )
