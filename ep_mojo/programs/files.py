"""The files of `ep-mojo run`: read and checked array by array, written in one piece."""

from __future__ import annotations

import os
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..dtypes import as_bits
from ..errors import ConfigError, DTypeError, InputFileError, ShapeError
from ..layout import MAX_EXPERTS
from ..validate import Described

EXPERT_WEIGHTS = ("w_gate", "w_up", "w_down")
REQUIRED = ("x", "topk_ids", "topk_weights")
OPTIONAL = ("num_tokens", "n_experts", *EXPERT_WEIGHTS)
HELP = "`ep-mojo run --help` lists the arrays"


@dataclass
class Job:
    """A checked input file. R ranks, T tokens, H hidden size, K experts a token, E experts, F width.

    Attributes:
        x: [R, T, H], float32, float16, or uint16 bits of bfloat16.
        topk_ids: int32 [R, T, K]; -1 where there is no expert.
        topk_weights: float32 [R, T, K].
        num_tokens: R integers up to T.
        n_experts: E.
        w_gate, w_up, w_down: float32 [E, F, H], [E, F, H], [E, H, F], or None.
    """

    x: np.ndarray
    topk_ids: np.ndarray
    topk_weights: np.ndarray
    num_tokens: list[int]
    n_experts: int
    w_gate: np.ndarray | None
    w_up: np.ndarray | None
    w_down: np.ndarray | None


