"""Who works on one token: a host thread, or the lanes of a GPU warp. Formats are written once, over a `Team`."""

from max.gpu import WARP_SIZE, lane_id
from max.gpu.primitives import warp
from std.memory import bitcast
from std.sys import inlined_assembly, is_nvidia_gpu
from std.sys.info import _is_sm_9x_or_newer

from .peers import Bytes, View


@always_inline
def is_sm_90_or_newer() -> Bool:
    """Whether this target is an NVIDIA GPU from Hopper on: it has bulk copies and rounds to e4m3 by itself.

    Returns:
        False elsewhere, on the host too.
    """
    comptime if is_nvidia_gpu():
        return _is_sm_9x_or_newer()
    else:
        return False


trait Team:
    """A group of lanes that share the work on one row."""

    comptime lanes: Int
    """Number of lanes."""
    comptime vector_bytes: Int
    """Bytes that one lane moves at a time."""
    comptime sum_width: Int
    """Channels that one lane sums at a time."""
    comptime sum_steps: Int
    """How often it does so before it stores, so that loads overlap."""
    comptime blocks_ahead: Int
    """Blocks of channels that are quantised at a time."""
    comptime streams: Bool
    """Whether what it copies goes past the caches; then `finish_streaming` comes before any signal."""

    @staticmethod
    def lane() -> Int:
        """The calling lane.

        Returns:
            0 to `lanes` - 1.
        """
        ...

    @staticmethod
    def max(value: Float32) -> Float32:
        """The largest value over all lanes.

        Args:
            value: The lane's own, neither negative nor NaN.

        Returns:
            The same on every lane.
        """
        ...

    @staticmethod
    def from_lane(value: Float32, lane: Int) -> Float32:
        """The value of one lane.

        Args:
            value: The calling lane's own.
            lane: Which lane.

        Returns:
            The same on every lane.
        """
        ...

    @staticmethod
    def copy_whole(source: Bytes, target: Bytes, n: Int) -> Bool:
        """Copy in a way of its own, where the team has one that fits; all lanes call this.

        Args:
            source: Where from.
            target: Where to.
            n: Bytes.

        Returns:
            Whether it does.
        """
        return False


struct HostThread[streaming: Bool](Team):
    """One host thread.

    Parameters:
        streaming: Whether copies go past the caches, for more data than these hold.
    """

    comptime lanes = 1
    """A thread works alone."""
    comptime vector_bytes = 64
    """A cache line at a time."""
    comptime sum_width = 64
    """Several registers, so that loads overlap."""
    comptime sum_steps = 1
    """They do already."""
    comptime blocks_ahead = 1
    """A block fills the registers."""
    comptime streams = Self.streaming
    """As asked."""

    @staticmethod
    @always_inline
    def lane() -> Int:
        """The only lane.

        Returns:
            0.
        """
        return 0

    @staticmethod
    @always_inline
    def max(value: Float32) -> Float32:
        """The value itself.

        Args:
            value: The lane's own.

        Returns:
            The same.
        """
        return value

    @staticmethod
    @always_inline
    def from_lane(value: Float32, lane: Int) -> Float32:
        """The value itself.

        Args:
            value: The lane's own.
            lane: 0.

        Returns:
            The same.
        """
        return value


comptime HostTeam = HostThread[False]
"""A host thread whose copies stay in the caches: for what is read again soon."""
comptime StreamingTeam = HostThread[True]
"""A host thread whose copies go to memory without being read into a cache first."""


struct WarpTeam(Team):
    """One GPU warp."""

    comptime lanes = WARP_SIZE
    """32 on NVIDIA, 64 on AMD."""
    comptime vector_bytes = 16
    """The widest access of one lane."""
    comptime sum_width = 8
    """16 bytes of bfloat16."""
    comptime sum_steps = 14
    """Loads in flight for each row; half of H = 7168."""
    comptime blocks_ahead = 8
    """Their reductions overlap."""
    comptime streams = False
    """Ordinary stores."""

    @staticmethod
    @always_inline
    def lane() -> Int:
        """The calling lane.

        Returns:
            Lane index.
        """
        return Int(lane_id())

    @staticmethod
    @always_inline
    def max(value: Float32) -> Float32:
        """The largest value of the warp.

        Args:
            value: The lane's own, neither negative nor NaN.

        Returns:
            The same on every lane.
        """
        comptime if is_nvidia_gpu():  # such values are ordered as their bits are
            return bitcast[DType.float32](
                inlined_assembly[
                    "redux.sync.max.u32 $0, $1, 0xffffffff;",
                    UInt32,
                    constraints="=r,r",
                ](bitcast[DType.uint32](value))
            )
        else:
            return warp.max(value)

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
        return warp.shuffle_idx(value, UInt32(lane))


@always_inline
def copy_bytes[T: Team](source: Bytes, target: Bytes, n: Int):
    """Copy memory that does not overlap.

    Parameters:
        T: Who copies.

    Args:
        source: Where from.
        target: Where to.
        n: Bytes; both pointers are aligned to the largest power of two, up to 16, that divides `n`. A GPU is fast
            where that is 16.
    """
    comptime V = T.vector_bytes
    comptime stride = T.lanes * V
    if T.copy_whole(source, target, n):
        return
    var whole = n // stride * stride
    comptime if T.streams:
        if Int(target) % V == 0:
            for i in range(0, whole, V):
                target.unsafe_store[width=V, alignment=V, non_temporal=True](
                    i,
                    source.unsafe_load[width=V, alignment=1, invariant=False](
                        i
                    ),
                )
            for i in range(whole, n):
                target.unsafe_store(i, source.unsafe_load[invariant=False](i))
            return
    comptime if T.lanes > 1:  # 16 bytes at a time, or nothing is known of the alignment
        if n % V == 0:
            for i in range(T.lane() * V, n, stride):
                target.unsafe_store[width=V, alignment=V](
                    i,
                    source.unsafe_load[width=V, alignment=V, invariant=False](
                        i
                    ),
                )
            return
        whole = 0
    for i in range(T.lane() * V, whole, stride):
        target.unsafe_store[width=V, alignment=1](
            i, source.unsafe_load[width=V, alignment=1, invariant=False](i)
        )
    for i in range(whole + T.lane(), n, T.lanes):
        target.unsafe_store(i, source.unsafe_load[invariant=False](i))


@always_inline
def zero_bytes[T: Team](target: Bytes, n: Int):
    """Set memory to zero.

    Parameters:
        T: Who writes.

    Args:
        target: Where to, aligned to the largest power of two, up to 16, that divides `n`.
        n: Bytes.
    """
    comptime V = T.vector_bytes
    comptime stride = T.lanes * V
    var whole = n // stride * stride
    comptime if T.lanes > 1:
        if n % V == 0:
            for i in range(T.lane() * V, n, stride):
                target.unsafe_store[width=V, alignment=V](
                    i, SIMD[DType.uint8, V](0)
                )
            return
        whole = 0
    for i in range(T.lane() * V, whole, stride):
        target.unsafe_store[width=V, alignment=1](i, SIMD[DType.uint8, V](0))
    for i in range(whole + T.lane(), n, T.lanes):
        target.unsafe_store(i, UInt8(0))


@always_inline
def fill[T: Team, dtype: DType](elements: View[dtype], value: Scalar[dtype]):
    """Set all elements.

    Parameters:
        T: Who writes.
        dtype: Element type.

    Args:
        elements: What to set.
        value: To what.
    """
    for i in range(T.lane(), elements.size, T.lanes):
        elements[i] = value
