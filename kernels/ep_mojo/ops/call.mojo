"""Ops that get everything by address: one block of words in host memory in place of a dozen tensors.

For programs that own the memory and call ops one by one, as PyTorch's do: what MAX does on the host for each tensor of
a graph would take longer than the round. Words (int64) of the block, mirrored by `ep_mojo/torch/call.py`:

    settings [17] | queue | address of the counters | their words | recv windows [8] | count windows [8] |
    (address, bytes) of each tensor

The queue is what the driver knows the launch's queue by (0: MAX's own of the device). A tensor of no bytes is absent.
"""

from extensibility import ManagedTensorSlice
from std.sys import size_of

from ..gpu.launch import Peers
from ..identity import check_head
from ..peers import MAX_RANKS, PeerTable, View, window_view
from ..settings import SETTINGS_WORDS, Settings, config_hash
from .checks import require_at_most
from .tensors import whole

comptime QUEUE = SETTINGS_WORDS
"""Word of the queue."""
comptime COUNTERS = QUEUE + 1
"""Word of the counters' address; their size follows."""
comptime RECV = COUNTERS + 2
"""First word of the recv windows."""
comptime COUNT = RECV + MAX_RANKS
"""First word of the count windows."""
comptime TENSORS = COUNT + MAX_RANKS
"""First word of the tensors."""


struct Call(TrivialRegisterPassable):
    """The block of one call."""

    var words: View[DType.int64]
    """All of it."""

    def __init__(out self, words: ManagedTensorSlice, n_tensors: Int) raises:
        """Take it.

        Args:
            words: Int64, in host memory.
            n_tensors: How many tensors the op has.

        Raises:
            ShapeError: As text in front of the message.
        """
        self.words = whole[DType.int64](words)
        require_at_most(
            "call: words needed", TENSORS + 2 * n_tensors, self.words.size
        )

    def peers[target: StaticString](self) raises -> Peers:
        """The rank's side. On the host the head of the counters must fit; a GPU's kernel looks at that itself.

        Parameters:
            target: Where MAX runs the op.

        Returns:
            It, with the queue.

        Raises:
            CorruptHeadError, ConfigMismatchError: As text in front of the message.
        """
        var settings = self.words.part(0, SETTINGS_WORDS)
        var counters = View[DType.int32](
            Int(self.words[COUNTERS]), Int(self.words[COUNTERS + 1])
        )
        comptime if target != "gpu":
            check_head(counters, settings)
        var s = Settings(settings)
        s.queue = Int(self.words[QUEUE])
        return Peers(
            s,
            config_hash(settings),
            counters,
            PeerTable(self._table(RECV, s.n_ranks)),
            PeerTable(self._table(COUNT, s.n_ranks)),
        )

    @always_inline
    def _table(self, first: Int, n_ranks: Int) -> View[DType.uint64]:
        return window_view[DType.uint64](self.words.bytes(first), 0, n_ranks)

    @always_inline
    def raw(self, i: Int) -> View[DType.uint8]:
        """A tensor's memory.

        Args:
            i: Which one.

        Returns:
            It, in bytes; absent where it has none.
        """
        var at = TENSORS + 2 * i
        return View[DType.uint8](Int(self.words[at]), Int(self.words[at + 1]))

    @always_inline
    def tensor[dtype: DType](self, i: Int) -> View[dtype]:
        """A tensor's elements.

        Parameters:
            dtype: Their type.

        Args:
            i: Which one.

        Returns:
            Them; absent where there are none.
        """
        var bytes = self.raw(i)
        return window_view[dtype](
            bytes.bytes(), 0, bytes.size // size_of[Scalar[dtype]]()
        )
