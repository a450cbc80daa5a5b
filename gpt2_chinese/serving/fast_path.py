"""The fast path: while the queue is full, simple requests are refused before aiohttp parses them.

Overload is when the server has the least time for what it will not answer.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from typing import NamedTuple

from gpt2_chinese.serving.errors import ApiError
from gpt2_chinese.serving.responses import SECURITY_HEADERS
from gpt2_chinese.serving.service import Service

COMPLETION_PATHS = ("/generate", "/", "/v1/completions")


class SimplePost(NamedTuple):
    """What the head of a simple POST request says; `host` is the value of its Host."""

    path: str
    host: str


FastPath = Callable[[SimplePost], bytes | None]
"""Gives the whole response to a simple POST request, or None to leave it to the application."""
RETRY_SECONDS = "1"
"""The Retry-After of a 429."""
MAX_HEAD_BYTES = 4096


def refuse_overload(service: Service, request: SimplePost) -> bytes | None:
    """The 429 that the handlers would answer, if the queue is full."""
    # With keys, only a client with a key is told that the queue is full; one that has the wrong name is told that.
    path = request.path
    if path not in COMPLETION_PATHS or service.keys or not service.answers_to(request.host):
        return None
    error = service.admission_error()
    if error is None or error.status != 429:
        return None
    service.response_counts[path, 429] += 1
    return _overload_response(int(time.time()), error.code, error.message)


@lru_cache(maxsize=64)
def _overload_response(_: int, code: str, message: str) -> bytes:
    """Cached for a second, because of its Date."""
    body = ApiError(429, code, message).body()
    return fast_response(429, body, {"Retry-After": RETRY_SECONDS, "Vary": "Origin"})


# The head of a POST with a body whose length it gives.
_SIMPLE_HEAD = re.compile(
    rb"POST ([!-~]+) HTTP/1\.1\r\n((?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*\r\n)+)\r\n"
)
_HOST = re.compile(rb"^Host:[ \t]*([^\r\n]*?)[ \t]*\r$", re.IGNORECASE | re.MULTILINE)
_LENGTH = re.compile(rb"^Content-Length:[ \t]*(\d{1,9})\r$", re.IGNORECASE | re.MULTILINE)
# Headers that need aiohttp: for the body, for CORS, or for the connection.
_NEEDS_AIOHTTP = re.compile(
    rb"^(?:Transfer-Encoding|Expect|Origin|Upgrade|Connection:(?![ \t]*keep-alive\r$))", re.IGNORECASE | re.MULTILINE
)


def simple_post(data: bytes) -> SimplePost | None:
    """What is asked for, if these bytes are exactly one POST request that needs nothing of aiohttp; else None."""
    end = data.find(b"\r\n\r\n", 0, MAX_HEAD_BYTES) + 4
    request, length = _simple_head(data[:end]) if end >= 4 else (None, 0)
    return request if len(data) - end == length else None


@lru_cache(maxsize=256)  # clients send the same head again and again
def _simple_head(head: bytes) -> tuple[SimplePost | None, int]:
    """A request and the length of its body; no request if it is not a simple one."""
    found = _SIMPLE_HEAD.fullmatch(head)
    lengths, hosts = (_LENGTH.findall(found[2]), _HOST.findall(found[2])) if found else ([], [])
    if found is None or len(lengths) != 1 or len(hosts) != 1 or _NEEDS_AIOHTTP.search(found[2]):
        return None, 0
    return SimplePost(found[1].decode("latin-1"), hosts[0].decode("latin-1")), int(lengths[0])


def fast_response(status: int, body: bytes, headers: Mapping[str, str]) -> bytes:
    """A whole HTTP response with a JSON body, on a connection that stays open."""
    lines = {"Content-Type": "application/json; charset=utf-8", "Content-Length": str(len(body)), **headers}
    lines |= SECURITY_HEADERS
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    date = formatdate(time.time(), usegmt=True)
    return f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nDate: {date}\r\n{head}\r\n".encode("ascii") + body
