"""What every seed-named device function is given besides tensors and windows: the rank's own counters."""

from layout import TileTensor
from std.builtin.device_passable import DevicePassable, DeviceTypeEncoder

from ..gpu.launch import Peers
from ..head import Head
from ..layout import HEAD_TOP_K, MAX_TOP_K
from ..peers import View
from ..setup import tile_view

comptime ANY_RANK: Int32 = -1
"""`my_rank` where the head of the counters alone says which rank it is."""
comptime ANY_TOP_K = -1
"""`top_k` where a launch does not know K, or its hash covers it."""


struct EPLocalSyncCounters[n_experts: Int](
    DevicePassable, TrivialRegisterPassable
):
    """A rank's own `atomic_counters` as a kernel argument.

    Parameters:
        n_experts: E.
    """

    comptime device_type: AnyType = Self
    """The same on both sides."""

    var counters: View[DType.int32]
    """Int32 [counters_words(s)], in device memory."""

    def __init__(out self, counters: View[DType.int32]):
        """Wrap them.

        Args:
            counters: Int32 [counters_words(s)], in device memory.
        """
        self.counters = counters

    def __init__(out self, atomic_counters: TileTensor[DType.int32, ...]):
        """Wrap a tensor.

        Args:
            atomic_counters: Int32 [counters_words(s)], in device memory.
        """
        self.counters = tile_view(atomic_counters)

    def _to_device_type(
        self,
        mut encoder: Some[DeviceTypeEncoder],
        target: MutOpaquePointer[_],
    ):
        encoder.encode(self, target)

    @staticmethod
    def get_type_name() -> String:
        """Name the type in messages.

        Returns:
            A name.
        """
        return "ep_mojo.EPLocalSyncCounters"


@always_inline
def is_mine(peers: Peers, my_rank: Int32, top_k: Int = ANY_TOP_K) -> Bool:
    """Whether the counters are those of a launch's parameters, rank and K.

    Args:
        peers: The launch's side.
        my_rank: The rank that was given, or `ANY_RANK`.
        top_k: K of the tensor that was given, or `ANY_TOP_K`.

    Returns:
        False for counters that must not be touched.
    """
    if not peers.valid():
        return False
    var head = Head(peers.counters.bytes())
    if my_rank != ANY_RANK and Int(my_rank) != head.my_rank():
        return False
    if top_k == ANY_TOP_K:
        return True
    return 1 <= top_k <= MAX_TOP_K and top_k == Int(head.i32(HEAD_TOP_K))
