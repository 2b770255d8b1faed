"""What CPU and GPU share, compiled for a GPU that need not be there: `./task gpu-compile` runs this program.

The driver passes the architecture as `-D EP_GPU_TARGET=sm_90a` and as `--target-accelerator`. For every kernel the program
prints one line, `kernel NAME BYTES`, where BYTES is the size of its assembly (PTX on NVIDIA, GCN on AMD). Code that does not
compile for the architecture ends the run with the compiler's message. Nothing is executed on a device.

The kernels are not stages: they call what stages are made of, so that it stays fit for them. Without `-D EP_GPU_ALL` each
part is compiled once; with it, every format option and output layout. The driver defines it for sm_90a.
"""

from ep_mojo import expert_launch
from ep_mojo.formats import BF16, BlockwiseFP8, TokenFormat
from ep_mojo.launch import Endpoint
from ep_mojo.layout import (
    STAGE_COMBINE_ASYNC,
    STAGE_COMBINE_WAIT,
    STAGE_DISPATCH_ASYNC,
    STAGE_DISPATCH_WAIT,
    message_offset,
)
from ep_mojo.numeric import accumulate, store_f32
from ep_mojo.peers import Bytes, View
from ep_mojo.routing import count_rows, map_rows, row_starts
from ep_mojo.settings import SETTINGS_WORDS, Settings
from ep_mojo.signal import NO_SIGNAL, Waiter, publish, word
from ep_mojo.team import WarpTeam, zero_bytes
from max.gpu import block_idx, thread_idx
from max.gpu.host import get_gpu_target
from std.compile import compile_info
from std.sys import get_defined_string, is_defined

comptime TARGET = get_defined_string["EP_GPU_TARGET"]()
comptime ALL = is_defined["EP_GPU_ALL"]()
comptime HIDDEN = 7168


def encode_rows[F: TokenFormat](token: Int64, message: Int64):
    """One warp writes one token's message.

    Parameters:
        F: The format.

    Args:
        token: Address of the tokens.
        message: Address of the messages.
    """
    var t = Int(block_idx.x)
    F.encode[WarpTeam](
        Bytes(unsafe_from_address=Int(token) + t * 2 * F.hidden_size),
        1.0,
        Bytes(unsafe_from_address=Int(message) + t * F.message_bytes),
    )


def pack_rows[F: TokenFormat](token: Int64, scales: Int64, message: Int64):
    """One warp writes the message of one token that is encoded already, and zeroes what it had been encoded into.

    Parameters:
        F: The format.

    Args:
        token: Address of the tokens.
        scales: Address of the scales.
        message: Address of the messages.
    """
    var t = Int(block_idx.x)
    var row = Bytes(unsafe_from_address=Int(token) + t * F.token_bytes)
    F.pack[WarpTeam](
        row,
        Bytes(unsafe_from_address=Int(scales) + t * 4 * F.scales_per_token),
        Bytes(unsafe_from_address=Int(message) + t * F.message_bytes),
    )
    zero_bytes[WarpTeam](row, F.token_bytes)


def unpack_rows[F: TokenFormat](message: Int64, token: Int64, scales: Int64):
    """One warp copies one message to a row.

    Parameters:
        F: The format.

    Args:
        message: Address of the messages.
        token: Address of the rows.
        scales: Address of the scales.
    """
    var t = Int(block_idx.x)
    F.unpack[WarpTeam](
        Bytes(unsafe_from_address=Int(message) + t * F.message_bytes),
        Bytes(unsafe_from_address=Int(token) + t * F.token_bytes),
        Bytes(unsafe_from_address=Int(scales) + t * 4 * F.scales_per_token),
        1,
    )


def route[
    layout: StaticString
](
    words: Int64,
    ids: Int64,
    counts: Int64,
    offsets: Int64,
    totals: Int64,
    row_map: Int64,
    tokens: Int32,
):
    """Counts, row starts and the row map of one source.

    Parameters:
        layout: Output layout.

    Args:
        words: Address of the settings.
        ids: Address of the source's table.
        counts: Address of the counts.
        offsets: Address of the row offsets.
        totals: Address of the true counts.
        row_map: Address of the row map.
        tokens: The source's T.
    """
    var s = Settings(View[DType.int64](Int(words), SETTINGS_WORDS))
    var n = s.max_tokens * s.top_k
    var table = View[DType.int16](Int(ids), n)
    var count = View[DType.int32](Int(counts), s.n_groups())
    count_rows[layout](s, table, Int(tokens), 0, 0, count)
    _ = row_starts[layout](
        s,
        count,
        View[DType.uint32](Int(offsets), s.n_groups() + 1),
        View[DType.int32](Int(totals), s.n_groups()),
    )
    map_rows[layout](
        s, table, Int(tokens), 0, count, View[DType.int32](Int(row_map), n)
    )


def launch_protocol(
    counters: Int64, words: Int64, recv: Int64, count: Int64, tokens: Int32
):
    """A launch's beginning and end, its signals and waits, in one thread.

    Args:
        counters: Address of `atomic_counters`.
        words: Address of the settings.
        recv: Address of the table of recv windows.
        count: Address of the table of count windows.
        tokens: T.
    """
    if thread_idx.x != 0:
        return
    var ep = Endpoint[True](
        View[DType.int32](Int(counters), 64),
        View[DType.int64](Int(words), SETTINGS_WORDS),
        View[DType.uint64](Int(recv), 8),
        View[DType.uint64](Int(count), 8),
    )
    var sent = ep.begin_send[WarpTeam](STAGE_DISPATCH_WAIT)
    ep.announce[WarpTeam](sent, Int(tokens))
    publish(
        ep.count[0],
        ep.window.signal(ep.buffer(sent), ep.me, 0),
        word(sent, message_offset(ep.s, 0, 0, 0)),
    )
    ep.end_send[WarpTeam](sent)
    var epoch = ep.begin_wait(STAGE_DISPATCH_WAIT, ep.last_sent())
    var waiter = Waiter(ep.head, STAGE_DISPATCH_WAIT, ep.s.virtual)
    if ep.header_of(waiter, epoch, 0) != NO_SIGNAL:
        _ = ep.chunk_of(waiter, epoch, 0, 0)
    ep.end_wait[WarpTeam](epoch)


