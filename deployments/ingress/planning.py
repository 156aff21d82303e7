"""Plan a parsed request for a resolved model: prompts, limits, sampling, seeds.

What can be found wrong without asking the engine is refused here, with the value and the allowed
range.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deployments.fleet.protocol import Submit
from deployments.ingress.api.openai import ChatCompletionRequest, CompletionRequest
from deployments.ingress.api.openai_fields import short
from deployments.ingress.api.openai_replies import ReplyHead
from deployments.ingress.api.openai_request import OpenAIRequest
from deployments.ingress.bad_words import TokenIds, encode_bad_words
from deployments.ingress.chat_answers import ChatAnswers, MakeChoice
from deployments.ingress.chat_prompt import encode_chat
from deployments.ingress.choice import Choice, TokenEntry
from deployments.ingress.generation import Plan
from deployments.ingress.http_errors import invalid, too_many_answers
from deployments.ingress.model_resolver import Target
from deployments.ingress.own_text import ChatRenderer
from deployments.ingress.prompt_texts import (
    encode_prompts,
    kept_tokens,
    prompt_room,
    prompt_too_long,
)
from deployments.ingress.reply_form import OPENAI_CHAT, OPENAI_COMPLETION, ReplyForm, ReplyParts
from deployments.ingress.sessions import session_key
from deployments.ingress.structured.constraint import Constraint, Grammar
from deployments.ingress.structured.plan import grammar_headers, plan_grammar, within
from deployments.text.vocabulary import Vocabulary
from engine.messages import EngineInfo, GenerateRequest, RequestOutput, TokenLogprobs
from engine.scheduler.request import InvalidRequest, SamplingParams


@dataclass(frozen=True, slots=True)
class Origin:
    """Where new ids, seeds and the time come from."""

    new_id: Callable[[], str]
    new_seed: Callable[[], int]
    now: Callable[[], float]


async def plan_chat(
    request: ChatCompletionRequest,
    target: Target,
    origin: Origin,
    split_special_tokens: bool = False,
    own_template: ChatRenderer | None = None,
    is_lenient: bool = False,
    form: ReplyForm = OPENAI_CHAT,
) -> Plan:
    """Plan a chat with the base's template, or with `own_template`."""
    vocabulary = target.vocabulary
    info = target.engine
    answers = ChatAnswers(request, await target.syntax())
    text, prompt = await encode_chat(answers, target, split_special_tokens, own_template)
    grammar = await _plan_grammar(target, answers.constraint(text), is_lenient)
    words = await encode_bad_words(vocabulary, request.bad_words or ())
    engine_id = form.id_prefix + origin.new_id()
    head = _head(request, form, engine_id, origin)
    submits = _submits(
        request, target, info, [prompt], ["messages"], engine_id, origin, grammar, words
    )
    parsed = answers.choice_maker(text, vocabulary, prompt)
    parts = ReplyParts(
        head,
        vocabulary,
        [prompt],
        request.num_choices,
        answers.call_id_maker(origin.new_id),
        is_parsed=parsed is not None,
        shows_reasoning=request.include_reasoning is not False,
        names_call=answers.names_call,
    )
    return Plan(
        request.model,
        target,
        submits,
        request.num_choices,
        parsed or _choice_maker(request, vocabulary, [prompt], [""], False),
        form.make(parts),
        request.include_usage,
        headers=grammar_headers(grammar),
        answer_id=head.reply_id,
    )


async def plan_completion(
    request: CompletionRequest,
    target: Target,
    origin: Origin,
    is_lenient: bool = False,
    form: ReplyForm = OPENAI_COMPLETION,
) -> Plan:
    vocabulary = target.vocabulary
    info = target.engine
    one = len(request.prompt) == 1
    paths = ["prompt" if one else f"prompt[{at}]" for at in range(len(request.prompt))]
    room = prompt_room(request.wanted_max_tokens, info.max_model_len)
    prompts = await encode_prompts(
        vocabulary,
        dict(zip(paths, request.prompt, strict=True)),
        request.add_special_tokens is not False,
        info.max_model_len,
        kept_tokens(request.truncate_prompt_tokens, room),
    )
    grammar = await _plan_grammar(target, request.constraint, is_lenient)
    words = await encode_bad_words(vocabulary, request.bad_words or ())
    engine_id = form.id_prefix + origin.new_id()
    head = _head(request, form, engine_id, origin)
    submits = _submits(request, target, info, prompts, paths, engine_id, origin, grammar, words)
    openings = [""] * len(prompts)
    if request.echo:
        pairs = zip(request.prompt, prompts, strict=True)
        openings = [p if isinstance(p, str) else vocabulary.decode(i, False) for p, i in pairs]
    return Plan(
        request.model,
        target,
        submits,
        request.num_generated,
        _choice_maker(request, vocabulary, prompts, openings, bool(request.echo)),
        form.make(ReplyParts(head, vocabulary, prompts, request.num_choices, origin.new_id)),
        request.include_usage,
        is_prompt_only=request.max_tokens == 0,
        num_best=request.num_choices if request.num_generated > request.num_choices else None,
        headers=grammar_headers(grammar),
        answer_id=head.reply_id,
    )


