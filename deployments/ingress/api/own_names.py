"""Write errors in a surface's own names.

A surface's request becomes a chat, whose rules then hold. What they refuse is named as in chats,
until it is renamed here.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from deployments.ingress.http_errors import ApiError


@contextmanager
def own_names(names: Callable[[], Mapping[str, str]]) -> Generator[None]:
    """Rename the fields that errors name. `names` maps a chat's paths to the surface's."""
    try:
        yield
    except ApiError as error:
        raise renamed(error, names()) from None


def renamed(error: ApiError, names: Mapping[str, str]) -> ApiError:
    param = error.param
    if param is None:
        return error
    fitting = [path for path in names if _begins_with(param, path)]
    if not fitting:
        return error
    path = max(fitting, key=len)
    name = names[path] + param[len(path) :]
    return replace(error, message=error.message.replace(param, name), param=name)


def _begins_with(param: str, path: str) -> bool:
    return param.startswith(path) and param[len(path) : len(path) + 1] in ("", ".", "[")
