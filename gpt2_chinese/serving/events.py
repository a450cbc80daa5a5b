"""Server-sent events: a running request streamed to its client, and the events of /generate."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from aiohttp import web

from gpt2_chinese.decoding.completion import MISSING, Completion, EngineStopped, TextDelta
from gpt2_chinese.serving.errors import ApiError, engine_stopped_error
from gpt2_chinese.serving.responses import json_pieces
from gpt2_chinese.serving.running_request import RunningRequest, count_tokens
from gpt2_chinese.serving.service import Service
from gpt2_chinese.serving.writing import encode_apart, write_in_pieces

SSE_KEEPALIVE_SECONDS = 10.0
"""A stream that has sent nothing for so long sends a comment, so that no proxy closes it."""
KEEPALIVE_COMMENT = b": waiting\n\n"


class EventFormat(Protocol):
    """How a route writes its stream."""

    def delta(self, prompt_index: int, delta: TextDelta) -> bytes:
        """The event of a delta; empty if it needs none."""

    def end(self, completions: Sequence[Sequence[Completion]]) -> bytes:
        """The last event, with all completions by prompt and sample."""


def format_event(value: Any, name: str | None = None, *, in_pieces: bool = False) -> bytes:
    """A server-sent event with JSON data, which is made with `json_pieces` if it may be long."""
    head = f"event: {name}\n" if name else ""
    data = "".join(json_pieces(value)) if in_pieces else json.dumps(value, ensure_ascii=False)
    return f"{head}data: {data}\n\n".encode()


async def stream_sse(
    request: web.Request,
    service: Service,
    running: RunningRequest,
    events: EventFormat,
    headers: Mapping[str, str],
) -> web.StreamResponse:
    """Send each delta as it comes, then the end; an error after the response has begun is an event too.

    Stop strings are not handled here: decoding/completion.py (IncrementalDetokenizer) has cut the deltas already.
    """
    headers = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-store", **headers}
    response = web.StreamResponse(headers=headers)

    async def write(data: bytes) -> None:
        await write_in_pieces(request, response, data, running.limits)

    await response.prepare(request)
    try:
        while (deltas := await running.next_deltas(SSE_KEEPALIVE_SECONDS)) is not None:
            data = await encode_apart(service, running.answer_bytes, partial(_join_deltas, events, deltas))
            await write(data if deltas else KEEPALIVE_COMMENT)
        await write(events.end(running.finished_completions()))
    except ApiError as error:
        await write(_error_event(error))
    except EngineStopped:
        await write(_error_event(engine_stopped_error()))
    await response.write_eof()
    return response


def _join_deltas(events: EventFormat, deltas: Sequence[tuple[int, TextDelta]]) -> bytes:
    return b"".join([events.delta(index, delta) for index, delta in deltas])


def _error_event(error: ApiError) -> bytes:
    return b"event: error\ndata: " + error.body() + b"\n\n"


class GenerateEvents:
    """The stream of /generate: `text` and `end` events by sample, then `done`."""

    def __init__(self, running: RunningRequest) -> None:
        self._running = running
        self._arrived = running.arrived
        self._scores: dict[int, float] = {}

    def delta(self, _: int, delta: TextDelta) -> bytes:
        text = format_event({"sample": delta.sample, "text": delta.text}, "text") if delta.text else b""
        if delta.finish_reason is None:
            return text
        end: dict[str, Any] = {"sample": delta.sample, "finish_reason": delta.finish_reason}
        if delta.score is not None and delta.finish_reason != MISSING:
            self._scores[delta.sample] = delta.score
            end["score"] = round(delta.score, 4)
        return text + format_event(end, "end")

    def end(self, completions: Sequence[Sequence[Completion]]) -> bytes:
        seconds = round(time.monotonic() - self._arrived, 3)
        done: dict[str, Any] = {"tokens": count_tokens(completions), "seconds": seconds}
        if self._running.completion_request.sort_likely:
            done["order"] = sorted(self._scores, key=lambda sample: -self._scores[sample])
        if missing := self._running.num_missing:
            done["missing"] = missing
        return format_event(done, "done")
