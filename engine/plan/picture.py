"""Draws the plan: the shares of memory, and the step floor against the batch size."""

from pathlib import Path
from typing import Any

from engine.figure import open_figure, save_figure
from engine.sizes import (
    Load,
    Machine,
    ModelSize,
    adapter_bytes,
    largest_batch,
    step_floor,
    weight_bytes,
)

MAX_BATCH = 128
BAR_ADAPTERS = (0, 8, 32, 128)
COLOURS = {"weights": "#4c5c7a", "adapters": "#e0874f", "KV cache": "#7fb3a6", "free": "#e8e8e8"}


def draw(size: ModelSize, load: Load, machine: Machine, path: Path) -> None:
    """Draw to `path`. Raises ImportError without matplotlib, OSError if it cannot be written."""
    figure, (left, right) = open_figure(path, "plan", 2, figsize=(10, 3.8))
    _draw_memory(left, size, load)
    _draw_floor(right, size, load, machine)
    save_figure(figure, path)


def memory_shares(size: ModelSize, load: Load, num_adapters: int) -> dict[str, int]:
    """Return bytes by use with as many sequences as fit; they add up to the memory."""
    form = size.form
    num_sequences = largest_batch(size, form, load, num_adapters)
    shares = {
        "weights": weight_bytes(size, form),
        "adapters": num_adapters * adapter_bytes(size, form.dtype, load.lora_rank),
        "KV cache": num_sequences * load.sequence_bytes(size, form),
    }
    return shares | {"free": load.memory_bytes - sum(shares.values())}


def _draw_memory(axes: Any, size: ModelSize, load: Load) -> None:
    labels: list[str] = []
    for row, count in enumerate(BAR_ADAPTERS):
        start = 0.0
        for name, nbytes in memory_shares(size, load, count).items():
            width = max(nbytes, 0) / 2**30
            axes.barh(row, width, left=start, color=COLOURS[name], label=name if not row else None)
            start += width
        num_sequences = largest_batch(size, size.form, load, count)
        labels.append(f"{count} adapters\n{num_sequences:,} sequences")
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.axvline(load.memory_bytes / 2**30, color="black", linewidth=1)
    axes.set_xlabel("GiB")
    axes.set_title(
        f"Memory at {load.context} tokens, adapters of rank {load.lora_rank}", fontsize="medium"
    )
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, -0.36), ncols=4, frameon=False)


def _draw_floor(axes: Any, size: ModelSize, load: Load, machine: Machine) -> None:
    batches = range(1, MAX_BATCH + 1)
    for name, colour, count in (
        ("an adapter for each", "adapters", None),
        ("base model", "weights", 0),
    ):
        floors = [
            step_floor(size, load, machine, b, b if count is None else count) for b in batches
        ]
        axes.plot(batches, [1e3 * f.step_s for f in floors], color=COLOURS[colour], label=name)
    axes.set_xlabel("batch")
    axes.set_ylabel("ms per step, at least")
    axes.set_ylim(bottom=0)
    rates = f"{machine.bytes_per_s / 1e9:.0f} GB/s, {machine.flops_per_s / 1e12:.3g} TFLOP/s"
    axes.set_title(f"Decode step floor at {rates}", fontsize="medium")
    axes.legend(frameon=False)
