"""What every kernel begins and ends with, and how it is launched.

A kernel gets everything by value: settings, window addresses, tensor addresses. Nothing is read from the host, nothing
allocated, nothing reset by the host between launches, so that a captured launch can be replayed.

    CTA, first     one warp opens the launch (`Endpoint.begin_*`), then all learn whether it may go on: `may_go_on`, or
                   `Opening` where there is something to do meanwhile
    body
    CTA, last      counts itself in; whoever is last of the grid closes the launch (`Endpoint.end_*`)

No more CTAs are launched than the device has SMs, one on each: so all are resident, and one may spin on another.
Kernels of other queues only delay that: none of them waits for us, so the SMs that they hold come free.
"""

from max.gpu import WARP_SIZE, block_dim, grid_dim, thread_idx
from max.gpu.host import DeviceAttribute, DeviceContext, FuncAttribute
from max.gpu.sync import barrier
from std.builtin.device_passable import DevicePassable, DeviceTypeEncoder

from ..head import Head
from ..launch import Endpoint
from ..layout import (
    ARRIVED,
    HEAD_CONFIG_HASH,
    HEAD_LAYOUT_VERSION,
    HEAD_MAGIC,
    LAYOUT_VERSION,
    MAGIC,
)
from ..peers import Bytes, PeerTable, View
from ..settings import Settings
from ..signal import arrive
from .shared_memory import (
    BARRIERS,
    BARRIER_BYTES,
    MAX_WARPS,
    SLOTS,
    VERDICT,
    shared_memory,
    shared_place,
)
from .shared_rows import RowSlot


struct ByValue[T: TrivialRegisterPassable](
    DevicePassable, TrivialRegisterPassable
):
    """A kernel argument that is copied to the device.

    Parameters:
        T: Its type.
    """

    comptime device_type: AnyType = Self
    """The same on both sides."""

    var value: Self.T
    """The argument."""

    def __init__(out self, value: Self.T):
        """Wrap it.

        Args:
            value: The argument.
        """
        self.value = value

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
        return "ep_mojo.ByValue"


struct Peers(TrivialRegisterPassable):
    """One rank's side of dispatch or combine, before it is known on the device which rank that is."""

    var s: Settings
    """The settings."""
    var hash: UInt64
    """What the head must hold."""
    var hash_index: Int
    """Where: one of `HEAD_*_HASH`."""
    var counters: View[DType.int32]
    """The rank's `atomic_counters`, in device memory."""
    var recv: PeerTable
    """Everybody's recv windows."""
    var count: PeerTable
    """Everybody's count windows."""

    @always_inline
    def __init__(
        out self,
        s: Settings,
        hash: UInt64,
        counters: View[DType.int32],
        recv: PeerTable,
        count: PeerTable,
        hash_index: Int = HEAD_CONFIG_HASH,
    ):
        """Gather the launch's arguments.

        Args:
            s: The settings.
            hash: What the head must hold.
            counters: `atomic_counters`, in device memory.
            recv: Everybody's recv windows.
            count: Everybody's count windows.
            hash_index: Where in the head, one of `HEAD_*_HASH`.
        """
        self.s = s
        self.hash = hash
        self.hash_index = hash_index
        self.counters = counters
        self.recv = recv
        self.count = count

    @always_inline
    def valid(self) -> Bool:
        """Whether the counters are those of a rank of a communicator with these settings.

        Returns:
            False for a head that must not be touched.
        """
        var head = Head(self.counters.bytes())
        var rank = head.my_rank()
        return (
            head.i32(HEAD_MAGIC) == MAGIC
            and head.i32(HEAD_LAYOUT_VERSION) == LAYOUT_VERSION
            and head.u64(self.hash_index) == self.hash
            and 0 <= rank < self.s.n_ranks
        )

    @always_inline
    def endpoint[
        has_table: Bool,
        may_shrink: Bool = False,
        cells: Bool = False,
        table_cells: Bool = False,
    ](self) -> Endpoint[has_table]:
        """The rank's side, on the device.

        Parameters:
            has_table: True for dispatch, False for combine.
            may_shrink: Whether peers can be masked; other kernels hold nothing for that.
            cells: Whether messages and tables travel as cells, for sure.
            table_cells: Whether tables do, and messages do not.

        Returns:
            The endpoint.
        """
        var s = self.s
        comptime if not may_shrink:
            s.shrinks = False
        comptime if cells or table_cells:
            s.few_tokens = cells
            s.table_room = True
        return Endpoint[has_table](self.counters, s, self.recv, self.count)


def uses_cells(ctx: DeviceContext, fits: Bool) raises -> Bool:
    """Whether a launch is that of a kernel that sends and receives cells: all ranks decide alike.

    Args:
        ctx: The device.
        fits: What the settings say: `in_cells`, `tables_in_cells` or `rows_in_cells`.

    Returns:
        True where the device has cells.

    Raises:
        What the driver raises.
    """
    return fits and ctx.api() == "cuda"


@always_inline
def warps() -> Int:
    """Warps of the CTA.

    Returns:
        Their number, 1 to `MAX_WARPS`.
    """
    return Int(block_dim.x) // WARP_SIZE


@always_inline
def warp_index() -> Int:
    """The calling warp of its CTA.

    Returns:
        0 to `warps()` - 1.
    """
    return Int(thread_idx.x) // WARP_SIZE


