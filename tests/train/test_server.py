"""server.py over real sockets with a tiny model: answers, every kind of bad request, and life and death."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from aiohttp.test_utils import TestClient, TestServer
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tiny_model import endless_model, save_tiny_model, tiny_model, tiny_tokenizer

from gpt2_chinese.engine import Engine, Settings

ROOT = Path(__file__).resolve().parents[2]
GOOD = {"context": "一丁", "maxlength": 6, "samples": 2, "seed": 1}


@pytest.fixture(scope="module")
def server(script):
    return script("server")


def served(server, test, *, engine=None, **limits):
    """Run `test(client)` against a server of its own."""

    async def run():
        app = server.build_app(engine or Engine(tiny_model(), tiny_tokenizer(), rows=8), server.Limits(**limits))
        async with TestClient(TestServer(app)) as client:
            return await test(client)

    return asyncio.run(run())


async def wait_until(condition, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.001)


async def check_good(client) -> list[str]:
    async with client.post("/generate", json=GOOD) as response:
        assert response.status == 200
        texts = await response.json()
    assert len(texts) == 2 and all(text.startswith("一丁") for text in texts)
    return texts


async def check_error(response, status: int, code: str, param: str | None = None) -> dict:
    body = await response.text()
    assert response.status == status, body
    assert response.content_type == "application/json"
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param), error
    assert error["message"] and "Traceback" not in body
    return error


# Answers.


def test_the_answer_is_an_array_of_strings_in_utf8_that_begin_with_the_context(server):
    async def test(client):
        for path in ("/generate", "/"):
            for context in ("一丁", "", "Hello ", "\x00😀\n"):
                async with client.post(path, json={"context": context}) as response:
                    assert response.status == 200
                    assert response.headers["Content-Type"] == "application/json; charset=utf-8"
                    body = await response.read()
                texts = json.loads(body.decode("utf-8"))
                assert len(texts) == 5 and all(text.startswith(context) for text in texts)
                assert b"\\u4e" not in body

    served(server, test)


def test_a_seed_repeats_and_the_settings_reach_the_engine(server):
    engine = Engine(tiny_model(), tiny_tokenizer(), rows=8)

    async def test(client):
        assert await check_good(client) == await check_good(client)
        wish = GOOD | {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "repetition_penalty": 1.5}
        async with client.post("/generate", json=wish) as response:
            texts = await response.json()
        settings = Settings(temperature=0.5, top_k=3, top_p=0.9, repetition_penalty=1.5)
        expected = await asyncio.to_thread(engine.complete, "一丁", samples=2, length=6, settings=settings, seed=1)
        assert texts == expected

    served(server, test, engine=engine)


def test_null_is_not_given_and_a_bom_and_any_content_type_are_taken(server):
    async def test(client):
        for data in (json.dumps(GOOD).encode("utf-8-sig"), json.dumps(GOOD | {"top_k": None}).encode()):
            for kind in ("application/json", "application/x-www-form-urlencoded", "text/plain; charset=gbk"):
                async with client.post("/generate", data=data, headers={"Content-Type": kind}) as response:
                    assert response.status == 200

    served(server, test)


def test_many_clients_get_what_they_would_get_alone(server):
    async def ask(client, seed):
        wish = {"context": "一" * (seed % 7), "seed": seed, "samples": 1 + seed % 5, "maxlength": 3 + seed % 20}
        async with client.post("/generate", json=wish) as response:
            return await response.json()

    async def test(client):
        alone = [await ask(client, seed) for seed in range(40)]
        assert await asyncio.gather(*(ask(client, seed) for seed in range(40))) == alone

    served(server, test)


def test_a_context_that_does_not_fit_is_said_in_a_header(server):
    async def test(client):
        async with client.post("/generate", json=GOOD | {"context": "一" * 100}) as response:
            assert response.headers["X-Context-Cut"] == "75"
            assert all(text.startswith("一" * 100) for text in await response.json())
        async with client.post("/generate", json=GOOD) as response:
            assert "X-Context-Cut" not in response.headers

    served(server, test)


def test_the_page_and_health(server):
    async def test(client):
        async with client.get("/") as response:
            assert response.status == 200 and response.content_type == "text/html"
            assert "续写" in await response.text()
        async with client.get("/health") as response:
            assert response.status == 200
            assert await response.json() == {"status": "ready", "running": 0, "waiting": 0, "n_ctx": 32}

    served(server, test)


def test_cors_admits_every_site_without_credentials(server):
    origin = {"Origin": "https://example.org"}

    async def test(client):
        asked = origin | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
        async with client.options("/generate", headers=asked) as response:
            assert response.status == 200
            assert response.headers["Access-Control-Allow-Methods"] == "POST"
            assert response.headers["Access-Control-Allow-Headers"].lower() == "content-type"
            assert "Access-Control-Allow-Credentials" not in response.headers
        for body, status in ((json.dumps(GOOD), 200), ("[", 400)):
            async with client.post("/generate", data=body, headers=origin) as response:
                assert response.status == status
                assert response.headers["Access-Control-Allow-Origin"] == "https://example.org"
                assert response.headers["Vary"] == "Origin"
                assert "Access-Control-Allow-Credentials" not in response.headers

    served(server, test)


# Bad requests.

CONTEXT = '"context": "一丁"'
BAD_BODIES = [
    # not JSON
    ("", "empty_body", None),
    (" \n", "empty_body", None),
    ("{", "invalid_json", None),
    ("hello", "invalid_json", None),
    ("context=一丁&samples=5", "invalid_json", None),
    ("{'context': '一丁'}", "invalid_json", None),
    (f"{{{CONTEXT},}}", "invalid_json", None),
    (f"{{{CONTEXT}}} x", "invalid_json", None),
    ('{"context": "一\n丁"}', "invalid_json", None),
    ('{"context": "\\x"}', "invalid_json", None),
    ("[" * 30_000, "invalid_json", None),
    ('{"context":' * 5_000, "invalid_json", None),
    (f'{{{CONTEXT}, "seed": {"9" * 5000}}}', "invalid_json", None),
    (f'{{{CONTEXT}, "temperature": NaN}}', "invalid_json", None),
    (f'{{{CONTEXT}, "temperature": -Infinity}}', "invalid_json", None),
    # not UTF-8
    (json.dumps(GOOD, ensure_ascii=False).encode("gbk"), "not_utf8", None),
    (json.dumps(GOOD).encode("utf-16"), "not_utf8", None),
    (b"\xff\xfe", "not_utf8", None),
    (gzip.compress(json.dumps(GOOD).encode()), "not_utf8", None),
    # not an object
    ("[]", "not_an_object", None),
    ("null", "not_an_object", None),
    ('"一丁"', "not_an_object", None),
    ("5", "not_an_object", None),
    ("1.5", "not_an_object", None),
    ("true", "not_an_object", None),
    # context
    ("{}", "missing_field", "context"),
    ('{"samples": 5}', "missing_field", "context"),
    ('{"context": null}', "missing_field", "context"),
    ('{"context": 5}', "wrong_type", "context"),
    ('{"context": true}', "wrong_type", "context"),
    ('{"context": ["一丁"]}', "wrong_type", "context"),
    ('{"context": {}}', "wrong_type", "context"),
    ('{"context": "\\ud800"}', "invalid_character", "context"),
    ('{"context": "一\\udc00丁"}', "invalid_character", "context"),
    # names
    ('{"context": "一", "context": "丁"}', "duplicate_field", "context"),
    (f'{{{CONTEXT}, "length": 5}}', "unknown_field", "length"),
    (f'{{{CONTEXT}, "Samples": 5}}', "unknown_field", "Samples"),
    (f'{{{CONTEXT}, "": 5}}', "unknown_field", ""),
    (f'{{{CONTEXT}, "\\ud800": 5}}', "unknown_field", "?"),
    # numbers
    *(
        (f'{{{CONTEXT}, "{name}": {value}}}', "wrong_type", name)
        for name in ("maxlength", "samples", "top_k", "seed")
        for value in ('"5"', "true", "5.0", "1e3", "1e999", "[5]", "{}")
    ),
    *(
        (f'{{{CONTEXT}, "{name}": {value}}}', "wrong_type", name)
        for name in ("temperature", "top_p", "repetition_penalty")
        for value in ('"1"', "false", "[1]")
    ),
    *(
        (f'{{{CONTEXT}, "{name}": {value}}}', "out_of_range", name)
        for name, value in [
            ("maxlength", 0),
            ("maxlength", -1),
            ("maxlength", 1025),
            ("maxlength", "9" * 400),
            ("samples", 0),
            ("samples", -5),
            ("samples", 33),
            ("samples", 10**18),
            ("temperature", -0.1),
            ("temperature", 10.5),
            ("temperature", "1e999"),
            ("temperature", "9" * 400),
            ("top_k", -1),
            ("top_k", 1_000_001),
            ("top_p", -0.01),
            ("top_p", 1.01),
            ("repetition_penalty", 0),
            ("repetition_penalty", -1),
            ("repetition_penalty", 11),
            ("seed", 2**63),
            ("seed", -(2**63) - 1),
        ]
    ),
]


def test_every_bad_body_is_refused_by_name_and_a_good_request_works_after_it(server):
    async def test(client):
        expected = await check_good(client)
        for body, code, param in BAD_BODIES:
            for path in ("/generate", "/"):
                data = body if isinstance(body, bytes) else body.encode()
                async with client.post(path, data=data) as response:
                    await check_error(response, 400, code, param)
            assert await check_good(client) == expected

    assert len(BAD_BODIES) > 90
    served(server, test)


def test_errors_name_the_value_that_was_expected(server):
    async def test(client):
        for body, words in [
            ({"context": "一", "samples": 33}, "samples must be a whole number from 1 to 32"),
            ({"context": "一", "samples": True}, "samples must be a whole number, it is true or false"),
            ({"context": "一", "maxlength": 5.5}, "maxlength must be a whole number, it is a fraction"),
            ({"context": "一", "length": 5}, "the fields are context, maxlength, samples"),
            ({"context": "一", "x" * 5000: 5}, "x" * 60 + "…"),
        ]:
            async with client.post("/generate", json=body) as response:
                assert words in (await response.json())["error"]["message"]

    served(server, test)


def test_ends_of_the_ranges_are_taken(server):
    async def test(client):
        for field in (
            {"temperature": 0},
            {"temperature": 10},
            {"temperature": 1e-300},
            {"top_k": 0},
            {"top_k": 1_000_000},
            {"top_p": 0},
            {"top_p": 1},
            {"top_p": 1e-300},
            {"repetition_penalty": 0.1},
            {"repetition_penalty": 10},
            {"seed": 2**63 - 1},
            {"seed": -(2**63)},
            {"samples": 32},
            {"maxlength": 1},
        ):
            async with client.post("/generate", json=GOOD | field) as response:
                assert response.status == 200, field

    served(server, test)


def test_other_paths_and_methods_are_errors_in_the_same_form(server):
    async def test(client):
        async with client.get("/nothing") as response:
            await check_error(response, 404, "not_found")
        async with client.get("/generate") as response:
            await check_error(response, 405, "method_not_allowed")
            assert "POST" in response.headers["Allow"]
        for method in ("PUT", "DELETE", "PATCH"):
            async with client.request(method, "/") as response:
                await check_error(response, 405, "method_not_allowed")
        async with client.post("/health") as response:
            await check_error(response, 405, "method_not_allowed")
        await check_good(client)

    served(server, test)


def test_a_body_too_large_is_413_with_and_without_its_length(server):
    async def in_parts():
        for _ in range(100):
            yield b" " * 100

    async def test(client):
        async with client.post("/generate", data=b" " * 2001) as response:
            assert "2000" in (await check_error(response, 413, "body_too_large"))["message"]
        async with client.post("/generate", data=in_parts()) as response:
            await check_error(response, 413, "body_too_large")
        exact = json.dumps(GOOD).encode().ljust(2000)
        async with client.post("/generate", data=exact) as response:
            assert response.status == 200
        await check_good(client)

    served(server, test, body_bytes=2000)


def test_compressed_bodies_are_415_even_a_bomb(server):
    async def test(client):
        for encoding in ("gzip", "deflate", "br", "zstd", "identity", "nonsense"):
            data = gzip.compress(b" " * 50_000_000)
            async with client.post("/generate", data=data, headers={"Content-Encoding": encoding}) as response:
                await check_error(response, 415, "unsupported_encoding")
        await check_good(client)

    served(server, test)


async def raw(client, data: bytes, *, wait: float = 5) -> bytes:
    """Send bytes as they are and read the answer until the server closes or `wait` seconds have passed."""
    reader, writer = await asyncio.open_connection(client.host, client.port)
    writer.write(data)
    answer = b""
    with contextlib.suppress(asyncio.TimeoutError, ConnectionResetError):
        while part := await asyncio.wait_for(reader.read(65536), wait):
            answer += part
    writer.close()
    with contextlib.suppress(ConnectionResetError):
        await writer.wait_closed()
    return answer


def test_a_body_that_does_not_come_is_408(server):
    async def test(client):
        start = time.monotonic()
        answer = await raw(client, b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
        assert answer.startswith(b"HTTP/1.1 408 ") and b'"code": "body_timeout"' in answer
        assert time.monotonic() - start < 4
        await check_good(client)

    served(server, test, body_seconds=0.2)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
        b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n{}",
        b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\n{}",
        b"POST /generate HTTP/1.1\r\nHost: x\r\nExpect: tea\r\nContent-Length: 2\r\n\r\n{}",
        b"POST /generate HTTP/9.9\r\nHost: x\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 20_000 + b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"nonsense\r\n\r\n",
    ],
)
def test_bytes_that_are_not_http_get_a_4xx_and_no_traceback(server, request_bytes):
    async def test(client):
        answer = await raw(client, request_bytes, wait=1)
        assert answer.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4")), answer
        assert b"Traceback" not in answer
        await check_good(client)

    served(server, test)


def test_a_client_that_leaves_in_the_middle_of_its_body_disturbs_no_one(server):
    async def test(client):
        for _ in range(20):
            _, writer = await asyncio.open_connection(client.host, client.port)
            writer.write(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
            writer.close()
        await check_good(client)

    served(server, test)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=5,
)
FIELD_NAMES = ["context", "maxlength", "samples", "temperature", "top_k", "top_p", "repetition_penalty", "seed", "x"]


@given(st.dictionaries(st.sampled_from(FIELD_NAMES), JSON_VALUES) | JSON_VALUES)
@hypothesis_settings(max_examples=100, deadline=None)
def test_the_validator_knows_wishes_and_refusals_and_nothing_else(value):
    server = sys.modules["server"]
    limits = server.Limits()
    try:
        wish = server.parse_wish(json.dumps(value).encode(), limits)
    except server.Refusal as refusal:
        assert refusal.status == 400 and refusal.message
    else:
        assert isinstance(wish.context, str)
        assert 1 <= wish.samples <= limits.samples and 1 <= wish.length <= limits.length
        assert 0 <= wish.settings.temperature <= 10 and type(wish.settings.top_k) is int


@given(st.binary(max_size=200))
@hypothesis_settings(max_examples=300, deadline=None)
def test_the_validator_takes_any_bytes(data):
    server = sys.modules["server"]
    with contextlib.suppress(server.Refusal):
        server.parse_wish(data, server.Limits())


@pytest.fixture(autouse=True)
def server_module(server):
    """Hypothesis' tests find the module without a fixture."""


