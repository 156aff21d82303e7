"""What launchers ask before a launch: of the device, of the interpreter, of a row's width."""

import torch
import triton

MAX_WIDTH = 65536  # values of a row that one program can hold; beyond 32768 some are spilt


def block_of(width: int) -> int:
    """The power of two that holds a row. Raises ValueError for one that is too wide."""
    if width > MAX_WIDTH:
        raise ValueError(f"a row of {width} values; at most {MAX_WIDTH} fit one program")
    return power_of_two(width)


def power_of_two(least: int) -> int:
    """The smallest one from `least` on. Triton's own takes longer than the rest of a launcher."""
    return 1 << (least - 1).bit_length()


def warps_of(block: int) -> int:
    """16 values a thread, two 16-byte loads in two-byte types; more where rows are very wide."""
    return min(max(block // 512, 1), 32)


def num_processors(device: torch.device) -> int:
    """1 on a CPU, where an interpreter is all of them."""
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def interpreting() -> bool:
    return bool(triton.knobs.runtime.interpret)


def upcast(dtype: torch.dtype) -> bool:
    """The UPCAST of the kernels: the interpreter's products and roundings of bfloat16 are wrong."""
    return dtype == torch.bfloat16 and interpreting()
