"""Sizes that an op needs, checked before anything is written: a wrong one is a ShapeError and not a stray store."""

from ..combine_tensors import CombineInput, CombineOutput, travels_by_row
from ..dispatch_tensors import DispatchInput, DispatchOutput
from ..formats import CUSTOM_KEY, TokenFormat, format_tag
from ..layout import EXPERT_SLOTS_HEADER
from ..peers import View
from ..routing import by_source, choices_mapped
from ..settings import (
    REDUCE_ANY,
    REDUCE_EXPERT,
    REDUCE_SOURCE,
    Settings,
)


def require(name: StaticString, given: Int, allowed: Int) raises:
    """Compare a size.

    Args:
        name: What it is the size of.
        given: The size.
        allowed: What it must be.

    Raises:
        ShapeError: As text in front of the message.
    """
    if given != allowed:
        raise Error(
            "ep_mojo.ShapeError: ",
            name,
            " = ",
            given,
            "; allowed: ",
            allowed,
            (
                "; make graph and communicator with the same config, and a"
                " CustomFormat with the sizes of its struct"
            ),
        )


def require_at_most(name: StaticString, given: Int, most: Int) raises:
    """Compare a size with what there is room for.

    Args:
        name: What it is the size of.
        given: The size.
        most: The largest that fits.

    Raises:
        ShapeError: As text in front of the message.
    """
    if given > most:
        raise Error(
            "ep_mojo.ShapeError: ",
            name,
            " = ",
            given,
            "; allowed: up to ",
            most,
            "; pass less, or make a communicator with room for it",
        )


def optional(name: StaticString, given: Int, allowed: Int) raises:
    """Compare the size of a tensor that may be absent.

    Args:
        name: What it is the size of.
        given: The size, 0 = absent.
        allowed: What it must be otherwise.

    Raises:
        ShapeError: As text in front of the message.
    """
    if given != 0:
        require(name, given, allowed)


def check_aligned(name: StaticString, t: View[DType.uint8]) raises:
    """Refuse rows that do not begin at a multiple of 16 bytes.

    Args:
        name: The tensor.
        t: It, in device memory.

    Raises:
        ShapeError: As text in front of the message.
    """
    var rest = t.misaligned(16)
    if t.present() and rest != 0:
        raise Error(
            "ep_mojo.ShapeError: ",
            name,
            " begins ",
            rest,
            " bytes past a multiple of 16; pass a tensor of its own, not a part of one",
        )


def check_same_format[F: TokenFormat](s: Settings) raises:
    """Compare the graph's format with the communicator's; formats without a key of their own are all alike.

    Parameters:
        F: The graph's.

    Args:
        s: The settings.

    Raises:
        ShapeError: As text in front of the message.
    """
    if F.key() != CUSTOM_KEY:
        require("settings: format_tag", s.format_tag, format_tag[F]())


def refuse_virtual(s: Settings) raises:
    """Virtual ranks cannot run fused stages, on any target.

    Args:
        s: The settings.

    Raises:
        OrderError: As text in front of the message.
    """
    if s.virtual:
        raise Error(
            "ep_mojo.OrderError: fused stages need ranks that run at the same time; with virtual ranks use"
            " dispatch_async, dispatch_wait, combine_async and combine_wait"
        )


def check_messages[F: TokenFormat, expert_slots: Bool](s: Settings) raises:
    """Compare what a graph's messages are and where they lie with the communicator's.

    Parameters:
        F: The graph's format.
        expert_slots: The graph's slot policy.

    Args:
        s: The settings.

    Raises:
        ShapeError: As text in front of the message.
    """
    comptime header = EXPERT_SLOTS_HEADER if expert_slots else 0
    require("settings: hidden_size", s.hidden_size, F.hidden_size)
    require("settings: slots", Int(s.expert_slots), Int(expert_slots))
    require(
        "settings: message_bytes", s.message_bytes, F.message_bytes + header
    )
    check_same_format[F](s)


def check_input[
    F: TokenFormat, encoded: Bool, expert_slots: Bool
](s: Settings, x: DispatchInput) raises:
    """What dispatch_async reads.

    Parameters:
        F: The format.
        encoded: Whether tokens are in the format already.
        expert_slots: Slot policy.

    Args:
        s: The settings.
        x: The tensors.

    Raises:
        ShapeError: As text in front of the message.
    """
    comptime row = F.token_bytes if encoded else 2 * F.hidden_size
    check_messages[F, expert_slots](s)
    require("x: bytes", x.tokens.size, x.rows * row)
    comptime if encoded:
        require(
            "x_scales: bytes", x.scales.size, 4 * x.rows * F.scales_per_token
        )
    require("topk_ids: elements", x.ids.size, x.rows * s.top_k)
    optional("weights: elements", x.weights.size, x.rows * s.top_k)
    optional("num_tokens: elements", x.num_tokens.size, 1)
    optional("input_scale: elements", x.factor.size, 1)


def check_everywhere[layout: StaticString](s: Settings) raises:
    """Whether tokens go to all ranks, as a graph with layout "gathered" expects and others do not.

    Parameters:
        layout: The graph's output layout.

    Args:
        s: The settings.

    Raises:
        ShapeError: As text in front of the message.
    """
    require(
        "settings: all ranks gather",
        Int(s.everywhere),
        Int(layout == "gathered"),
    )


