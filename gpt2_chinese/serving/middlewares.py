"""What surrounds every handler: errors as JSON, counting, clients that are slow or gone, headers."""

from __future__ import annotations

import asyncio
import logging

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from gpt2_chinese.decoding.completion import EngineStopped
from gpt2_chinese.serving.connections import abort_after
from gpt2_chinese.serving.errors import INTERNAL_ERROR, ApiError, engine_stopped_error
from gpt2_chinese.serving.fast_path import RETRY_SECONDS
from gpt2_chinese.serving.responses import SECURITY_HEADERS, SERVER_NAME, error_response
from gpt2_chinese.serving.service import Service

LOGGER = logging.getLogger("server")
CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that disconnects before the response; it is counted only."""
LOADING_RETRY_SECONDS = "3"
"""The Retry-After while a model is loading or being started again, or the server is shutting down."""


def count_responses(service: Service) -> Middleware:
    """A middleware that sends the response to a client that may be slow or gone, and counts it by route and status."""

    @web.middleware
    async def send_and_count(request: web.Request, handler: Handler) -> web.StreamResponse:
        resource = request.match_info.route.resource
        route = resource.canonical if resource is not None else "other"
        try:
            response = await handler(request)
        except asyncio.CancelledError:
            service.response_counts[route, CLIENT_CLOSED_REQUEST] += 1
            raise
        service.response_counts[route, response.status] += 1
        if service.draining:
            response.force_close()
        try:
            with abort_after(service.limits.body_seconds, request, most=service.limits.request_seconds):
                await response.prepare(request)
                await response.write_eof()
        except ConnectionError:
            pass
        return response

    return send_and_count


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer every error in one form; what goes wrong inside the server is logged and not told."""
    try:
        return await handler(request)
    except ApiError as error:
        return _api_error_response(error)
    except EngineStopped:
        return _api_error_response(engine_stopped_error())
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return _http_error_response(error, request)
    except ConnectionError:
        raise asyncio.CancelledError from None  # the client has disconnected in the middle of a stream
    except Exception:
        LOGGER.exception("%s %s failed", request.method, request.path)
        return error_response(ApiError(500, "internal_error", INTERNAL_ERROR))


def _api_error_response(error: ApiError) -> web.Response:
    headers = {}
    if error.status == 429:
        headers["Retry-After"] = RETRY_SECONDS
    elif error.status == 503:
        headers["Retry-After"] = LOADING_RETRY_SECONDS
    elif error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    response = error_response(error, headers)
    if error.status in (401, 408, 413, 415):
        response.force_close()  # the rest of the body has not been read
    return response


def _http_error_response(error: web.HTTPException, request: web.Request) -> web.Response:
    """aiohttp's own errors: unknown paths and methods, mostly."""
    allowed = error.headers.get("Allow", "")
    messages = {
        404: f"there is nothing at {request.path}; POST /generate completes texts",
        405: f"{request.method} is not allowed at {request.path}, only {allowed}",
    }
    code = error.reason.lower().replace(" ", "_")
    message = messages.get(error.status, error.text or error.reason)
    return error_response(ApiError(error.status, code, message), {"Allow": allowed} if allowed else None)


async def set_headers(_: web.Request, response: web.StreamResponse) -> None:
    """A signal handler: what every response has, as OWASP recommends; and no versions.

    Caches are told that the CORS headers depend on the site that asks.
    """
    response.headers["Vary"] = "Origin"
    response.headers["Server"] = SERVER_NAME
    for name, value in SECURITY_HEADERS.items():
        response.headers.setdefault(name, value)


def check_host(service: Service) -> Middleware:
    """A middleware that answers 421 to a Host that is none of the server's names."""

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not service.answers_to(request.headers.get("Host", "")):
            message = "this server does not answer to the name in Host; --allowed_hosts allows further names"
            raise ApiError(421, "wrong_host", message)
        return await handler(request)

    return check


async def expect_continue(request: web.Request) -> web.StreamResponse | None:
    """Answer an Expect header, which aiohttp does before the middlewares."""
    if request.headers["Expect"].lower() != "100-continue":
        return error_response(ApiError(417, "expectation_failed", "Expect may only be 100-continue"))
    if request.method in ("GET", "HEAD"):
        return None
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    request.writer.output_size = 0  # so that the response counts as not begun
    return None
