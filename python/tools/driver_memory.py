"""How much memory of GPUs is in use, asked of CUDA's driver: needs neither torch nor MAX."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ep_mojo.errors import DeviceError


class Gpus:
    """Bytes in use on some GPUs, by the driver, whoever uses them."""

    def __init__(self, ordinals: Sequence[int]):
        """Make their contexts."""
        try:
            self._cuda = ctypes.CDLL("libcuda.so.1")
        except OSError as e:
            raise DeviceError(f"CUDA's driver cannot be asked for memory: {e}", remedy="run on NVIDIA GPUs") from e
        self._call("cuInit", 0)
        self._contexts = []
        for ordinal in ordinals:
            device, context = ctypes.c_int(), ctypes.c_void_p()
            self._call("cuDeviceGet", ctypes.byref(device), ordinal)
            self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
            self._contexts.append(context)

    def _call(self, name: str, *args: Any) -> None:
        if status := getattr(self._cuda, name)(*args):
            raise DeviceError(field=name, value=status, allowed="0", remedy="see `ep-mojo doctor`")

    def used(self) -> np.ndarray:
        """int64 [GPUs]."""
        found, gone = [], ctypes.c_void_p()
        for context in self._contexts:
            free, total = ctypes.c_size_t(), ctypes.c_size_t()
            self._call("cuCtxPushCurrent_v2", context)
            self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
            self._call("cuCtxPopCurrent_v2", ctypes.byref(gone))
            found.append(total.value - free.value)
        return np.array(found, np.int64)

    @contextlib.contextmanager
    def watched(self) -> Iterator[list[np.ndarray]]:
        """Look all the time meanwhile; gives a list whose entry is the most that was seen."""
        most, over = [self.used()], threading.Event()

        def look() -> None:
            while not over.wait(2e-4):
                most[0] = np.maximum(most[0], self.used())

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield most
        finally:
            over.set()
            thread.join()
            most[0] = np.maximum(most[0], self.used())
