"""AnswerSyntax: what a model's answers hold beside text, found when the model is loaded."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from deployments.text.answer_parser import AnswerParser
from deployments.text.channels import MARKS, ChannelParser
from deployments.text.deltas import Delta
from deployments.text.reasoning import (
    THINK_TAGS,
    ReasoningSplitter,
    ThinkTags,
    find_think_tags,
    is_reasoning,
)
from deployments.text.tools.call_parser import CallParser
from deployments.text.tools.call_reader import Schemas
from deployments.text.tools.formats import AUTO, FORMATS, NONE, ToolFormat
from deployments.text.tools.pattern import literals_of
from deployments.text.tools.probe import CallStyle, ToolSupport, probe_tools
from deployments.text.vocabulary import Vocabulary

logger = logging.getLogger(__name__)


class Parser(Protocol):
    """Parts one answer. After `is_done` nothing belongs to the answer any more."""

    has_calls: bool
    is_done: bool

    def push(self, text: str) -> list[Delta]: ...
    def flush(self) -> list[Delta]: ...


@dataclass(frozen=True, slots=True)
class AnswerSyntax:
    """`shown_ids` are the control tokens that are part of the formats, and so of the text."""

    tools: ToolSupport
    think_tags: ThinkTags | None = None
    shown_ids: frozenset[int] = frozenset()
    mark_ids: Mapping[str, int] = field(default_factory=dict[str, int])  # marks that are tokens
    takes_effort: bool = False  # whether the template reads `reasoning_effort`
    takes_thinking: bool = False  # whether it reads `enable_thinking`
    takes_documents: bool = False  # whether it reads `documents`
    configured: tuple[str, str] = (AUTO, AUTO)  # the formats of tools and of reasoning
    probed: "ProbedTemplate | None" = None  # that it was found in

    @property
    def is_plain(self) -> bool:
        """Tell whether answers without tools are text alone."""
        form = self.tools.form
        return self.think_tags is None and not (form and form.has_channels)

    @property
    def marks_calls(self) -> bool:
        """Tell whether an answer's beginning says if it is a call."""
        form = self.tools.form
        return form is not None and (form.has_channels or bool(form.opening))

    @property
    def can_reason(self) -> bool:
        return self.takes_effort or self.takes_thinking or not self.is_plain

    @property
    def style(self) -> CallStyle:
        return self.tools.style

    def parser(
        self, schemas: Schemas, is_inside: bool, one_call: bool, no_text: bool = False
    ) -> Parser:
        """Make a parser for one answer. Without schemas it looks for no calls.

        `no_text`: the answer is either calls or text, and its beginning tells which.
        """
        tags, form = self.think_tags, self.tools.form
        one_call = one_call or self.tools.has_one_call
        if form and form.has_channels:
            return ChannelParser(one_call)
        splitter = ReasoningSplitter(tags, is_inside) if tags else None
        calls = CallParser(form, schemas, no_text) if form and schemas else None
        return AnswerParser(splitter, calls, one_call)

    def has_reasoned(self, prompt: str) -> bool:
        """Tell whether a prompt ends behind reasoning, so that answers have none."""
        return self.think_tags is not None and prompt.rstrip().endswith(self.think_tags.closing)

    def for_adapter(self, vocabulary: Vocabulary, tool_format: str | None) -> "AnswerSyntax":
        """Look again for an adapter that has the same template."""
        probed = self.probed or ProbedTemplate(vocabulary.template_source, self.tools)
        tools, reasoning = self.configured
        return syntax_of(probed, vocabulary, tool_format or tools, reasoning)

    def begins_inside(self, prompt: str, continued: str | None) -> bool:
        return self.think_tags is not None and is_reasoning(self.think_tags, prompt, continued)


@dataclass(frozen=True, slots=True)
class ProbedTemplate:
    """A chat template, how it calls tools, and the variables that it reads."""

    source: str
    tools: ToolSupport
    variables: frozenset[str] = frozenset()


_NO_TEMPLATE = ToolSupport(None, refusal="its base has no chat template")
PLAIN = AnswerSyntax(ToolSupport(None, refusal="the model's chat template was not looked at"))


def find_syntax(
    vocabulary: Vocabulary, model_id: str, tool_format: str = AUTO, reasoning_format: str = AUTO
) -> AnswerSyntax:
    """Look for formats in the model's template, or take those that are named."""
    source = vocabulary.template_source
    found = probe_tools(vocabulary.render) if source else _NO_TEMPLATE
    probed = ProbedTemplate(source, found, frozenset(vocabulary.template_variables()))
    syntax = syntax_of(probed, vocabulary, tool_format, reasoning_format)
    _log(model_id, syntax.tools, syntax.think_tags)
    return syntax


def syntax_of(
    probed: ProbedTemplate, vocabulary: Vocabulary, tool_format: str, reasoning_format: str
) -> AnswerSyntax:
    """Put together what a template says and what the configuration names."""
    tools = _tools(probed.tools, tool_format)
    if reasoning_format == AUTO:
        tags = find_think_tags(probed.source, vocabulary.added_texts)
    else:
        tags = THINK_TAGS.get(reasoning_format)
    markers = _markers(tools.form, tags)
    return AnswerSyntax(
        tools,
        tags,
        vocabulary.special_ids_in(markers),
        vocabulary.added_ids_in(markers),
        "reasoning_effort" in probed.variables,
        "enable_thinking" in probed.variables,
        "documents" in probed.variables,
        (tool_format, reasoning_format),
        probed,
    )


def _tools(found: ToolSupport, tool_format: str) -> ToolSupport:
    if tool_format == NONE:
        return ToolSupport(None, refusal="the configuration switches them off")
    if tool_format == AUTO:
        return found
    return ToolSupport(FORMATS[tool_format], found.style, found.has_one_call)


def _markers(form: ToolFormat | None, tags: ThinkTags | None) -> list[str]:
    markers = [tags.opening, tags.closing] if tags else []
    if form and form.has_channels:
        markers += MARKS
    elif form:
        markers += [*(form.section or ()), *literals_of(form.call)]
        markers += [*literals_of(form.parameter), '<|"|>']
    return markers


def _log(model_id: str, tools: ToolSupport, tags: ThinkTags | None) -> None:
    if tools.form is None:
        logger.warning("%s: requests with tools are refused: %s", model_id, tools.refusal)
    else:
        logger.info("%s: tools are called in the format %s", model_id, tools.form.name)
    if tags is not None:
        logger.info("%s: reasoning stands between %s and %s", model_id, tags.opening, tags.closing)
