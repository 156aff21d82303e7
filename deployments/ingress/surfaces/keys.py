"""The part of the admin API that makes, lists and ends keys in the adapter store."""

import time
from collections.abc import Callable
from typing import TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from adapter_store.errors import InvalidName
from deployments.ingress.admin import Admin
from deployments.ingress.api.keys import (
    KeyExpiry,
    KeyItem,
    KeyList,
    KeyRotation,
    MadeKey,
    NewKey,
    key_item,
    made_key,
)
from deployments.ingress.api.openai_fields import parse_request
from deployments.ingress.api_route import ApiRoute, RouteDoc, json_answer
from deployments.ingress.http_errors import ApiError, forbidden, invalid
from deployments.ingress.ingress import Ingress
from deployments.tenants.key_book import KeyBook, KeyEnded, KeyNotFound
from deployments.tenants.tenant import Publisher

KEYS = "/admin/v1/keys"
MAX_LISTED = 10_000
T = TypeVar("T")
_STATUSES = {
    401: "No key, or one that is not valid.",
    403: "The key is not for all tenants.",
    429: "Too many requests of this kind at a time.",
    503: "The adapter store cannot be used now.",
}
_ONE = {**_STATUSES, 404: "No key has this id.", 409: "The key has ended."}
_BAD = {400: "A field is wrong."}


def key_routes(ingress: Ingress) -> list[ApiRoute]:
    """Make the routes; none where the admin API is off, or the store holds no keys."""
    if ingress.admin is None or ingress.key_book is None:
        return []
    return _routes(ingress, ingress.admin, ingress.key_book)


def _routes(ingress: Ingress, admin: Admin, book: KeyBook) -> list[ApiRoute]:
    async def create(http_request: HttpRequest, publisher: Publisher) -> Response:
        _check_right(publisher)
        body = parse_request(NewKey, await ingress.raw_document(http_request))
        after_s, by = body.expires_in_s, publisher.author
        expires_s = None if after_s is None else time.time() + after_s
        made = await admin.run(
            _refused(lambda: book.create(body.tenant, body.name, body.scopes, expires_s, by))
        )
        return json_answer(made_key(*made, time.time()))

    async def list_(http_request: HttpRequest, publisher: Publisher) -> Response:
        _check_right(publisher)
        tenant = http_request.query_params.get("tenant")
        found = await admin.run(lambda: book.list(tenant))
        now_s = time.time()
        return json_answer(KeyList(keys=[key_item(key, now_s) for key in found[-MAX_LISTED:]]))

    async def rotate(http_request: HttpRequest, publisher: Publisher) -> Response:
        _check_right(publisher)
        key_id, by = http_request.path_params["key_id"], publisher.author
        body = parse_request(KeyRotation, await ingress.raw_document(http_request))
        made = await admin.run(_refused(lambda: book.rotate(key_id, body.overlap_s, by)))
        return json_answer(made_key(*made, time.time()))

    async def revoke(http_request: HttpRequest, publisher: Publisher) -> Response:
        _check_right(publisher)
        key_id, by = http_request.path_params["key_id"], publisher.author
        key = await admin.run(_refused(lambda: book.revoke(key_id, by)))
        return json_answer(key_item(key, time.time()))

    async def expire(http_request: HttpRequest, publisher: Publisher) -> Response:
        _check_right(publisher)
        key_id, by = http_request.path_params["key_id"], publisher.author
        after_s = parse_request(KeyExpiry, await ingress.raw_document(http_request)).expires_in_s
        expires_s = None if after_s is None else time.time() + after_s
        key = await admin.run(_refused(lambda: book.expire(key_id, expires_s, by)))
        return json_answer(key_item(key, time.time()))

    one = KEYS + "/{key_id}"
    return [
        ingress.admin_route("POST", KEYS, create, CREATE_DOC),
        ingress.admin_route("GET", KEYS, list_, LIST_DOC),
        ingress.admin_route("POST", f"{one}/rotate", rotate, ROTATE_DOC),
        ingress.admin_route("POST", f"{one}/revoke", revoke, REVOKE_DOC),
        ingress.admin_route("POST", f"{one}/expire", expire, EXPIRE_DOC),
    ]


CREATE_DOC = RouteDoc("Make a key.", NewKey, MadeKey, statuses=_STATUSES | _BAD)
LIST_DOC = RouteDoc(
    f"The latest {MAX_LISTED} keys, ended ones too, in the order in which they were made.",
    answer=KeyList,
    query={"tenant": "only its keys"},
    statuses=_STATUSES,
)
ROTATE_DOC = RouteDoc(
    "Make a key for the same, and have this one end a while later.",
    KeyRotation,
    MadeKey,
    statuses=_ONE | _BAD,
)
REVOKE_DOC = RouteDoc("End a key at once and for good.", answer=KeyItem, statuses=_ONE)
EXPIRE_DOC = RouteDoc("Set when a key ends.", KeyExpiry, KeyItem, statuses=_ONE | _BAD)


def _check_right(publisher: Publisher) -> None:
    if publisher.tenant is not None:
        raise forbidden("This key manages adapters of one tenant; keys need an admin key.")


def _refused(work: Callable[[], T]) -> Callable[[], T]:
    """Make answers of what is wrong with a request."""

    def translated() -> T:
        try:
            return work()
        except KeyNotFound as error:
            raise ApiError(404, f"{error}.", param="key_id", code="key_not_found") from None
        except KeyEnded as error:
            raise ApiError(409, f"{error}.", param="key_id", code="key_ended") from None
        except InvalidName:
            raise  # the admin API's own answer
        except ValueError as error:
            raise invalid(f"scopes: {error}.", "scopes") from None

    return translated
