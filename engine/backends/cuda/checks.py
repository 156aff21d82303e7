"""Refuses configurations that the CUDA backend cannot compute, before anything is loaded."""

from engine.backends.cuda.fp8 import check_fp8
from engine.config import ConfigError
from engine.settle import Demand


def check(demand: Demand) -> None:
    """Raise ConfigError for FP8 weights, or for Triton's kernels, if they cannot run."""
    if demand.weight_format == "fp8":
        try:
            check_fp8(demand.device, demand.dtype)
        except ValueError as error:
            raise ConfigError(f"quantization='fp8': {error}") from None
    if demand.config.kernels == "triton" and demand.device.type != "cuda" and not is_interpreting():
        raise ConfigError(
            "kernels='triton' needs a CUDA device, or TRITON_INTERPRET=1 to try them on a CPU; "
            "use 'auto'"
        )


def is_interpreting() -> bool:
    """Whether Triton's kernels run on a CPU, in its interpreter.

    Triton decides this from its own setting, so this asks Triton and reads no environment. False
    without Triton.
    """
    try:
        from engine.backends.cuda.triton.launch import interpreting
    except ImportError:
        return False
    return interpreting()
