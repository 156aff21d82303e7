"""Records which compiled variants of its kernels a program launches, without GPU or compiler.

Triton compiles a kernel for each combination of constants, types and properties of other arguments:
a 1, multiples of 16, aligned addresses. Here kernels only record the combination.
"""

import inspect
from typing import Any

import pytest
import triton.language as tl
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import BaseBackend
from triton.runtime.interpreter import InterpretedFunction

from engine.backends.cuda.triton import launch

Variant = tuple[Any, ...]
GRID_LIMITS = (2**31, 2**16, 2**16)


class Launches:
    """Records launches of kernels, which then do nothing, on a device of `processors`."""

    def __init__(self, patch: pytest.MonkeyPatch, processors: int) -> None:
        self.variants: set[Variant] = set()

        def note(
            kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any
        ) -> None:
            sizes = zip(grid, GRID_LIMITS, strict=False)
            assert all(0 < size < limit for size, limit in sizes), f"a grid of {grid}"
            self.variants.add(_variant(kernel, *args, **kwargs))

        patch.setattr(InterpretedFunction, "run", note)
        patch.setattr(launch, "num_processors", lambda device: processors)

    def take(self) -> set[Variant]:
        """Return the variants launched since the last call."""
        taken, self.variants = self.variants, set()
        return taken


def _variant(kernel: InterpretedFunction[Any], *args: Any, **kwargs: Any) -> Variant:
    parameters = inspect.signature(kernel.fn).parameters
    options = {name: value for name, value in kwargs.items() if name not in parameters}
    own = {name: value for name, value in kwargs.items() if name in parameters}
    bound = inspect.signature(kernel.fn).bind(*args, **own).arguments
    as_they_are = kernel.kwargs.get("do_not_specialize") or ()
    seen = [
        _seen(value, parameters[name].annotation is tl.constexpr, name not in as_they_are)
        for name, value in bound.items()
    ]
    module = kernel.fn.__module__.rpartition(".")[2]
    named = zip(bound, seen, strict=True)
    return f"{module}.{kernel.fn.__name__}", *named, *sorted(options.items())


def _seen(value: Any, is_constant: bool, is_specialized: bool) -> tuple[Any, ...]:
    if is_constant:
        return "constexpr", value
    return tuple(native_specialize_impl(BaseBackend, value, False, is_specialized, True))
