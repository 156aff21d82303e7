"""Api: the routes of one ingress replica as a bare ASGI application.

A framework would have nothing to do here, because `routes` parses bodies and makes every error an
answer. Its layers would cost every request a task's worth of calls, and every chunk of a stream two
more.
"""

from collections.abc import Callable, Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.ingress.api_route import ApiRoute
from deployments.ingress.base_paths import BasePaths, enter_base
from deployments.ingress.request_id import with_request_id, without_body

NoRoute = Callable[[Scope, Sequence[str]], ASGIApp]
Refuse = Callable[[Scope], ASGIApp | None]
CORS_METHODS = ("GET", "HEAD", "POST")


class Api:
    """Calls the first route that fits, with or without a slash at the end of the path.

    `no_route` answers if none does: it is given the methods that the path has, if it has any. Pages
    of `cors_origins` may read the answers; without origins no answer costs a call more.

    What `refuse` gives for a request answers it in place of any route. `sends_request_id`: answers
    have the request's id; Ray Serve adds it by itself.

    Ray Serve reads `routes` too: its log and its figures name requests by them.
    """

    def __init__(
        self,
        routes: Sequence[ApiRoute],
        no_route: NoRoute,
        cors_origins: Sequence[str] = (),
        refuse: Refuse | None = None,
        bases: BasePaths | None = None,
        sends_request_id: bool = True,
    ) -> None:
        self.routes = list(routes)
        self._answer = self._route if not cors_origins else _with_cors(self._route, cors_origins)
        self._refuse = refuse
        self._sends_request_id = sends_request_id
        self._no_route = no_route
        self._bases = bases or BasePaths(())
        # Nearly every request is for one of these. The others have parameters in their paths.
        self._exact = {
            (method, route.path): route
            for route in self.routes
            for method in route.methods or ()
            if not route.param_convertors
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            if self._sends_request_id:
                send = with_request_id(scope, send)
            if scope["method"] == "HEAD":
                send = without_body(send)
            await self._answer(scope, receive, send)
        elif scope["type"] == "lifespan":
            await _live(receive, send)
        else:
            await send({"type": "websocket.close", "code": 1000, "reason": ""})

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._find(scope)(scope, receive, send)

    def _find(self, scope: Scope) -> ASGIApp:
        refused = None if self._refuse is None else self._refuse(scope)
        if refused is not None:
            return refused
        route, methods = self._match(scope)
        if route is None and not methods:
            route, methods = self._match_below_base(scope)
        return self._no_route(scope, methods) if route is None else route.app

    def _match(self, scope: Scope) -> tuple[ApiRoute | None, list[str]]:
        """Find the route. Without one, return the methods that the path has."""
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        found = self._exact.get((scope["method"], path))
        if found is not None:
            return found, []
        if len(path) > 1 and path.endswith("/"):
            scope["path"] = scope["path"].removesuffix("/")
            return self._match(scope)
        methods: set[str] = set()
        for route in self.routes:
            match, parameters = route.matches(scope)
            if match is Match.FULL:
                scope.update(parameters)
                return route, []
            if match is Match.PARTIAL:
                methods.update(route.methods or ())
        return None, sorted(methods)

    def _match_below_base(self, scope: Scope) -> tuple[ApiRoute | None, list[str]]:
        """Find the route that a path has behind a base's id, if that is one of a tenant's."""
        split = self._bases.split(scope["path"].removeprefix(scope.get("root_path", "")))
        if split is None:
            return None, []
        path = scope["path"]
        enter_base(scope, *split)
        route, methods = self._match(scope)
        is_tenants = bool(methods) if route is None else route.needs_key
        if is_tenants:
            return route, methods
        scope["path"] = path
        return None, []


def _with_cors(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=CORS_METHODS,
        allow_headers=("*",),
        expose_headers=("*",),
    )


async def _live(receive: Receive, send: Send) -> None:
    """Confirm start and end: there is nothing to do for either."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
