"""Context: the loaded native library with its threads, for one instruction set.

Calls release the GIL. A context runs one call at a time; the engine's one thread owns it.
"""

import ctypes as c
import logging
import os
from collections.abc import Callable
from functools import lru_cache

from engine.backends.native import structs
from engine.backends.native.build import ensure_library
from engine.backends.native.layout import check_layouts
from engine.backends.native.memory import Blocks

log = logging.getLogger(__name__)

ISAS = ("none", "avx2", "avx512", "amx")  # indexed by the library's numbers for them


class Context:
    """Opens the library. Defaults: the machine's best `isa`, and a thread for each of its cores."""

    def __init__(self, isa: str | None = None, threads: int | None = None) -> None:
        self.library = _load()
        best = self.library.reef_best_isa()
        self.isa = ISAS[best] if isa is None else isa
        self.threads = len(os.sched_getaffinity(0)) if threads is None else threads
        self.handle = self.library.reef_open(ISAS.index(self.isa), self.threads)
        self.blocks = Blocks()  # for the packed weights and buffers that its calls read
        if not self.handle:
            raise ValueError(
                f"isa {self.isa!r} with {self.threads} threads: this machine has "
                f"{ISAS[1 : best + 1]}, and at least 1 thread is needed"
            )

    def function(self, name: str, args: type[c.Structure]) -> Callable[[c.Structure], None]:
        """Wrap a C function of (context, pointer to args) as a function of args, which keeps the
        context alive."""
        function = self.library[f"reef_{name}"]
        function.argtypes = [c.c_void_p, c.POINTER(args)]
        function.restype = None
        return lambda value: function(self.handle, value)

    def close(self) -> None:
        """End the threads. The caller must not use the context afterwards."""
        handle, self.handle = self.handle, None
        if handle:
            self.library.reef_close(handle)

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self.close()


def supported_isas() -> tuple[str, ...]:
    """Return the instruction sets of this machine, the best last; empty if there are none."""
    return ISAS[1 : _load().reef_best_isa() + 1]


@lru_cache(maxsize=1)
def _load() -> c.CDLL:
    library = c.CDLL(str(ensure_library()))
    library.reef_struct_layouts.argtypes = []
    library.reef_struct_layouts.restype = c.c_char_p
    check_layouts(library.reef_struct_layouts().decode(), structs)
    library.reef_open.argtypes, library.reef_open.restype = [c.c_int, c.c_int], c.c_void_p
    library.reef_close.argtypes, library.reef_close.restype = [c.c_void_p], None
    return library


FUNCTIONS: dict[str, type[c.Structure]] = {
    "linear": structs.ReefLinearArgs,
    "lora": structs.ReefLoraArgs,
    "lora_expand": structs.ReefLoraArgs,
    "plain": structs.ReefPlainArgs,
    "store": structs.ReefStoreArgs,
    "attention": structs.ReefAttentionArgs,
    "embed": structs.ReefEmbedArgs,
    "norm": structs.ReefNormArgs,
    "gate": structs.ReefGateArgs,
    "gather": structs.ReefGatherArgs,
    "greedy": structs.ReefGreedyArgs,
    "draw": structs.ReefDrawArgs,
}