async def _plan_grammar(
    target: Target, constraint: Constraint | None, is_lenient: bool
) -> Grammar | None:
    """Plan what answers must match. The engine knows the base's tokens alone. Raises ApiError."""
    if constraint is not None and not target.own.extends_base:
        raise invalid(
            f"{constraint.path}: structured output is not possible with this adapter: in its own "
            "tokenizer, tokens of the base have become others.",
            constraint.path,
            "unsupported_field",
        )
    num_ids = target.model.vocabulary.num_ids
    if constraint is not None and target.vocab_size < min(target.engine.vocab_size, num_ids):
        raise invalid(
            f"{constraint.path}: structured output is not possible with this adapter: it has "
            f"{target.vocab_size} token ids, and its base's tokenizer {num_ids}.",
            constraint.path,
            "unsupported_field",
        )
    ids_in = within(target.engine.vocab_size, target.vocabulary.added_ids_in)
    return await plan_grammar(constraint, is_lenient, ids_in)


def _head(request: OpenAIRequest, form: ReplyForm, engine_id: str, origin: Origin) -> ReplyHead:
    """A client's own id names the answer alone: the engine's must be unique."""
    return ReplyHead(
        engine_id if request.request_id is None else form.id_prefix + request.request_id,
        int(origin.now()),
        request.model,
        has_logprobs=request.wanted_logprobs is not None,
        has_token_ids=bool(request.return_token_ids),
        num_prompt_logprobs=request.prompt_logprobs,
        names_token_ids=request.return_tokens_as_token_ids is True,
        has_usage_in_chunks=request.include_usage,
        has_usage_so_far=request.include_usage_so_far,
    )


# ---- limits --------------------------------------------------------------------------------


def _submits(
    request: OpenAIRequest,
    target: Target,
    info: EngineInfo,
    prompts: Sequence[list[int]],
    paths: Sequence[str],
    engine_id: str,
    origin: Origin,
    grammar: Grammar | None,
    bad_words: tuple[TokenIds, ...],
) -> list[Submit]:
    """Make one submit per prompt, each with another seed unless the client gave one."""
    if request.num_answers > target.model.max_answers:
        raise too_many_answers(request.num_answers, target.model.max_answers)
    check_token_ids("stop_token_ids", request.stop_token_ids or (), target.vocab_size)
    check_token_ids("logit_bias", list(request.logit_bias or ()), target.vocab_size)
    check_token_ids("allowed_token_ids", request.allowed_token_ids or (), target.vocab_size)
    submits: list[Submit] = []
    for at, (prompt, path) in enumerate(zip(prompts, paths, strict=True)):
        max_tokens = _max_tokens(request, path, len(prompt), info.max_model_len)
        check_token_ids(path, prompt, target.vocab_size)
        sampling = request.sampling(max_tokens, origin.new_seed(), target.sampling_defaults)
        sampling = _completed(sampling, request, grammar, bad_words, target)
        generate = GenerateRequest(
            request_id=f"{engine_id}-{at}",
            prompt_token_ids=prompt,
            sampling=sampling,
            n=request.num_generated,
            tenant=target.tenant,
            cache_salt=request.cache_salt or "",
            priority=request.priority or 0,
            weight=target.weight,
        )
        submits.append(Submit(generate, target.adapter_ref, session_key(request.prompt_cache_key)))
    return submits


