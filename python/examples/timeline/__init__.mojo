"""Ops that note the time on the device, for the timeline of `overlap_shared_expert.py`."""

from . import clock
