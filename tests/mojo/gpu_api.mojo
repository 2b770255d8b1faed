"""The seed-named functions on GPUs, from Mojo alone: R virtual ranks on one GPU, against the scalar reference of the
host tests.

Build with -I kernels -I tests/mojo; prints the number of rounds that were right last.
"""

from layout import Coord, Idx, TileTensor, row_major
from max.gpu.host import DeviceBuffer, DeviceContext
from std.math import fma
from std.memory import bitcast
from std.testing import assert_equal, assert_raises
from std.utils import IndexList

from ep_mojo import (
    BF16,
    BlockwiseFP8,
    TokenFormat,
    TokenHandler,
    check_counters,
    combine_count_bytes,
    combine_recv_bytes,
    counters_words,
    dispatch_count_bytes,
    dispatch_recv_bytes,
    ep_combine_async_kernel_api,
    ep_combine_wait_kernel_api,
    ep_dispatch_async_kernel_api,
    ep_dispatch_wait_kernel_api,
    expert_slots_settings,
    init_counters,
)
from virtual_world import (
    E,
    H,
    H8,
    K,
    L,
    R,
    ROWS,
    Round,
    TM,
    bf16,
    check_rows,
    wide,
)


def to_device[
    dtype: DType
](ctx: DeviceContext, values: List[Scalar[dtype]]) raises -> DeviceBuffer[
    dtype
]:
    var buffer = ctx.enqueue_create_buffer[dtype](max(1, len(values)))
    if len(values) > 0:
        with buffer.map_to_host() as host:
            for i in range(len(values)):
                host[i] = values[i]
    return buffer^


def to_host[
    dtype: DType
](buffer: DeviceBuffer[dtype], n: Int) raises -> List[Scalar[dtype]]:
    var values = List[Scalar[dtype]](length=n, fill=0)
    with buffer.map_to_host() as host:
        for i in range(n):
            values[i] = host[i]
    return values^


def zeros[
    dtype: DType
](ctx: DeviceContext, n: Int) raises -> DeviceBuffer[dtype]:
    var buffer = ctx.enqueue_create_buffer[dtype](n)
    buffer.enqueue_fill(0)
    return buffer^


struct GPUWorld[F: TokenFormat](Movable):
    """All ranks on one GPU: windows, tables, counters."""

    var ctx: DeviceContext
    var windows: List[DeviceBuffer[DType.uint8]]
    var counters: List[DeviceBuffer[DType.int32]]
    var words: Int
    var none: List[UInt64]
    var recv: List[UInt64]
    var count: List[UInt64]
    var back: List[UInt64]
    var back_count: List[UInt64]

    def __init__(
        out self, ctx: DeviceContext, timeout_ns: Int = 10_000_000_000
    ) raises:
        var s = expert_slots_settings[Self.F, DType.bfloat16](
            n_ranks=R, n_experts=E, top_k=K, max_token_per_rank=TM
        )
        self.ctx = ctx
        self.windows = List[DeviceBuffer[DType.uint8]]()
        self.counters = List[DeviceBuffer[DType.int32]]()
        self.words = counters_words(s)
        var tables = List[List[UInt64]]()
        var sizes = [
            dispatch_recv_bytes(s),
            dispatch_count_bytes(s),
            combine_recv_bytes(s),
            combine_count_bytes(s),
        ]
        for i in range(4):
            tables.append(List[UInt64](length=R, fill=0))
            for r in range(R):
                var window = zeros[DType.uint8](ctx, sizes[i])
                tables[i][r] = UInt64(Int(window.unsafe_ptr()))
                self.windows.append(window^)
        self.none = List[UInt64](length=R, fill=0)
        self.recv = tables[0].copy()
        self.count = tables[1].copy()
        self.back = tables[2].copy()
        self.back_count = tables[3].copy()
        for r in range(R):
            var head = List[Int32](length=self.words, fill=0)
            init_counters(
                TileTensor(head, row_major(self.words)),
                s,
                rank=r,
                timeout_ns=timeout_ns,
            )
            self.counters.append(to_device[DType.int32](ctx, head))
        ctx.synchronize()

    def check(mut self, r: Int) raises:
        var copy = to_host[DType.int32](self.counters[r], self.words)
        check_counters(TileTensor(copy, row_major(self.words)))


def weight_of[width: Int](token: Int, k: Int) -> SIMD[DType.float32, width]:
    return SIMD[DType.float32, width](
        Float32(1 + (token * 3 + k * 5) % 11) * 0.37
    )