def _completed(
    sampling: SamplingParams,
    request: OpenAIRequest,
    grammar: Grammar | None,
    bad_words: tuple[TokenIds, ...],
    target: Target,
) -> SamplingParams:
    """Add what is not read from the request's fields alone. Raises ApiError."""
    changes: dict[str, Any] = {"bad_words": bad_words} if bad_words else {}
    own_ends = target.own_end_tokens
    if own_ends is not None:
        # Where a grammar's text may end, it lets the base's end tokens follow alone.
        base_ends = () if grammar is None else target.engine.eos_token_ids
        changes["eos_token_ids"] = tuple(dict.fromkeys((*own_ends, *base_ends)))
    if grammar is not None:
        changes["grammar"] = grammar.text
    if sampling.logprobs is None and request.num_generated > request.num_choices:
        changes["logprobs"] = 0  # which answers are best
    try:
        return replace(sampling, **changes) if changes else sampling
    except InvalidRequest as error:
        raise invalid(str(error), str(error).split(" ", 1)[0]) from None


def check_token_ids(path: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Refuse ids that the model has not. Raises ApiError."""
    for token_id in (min(token_ids, default=0), max(token_ids, default=0)):
        if not 0 <= token_id < vocab_size:
            message = f"{path}: token id {short(token_id)} is outside 0..{vocab_size - 1}."
            raise invalid(message, path)


def _max_tokens(request: OpenAIRequest, path: str, num_prompt: int, limit: int) -> int:
    """Settle the length of the answer: by default all that the prompt leaves of the context."""
    if num_prompt == 0:
        raise invalid("The prompt is empty: it has no tokens.", path)
    if num_prompt >= limit:
        raise prompt_too_long(path, num_prompt, limit)
    wanted = request.wanted_max_tokens
    if wanted is None:
        return limit - num_prompt
    if wanted < 0 or (wanted == 0 and isinstance(request, ChatCompletionRequest)):
        raise invalid(f"max_tokens must be at least 1, not {wanted}.", "max_tokens")
    if num_prompt + wanted > limit and request.is_cut_at_context:
        return limit - num_prompt
    if num_prompt + wanted > limit:
        raise invalid(
            f"The prompt has {num_prompt} tokens and max_tokens is {wanted}: together more than "
            f"the model's context of {limit} tokens.",
            "max_tokens",
            "context_length_exceeded",
        )
    return max(wanted, 1)


# ---- choices -------------------------------------------------------------------------------


def _choice_maker(
    request: OpenAIRequest,
    vocabulary: Vocabulary,
    prompts: Sequence[list[int]],
    openings: Sequence[str],
    echo: bool,
) -> MakeChoice:
    skip = request.skip_special_tokens is not False
    entries: dict[int, list[TokenEntry]] = {}  # by prompt; only its first choice brings them

    def make_choice(index: int, output: RequestOutput | None) -> Choice:
        at = index // request.num_generated
        choice = Choice(
            index,
            vocabulary.detokenizer(skip, prompts[at]),
            request.stop or (),
            bool(request.include_stop_str_in_output),
            request.min_tokens or 0,
            openings[at],
        )
        if echo and request.wanted_logprobs is not None:
            if at not in entries:
                logprobs = None if output is None else output.prompt_logprobs
                num_top = request.wanted_logprobs
                cut = [e and TokenLogprobs(e.logprob, e.top[:num_top]) for e in logprobs or ()]
                entries[at] = _prompt_entries(vocabulary, prompts[at], cut or None, openings[at])
            choice.unsent_entries.extend(entries[at])
        return choice

    return make_choice


def _prompt_entries(
    vocabulary: Vocabulary,
    prompt: Sequence[int],
    prompt_logprobs: Sequence[TokenLogprobs | None] | None,
    opening: str,
) -> list[TokenEntry]:
    """Place the tokens of an echoed prompt in its text, in which all but added ones are seen."""
    if prompt_logprobs is None:  # nothing precedes the only token of a prompt
        prompt_logprobs = [None] * len(prompt)
    num_hidden = _num_added_tokens(vocabulary, prompt, opening)
    detokenizer = vocabulary.detokenizer(False, ())
    entries: list[TokenEntry] = []
    length = 0
    for at, (token_id, logprobs) in enumerate(zip(prompt, prompt_logprobs, strict=True)):
        entries.append(TokenEntry(token_id, logprobs, min(length, len(opening))))
        if at >= num_hidden:
            length += len(detokenizer.push((token_id,)))
    return entries


def _num_added_tokens(vocabulary: Vocabulary, prompt: Sequence[int], text: str) -> int:
    """Count the special tokens before a text that are not in it."""
    num = 0
    while num < len(prompt) and vocabulary.is_special(prompt[num]):
        if text.startswith(vocabulary.token_text(prompt[num])):
            break
        num += 1
    return num
