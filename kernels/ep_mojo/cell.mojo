"""Cells: 16 bytes that are stored and loaded in one access, and say by themselves that they have come.

A *marked* cell holds 8 bytes of payload and a signal word. A *full* cell holds 16 bytes of payload; its place is empty,
all zeros, until it comes, and whoever has read it empties it again, so it never is zeros itself (`full_cell`). Neither
covers anything else, so no side needs an order: payload arrives earlier than behind a signal (`gpu/cells.mojo`).
"""

from std.sys import inlined_assembly, is_nvidia_gpu
from std.sys.intrinsics import _RegisterPackType

from .peers import Bytes


@always_inline
def has_cells() -> Bool:
    """Whether this target loads and stores 16 bytes in one access that other devices see whole.

    Returns:
        True on NVIDIA GPUs: a relaxed access of type b128.
    """
    return is_nvidia_gpu()


struct Cell(TrivialRegisterPassable):
    """What a cell holds."""

    var payload: UInt64
    """8 bytes."""
    var word: UInt64
    """A signal word; of a full cell its other 8 bytes."""

    @always_inline
    def __init__(out self, payload: UInt64, word: UInt64):
        """Make it.

        Args:
            payload: 8 bytes.
            word: A signal word, or 8 bytes more.
        """
        self.payload = payload
        self.word = word


comptime FULL_LOW: UInt64 = 0x7FFF_FFFF_FFFF_7FFF
"""What the first 8 bytes of a row are combined with (exclusive or) in a full cell: NaN, whether bfloat16 or float32."""
comptime FULL_HIGH: UInt64 = 0xFFFF_7FFF_7FFF_FFFF
"""The same for the other 8 bytes."""


@always_inline
def full_cell(row: SIMD[DType.uint64, 2]) -> Cell:
    """What travels for 16 bytes of a row of bfloat16 or float32.

    Args:
        row: The bytes.

    Returns:
        A cell that is not zeros. Sixteen bytes that are NaNs alone, of one certain pattern, come back with another bit
        in one of them: NaN too.
    """
    var cell = Cell(row[0] ^ FULL_LOW, row[1] ^ FULL_HIGH)
    if not is_full(cell):
        cell.payload = 1
    return cell


@always_inline
def is_full(cell: Cell) -> Bool:
    """Whether a full cell has come.

    Args:
        cell: What was loaded from its place.

    Returns:
        False while the place is empty.
    """
    return cell.payload | cell.word != 0


@always_inline
def of_full_cell(cell: Cell) -> SIMD[DType.uint64, 2]:
    """The bytes of a row that a full cell has brought.

    Args:
        cell: The cell.

    Returns:
        16 bytes.
    """
    return SIMD[DType.uint64, 2](cell.payload ^ FULL_LOW, cell.word ^ FULL_HIGH)


@always_inline
def empty_cell(at: Bytes):
    """Make room for the next full cell: zeros, by the thread that has read what was there, and before it gives credit.

    Args:
        at: Its place in the rank's own window, aligned to 16.
    """
    store_cell(at, Cell(0, 0))


@always_inline
def store_cell(at: Bytes, cell: Cell):
    """Store a cell, in no order with other stores. For targets that have cells.

    Args:
        at: Its place in a peer's window, aligned to 16.
        cell: The cell.
    """
    comptime if has_cells():
        inlined_assembly[
            "{ .reg .b128 c; mov.b128 c, {$1, $2}; st.relaxed.sys.global.b128 [$0], c; }",
            NoneType,
            constraints="l,l,l,~{memory}",
        ](UInt64(Int(at)), cell.payload, cell.word)


@always_inline
def load_cell(at: Bytes) -> Cell:
    """Load a cell, in no order with other loads. For targets that have cells.

    Args:
        at: Its place in the rank's own window, aligned to 16.

    Returns:
        The cell.
    """
    comptime if has_cells():
        var two = inlined_assembly[
            "{ .reg .b128 c; ld.relaxed.sys.global.b128 c, [$2]; mov.b128 {$0, $1}, c; }",
            _RegisterPackType[UInt64, UInt64],
            constraints="=l,=l,l,~{memory}",
        ](UInt64(Int(at)))
        return Cell(two[0], two[1])
    else:
        return Cell(0, 0)


@always_inline
def tell(window: Bytes, offset: Int, w: UInt64):
    """Store a signal word that covers nothing, in no order with other stores. For targets that have cells.

    Args:
        window: A peer's count window.
        offset: Byte offset of the word.
        w: The word.
    """
    comptime if has_cells():
        inlined_assembly[
            "st.relaxed.sys.global.b64 [$0], $1; // alone",
            NoneType,
            constraints="l,l,~{memory}",
        ](UInt64(Int(window.unsafe_offset(offset))), w)
