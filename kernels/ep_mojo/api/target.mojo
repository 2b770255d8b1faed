"""What seed-named functions refuse: at compile time what is missing, tables that are not for R ranks, and too many
choices."""

from max.gpu import WARP_SIZE

from ..gpu.shared_memory import MAX_WARPS
from ..layout import MAX_EXPERTS, MAX_TOP_K
from ..ops.checks import require
from ..peers import MAX_RANKS, View


comptime MAX_THREADS = MAX_WARPS * WARP_SIZE
"""Threads of a CTA that the host functions launch, at most."""
comptime MAX_SMS = 1024
"""CTAs that they launch, at most; in fact no more than the device has SMs."""


def check_target[target: StaticString, use_shmem: Bool, n_nodes: Int]():
    """Refuse, at compile time, what is not there yet.

    Parameters:
        target: Where to run.
        use_shmem: Whether to send through SHMEM.
        n_nodes: Number of nodes.
    """
    comptime assert n_nodes == 1, (
        "ep_mojo: n_nodes > 1 needs the NVSHMEM transport, which is missing;"
        " use n_nodes=1 (up to 8 ranks of one node)"
    )
    comptime assert not use_shmem, (
        "ep_mojo: use_shmem=True needs the NVSHMEM transport, which is missing;"
        " use use_shmem=False with peer-accessible windows"
    )
    comptime assert (
        target == "cpu" or target == "gpu"
    ), "ep_mojo: target: 'cpu' or 'gpu'"


def check_ranks[
    n_experts: Int, n_ranks: Int
](recv_ptrs: View[DType.uint64], recv_count_ptrs: View[DType.uint64]) raises:
    """Refuse tables that do not have one address per rank.

    Parameters:
        n_experts: E.
        n_ranks: R.

    Args:
        recv_ptrs: Addresses of the recv windows.
        recv_count_ptrs: Addresses of the count windows.

    Raises:
        ShapeError: As text in front of the message.
    """
    comptime assert (
        1 <= n_ranks <= MAX_RANKS and n_experts % n_ranks == 0
    ), "n_gpus_per_node: 1 to 8, a divisor of n_experts"
    comptime assert 1 <= n_experts <= MAX_EXPERTS, "n_experts: 1 to 2048"
    require("recv_ptrs: elements", recv_ptrs.size, n_ranks)
    require("recv_count_ptrs: elements", recv_count_ptrs.size, n_ranks)


def check_top_k(top_k: Int) raises:
    """Refuse a number of choices that no rank has.

    Args:
        top_k: K of `topk_ids`.

    Raises:
        ShapeError: As text in front of the message.
    """
    if not 1 <= top_k <= MAX_TOP_K:
        raise Error(
            "ep_mojo.ShapeError: topk_ids: choices of a token = ",
            top_k,
            "; allowed: 1 to ",
            MAX_TOP_K,
            "; pass topk_ids [T, K] with the K of the counters",
        )
