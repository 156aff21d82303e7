"""Makes the probe: a few tokens, the same on every replica, to show what an adapter changes.

All tokens are given, also those that the engine samples, so what they should get is known before.
Their logprobs are taken of a prefill and of a decode, so both kinds of step are proven.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass

from engine.lora.weights import LoraWeights
from engine.messages import AdapterFolder, GenerateRequest, RequestOutput
from engine.scheduler.activation import adapter_start
from engine.scheduler.request import SamplingParams

PREFIX = "\0probe "  # no client's request id holds a NUL
NUM_PROMPT = 6
NUM_OUTPUTS = 4  # where decodes are apart: three of them, as one may hardly differ by chance
NUM_OWN = 3  # tokens of the prompt whose rows the adapter replaces, if it does


@dataclass(frozen=True, slots=True)
class Probe:
    """Tokens of which all but the first get a logprob.

    The first `num_prompt` are a prompt; the others, all the same, must follow. With `decodes_first`
    the second one gets another logprob, from a decode of the first one alone.
    """

    token_ids: tuple[int, ...]
    num_prompt: int
    start: int  # the adapter acts from this one on
    decodes_first: bool

    @property
    def num_decoded(self) -> int:
        """How many of the logprobs, the last ones, are of a decode."""
        return len(self.token_ids) - self.num_prompt - 1 + self.decodes_first


def make_probe(
    weights: LoraWeights, vocab_size: int, max_model_len: int, *, decodes_apart: bool
) -> Probe:
    """Make the probe of an adapter; that of the base if it has no tokens of its own.

    With `decodes_apart` the decode has a step of its own, as graphs need: it follows the prefill.
    Otherwise both are in one step, unless the adapter does not act on a prompt of one token.
    """
    prompt = _prompt(weights, vocab_size)[: max_model_len - 1]
    is_apart = decodes_apart or bool(weights.invocation_token_ids)
    num_outputs = min(NUM_OUTPUTS if is_apart else 1, max_model_len - len(prompt))
    start = adapter_start(prompt, weights.invocation_token_ids)
    token_ids = (*prompt, *[_drawn(weights, vocab_size)[-1]] * num_outputs)
    return Probe(token_ids, len(prompt), start, decodes_first=not is_apart)


def _drawn(weights: LoraWeights, vocab_size: int) -> list[int]:
    draw, own = random.Random(vocab_size), weights.vocab_size or vocab_size
    return [draw.randrange(vocab_size) % own for _ in range(NUM_PROMPT + 1)]


def _prompt(weights: LoraWeights, vocab_size: int) -> list[int]:
    """Draw the prompt; with what the adapter has trained or is invoked by, if it has that."""
    token_ids = _drawn(weights, vocab_size)[:NUM_PROMPT]
    changed = [o.ids.tolist() for o in (weights.embedding, weights.head) if o is not None]
    rows = [i for ids in changed for i in [*ids[-1:], *ids[: NUM_OWN - 1]]]  # the last may be new
    for place, token_id in zip(range(1, NUM_PROMPT, 2), dict.fromkeys(rows), strict=False):
        token_ids[place] = token_id
    middle = NUM_PROMPT // 2
    return [*token_ids[:middle], *weights.invocation_token_ids, *token_ids[middle:]]


def probe_requests(
    probe: Probe, name: str, adapter_folder: AdapterFolder | None
) -> list[GenerateRequest]:
    """Ask for the probe's logprobs, in a cache of its own. `name` makes the requests' ids."""
    lengths = [(probe.num_prompt, len(probe.token_ids) - probe.num_prompt)]
    if probe.decodes_first:
        lengths.append((1, 1))
    salt = f"{PREFIX}{name}"  # never shared with what a client asks
    requests: list[GenerateRequest] = []
    for num_prompt, max_tokens in lengths:
        prompt, following = probe.token_ids[:num_prompt], probe.token_ids[num_prompt]
        sampling = SamplingParams(
            max_tokens=max_tokens,
            temperature=0.0,
            ignore_eos=True,
            logprobs=0,
            prompt_logprobs=0,
            allowed_token_ids=(following,),
        )
        request_id = f"{salt} {num_prompt}"
        requests.append(
            GenerateRequest(request_id, [*prompt], sampling, 1, adapter_folder, cache_salt=salt)
        )
    return requests


def is_probe(request_id: str) -> bool:
    return request_id.startswith(PREFIX)


def take_logprobs(outputs: Iterable[RequestOutput]) -> list[float]:
    """Return the logprobs of all tokens of a request but the first."""
    prompt: list[float] = []
    sampled: list[float] = []
    for output in outputs:
        prompt += [entry.logprob for entry in output.prompt_logprobs or [] if entry is not None]
        sampled += [entry.logprob for entry in output.logprobs or []]
    return prompt + sampled