def expert_launch_protocol(
    counters: Int64,
    words: Int64,
    recv: Int64,
    count: Int64,
    sent: Int64,
):
    """The same with ExpertSlots, for dispatch and combine.

    Args:
        counters: Address of `atomic_counters`.
        words: Address of the settings.
        recv: Address of the table of recv windows.
        count: Address of the table of count windows.
        sent: Address of the numbers of messages.
    """
    if thread_idx.x != 0:
        return
    var settings = View[DType.int64](Int(words), SETTINGS_WORDS)
    var head = View[DType.int32](Int(counters), 64)
    var windows = View[DType.uint64](Int(recv), 8)
    var signals = View[DType.uint64](Int(count), 8)
    var ep = Endpoint[True](head, settings, windows, signals)
    var epoch = expert_launch.begin_send(ep, STAGE_DISPATCH_ASYNC)
    expert_launch.end_dispatch_send(
        ep, epoch, View[DType.int32](Int(sent), ep.s.n_experts)
    )
    epoch = ep.begin_wait(STAGE_DISPATCH_WAIT, ep.last_sent())
    var waiter = Waiter(ep.head, STAGE_DISPATCH_WAIT, ep.s.virtual)
    _ = expert_launch.message_count(ep, waiter, epoch, expert=0, source=0)
    expert_launch.end_wait(ep, epoch)
    var back = Endpoint[False](head, settings, windows, signals)
    epoch = expert_launch.begin_send(back, STAGE_COMBINE_ASYNC)
    expert_launch.end_combine_send(back, epoch)
    epoch = back.begin_wait(STAGE_COMBINE_WAIT, back.last_sent())
    waiter = Waiter(back.head, STAGE_COMBINE_WAIT, back.s.virtual)
    _ = expert_launch.rows_arrived(back, waiter, epoch, 0)
    expert_launch.end_wait(back, epoch)


def sum_rows[dtype: DType](row: Int64, out_: Int64, weight: Float32):
    """One weighted term, rounded and stored.

    Parameters:
        dtype: Type of the rows.

    Args:
        row: Address of a row.
        out_: Address of the sum.
        weight: The router's weight.
    """
    var i = Int(thread_idx.x) * 8
    var acc = SIMD[DType.float32, 8](0)
    acc = accumulate[dtype, 8](
        acc, Bytes(unsafe_from_address=Int(row)), i, weight
    )
    store_f32[dtype, 8](Bytes(unsafe_from_address=Int(out_)), i, acc)


def show_format[F: TokenFormat](name: String):
    """Compile a format's three functions.

    Parameters:
        F: The format.

    Args:
        name: How to call it.
    """
    var encode = compile_info[
        encode_rows[F], emission_kind="asm", target=get_gpu_target[TARGET]()
    ]()
    print("kernel encode_" + name, String(encode.asm).byte_length())
    var pack = compile_info[
        pack_rows[F], emission_kind="asm", target=get_gpu_target[TARGET]()
    ]()
    print("kernel pack_" + name, String(pack.asm).byte_length())
    var unpack = compile_info[
        unpack_rows[F], emission_kind="asm", target=get_gpu_target[TARGET]()
    ]()
    print("kernel unpack_" + name, String(unpack.asm).byte_length())


def show_layout[layout: StaticString]():
    """Compile the routing of an output layout.

    Parameters:
        layout: Output layout.
    """
    var info = compile_info[
        route[layout], emission_kind="asm", target=get_gpu_target[TARGET]()
    ]()
    print("kernel route_" + String(layout), String(info.asm).byte_length())


def main():
    """Print one line for every kernel."""
    show_format[BF16[HIDDEN]]("bf16")
    show_format[BlockwiseFP8[HIDDEN]]("fp8_float32")
    show_layout["expert"]()
    var protocol = compile_info[
        launch_protocol, emission_kind="asm", target=get_gpu_target[TARGET]()
    ]()
    print("kernel launch_protocol", String(protocol.asm).byte_length())
    var alternating = compile_info[
        expert_launch_protocol,
        emission_kind="asm",
        target=get_gpu_target[TARGET](),
    ]()
    print(
        "kernel expert_launch_protocol",
        String(alternating.asm).byte_length(),
    )
    var sum = compile_info[
        sum_rows[DType.bfloat16],
        emission_kind="asm",
        target=get_gpu_target[TARGET](),
    ]()
    print("kernel sum_rows", String(sum.asm).byte_length())
    comptime if ALL:
        show_format[BlockwiseFP8[HIDDEN, "float32", True]]("fp8_float32_column")
        show_format[BlockwiseFP8[HIDDEN, "power_of_two"]]("fp8_power_of_two")
        show_format[BlockwiseFP8[HIDDEN, "power_of_two", True]](
            "fp8_power_of_two_column"
        )
        show_format[BlockwiseFP8[HIDDEN, "ue8m0"]]("fp8_ue8m0")
        show_format[BlockwiseFP8[HIDDEN, "ue8m0", True]]("fp8_ue8m0_column")
        show_layout["expert_padded"]()
        show_layout["rank"]()
