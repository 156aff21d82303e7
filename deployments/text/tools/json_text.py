"""Decode JSON that a model has written. Numbers may be of any size, and surrogates alone."""

import json

import msgspec


def decode_json(text: bytes | str) -> object:
    """Decode a JSON text; a number beyond a double's range is infinite. Raises ValueError."""
    try:
        return msgspec.json.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError:
        return _decode_slowly(text)


def _decode_slowly(text: bytes | str) -> object:
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse(constant: str) -> object:
    raise ValueError(f"{constant} is no JSON")
