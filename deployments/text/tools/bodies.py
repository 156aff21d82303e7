"""Read what stands in the slots of a call's pattern."""

import ast
import json
import re
import warnings
from collections.abc import Sequence
from typing import Any, cast

import msgspec

from deployments.text.tools.call import NAME, NotACall, ToolCall, is_name
from deployments.text.tools.json_text import decode_json
from deployments.text.tools.scanner import JSON, MAX_DEPTH, PYTHON, Reading, Scanner
from deployments.text.tools.typed_values import quoted

NAME_PATTERN = re.compile(NAME)
ID_PATTERN = re.compile(r"[A-Za-z0-9_.:-]{1,80}")

_QUOTE = '<|"|>'  # around texts in bare JSON
_BARE_KEY = re.compile(r"[^\s:,{}\[\]<]{1,256}+")
_BARE_SCALAR = re.compile(r"[a-z0-9E+.\-]{1,400}+")
_CONSTANTS = {"true": True, "false": False, "null": None}

_raw_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_raw_list = msgspec.json.Decoder(list[msgspec.Raw])


# ---- JSON ----------------------------------------------------------------------------------


def read_arguments(scanner: Scanner) -> Reading[str]:
    text = yield from scanner.brackets(JSON)
    return checked_object(text)


def read_calls(scanner: Scanner, keys: tuple[str, str]) -> Reading[list[ToolCall]]:
    """Read calls as JSON objects: in a list, or one behind the other."""
    texts = [(yield from scanner.brackets(JSON))]
    while texts[0][0] == "{" and (yield from scanner.peek()) in ("{", ";"):
        yield from scanner.space()
        if (yield from scanner.starts_with(";")):
            yield from scanner.literal(";")
            yield from scanner.space()
        texts.append((yield from scanner.brackets(JSON)))
    return [_call(raw, keys) for text in texts for raw in _objects(text)]


def read_keyed_calls(scanner: Scanner) -> Reading[list[ToolCall]]:
    """Read calls as JSON objects in a list, with the tool's name as the only key."""
    text = yield from scanner.brackets(JSON)
    return [_keyed_call(raw) for raw in _objects(text)]


def _objects(text: str) -> Sequence[bytes]:
    try:
        found = (
            [bytes(raw) for raw in _raw_list.decode(text)] if text[0] == "[" else [text.encode()]
        )
    except (ValueError, RecursionError):
        raise NotACall from None
    if not found:
        raise NotACall
    return found


def _call(raw: bytes, keys: tuple[str, str]) -> ToolCall:
    fields = _fields(raw)
    name = fields.get(keys[0])
    given = [fields[key] for key in (keys[1], "arguments", "parameters") if key in fields]
    if name is None or not given:
        raise NotACall
    return ToolCall(_checked_name(_decoded(name)), _arguments(given[0]))


def _keyed_call(raw: bytes) -> ToolCall:
    fields = _fields(raw)
    if len(fields) != 1:
        raise NotACall
    [(name, arguments)] = fields.items()
    return ToolCall(_checked_name(name), _arguments(arguments))


def _fields(raw: bytes) -> dict[str, bytes]:
    try:
        return {name: bytes(value) for name, value in _raw_fields.decode(raw).items()}
    except (ValueError, RecursionError):
        raise NotACall from None


def _arguments(raw: bytes) -> str:
    """Take an object as it is written; some models write it as a text once more."""
    inner = _decoded(raw)
    return checked_object(inner if isinstance(inner, str) else raw.decode())


def checked_object(text: str) -> str:
    if not isinstance(_decoded(text.encode()), dict):
        raise NotACall
    return text


def _checked_name(name: object) -> str:
    if not is_name(name):
        raise NotACall
    return cast(str, name)


def _decoded(raw: bytes) -> object:
    try:
        return decode_json(raw)
    except ValueError:
        raise NotACall from None


# ---- bare JSON -----------------------------------------------------------------------------


def read_bare_json(scanner: Scanner, depth: int = 0) -> Reading[str]:
    """Read an object whose keys have no quotes and whose texts stand between marks, as JSON."""
    yield from scanner.literal("{")
    fields: dict[str, str] = {}
    while not (yield from scanner.starts_with("}")):
        if fields:
            yield from scanner.literal(",")
        key = yield from _bare_key(scanner)
        yield from scanner.literal(":")
        fields[key] = yield from _bare_value(scanner, depth + 1)  # the last one counts, as in JSON
    yield from scanner.literal("}")
    return as_object(fields)


def as_object(fields: dict[str, str]) -> str:
    """Write a JSON object of values that are JSON texts."""
    return "{" + ", ".join(f"{quoted(key)}: {value}" for key, value in fields.items()) + "}"


def _bare_key(scanner: Scanner) -> Reading[str]:
    if (yield from scanner.starts_with(_QUOTE)):
        return (yield from _bare_text(scanner))
    return (yield from scanner.match(_BARE_KEY))


def _bare_text(scanner: Scanner) -> Reading[str]:
    yield from scanner.literal(_QUOTE)
    return (yield from scanner.until(_QUOTE))


def _bare_value(scanner: Scanner, depth: int) -> Reading[str]:
    if depth > MAX_DEPTH:
        raise NotACall
    if (yield from scanner.starts_with(_QUOTE)):
        return quoted((yield from _bare_text(scanner)))
    if (yield from scanner.starts_with("{")):
        return (yield from read_bare_json(scanner, depth))
    if (yield from scanner.starts_with("[")):
        return (yield from _bare_list(scanner, depth))
    text = yield from scanner.match(_BARE_SCALAR)
    _decoded(text.encode())
    return text


def _bare_list(scanner: Scanner, depth: int) -> Reading[str]:
    yield from scanner.literal("[")
    items: list[str] = []
    while not (yield from scanner.starts_with("]")):
        if items:
            yield from scanner.literal(",")
        items.append((yield from _bare_value(scanner, depth + 1)))
    yield from scanner.literal("]")
    return f"[{', '.join(items)}]"


# ---- Python --------------------------------------------------------------------------------


def read_python(scanner: Scanner) -> Reading[list[ToolCall]]:
    """Read a Python list of calls with keyword arguments, all of them literals."""
    yield from scanner.literal("[")
    calls: list[ToolCall] = []
    while True:
        yield from scanner.space()
        name = yield from scanner.match(NAME_PATTERN)
        calls.append(_python_call(name, (yield from scanner.brackets(PYTHON))))
        yield from scanner.space()
        if (yield from scanner.starts_with("]")):
            break
        yield from scanner.literal(",")
    yield from scanner.literal("]")
    return calls


def _python_call(name: str, arguments: str) -> ToolCall:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            call = ast.parse(f"f{arguments}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise NotACall
        fields = {keyword.arg: _python_value(keyword.value) for keyword in call.keywords}
        text = json.dumps(fields, ensure_ascii=False, allow_nan=False)
        text.encode()  # half of a surrogate pair is no text
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise NotACall from None
    if None in fields:  # of **
        raise NotACall
    return ToolCall(name, text)


def _python_value(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return _CONSTANTS[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_python_value(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {_python_key(key): _python_value(value) for key, value in pairs}
    value = ast.literal_eval(node)
    if not isinstance(value, str | int | float | None):
        raise NotACall
    return value


def _python_key(node: ast.expr | None) -> str:
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
        raise NotACall
    return node.value
