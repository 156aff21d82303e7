"""Write the grammar of vLLM's structural tags: free text, in which tags hold what must match.

Two forms: `structures` with `triggers`, and a `format` of nested parts. Where a trigger stands in
the text, one of the tags follows that begin with it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

from deployments.ingress.structured.json_parts import JsonParts
from deployments.ingress.structured.lark import ANY_TEXT, Lark, any_of, regex, without
from deployments.ingress.structured.schema import Preparation, SchemaRefused

MAX_DEPTH = 16  # of parts inside parts
MAX_PARTS = 256  # in one list

TokenIds = Callable[[Iterable[str]], Mapping[str, int]]
Part = Mapping[str, Any]


class TagRefused(ValueError):
    """The message says what is wrong at `path`, a place in the request."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(message)
        self.path = path


def tag_document(
    tag: Part, path: str, ids_in: TokenIds, is_lenient: bool
) -> tuple[dict[str, Any], list[str]]:
    """Return llguidance's document, and what is not enforced. Raises TagRefused."""
    writer = _Writer(Lark(ids_in(_texts(tag))), is_lenient)
    if "format" in tag:
        start = writer.part(tag["format"], f"{path}.format", 0)
    else:
        start = writer.triggered(_of_structures(tag, path), path, 0)
    grammars = [{"lark_grammar": writer.lark.text(start)}, *writer.parts.documents]
    return {"grammars": grammars}, writer.not_enforced


def _of_structures(tag: Part, path: str) -> Part:
    """Write the older form in the words of the newer one."""
    tags = [
        {
            "begin": _text(each, "begin", f"{path}.structures[{at}]"),
            "content": {"type": "json_schema", "json_schema": each.get("schema")},
            "end": each.get("end", ""),
        }
        for at, each in enumerate(_objects(tag, "structures", path))
    ]
    return {"triggers": tag.get("triggers"), "tags": tags}


def _texts(value: object) -> Iterable[str]:
    """List all texts inside a structural tag, but for those of schemas."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for each in cast("list[object]", value):
            yield from _texts(each)
    elif isinstance(value, dict):
        for name, each in cast("dict[str, object]", value).items():
            if name not in ("schema", "json_schema"):
                yield from _texts(each)


class _Writer:
    def __init__(self, lark: Lark, is_lenient: bool) -> None:
        self.lark = lark
        self.parts = JsonParts(is_lenient)
        self.not_enforced: list[str] = []
        self._is_lenient = is_lenient

    def part(self, part: object, path: str, depth: int) -> str:
        if not isinstance(part, dict) or depth > MAX_DEPTH:
            raise TagRefused(path, f"must be an object, at most {MAX_DEPTH} levels deep")
        given = cast("dict[str, Any]", part)
        match given.get("type"):
            case "const_string":
                return self.lark.marks(_text(given, "value", path))
            case "regex":
                return regex(_text(given, "pattern", path))
            case "json_schema":
                return self._schema(given.get("json_schema"), f"{path}.json_schema")
            case "any_text":
                return self.lark.terminal(ANY_TEXT)
            case "tag":
                return self._tag(given, path, depth)
            case "sequence" | "or" as kind:
                elements = _objects(given, "elements", path)
                places = (f"{path}.elements[{at}]" for at in range(len(elements)))
                each = [self.part(e, p, depth + 1) for e, p in zip(elements, places, strict=True)]
                return any_of(each) if kind == "or" else " ".join(each)
            case "triggered_tags":
                return self.triggered(given, path, depth)
            case "tags_with_separator":
                return self._separated(given, path, depth)
            case kind:
                known = "const_string, regex, json_schema, any_text, tag, sequence, or, "
                known += "triggered_tags or tags_with_separator"
                raise TagRefused(f"{path}.type", f"must be {known}, not {str(kind)[:80]!r}")

    # ---- tags ------------------------------------------------------------------------------

    def triggered(self, given: Part, path: str, depth: int) -> str:
        """Write text without the triggers, but where they begin a tag."""
        triggers = _strings(given, "triggers", path)
        tags: list[str] = []
        for at, tag in enumerate(_objects(given, "tags", path)):
            place = f"{path}.tags[{at}]"
            begin = _text(tag, "begin", place)
            if not any(begin.startswith(trigger) for trigger in triggers):
                raise TagRefused(f"{place}.begin", f"{begin[:80]!r} begins with no trigger")
            opened = self.lark.until(ANY_TEXT, begin, *triggers)
            tags.append(self.lark.rule(f"{opened} {self._inside(tag, place, depth)}"))
        text = self.lark.terminal(without(ANY_TEXT, *triggers))
        must_have, has_one = given.get("at_least_one"), given.get("stop_after_first")
        if has_one:
            return any_of(tags if must_have else [*tags, text])
        return f"{any_of(tags)}{'+' if must_have else '*'} {text}"

    def _separated(self, given: Part, path: str, depth: int) -> str:
        tags: list[str] = []
        for at, tag in enumerate(_objects(given, "tags", path)):
            tags.append(self._tag(tag, f"{path}.tags[{at}]", depth))
        each = self.lark.rule(any_of(tags))
        separator = self.lark.marks(_text(given, "separator", path))
        more = "" if given.get("stop_after_first") else f" ({separator} {each})*"
        return f"({each}{more}){'' if given.get('at_least_one') else '?'}"

    def _tag(self, tag: Part, path: str, depth: int) -> str:
        return f"{self.lark.marks(_text(tag, 'begin', path))} {self._inside(tag, path, depth)}"

    def _inside(self, tag: Part, path: str, depth: int) -> str:
        """Write a tag's content and its end."""
        end = tag.get("end", "")
        if not isinstance(end, str):
            raise TagRefused(f"{path}.end", "must be a string")
        content: object = tag.get("content")
        if content == {"type": "any_text"} and end:
            return self.lark.until(ANY_TEXT, end)
        return f"{self.part(content, f'{path}.content', depth + 1)} {self.lark.marks(end)}"

    def _schema(self, schema: object, path: str) -> str:
        preparation = Preparation(self._is_lenient)
        try:
            prepared = preparation.prepare(schema)
        except SchemaRefused as error:
            raise TagRefused(path, str(error)) from None
        if prepared is False:
            raise TagRefused(path, "the schema false allows nothing")
        self.not_enforced += preparation.not_enforced
        return self.parts.add(prepared if isinstance(prepared, dict) else {}, path)


def _text(given: Part, name: str, path: str) -> str:
    text = given.get(name)
    if not isinstance(text, str) or not text:
        raise TagRefused(f"{path}.{name}", "must be a non-empty string")
    return text


def _strings(given: Part, name: str, path: str) -> Sequence[str]:
    texts: Any = given.get(name)
    if not isinstance(texts, list) or not 1 <= len(cast("list[Any]", texts)) <= MAX_PARTS:
        raise TagRefused(f"{path}.{name}", f"must be a list of 1 to {MAX_PARTS} strings")
    return [_text({name: text}, name, path) for text in cast("list[object]", texts)]


def _objects(given: Part, name: str, path: str) -> Sequence[Part]:
    found: Any = given.get(name)
    if not isinstance(found, list) or not 1 <= len(cast("list[Any]", found)) <= MAX_PARTS:
        raise TagRefused(f"{path}.{name}", f"must be a list of 1 to {MAX_PARTS} objects")
    listed = cast("list[object]", found)
    for at, each in enumerate(listed):
        if not isinstance(each, dict):
            raise TagRefused(f"{path}.{name}[{at}]", "must be an object")
    return cast("list[Part]", listed)
