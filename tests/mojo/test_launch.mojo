"""How a GPU launch with a budget asks to come first."""

from ep_mojo.gpu.precedence import precedence, priority_of
from ep_mojo.settings import Settings
from max.gpu.host import DeviceContext
from max.gpu.host.launch_attribute import LaunchAttributeID
from std.testing import TestSuite, assert_equal, assert_true


def settings(n_sms: Int) -> Settings:
    var s = Settings(
        n_ranks=1,
        n_experts=1,
        top_k=1,
        max_tokens=1,
        hidden_size=8,
        message_bytes=16,
        row_bytes=16,
        format_tag=0,
    )
    s.n_sms = n_sms
    return s


def test_priority_is_an_int32() raises:
    var first = priority_of(-5)
    assert_true(first.id == LaunchAttributeID.PRIORITY)
    assert_equal(String(first.id), "8")  # CU_LAUNCH_ATTRIBUTE_PRIORITY
    for i in range(64):
        var byte = Int(first.value._storage[i])
        assert_equal(byte, (0xFB if i == 0 else 0xFF) if i < 4 else 0)


def test_only_cuda_has_priorities() raises:
    var host = DeviceContext(api="cpu")
    assert_equal(len(precedence(host, settings(4))), 0)
    assert_equal(len(precedence(host, settings(0))), 0)


def main() raises:
    TestSuite.discover_tests[__functions_in_module()]().run()
