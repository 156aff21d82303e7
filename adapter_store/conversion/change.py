"""What an adapter does to one linear layer of the base, in the forms that methods give it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy.typing as npt

from adapter_store.conversion.tensor_file import Matrix

# Reads the base's weight of a module by its plain name, [out, in] in float32
BaseWeights = Callable[[str], Matrix]


@dataclass(frozen=True, slots=True)
class Factors:
    """LoRA as it stands: scaling * B A, bit by bit. A [r, in] and B [out, r], each of a dtype.

    With DoRA's magnitude [out], the rows of W + scaling B A have these norms.
    """

    a: npt.NDArray[Any]
    b: npt.NDArray[Any]
    dtypes: tuple[str, str]
    scaling: float
    magnitude: tuple[str, npt.NDArray[Any]] | None = None  # its dtype, and it


@dataclass(frozen=True, slots=True)
class Product:
    """The change as B A, exactly, of any inner size."""

    b: Matrix
    a: Matrix


@dataclass(frozen=True, slots=True)
class Kronecker:
    """The change as a Kronecker product: each number of `left` times all of `right`."""

    left: Matrix
    right: Matrix


Change = Factors | Product | Kronecker | Matrix  # a matrix is the change itself, [out, in]


class Source(Protocol):
    """An upload that can be converted."""

    @property
    def name(self) -> str:
        """Its form, for people and for the manifest."""
        ...

    @property
    def modules(self) -> Mapping[str, int]:
        """The plain names of the modules that it changes, and the bytes that it has of each."""
        ...

    def change(self, module: str, shape: tuple[int, int]) -> Change:
        """Read what happens to a module [out, in] of the base. Raises AdapterInvalid."""
        ...
