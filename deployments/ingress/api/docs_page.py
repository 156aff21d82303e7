"""Write the OpenAPI document as one page of HTML, without scripts and without the internet."""

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

Document = Mapping[str, Any]
STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "code{font-size:.95em}summary{cursor:pointer}table{border-collapse:collapse}"
    "td,th{text-align:left;vertical-align:top;padding:.1em 1.5em .1em 0}"
    "details{margin:.5em 0}details details{margin-left:1em}"
)


def docs_page(document: Document) -> str:
    info = document["info"]
    title = escape(f"{info['title']} {info['version']}")
    operations = [
        _operation(document, path, method, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body><h1>{title}</h1>"
        '<p>The same for programs: <a href="openapi.json">openapi.json</a></p>'
        f"{''.join(operations)}</body></html>"
    )


def _operation(document: Document, path: str, method: str, operation: Document) -> str:
    head = f"<code>{escape(method.upper())} {escape(path)}</code> {escape(operation['summary'])}"
    parts = [_parameters(operation.get("parameters", ())), *_bodies(document, operation)]
    answers = (
        (status, escape(", ".join(answer["content"])), escape(answer["description"]))
        for status, answer in operation["responses"].items()
    )
    parts.append(_table(("status", "type", ""), answers))
    return f"<details><summary>{head}</summary>{''.join(parts)}</details>"


def _parameters(parameters: Any) -> str:
    rows = [(_code(each["name"]), escape(each.get("description", ""))) for each in parameters]
    return _table(("parameter", ""), rows) if rows else ""


def _bodies(document: Document, operation: Document) -> Iterator[str]:
    content = operation.get("requestBody", {"content": {}})["content"]
    for media in content.values():
        for schema in media["schema"].get("anyOf", [media["schema"]]):
            yield _fields(document, schema)


def _fields(document: Document, schema: Document) -> str:
    name = _name(schema)
    model = document["components"]["schemas"].get(name, {})
    required = model.get("required", ())
    rows = [
        (_code(field), escape(type_of(each)), "required" if field in required else "")
        for field, each in model.get("properties", {}).items()
    ]
    table = _table(("field", "type", ""), rows)
    return f"<details open><summary>{escape(name)}</summary>{table}</details>"


def type_of(schema: Document) -> str:
    """Write the type of a field in a few words."""
    if "$ref" in schema:
        return _name(schema)
    if "anyOf" in schema:
        return " or ".join(type_of(each) for each in schema["anyOf"])
    if "const" in schema or "enum" in schema:
        return " or ".join(map(repr, schema.get("enum", [schema.get("const")])))
    if schema.get("type") == "array":
        return f"list of {type_of(schema.get('items', {}))}"
    return str(schema.get("type", "any"))


def _name(schema: Document) -> str:
    return str(schema.get("$ref", "")).rpartition("/")[2]


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def _table(heads: tuple[str, ...], rows: Any) -> str:
    top = "".join(f"<th>{escape(head)}</th>" for head in heads)
    lines = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    return f"<table><tr>{top}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
