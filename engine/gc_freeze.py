"""Freezes start-up objects so that garbage collection stops rescanning them."""

import gc


def keep_what_is_loaded() -> None:
    """To be called once a process is ready to serve.

    Hundreds of thousands of objects live as long as the process does: to search them all for
    garbage stops everything it streams, a tenth of a second beside torch, again and again.
    """
    gc.collect()
    gc.freeze()
