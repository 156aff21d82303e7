"""Checks that an engine can run a request, given the engine's limits."""

from collections.abc import Iterable

from engine.messages import EngineInfo, GenerateRequest
from engine.scheduler.fairness import MAX_WEIGHT, MIN_WEIGHT
from engine.scheduler.request import MAX_PRIORITY, InvalidRequest

MAX_CHOICES = 128


def validate(request: GenerateRequest, info: EngineInfo) -> None:
    """Check a request. Raises InvalidRequest, naming the value and the allowed range."""
    num_prompt, num_resumed = len(request.prompt_token_ids), len(request.output_token_ids)
    if not num_prompt:
        raise InvalidRequest("the prompt is empty; at least one token is needed")
    if request.sampling.pooling is not None:
        _check_pooling(request, info)
    elif num_prompt + num_resumed >= info.max_model_len:
        raise InvalidRequest(
            f"the prompt has {num_prompt + num_resumed} tokens, and the context of "
            f"{info.max_model_len} tokens must hold it and at least one token more"
        )
    vocab_size = _vocab_size(request, info)
    _check_token_ids("prompt", request.prompt_token_ids, vocab_size)
    _check_token_ids("output so far", request.output_token_ids, vocab_size)
    _check_token_ids("stop_token_ids", request.sampling.stop_token_ids, vocab_size)
    _check_token_ids("eos_token_ids", request.sampling.eos_token_ids or (), vocab_size)
    _check_token_ids("logit_bias", (t for t, _ in request.sampling.logit_bias), vocab_size)
    for word in request.sampling.bad_words:
        _check_token_ids("bad_words", word, vocab_size)
    _check_token_ids("allowed_token_ids", request.sampling.allowed_token_ids or (), vocab_size)
    _check_grammar(request, info)
    _check_some_token_is_allowed(request, info)
    if not 1 <= request.n <= MAX_CHOICES:
        raise InvalidRequest(f"n must be in [1, {MAX_CHOICES}], not {request.n}")
    if not -MAX_PRIORITY <= request.priority <= MAX_PRIORITY:
        raise InvalidRequest(
            f"priority must be in [{-MAX_PRIORITY}, {MAX_PRIORITY}], not {request.priority}"
        )
    if not MIN_WEIGHT <= request.weight <= MAX_WEIGHT:
        raise InvalidRequest(
            f"weight must be in [{MIN_WEIGHT}, {MAX_WEIGHT}], not {request.weight}"
        )
    if num_resumed and request.n != 1:
        raise InvalidRequest(f"a resumed request has one choice, not n={request.n}")
    if num_resumed >= request.sampling.max_tokens:
        raise InvalidRequest(
            f"{num_resumed} tokens are there already, of max_tokens={request.sampling.max_tokens}"
        )


def _vocab_size(request: GenerateRequest, info: EngineInfo) -> int:
    """Return the number of token ids that the request may use: its adapter may have others."""
    own = 0 if request.adapter_folder is None else request.adapter_folder.vocab_size
    return own or info.vocab_size


def _check_pooling(request: GenerateRequest, info: EngineInfo) -> None:
    """Check a request that samples nothing: its prompt may fill the context."""
    num_prompt, sampling = len(request.prompt_token_ids), request.sampling
    if num_prompt > info.max_model_len:
        raise InvalidRequest(
            f"the prompt has {num_prompt} tokens, and the context holds {info.max_model_len}"
        )
    if request.n != 1 or request.output_token_ids:
        raise InvalidRequest("a request with pooling has one choice, and no output")
    if sampling.grammar is not None or sampling.prompt_logprobs is not None:
        raise InvalidRequest("a request with pooling has neither a grammar nor prompt_logprobs")


def _check_grammar(request: GenerateRequest, info: EngineInfo) -> None:
    """Check that the model can have a grammar, and that end tokens can end what it allows."""
    if request.sampling.grammar is None:
        return
    if info.grammar_refusal:
        raise InvalidRequest(info.grammar_refusal)
    if request.sampling.allowed_token_ids is not None:
        raise InvalidRequest("allowed_token_ids is not possible with structured output")
    if request.sampling.ignore_eos:
        raise InvalidRequest(
            "ignore_eos=True is not possible with structured output: end tokens are how a finished "
            "one ends"
        )
    ends, vocab_size = (
        request.sampling.end_token_ids(info.eos_token_ids),
        _vocab_size(request, info),
    )
    if min(ends, default=0) >= vocab_size:
        raise InvalidRequest(
            f"structured output needs an end token, and the adapter has none: of its {vocab_size} "
            f"token ids, none is {', '.join(map(str, sorted(ends)))}"
        )


def _check_some_token_is_allowed(request: GenerateRequest, info: EngineInfo) -> None:
    """Check that a token stays allowed, whatever the output so far is."""
    sampling, allowed = request.sampling, request.sampling.allowed_token_ids
    vocab_size = _vocab_size(request, info)
    forbidden = {word[-1] for word in sampling.bad_words}
    if sampling.min_tokens > 1:
        forbidden |= sampling.end_token_ids(info.eos_token_ids)
    if len(forbidden) < (vocab_size if allowed is None else 1):
        return
    rest = vocab_size - len(forbidden) if allowed is None else len({*allowed} - forbidden)
    if rest > 0:
        return
    num = vocab_size if allowed is None else len({*allowed})
    raise InvalidRequest(
        f"min_tokens={sampling.min_tokens} forbids all end tokens before, and bad_words the last "
        f"token of each: together all {num} tokens that are allowed; list fewer"
    )


def _check_token_ids(name: str, token_ids: Iterable[int], vocab_size: int) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                f"{name}: token id {token_id} is outside the vocabulary [0, {vocab_size - 1}]"
            )