def read_job(path: Path) -> Job:
    """Read and check an input file.

    Raises:
        InputFileError: The file is missing, no .npz, truncated or corrupt, or lacks an array.
        ShapeError, DTypeError, ConfigError: An array does not fit the others.
    """
    arrays = read_npz(path)
    missing = [name for name in REQUIRED if name not in arrays]
    if missing:
        raise InputFileError(
            f"{path} lacks {', '.join(missing)}",
            field="arrays",
            value=Described(", ".join(sorted(arrays)) or "none"),
            allowed=f"{', '.join(REQUIRED)}, and optionally {', '.join(OPTIONAL)}",
            remedy=f"save the missing arrays with numpy.savez; {HELP}",
        )
    x = as_bits(arrays["x"])
    _check_dtype("x", x, ("float32", "float16", "uint16"))
    _check_shape("x", x, ["R", "T", "H"])
    n_ranks, tokens, hidden = x.shape
    ids, weights = arrays["topk_ids"], arrays["topk_weights"]
    _check_dtype("topk_ids", ids, ("int32", "int64"))
    _check_shape("topk_ids", ids, [n_ranks, tokens, "K"])
    _check_dtype("topk_weights", weights, ("float32",))
    _check_shape("topk_weights", weights, list(ids.shape))
    counts = _num_tokens(arrays.get("num_tokens"), n_ranks, tokens)
    given = {name: arrays[name] for name in EXPERT_WEIGHTS if name in arrays}
    n_experts = _check_experts(given, hidden) if given else _count_experts(arrays.get("n_experts"), ids, n_ranks)
    if given and "n_experts" in arrays:
        _check_shape("w_gate", given["w_gate"], [_count_experts(arrays["n_experts"], ids, n_ranks), "F", hidden])
    ids = np.where((ids >= 0) & (ids < n_experts), ids, -1).astype(np.int32)
    return Job(x, ids, weights, counts, n_experts, *(given.get(name) for name in EXPERT_WEIGHTS))


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file that this program knows, in native byte order; others are named on stderr. Pickled
    objects are never loaded.

    Raises:
        InputFileError: The file is missing, no .npz, truncated or corrupt.
    """
    remedy = f"write it again with numpy.savez; {HELP}"
    try:
        if not zipfile.is_zipfile(path):
            with open(path, "rb") as file:  # raises what is wrong with the path, if something is
                start = file.read(6)
            kind = (
                "empty" if not start else "a .npy file" if start == b"\x93NUMPY" else "not an .npz file, or truncated"
            )
            raise InputFileError(f"the file is {kind}", field="input", value=str(path), remedy=remedy)
        with np.load(path, allow_pickle=False) as archive:
            others = [name for name in archive.files if name not in (*REQUIRED, *OPTIONAL)]
            if others:
                print(f"{path}: not used: {', '.join(others)}; {HELP}", file=sys.stderr)
            return {name: _native(archive[name]) for name in archive.files if name not in others}
    except OSError as error:
        what = error.strerror or str(error)
        raise InputFileError(
            what, field="input", value=str(path), remedy="check the path and its permissions"
        ) from error
    except MemoryError as error:
        raise InputFileError(
            f"its arrays do not fit into memory: {error}", field="input", value=str(path), remedy="use fewer tokens"
        ) from error
    except InputFileError:
        raise
    except Exception as error:  # NumPy's parser and zlib raise whatever a damaged file makes them meet
        what = f"the file is corrupt or holds something other than plain arrays ({type(error).__name__}: {error})"
        raise InputFileError(what, field="input", value=str(path), remedy=remedy) from error


def check_writable(path: Path, option: str = "output") -> None:
    """Raise `InputFileError` unless a file can be written at `path`, which `option` gave; before the work."""
    parent = path.parent
    if path.is_dir():
        problem, remedy = "it is a directory", "name a file in it"
    elif not parent.is_dir():
        problem, remedy = f"there is no directory {parent}", f"make it first: mkdir -p {parent}"
    elif not os.access(parent, os.W_OK | os.X_OK):
        problem, remedy = f"nothing can be written to {parent}", "choose a directory of yours"
    else:
        return
    raise InputFileError(problem, field=option, value=str(path), remedy=remedy)


def write_atomically(path: Path, content: dict[str, np.ndarray] | str | bytes) -> None:
    """Write a file beside `path` and rename it: `path` is complete, or what it was before.

    Args:
        path: File to write or replace.
        content: Arrays for an .npz file, or text, or bytes.

    Raises:
        InputFileError: It cannot be written.
    """
    check_writable(path)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = file.name
            if isinstance(content, dict):
                np.savez(file, **content)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        what = error.strerror or str(error)
        raise InputFileError(
            what, field="output", value=str(path), remedy="free some space, or write somewhere else"
        ) from error
    finally:
        if temporary is not None:
            os.unlink(temporary)


def _native(array: np.ndarray) -> np.ndarray:
    if not isinstance(array, np.ndarray):  # NumPy gives the bytes of a member that is no .npy
        raise ValueError("a member is no .npy file")
    order = array.dtype.newbyteorder("=") if array.dtype.kind in "fiu" else array.dtype
    return np.asarray(array, order, order="C")


def _check_dtype(name: str, array: np.ndarray, allowed: tuple[str, ...]) -> None:
    if array.dtype.name not in allowed:
        raise DTypeError(
            field=name,
            value=_describe(array),
            allowed=" or ".join(allowed) + (" (bits of bfloat16)" if "uint16" in allowed else ""),
            remedy="convert it before saving; nothing is cast silently",
        )


def _check_shape(name: str, array: np.ndarray, shape: list[int | str]) -> None:
    fits = array.ndim == len(shape) and all(
        isinstance(want, str) or got == want for got, want in zip(array.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(map(str, shape))
        raise ShapeError(field=name, value=_describe(array), allowed=f"[{wanted}]", remedy=f"save it so; {HELP}")


def _describe(array: np.ndarray) -> Described:
    return Described(f"{array.dtype.name} {list(array.shape)}")


def _num_tokens(array: np.ndarray | None, n_ranks: int, tokens: int) -> list[int]:
    if array is None:
        return [tokens] * n_ranks
    _check_dtype("num_tokens", array, ("int32", "int64"))
    _check_shape("num_tokens", array, [n_ranks])
    for rank, count in enumerate(array):
        if not 0 <= count <= tokens:
            raise ShapeError(
                field=f"num_tokens[{rank}]",
                value=int(count),
                allowed=f"0 to T = {tokens}",
                remedy="count the rows of x that hold tokens",
            )
    return [int(count) for count in array]


def _check_experts(given: dict[str, np.ndarray], hidden: int) -> int:
    missing = [name for name in EXPERT_WEIGHTS if name not in given]
    if missing:
        raise InputFileError(
            f"{', '.join(missing)} missing",
            field="expert weights",
            value=Described(", ".join(given)),
            allowed=f"{', '.join(EXPERT_WEIGHTS)}: all three or none",
            remedy="add the missing ones, or leave all out for experts that give back what they get",
        )
    for name, array in given.items():
        _check_dtype(name, array, ("float32",))
    _check_shape("w_gate", given["w_gate"], ["E", "F", hidden])
    n_experts, width, _ = given["w_gate"].shape
    _check_shape("w_up", given["w_up"], [n_experts, width, hidden])
    _check_shape("w_down", given["w_down"], [n_experts, hidden, width])
    return n_experts


def _count_experts(array: np.ndarray | None, ids: np.ndarray, n_ranks: int) -> int:
    if array is None:
        largest = int(ids.max(initial=0))
        if largest >= MAX_EXPERTS:
            raise ConfigError(
                field="topk_ids",
                value=largest,
                allowed=f"ids below {MAX_EXPERTS}",
                remedy="correct the ids, or add n_experts to the file: ids from there on then count as none",
            )
        return max(-(-(largest + 1) // max(n_ranks, 1)), 1) * max(n_ranks, 1)
    _check_dtype("n_experts", array, ("int32", "int64"))
    _check_shape("n_experts", array, [])
    return int(array)
