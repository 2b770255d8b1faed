"""The seed-named functions from Mojo alone: whole rounds over virtual ranks against a scalar reference, exactly."""

from layout import TileTensor, row_major
from std.math import fma
from std.memory import bitcast
from std.testing import TestSuite, assert_equal, assert_raises, assert_true

from ep_mojo import (
    BF16,
    BlockwiseFP8,
    HostTeam,
    TokenHandler,
    View,
    ep_combine_wait_kernel_api,
    ep_dispatch_async_kernel_api,
    expert_slots_settings,
)
from ep_mojo.api.counters import ANY_RANK, is_mine
from ep_mojo.api.settings import dispatch_hash, dispatch_settings
from ep_mojo.api.target import check_top_k
from ep_mojo.gpu.launch import Peers
from ep_mojo.layout import HEAD_DISPATCH_HASH, HEAD_TOP_K
from ep_mojo.peers import PeerTable
from ep_mojo.head import Head
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
    World,
    bf16,
    check_rows,
    ids_of,
    tokens_of,
    weight,
    wide,
)


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


def test_another_top_k_is_not_mine() raises:
    """What a kernel of dispatch finds in the head: no hash covers K, and a wrong one would misread topk_ids."""
    var world = World[BF16[H]]()
    var counters = View[DType.int32](
        Int(world.counters[1].unsafe_ptr()), len(world.counters[1])
    )
    var table = View[DType.uint64](Int(world.recv_ptrs.unsafe_ptr()), R)
    for top_k in [K, 0, 1, K - 1, K + 1, 32, 33, 64]:
        var peers = Peers(
            dispatch_settings[BF16[H], E, TM, R](top_k),
            dispatch_hash[BF16[H], E, TM, R](),
            counters,
            PeerTable(table),
            PeerTable(table),
            HEAD_DISPATCH_HASH,
        )
        assert_true(is_mine(peers, 1))
        assert_equal(is_mine(peers, ANY_RANK, top_k), top_k == K)
        assert_equal(is_mine(peers, 1, top_k), top_k == K)
        assert_true(not is_mine(peers, 0, top_k))
    Head(counters.bytes()).set_i32(HEAD_TOP_K, 33)
    var peers = Peers(
        dispatch_settings[BF16[H], E, TM, R](33),
        dispatch_hash[BF16[H], E, TM, R](),
        counters,
        PeerTable(table),
        PeerTable(table),
        HEAD_DISPATCH_HASH,
    )
    assert_true(not is_mine(peers, 1, 33))
    _ = world^


def test_choices_that_no_rank_has() raises:
    for top_k in [1, 32]:
        check_top_k(top_k)
    for top_k in [0, 33, 64]:
        with assert_raises(contains="topk_ids: choices of a token = "):
            check_top_k(top_k)
        with assert_raises(contains="; allowed: 1 to 32; pass topk_ids"):
            check_top_k(top_k)


def main() raises:
    TestSuite.discover_tests[__functions_in_module()]().run()
