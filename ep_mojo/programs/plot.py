"""The plot of `ep-mojo bench`. Needs matplotlib (the extra `plots`)."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from ..doctor import PIP
from ..errors import InputFileError, MissingDependencyError
from . import report

BARS = (
    ("bf16", ("bf16 round", "bf16 NumPy round", "bf16 plain copy, all cores")),
    ("fp8", ("fp8 round", "fp8 NumPy round", "fp8 plain copy, all cores")),
    ("fp8 encoding", ("fp8 encoding", "fp8 encoding with ml_dtypes")),
)


def require_matplotlib(what: str = "--plot") -> None:
    """Raise `MissingDependencyError` unless matplotlib is installed. `what` needs it."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"{what} needs matplotlib, which this Python does not have", remedy=f"{PIP} matplotlib"
        ) from error


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw medians, with p10 and p90 as whiskers, to a file; its suffix chooses the kind (.png, .svg, .pdf).

    Raises:
        InputFileError: Not a kind of file that matplotlib writes, or it cannot be written.
    """
    from matplotlib.figure import Figure

    names = [n for _, group in BARS for n in group if n in result["seconds"]]
    stats = [result["seconds"][n] for n in names]
    medians = [s["median"] * 1e3 for s in stats]
    whiskers = [
        [max(s["median"] - s["p10"], 0) * 1e3 for s in stats],
        [max(s["p90"] - s["median"], 0) * 1e3 for s in stats],
    ]
    figure = Figure(figsize=(8, 0.5 * len(names) + 1.4), layout="constrained")
    axes = figure.add_subplot()
    ours = [n in ("bf16 round", "fp8 round", "fp8 encoding") for n in names]
    bars = axes.barh(names, medians, xerr=whiskers, color=["#1f77b4" if own else "#bbbbbb" for own in ours])
    axes.bar_label(bars, [report.two_digits(m) for m in medians], padding=4)
    axes.margins(x=0.1)  # room for the label of the longest bar
    axes.invert_yaxis()
    axes.set_xlabel("ms, median (p10 to p90)")
    c = result["config"]
    axes.set_title(
        f"One round: R={c['n_ranks']} T={c['tokens']} H={c['hidden_size']} E={c['n_experts']} K={c['top_k']}, "
        f"{result['machine']['cores']} cores"
    )
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        whole = Path(directory) / f"plot{path.suffix or '.png'}"
        try:
            figure.savefig(whole, dpi=120)
            os.replace(whole, path)
        except (OSError, ValueError) as error:
            raise InputFileError(
                str(error), field="plot", value=str(path), remedy="use .png, .svg or .pdf in a directory of yours"
            ) from error
