"""JSON responses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from gpt2_chinese.serving.errors import ApiError


def json_response(value: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """A response with Chinese as itself, not as escapes."""
    return _response(json.dumps(value, ensure_ascii=False).encode("utf-8"), status, headers)


def error_response(error: ApiError, headers: Mapping[str, str] | None = None) -> web.Response:
    return _response(error.body(), error.status, headers)


def _response(body: bytes, status: int, headers: Mapping[str, str] | None) -> web.Response:
    return web.Response(body=body, status=status, headers=headers, content_type="application/json", charset="utf-8")
