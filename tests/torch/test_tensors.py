"""What graphs get of tensors: their addresses in a block, and what `dense` leaves alone. No rounds, one process."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import ep_mojo as ep
from ep_mojo.dtypes import to_numpy
from ep_mojo.torch import call, sizes
from ep_mojo.torch.checks import check_tensor
from ep_mojo.torch.tensors import dense

CFG = ep.EPConfig(hidden_size=8, top_k=1, n_experts=2, max_tokens_per_rank=4, n_ranks=2)
OPS = Path(__file__).parents[2] / "kernels" / "ep_mojo" / "ops"


@pytest.mark.parametrize("side", ["dispatch", "combine"])
def test_the_block_says_what_a_launch_is_to_do(side):
    x, ids = torch.zeros(3, 8, dtype=torch.bfloat16), torch.zeros(3, 1, dtype=torch.int64)
    with ep.Communicator.cpu(CFG) as comm:
        made = call.Call(comm, side)
        made.fill(5, 77, (x, None, ids, torch.empty(0, 8)))
        words = to_numpy(made.buffers[1]).tolist()
        settings, *tables = [to_numpy(b).tolist() for b in comm.inputs()[:7]]
        windows = tables[1:3] if side == "dispatch" else tables[4:6]
        counters = comm.inputs()[8]
        assert words[: call.QUEUE] == [*settings[: call.SETTING_N_SMS], 5, *settings[call.SETTING_N_SMS + 1 :]]
        assert words[call.QUEUE] == 77
        assert words[call.COUNTERS : call.RECV] == [counters._data_ptr(), counters.num_elements]
        assert words[call.RECV : call.RECV + 2] == windows[0]
        assert words[call.COUNT : call.COUNT + 2] == windows[1]
    tensors = words[call.TENSORS :]
    assert tensors[:8] == [x.data_ptr(), 48, 0, 0, ids.data_ptr(), 24, 0, 0]
    assert tensors[8:] == [0] * 8
    assert len(words) == call.WORDS


def test_blocks_are_laid_out_as_the_ops_read_them():
    """The words of `call.py` follow those of `call.mojo`: one after the other, and as many tensors."""
    text = (OPS / "call.mojo").read_text()
    said = re.findall(r"^comptime (\w+) = (.+)$", text, re.M)
    names = {"SETTINGS_WORDS": call.SETTINGS_WORDS, "MAX_RANKS": call.MAX_RANKS}
    for name, value in said:
        names[name] = eval(value, {}, names)
    assert {name: names[name] for name, _ in said} == {name: getattr(call, name) for name, _ in said}
    for name in ("dispatch_into", "combine_into"):
        assert re.search(rf"^comptime N_TENSORS = {call.N_TENSORS}$", (OPS / f"{name}.mojo").read_text(), re.M)


def test_gradients_do_not_matter():
    leaf = torch.nn.Parameter(torch.ones(4, 8))
    for tensor in (leaf, leaf * 2, leaf[:, ::2]):
        taken = dense(tensor)
        assert taken.is_contiguous()
        assert taken.tolist() == tensor.tolist()
    assert dense(leaf) is leaf
    assert not dense(leaf[:, ::2]).requires_grad


class Wrapper(torch.Tensor):
    """Has a shape and no memory, as tensors that are spread over devices."""

    @staticmethod
    def __new__(cls):
        return torch.Tensor._make_wrapper_subclass(cls, (4, 8), dtype=torch.bfloat16)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


def test_tensors_without_memory_are_refused():
    with pytest.raises(ep.errors.DTypeError, match="no memory of its own"):
        check_tensor("x", Wrapper(), [torch.bfloat16], [None, 8], torch.device("cpu"))
    empty = torch.empty(0, 8, dtype=torch.bfloat16)
    assert check_tensor("x", empty, [torch.bfloat16], [None, 8], torch.device("cpu")) is empty


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_windows_of_low_latency_mode_hold_fewer_tokens_too(ranks):
    """Although messages of few tokens have room for cells, twice their bytes, and some more for tables'."""
    needed = [sizes.low_latency_bytes(n, 64, ranks, 8 * ranks) for n in range(1, 2048 // 8 + 40)]
    assert needed == sorted(needed)
    assert needed[-1] > needed[0]
