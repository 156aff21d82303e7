"""Define the parts of an answer: text, reasoning and calls of tools."""

from dataclasses import dataclass

from deployments.text.tools.call import ToolCall


@dataclass(frozen=True, slots=True)
class Reasoning:
    text: str


Delta = str | Reasoning | ToolCall
