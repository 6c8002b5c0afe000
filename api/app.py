"""The Quart-Trio application: routes, request ids, errors, CORS, the request log. What a route does is in `handlers`.

Each request's body is read to its end before anything is answered, refusals too: on a connection that is kept open
the next request starts where this one's body ends, and behind Hypercorn an answer before it leaves the next one
hanging.
"""

import time
from collections.abc import Awaitable, Callable, Generator
from contextlib import nullcontext
from typing import Any
from urllib.parse import urlsplit

import structlog
import trio
from hypercorn.typing import ASGISendCallable
from quart import Request as QuartRequest
from quart import Response, Websocket, g, has_websocket_context, request, websocket
from quart.typing import ResponseTypes
from quart_trio import QuartTrio
from quart_trio.asgi import TrioASGIHTTPConnection, TrioASGIWebsocketConnection
from quart_trio.wrappers.request import TrioRequest
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge, RequestTimeout

from api import answers, errors, live, pages, schemas
from api.answers import JSON, Answer
from api.errors import ApiError
from api.handlers import Gate, Request, failed, patiently
from api.http1 import BODY_S, DRAIN_MAX, body_timed_out, body_too_large, not_for_this_address
from api.routes import BASE_PATHS, ROUTES, Route
from api.settings import Settings
from engine.model import FaultCode

log = structlog.get_logger()

PREFLIGHT_S = 600  # for which a browser may remember what it was allowed

CORS_HEADERS = "Content-Type, Authorization, Idempotency-Key, X-Request-Id, X-User-Id, X-User-Name, Last-Event-ID"
CORS_METHODS = "GET, POST, PATCH, DELETE"


class DrainedBody:
    """A body of which at most the limit is kept, and of which the rest is read and forgotten, up to `DRAIN_MAX`.

    A class of its own, and not one made from Quart's: that one refuses a large body at once and leaves the rest
    unread, and its insides differ between the versions for Python 3.12 and 3.13. Quart calls all of its methods.
    """

    def __init__(self, expected_content_length: int | None, max_content_length: int | None) -> None:
        self._limit = max_content_length or 0
        self._data = bytearray()
        self._received = 0
        self._complete = trio.Event()
        self.is_cut = False

    def append(self, data: bytes) -> None:
        """More of it has come (Quart before 0.23)."""
        self._received += len(data)
        if self._received <= self._limit:
            self._data.extend(data)
            return
        self._data.clear()
        if self._received > self._limit + DRAIN_MAX:
            self.is_cut = True
            self.set_complete()

    async def put(self, data: bytes) -> None:
        """More of it has come (Quart from 0.23 on)."""
        self.append(data)

    def set_complete(self) -> None:
        self._complete.set()

    def disconnect(self) -> None:
        """Its sender is gone, and with it this request's task: nobody will ask for the rest."""

    def clear(self) -> None:
        self._data.clear()

    def __await__(self) -> Generator[Any, None, bytes]:
        """The whole body.

        Raises:
            RequestEntityTooLarge: it was larger than allowed; it was read all the same.
        """
        yield from self._complete.wait().__await__()
        if self._received > self._limit:
            raise RequestEntityTooLarge
        return bytes(self._data)


class DrainedRequest(TrioRequest):
    body_class = DrainedBody  # type: ignore[assignment]  # it stands in for Quart's, method by method


class AnsweredConnection(TrioASGIHTTPConnection):
    """One request whose answer is sent to its end, and what follows it done too.

    Hypercorn says "disconnected" from within the last send, and Quart-Trio takes that as the word to cancel that very
    send: then a connection that was to be closed after this answer stays open, and its client waits.
    """

    def _create_request_from_scope(self, send: ASGISendCallable) -> TrioRequest:
        self.scope["path"] = _path_of(self.scope["path"])
        made = super()._create_request_from_scope(send)
        assert isinstance(made, TrioRequest)
        made.host = "localhost"  # no route depends on it, and Quart fails on one that IDNA cannot encode: `Host: a..b`
        return made

    async def _send_response(self, send: ASGISendCallable, response: ResponseTypes) -> None:
        # Over HTTP/2 it may wait for the peer's window, for ever if that peer is gone.
        streaming = getattr(response, "streaming", None) or nullcontext
        has_end = streaming is nullcontext
        with trio.CancelScope(shield=has_end and self.scope["http_version"] != "2"):
            async with streaming():
                await super()._send_response(send, response)


class StrayWebsocket(TrioASGIWebsocketConnection):
    """A WebSocket where there is none. What is odd about its address must not keep it from being told so."""

    def _create_websocket_from_scope(self, send: ASGISendCallable) -> Websocket:
        self.scope["path"] = _path_of(self.scope["path"])
        made = super()._create_websocket_from_scope(send)
        made.host = "localhost"  # as above
        return made


def _path_of(target: str) -> str:
    """A path that Quart can read, where it would fail on what was sent: nothing (`GET ?x=1`), or `http://[`."""
    try:
        urlsplit(target)
    except ValueError:
        return f"/{target}"  # at which there is nothing
    return target or "/"