# Load, time and death.


def test_health_answers_while_the_model_works(server):
    engine = Engine(endless_model(), tiny_tokenizer(), rows=8)

    async def test(client):
        wish = {"context": "一", "maxlength": 1024, "samples": 8}
        busy = asyncio.create_task(client.post("/generate", json=wish))
        await wait_until(lambda: engine.running)
        for _ in range(10):
            async with client.get("/health") as response:
                assert response.status == 200
        assert engine.running and not busy.done()
        response = await busy
        assert len(await response.json()) == 8

    served(server, test, engine=engine)


def test_a_request_that_takes_too_long_is_504_and_frees_its_rows(server):
    engine = Engine(endless_model(), tiny_tokenizer(), rows=8)

    async def test(client):
        wish = {"context": "一", "maxlength": 1_000_000, "samples": 8}
        async with client.post("/generate", json=wish) as response:
            await check_error(response, 504, "timeout")
        await wait_until(lambda: not engine.running)
        await check_good(client)

    served(server, test, engine=engine, length=1_000_000, request_seconds=0.3)


def test_a_client_that_goes_away_frees_its_rows(server):
    engine = Engine(endless_model(), tiny_tokenizer(), rows=8)

    async def test(client):  # TestServer cancels handlers, as main() does
        wish = {"context": "一", "maxlength": 1_000_000, "samples": 8}
        busy = asyncio.create_task(client.post("/generate", json=wish))
        await wait_until(lambda: engine.running)
        busy.cancel()
        await wait_until(lambda: not engine.running)
        await check_good(client)

    served(server, test, engine=engine, length=1_000_000)


