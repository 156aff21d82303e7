"""OwnText: what an adapter brings beside its weights, ready for use."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapter_store.chat_template import AdapterTemplate
from adapter_store.generation_settings import GenerationSettings
from deployments.text.answer_syntax import AnswerSyntax, ProbedTemplate, syntax_of
from deployments.text.bounded_renderer import BoundedRenderer
from deployments.text.vocabulary import Vocabulary


@dataclass(slots=True)
class ChatRenderer:
    """Renders chats with one adapter's template."""

    template: AdapterTemplate
    renderer: BoundedRenderer

    async def probe(self, vocabulary: Vocabulary) -> ProbedTemplate:
        """Find how the template calls tools."""
        return await self.renderer.probe(self._with_tokens(vocabulary.special_tokens))

    async def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        extra: Mapping[str, Any],
        tokens: Mapping[str, str],
    ) -> str:
        """Render a chat. `tokens` are the special ones where the adapter names none.

        Raises TemplateRefused.
        """
        template = self._with_tokens(tokens)
        return await self.renderer.render(template, messages, add_generation_prompt, extra)

    def _with_tokens(self, tokens: Mapping[str, str]) -> AdapterTemplate:
        tokens = {**tokens, **self.template.special_tokens}
        return AdapterTemplate(self.template.source, tokens)


@dataclass(slots=True, eq=False)
class OwnText:
    """What is not there is the base's.

    `templates` are several where adapters are combined that have different ones. `extends_base`:
    whether the vocabulary has each token of the base's, and shows it alike.
    """

    vocabulary: Vocabulary | None = None
    templates: Sequence[ChatRenderer] = ()
    generation: GenerationSettings | None = None
    tool_format: str | None = None  # of the configuration
    extends_base: bool = True
    _syntax: AnswerSyntax | None = None

    async def syntax(self, base: AnswerSyntax, vocabulary: Vocabulary) -> AnswerSyntax:
        """Find what the adapter's answers look like: by its own template, or the base's."""
        if self.vocabulary is None and not self.templates and self.tool_format is None:
            return base
        if self._syntax is None:
            self._syntax = await self._find_syntax(base, self.vocabulary or vocabulary)
        return self._syntax

    async def _find_syntax(self, base: AnswerSyntax, vocabulary: Vocabulary) -> AnswerSyntax:
        if len(self.templates) != 1:
            return base.for_adapter(vocabulary, self.tool_format)
        probed, (tools, reasoning) = await self.templates[0].probe(vocabulary), base.configured
        return syntax_of(probed, vocabulary, self.tool_format or tools, reasoning)


NOTHING_OWN = OwnText()
