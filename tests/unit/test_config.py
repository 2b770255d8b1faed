"""EPConfig and the formats: every field checked, sizes derived, settings and hash stable."""

import copy
import dataclasses
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from ep_mojo.config import BF16, BlockwiseFP8, CustomFormat, EPConfig, fnv1a64
from ep_mojo.errors import ConfigError, EPError, UnsupportedError
from ep_mojo.formats import TokenFormat
from ep_mojo.handle import Handle

GOOD = {"hidden_size": 7168, "top_k": 8, "n_experts": 256, "max_tokens_per_rank": 128, "n_ranks": 8}
INT8 = CustomFormat("my_formats.Int8Rows", "int8", message_size=7184, scale_dtype="float32", scale_count=1)


def make(**changes):
    return EPConfig(**GOOD | changes)


INT_FIELDS = {
    "hidden_size": (8, 65536),
    "top_k": (1, 32),
    "n_experts": (1, 2048),
    "max_tokens_per_rank": (1, 2**22),
    "n_ranks": (1, 8),
    "alignment": (1, 1024),
    "max_rows": (1, 2**31 - 1),
    "num_buffers": (1, 8),
    "tokens_per_signal": (1, 2**24 - 1),
    "n_sms": (1, 1024),
}
CHOICES = {
    "output_layout": ["expert", "expert_padded", "rank", "gathered"],
    "reduce": ["expert", "source", None],
    "slots": ["rank", "expert"],
    "combine_dtype": ["bfloat16", "float32"],
    "output_dtype": ["bfloat16", "float32"],
}


def short(value):
    """Name of a test's value, without an address: that differs from run to run."""
    return repr(value).partition(" at 0x")[0]


@pytest.mark.parametrize(
    "bad", [True, np.True_, 2.0, np.float32(2), "8", b"8", [8], np.array([8, 9]), 1j, object()], ids=short
)
@pytest.mark.parametrize("name", INT_FIELDS)
def test_integers_only(name, bad):
    with pytest.raises(ConfigError, match=name) as raised:
        make(**{name: bad})
    assert raised.value.field == name
    assert raised.value.remedy


@pytest.mark.parametrize("name", ["hidden_size", "top_k", "n_experts", "max_tokens_per_rank", "n_ranks", "alignment"])
def test_none_is_no_integer(name):
    with pytest.raises(ConfigError, match=name):
        make(**{name: None})


@pytest.mark.parametrize("name", INT_FIELDS)
def test_integer_ranges(name):
    low, high = INT_FIELDS[name]
    for bad in (low - 1, high + 1, -1, 10**30):
        with pytest.raises(ConfigError) as raised:
            make(**{name: bad})
        assert raised.value.field == name
        assert raised.value.value == bad
        assert str(low) in raised.value.allowed
        assert str(high) in raised.value.allowed
    fitting = {"top_k": 1, "max_tokens_per_rank": 1, "n_ranks": 1, "n_experts": 8, "hidden_size": 8}
    for good in (low, high):
        assert getattr(EPConfig(**fitting | {name: good}), name) == good


@pytest.mark.parametrize("name", CHOICES)
def test_choices(name):
    for good in CHOICES[name]:
        assert getattr(make(**{name: good}), name) in (good, "source")
    for bad in ("other", "", "Expert", 1, True, ["expert"], 3.5):
        with pytest.raises(ConfigError) as raised:
            make(**{name: bad})
        assert raised.value.field == name
        assert repr(CHOICES[name][0]) in raised.value.allowed


@pytest.mark.parametrize("bad", [None, "bf16", BF16, BlockwiseFP8, 3, TokenFormat()], ids=short)
def test_format_objects_only(bad):
    with pytest.raises(ConfigError, match="dispatch_format"):
        make(dispatch_format=bad)


@pytest.mark.parametrize(
    "bad", [True, "30", None, -1, -0.001, float("nan"), float("inf"), 1e7, [1], np.ones(2)], ids=repr
)
def test_bad_timeouts(bad):
    with pytest.raises(ConfigError, match="timeout_s"):
        make(timeout_s=bad)


@pytest.mark.parametrize("good", [0, 0.0, 1, 0.25, np.float32(0.5), np.int64(3), 1e6])
def test_good_timeouts(good):
    config = make(timeout_s=good)
    assert config.timeout_s == float(good)
    assert type(config.timeout_s) is float


