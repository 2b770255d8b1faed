"""The MAX custom ops `ep_mojo_*`: tensors become views, string parameters become types. No work is done here.

Every op takes `order` first, a small buffer that all ops of a graph share, because MAX keeps the order of in-place ops
only where they share a buffer; then `atomic_counters`, `settings` and the three pointer tables. An absent optional
tensor has size 0. Shapes and dtypes stand in `ep_mojo/graph.py`; `graph_ops.py` writes the calls.
(`ep_mojo_head_start` is for
other queues than that of these ops, and takes none of this. Ops named `*_into` and `*_from` take `order` and one block
of addresses: `call.mojo`.)
"""

from . import (
    beside,
    call,
    combine,
    combine_into,
    dispatch,
    dispatch_into,
    gather,
    push,
)
