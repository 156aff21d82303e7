"""Find the base model that a path begins with: `/{base}/v1/...` asks for `/v1/...` of that base.

The base travels in the request's scope. It is the model of a body that names none, and the base of
the adapter that a body names.
"""

from collections.abc import Iterable
from typing import Any, cast

from starlette.types import Scope

from deployments.ingress.http_errors import ApiError, model_not_found

_KEY = "reef.base"
_VERSION = "/v1/"


class BasePaths:
    """Splits paths by the ids of the base models, which may contain slashes and colons."""

    def __init__(self, base_ids: Iterable[str]) -> None:
        # The longest first: one id may be the beginning of another.
        self._prefixes = [f"/{base}" for base in sorted(base_ids, key=len, reverse=True)]

    def split(self, path: str) -> tuple[str, str] | None:
        """Return a base and the rest of the path; None if the path begins with no base."""
        for prefix in self._prefixes:
            if path == prefix or path.startswith(f"{prefix}/"):
                return prefix[1:], path[len(prefix) :] or "/"
        return None

    def stranger(self, path: str) -> ApiError | None:
        """Make the error for a path that names a base which is not served, if it names one."""
        base, version, _ = path.partition(_VERSION)
        if self.split(path) is not None:
            return None
        return model_not_found(base[1:]) if version and base else None


def route_path(path: str) -> str:
    """Guess the route that a path means, whatever the base before it is."""
    _, version, rest = path.partition(_VERSION)
    return version + rest if version else path


def enter_base(scope: Scope, base: str, rest: str) -> None:
    """Make a request one for the rest of its path."""
    scope[_KEY] = base
    scope["path"] = scope.get("root_path", "") + rest


def base_of(scope: Scope) -> str | None:
    """Return the base that the request's path began with."""
    return scope.get(_KEY)


def name_within(base: str | None, name: str) -> str:
    """Spell a model's name such that it means the base or one of its adapters alone."""
    if base is None or name == base or name.startswith(f"{base}:"):
        return name
    return f"{base}:{name}" if name else base


def as_fields(document: object) -> dict[str, Any]:
    """Return the fields of a body, whose shape was not checked yet; none if it is no object."""
    return cast(dict[str, Any], document) if isinstance(document, dict) else {}


def set_model(document: object, base: str | None) -> None:
    """Let a body mean this base, or the adapter of it that the body names."""
    if base is None or not isinstance(document, dict):
        return
    fields = as_fields(cast(object, document))
    name = fields.get("model")
    if name is None or isinstance(name, str):
        fields["model"] = name_within(base, name or "")
