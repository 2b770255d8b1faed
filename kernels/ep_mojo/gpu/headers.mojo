"""How many tokens each source has in a dispatch, for those who need all of them: a lane awaits a header each."""

from max.gpu import lane_id
from max.gpu.sync import syncwarp

from ..launch import Endpoint
from ..signal import NO_SIGNAL, Waiter
from .routing import ballot


@always_inline
def await_tokens(
    ep: Endpoint[True], epoch: UInt64, waiter: Waiter
) -> Tuple[Int32, Bool]:
    """Await all headers, in a launch without masks; a warp calls this.

    Args:
        ep: The rank.
        epoch: The launch's epoch.
        waiter: The launch's waiter.

    Returns:
        T of source r to lane r, 0 to all others; and to all lanes whether all headers have come.
    """
    var tokens: Int32 = 0
    var came = True
    if Int(lane_id()) < ep.s.n_ranks:
        var T = ep.header_of(waiter, epoch, Int(lane_id()))
        came = T != NO_SIGNAL
        tokens = Int32(T) if came else Int32(0)
    var all_came = ballot(not came) == 0
    syncwarp()
    return (tokens, all_came)
