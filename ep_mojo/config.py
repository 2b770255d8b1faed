"""`EPConfig`: everything that all ranks agree on, checked before anything is allocated or launched.

Letters as in the documents: R n_ranks, E n_experts, L = E / R local experts, K top_k, Tmax max_tokens_per_rank, H
hidden_size, B num_buffers, G tokens_per_signal, C = ceil(Tmax / G) signals of one source.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import struct
from dataclasses import dataclass, field
from typing import Any

from . import layout
from .errors import ConfigError, UnsupportedError
from .formats import BF16, DTYPE_BYTES, BlockwiseFP8, CustomFormat, TokenFormat, check_choice, check_int

__all__ = ["BF16", "BlockwiseFP8", "CustomFormat", "EPConfig", "TokenFormat"]

MAX_RANKS = 8
MAX_HIDDEN = 1 << 16
MAX_ALIGNMENT = 1024
MAX_BUFFERS = 8
MAX_SMS = 1024
MAX_PAIRS = (1 << 24) - 1
"""Largest Tmax * K: counts travel in the low 24 bits of a signal word."""
MAX_ROWS = (1 << 31) - 1
"""Rows are int32."""
MAX_TIMEOUT_S = 1e6

OUTPUT_LAYOUTS = ("expert", "expert_padded", "rank", "gathered")
BY_SOURCE = ("rank", "gathered")
"""Layouts whose rows are grouped by the ranks that they come from."""
REDUCE_MODES = ("expert", "source", None)
SLOTS = ("rank", "expert")
SLOTS_EVERYWHERE = len(SLOTS)
"""What stands for the slot policy where every token goes to all ranks; the others by their place in `SLOTS`."""
OUTPUT_DTYPES = ("bfloat16", "float32")
UNHASHED_WORDS = {"all": (11, 12), "dispatch": (2, 6, 9, 10, 11, 12, 16), "combine": (6, 8, 11, 12, 15)}
"""Settings that a hash leaves out: always those that ranks may choose for themselves (the SM budget, whether waits
spin), and those that the Mojo functions named ep_dispatch_* and ep_combine_* do not know."""


def fnv1a64(data: bytes) -> int:
    """The 64-bit FNV-1a hash of `data`."""
    h = 0xCBF29CE484222325
    for byte in data:
        h = ((h ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return h


@dataclass(frozen=True)
class EPConfig:
    """What all ranks of a communicator agree on. Frozen, hashable, picklable.

    Args:
        hidden_size: H, elements of a token: 8 to 65536, a multiple of 8 (of 128 for `BlockwiseFP8`).
        top_k: K, experts a token: 1 to 32. May be larger than n_experts. With the "gathered" layout also 0: tokens
            travel without choices.
        n_experts: E: 1 to 2048, a multiple of n_ranks. Rank r owns the experts [r * L, (r + 1) * L).
        max_tokens_per_rank: Tmax: 1 to 2^22, with Tmax * K below 2^24.
        n_ranks: R: 1 to 8.
        dispatch_format: `BF16()`, `BlockwiseFP8(...)` or `CustomFormat(...)`.
        output_layout: Rows of dispatch. "expert": grouped by expert; "expert_padded": [groups, R * Tmax, H]; "rank":
            one row for each (source rank, token) that has an expert here; "gathered": every token of every rank.
        reduce: Who sums the rows of a token in combine. "expert": the experts' rank, one row a rank travels; "source":
            every row travels; None: the window is sized for both, and each call may choose ("expert" unless it says
            otherwise).
        slots: "rank": one message for each (token, destination rank); "expert": one for each (token, expert).
        alignment: Groups of the "expert" layout start at multiples of this many rows: 1 to 1024.
        max_rows: Rows of the output, but with "expert_padded"; None = the worst case. More rows than that:
            `CapacityError`.
        combine_dtype: Type of the expert rows and of what travels in combine, "bfloat16" or "float32".
        output_dtype: Type of what combine returns, "bfloat16" or "float32".
        shared_expert: Group 0 of the "expert" layout holds the rank's own tokens, for an expert that every rank has.
        num_buffers: B, rounds that may be in flight: 1 to 8. None = 2, or 1 with slots="expert".
        timeout_s: The longest wait of one launch in seconds, 0 = no limit.
        tokens_per_signal: G, tokens that one signal covers: at least 1. With 1 work spreads best; for thousands of
            tokens 2 is quicker on 64 SMs, 4 on 24, where each warp has many.
        n_sms: The most SMs (or CPU workers) that a launch may use; None = all. Each op of a graph may have its own.

    Raises:
        ConfigError: A field is out of range, of a wrong type, or contradicts another. Names field, value and remedy.
        UnsupportedError: The combination is not implemented with slots="expert".
    """

    hidden_size: int
    top_k: int
    n_experts: int
    max_tokens_per_rank: int
    n_ranks: int
    dispatch_format: TokenFormat = field(default_factory=BF16)
    output_layout: str = "expert"
    reduce: str | None = None
    slots: str = "rank"
    alignment: int = 1
    max_rows: int | None = None
    combine_dtype: str = "bfloat16"
    output_dtype: str = "bfloat16"
    shared_expert: bool = False
    num_buffers: int = None  # type: ignore[assignment]  # replaced in __post_init__
    timeout_s: float = 30.0
    tokens_per_signal: int = 1
    n_sms: int | None = None

    def __new__(cls, *given: Any, **fields: Any) -> EPConfig:
        """A name that is no field is a `ConfigError` that names the nearest ones; copies come here without fields."""
        cls._check_names(fields)
        return super().__new__(cls)

    def __post_init__(self):
        self._check_choices()
        self._check_numbers()
        self._check_sizes()
        if self.slots == "expert":
            self._check_expert_slots()

    def replace(self, **changes: Any) -> EPConfig:
        """A config with some fields changed.

        Changing `slots` also resets `num_buffers` and `reduce` to their defaults unless they are given.

        Raises:
            ConfigError: A name is not a field, or the result is not valid.
        """
        self._check_names(changes)
        if changes.get("slots", self.slots) != self.slots:
            changes = {"num_buffers": None, "reduce": None} | changes
        return dataclasses.replace(self, **changes)

    @classmethod
    def _check_names(cls, given: dict[str, Any]) -> None:
        names = [f.name for f in dataclasses.fields(cls)]
        for name, value in given.items():
            if name not in names:
                near = [n for n in names if name in n] or difflib.get_close_matches(name, names)
                remedy = f"did you mean {' or '.join(near)}?" if near else "check the spelling"
                raise ConfigError("no such field", field=name, value=value, allowed=", ".join(names), remedy=remedy)

    def __repr__(self) -> str:
        """Required fields, and the others where they differ from their defaults."""
        parts = []
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            if f.name == "num_buffers":
                default = 1 if self.slots == "expert" else 2
            if default is dataclasses.MISSING or value != default:
                parts.append(f"{f.name}={value!r}")
        return f"EPConfig({', '.join(parts)})"

    # Derived sizes

    @property
    def n_local_experts(self) -> int:
        """L = E / R."""
        return self.n_experts // self.n_ranks

    @property
    def n_groups(self) -> int:
        """Groups of rows of the expert layouts: L, and one more with a shared expert."""
        return self.n_local_experts + int(self.shared_expert)

    @property
    def rows_capacity(self) -> int:
        """Rows of the output: `max_rows`, or the worst case of the layout (for "expert_padded" n_groups * R * Tmax)."""
        if self.max_rows is not None:
            return self.max_rows
        tokens = self.n_ranks * self.max_tokens_per_rank
        if self.output_layout in BY_SOURCE:
            return tokens
        if self.output_layout == "expert_padded":
            return self.n_groups * tokens
        shared = self.max_tokens_per_rank + self.alignment - 1 if self.shared_expert else 0
        return tokens * self.top_k + self.n_local_experts * (self.alignment - 1) + shared

    @property
    def scales_per_token(self) -> int:
        """S: scales of one row, 0 without scales."""
        return self.dispatch_format.scales_per_token(self.hidden_size)

    @property
    def token_elements(self) -> int:
        """Elements of one row of `Handle.tokens`: H, unless a custom format says otherwise."""
        return self.dispatch_format.token_elements(self.hidden_size)

    @property
    def dispatch_message_bytes(self) -> int:
        """Bytes of one dispatch message."""
        header = layout.EXPERT_SLOTS_HEADER if self.slots == "expert" else 0
        return self.dispatch_format.message_bytes(self.hidden_size) + header

    @property
    def combine_row_bytes(self) -> int:
        """Bytes of one row in combine."""
        return self.hidden_size * DTYPE_BYTES[self.combine_dtype]

    @property
    def _counted_choices(self) -> int:
        """Tmax * K, where a gathered token counts as `GATHERED_CHOICES`."""
        per_token = layout.GATHERED_CHOICES if self.output_layout == "gathered" else self.top_k
        return self.max_tokens_per_rank * per_token

    @property
    def few_tokens(self) -> bool:
        """Whether messages have room for cells: R * Tmax * K is 1024 at most, gathered tokens count K = 8."""
        return self.slots == "rank" and self.n_ranks * self._counted_choices <= layout.FEW_CHOICES

    @property
    def table_room(self) -> bool:
        """Whether dispatch's count windows have room for tables as cells, as which these travel (on GPUs that have
        cells, and unless peers may be masked): few tokens, or Tmax * K is 2048 at most, but with layout "gathered"."""
        some = self.output_layout != "gathered" and self._counted_choices <= layout.CELL_CHOICES
        return self.few_tokens or (self.slots == "rank" and some)

    @property
    def rows_in_cells(self) -> bool:
        """Whether combine's rows travel as cells, there too: Tmax * K is 2048 at most, gathered tokens count K = 8."""
        return self.slots == "rank" and self._counted_choices <= layout.CELL_CHOICES

    @property
    def dispatch_message_stride(self) -> int:
        """Bytes from one message to the next in a window: of a message, or of its cells where there are few tokens."""
        return self.dispatch_message_bytes * (1 + self.few_tokens)

    @property
    def combine_slots(self) -> int:
        """Rows of the combine window for each token: R (reduce="expert"), K ("source"), max(R, K) (None).

        The layouts by source send one row a rank in either mode, and so have at least R.
        """
        if self.slots == "expert":
            return self.top_k
        if self.reduce == "expert" or self.output_layout == "gathered":
            return self.n_ranks
        if self.reduce == "source" and self.output_layout != "rank":
            return self.top_k
        return max(self.n_ranks, self.top_k)

    @property
    def n_signals(self) -> int:
        """C = ceil(Tmax / G)."""
        return -(-self.max_tokens_per_rank // self.tokens_per_signal)

    def settings(self, virtual: bool) -> list[int]:
        """The 17 int64 words that every op reads.

        Args:
            virtual: Ranks share one queue, so a wait that finds its signal missing fails at once.
        """
        return [
            self.n_ranks,
            self.n_experts,
            self.top_k,
            self.max_tokens_per_rank,
            self.num_buffers,
            self.alignment,
            self.tokens_per_signal,
            self.hidden_size,
            self.dispatch_message_bytes,
            self.combine_row_bytes,
            self.combine_slots,
            self.n_sms or 0,
            layout.WAITS_VIRTUAL if virtual else 0,
            SLOTS_EVERYWHERE if self.output_layout == "gathered" else SLOTS.index(self.slots),
            int(self.shared_expert),
            fnv1a64(self.dispatch_format.key().encode()) >> 1,
            {None: 0, "expert": 1, "source": 2}[self.reduce],
        ]

    def config_hash(self, side: str = "all") -> int:
        """64-bit FNV-1a of the settings, without those that ranks may choose for themselves. Ranks compare it.

        Args:
            side: "dispatch" or "combine": only what the Mojo functions of that side know.
        """
        words = self.settings(virtual=False)
        for i in UNHASHED_WORDS[side]:
            words[i] = 0
        return fnv1a64(struct.pack(f"<{layout.SETTINGS_WORDS}q", *words))

    # Checks

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_choices(self) -> None:
        if not isinstance(self.dispatch_format, (BF16, BlockwiseFP8, CustomFormat)):
            raise ConfigError(
                field="dispatch_format",
                value=self.dispatch_format,
                allowed="a BF16, BlockwiseFP8 or CustomFormat object",
                remedy="pass an instance, for example BF16() or BlockwiseFP8()",
            )
        check_choice("output_layout", self.output_layout, OUTPUT_LAYOUTS)
        check_choice("reduce", self.reduce, REDUCE_MODES)
        check_choice("slots", self.slots, SLOTS)
        check_choice("combine_dtype", self.combine_dtype, OUTPUT_DTYPES)
        check_choice("output_dtype", self.output_dtype, OUTPUT_DTYPES)
        if type(self.shared_expert).__name__ not in ("bool", "bool_"):
            raise ConfigError(
                field="shared_expert", value=self.shared_expert, allowed="True or False", remedy="pass a bool"
            )
        self._set("shared_expert", bool(self.shared_expert))

    def _check_numbers(self) -> None:
        if self.num_buffers is None:
            self._set("num_buffers", 1 if self.slots == "expert" else 2)
        ranges = {
            "hidden_size": (8, MAX_HIDDEN),
            "top_k": (int(self.output_layout != "gathered"), layout.MAX_TOP_K),
            "n_ranks": (1, MAX_RANKS),
            "n_experts": (1, layout.MAX_EXPERTS),
            "max_tokens_per_rank": (1, layout.MAX_TOKENS),
            "alignment": (1, MAX_ALIGNMENT),
            "num_buffers": (1, MAX_BUFFERS),
            "tokens_per_signal": (1, MAX_PAIRS),
        }
        optional = {"max_rows": (1, MAX_ROWS), "n_sms": (1, MAX_SMS)}
        for name, (low, high) in ranges.items():
            self._set(name, check_int(name, getattr(self, name), low, high))
        for name, (low, high) in optional.items():
            if getattr(self, name) is not None:
                remedy = f"choose {name} in that range, or None for the default"
                self._set(name, check_int(name, getattr(self, name), low, high, remedy))
        self._set("timeout_s", check_seconds("timeout_s", self.timeout_s))

    def _check_sizes(self) -> None:
        multiple = self.dispatch_format.hidden_multiple
        if self.hidden_size % multiple:
            raise ConfigError(
                field="hidden_size",
                value=self.hidden_size,
                allowed=f"a multiple of {multiple} with {self.dispatch_format!r}",
                remedy="pad the hidden size" + (" or use BF16()" if multiple > 8 and self.hidden_size % 8 == 0 else ""),
            )
        if self.n_experts % self.n_ranks:
            raise ConfigError(
                field="n_experts",
                value=self.n_experts,
                allowed=f"a multiple of n_ranks = {self.n_ranks}",
                remedy="pad the number of experts, or choose n_ranks that divides it",
            )
        if self.max_tokens_per_rank * self.top_k > MAX_PAIRS:
            raise ConfigError(
                f"times top_k = {self.top_k} is {self.max_tokens_per_rank * self.top_k}",
                field="max_tokens_per_rank",
                value=self.max_tokens_per_rank,
                allowed=f"max_tokens_per_rank * top_k up to {MAX_PAIRS} (2^24 - 1)",
                remedy=f"choose max_tokens_per_rank up to {MAX_PAIRS // self.top_k}",
            )
        if self.output_layout != "expert":
            for name, default in (("alignment", 1), ("shared_expert", False)):
                if getattr(self, name) != default:
                    raise ConfigError(
                        f'does not go with output_layout = "{self.output_layout}"',
                        field=name,
                        value=getattr(self, name),
                        allowed=f"{default}, or any value with the expert layout",
                        remedy='leave it out, or use output_layout="expert"',
                    )
        if self.output_layout == "expert_padded" and self.max_rows is not None:
            raise ConfigError(
                'does not go with output_layout = "expert_padded", which has R * Tmax rows a group',
                field="max_rows",
                value=self.max_rows,
                allowed="None",
                remedy='leave it out, or use output_layout="expert"',
            )
        if self.rows_capacity > MAX_ROWS:
            raise ConfigError(
                f"the output would have {self.rows_capacity} rows",
                field="max_tokens_per_rank",
                value=self.max_tokens_per_rank,
                allowed=f"up to {MAX_ROWS} rows (rows are int32)",
                remedy='lower max_tokens_per_rank, or use output_layout="expert"',
            )
        if isinstance(self.dispatch_format, CustomFormat):
            self._check_custom_format()

    def _check_custom_format(self) -> None:
        f, h = self.dispatch_format, self.hidden_size
        need = TokenFormat.message_bytes(f, h)
        if f.message_bytes(h) < need:
            raise ConfigError(
                field="dispatch_format.message_size",
                value=f.message_bytes(h),
                allowed=f"at least {need}: payload {f.token_bytes(h)} bytes plus scales, rounded up to 16",
                remedy=f"use {need} or more",
            )

    def _check_expert_slots(self) -> None:
        if self.num_buffers != 1:
            raise ConfigError(
                field="num_buffers",
                value=self.num_buffers,
                allowed='1 with slots="expert"',
                remedy='leave it out, or use slots="rank"',
            )
        if self.reduce is None:
            self._set("reduce", "source")
        scope = {
            "output_layout": (("expert", "expert_padded"), 'output_layout="expert" or "expert_padded"'),
            "reduce": (("source",), 'reduce="source"'),
            "alignment": ((1,), "alignment=1"),
            "shared_expert": ((False,), "shared_expert=False"),
        }
        for name, (values, words) in scope.items():
            if getattr(self, name) not in values:
                raise UnsupportedError(
                    'not available with slots="expert"',
                    field=name,
                    value=getattr(self, name),
                    allowed=words,
                    remedy='use slots="rank" (the default), or drop the option',
                )


def check_seconds(name: str, value: Any) -> float:
    """`value` as seconds from 0 on. Raises `ConfigError` where it is none."""
    allowed = f"seconds from 0 (no limit) to {MAX_TIMEOUT_S:g}"
    if isinstance(value, (bool, str, bytes)) or not hasattr(value, "__float__"):
        raise ConfigError(
            f"{type(value).__name__} is not a number", field=name, value=value, allowed=allowed, remedy="pass a float"
        )
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        raise ConfigError("not a number", field=name, value=value, allowed=allowed, remedy="pass a float") from None
    if not math.isfinite(seconds) or not 0 <= seconds <= MAX_TIMEOUT_S:
        raise ConfigError(field=name, value=value, allowed=allowed, remedy="use 0 for no limit")
    return seconds
