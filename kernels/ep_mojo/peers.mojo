"""Typed views of memory: the only file that turns an address into a pointer, or a pointer into an address.

Peers' windows arrive as tables of addresses (`recv_ptrs`, `recv_count_ptrs`: uint64, one per rank), tensors as what the
framework hands over. Both become `View`s here: a typed pointer with a length, and nothing else. Every other file adds
the byte offsets of `layout.mojo` to a view and never sees an address.

All pointers have a mutable origin on purpose: a load through an immutable one may be emitted as a non-coherent load,
which is wrong for memory that a peer writes.
"""

from std.sys import inlined_assembly, is_nvidia_gpu
from std.utils import StaticTuple

comptime Bytes = Pointer[UInt8, MutUntrackedOrigin]
"""Untyped memory."""

comptime Words = Pointer[UInt64, MutUntrackedOrigin]
"""Signal words."""

comptime MAX_RANKS = 8
"""The most ranks of one node, and the length of a `PeerTable`."""


@always_inline
def opaque(address: Int) -> OpaquePointer[MutUntrackedOrigin]:
    """What a driver takes for one of its own things, such as a queue.

    Args:
        address: As the driver knows it.

    Returns:
        A pointer.
    """
    return OpaquePointer[MutUntrackedOrigin](unsafe_from_address=address)


struct View[dtype: DType](TrivialRegisterPassable):
    """A typed pointer and the number of elements behind it; `size == 0` means that an optional tensor is absent.

    Parameters:
        dtype: Element type.
    """

    comptime Element = Pointer[Scalar[Self.dtype], MutUntrackedOrigin]
    """The pointer type."""

    var ptr: Self.Element
    """First element; dangling where `size == 0`."""
    var size: Int
    """Number of elements."""

    def __init__(out self, address: Int, size: Int):
        """View `size` elements at `address`.

        Args:
            address: Address of the first element.
            size: Number of elements.
        """
        self.ptr = Self.Element(
            unsafe_from_address=address if address != 0 else 64
        )
        self.size = size

    def __init__(out self):
        """An absent tensor."""
        self = Self(0, 0)

    @always_inline
    def present(self) -> Bool:
        """Whether the tensor was given.

        Returns:
            True where there is at least one element.
        """
        return self.size > 0

    @always_inline
    def __getitem__(self, i: Int) -> Scalar[Self.dtype]:
        """Load one element.

        Args:
            i: Index.

        Returns:
            The element.
        """
        return self.ptr.unsafe_load[invariant=False](i)

    @always_inline
    def __setitem__(self, i: Int, value: Scalar[Self.dtype]):
        """Store one element.

        Args:
            i: Index.
            value: What to store.
        """
        self.ptr.unsafe_store(i, value)

    @always_inline
    def bytes(self, first: Int = 0) -> Bytes:
        """The memory from element `first` on, untyped.

        Args:
            first: Index of an element.

        Returns:
            A byte pointer to it.
        """
        return Bytes(unsafe_from_address=Int(self.ptr.unsafe_offset(first)))

    @always_inline
    def misaligned(self, to: Int) -> Int:
        """How far the first element is past an aligned address.

        Args:
            to: A power of two.

        Returns:
            Bytes, 0 where it is aligned.
        """
        return Int(self.ptr) % to

    @always_inline
    def part(self, first: Int, size: Int) -> Self:
        """Some of the elements.

        Args:
            first: Index of the first one.
            size: How many.

        Returns:
            Their view.
        """
        return Self(Int(self.ptr.unsafe_offset(first)), size)

    def fill(self, value: Scalar[Self.dtype]):
        """Set every element.

        Args:
            value: What to store.
        """
        for i in range(self.size):
            self[i] = value


@always_inline
def typed[
    space: AddressSpace, //, dtype: DType
](
    base: Pointer[UInt8, MutUntrackedOrigin, address_space=space], offset: Int
) -> Pointer[Scalar[dtype], MutUntrackedOrigin, address_space=space]:
    """A typed pointer at a byte offset of a window, or of shared memory.

    Parameters:
        space: Where both point to.
        dtype: Element type.

    Args:
        base: Its start.
        offset: Byte offset from `layout.mojo`.

    Returns:
        The pointer.
    """
    return Pointer[Scalar[dtype], MutUntrackedOrigin, address_space=space](
        unsafe_from_address=Int(base.unsafe_offset(offset))
    )


