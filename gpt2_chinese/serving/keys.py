"""API keys: where they are set, and the middleware that asks for one."""

from __future__ import annotations

import argparse
import hmac
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from gpt2_chinese.serving.errors import ApiError

KEY_VARIABLE = "GPT2_CHINESE_API_KEY"
"""The environment variable that may hold a key, or several in lines."""
ADMIN_KEY_VARIABLE = "GPT2_CHINESE_ADMIN_KEY"
KEY_FLAGS = {"--api_key": KEY_VARIABLE, "--admin_key": ADMIN_KEY_VARIABLE}
ADMIN_PATH = "/admin/"
PUBLIC_PATHS = [("GET", "/"), ("HEAD", "/"), ("GET", "/health"), ("HEAD", "/health")]
"""What needs no API key."""


def read_keys(args: argparse.Namespace) -> tuple[bytes, ...]:
    """The API keys of --api_key, --api_key_file and the environment, as clients send them; none is no protection.

    Raises:
        ValueError: a key is empty or has other than printable ASCII characters, or the file has no key.
    """
    return _read_keys(args.api_key, "--api_key", args.api_key_file, KEY_VARIABLE)


def read_admin_keys(args: argparse.Namespace) -> tuple[bytes, ...]:
    """The keys of --admin_key, --admin_key_file and the environment; none means that nobody may use /admin/."""
    return _read_keys(args.admin_key, "--admin_key", args.admin_key_file, ADMIN_KEY_VARIABLE)


def _read_keys(given: Sequence[str] | None, flag: str, path: str | None, variable: str) -> tuple[bytes, ...]:
    keys = {flag: list(given or ())}
    if path:
        try:
            lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{flag}_file {path} is not UTF-8 at byte {error.start}; a key is printable ASCII"
            ) from None
        keys[f"{flag}_file"] = [line.strip() for line in lines if line.strip()]
        if not keys[f"{flag}_file"]:
            raise ValueError(f"{flag}_file {path} has no key; write one key per line")
    if variable in os.environ:
        keys[variable] = os.environ[variable].split("\n")
    for source, values in keys.items():
        if not all(key and key.isascii() and key.isprintable() and " " not in key for key in values):
            raise ValueError(f"{source}: a key must be printable ASCII without spaces, and not empty")
    return tuple(dict.fromkeys(key.encode("ascii") for values in keys.values() for key in values))


def hide_keys(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """A command line without its keys, which everyone on the machine can read there, and the environment for them."""
    hidden: dict[str, list[str]] = {}
    rest = []
    words = iter(argv)
    for word in words:
        flag, sign, value = word.partition("=")
        if flag in KEY_FLAGS:
            hidden.setdefault(KEY_FLAGS[flag], []).append(value if sign else next(words, ""))
        else:
            rest.append(word)
    for variable, keys in hidden.items():
        if variable in os.environ:
            keys.append(os.environ[variable])
    return rest, {variable: "\n".join(keys) for variable, keys in hidden.items()}


def restart_without_keys() -> None:
    """Start this program anew, with the keys of its command line in the environment; at once, before it does anything.

    The environment of a process can be read by its user and root alone.
    """
    command, keys = hide_keys(sys.orig_argv)
    if keys and sys.platform != "win32" and all(key for value in keys.values() for key in value.split("\n")):
        os.execve(sys.executable, command, {**os.environ, **keys})


def require_key(keys: Sequence[bytes], admin_keys: Sequence[bytes] = ()) -> Middleware:
    """A middleware that answers 401 without one of the keys; without keys it lets everything through but /admin/."""
    api_keys = keys

    @web.middleware
    async def check_key(request: web.Request, handler: Handler) -> web.StreamResponse:
        keys = admin_keys if request.path.startswith(ADMIN_PATH) else api_keys
        # A browser's preflight request (OPTIONS) carries no key.
        if keys and request.method != "OPTIONS" and (request.method, request.path) not in PUBLIC_PATHS:
            scheme, _, credentials = request.headers.get("Authorization", "").partition(" ")
            sent = credentials.strip().encode("utf-8", errors="surrogateescape") if scheme.lower() == "bearer" else b""
            # Every key is compared, in constant time: the time of an answer says nothing about the keys.
            if not sum([hmac.compare_digest(sent, key) for key in keys]):
                problem = "the API key is wrong" if sent else "an API key is required: Authorization: Bearer KEY"
                raise ApiError(401, "invalid_api_key", problem)
        return await handler(request)

    return check_key