@pytest.mark.parametrize("bad", [1, 0, None, "yes", np.int32(1)], ids=repr)
def test_shared_expert_is_a_bool(bad):
    with pytest.raises(ConfigError, match="shared_expert"):
        make(shared_expert=bad)
    assert make(shared_expert=np.True_).shared_expert is True


CONTRADICTIONS = [
    ({"hidden_size": 100}, "hidden_size"),
    ({"hidden_size": 12}, "hidden_size"),
    ({"hidden_size": 192, "dispatch_format": BlockwiseFP8()}, "hidden_size"),
    ({"n_experts": 255}, "n_experts"),
    ({"n_ranks": 7}, "n_experts"),
    ({"n_experts": 4, "n_ranks": 8}, "n_experts"),
    ({"max_tokens_per_rank": 2**21}, "max_tokens_per_rank"),
    ({"max_tokens_per_rank": 2**22 + 1, "top_k": 1}, "max_tokens_per_rank"),
    ({"alignment": 8, "output_layout": "rank"}, "alignment"),
    ({"alignment": 8, "output_layout": "gathered"}, "alignment"),
    ({"top_k": 0}, "top_k"),
    ({"alignment": 8, "output_layout": "expert_padded"}, "alignment"),
    ({"shared_expert": True, "output_layout": "rank"}, "shared_expert"),
    ({"shared_expert": True, "output_layout": "expert_padded"}, "shared_expert"),
    ({"max_rows": 100, "output_layout": "expert_padded"}, "max_rows"),
    ({"max_tokens_per_rank": 2**21 - 1, "n_experts": 2048, "output_layout": "expert_padded"}, "max_tokens_per_rank"),
    ({"slots": "expert", "num_buffers": 2}, "num_buffers"),
    ({"dispatch_format": CustomFormat("a.B", "int8", message_size=16)}, "dispatch_format.message_size"),
]
EXPERT_SLOTS_SCOPE = [
    ({"output_layout": "rank"}, "output_layout"),
    ({"reduce": "expert"}, "reduce"),
    ({"alignment": 8}, "alignment"),
    ({"shared_expert": True}, "shared_expert"),
]


@pytest.mark.parametrize(("changes", "name"), CONTRADICTIONS, ids=lambda v: str(v)[:60])
def test_contradictions(changes, name):
    with pytest.raises(ConfigError) as raised:
        make(**changes)
    assert raised.value.field == name
    assert raised.value.allowed
    assert raised.value.remedy


@pytest.mark.parametrize(("changes", "name"), EXPERT_SLOTS_SCOPE, ids=lambda v: str(v)[:60])
def test_scope_of_expert_slots(changes, name):
    with pytest.raises(UnsupportedError) as raised:
        make(slots="expert", **changes)
    assert raised.value.field == name
    assert raised.value.remedy