@always_inline
def window_view[
    dtype: DType
](base: Bytes, offset: Int, size: Int) -> View[dtype]:
    """Elements at a byte offset of a window.

    Parameters:
        dtype: Element type.

    Args:
        base: Start of the window.
        offset: Byte offset from `layout.mojo`.
        size: Number of elements.

    Returns:
        Their view.
    """
    return View[dtype](Int(base.unsafe_offset(offset)), size)


@always_inline
def store_global(address: UInt64, i: Int, value: UInt64):
    """Store a word in a GPU's global memory; in the PTX it can be told from a store to shared memory.

    Args:
        address: Of the first word.
        i: Which word.
        value: What to store.
    """
    var at = address + UInt64(8 * i)
    comptime if is_nvidia_gpu():
        inlined_assembly[
            "st.global.u64 [$0], $1;", NoneType, constraints="l,l,~{memory}"
        ](at, value)
    else:
        Bytes(unsafe_from_address=Int(at)).unsafe_bitcast[
            UInt64
        ]().unsafe_store(0, value)


struct Scratch[dtype: DType](Movable):
    """Memory of a launch's own. A view keeps nothing alive: `_ = scratch^` stands behind the last use of any.

    Parameters:
        dtype: Element type.
    """

    var memory: List[Scalar[Self.dtype]]
    """The elements."""

    def __init__(out self, size: Int, fill: Scalar[Self.dtype] = 0):
        """Allocate.

        Args:
            size: Number of elements.
            fill: Value of each.
        """
        self.memory = List[Scalar[Self.dtype]](length=size, fill=fill)

    def view(mut self) -> View[Self.dtype]:
        """The elements.

        Returns:
            Their view.
        """
        return View[Self.dtype](Int(self.memory.unsafe_ptr()), len(self.memory))


struct PeerTable(TrivialRegisterPassable):
    """One window address per rank. Passed to kernels by value, so that no launch reads a table from memory."""

    var address: StaticTuple[UInt64, MAX_RANKS]
    """Window addresses; 0 past the last rank."""

    def __init__(out self, table: View[DType.uint64]):
        """Copy a table of at most `MAX_RANKS` addresses.

        Args:
            table: `recv_ptrs` or `recv_count_ptrs`.
        """
        self.address = StaticTuple[UInt64, MAX_RANKS](fill=0)
        for r in range(min(table.size, MAX_RANKS)):
            self.address[r] = table[r]

    @always_inline
    def __init__[
        T: AnyType, n: Int
    ](out self, windows: Array[Pointer[T, MutUntrackedOrigin], n]):
        """Take pointers.

        Parameters:
            T: What they point to.
            n: R.

        Args:
            windows: One window a rank.
        """
        self.address = StaticTuple[UInt64, MAX_RANKS](fill=0)
        comptime for r in range(n):
            self.address[r] = UInt64(Int(windows[r]))

    @always_inline
    def pointers[
        T: AnyType, n: Int
    ](self) -> Array[Pointer[T, MutUntrackedOrigin], n]:
        """The table as the seed-named device functions take it.

        Parameters:
            T: What the windows hold.
            n: R.

        Returns:
            One window a rank.
        """
        comptime P = Pointer[T, MutUntrackedOrigin]
        var found = Array[P, n](
            fill=P(unsafe_from_address=Int(self.address[0]))
        )
        comptime for r in range(n):
            found[r] = P(unsafe_from_address=Int(self.address[r]))
        return found^

    @always_inline
    def __getitem__(self, rank: Int) -> Bytes:
        """The window of a rank.

        Args:
            rank: Owner of the window.

        Returns:
            Its first byte.
        """
        return Bytes(unsafe_from_address=Int(self.address[rank]))
