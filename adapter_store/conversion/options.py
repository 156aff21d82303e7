"""How an upload may be converted."""

from dataclasses import dataclass
from pathlib import Path

from adapter_store.peft_config import MAX_LORA_RANK

DEFAULT_RANK = 64
EXACT_RANK = 256  # what every backend serves
DEFAULT_MAX_RESIDUAL = 0.05


@dataclass(frozen=True, slots=True)
class ConversionOptions:
    """The bounds of what may come out, and the folders that some methods need beside the upload.

    Raises ValueError for a value out of its range.
    """

    lora_rank: int | None = None  # at most this; None: DEFAULT_RANK, or EXACT_RANK if exact
    max_residual: float = DEFAULT_MAX_RESIDUAL  # a module with a larger one is refused
    base_folder: Path | None = None  # for methods that multiply the base's weights
    initial_folder: Path | None = None  # the adapter before its training, for PiSSA and its kin
    limit_s: float | None = None  # a conversion that takes longer is refused

    def __post_init__(self) -> None:
        if self.lora_rank is not None and not 1 <= self.lora_rank <= MAX_LORA_RANK:
            raise ValueError(f"the rank must be in 1..{MAX_LORA_RANK}, not {self.lora_rank}")
        if not 0.0 <= self.max_residual < 1.0:
            raise ValueError(f"the largest residual must be in [0, 1), not {self.max_residual}")
