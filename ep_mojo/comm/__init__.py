"""Communicators: who the ranks are and where their windows live. One set of ops runs on all of them."""

from .base import Communicator, CompiledGraph, Rank

__all__ = ["Communicator", "CompiledGraph", "Rank"]
