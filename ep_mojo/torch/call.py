"""What graphs get: one block of words in host memory, with the addresses of all that an op reads and writes. Mirrors
`kernels/ep_mojo/ops/call.mojo`.

MAX's work for an input is the same for each, and a dispatch would have fourteen.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np

from ..comm.base import TABLE_NAMES
from ..config import MAX_RANKS
from ..dtypes import to_buffer, to_numpy
from ..layout import SETTING_N_SMS, SETTINGS_WORDS

if TYPE_CHECKING:
    import torch

    from ..comm import Communicator

QUEUE = SETTINGS_WORDS
COUNTERS = QUEUE + 1
RECV = COUNTERS + 2
COUNT = RECV + MAX_RANKS
TENSORS = COUNT + MAX_RANKS
N_TENSORS = 8
"""Tensors of a call; those that it does not have are absent."""
WORDS = TENSORS + 2 * N_TENSORS

_PAIRS = struct.Struct(f"={2 * N_TENSORS}q")
_WORD = struct.Struct("=q")
_ABSENT = 0, 0


class Call:
    """The block of one side of a rank, to be filled anew for each launch.

    Args:
        comm: Whose; of one rank.
        side: "dispatch" or "combine".

    Attributes:
        buffers: The inputs of a graph: what keeps the order of its ops, and the block.
    """

    def __init__(self, comm: Communicator, side: str):
        settings, *others = comm.inputs()
        by_name = dict(zip(TABLE_NAMES, others, strict=False))
        order, counters = others[len(TABLE_NAMES) :][:2]
        words = np.zeros(WORDS, np.int64)
        words[:SETTINGS_WORDS] = to_numpy(settings)
        words[COUNTERS : COUNTERS + 2] = counters._data_ptr(), counters.num_elements
        for at, window in ((RECV, "recv"), (COUNT, "count")):
            addresses = to_numpy(by_name[f"{side}_{window}_ptrs"]).view(np.int64)
            words[at : at + addresses.size] = addresses
        block = to_buffer(words)
        self.buffers = [order, block]
        self._memory = memoryview(to_numpy(block)).cast("B")

    def fill(self, n_sms: int, queue: int, tensors: tuple[torch.Tensor | None, ...]) -> None:
        """Say what the next launch is to do. The tensors must be contiguous, and live until it has been launched.

        Args:
            n_sms: The most SMs (on the host: worker threads), 0 = all.
            queue: What the driver knows the queue by; 0 on the host.
            tensors: As the op has them, up to `N_TENSORS`.
        """
        memory = self._memory
        _WORD.pack_into(memory, 8 * SETTING_N_SMS, n_sms)
        _WORD.pack_into(memory, 8 * QUEUE, queue)
        pairs: list[int] = []
        for tensor in tensors:
            pairs += _ABSENT if tensor is None else (tensor.data_ptr(), tensor.nbytes)
        pairs += _ABSENT * (N_TENSORS - len(tensors))
        _PAIRS.pack_into(memory, 8 * TENSORS, *pairs)
