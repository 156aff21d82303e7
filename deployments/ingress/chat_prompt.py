"""Turn a chat's messages into its prompt: render them with a template, then encode the text."""

from deployments.ingress.chat_answers import ChatAnswers
from deployments.ingress.http_errors import invalid
from deployments.ingress.model_resolver import Target
from deployments.ingress.own_text import ChatRenderer
from deployments.ingress.prompt_texts import check_length, encode_texts, kept_tokens, prompt_room
from deployments.text.chat_template import TemplateRefused
from deployments.text.vocabulary import Vocabulary


async def encode_chat(
    answers: ChatAnswers,
    target: Target,
    split_special_tokens: bool,
    own_template: ChatRenderer | None,
) -> tuple[str, list[int]]:
    """Return the prompt's text and token ids. Raises ApiError.

    The base's template is used, or `own_template`, the adapter's.
    """
    vocabulary, limit = target.vocabulary, target.engine.max_model_len
    answers.check()
    check_length(vocabulary, "messages", answers.texts(), limit)
    try:
        pieces = await _chat_pieces(answers, vocabulary, split_special_tokens, own_template)
    except RecursionError:
        raise invalid(
            "messages: what they or the template's variables hold is nested too deeply.", "messages"
        ) from None
    except TemplateRefused as error:
        raise invalid(str(error), "messages") from None
    add_special = answers.request.add_special_tokens is True
    room = prompt_room(answers.request.wanted_max_tokens, limit)
    keep_last = kept_tokens(answers.request.truncate_prompt_tokens, room)
    texts = {"messages": pieces}
    [prompt] = await encode_texts(vocabulary, texts, add_special, limit, keep_last)
    return "".join(pieces), prompt


async def _chat_pieces(
    answers: ChatAnswers,
    vocabulary: Vocabulary,
    split_special_tokens: bool,
    own_template: ChatRenderer | None,
) -> list[str]:
    request = answers.request
    continue_final = request.continue_final_message is True
    documents = answers.messages()
    if continue_final and "content" not in documents[-1]:
        path = f"messages[{len(documents) - 1}]"
        raise invalid(f"{path}: a message of calls alone cannot be continued.", path)
    messages, extra = vocabulary.mark_chat(
        documents,
        answers.variables(None if own_template is None else own_template.template.source),
        split_special_tokens,
        continue_final,
    )
    opens_answer = request.add_generation_prompt is not False and not continue_final
    if own_template is None:
        text = vocabulary.render(messages, opens_answer, extra)
    else:
        tokens = vocabulary.special_tokens
        text = await own_template.render(messages, opens_answer, extra, tokens)
    return vocabulary.cut_chat(text, continue_final)