def test_too_much_work_is_429_with_retry_after(server):
    engine = Engine(endless_model(), tiny_tokenizer(), rows=1, max_waiting=2)

    async def test(client):
        wish = {"context": "一", "maxlength": 200, "samples": 2}
        responses = await asyncio.gather(*(client.post("/generate", json=wish) for _ in range(8)))
        statuses = [response.status for response in responses]
        assert 200 in statuses and set(statuses) == {200, 429}
        refused = responses[statuses.index(429)]
        assert refused.headers["Retry-After"]
        await check_error(refused, 429, "full")
        await check_good(client)

    served(server, test, engine=engine)


def test_a_dead_model_thread_is_503_everywhere_and_no_one_waits(server, monkeypatch, caplog):
    engine = Engine(endless_model(), tiny_tokenizer(), rows=8)

    async def test(client):
        await check_good(client)
        monkeypatch.setattr(engine.decoder, "step", lambda *_: 1 / 0)
        for _ in range(2):
            async with client.post("/generate", json=GOOD) as response:
                error = await check_error(response, 503, "engine_stopped")
                assert "ZeroDivision" not in error["message"]
        async with client.get("/health") as response:
            assert response.status == 503
            assert (await response.json())["status"] == "dead"

    served(server, test, engine=engine)


def test_a_fault_of_ours_is_logged_and_tells_the_client_nothing(server, monkeypatch, caplog):
    engine = Engine(tiny_model(), tiny_tokenizer(), rows=8)

    async def test(client):
        with monkeypatch.context() as patch:
            patch.setattr(engine, "submit", lambda *_, **__: 1 / 0)
            async with client.post("/generate", json=GOOD) as response:
                error = await check_error(response, 500, "internal_error")
        assert "ZeroDivision" not in str(error)
        await check_good(client)

    served(server, test, engine=engine)
    assert "ZeroDivisionError" in caplog.text


