"""What ranks with a GPU each compare before they map each other's memory."""

from __future__ import annotations

import pytest

import ep_mojo as ep
from ep_mojo.comm.symmetric_memory import SHARING, Offer, check_offers


def test_ranks_have_a_gpu_each(monkeypatch):
    monkeypatch.delenv(SHARING, raising=False)
    check_offers([Offer("a", 2), Offer("b", 2), Offer("c", 2)])
    with pytest.raises(ep.DeviceError, match=r"ranks 0 and 2 have one GPU.*TORCH_SYMM_MEM"):
        check_offers([Offer("a", 0), Offer("b", 0), Offer("a", 0)])
    monkeypatch.setenv(SHARING, "1")
    check_offers([Offer("a", 0), Offer("b", 0), Offer("a", 0)])


def test_ranks_have_mapped_memory_equally_often():
    with pytest.raises(ep.UnsupportedError, match="rank 0 has made windows 3 times before, rank 1 2 times"):
        check_offers([Offer("a", 3), Offer("b", 2)])
