"""The ep-mojo package: expert-parallel dispatch and combine. Import from here; the ops of MAX graphs register themselves."""

from .formats import TokenFormat, BF16, BlockwiseFP8
from . import ops
