"""API keys: where they are set, and the middleware that asks for one."""

from __future__ import annotations

import argparse
import hmac
import os
from collections.abc import Sequence
from pathlib import Path

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from gpt2_chinese.serving.errors import ApiError

KEY_VARIABLE = "GPT2_CHINESE_API_KEY"
"""The environment variable that may hold a key."""
PUBLIC_PATHS = [("GET", "/"), ("GET", "/health")]
"""What needs no API key."""


def read_keys(args: argparse.Namespace) -> tuple[bytes, ...]:
    """The API keys of --api_key, --api_key_file and the environment, as clients send them; none is no protection.

    Raises:
        ValueError: a key is empty or has other than printable ASCII characters, or the file has no key.
    """
    keys = {"--api_key": list(args.api_key or ())}
    if args.api_key_file:
        lines = Path(args.api_key_file).read_text(encoding="utf-8").splitlines()
        keys["--api_key_file"] = [line.strip() for line in lines if line.strip()]
        if not keys["--api_key_file"]:
            raise ValueError(f"--api_key_file {args.api_key_file} has no key; write one key per line")
    if KEY_VARIABLE in os.environ:
        keys[KEY_VARIABLE] = [os.environ[KEY_VARIABLE]]
    for source, values in keys.items():
        if not all(key and key.isascii() and key.isprintable() and " " not in key for key in values):
            raise ValueError(f"{source}: a key must be printable ASCII without spaces, and not empty")
    return tuple(dict.fromkeys(key.encode("ascii") for values in keys.values() for key in values))


def require_key(keys: Sequence[bytes]) -> Middleware:
    """A middleware that answers 401 without one of the keys; without keys it lets everything through."""

    @web.middleware
    async def check_key(request: web.Request, handler: Handler) -> web.StreamResponse:
        # A browser's preflight request (OPTIONS) carries no key.
        if keys and request.method != "OPTIONS" and (request.method, request.path) not in PUBLIC_PATHS:
            scheme, _, credentials = request.headers.get("Authorization", "").partition(" ")
            sent = credentials.strip().encode("utf-8", errors="replace") if scheme.lower() == "bearer" else b""
            # Every key is compared, in constant time: the time of an answer says nothing about the keys.
            if not sum([hmac.compare_digest(sent, key) for key in keys]):
                problem = "the API key is wrong" if sent else "an API key is required: Authorization: Bearer KEY"
                raise ApiError(401, "invalid_api_key", problem)
        return await handler(request)

    return check_key
