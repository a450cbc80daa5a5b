"""Requests that are damaged byte by byte, on raw sockets: refused or answered, never a 5xx, never a line in the log."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import re

import pytest
from served import GOOD, Client, check_good, served

EXAMPLES = int(os.environ.get("GPT2_CHINESE_EXAMPLES", "500"))
AT_ONCE = 50
BODY = json.dumps(GOOD | {"maxlength": 2}).encode()
CHUNKS = b"%x\r\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n"


@pytest.fixture(scope="module", autouse=True)
def server(script):
    return script("server")


def request(line: bytes, *headers: bytes, body: bytes = b"") -> bytes:
    return b"\r\n".join([line, b"Host: localhost", *headers, b"", body])


REQUESTS = [
    request(b"POST /generate HTTP/1.1", b"Content-Length: %d" % len(BODY), body=BODY),
    request(b"POST /generate HTTP/1.1", b"Transfer-Encoding: chunked", body=CHUNKS),
    request(b"POST /v1/completions HTTP/1.1", b"Content-Type: application/json", b"Content-Length: 2", body=b"{}"),
    request(b"POST /tokenize HTTP/1.0", b"Content-Length: 17", body=b'{"prompt": "\\u4e"}'),
    request(b"GET /health HTTP/1.1", b"Accept-Encoding: gzip"),
    request(b"GET /metrics HTTP/1.1", b"Range: bytes=0-10"),
    request(b"OPTIONS /generate HTTP/1.1", b"Origin: http://a", b"Access-Control-Request-Method: POST"),
    request(b"GET / HTTP/1.1") + request(b"HEAD /openapi.json HTTP/1.1", b"Connection: close"),
]
STRANGE = [
    b"\0", b"\r", b"\n", b"\r\n", b"\r\n\r\n", b" ", b"\t", b":", b"\xff", b"\xe4\xb8", b"%00", b"%", b"/../", b"?",
    b"#", b"HTTP/1.1", b"HTTP/9.9", b"-1", b"0x10", b"9" * 30, b"9" * 5000, b"a" * 9000, b"Host: other\r\n",
    b"Content-Length: 3\r\n", b"Transfer-Encoding: gzip, chunked\r\n", b"Expect: 100-continue\r\n",
    b"Content-Encoding: gzip\r\n", b"Upgrade: websocket\r\nConnection: Upgrade\r\n", b" folded\r\n",
]  # fmt: skip


def damaged(source: random.Random) -> bytes:
    """A good request, or several, with one to four faults: bytes that are other, gone, doubled or strange."""
    data = bytearray(b"".join(source.choices(REQUESTS, k=source.choice([1, 1, 1, 2, 3]))))
    for _ in range(source.choice([1, 1, 1, 2, 4])):
        place = source.randrange(len(data) + 1)
        length = source.choice([1, 1, 2, 8, 60])
        kind = source.randrange(6)
        if kind == 0:
            data[place : place + 1] = bytes([source.randrange(256)])
        elif kind == 1:
            del data[place : place + length]
        elif kind == 2:
            data[place:place] = data[place : place + length] * source.choice([1, 3])
        elif kind == 3:
            data[place:place] = source.choice(STRANGE)
        elif kind == 4:
            data[place:place] = source.randbytes(length)
        else:
            other = source.choice(REQUESTS)
            data[place:] = other[min(place, len(other)) :]
    return bytes(data)


async def send(client: Client, data: bytes, pieces: int) -> bytes:
    """Send bytes in so many pieces and give what comes back until nothing has come for a moment."""
    reader, writer = await asyncio.open_connection(client.host, client.port)
    answer = b""
    try:
        step = len(data) // pieces + 1
        for begin in range(0, len(data), step):
            writer.write(data[begin : begin + step])
            await writer.drain()
            await asyncio.sleep(0)
        while part := await asyncio.wait_for(reader.read(65536), 0.1 if answer else 1):
            answer += part
    except (asyncio.TimeoutError, ConnectionError):
        pass
    finally:
        writer.transport.abort()
    return answer


def statuses(answer: bytes) -> list[int]:
    """Of the answers on a connection."""
    return [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3}) ", answer)]


def test_damaged_requests_on_raw_sockets_are_refused_or_answered(caplog):
    caplog.set_level(logging.WARNING)
    seen: dict[int, int] = {}

    async def test(client: Client) -> None:
        for first in range(0, EXAMPLES, AT_ONCE):
            sources = [random.Random(seed) for seed in range(first, min(first + AT_ONCE, EXAMPLES))]
            requests = [damaged(source) for source in sources]
            answers = await asyncio.gather(
                *(send(client, data, one.choice([1, 1, 2, 7])) for data, one in zip(requests, sources, strict=True))
            )
            for seed, data, answer in zip(range(first, EXAMPLES), requests, answers, strict=False):
                for status in statuses(answer):
                    assert status < 500, (seed, data, answer)
                    seen[status] = seen.get(status, 0) + 1
                assert b"Traceback" not in answer, (seed, data, answer)
        await check_good(client)

    served(test)
    assert not caplog.records
    assert seen[400] > EXAMPLES / 10 and seen[200] > EXAMPLES / 10, seen  # both kinds are tried, in numbers
    print(f"{EXAMPLES:,} damaged requests; answers by status: {dict(sorted(seen.items()))}")