def create_app(settings: Settings, gate: Gate) -> QuartTrio:
    """The application; until `gate` has a service, everything that needs one is 503."""
    app = QuartTrio("holdfast", static_folder=None)
    app.request_class = DrainedRequest
    app.asgi_http_class = AnsweredConnection
    app.asgi_websocket_class = StrayWebsocket
    app.config["MAX_CONTENT_LENGTH"] = settings.body_max_bytes
    app.config["BODY_TIMEOUT"] = BODY_S
    app.config["RESPONSE_TIMEOUT"] = None  # who writes to the peer looks whether it reads; one that is slow may be
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False  # it would answer // with a redirect, in HTML
    for base in BASE_PATHS:
        for route in ROUTES:
            name = f"{base}{route.path} {route.method}"
            path = base + route.path.replace("{", "<").replace("}", ">")
            app.add_url_rule(path, name, _view(gate, route), methods=[route.method])
    for base in ("", *BASE_PATHS):
        app.add_url_rule(f"{base}/healthz", f"{base}/healthz", _healthz, methods=["GET"])
        app.add_url_rule(f"{base}/readyz", f"{base}/readyz", _readyz(gate), methods=["GET"])
    for path in live.PATHS:
        app.add_url_rule(path, path, _live, methods=["GET"])
    pages.register(app, settings)
    app.before_request(_begin)
    app.before_websocket(_begin_websocket)
    app.after_request(_finisher(settings))
    app.register_error_handler(Exception, _on_error)
    return app


# Routes -----------------------------------------------------------------------------------------------


def _view(gate: Gate, route: Route) -> Callable[..., Awaitable[Response]]:
    async def view(**path: str) -> Response:
        service = gate.enter()
        asked = Request(
            headers={name.lower(): value for name, value in request.headers.items()},
            query={name: values[-1] for name, values in request.args.lists()},
            path=path,
            body=await request.get_data(cache=True, as_text=False, parse_form_data=False),
            request_id=g.request_id,
        )
        handling = route.handler(service, asked)
        try:
            answer = await (patiently(service, asked, handling, route.late) if route.is_hot else handling)
        except Exception as failure:  # noqa: BLE001 - whatever it is, it belongs to the one who asked
            answer = failed(service, asked, failure)
        return _response(answer)

    return view


async def _healthz() -> Response:
    """The process lives; whether it can work is `/readyz`."""
    return _response(answers.success(200, {"status": "up"}, g.request_id))


async def _live() -> Response:
    """A viewer who asks for its socket does not come here (`api.sockets`)."""
    raise live.upgrade_required()


def _readyz(gate: Gate) -> Callable[[], Awaitable[Response]]:
    async def readyz() -> Response:
        service = gate.enter()
        if service.registry.is_faulty:
            raise errors.fault(FaultCode.UNAVAILABLE)
        await service.ping()
        return _response(answers.success(200, {"status": "ready"}, g.request_id))

    return readyz


# Around each request ----------------------------------------------------------------------------------


async def _begin() -> Response | None:
    g.started_at = time.perf_counter()
    g.request_id = schemas.request_id(_last(request, "X-Request-Id"))
    structlog.contextvars.bind_contextvars(request_id=g.request_id)
    await request.get_data()
    if request.scope["path"].startswith("//"):
        raise errors.not_found()  # the router would take it for one slash, and a proxy's rules for two
    if request.method == "OPTIONS":
        response = Response("", 204)
        # Without a body there is nothing to measure and to name (RFC 9110, 8.6).
        del response.headers["Content-Length"], response.headers["Content-Type"]
        return response
    return None


async def _begin_websocket() -> None:
    """Nobody here speaks it: the refusal that follows needs an id, as every answer does."""
    g.request_id = schemas.request_id(_last(websocket, "X-Request-Id"))


def _finisher(settings: Settings) -> Callable[[Response], Awaitable[Response]]:
    async def finish(response: Response) -> Response:
        response.headers["X-Request-Id"] = g.request_id
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers.setdefault("Cache-Control", "no-store")  # but what says otherwise itself: the page
        _allow_origin(settings, response)
        if isinstance(request.body, DrainedBody) and request.body.is_cut:
            response.headers["Connection"] = "close"
        log.info(
            "request",
            method=request.method,
            path=request.path,
            status=response.status_code,
            ms=round((time.perf_counter() - g.started_at) * 1000, 3),
        )
        return response

    return finish


def _allow_origin(settings: Settings, response: Response) -> None:
    origin = _last(request, "Origin")
    headers = response.headers
    headers.add("Vary", "Origin")
    allowed = answers.allowing(settings, origin)
    for name, value in allowed:
        headers[name] = value
    if allowed and request.method == "OPTIONS":
        headers["Access-Control-Allow-Methods"] = CORS_METHODS
        headers["Access-Control-Allow-Headers"] = CORS_HEADERS
        headers["Access-Control-Max-Age"] = str(PREFLIGHT_S)


def _last(asked: QuartRequest | Websocket, name: str) -> str | None:
    """The header's last value, as everywhere; Quart would say the first."""
    return next(reversed(asked.headers.getlist(name)), None)


async def _on_error(failure: Exception) -> Response:
    told = _from_http(failure) if isinstance(failure, HTTPException) else errors.explained(failure)
    return _response(answers.error(told, g.request_id))


def _from_http(failure: HTTPException) -> ApiError:
    """What the framework found wrong, in our words."""
    match failure.code:
        case 404:
            return errors.not_found()
        case 405 if has_websocket_context():
            return ApiError(400, "BAD_REQUEST", "No WebSocket is served at this address.")
        case 405:
            allowed = ", ".join(sorted(set(getattr(failure, "valid_methods", None) or ()) - {"OPTIONS"}))
            return not_for_this_address(request.method, allowed)
        case 413:
            return body_too_large()
        case 408 if isinstance(failure, RequestTimeout):
            return body_timed_out()
    return ApiError(400, "BAD_REQUEST", failure.description or "The request cannot be understood.")


def _response(answer: Answer) -> Response:
    response = Response(answer.body, answer.status_code, content_type=JSON)
    for name, value in answer.headers:
        response.headers[name] = value
    return response
