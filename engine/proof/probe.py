"""Makes the probe: a short prompt, the same on every replica, to show what an adapter changes.

Its logprobs are taken of the prompt (a prefill) and of the few tokens that follow (decodes), so
both kinds of step are proven.
"""

import random

from engine.lora.weights import LoraWeights
from engine.messages import AdapterFolder, GenerateRequest, RequestOutput
from engine.scheduler.request import SamplingParams

PREFIX = "\0probe "  # no client's request id holds a NUL
NUM_PROMPT, NUM_OUTPUTS = 8, 2
NUM_OWN = 3  # tokens of the prompt whose rows the adapter replaces, if it does


def probe_prompt(weights: LoraWeights | None, vocab_size: int) -> list[int]:
    """Draw the prompt; with what the adapter has trained or is invoked by, if it has that."""
    draw = random.Random(vocab_size)
    own = vocab_size if weights is None else weights.vocab_size or vocab_size
    token_ids = [draw.randrange(vocab_size) % own for _ in range(NUM_PROMPT)]
    overlays = () if weights is None else (weights.embedding, weights.head)
    changed = [o.ids.tolist() for o in overlays if o is not None]
    rows = [i for ids in changed for i in [*ids[-1:], *ids[: NUM_OWN - 1]]]  # the last may be new
    for place, token_id in zip(range(1, NUM_PROMPT, 2), dict.fromkeys(rows), strict=False):
        token_ids[place] = token_id
    middle = NUM_PROMPT // 2
    invocation = () if weights is None else weights.invocation_token_ids
    return [*token_ids[:middle], *invocation, *token_ids[middle:]]


def probe_request(
    digest: str, prompt: list[int], adapter_folder: AdapterFolder | None, max_model_len: int
) -> GenerateRequest:
    """Ask for logprobs of the prompt and of a greedy continuation, in a cache of its own."""
    num_outputs = min(NUM_OUTPUTS, max_model_len - len(prompt))
    sampling = SamplingParams(
        max_tokens=num_outputs, temperature=0.0, ignore_eos=True, logprobs=0, prompt_logprobs=0
    )
    salt = f"{PREFIX}{digest}"  # never shared with what a client asks
    return GenerateRequest(salt, prompt, sampling, 1, adapter_folder, cache_salt=salt)


def is_probe(request_id: str) -> bool:
    return request_id.startswith(PREFIX)


def take_logprobs(outputs: list[RequestOutput]) -> tuple[list[int], list[float]]:
    """Return the tokens that were sampled, and the logprobs of all tokens but the first."""
    token_ids: list[int] = []
    prompt: list[float] = []
    sampled: list[float] = []
    for output in outputs:
        token_ids += output.token_ids
        if not prompt:  # they come again if the request was preempted
            prompt = [entry.logprob for entry in output.prompt_logprobs or [] if entry is not None]
        sampled += [entry.logprob for entry in output.logprobs or []]
    return token_ids, prompt + sampled
