"""Virtual ranks in one Mojo program, for test_api.mojo: memory, the four stages, inputs, and what rows must come
out."""

from layout import Coord, Idx, TileTensor, row_major
from max.gpu.host import DeviceContext
from std.memory import bitcast
from std.testing import assert_equal
from std.utils import IndexList

from ep_mojo import (
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
        handler: TokenHandler[Self.F, ...],
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
