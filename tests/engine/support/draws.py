"""Makes requests for sampler tests."""

from array import array

from engine.scheduler.batch import ScheduledRequest
from engine.scheduler.request import SamplingParams
from engine.scheduler.token_rules import INT32, token_biases


def request_of(
    sampling: SamplingParams,
    position: int = 7,
    choice: int = 0,
    forbidden: tuple[int, ...] = (),
    history: tuple[list[int], list[int]] | None = None,
    last_input: int = 1,
    allowed: tuple[int, ...] | None = None,
) -> ScheduledRequest:
    """Make a request that samples the token at `position`."""
    return ScheduledRequest(
        "r",
        choice,
        [last_input],
        position - 1,
        (),
        0,
        sampling,
        True,
        array(INT32, forbidden),
        history,
        biases=token_biases(sampling.logit_bias),
        allowed_token_ids=None if allowed is None else array(INT32, allowed),
    )