def test_pairs_up_to_the_limit():
    assert make(max_tokens_per_rank=(2**24 - 1) // 8).max_tokens_per_rank == 2097151
    with pytest.raises(ConfigError, match="2097151"):
        make(max_tokens_per_rank=2097152)
    assert make(max_tokens_per_rank=2**22, top_k=1)


def test_top_k_may_exceed_experts():
    assert make(n_experts=8, top_k=32).n_local_experts == 1


def test_numpy_integers_become_ints():
    config = EPConfig(
        **{name: np.int64(value) for name, value in GOOD.items()}, alignment=np.uint8(4), n_sms=np.array(3)
    )
    for name in (*GOOD, "alignment", "n_sms"):
        assert type(getattr(config, name)) is int
    assert config == make(alignment=4, n_sms=3)
    assert hash(config) == hash(make(alignment=4, n_sms=3))


def test_defaults():
    config = make()
    assert config.dispatch_format == BF16()
    assert (config.output_layout, config.reduce, config.slots, config.num_buffers) == ("expert", None, "rank", 2)
    expert_slots = make(slots="expert")
    assert (expert_slots.reduce, expert_slots.num_buffers) == ("source", 1)


def test_frozen_hashable_copyable_picklable():
    config = make(dispatch_format=BlockwiseFP8(scale="ue8m0"), alignment=16)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.top_k = 4
    assert pickle.loads(pickle.dumps(config)) == config == copy.deepcopy(config)
    assert {config: 1}[copy.copy(config)] == 1


@pytest.mark.parametrize(("name", "near"), [("layout", "output_layout"), ("topk", "top_k"), ("n_nodes", "")])
def test_a_name_that_is_no_field(name, near):
    with pytest.raises(ConfigError, match=rf"{name} = 1.*{near}.*(did you mean {near}|check the spelling)"):
        make(**{name: 1})


def test_replace():
    config = make()
    assert config.replace(top_k=4).top_k == 4
    assert dataclasses.replace(config, top_k=4) == config.replace(top_k=4)
    assert config.replace(slots="expert") == make(slots="expert")
    assert config.replace(slots="expert").replace(slots="rank") == config
    with pytest.raises(ConfigError, match="top_k"):
        config.replace(top_k=0)
    with pytest.raises(ConfigError, match="topk"):
        config.replace(topk=3)


def test_repr_is_code():
    for config in (make(), make(slots="expert"), make(num_buffers=3, dispatch_format=BlockwiseFP8("ue8m0", "column"))):
        assert eval(repr(config)) == config
    assert repr(make()) == ("EPConfig(hidden_size=7168, top_k=8, n_experts=256, max_tokens_per_rank=128, n_ranks=8)")


def test_rows_capacity():
    assert make().rows_capacity == 8 * 128 * 8
    assert make(alignment=16).rows_capacity == 8 * 128 * 8 + 32 * 15
    assert make(alignment=16, shared_expert=True).rows_capacity == 8 * 128 * 8 + 32 * 15 + 128 + 15
    assert make(output_layout="expert_padded").rows_capacity == 32 * 8 * 128
    assert make(output_layout="rank").rows_capacity == 8 * 128
    gathered = make(output_layout="gathered", top_k=0)
    assert gathered.rows_capacity == 8 * 128
    assert gathered.combine_slots == 8
    assert make(max_rows=77).rows_capacity == 77


def test_groups():
    assert make().n_groups == make().n_local_experts == 32
    assert make(shared_expert=True).n_groups == 33


def test_message_bytes():
    assert make().dispatch_message_bytes == 14336
    assert make(slots="expert").dispatch_message_bytes == 14352
    assert make(dispatch_format=BlockwiseFP8()).dispatch_message_bytes == 7168 + 56 * 4
    assert make(dispatch_format=BlockwiseFP8("power_of_two")).dispatch_message_bytes == 7168 + 56 * 4
    assert make(dispatch_format=BlockwiseFP8("ue8m0")).dispatch_message_bytes == 7168 + 14 * 4 + 8
    assert make(dispatch_format=BlockwiseFP8("ue8m0"), slots="expert").dispatch_message_bytes == 7168 + 64 + 16
    assert make(dispatch_format=BlockwiseFP8(), hidden_size=128).dispatch_message_bytes == 144
    assert make(dispatch_format=INT8).dispatch_message_bytes == 7184
    assert make(hidden_size=8).dispatch_message_bytes == 16


def test_combine_sizes():
    assert make().combine_row_bytes == 14336
    assert make(combine_dtype="float32").combine_row_bytes == 28672
    assert make(reduce="expert", top_k=4).combine_slots == 8
    assert make(reduce="source", top_k=4).combine_slots == 4
    assert make(top_k=4).combine_slots == 8
    assert make(top_k=16).combine_slots == 16
    assert make(reduce="source", top_k=4, output_layout="rank").combine_slots == 8
    assert make(slots="expert", top_k=4).combine_slots == 4


@pytest.mark.parametrize(
    ("tokens", "per_signal", "signals"), [(1, 8, 1), (8, 8, 1), (9, 8, 2), (128, 1, 128), (5, 99, 1)]
)
def test_signals(tokens, per_signal, signals):
    assert make(max_tokens_per_rank=tokens, tokens_per_signal=per_signal).n_signals == signals


def test_settings():
    config = make(n_sms=20, alignment=4, shared_expert=True, tokens_per_signal=8)
    words = config.settings(virtual=True)
    assert words[:15] == [8, 256, 8, 128, 2, 4, 8, 7168, 14336, 14336, 8, 20, 1, 0, 1]
    assert words[15] == fnv1a64(b"bf16") >> 1
    assert all(type(w) is int and 0 <= w < 2**63 for w in words)
    assert config.settings(virtual=False)[12] == 0
    assert make(slots="expert").settings(False)[13] == 1
    np.array(words, dtype=np.int64)


def test_fnv1a64():
    # Values published with the algorithm.
    assert fnv1a64(b"") == 0xCBF29CE484222325
    assert fnv1a64(b"a") == 0xAF63DC4C8601EC8C
    assert fnv1a64(b"foobar") == 0x85944171F73967E8


def test_config_hash():
    config = make()
    words = config.settings(virtual=True)
    words[11] = words[12] = 0
    assert config.config_hash() == fnv1a64(struct.pack("<17q", *words))
    assert config.config_hash() == make(n_sms=3).config_hash() == make(timeout_s=1).config_hash()
    others = [
        make(top_k=4),
        make(dispatch_format=BlockwiseFP8()),
        make(dispatch_format=BlockwiseFP8("power_of_two")),
        make(slots="expert"),
        make(tokens_per_signal=4),
        make(num_buffers=3),
        make(reduce="source"),
        make(reduce="expert"),
    ]
    assert len({c.config_hash() for c in [config, *others]}) == 9


@pytest.mark.parametrize("fmt", [BF16(), BlockwiseFP8(), BlockwiseFP8("ue8m0", "column"), INT8], ids=lambda f: f.key())
def test_formats_are_values(fmt):
    assert pickle.loads(pickle.dumps(fmt)) == fmt
    assert hash(fmt) == hash(copy.copy(fmt))
    assert eval(repr(fmt)) == fmt


def test_format_sizes():
    assert (BF16().token_bytes(8), BF16().scales_per_token(8), BF16().scale_dtype) == (16, 0, None)
    assert BlockwiseFP8().token_dtype == "float8_e4m3fn"
    assert [BlockwiseFP8(s).scale_dtype for s in BlockwiseFP8.SCALES] == ["float32", "float32", "int32"]
    assert [BlockwiseFP8("ue8m0").scales_per_token(128 * n) for n in (1, 4, 5, 8)] == [1, 1, 2, 2]
    assert BlockwiseFP8().scales_per_token(640) == 5
    assert (INT8.token_bytes(7168), INT8.scales_per_token(7168)) == (7168, 1)
    packed = CustomFormat("a.B", "uint8", message_size=64, token_size=50)
    assert (packed.token_bytes(100), packed.token_elements(100), packed.scales_per_token(100)) == (50, 50, 0)
    assert make(dispatch_format=packed).token_elements == 50


def test_format_keys_differ():
    formats = [BF16(), INT8] + [BlockwiseFP8(s, layout) for s in BlockwiseFP8.SCALES for layout in ("row", "column")]
    assert len({f.key() for f in formats}) == len(formats)


BAD_FORMATS = [
    (BlockwiseFP8, {"scale": "float16"}, "scale"),
    (BlockwiseFP8, {"scale": None}, "scale"),
    (BlockwiseFP8, {"scales_layout": "diagonal"}, "scales_layout"),
    (CustomFormat, {"struct": "no-name"}, "struct"),
    (CustomFormat, {"struct": ""}, "struct"),
    (CustomFormat, {"struct": None}, "struct"),
    (CustomFormat, {"token_dtype": "float128"}, "token_dtype"),
    (CustomFormat, {"message_size": 17}, "message_size"),
    (CustomFormat, {"message_size": 0}, "message_size"),
    (CustomFormat, {"message_size": "16"}, "message_size"),
    (CustomFormat, {"token_size": 0}, "token_size"),
    (CustomFormat, {"scale_count": 1}, "scale_count"),
    (CustomFormat, {"scale_dtype": "float32"}, "scale_count"),
    (CustomFormat, {"scale_dtype": "float64", "scale_count": 1}, "scale_dtype"),
    (CustomFormat, {"scales_layout": "x"}, "scales_layout"),
    (CustomFormat, {"encode": 3}, "encode"),
]


@pytest.mark.parametrize(("cls", "fields", "name"), BAD_FORMATS, ids=lambda v: str(v)[:40])
def test_bad_formats(cls, fields, name):
    base = {"struct": "a.B", "token_dtype": "int8", "message_size": 16} if cls is CustomFormat else {}
    with pytest.raises(ConfigError) as raised:
        cls(**base | fields)
    assert raised.value.field == f"dispatch_format.{name}"
    assert raised.value.remedy


def test_all_errors_are_ours():
    assert issubclass(ConfigError, EPError)
    assert issubclass(ConfigError, ValueError)


def test_the_page_of_the_config_names_all_fields():
    page = (Path(__file__).parents[2] / "docs/config.md").read_text()
    for field in [*dataclasses.fields(EPConfig), *dataclasses.fields(Handle)]:
        assert f"`{field.name}`" in page or field.name == "cfg", field.name