def check_output[
    F: TokenFormat, layout: StaticString, expert_slots: Bool
](s: Settings, out_: DispatchOutput) raises:
    """What dispatch_wait writes, and the window that it reads.

    Parameters:
        F: The format.
        layout: Output layout.
        expert_slots: Slot policy.

    Args:
        s: The settings.
        out_: The tensors.

    Raises:
        ShapeError: As text in front of the message.
    """
    comptime by_rank = by_source[layout]()
    var rows = out_.tokens.size // F.token_bytes
    var groups = s.n_ranks if by_rank else s.n_groups()
    var choices = choices_mapped[layout](s)
    check_messages[F, expert_slots](s)
    check_everywhere[layout](s)
    require("tokens: bytes", out_.tokens.size, rows * F.token_bytes)
    comptime if layout == "expert_padded":
        require("tokens: rows", rows, groups * s.n_ranks * s.max_tokens)
    require("scales: bytes", out_.scales.size, 4 * rows * F.scales_per_token)
    require("row_offsets: elements", out_.row_offsets.size, groups + 1)
    require("counts: elements", out_.counts.size, groups)
    optional("expert_ids: elements", out_.expert_ids.size, groups)
    require("src_info: elements", out_.src_info.size, 2 * rows)
    comptime if by_rank:
        require("local_ids: elements", out_.local_ids.size, rows * s.top_k)
        require(
            "local_weights: elements", out_.local_weights.size, rows * s.top_k
        )
    require("recv_weights: elements", out_.recv_weights.size, choices)
    require("row_map: elements", out_.row_map.size, choices)
    require("recv_num_tokens: elements", out_.recv_num_tokens.size, s.n_ranks)


def check_slots[layout: StaticString, reduce: StaticString](s: Settings) raises:
    """Whether the combine window has a slot for every row that this reduce mode sends.

    Parameters:
        layout: Output layout of the dispatch.
        reduce: Reduce mode.

    Args:
        s: The settings.

    Raises:
        ShapeError: As text in front of the message.
    """
    comptime mode = REDUCE_SOURCE if reduce == "source" else REDUCE_EXPERT
    if s.reduce != REDUCE_ANY:
        require("settings: reduce", s.reduce, mode)
    comptime by_row = travels_by_row[layout, reduce]()
    var slots = s.top_k if by_row else s.n_ranks
    if s.combine_slots < slots:
        require("settings: combine_slots", s.combine_slots, slots)


def check_rows[
    layout: StaticString, reduce: StaticString
](s: Settings, x: CombineInput, row_bytes: Int) raises:
    """What combine_async reads with RankSlots, and whether there is room for what it sends.

    Parameters:
        layout: Output layout of the dispatch.
        reduce: Reduce mode.

    Args:
        s: The settings.
        x: The tensors.
        row_bytes: Bytes of a row.

    Raises:
        ShapeError: As text in front of the message.
    """
    var choices = choices_mapped[layout](s)
    require("settings: slots", Int(s.expert_slots), 0)
    check_everywhere[layout](s)
    check_slots[layout, reduce](s)
    require("settings: row_bytes", s.row_bytes, row_bytes)
    require("rows: bytes", x.rows.size % row_bytes, 0)
    require("row_map: elements", x.row_map.size, choices)
    require("recv_weights: elements", x.weights.size, choices)
    require("recv_num_tokens: elements", x.num_tokens.size, s.n_ranks)


def check_expert_rows(
    s: Settings,
    rows: View[DType.uint8],
    src_info: View[DType.int32],
    row_bytes: Int,
) raises:
    """What combine_async reads with ExpertSlots.

    Args:
        s: The settings.
        rows: Expert rows as bytes.
        src_info: Int32 [rows, 2].
        row_bytes: Bytes of a row.

    Raises:
        ShapeError: As text in front of the message.
    """
    require("settings: slots", Int(s.expert_slots), 1)
    require("settings: row_bytes", s.row_bytes, row_bytes)
    require("rows: bytes", rows.size, src_info.size // 2 * row_bytes)
    require("src_info: elements of the last row", src_info.size % 2, 0)


def check_sums[
    layout: StaticString, reduce: StaticString, expert_slots: Bool
](
    s: Settings,
    x: CombineOutput,
    row_bytes: Int,
    out_bytes: Int,
    bias_bytes: Int,
) raises:
    """What combine_wait reads and writes.

    Parameters:
        layout: Output layout of the dispatch.
        reduce: Reduce mode.
        expert_slots: Slot policy.

    Args:
        s: The settings.
        x: The tensors.
        row_bytes: Bytes of a row on the wire.
        out_bytes: Bytes of an output row.
        bias_bytes: Bytes of a bias row.

    Raises:
        ShapeError: As text in front of the message.
    """
    require("settings: slots", Int(s.expert_slots), Int(expert_slots))
    check_everywhere[layout](s)
    check_slots[layout, reduce](s)
    require("settings: row_bytes", s.row_bytes, row_bytes)
    require("y: bytes", x.y.size, x.rows * out_bytes)
    require("topk_ids: elements", x.ids.size, x.rows * s.top_k)
    optional("weights: elements", x.weights.size, x.rows * s.top_k)
    optional("num_tokens: elements", x.num_tokens.size, 1)
    optional("bias0: bytes", x.bias0.size, x.rows * bias_bytes)
    optional("bias1: bytes", x.bias1.size, x.rows * bias_bytes)
    optional("shared_rows: bytes", x.shared_rows.size, x.rows * row_bytes)