@always_inline
def told(mine: Int) -> Int:
    """What thread 0 says, for all threads of its CTA; also a barrier.

    Args:
        mine: What thread 0 says.

    Returns:
        The same for all threads.
    """
    var word = View[DType.int32](Int(shared_memory(VERDICT)), 1)
    if thread_idx.x == 0:
        word[0] = Int32(mine)
    barrier()
    var said = Int(word[0])
    barrier()
    return said


@always_inline
def may_go_on(head: Head) -> Bool:
    """Whether the rank has not failed, asked once for the whole CTA; also a barrier.

    Args:
        head: The rank's head.

    Returns:
        The same for all threads.
    """
    var fine = 0
    if thread_idx.x == 0:
        fine = Int(not head.failed())
    return told(fine) != 0


@always_inline
def is_last_cta[
    has_table: Bool
](ep: Endpoint[has_table], sending: Bool) -> Bool:
    """Count the CTA in when all its threads are done.

    Parameters:
        has_table: True for dispatch, False for combine.

    Args:
        ep: The rank.
        sending: Whether this is the sending or the receiving half.

    Returns:
        For all threads, whether all other CTAs came before; what they did is then visible.
    """
    barrier()
    var last = 0
    if thread_idx.x == 0:
        var word = ARRIVED + 2 * Int(has_table) + Int(sending)
        last = Int(arrive(ep.head.base, 4 * word, Int(grid_dim.x)))
    return told(last) != 0


@always_inline
def memory_of(warp: Int, warp_bytes: Int, offset: Int = 0) -> Bytes:
    """Shared memory of a warp.

    Args:
        warp: Its number in the CTA.
        warp_bytes: What the launch has for each warp, a multiple of `SLOT_ALIGNMENT`: the same in all of its parts.
        offset: Byte offset in it.

    Returns:
        A pointer.
    """
    return shared_memory(SLOTS + warp * warp_bytes + offset)


@always_inline
def slot_of(warp: Int, row: Bytes, sending: Bool) -> RowSlot:
    """A row that a warp loads into. Each half of a launch has an mbarrier of its own for each warp.

    Args:
        warp: Its number in the CTA; another warp that calls this waits for what that one loads.
        row: From `memory_of`.
        sending: Whether this is the sending or the receiving half.

    Returns:
        The slot.
    """
    var i = warp + MAX_WARPS * Int(sending)
    return RowSlot(
        row, shared_place(BARRIERS + i * BARRIER_BYTES), warp == warp_index()
    )


@always_inline
def warp_memory(warp_bytes: Int, offset: Int = 0) -> Bytes:
    """Shared memory of the calling warp.

    Args:
        warp_bytes: As for `memory_of`.
        offset: Byte offset in it.

    Returns:
        A pointer.
    """
    return memory_of(warp_index(), warp_bytes, offset)


@always_inline
def warp_slot(row: Bytes, sending: Bool) -> RowSlot:
    """A row that the calling warp loads into.

    Args:
        row: From `warp_memory`.
        sending: Whether this is the sending or the receiving half.

    Returns:
        The slot.
    """
    return slot_of(warp_index(), row, sending)


struct Shape(TrivialRegisterPassable):
    """Size of a launch."""

    var ctas: Int
    """CTAs."""
    var threads: Int
    """Threads of a CTA."""
    var shared_bytes: Int
    """Dynamic shared memory of a CTA."""

    def __init__(
        out self,
        ctx: DeviceContext,
        s: Settings,
        *,
        items: Int,
        warp_bytes: Int,
        cta_bytes: Int = 0,
        behind: Int = 0,
    ) raises:
        """Choose it.

        Args:
            ctx: The device.
            s: The settings, with the budget `n_sms`.
            items: Pieces of work for one warp each, an upper bound.
            warp_bytes: Shared memory for the slots of one warp.
            cta_bytes: Shared memory that a CTA needs at least, at the place of the slots.
            behind: Shared memory that it needs besides, behind them.

        Raises:
            UnsupportedError as text in front of the message: a row does not fit into shared memory.
        """
        var room = ctx.get_attribute(
            DeviceAttribute.MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        )
        var fit = (room - SLOTS - behind) // max(1, warp_bytes)
        if fit < 1 or SLOTS + cta_bytes + behind > room:
            raise Error(
                "ep_mojo.UnsupportedError: a launch needs ",
                SLOTS + max(warp_bytes, cta_bytes) + behind,
                " bytes of shared memory, this device has ",
                room,
                "; use a smaller hidden_size, or fewer experts on a rank",
            )
        var most = ctx.get_attribute(DeviceAttribute.MULTIPROCESSOR_COUNT)
        if s.n_sms > 0:
            most = min(most, s.n_sms)
        var n_warps = min(fit, MAX_WARPS)
        self.ctas = max(1, min(most, items))
        self.threads = n_warps * WARP_SIZE
        self.shared_bytes = (
            SLOTS + max(n_warps * warp_bytes, cta_bytes) + behind
        )

    def memory(self) -> FuncAttribute:
        """The most shared memory that the kernel may have.

        Returns:
            The attribute, for `compile_function`.
        """
        return FuncAttribute.MAX_DYNAMIC_SHARED_SIZE_BYTES(
            UInt32(self.shared_bytes)
        )
