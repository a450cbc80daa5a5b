"""JSON responses."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from gpt2_chinese.serving.errors import ApiError


def json_response(value: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """A response with Chinese as itself, not as escapes."""
    return _response(json.dumps(value, ensure_ascii=False).encode("utf-8"), status, headers)


SERVER_NAME = "gpt2-chinese"
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}
"""What OWASP recommends for every response of an API."""
PIECE_ITEMS = 256
"""Items of an array that are turned into JSON at a time: no other thread runs meanwhile."""


@dataclass(frozen=True)
class EncodedItems:
    """One or more items of an array as JSON, without brackets, for `json_pieces`; several answers can share them."""

    json: str

    @classmethod
    def of(cls, items: list[Any]) -> EncodedItems:
        return cls("".join(json_pieces(items))[1:-1])


def json_pieces(value: Any) -> Iterator[str]:
    """JSON in pieces that are made in a millisecond or two each; together they are what json.dumps gives."""
    if isinstance(value, dict) and any(isinstance(part, (dict, list)) for part in value.values()):
        sign = "{"
        for name, part in value.items():
            yield f"{sign}{json.dumps(name, ensure_ascii=False)}: "
            yield from json_pieces(part)
            sign = ", "
        yield "}"
    elif isinstance(value, list) and value:
        sign = "["
        for begin in range(0, len(value), PIECE_ITEMS):
            items = value[begin : begin + PIECE_ITEMS]
            if _are_small(items):
                yield sign + json.dumps(items, ensure_ascii=False)[1:-1]
                sign = ", "
            else:
                for item in items:
                    yield sign
                    yield from json_pieces(item)
                    sign = ", "
        yield "]"
    elif isinstance(value, EncodedItems):
        yield value.json
    else:
        yield json.dumps(value, ensure_ascii=False)


def _are_small(items: list[Any]) -> bool:
    kinds = set(map(type, items))
    if kinds <= {int, float}:
        return True
    if kinds == {str}:  # without a call of a function of Python for each of a hundred thousand tokens
        return max(map(len, items)) <= PIECE_ITEMS
    return all(map(_is_small, items))


def _is_small(item: Any) -> bool:
    """Whether it is a number, a short text, or an object of them, which json.dumps turns into JSON."""
    if isinstance(item, dict):
        return not any(isinstance(part, (dict, list)) for part in item.values())
    return not isinstance(item, (list, EncodedItems)) and not (isinstance(item, str) and len(item) > PIECE_ITEMS)


def encoded_response(body: bytes, *, headers: Mapping[str, str] | None = None) -> web.Response:
    """A response of JSON that is encoded already."""
    return _response(body, 200, headers)


def error_response(error: ApiError, headers: Mapping[str, str] | None = None) -> web.Response:
    return _response(error.body(), error.status, headers)


def _response(body: bytes, status: int, headers: Mapping[str, str] | None) -> web.Response:
    return web.Response(body=body, status=status, headers=headers, content_type="application/json", charset="utf-8")
