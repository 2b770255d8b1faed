"""The seed-named functions from Mojo alone: whole rounds over virtual ranks against a scalar reference, exactly."""

from layout import Coord, Idx, TileTensor, row_major
from max.gpu.host import DeviceContext
from std.math import fma
from std.memory import bitcast
from std.testing import (
    TestSuite,
    assert_equal,
    assert_raises,
    assert_true,
)
from std.utils import IndexList

from ep_mojo import (
    BF16,
    BlockwiseFP8,
    HostTeam,
    TokenFormat,
    TokenHandler,
    View,
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

comptime R = 3
comptime E = 6
comptime L = E // R
comptime K = 4
comptime TM = 5
comptime ROWS = R * TM * K
comptime H = 136
comptime H8 = 128


def weight(rank: Int, token: Int, k: Int) -> Float32:
    return Float32(1 + (rank * 7 + token * 3 + k * 5) % 11) * 0.37


struct World[F: TokenFormat](Movable):
    """All ranks: windows, tables, counters."""

    var recv: List[List[UInt8]]
    var count: List[List[UInt64]]
    var back: List[List[UInt8]]
    var back_count: List[List[UInt64]]
    var counters: List[List[Int32]]
    var no_ptrs: List[UInt64]
    var recv_ptrs: List[UInt64]
    var count_ptrs: List[UInt64]
    var back_ptrs: List[UInt64]
    var back_count_ptrs: List[UInt64]
    var context: DeviceContext

    def __init__(out self, timeout_ns: Int = 30_000_000_000) raises:
        var s = expert_slots_settings[Self.F, DType.bfloat16](
            n_ranks=R, n_experts=E, top_k=K, max_token_per_rank=TM
        )
        self.recv = List[List[UInt8]]()
        self.count = List[List[UInt64]]()
        self.back = List[List[UInt8]]()
        self.back_count = List[List[UInt64]]()
        self.counters = List[List[Int32]]()
        self.no_ptrs = List[UInt64](length=R, fill=0)
        self.recv_ptrs = List[UInt64](length=R, fill=0)
        self.count_ptrs = List[UInt64](length=R, fill=0)
        self.back_ptrs = List[UInt64](length=R, fill=0)
        self.back_count_ptrs = List[UInt64](length=R, fill=0)
        self.context = DeviceContext(api="cpu")
        for r in range(R):
            self.recv.append(List[UInt8](length=dispatch_recv_bytes(s), fill=0))
            self.count.append(
                List[UInt64](length=dispatch_count_bytes(s) // 8, fill=0)
            )
            self.back.append(List[UInt8](length=combine_recv_bytes(s), fill=0))
            self.back_count.append(
                List[UInt64](length=combine_count_bytes(s) // 8, fill=0)
            )
            self.counters.append(List[Int32](length=counters_words(s), fill=0))
            init_counters(
                TileTensor(self.counters[r], row_major(counters_words(s))),
                s,
                rank=r,
                timeout_ns=timeout_ns,
            )
        for r in range(R):
            self.recv_ptrs[r] = UInt64(Int(self.recv[r].unsafe_ptr()))
            self.count_ptrs[r] = UInt64(Int(self.count[r].unsafe_ptr()))
            self.back_ptrs[r] = UInt64(Int(self.back[r].unsafe_ptr()))
            self.back_count_ptrs[r] = UInt64(
                Int(self.back_count[r].unsafe_ptr())
            )

    def send[
        scaled: Bool = False
    ](mut self, r: Int, mut x: List[BFloat16], mut ids: List[Int32]) raises:
        var T = len(ids) // K
        var x_ = TileTensor(x, row_major(Coord(T, Idx[Self.F.hidden_size])))
        var ids_ = TileTensor(ids, row_major(Coord(T, Idx[K])))
        var words = len(self.counters[r])
        var counters = TileTensor(self.counters[r], row_major(words))
        var none = TileTensor(self.no_ptrs, row_major[R]())
        var recv = TileTensor(self.recv_ptrs, row_major[R]())
        var count = TileTensor(self.count_ptrs, row_major[R]())

        @__parameter
        def half[dtype: DType](expert: Int) capturing -> Scalar[dtype]:
            return Scalar[dtype](0.5)

        comptime if scaled:
            ep_dispatch_async_kernel_api[
                Self.F, E, TM, R, 1, "cpu", input_scales_wrapper=half
            ](counters, x_, ids_, none, recv, count, self.context)
        else:
            ep_dispatch_async_kernel_api[Self.F, E, TM, R, 1, "cpu"](
                counters, x_, ids_, none, recv, count, self.context
            )

    def receive(
        mut self,
        r: Int,
        handler: TokenHandler[Self.F],
        mut offsets: List[UInt32],
        mut experts: List[Int32],
        mut src_info: List[Int32],
    ) raises:
        var words = len(self.counters[r])
        ep_dispatch_wait_kernel_api[E, TM, R, 1, "cpu"](
            handler,
            TileTensor(offsets, row_major[L + 1]()),
            TileTensor(experts, row_major[L]()),
            TileTensor(src_info, row_major[ROWS, 2]()),
            TileTensor(self.recv_ptrs, row_major[R]()),
            TileTensor(self.count_ptrs, row_major[R]()),
            TileTensor(self.counters[r], row_major(words)),
            self.context,
        )

    def send_back(
        mut self, r: Int, mut y: List[BFloat16], mut src_info: List[Int32]
    ) raises:
        var words = len(self.counters[r])
        var recv = TileTensor(self.back_ptrs, row_major[R]())
        ep_combine_async_kernel_api[
            DType.bfloat16, Self.F.hidden_size, K, E, TM, R, 1, "cpu"
        ](
            TileTensor(self.counters[r], row_major(words)),
            TileTensor(y, row_major[ROWS, Self.F.hidden_size]()),
            TileTensor(src_info, row_major[ROWS, 2]()),
            TileTensor(self.no_ptrs, row_major[R]()),
            recv,
            TileTensor(self.back_count_ptrs, row_major[R]()),
            self.context,
        )

    def receive_back[
        weighted: Bool
    ](
        mut self,
        r: Int,
        T: Int,
        mut out: List[BFloat16],
        mut seen: List[BFloat16],
        num_input_tokens: Int = -1,
    ) raises:
        comptime hidden = Self.F.hidden_size
        var words = len(self.counters[r])
        var out_ = TileTensor(out, row_major(Coord(T, Idx[hidden])))
        var counters = TileTensor(self.counters[r], row_major(words))
        var recv = TileTensor(self.back_ptrs, row_major[R]())
        var count = TileTensor(self.back_count_ptrs, row_major[R]())

        @__parameter
        def weights[
            width: Int
        ](token_idx: Int, topk_id: Int) capturing -> SIMD[DType.float32, width]:
            return SIMD[DType.float32, width](weight(r, token_idx, topk_id))

        @__parameter
        def keep[
            dtype: DType, width: Int, *, alignment: Int = 1
        ](at: IndexList[2], sums: SIMD[dtype, width]) capturing -> None:
            for i in range(width):
                seen[at[0] * hidden + at[1] + i] = sums[i].cast[
                    DType.bfloat16
                ]()

        comptime if weighted:
            ep_combine_wait_kernel_api[
                hidden,
                K,
                E,
                TM,
                R,
                1,
                "cpu",
                router_weights_wrapper=weights,
                epilogue_fn=keep,
            ](out_, counters, recv, count, self.context, num_input_tokens)
        else:
            ep_combine_wait_kernel_api[hidden, K, E, TM, R, 1, "cpu"](
                out_, counters, recv, count, self.context, num_input_tokens
            )

    def check(mut self, r: Int) raises:
        var words = len(self.counters[r])
        check_counters(TileTensor(self.counters[r], row_major(words)))


def bf16(x: Float32) -> UInt16:
    """Round to nearest even, by hand."""
    var bits = bitcast[DType.uint32](x)
    var rest = bits & 0xFFFF
    var high = bits >> 16
    if rest > 0x8000 or (rest == 0x8000 and high & 1 == 1):
        high += 1
    return UInt16(high)


def wide(x: BFloat16) -> Float32:
    return bitcast[DType.float32](UInt32(bitcast[DType.uint16](x)) << 16)


def tokens_of(rank: Int, T: Int, hidden: Int, seed: Int) -> List[BFloat16]:
    var x = List[BFloat16](length=T * hidden, fill=0)
    for i in range(len(x)):
        var n = (i * 2654435761 + rank * 40503 + seed * 9973) % 4099
        x[i] = bitcast[DType.bfloat16](bf16(Float32(n - 2049) * 0.013))
    return x^


def ids_of(rank: Int, T: Int, seed: Int) -> List[Int32]:
    """Every expert, -1, E and duplicates; every third token has the same expert K times."""
    var ids = List[Int32](length=T * K, fill=0)
    for i in range(len(ids)):
        var t = i // K
        var n = (i * 7 + rank * 5 + seed * 3 + t * t) % (E + 2) - 1
        ids[i] = Int32(seed % E) if t % 3 == 2 else Int32(n)
    return ids^


struct Round(Movable):
    """What each rank gives and what it must get."""

    var T: List[Int]
    var x: List[List[BFloat16]]
    var ids: List[List[Int32]]

    def __init__(out self, sizes: List[Int], hidden: Int, seed: Int):
        self.T = sizes.copy()
        self.x = List[List[BFloat16]]()
        self.ids = List[List[Int32]]()
        for r in range(R):
            self.x.append(tokens_of(r, sizes[r], hidden, seed))
            self.ids.append(ids_of(r, sizes[r], seed))

    def rows(self, rank: Int) -> List[List[Int]]:
        """(group, source, token, k) of every row of a rank, in order."""
        var rows = List[List[Int]]()
        for e in range(L):
            for source in range(R):
                for i in range(len(self.ids[source])):
                    if Int(self.ids[source][i]) == rank * L + e:
                        rows.append([e, source, i // K, i % K])
        return rows^


def check_rows(
    rank: Int,
    given: Round,
    offsets: List[UInt32],
    experts: List[Int32],
    src_info: List[Int32],
) raises -> List[List[Int]]:
    var rows = given.rows(rank)
    var n = List[Int](length=L + 1, fill=0)
    for i in range(len(rows)):
        n[rows[i][0] + 1] += 1
        assert_equal(Int(src_info[2 * i]), rows[i][1] * TM + rows[i][2])
        assert_equal(Int(src_info[2 * i + 1]), rows[i][3])
    for i in range(len(rows), ROWS):
        assert_equal(src_info[2 * i], -1)
        assert_equal(src_info[2 * i + 1], -1)
    var run = 0
    for e in range(L + 1):
        run += n[e]
        assert_equal(Int(offsets[e]), run)
    for e in range(L):
        assert_equal(Int(experts[e]), rank * L + e)
    return rows^


def play_bf16[
    weighted: Bool
](mut world: World[BF16[H]], sizes: List[Int], seed: Int) raises:
    """One round with identity experts."""
    var given = Round(sizes, H, seed)
    for r in range(R):
        world.send(r, given.x[r], given.ids[r])
    for step in range(R):
        var r = (step + seed) % R
        var tokens = List[BFloat16](length=ROWS * H, fill=1)
        var offsets = List[UInt32](length=L + 1, fill=9)
        var experts = List[Int32](length=L, fill=9)
        var src_info = List[Int32](length=ROWS * 2, fill=9)
        var handler = TokenHandler[BF16[H]](
            TileTensor(tokens, row_major[ROWS, H]())
        )
        world.receive(r, handler, offsets, experts, src_info)
        var rows = check_rows(r, given, offsets, experts, src_info)
        for i in range(len(rows)):
            for h in range(H):
                var want = given.x[rows[i][1]][rows[i][2] * H + h]
                assert_equal(tokens[i * H + h], want)
        world.send_back(r, tokens, src_info)
    for r in range(R):
        var T = sizes[r]
        var out = List[BFloat16](length=T * H, fill=7)
        var seen = List[BFloat16](length=T * H, fill=7)
        world.receive_back[weighted](r, T, out, seen)
        for t in range(T):
            for h in range(H):
                var acc: Float32 = 0
                for k in range(K):
                    var id = given.ids[r][t * K + k]
                    if id >= 0 and id < E:
                        var w = weight(r, t, k) if weighted else Float32(1)
                        acc = fma(w, wide(given.x[r][t * H + h]), acc)
                var got = bitcast[DType.uint16](out[t * H + h])
                assert_equal(got, bf16(acc))
                comptime if weighted:
                    assert_equal(out[t * H + h], seen[t * H + h])
        world.check(r)


def test_rounds() raises:
    var world = World[BF16[H]]()
    play_bf16[True](world, [5, 0, 3], 0)
    play_bf16[False](world, [5, 5, 5], 1)
    play_bf16[True](world, [0, 0, 0], 2)
    for seed in range(3, 12):
        play_bf16[True](world, [seed % 6, seed * 5 % 6, seed * 3 % 6], seed)


def test_fp8_with_input_scale() raises:
    comptime F = BlockwiseFP8[H8]
    var world = World[F]()
    var given = Round([5, 2, 4], H8, 3)
    for r in range(R):
        world.send[scaled=True](r, given.x[r], given.ids[r])
    for r in range(R):
        var tokens = List[Scalar[DType.float8_e4m3fn]](
            length=ROWS * H8, fill=Scalar[DType.float8_e4m3fn](0)
        )
        var scales = List[Float32](length=ROWS, fill=0)
        var offsets = List[UInt32](length=L + 1, fill=9)
        var experts = List[Int32](length=L, fill=9)
        var src_info = List[Int32](length=ROWS * 2, fill=9)
        var handler = TokenHandler[F](
            TileTensor(tokens, row_major[ROWS, H8]()),
            TileTensor(scales, row_major[ROWS, 1]()),
        )
        world.receive(r, handler, offsets, experts, src_info)
        var rows = check_rows(r, given, offsets, experts, src_info)
        for i in range(len(rows)):
            var x = given.x[rows[i][1]].copy()
            var at = rows[i][2] * H8
            var amax: Float32 = 1e-4
            for h in range(H8):
                amax = max(amax, abs(wide(x[at + h]) * 0.5))
            assert_equal(scales[i], amax / 448)
            var message = List[UInt8](length=F.message_bytes, fill=0)
            F.encode[HostTeam](
                View[DType.uint8](Int(x.unsafe_ptr()) + 2 * at, 1).bytes(),
                0.5,
                View[DType.uint8](Int(message.unsafe_ptr()), 1).bytes(),
            )
            _ = x^
            for h in range(H8):
                var got = bitcast[DType.uint8](tokens[i * H8 + h])
                assert_equal(got, message[h])


def test_num_input_tokens() raises:
    """Rows past num_input_tokens are zero; more than there are is a failure that stays until a new start."""
    var world = World[BF16[H]]()
    var given = Round([4, 4, 4], H, 0)
    for stage in range(2):
        for r in range(R):
            world.send(r, given.x[r], given.ids[r])
        for r in range(R):
            var tokens = List[BFloat16](length=ROWS * H, fill=1)
            var offsets = List[UInt32](length=L + 1, fill=9)
            var experts = List[Int32](length=L, fill=9)
            var src_info = List[Int32](length=ROWS * 2, fill=9)
            var handler = TokenHandler[BF16[H]](
                TileTensor(tokens, row_major[ROWS, H]())
            )
            world.receive(r, handler, offsets, experts, src_info)
            world.send_back(r, tokens, src_info)
        for r in range(R):
            var out = List[BFloat16](length=4 * H, fill=7)
            var seen = List[BFloat16](length=4 * H, fill=7)
            world.receive_back[True](
                r, 4, out, seen, 2 if stage == 0 else (5 if r == 0 else -1)
            )
            for i in range(2 * H, 4 * H):
                assert_true(stage == 1 or out[i] == 0)
            if stage == 1 and r == 0:
                for i in range(4 * H):
                    assert_equal(out[i], 0)
                with assert_raises(contains="ShapeError"):
                    world.check(r)
            else:
                world.check(r)
    var x = tokens_of(0, 4, H, 0)
    for r in range(R):  # rank 0 publishes FAILED, and the others see it
        world.send(r, x, given.ids[r])
    var tokens = List[BFloat16](length=ROWS * H, fill=1)
    var offsets = List[UInt32](length=L + 1, fill=9)
    var experts = List[Int32](length=L, fill=9)
    var src_info = List[Int32](length=ROWS * 2, fill=9)
    var handler = TokenHandler[BF16[H]](
        TileTensor(tokens, row_major[ROWS, H]())
    )
    world.receive(1, handler, offsets, experts, src_info)
    with assert_raises(contains="kind 4, peer 0"):
        world.check(1)
    for e in range(L + 1):
        assert_equal(offsets[e], 0)
    for i in range(2 * ROWS):
        assert_equal(src_info[i], -1)


def test_order_and_deadline() raises:
    var world = World[BF16[H]](timeout_ns=20_000_000)
    var given = Round([2, 2, 2], H, 0)
    var tokens = List[BFloat16](length=ROWS * H, fill=1)
    var src_info = List[Int32](length=ROWS * 2, fill=-1)
    world.send_back(2, tokens, src_info)
    with assert_raises(contains="OrderError: rank 2, stage 3"):
        world.check(2)
    world.send(0, given.x[0], given.ids[0])
    var offsets = List[UInt32](length=L + 1, fill=9)
    var experts = List[Int32](length=L, fill=9)
    var handler = TokenHandler[BF16[H]](
        TileTensor(tokens, row_major[ROWS, H]())
    )
    world.receive(0, handler, offsets, experts, src_info)
    with assert_raises(contains="PeerTimeoutError: rank 0, stage 2"):
        world.check(0)
    var other = World[BF16[H]]()
    other.send(1, given.x[1], given.ids[1])
    other.send(1, given.x[1], given.ids[1])
    with assert_raises(contains="OrderError: rank 1, stage 1"):
        other.check(1)


def test_refusals() raises:
    """Arguments that do not fit raise before anything is written."""
    var world = World[BF16[H]]()
    var x = tokens_of(0, 2, H, 0)
    var ids = ids_of(0, 2, 0)
    var none = TileTensor(world.no_ptrs, row_major[R]())
    var recv = TileTensor(world.recv_ptrs, row_major[R]())
    var count = TileTensor(world.count_ptrs, row_major[R]())
    var words = len(world.counters[0])
    var x_ = TileTensor(x, row_major[2, H]())
    with assert_raises(contains="ShapeError: topk_ids"):
        var few = TileTensor(ids, row_major[2, K - 1]())
        var c = TileTensor(world.counters[0], row_major(words))
        ep_dispatch_async_kernel_api[BF16[H], E, TM, R, 1, "cpu"](
            c, x_, few, none, recv, count, world.context
        )
    var ids_ = TileTensor(ids, row_major[2, K]())
    with assert_raises(contains="ConfigMismatchError"):
        var c = TileTensor(world.counters[0], row_major(words))
        ep_dispatch_async_kernel_api[BF16[H], E, TM - 1, R, 1, "cpu"](
            c, x_, ids_, none, recv, count, world.context
        )
    with assert_raises(contains="CorruptHeadError"):
        var c = TileTensor(world.counters[0], row_major(10))
        ep_dispatch_async_kernel_api[BF16[H], E, TM, R, 1, "cpu"](
            c, x_, ids_, none, recv, count, world.context
        )
    with assert_raises(contains="ConfigMismatchError"):
        var y = List[BFloat16](length=2 * 8, fill=0)
        var c = TileTensor(world.counters[0], row_major(words))
        ep_combine_wait_kernel_api[8, K, E, TM, R, 1, "cpu"](
            TileTensor(y, row_major[2, 8]()), c, recv, count, world.context
        )
    with assert_raises(contains="ConfigError: n_ranks=3, n_experts=7"):
        _ = expert_slots_settings[BF16[H], DType.bfloat16](
            n_ranks=3, n_experts=7, top_k=1, max_token_per_rank=1
        )
    for i in range(len(world.count[0])):
        assert_equal(world.count[0][i], 0)


def main() raises:
    TestSuite.discover_tests[__functions_in_module()]().run()
