"""Makes requests with pooling, and what transformers gives for them."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.engine import Engine
from engine.messages import AdapterFolder, GenerateRequest, RequestOutput
from engine.scheduler.request import POOLINGS, SamplingParams
from tests.engine.support.driver import prompt_of, run

LENGTHS = (1, 4, 5, 23, 40, 61)
Vector = NDArray[np.float32]


def pooled(
    pooling: str, length: int, adapter_folder: AdapterFolder | None = None, **fields: Any
) -> GenerateRequest:
    name = "" if adapter_folder is None else adapter_folder.digest
    return GenerateRequest(
        f"{pooling}{length}{name}",
        prompt_of(length, seed=length),
        SamplingParams(pooling=pooling),
        adapter_folder=adapter_folder,
        **fields,
    )


def all_of(adapters: list[AdapterFolder] | None = None) -> list[GenerateRequest]:
    own = [None, *(adapters or [])]
    return [
        pooled(pooling, length, own[i % len(own)])
        for pooling in POOLINGS
        for i, length in enumerate(LENGTHS)
    ]


def vectors(engine: Engine, requests: list[GenerateRequest]) -> dict[str, Vector]:
    """Run the requests; return what those with pooling gave."""
    results = run(engine, requests)
    return {
        request.request_id: vector_of(results[request.request_id, 0].last)
        for request in requests
        if request.sampling.pooling is not None
    }


def vector_of(output: RequestOutput | None) -> Vector:
    assert output is not None and output.embedding is not None
    assert (output.token_ids, output.finish_reason, output.error) == ([], "stop", None)
    return np.frombuffer(output.embedding, "<f4")


@torch.inference_mode()
def expected(model: Any, request: GenerateRequest) -> Vector:
    hidden = model.base_model(torch.tensor([request.prompt_token_ids])).last_hidden_state[0]
    pooling = request.sampling.pooling
    rows = {"mean": hidden, "cls": hidden[:1], "last": hidden[-1:]}[str(pooling)]
    return rows.double().mean(0).float().numpy()


def assert_close(got: dict[str, Vector], wanted: dict[str, Vector]) -> None:
    assert got.keys() == wanted.keys()
    for name, vector in wanted.items():
        np.testing.assert_allclose(got[name], vector, atol=1e-4, rtol=1e-4, err_msg=name)
