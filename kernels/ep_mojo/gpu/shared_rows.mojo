"""Rows on their way through shared memory: a warp loads one, works on it, stores it to a peer.

On sm_90 and newer, rows that are multiples of 16 bytes move by bulk copies (the async proxy): one lane starts a copy,
the others have their hands free. Everywhere else the lanes of the warp move them 16 bytes at a time. The functions are
the same, and so is what the caller must do:

    load           global -> slot, complete when it returns
    store_row      slot -> global, to as many places as there are bits
    SlotTeam       copies slot -> global on the way of a format
    finish_stores  all stores of the calling lane have arrived: only now may it publish a signal that covers them
    release        the slot may be written again

Rules of order, held by the PTX test (docs/protocol.md): ordinary stores to a slot come before a proxy fence and a warp
barrier, before any bulk store of it; a full `wait_group 0`, by the lane that started them, comes between bulk stores
and the signal; a proxy fence comes between an acquire and a bulk load of what it covers.
"""

from max.gpu import lane_id
from max.gpu.primitives import warp
from max.gpu.memory import external_memory
from max.gpu.sync import syncwarp
from std.bit import count_trailing_zeros
from std.sys import inlined_assembly, is_nvidia_gpu

from ..layout import align_up
from ..peers import Bytes
from ..team import Team, WarpTeam, copy_bytes, is_sm_90_or_newer

comptime SLOT_ALIGNMENT = 128
"""Bytes that slots and what stands in front of them are rounded up to."""
comptime BARRIER_BYTES = 16
"""Shared memory of one mbarrier, rounded up."""


@always_inline
def moves_in_bulk() -> Bool:
    """Whether this target has bulk copies between global and shared memory.

    Returns:
        True on sm_90 and newer.
    """
    return is_sm_90_or_newer()


@always_inline
def shared_memory(offset: Int) -> Bytes:
    """The launch's dynamic shared memory as an ordinary pointer.

    Args:
        offset: Byte offset in it.

    Returns:
        The pointer.
    """
    var base = external_memory[
        UInt8, address_space=AddressSpace.SHARED, alignment=SLOT_ALIGNMENT
    ]()
    comptime if is_nvidia_gpu():
        var generic = inlined_assembly[
            "cvta.shared.u64 $0, $1;", UInt64, constraints="=l,l"
        ](UInt64(Int(base)))
        return Bytes(unsafe_from_address=Int(generic) + offset)
    else:
        var generic = base.unsafe_address_space_cast[AddressSpace.GENERIC]()
        return Bytes(unsafe_from_address=Int(generic) + offset)


@always_inline
def _shared_address(p: Bytes) -> UInt32:
    """The 32-bit address that PTX wants for shared memory."""
    return UInt32(
        inlined_assembly[
            "cvta.to.shared.u64 $0, $1;", UInt64, constraints="=l,l"
        ](UInt64(Int(p)))
    )


@always_inline
def crew_barrier[threads: Int, count: Int](index: Int):
    """Let several warps of a CTA meet. Ordinary stores of each before it come before bulk stores of any after it.

    NVIDIA only. Their numbers are constants in the code: compute-sanitizer loses track of barriers whose numbers are
    computed.

    Parameters:
        threads: Threads that meet, whole warps.
        count: How many such barriers the CTA has, at most 15.

    Args:
        index: Which of them, 0 to count - 1.
    """
    inlined_assembly["fence.proxy.async;", NoneType, constraints="~{memory}"]()
    syncwarp()  # the barrier wants whole warps
    comptime for i in range(count):
        if index == i:
            inlined_assembly[
                "bar.sync $0, $1;", NoneType, constraints="n,n,~{memory}"
            ](Int32(i + 1), Int32(threads))


struct RowSlot(Movable):
    """Room for one row in shared memory, owned by one warp."""

    var row: Bytes
    """Its first byte."""
    var barrier: Bytes
    """Counts the bytes of bulk loads."""
    var phase: UInt32
    """Parity of the next load."""
    var mine: Bool
    """Whether the calling warp loads; one of another warp of its crew waits for that, and meets it before each load."""

    def __init__(out self, row: Bytes, barrier: Bytes, mine: Bool):
        """Take the slot; all lanes of a warp call this at once.

        Args:
            row: `SLOT_ALIGNMENT`-aligned shared memory.
            barrier: `BARRIER_BYTES` of shared memory.
            mine: Whether it is the calling warp's.
        """
        self.row = row
        self.barrier = barrier
        self.phase = 0
        self.mine = mine
        comptime if moves_in_bulk():
            if lane_id() == 0 and mine:
                inlined_assembly[
                    "mbarrier.init.shared::cta.b64 [$0], 1;",
                    NoneType,
                    constraints="r,~{memory}",
                ](_shared_address(barrier))
                inlined_assembly[
                    "fence.mbarrier_init.release.cluster;",
                    NoneType,
                    constraints="~{memory}",
                ]()
            syncwarp()

    @always_inline
    def load[n: Int](mut self, source: Bytes):
        """Bring a row into the slot; all lanes may read it afterwards.

        Parameters:
            n: Bytes.

        Args:
            source: Global memory, aligned to 16. What an acquire of this warp covers may be loaded.
        """
        syncwarp()  # nobody reads the slot any more
        comptime if moves_in_bulk() and n % 16 == 0:
            if lane_id() == 0 and self.mine:
                var bar = _shared_address(self.barrier)
                inlined_assembly[
                    "fence.proxy.async;", NoneType, constraints="~{memory}"
                ]()
                inlined_assembly[
                    "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;",
                    NoneType,
                    constraints="r,r,~{memory}",
                ](bar, Int32(n))
                inlined_assembly[
                    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];",
                    NoneType,
                    constraints="r,l,r,r,~{memory}",
                ](
                    _shared_address(self.row),
                    UInt64(Int(source)),
                    Int32(n),
                    bar,
                )
            self._await_load()
        else:
            copy_bytes[WarpTeam](source, self.row, n)
            syncwarp()

    @always_inline
    def _await_load(mut self):
        var bar = _shared_address(self.barrier)
        inlined_assembly[
            "{\n.reg .pred p;\nWAIT_${:uid}:\nmbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1;\n@p bra DONE_${:uid};\nbra WAIT_${:uid};\nDONE_${:uid}:\n}",
            NoneType,
            constraints="r,r,~{memory}",
        ](bar, self.phase)
        self.phase ^= 1
        syncwarp()


