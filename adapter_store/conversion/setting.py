"""What a method's mathematics is given for one module."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from adapter_store.conversion.tensor_file import Matrix

Tensors = Mapping[str, Matrix]
ReadWeight = Callable[[], Matrix]


@dataclass(frozen=True, slots=True)
class Setting:
    """What the configuration says of one module."""

    config: Mapping[str, Any]
    lora_rank: int  # of methods that have one
    scaling: float  # alpha / r
    shape: tuple[int, int]  # [out, in] of the base


def check_rank(setting: Setting, *matrices: Matrix) -> None:
    """Raise ValueError unless all have the config's rank, by which alpha is divided."""
    for matrix in matrices:
        if matrix.shape[0] != setting.lora_rank:
            raise ValueError(f"rank {matrix.shape[0]}, and {setting.lora_rank} in the config")