def send[
    F: TokenFormat, //, scaled: Bool = False
](mut world: GPUWorld[F], r: Int, given: Round) raises:
    comptime hidden = F.hidden_size
    var T = given.T[r]
    var x = to_device[DType.bfloat16](world.ctx, given.x[r])
    var ids = to_device[DType.int32](world.ctx, given.ids[r])
    var x_ = TileTensor(x, row_major(Coord(T, Idx[hidden])))
    var ids_ = TileTensor(ids, row_major(Coord(T, Idx[K])))
    var counters = TileTensor(world.counters[r], row_major(world.words))
    var none = TileTensor(world.none, row_major[R]())
    var recv = TileTensor(world.recv, row_major[R]())
    var count = TileTensor(world.count, row_major[R]())

    @__parameter
    def half[dtype: DType](expert: Int) capturing -> Scalar[dtype]:
        return Scalar[dtype](0.5)

    comptime if scaled:
        ep_dispatch_async_kernel_api[
            F, E, TM, R, 1, "gpu", input_scales_wrapper=half
        ](counters, x_, ids_, none, recv, count, world.ctx)
    else:
        ep_dispatch_async_kernel_api[F, E, TM, R, 1, "gpu"](
            counters, x_, ids_, none, recv, count, world.ctx
        )
    world.ctx.synchronize()
    _ = x^
    _ = ids^


def play_bf16[
    weighted: Bool
](mut world: GPUWorld[BF16[H]], sizes: List[Int], seed: Int) raises:
    """One round with identity experts."""
    var given = Round(sizes, H, seed)
    var ctx = world.ctx
    for r in range(R):
        send(world, r, given)
    for step in range(R):
        var r = (step + seed) % R
        var tokens = zeros[DType.bfloat16](ctx, ROWS * H)
        var offsets = zeros[DType.uint32](ctx, L + 1)
        var experts = zeros[DType.int32](ctx, L)
        var src_info = zeros[DType.int32](ctx, ROWS * 2)
        var counters = TileTensor(world.counters[r], row_major(world.words))
        ep_dispatch_wait_kernel_api[E, TM, R, 1, "gpu"](
            TokenHandler[BF16[H]](TileTensor(tokens, row_major[ROWS, H]())),
            TileTensor(offsets, row_major[L + 1]()),
            TileTensor(experts, row_major[L]()),
            TileTensor(src_info, row_major[ROWS, 2]()),
            TileTensor(world.recv, row_major[R]()),
            TileTensor(world.count, row_major[R]()),
            counters,
            ctx,
        )
        ep_combine_async_kernel_api[DType.bfloat16, H, K, E, TM, R, 1, "gpu"](
            counters,
            TileTensor(tokens, row_major[ROWS, H]()),
            TileTensor(src_info, row_major[ROWS, 2]()),
            TileTensor(world.none, row_major[R]()),
            TileTensor(world.back, row_major[R]()),
            TileTensor(world.back_count, row_major[R]()),
            ctx,
        )
        ctx.synchronize()
        var rows = check_rows(
            r,
            given,
            to_host[DType.uint32](offsets, L + 1),
            to_host[DType.int32](experts, L),
            to_host[DType.int32](src_info, ROWS * 2),
        )
        var got = to_host[DType.bfloat16](tokens, ROWS * H)
        for i in range(len(rows)):
            for h in range(H):
                var want = given.x[rows[i][1]][rows[i][2] * H + h]
                assert_equal(got[i * H + h], want)
    for r in range(R):
        var T = sizes[r]
        var out = zeros[DType.bfloat16](ctx, max(1, T * H))
        var out_ = TileTensor(out, row_major(Coord(T, Idx[H])))
        var counters = TileTensor(world.counters[r], row_major(world.words))
        var recv = TileTensor(world.back, row_major[R]())
        var count = TileTensor(world.back_count, row_major[R]())

        @__parameter
        def weights[
            width: Int
        ](token_idx: Int, topk_id: Int) capturing -> SIMD[DType.float32, width]:
            return weight_of[width](token_idx, topk_id)

        comptime if weighted:
            ep_combine_wait_kernel_api[
                H, K, E, TM, R, 1, "gpu", router_weights_wrapper=weights
            ](out_, counters, recv, count, ctx)
        else:
            ep_combine_wait_kernel_api[H, K, E, TM, R, 1, "gpu"](
                out_, counters, recv, count, ctx
            )
        ctx.synchronize()
        world.check(r)
        var got = to_host[DType.bfloat16](out, T * H)
        for t in range(T):
            for h in range(H):
                var acc: Float32 = 0
                for k in range(K):
                    var id = given.ids[r][t * K + k]
                    if id >= 0 and id < E:
                        var w = weight_of[1](t, k)[0] if weighted else Float32(
                            1
                        )
                        acc = fma(w, wide(given.x[r][t * H + h]), acc)
                assert_equal(bitcast[DType.uint16](got[t * H + h]), bf16(acc))


