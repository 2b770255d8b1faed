"""What ops refuse before they read or write: windows that lie in another way than the op was compiled for."""

from ep_mojo import BF16, View, expert_slots_settings
from ep_mojo.combine_tensors import CombineInput, CombineOutput
from ep_mojo.dispatch_tensors import DispatchOutput
from ep_mojo.layout import EXPERT_SLOTS_HEADER
from ep_mojo.ops.checks import (
    check_output,
    check_rows,
    check_sums,
    refuse_virtual,
)
from ep_mojo.settings import Settings
from std.testing import TestSuite, assert_raises

comptime F = BF16[H]
comptime H = 8
comptime K = 2
comptime L = 2
comptime R = 2
comptime TM = 4
comptime ROWS = R * TM * K
comptime CHOICES = R * TM * K
comptime ROW = 2 * H


def settings(expert_slots: Bool) raises -> Settings:
    """Settings that differ in the slot policy alone, as two configs can that need as many counters."""
    var s = expert_slots_settings[F, DType.bfloat16](
        n_ranks=R, n_experts=R * L, top_k=K, max_token_per_rank=TM
    )
    s.expert_slots = expert_slots
    if not expert_slots:
        s.message_bytes -= EXPERT_SLOTS_HEADER
    return s


def absent[dtype: DType](size: Int = 0) -> View[dtype]:
    """A tensor of a size, which nobody reads."""
    return View[dtype](0, size)


def received() -> DispatchOutput:
    return DispatchOutput(
        absent[DType.uint8](ROWS * ROW),
        absent[DType.uint8](),
        absent[DType.uint32](L + 1),
        absent[DType.int32](L),
        absent[DType.int32](L),
        absent[DType.int32](2 * ROWS),
        absent[DType.int32](),
        absent[DType.float32](),
        absent[DType.float32](CHOICES),
        absent[DType.int32](CHOICES),
        absent[DType.int32](R),
    )


def rows() -> CombineInput:
    return CombineInput(
        absent[DType.uint8](ROWS * ROW),
        absent[DType.int32](CHOICES),
        absent[DType.float32](CHOICES),
        absent[DType.int32](R),
        absent[DType.uint8](),
    )


def sums() -> CombineOutput[DType.int32]:
    var none = absent[DType.uint8]()
    return CombineOutput[DType.int32](
        absent[DType.uint8](TM * ROW),
        TM,
        absent[DType.int32](TM * K),
        absent[DType.float32](),
        absent[DType.int32](),
        none,
        none,
        none,
    )


def test_dispatch_wait_compares_slots_and_messages() raises:
    var own = settings(expert_slots=False)
    var other = settings(expert_slots=True)
    check_output[F, "expert", False](own, received())
    check_output[F, "expert", True](other, received())
    with assert_raises(contains="ShapeError: settings: slots = 1; allowed: 0"):
        check_output[F, "expert", False](other, received())
    with assert_raises(contains="ShapeError: settings: slots = 0; allowed: 1"):
        check_output[F, "expert", True](own, received())
    own.message_bytes -= 8  # a message of F would end behind its slot
    with assert_raises(contains="settings: message_bytes = 8; allowed: 16"):
        check_output[F, "expert", False](own, received())


def test_graph_and_settings_agree_on_who_gets_tokens() raises:
    var some = settings(expert_slots=False)
    var all = settings(expert_slots=False)
    all.everywhere = True
    comptime text = "ShapeError: settings: all ranks gather = "
    with assert_raises(contains=text + "1; allowed: 0"):
        check_output[F, "expert", False](all, received())
    with assert_raises(contains=text + "0; allowed: 1"):
        check_output[F, "gathered", False](some, received())
    with assert_raises(contains=text + "1; allowed: 0"):
        check_rows["rank", "source"](all, rows(), ROW)
    with assert_raises(contains=text + "0; allowed: 1"):
        check_rows["gathered", "source"](some, rows(), ROW)
    with assert_raises(contains=text + "1; allowed: 0"):
        check_sums["expert", "source", False](all, sums(), ROW, ROW, ROW)
    with assert_raises(contains=text + "0; allowed: 1"):
        check_sums["gathered", "source", False](some, sums(), ROW, ROW, ROW)


def test_combine_async_compares_slots() raises:
    check_rows["expert", "source"](settings(expert_slots=False), rows(), ROW)
    with assert_raises(contains="ShapeError: settings: slots = 1; allowed: 0"):
        check_rows["expert", "source"](settings(expert_slots=True), rows(), ROW)


def test_combine_wait_compares_slots() raises:
    var own = settings(expert_slots=False)
    var other = settings(expert_slots=True)
    check_sums["expert", "source", False](own, sums(), ROW, ROW, ROW)
    check_sums["expert", "source", True](other, sums(), ROW, ROW, ROW)
    with assert_raises(contains="ShapeError: settings: slots = 1; allowed: 0"):
        check_sums["expert", "source", False](other, sums(), ROW, ROW, ROW)
    with assert_raises(contains="ShapeError: settings: slots = 0; allowed: 1"):
        check_sums["expert", "source", True](own, sums(), ROW, ROW, ROW)


def test_fused_stages_refuse_virtual_ranks() raises:
    var s = settings(expert_slots=False)
    refuse_virtual(s)
    s.virtual = True
    with assert_raises(contains="OrderError: fused stages need ranks that run"):
        refuse_virtual(s)


def main() raises:
    TestSuite.discover_tests[__functions_in_module()]().run()
