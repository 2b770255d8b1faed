"""What all ops do first: tensors to views, and the refusals that are known without looking at data."""

from extensibility import ManagedTensorSlice
from std.sys import size_of

from ..gpu.launch import Peers
from ..identity import check_head, check_settings
from ..peers import PeerTable, View, window_view
from ..settings import Settings, config_hash


@always_inline
def view(t: ManagedTensorSlice) -> View[t.dtype]:
    """A tensor's elements.

    Args:
        t: Any contiguous tensor.

    Returns:
        The view.
    """
    return View[t.dtype](Int(t.unsafe_ptr()), t.size())


@always_inline
def raw(t: ManagedTensorSlice) -> View[DType.uint8]:
    """A tensor's memory.

    Args:
        t: Any contiguous tensor.

    Returns:
        The view, in bytes.
    """
    return View[DType.uint8](
        Int(t.unsafe_ptr()), t.size() * size_of[Scalar[t.dtype]]()
    )


def read_peers[
    target: StaticString, n_sms: Int
](
    settings: ManagedTensorSlice,
    counters: ManagedTensorSlice,
    recv_ptrs: ManagedTensorSlice,
    recv_count_ptrs: ManagedTensorSlice,
) raises -> Peers:
    """The rank's side. On the host the head of the counters must fit it; a GPU's kernel looks at that itself.

    Parameters:
        target: Where MAX runs the op.
        n_sms: The op's own budget of SMs or workers, 0 = that of the settings.

    Args:
        settings: Int64 [17], in host memory.
        counters: The rank's `atomic_counters`.
        recv_ptrs: Addresses of the recv windows, in host memory.
        recv_count_ptrs: Addresses of the count windows, in host memory.

    Returns:
        It.

    Raises:
        CorruptHeadError, ConfigMismatchError: As text in front of the message.
    """
    var words = whole[DType.int64](settings)
    comptime if target == "gpu":
        check_settings(words.size)
    else:
        check_head(whole[DType.int32](counters), words)
    var s = Settings(words)
    comptime if n_sms > 0:
        s.n_sms = n_sms
    return Peers(
        s,
        config_hash(words),
        whole[DType.int32](counters),
        PeerTable(whole[DType.uint64](recv_ptrs)),
        PeerTable(whole[DType.uint64](recv_count_ptrs)),
    )


@always_inline
def whole[dtype: DType](t: ManagedTensorSlice) -> View[dtype]:
    """A tensor's elements, of a type that the signature does not fix.

    Parameters:
        dtype: Element type.

    Args:
        t: Any contiguous tensor.

    Returns:
        The view.
    """
    return window_view[dtype](raw(t).bytes(), 0, t.size())


def rank_slots_only[slots: StaticString]():
    """Refuse ExpertSlots where there is no stage for it.

    Parameters:
        slots: Slot policy, "rank" or "expert".
    """
    comptime assert (
        slots == "rank"
    ), "ep_mojo: slots='expert' has split ops only; use them, or slots='rank'"
