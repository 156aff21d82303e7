"""What an adapter does to one linear layer of the base, in the forms that methods give it.

And what it does to the base's other parameters: it replaces them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
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

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]


@dataclass(frozen=True, slots=True)
class Kronecker:
    """The change as a Kronecker product: each number of `left` times all of `right`."""

    left: Matrix
    right: Matrix

    @property
    def shape(self) -> tuple[int, int]:
        (out1, in1), (out2, in2) = self.left.shape, self.right.shape
        return out1 * out2, in1 * in2


@dataclass(frozen=True, slots=True)
class Turned:
    """The change as W T: a weight [out, in] times blocks [in / size, size, size] on the diagonal.

    Products with it need not know it as a whole.
    """

    weight: Matrix
    blocks: Matrix

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def T(self) -> "_Transposed":
        return _Transposed(self)

    def __matmul__(self, columns: Matrix) -> Matrix:
        """Return W (T columns)."""
        return self.weight @ _by_blocks(self.blocks, columns)

    def whole(self) -> Matrix:
        """Return the change itself."""
        result = np.empty_like(self.weight)
        for at, block in self._places():
            result[:, at] = self.weight[:, at] @ block
        return result

    def square(self) -> float:
        """Return the square of its Frobenius norm, by inner products of the weight's columns."""
        total = 0.0
        for at, block in self._places():
            columns = self.weight[:, at]
            products = (columns.T @ columns) @ block
            total += float(np.vdot(products.astype(np.float64), block))
        return total

    def _places(self) -> Iterator[tuple[slice, Matrix]]:
        size = self.blocks.shape[-1]
        for at, block in enumerate(self.blocks):
            yield slice(at * size, (at + 1) * size), block


@dataclass(frozen=True, slots=True)
class _Transposed:
    turned: Turned

    def __matmul__(self, columns: Matrix) -> Matrix:
        """Return T^T (W^T columns)."""
        blocks = self.turned.blocks.transpose(0, 2, 1)
        return _by_blocks(blocks, self.turned.weight.T @ columns)


def _by_blocks(blocks: Matrix, columns: Matrix) -> Matrix:
    parts = columns.reshape(len(blocks), -1, columns.shape[1])
    return (blocks @ parts).reshape(columns.shape)


@dataclass(frozen=True, slots=True)
class Saved:
    """A parameter that the adapter replaces, bit by bit: as a whole, or the rows of some tokens.

    `is_shared` says that what is tied to it changes too.
    """

    name: str  # model.norm.weight
    dtype: str
    shape: tuple[int, ...]
    blocks: Iterable[npt.NDArray[Any]]  # which make up the tensor, one after the other
    token_ids: tuple[int, ...] = ()  # of the rows; none: it is the whole
    is_shared: bool = False


Change = Factors | Product | Kronecker | Turned | Matrix  # a matrix is the change itself, [out, in]


class Source(Protocol):
    """An upload that can be converted."""

    @property
    def name(self) -> str:
        """Its form, for people and for the manifest."""
        ...

    @property
    def modules(self) -> Mapping[str, int]:
        """The plain names of the modules that it may change, and the bytes that it has of each."""
        ...

    def change(self, module: str, shape: tuple[int, int]) -> Change | None:
        """Read what happens to a module [out, in] of the base, if anything.

        Raises AdapterInvalid.
        """
        ...

    def saved(self) -> Iterable[Saved]:
        """Read what it replaces of the base, one parameter at a time. Raises AdapterInvalid."""
        ...
