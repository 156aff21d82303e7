"""Shows how many bytes of a long operation are done."""

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any


@contextmanager
def progress(text: str, num_bytes: int) -> Generator[Callable[[int], object], None, None]:
    """Draw a bar on stderr if it is a terminal; the block calls the result with bytes done."""
    from tqdm import tqdm

    hidden = not sys.stderr.isatty()
    bar: Any = tqdm(total=num_bytes, desc=text, unit="B", unit_scale=True, disable=hidden)
    with bar:
        yield bar.update
