"""Freezes start-up objects so that garbage collection stops rescanning them."""

import gc


def keep_what_is_loaded() -> None:
    """Freeze all current objects; call this once, when the process is ready to serve.

    Hundreds of thousands of objects live as long as the process: searching them all for garbage
    would interrupt its streams, for a tenth of a second with torch loaded, again and again.
    """
    gc.collect()
    gc.freeze()
