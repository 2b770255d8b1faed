"""What all ops do first: tensors to views, and the refusals that are known without looking at data."""

from extensibility import ManagedTensorSlice
from std.sys import size_of

from ..peers import View


@always_inline
def view(t: ManagedTensorSlice) -> View[t.dtype]:
    """A tensor's elements.

    Args:
        t: Any contiguous tensor in host memory.

    Returns:
        The view.
    """
    return View[t.dtype](Int(t.unsafe_ptr()), t.size())


@always_inline
def raw(t: ManagedTensorSlice) -> View[DType.uint8]:
    """A tensor's memory.

    Args:
        t: Any contiguous tensor in host memory.

    Returns:
        The view, in bytes.
    """
    return View[DType.uint8](
        Int(t.unsafe_ptr()), t.size() * size_of[Scalar[t.dtype]]()
    )


def host_only[target: StaticString]():
    """Refuse targets that have no stages yet.

    Parameters:
        target: Where MAX runs the op.
    """
    comptime assert (
        target == "cpu"
    ), "ep_mojo: the stages of this version run on the host; place the ops on a CPU device"


def rank_slots_only[slots: StaticString]():
    """Refuse ExpertSlots in a fused op.

    Parameters:
        slots: Slot policy, "rank" or "expert".
    """
    comptime assert (
        slots == "rank"
    ), "ep_mojo: slots='expert' has split ops only; use the async and wait ops"
