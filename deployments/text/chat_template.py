"""Render a model's own chat template in a sandbox, as transformers does."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import takewhile
from typing import Any, cast

from jinja2 import TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_REASON = 300  # characters of what a template said

JsonObject = Mapping[str, Any]


class TemplateRefused(ValueError):
    """The template cannot render these messages; the message is what it said."""


class GenerationTag(Extension):
    """Ignores `{% generation %}...{% endgeneration %}`, which marks text for training."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own interface

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """One compiled template. `variables` are the special tokens that templates name."""

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
        )
        filters = cast("dict[str, Any]", environment.filters)  # pyright: ignore
        known = cast("dict[str, Any]", environment.globals)  # pyright: ignore
        filters["tojson"] = _tojson
        known["raise_exception"] = _raise
        known["strftime_now"] = _strftime_now
        self.source = source
        self._environment = environment
        self._template = environment.from_string(source)
        self._variables = dict(variables)
        self._takes_one_system = self._probe_systems()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        extra: Mapping[str, Any],
    ) -> str:
        """Render a chat. `extra` are variables of the client's, and win over all but messages."""
        if self._takes_one_system:
            messages = _join_systems(messages)
        given = {"add_generation_prompt": add_generation_prompt, **extra, "messages": messages}
        try:
            return self._template.render({**self._defaults(), **given})
        except Exception as error:  # a template is a program, and these messages are its input
            reason = str(error)[:MAX_REASON]
            raise TemplateRefused(f"The chat template refused the messages: {reason}") from error

    def variables(self) -> set[str]:
        """List the variables that the template reads."""
        return meta.find_undeclared_variables(self._environment.parse(self.source))

    def _defaults(self) -> dict[str, Any]:
        return {"tools": None, "documents": None, **self._variables}

    def _probe_systems(self) -> bool:
        """Tell whether of two system messages one is refused or lost, and joined they are not."""
        systems = [{"role": "system", "content": content} for content in ("first", "second")]
        user = {"role": "user", "content": "third"}
        self._takes_one_system = False
        return not self._shows([*systems, user]) and self._shows(_join_systems([*systems, user]))

    def _shows(self, messages: Sequence[JsonObject]) -> bool:
        """Tell whether the probe's three texts are all in what is rendered."""
        try:
            text = self.render(messages, True, {})
        except TemplateRefused:
            return False
        return all(part in text for part in ("first", "second", "third"))


def _join_systems(messages: Sequence[JsonObject]) -> list[JsonObject]:
    """Make one message of the system messages that a chat begins with."""
    systems = list(takewhile(lambda message: message.get("role") == "system", messages))
    if len(systems) < 2:
        return list(messages)
    content = "\n\n".join(str(message["content"]) for message in systems)
    return [{**systems[0], "content": content}, *messages[len(systems) :]]


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Not jinja's own: that one escapes for HTML.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _raise(message: str) -> None:
    raise TemplateError(message)
