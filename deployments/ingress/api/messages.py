"""Parse the messages of chats: text only, whole or in parts."""

# Fields are JSON of any shape until they are checked here.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownMemberType=false

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from deployments.ingress.api.openai_fields import Model, Nothing, is_empty, short

MAX_PARTS = 1024  # of one message

_PART_FIELDS = ("type", "text", "cache_control")  # a hint to caches changes no answer


def _content(value: object) -> object:
    """Read text, or a list of text parts, which become one line or more each."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be text or a list of text parts")
    if len(value) > MAX_PARTS:
        raise ValueError(f"must have at most {MAX_PARTS} parts, not {len(value)}")
    return "\n".join(map(_part_text, value))


def _part_text(part: object) -> str:
    kind = part.get("type") if isinstance(part, dict) else part
    if not isinstance(part, dict) or kind != "text":
        raise ValueError(f"only parts of the type 'text' are supported, not {short(kind)}")
    text = part.get("text")
    if not isinstance(text, str):
        raise ValueError(f"the text of a part must be a string, not {short(text)}")
    for name, setting in part.items():
        if name not in _PART_FIELDS and not is_empty(setting):
            raise ValueError(f"a text part has the unknown field {short(name)}")
    return text


class Message(Model):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | None, BeforeValidator(_content)] = None
    name: str | None = None
    reasoning_content: str | None = None  # as in answers of other servers
    refusal: Nothing = None
    tool_calls: Nothing = None
    function_call: Nothing = None
    audio: Nothing = None
    annotations: Any = None
    id: Any = None

    def document(self) -> dict[str, str]:
        """Write the message for chat templates. `developer` is OpenAI's newer word for `system`."""
        role = "system" if self.role == "developer" else self.role
        message = {"role": role, "content": self.content or ""}
        extras = {"name": self.name, "reasoning_content": self.reasoning_content}
        return message | {name: value for name, value in extras.items() if value is not None}