@always_inline
def store_row[n: Int](row: Bytes, targets: UInt32, target: Bytes):
    """Store a row to as many places as there are bits; all lanes of the warp call this.

    Lane i stores to its own `target` where bit i is set. `finish_stores` comes before any signal. What the warp has
    written to the slot with ordinary stores comes first, and so does what the credit covers: the peer's reads.

    Parameters:
        n: Bytes.

    Args:
        row: Shared memory.
        targets: Which lanes store.
        target: The calling lane's place, aligned to 16.
    """
    comptime if moves_in_bulk() and n % 16 == 0:
        inlined_assembly[
            "fence.proxy.async;", NoneType, constraints="~{memory}"
        ]()
        syncwarp()
        if (targets >> UInt32(lane_id())) & 1 == 1:
            _store_in_bulk(row, target, n)
    else:
        syncwarp()
        var left = targets
        while left != 0:
            var lane = count_trailing_zeros(left)
            left &= left - 1
            var to = warp.shuffle_idx(UInt64(Int(target)), lane)
            copy_bytes[WarpTeam](row, Bytes(unsafe_from_address=Int(to)), n)


struct SlotTeam(Team):
    """A warp that copies out of its slot: in bulk where it can. `finish_stores` comes before others may rely on that, and
    `release_slots` before the slot is written again."""

    comptime lanes = WarpTeam.lanes
    """As `WarpTeam`."""
    comptime vector_bytes = WarpTeam.vector_bytes
    """As `WarpTeam`."""
    comptime sum_width = WarpTeam.sum_width
    """As `WarpTeam`."""
    comptime sum_steps = WarpTeam.sum_steps
    """As `WarpTeam`."""
    comptime blocks_ahead = WarpTeam.blocks_ahead
    """As `WarpTeam`."""
    comptime streams = False
    """As `WarpTeam`."""

    @staticmethod
    @always_inline
    def lane() -> Int:
        """The calling lane.

        Returns:
            Lane index.
        """
        return WarpTeam.lane()

    @staticmethod
    @always_inline
    def max(value: Float32) -> Float32:
        """The largest value of the warp.

        Args:
            value: The lane's own, neither negative nor NaN.

        Returns:
            The same on every lane.
        """
        return WarpTeam.max(value)

    @staticmethod
    @always_inline
    def from_lane(value: Float32, lane: Int) -> Float32:
        """The value of one lane of the warp.

        Args:
            value: The calling lane's own.
            lane: Which lane.

        Returns:
            The same on every lane.
        """
        return WarpTeam.from_lane(value, lane)

    @staticmethod
    @always_inline
    def copy_whole(source: Bytes, target: Bytes, n: Int) -> Bool:
        """Start a bulk copy.

        Args:
            source: In the warp's slot, aligned to 16, brought there by `RowSlot.load`.
            target: Global memory.
            n: Bytes.

        Returns:
            Whether there are bulk copies that can do it.
        """
        comptime if moves_in_bulk():
            if n % 16 == 0 and Int(target) % 16 == 0:
                if lane_id() == 0:
                    inlined_assembly[
                        "fence.proxy.async;", NoneType, constraints="~{memory}"
                    ]()
                    _store_in_bulk(source, target, n)
                return True
        return False


@always_inline
def _store_in_bulk(row: Bytes, target: Bytes, n: Int):
    """Start a bulk store of the calling lane, a group by itself."""
    inlined_assembly[
        "cp.async.bulk.global.shared::cta.bulk_group [$0], [$1], $2;",
        NoneType,
        constraints="l,r,r,~{memory}",
    ](UInt64(Int(target)), _shared_address(row), Int32(n))
    inlined_assembly[
        "cp.async.bulk.commit_group;", NoneType, constraints="~{memory}"
    ]()


@always_inline
def finish_stores():
    """Wait until all that the calling lane has stored in bulk is in place, then let the warp meet."""
    comptime if moves_in_bulk():
        inlined_assembly[
            "cp.async.bulk.wait_group 0;", NoneType, constraints="~{memory}"
        ]()
    syncwarp()


@always_inline
def release_slots():
    """Wait until bulk stores have read their slots, so that these may be written again."""
    comptime if moves_in_bulk():
        inlined_assembly[
            "cp.async.bulk.wait_group.read 0;",
            NoneType,
            constraints="~{memory}",
        ]()
    syncwarp()
