"""The programs of docs/gpus.md: for `./task gpu-compile` and for tests."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "gpus.md").read_text()
LAYER, AHEAD, HOME = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
"""The text of `layer.py`, `ahead.py` and `home.py`."""
LIMIT = 0.05
"""Largest relative error of fp8; the page's own estimate is 0.03."""


def load_layer(module: Any = None) -> SimpleNamespace:
    """The definitions of `layer.py`; its graphs go into a `max.graph.Module`, if there is one."""
    names: dict[str, Any] = {"__name__": "layer"}
    exec(compile(LAYER, "layer.py", "exec"), names)
    if module is not None:
        names["Graph"] = functools.partial(names["Graph"], module=module)
    return SimpleNamespace(**names)
