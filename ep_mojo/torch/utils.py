"""Where programs written for DeepEP import the events from."""

from .streams import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap"]
