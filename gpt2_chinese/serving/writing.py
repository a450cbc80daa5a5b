"""Answers of any size: no other client waits while a large one is turned into JSON or written."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from aiohttp import web

from gpt2_chinese.serving.api import Limits
from gpt2_chinese.serving.connections import abort_after
from gpt2_chinese.serving.responses import encoded_response, json_pieces
from gpt2_chinese.serving.service import Service

Result = TypeVar("Result")
MAX_INLINE_ANSWER = 1 << 16
"""Bytes of an answer that is turned into JSON in the event loop; another thread does it with larger ones."""
WRITE_BYTES = 1 << 16
"""Bytes that are written at a time: the next ones when the system has taken them."""


async def send_json(
    request: web.Request,
    service: Service,
    size: int,
    value: Callable[[], Any],
    headers: Mapping[str, str] | None = None,
) -> web.StreamResponse:
    """Answer with the JSON of `value()`, which has `size` bytes at most.

    A large answer has been written when this returns, so that it counts in `Service.pending_bytes` until then.
    """
    if size <= MAX_INLINE_ANSWER:
        return encoded_response(json.dumps(value(), ensure_ascii=False).encode("utf-8"), headers=headers)
    body = await encode_apart(service, size, lambda: "".join(json_pieces(value())).encode("utf-8"))
    response = web.StreamResponse(headers=headers)
    response.content_type, response.charset, response.content_length = "application/json", "utf-8", len(body)
    if service.draining:
        response.force_close()
    await response.prepare(request)
    await write_in_pieces(request, response, body, service.limits)
    return response


async def encode_apart(service: Service, size: int, encode: Callable[[], Result]) -> Result:
    """Call a function that makes a part of an answer of `size` bytes at most, in a thread if they are many."""
    if size <= MAX_INLINE_ANSWER:
        return encode()
    return await asyncio.get_running_loop().run_in_executor(service.encoder_thread, encode)


async def write_in_pieces(request: web.Request, response: web.StreamResponse, data: bytes, limits: Limits) -> None:
    """Write to a client that may be slow or gone; other coroutines run between the pieces.

    Raises:
        ConnectionError: the client has disconnected, or has not read in time.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + limits.request_seconds
    for begin in range(0, len(data), WRITE_BYTES):
        if begin:
            await asyncio.sleep(0)
        with abort_after(limits.body_seconds, request, most=max(deadline - loop.time(), 0.001)):
            await response.write(data[begin : begin + WRITE_BYTES])