def play_fp8(ctx: DeviceContext) raises:
    """Dispatch of quantised tokens with an input scale: scales and values."""
    comptime F = BlockwiseFP8[H8]
    var world = GPUWorld[F](ctx)
    var given = Round([5, 2, 4], H8, 3)
    for r in range(R):
        send[scaled=True](world, r, given)
    for r in range(R):
        var tokens = zeros[DType.float8_e4m3fn](ctx, ROWS * H8)
        var scales = zeros[DType.float32](ctx, ROWS)
        var offsets = zeros[DType.uint32](ctx, L + 1)
        var experts = zeros[DType.int32](ctx, L)
        var src_info = zeros[DType.int32](ctx, ROWS * 2)
        ep_dispatch_wait_kernel_api[E, TM, R, 1, "gpu"](
            TokenHandler[F](
                TileTensor(tokens, row_major[ROWS, H8]()),
                TileTensor(scales, row_major[ROWS, 1]()),
            ),
            TileTensor(offsets, row_major[L + 1]()),
            TileTensor(experts, row_major[L]()),
            TileTensor(src_info, row_major[ROWS, 2]()),
            TileTensor(world.recv, row_major[R]()),
            TileTensor(world.count, row_major[R]()),
            TileTensor(world.counters[r], row_major(world.words)),
            ctx,
        )
        ctx.synchronize()
        world.check(r)
        var rows = check_rows(
            r,
            given,
            to_host[DType.uint32](offsets, L + 1),
            to_host[DType.int32](experts, L),
            to_host[DType.int32](src_info, ROWS * 2),
        )
        var got = to_host[DType.float32](scales, ROWS)
        for i in range(len(rows)):
            var at = rows[i][2] * H8
            var amax: Float32 = 1e-4
            for h in range(H8):
                amax = max(amax, abs(wide(given.x[rows[i][1]][at + h]) * 0.5))
            assert_equal(got[i], amax / 448)


def play_failures(ctx: DeviceContext) raises:
    """A missing peer and a wrong order go on record, by name, within the deadline."""
    var given = Round([2, 2, 2], H, 5)
    var world = GPUWorld[BF16[H]](ctx, timeout_ns=200_000_000)
    send(world, 0, given)
    send(world, 0, given)
    with assert_raises(contains="OrderError: rank 0, stage 1"):
        world.check(0)
    send(world, 1, given)
    var tokens = zeros[DType.bfloat16](ctx, ROWS * H)
    var offsets = zeros[DType.uint32](ctx, L + 1)
    var experts = zeros[DType.int32](ctx, L)
    var src_info = zeros[DType.int32](ctx, ROWS * 2)
    ep_dispatch_wait_kernel_api[E, TM, R, 1, "gpu"](
        TokenHandler[BF16[H]](TileTensor(tokens, row_major[ROWS, H]())),
        TileTensor(offsets, row_major[L + 1]()),
        TileTensor(experts, row_major[L]()),
        TileTensor(src_info, row_major[ROWS, 2]()),
        TileTensor(world.recv, row_major[R]()),
        TileTensor(world.count, row_major[R]()),
        TileTensor(world.counters[1], row_major(world.words)),
        ctx,
    )
    ctx.synchronize()
    with assert_raises(contains="rank 1, stage 2"):
        world.check(1)
    for offset in to_host[DType.uint32](offsets, L + 1):
        assert_equal(Int(offset), 0)


def give_ids_of[top_k: Int](mut world: GPUWorld[BF16[H]], given: Round) raises:
    """Send as rank 0 with `topk_ids` of another K."""
    var ids = zeros[DType.int32](world.ctx, 2 * top_k)
    var x = to_device[DType.bfloat16](world.ctx, given.x[0])
    ep_dispatch_async_kernel_api[BF16[H], E, TM, R, 1, "gpu"](
        TileTensor(world.counters[0], row_major(world.words)),
        TileTensor(x, row_major(Coord(2, Idx[H]))),
        TileTensor(ids, row_major(Coord(2, Idx[top_k]))),
        TileTensor(world.none, row_major[R]()),
        TileTensor(world.recv, row_major[R]()),
        TileTensor(world.count, row_major[R]()),
        world.ctx,
    )
    world.ctx.synchronize()
    _ = x^
    _ = ids^


def play_other_top_k(ctx: DeviceContext) raises:
    """A K that is not the head's is left alone, one that no rank has is refused; the next round is right."""
    var world = GPUWorld[BF16[H]](ctx)
    var given = Round([2, 2, 2], H, 5)
    var before = to_host[DType.int32](world.counters[0], world.words)
    give_ids_of[K - 1](world, given)
    give_ids_of[K + 1](world, given)
    give_ids_of[32](world, given)
    with assert_raises(contains="choices of a token = 33; allowed: 1 to 32"):
        give_ids_of[33](world, given)
    assert_equal(to_host[DType.int32](world.counters[0], world.words), before)
    play_bf16[True](world, [2, 2, 2], 5)


def main() raises:
    var ctx = DeviceContext()
    var world = GPUWorld[BF16[H]](ctx)
    play_bf16[True](world, [5, 0, 3], 0)
    play_bf16[False](world, [5, 5, 5], 1)
    play_bf16[True](world, [0, 0, 0], 2)
    for seed in range(3, 12):
        play_bf16[True](world, [seed % 6, seed * 5 % 6, seed * 3 % 6], seed)
    play_fp8(ctx)
    play_failures(ctx)
    play_other_top_k(ctx)
    print("13 rounds of bf16, one of fp8, two failures, other K: all right")