# Starting.


def test_a_port_in_use_is_named_before_the_model_is_loaded(server, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"port {port} on 127.0.0.1 is in use; .*--port"):
            server.main(["--port", str(port), "--model_path", str(tmp_path / "none")])


def test_no_model_folder_and_one_without_weights_are_clear(server, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no model folder"):
        server.main(["--port", "0", "--model_path", str(tmp_path / "none")])
    folder = save_tiny_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no weights"):
        server.main(["--port", "0", "--model_path", str(folder)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "70000"], "--port must be from 0 to 65535"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
        (["--host", "192.0.2.1"], "on 192.0.2.1 cannot be used"),
        (["--max_samples", "0"], "--max_samples must be 1 or more"),
        (["--body_timeout", "0"], "--body_timeout must be above 0"),
        (["--request_timeout", "nan"], "--request_timeout must be above 0"),
    ],
)
def test_a_wrong_flag_is_named(server, flags, message):
    with pytest.raises((ValueError, OSError), match=message):
        server.main(["--port", "0", *flags])


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_the_process_drops_who_has_gone_and_finishes_what_it_has_begun_at_sigterm(tmp_path):
    folder = save_tiny_model(tmp_path / "model", endless_model())
    command = [sys.executable, "server.py", "--port", "0", "--model_path", str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            url = ""
            for line in process.stdout:
                if line.startswith("serving on "):
                    url = line.split()[2]
                if line.lstrip().startswith("Windows"):
                    break
            assert '\\"context\\": \\"\\u4f60\\u597d\\"' in line
            host, port = url.removeprefix("http://").split(":")
            body = json.dumps({"context": "一", "maxlength": 1000, "samples": 32}).encode()
            head = f"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"

            def running() -> int:
                with urllib.request.urlopen(f"{url}/health", timeout=60) as response:
                    return json.load(response)["running"]

            with socket.create_connection((host, int(port)), timeout=60) as connection:
                connection.sendall(head.encode() + body)
                while running() != 32:
                    pass
            gone = time.monotonic()
            while running():
                pass
            left_after = time.monotonic() - gone
            with socket.create_connection((host, int(port)), timeout=60) as connection:
                connection.sendall(head.encode() + body)
                while running() != 32:
                    pass
                start = time.monotonic()
                process.send_signal(signal.SIGTERM)
                answer = b""
                while part := connection.recv(65536):
                    answer += part
            assert left_after < (time.monotonic() - start) / 2, "the rows of a client that had gone went on"
            assert answer.startswith(b"HTTP/1.1 200 OK")
            assert len(json.loads(answer.partition(b"\r\n\r\n")[2])) == 32
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0
    assert out.strip() == "stopped"
    assert all(line.startswith("note: ") for line in err.splitlines()), err
