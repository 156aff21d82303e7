"""The interface between the engine and its backends: a Runner executes ScheduledBatches.

    launch(batch) -> StepHandle                     starts the step
    handle.result() -> one RowOutput per request    waits for it

A runner decides nothing: the batch says what is computed, the backend says how.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from engine.messages import TokenLogprobs
from engine.scheduler.batch import ScheduledBatch


@dataclass(slots=True)
class RowOutput:
    """The result of a step for one request. `error` excludes everything else."""

    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: Sequence[TokenLogprobs] = ()
    pooled: NDArray[np.float64] | None = None  # sum of the rows that were asked for [hidden_size]
    error: str | None = None


# What may be sampled: token t if bit t % 32 of word t // 32 is set
TokenMask = NDArray[np.uint32]


class TokenMasks(Protocol):
    """The masks of a step, which are computed while the step is."""

    def wait(self) -> Mapping[int, TokenMask]:
        """Wait for the masks [n, words]; they are keyed by the index in the batch, and valid until
        the next step is launched. Called at most once.

        n is 1, and 1 more for each of the row's guesses that may be right; those behind cannot.
        """
        ...

    @property
    def forced(self) -> Mapping[int, list[int]]:
        """Of some rows without guesses, once the masks are there: the only token that the mask
        allows, and those that must follow it."""
        ...


class StepHandle(Protocol):
    """Gives the results of a launched step."""

    def result(self) -> list[RowOutput]:
        """Wait for the step and return one output per request of the batch, in its order.

        Called once, in the order of the launches. Raises what the step raised.
        """
        ...


class Runner(Protocol):
    """Executes batches one after the other, in the order of their launches."""

    @property
    def pipeline_depth(self) -> int:
        """How many steps may be launched before the result of an earlier one is taken.

        At 1, a row may hold PENDING: the token that the step before sampled for the same request
        and life. After a step that raised, rows that hold a PENDING of that step have
        undefined results, which are discarded.
        """
        ...

    @property
    def loads_are_immediate(self) -> bool:
        """Whether a step's adapters are in place before it is computed; else see `arrived`."""
        ...

    def launch(self, batch: ScheduledBatch, masks: TokenMasks | None = None) -> StepHandle:
        """Start the step. An exception concerns this batch alone.

        `masks` are those of the batch's `grammar_rows`, if it has any.
        """
        ...

    def arrived(self) -> Sequence[str]:
        """Return digests of adapters that became usable on the device since the last call."""
        ...


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """A step whose outputs are already available."""

    outputs: list[RowOutput]

    def result(self) -> list[RowOutput]:
        return self.outputs


@dataclass(frozen=True, slots=True)
class FailedStep:
    """A step that raised during its launch."""

    error: Exception

    def result(self) -> list[RowOutput]:
        raise self.error


class DeviceLost(RuntimeError):
    """The device can compute nothing more for this process."""


def check_device(torch_device: torch.device) -> None:
    """Raise DeviceLost if the device failed in a way that every later call would repeat.

    An illegal memory access is such a failure. Waits for all work that was launched.
    """
    if torch_device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(torch_device)
    except RuntimeError as error:
        raise DeviceLost(f"{torch_device} is lost to this process: {error}") from error
