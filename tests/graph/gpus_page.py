"""The programs of docs/gpus.md."""

import functools
import re
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "gpus.md").read_text()
LAYER, AHEAD, HOME = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
LIMIT = 0.05
"""Largest relative error of fp8; the page's own estimate is 0.03."""


def load(module=None) -> SimpleNamespace:
    """The definitions of `layer.py`; its graphs go into a `max.graph.Module`, if there is one."""
    names = {"__name__": "layer"}
    exec(compile(LAYER, "layer.py", "exec"), names)
    if module is not None:
        names["Graph"] = functools.partial(names["Graph"], module=module)
    return SimpleNamespace(**names)
