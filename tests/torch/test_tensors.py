"""How tensors become MAX buffers, and what `dense` leaves alone: no rounds, one process."""

from __future__ import annotations

import pytest
import torch
from max.dtype import DType

from ep_mojo.torch.tensors import dense, to_buffers

HOST = torch.device("cpu")


@pytest.mark.parametrize(
    ("dtype", "want"),
    [
        (torch.bfloat16, DType.bfloat16),
        (torch.float8_e4m3fn, DType.uint8),  # MAX has no float8 on the host
        (torch.int64, DType.int64),
    ],
)
def test_buffers_are_the_memory_of_tensors(dtype, want):
    tensor = torch.zeros(3, 8, dtype=dtype)
    (buffer,) = to_buffers([tensor], HOST)
    assert (buffer.dtype, tuple(buffer.shape)) == (want, (3, 8))
    assert buffer._data_ptr() == tensor.data_ptr()


def test_buffers_keep_the_memory_of_tensors():
    tensor = torch.arange(4, dtype=torch.int32)
    (buffer,) = to_buffers([tensor], HOST)
    del tensor
    torch.full((4,), 7, dtype=torch.int32)
    assert buffer.to_numpy().tolist() == [0, 1, 2, 3]


def test_buffers_stay_what_they_are():
    (buffer,) = to_buffers([torch.zeros(2)], HOST)
    assert to_buffers([buffer], HOST)[0] is buffer


def test_gradients_do_not_matter():
    leaf = torch.nn.Parameter(torch.ones(4, 8))
    for tensor in (leaf, leaf * 2, leaf[:, ::2]):
        taken = dense(tensor)
        assert taken.is_contiguous()
        (buffer,) = to_buffers([taken], HOST)
        assert buffer.to_numpy().tolist() == tensor.tolist()
    assert dense(leaf) is leaf
    assert not dense(leaf[:, ::2]).requires_grad
