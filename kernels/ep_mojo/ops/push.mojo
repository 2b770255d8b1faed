"""The op with which benchmarks measure what the links can do. See `ops/__init__.mojo` for what all ops share;
`ep_mojo/programs/link.py` writes the calls."""

import extensibility
from extensibility import InputTensor, _MutableInputTensor
from max.gpu.host import DeviceContext

from ..gpu.push import push
from .checks import check_aligned, require, require_at_most
from .tensors import raw, read_peers


@extensibility.register("ep_mojo_push")
struct Push:
    """Stores rows in every peer's windows, outside of any round."""

    @staticmethod
    def execute[
        size: Int,
        side: StaticString,
        slots: StaticString,
        n_sms: Int,
        target: StaticString,
    ](
        order: _MutableInputTensor[dtype=DType.int32, rank=1, ...],
        counters: _MutableInputTensor[dtype=DType.int32, rank=1, ...],
        settings: InputTensor[dtype=DType.int64, rank=1, ...],
        send_ptrs: InputTensor[dtype=DType.uint64, rank=1, ...],
        recv_ptrs: InputTensor[dtype=DType.uint64, rank=1, ...],
        recv_count_ptrs: InputTensor[dtype=DType.uint64, rank=1, ...],
        rows: InputTensor[dtype=DType.uint8, rank=2, ...],
        ctx: DeviceContext,
    ) raises:
        """Stores rows in every peer's windows, outside of any round.

        Parameters:
            size: Bytes of a row: of a message, or of a combine row.
            side: "dispatch" or "combine": whose windows.
            slots: "rank".
            n_sms: The op's own budget of SMs, 0 = the config's.
            target: Where MAX runs the op.

        Args:
            order: Shared by all ops of a graph.
            counters: The rank's `atomic_counters`.
            settings: Int64 [17], host.
            send_ptrs: Uint64 [R], host: not used.
            recv_ptrs: Uint64 [R], host: recv windows.
            recv_count_ptrs: Uint64 [R], host: count windows, not used.
            rows: [n, size], what each peer gets; n up to Tmax.
            ctx: The device.

        Raises:
            ShapeError as text in front of the message: the rows do not fit the windows.
        """
        comptime assert target == "gpu", "ep_mojo: the host has no links"
        comptime assert slots == "rank", "ep_mojo: for slots='rank'"
        var peers = read_peers[target, n_sms](
            settings, counters, recv_ptrs, recv_count_ptrs
        )
        require("settings: slots", Int(peers.s.expert_slots), 0)
        comptime if side == "dispatch":
            require("size of a row", size, peers.s.message_bytes)
        else:
            require("size of a row", size, peers.s.row_bytes)
            require_at_most("n_ranks", peers.s.n_ranks, peers.s.combine_slots)
        require_at_most("rows", rows.dim_size(0), peers.s.max_tokens)
        require("rows: bytes of a row", rows.dim_size(1), size)
        check_aligned("rows", raw(rows))
        push[size, side == "dispatch"](
            peers,
            raw(rows),
            ctx,
        )
