"""Shows how much of a long operation is done."""

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any


@contextmanager
def progress(
    text: str, total: int, unit: str = "B"
) -> Generator[Callable[[int], object], None, None]:
    """Draw a bar on stderr if it is a terminal; the block calls the result with what is done."""
    from tqdm import tqdm

    hidden = not sys.stderr.isatty()
    bar: Any = tqdm(total=total, desc=text, unit=unit, unit_scale=True, disable=hidden)
    with bar:
        yield bar.update
