"""OFT and BOFT: rotations of a layer's inputs, in blocks."""

from typing import Any

import numpy as np

from adapter_store.conversion.change import Change, Turned
from adapter_store.conversion.setting import ReadWeight, Setting, Tensors
from adapter_store.conversion.tensor_file import Matrix
from adapter_store.errors import AdapterInvalid


def oft(tensors: Tensors, setting: Setting, read: ReadWeight) -> Change:
    """W R^T, with R made of rotations of blocks of the inputs: changed by W (R - 1)^T."""
    upper = tensors["oft_R.weight"].astype(np.float64)
    weight, config = read(), setting.config
    size = int((1 + np.sqrt(1 + 8 * upper.shape[1])) / 2)
    skew = np.zeros((upper.shape[0], size, size))
    skew[(slice(None), *np.triu_indices(size, 1))] = upper
    skew -= skew.transpose(0, 2, 1)
    if config.get("use_cayley_neumann", True):
        rotations = _neumann(skew, int(config.get("num_cayley_neumann_terms", 5)))
    else:
        rotations = _cayley(skew)
    turns = (rotations.transpose(0, 2, 1) - np.eye(size)).astype(np.float32)
    blocks = np.broadcast_to(turns, (weight.shape[1] // size, size, size))
    _check_blocks(weight, blocks)
    return Turned(weight, blocks)


def boft(tensors: Tensors, setting: Setting, read: ReadWeight) -> Change:
    """s W (R_n ... R_0)^T: rotations of blocks in several orders, and a scale for each output."""
    stages = tensors["boft_R"].astype(np.float64)
    original = read()
    num_stages, num_blocks, size, _ = stages.shape
    weight = original
    for at, stage in enumerate(stages):
        rotations = _cayley(0.5 * (stage - stage.transpose(0, 2, 1))).astype(np.float32)
        if num_stages == 1:
            weight = _rotated(weight, rotations)
        else:
            order = _evens_first(weight.shape[1], num_blocks // 2**at, size // 2)
            turned = np.empty_like(weight)
            turned[:, order] = _rotated(weight[:, order], rotations)
            weight = turned
    return weight * tensors["boft_s"].reshape(-1, 1) - original


def _evens_first(num_inputs: int, num_groups: int, size: int) -> Any:
    """Within each group, put the runs of this size with even numbers before the odd ones."""
    runs: Any = np.arange(num_inputs).reshape(num_groups, -1, size)
    return np.concatenate([runs[:, 0::2], runs[:, 1::2]], axis=1).ravel()


def _neumann(skew: Any, num_terms: int) -> Any:
    """PEFT's approximation of Cayley's rotation: 1 + 2 Q + 2 Q^2 + ... + Q^n."""
    result = np.eye(skew.shape[-1]) + np.zeros_like(skew)
    power = skew
    if num_terms > 1:
        result += 2 * skew
    if num_terms > 2:
        power = skew @ skew
        result += 2 * power
        for _ in range(3, num_terms - 1):
            power = power @ skew
            result += 2 * power
        result += power @ skew
    return result


def _cayley(skew: Any) -> Any:
    """(1 - Q) (1 + Q)^-1."""
    one = np.eye(skew.shape[-1])
    right, left = (one + skew).transpose(0, 2, 1), (one - skew).transpose(0, 2, 1)
    solve: Any = np.linalg.solve
    return solve(right, left).transpose(0, 2, 1)


def _rotated(weight: Matrix, blocks: Matrix) -> Matrix:
    """W R^T for a block-diagonal R."""
    _check_blocks(weight, blocks)
    num_blocks, size, _ = blocks.shape
    parts = weight.reshape(weight.shape[0], num_blocks, size).transpose(1, 0, 2)
    turned = parts @ blocks.transpose(0, 2, 1)
    return np.ascontiguousarray(turned.transpose(1, 0, 2)).reshape(weight.shape)


def _check_blocks(weight: Matrix, blocks: Matrix) -> None:
    num_blocks, size, _ = blocks.shape
    if num_blocks * size != weight.shape[1]:
        raise AdapterInvalid(
            f"{num_blocks} blocks of {size} do not make the module's {weight.shape[1]} inputs"
        )
