"""How the ops of the stress run are launched: by the warps of a grid, or by one host thread."""

from max.gpu import (
    WARP_SIZE,
    block_dim,
    block_idx,
    grid_dim,
    lane_id,
    thread_idx,
)
from max.gpu.host import DeviceContext
from std.atomic import Atomic, Ordering
from std.builtin.device_passable import DevicePassable, DeviceTypeEncoder
from std.sys import is_gpu
from std.time import global_perf_counter_ns, perf_counter_ns

from .law import Words

comptime CTAS = 264
"""Of a launch that works on rows."""
comptime THREADS = 128
"""Of a CTA."""

# Words of the findings.
comptime DISPATCHES = 0
"""Dispatches checked."""
comptime COMBINES = 1
"""Combines checked."""
comptime ROWS = 2
"""Rows of dispatches that were compared."""
comptime TOKENS = 3
"""Rows of combines that were compared."""
comptime WRONG = 4
"""Mismatches."""
comptime FIRST = 5
"""The first of them: kind, round, two indices, expected, found."""
comptime FAULT = 12
"""What `ep_stress_fault` is to spoil: round, place, byte, and a mask."""
comptime FINDINGS_WORDS = 16
"""Length."""


struct Worker(TrivialRegisterPassable):
    """Who works: a warp and a lane of it, or the host."""

    var team: Int
    """The warp."""
    var teams: Int
    """Warps."""
    var lane: Int
    """The lane."""
    var lanes: Int
    """Lanes of a warp."""

    @always_inline
    def __init__(out self, team: Int, teams: Int, lane: Int, lanes: Int):
        """Name it.

        Args:
            team: The warp.
            teams: Warps.
            lane: The lane.
            lanes: Lanes of a warp.
        """
        self.team = team
        self.teams = teams
        self.lane = lane
        self.lanes = lanes

    @always_inline
    def is_first(self) -> Bool:
        """Whether it is the first thread of all.

        Returns:
            True for one thread of a launch.
        """
        return self.team == 0 and self.lane == 0


trait Job(TrivialRegisterPassable):
    """A launch's arguments, and its work."""

    def work(self, w: Worker):
        """Do a worker's part.

        Args:
            w: The worker.
        """
        ...


struct ByValue[J: Job](DevicePassable, TrivialRegisterPassable):
    """A job that is copied to the device.

    Parameters:
        J: Its type.
    """

    comptime device_type: AnyType = Self
    """The same on both sides."""

    var job: Self.J
    """The job."""

    def __init__(out self, job: Self.J):
        """Wrap it.

        Args:
            job: The job.
        """
        self.job = job

    def _to_device_type(
        self, mut encoder: Some[DeviceTypeEncoder], target: MutOpaquePointer[_]
    ):
        encoder.encode(self, target)

    @staticmethod
    def get_type_name() -> String:
        """Name the type in messages.

        Returns:
            A name.
        """
        return "stress_ops.ByValue"


def ep_stress_kernel[J: Job](job: ByValue[J]):
    """The kernel.

    Parameters:
        J: The job's type.

    Args:
        job: The job.
    """
    var warps = Int(block_dim.x) // WARP_SIZE
    job.job.work(
        Worker(
            Int(block_idx.x) * warps + Int(thread_idx.x) // WARP_SIZE,
            Int(grid_dim.x) * warps,
            Int(lane_id()),
            WARP_SIZE,
        )
    )


def launch[
    J: Job, target: StaticString
](job: J, ctx: DeviceContext, ctas: Int = CTAS) raises:
    """Do a job.

    Parameters:
        J: Its type.
        target: "gpu" or "cpu".

    Args:
        job: The job.
        ctx: The device.
        ctas: CTAs.

    Raises:
        What the driver raises.
    """
    comptime if target == "gpu":
        ctx.enqueue_function[ep_stress_kernel[J]](
            ByValue(job), grid_dim=ctas, block_dim=THREADS
        )
    else:
        job.work(Worker(0, 1, 0, 1))


@always_inline
def now_ns() -> Int:
    """A clock.

    Returns:
        Nanoseconds.
    """
    comptime if is_gpu():
        return Int(global_perf_counter_ns())
    else:
        return Int(perf_counter_ns())


@always_inline
def count(findings: Words, index: Int, n: Int = 1) -> Int:
    """Add to a counter.

    Args:
        findings: Int64 [FINDINGS_WORDS].
        index: Which one.
        n: How much.

    Returns:
        What it was before.
    """
    return Int(
        Atomic[Int64].fetch_add[ordering=Ordering.RELAXED](
            findings.unsafe_offset(index), Int64(n)
        )
    )


@no_inline
def report(
    findings: Words,
    kind: Int,
    round: Int,
    first: Int,
    second: Int,
    expected: Int,
    found: Int,
):
    """Count a mismatch; the first of all is kept.

    Args:
        findings: Int64 [FINDINGS_WORDS].
        kind: `WRONG_*`.
        round: The round.
        first: Where it is.
        second: Where in that.
        expected: What the law says.
        found: What is there.
    """
    if count(findings, WRONG) != 0:
        return
    findings.unsafe_store(FIRST, Int64(kind))
    findings.unsafe_store(FIRST + 1, Int64(round))
    findings.unsafe_store(FIRST + 2, Int64(first))
    findings.unsafe_store(FIRST + 3, Int64(second))
    findings.unsafe_store(FIRST + 4, Int64(expected))
    findings.unsafe_store(FIRST + 5, Int64(found))
