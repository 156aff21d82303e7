"""Opens and saves pictures. The only module that imports matplotlib, which is optional."""

from pathlib import Path
from typing import Any

SUFFIXES = (".svg", ".png")


def open_figure(path: Path, salt: str, columns: int, **options: Any) -> tuple[Any, Any]:
    """Return a figure for this file, and its axes in a row. `salt` makes an SVG's ids: the same
    drawing gives the same file.

    Raises ImportError without matplotlib, OSError for another suffix.
    """
    if path.suffix not in SUFFIXES:
        raise OSError(f"{path}: a picture's name must end in one of {', '.join(SUFFIXES)}")
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("--picture needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = salt
    from matplotlib import pyplot

    figure: Any
    figure, axes = pyplot.subplots(1, columns, layout="constrained", squeeze=False, **options)
    return figure, axes[0]


def save_figure(figure: Any, path: Path) -> None:
    """Write and close it. Raises OSError."""
    from matplotlib import pyplot

    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
