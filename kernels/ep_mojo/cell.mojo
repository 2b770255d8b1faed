"""Cells: 8 bytes of payload and a signal word behind them, stored and loaded in one access of 16 bytes.

Whoever finds a cell's word to be that of an epoch has its payload too. A cell covers nothing else, so neither side
needs an order: where there are few tokens they arrive earlier so, at twice the bytes (`gpu/cells.mojo`).
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
    """A signal word."""

    @always_inline
    def __init__(out self, payload: UInt64, word: UInt64):
        """Make it.

        Args:
            payload: 8 bytes.
            word: A signal word.
        """
        self.payload = payload
        self.word = word


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
