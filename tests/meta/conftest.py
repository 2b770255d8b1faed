"""Fixtures of the tests about the repository itself."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def task_module():
    """The script ./task as a module."""
    loader = importlib.machinery.SourceFileLoader("task_script", str(ROOT / "task"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("task_script", loader))
    loader.exec_module(module)
    return module
