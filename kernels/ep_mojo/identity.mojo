"""Whether counters belong to a communicator with the settings of a launch, checked where the head is in host memory."""

from .counters import (
    HEAD_CONFIG_HASH,
    HEAD_LAYOUT_VERSION,
    HEAD_MAGIC,
    LAYOUT_VERSION,
    MAGIC,
    counters_words,
)
from .head import Head
from .peers import MAX_RANKS, View
from .settings import SETTINGS_WORDS, Settings, config_hash


def check_head(counters: View[DType.int32], settings: View[DType.int64]) raises:
    """Refuse counters that no communicator has made, or one with another config.

    Args:
        counters: `atomic_counters`, in host memory.
        settings: The settings tensor.

    Raises:
        CorruptHeadError, ConfigMismatchError: As text in front of the message.
    """
    check_settings(settings.size)
    check_identity(
        counters,
        Settings(settings),
        HEAD_CONFIG_HASH,
        config_hash(settings),
    )


def check_settings(words: Int) raises:
    """Refuse a settings tensor of another size.

    Args:
        words: Its size.

    Raises:
        CorruptHeadError: As text in front of the message.
    """
    if words != SETTINGS_WORDS:
        raise Error(
            "ep_mojo.CorruptHeadError: settings has ",
            words,
            " words; pass those of a communicator",
        )


def check_identity(
    counters: View[DType.int32], s: Settings, hash_index: Int, hash: UInt64
) raises:
    """Refuse counters that were not made for these settings.

    Args:
        counters: `atomic_counters`, in host memory.
        s: The settings.
        hash_index: Which hash of the head to compare, `HEAD_*_HASH`.
        hash: What it must be.

    Raises:
        CorruptHeadError, ConfigMismatchError: As text in front of the message.
    """
    var words = counters_words(s)
    if counters.size < words:
        raise Error(
            "ep_mojo.CorruptHeadError: atomic_counters has ",
            counters.size,
            " words, not ",
            words,
            "; pass those of a communicator",
        )
    var head = Head(counters.bytes())
    if (
        head.i32(HEAD_MAGIC) != MAGIC
        or head.i32(HEAD_LAYOUT_VERSION) != LAYOUT_VERSION
    ):
        raise Error(
            "ep_mojo.CorruptHeadError: atomic_counters begins with magic ",
            head.i32(HEAD_MAGIC),
            " and layout version ",
            head.i32(HEAD_LAYOUT_VERSION),
            ", not ",
            MAGIC,
            " and ",
            LAYOUT_VERSION,
            "; make a new communicator",
        )
    if head.u64(hash_index) != hash:
        raise Error(
            "ep_mojo.ConfigMismatchError: these counters belong to a communicator with another config than the settings"
        )
    var rank = head.my_rank()
    if rank < 0 or rank >= s.n_ranks or s.n_ranks > MAX_RANKS:
        raise Error(
            "ep_mojo.CorruptHeadError: atomic_counters names rank ",
            rank,
            " of ",
            s.n_ranks,
        )
