"""Tests launches on torch's meta device, which has shapes and dtypes but no values.

Any operation for which the host would wait for a GPU's values raises, as do non-contiguous copies.
"""

from array import array
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.backends.cuda.adapter_copies import AdapterCopies, PackedAdapter
from engine.backends.cuda.extent import AdapterExtent
from engine.backends.cuda.forward import DeviceForward, Numbers, StepLimits
from engine.backends.cuda.inputs import StepInputs
from engine.backends.cuda.runner import DeviceRunner
from engine.backends.cuda.streams import HostDevice
from engine.scheduler.batch import (
    PENDING,
    AdapterLoad,
    BlockCopy,
    ScheduledBatch,
    ScheduledRequest,
)
from engine.scheduler.request import SamplingParams
from engine.scheduler.token_rules import INT32, token_biases

META = torch.device("meta")
VOCAB, HIDDEN, BLOCK_BYTES = 40, 8, 256
EVERYTHING: dict[str, Any] = {
    "temperature": 0.7,
    "top_k": 3,
    "top_p": 0.9,
    "min_p": 0.1,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.5,
    "logit_bias": ((3, 1.0),),
    "logprobs": 2,
}


class MetaDevice(HostDevice):
    def __init__(self) -> None:
        self.torch_device = META
        self.num_copies = 0

    def pinned(self, nbytes: int) -> Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8)

    def copy(self, target: Tensor, source: Tensor) -> None:
        self.num_copies += 1
        assert target.shape == source.shape and target.dtype == source.dtype
        assert {target.device.type, source.device.type} == {"cpu", "meta"}
        assert target.is_contiguous() and source.is_contiguous(), "no copy of one piece"


class Bank:
    def place(self, slot: int, offset_bytes: int, extent: AdapterExtent) -> None: ...

    def evict(self, slot: int) -> None: ...

    def move(self, slot: int, offset_bytes: int) -> None: ...

    def max_words(self, num_rows: int) -> int:
        return num_rows

    def plan(self, row_slots: Any) -> Numbers:
        return np.asarray(row_slots, np.int32)

    def batch(self, num_rows: int, words: Tensor) -> Any:
        assert words.device == META
        return words

    def head(self, row_slots: Any) -> None:
        return None


class Model:
    def __init__(self) -> None:
        self.embedding = torch.zeros(VOCAB, HIDDEN, dtype=torch.bfloat16, device=META)

    def forward(self, inputs: StepInputs, *_: Any, out: Tensor) -> Tensor:
        x = self.embedding.index_select(0, inputs.token_ids)
        is_cut = len(out) < len(x)
        return out.copy_(x.index_select(0, inputs.output_rows) if is_cut else x)

    def logits(self, hidden: Tensor, head: Any = None) -> Tensor:
        return (hidden @ self.embedding.T).float()


def make_runner() -> DeviceRunner:
    device, bank = MetaDevice(), Bank()
    arena = torch.zeros(64 * BLOCK_BYTES, dtype=torch.uint8, device=META)
    forward = DeviceForward(
        device,
        Model(),  # type: ignore[arg-type]
        bank,
        StepLimits(4, 32, 64, 4),
        tile_tokens=8,
        hidden_size=HIDDEN,
        dtype=torch.bfloat16,
        uses_graphs=True,
    )
    forward.capture_graphs()
    packed = PackedAdapter(AdapterExtent("a", torch.bfloat16, {}, 512), (torch.zeros(512).byte(),))
    return DeviceRunner(
        device, forward, AdapterCopies(device, arena, BLOCK_BYTES, bank, lambda digest: packed)
    )


def request(name: int, token_ids: list[int], start: int, **sampling: Any) -> ScheduledRequest:
    params = SamplingParams(**{"temperature": 0.0, **sampling})
    blocks = tuple(range(10 * name, 10 * name + 10))
    history = ([1, 2], [3]) if params.uses_penalties else None
    targets = [1] * len(token_ids) if params.prompt_logprobs is not None else None
    return ScheduledRequest(
        str(name),
        0,
        token_ids,
        start,
        blocks,
        name % 2,
        params,
        True,
        array(INT32, [5]),
        history,
        targets,
        biases=token_biases(params.logit_bias),
    )


BATCHES = {
    "decodes": [request(i, [PENDING], 9) for i in range(3)],
    "decodes with everything": [request(i, [PENDING], 9, **EVERYTHING) for i in range(3)],
    "one that asks for more": [request(0, [7], 9), request(1, [7], 9, **EVERYTHING)],
    "a mixed step": [request(0, [PENDING], 9), request(1, [4] * 9, 0, **EVERYTHING)],
    "a scored prompt": [request(0, [7], 9), request(1, [4] * 9, 0, prompt_logprobs=2)],
}


@pytest.mark.parametrize("name", BATCHES)
def test_a_launch_never_waits_for_values_of_the_device(name: str) -> None:
    changes = {"moves": (BlockCopy(1, 2),), "adapter_loads": (AdapterLoad(1, "a", 8192, 512),)}
    runner = make_runner()
    runner.launch(ScheduledBatch((), **changes))  # type: ignore[arg-type]
    batch = ScheduledBatch(tuple(BATCHES[name]))
    for _ in range(2):
        handle = runner.launch(batch)
    assert len(handle.result()) == len(batch.requests)


def test_the_meta_device_detects_a_wait() -> None:
    there = torch.zeros(3, device=META)
    for wait in (there.tolist, there.max().item, there.numpy, lambda: there.nonzero()):
        with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
            wait()
