"""Launch settings: block and warps for a row width, processors, interpreter mode."""

import torch
import triton

MAX_WIDTH = 65536  # values of a row that one program can hold; above 32768 registers spill


def block_of(width: int) -> int:
    """Return the power of two that holds a row. Raises ValueError if the row is too wide."""
    if width > MAX_WIDTH:
        raise ValueError(f"a row of {width} values; at most {MAX_WIDTH} fit one program")
    return power_of_two(width)


def power_of_two(least: int) -> int:
    """Return the smallest power of two from `least` on.

    Triton's own function takes longer than the rest of a launcher.
    """
    return 1 << (least - 1).bit_length()


def warps_of(block: int) -> int:
    """Return the number of warps, at most 32, for 16 values per thread.

    In two-byte types these are two 16-byte loads; threads of very wide rows have more values.
    """
    return min(max(block // 512, 1), 32)


def num_processors(device: torch.device) -> int:
    """Return the number of multiprocessors; 1 on a CPU, where the interpreter runs the kernels."""
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def interpreting() -> bool:
    return bool(triton.knobs.runtime.interpret)


def upcast(dtype: torch.dtype) -> bool:
    """Return the kernels' UPCAST: the interpreter's bfloat16 products and rounding are wrong."""
    return dtype == torch.bfloat16 and interpreting()
