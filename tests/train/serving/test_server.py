"""server.py over real sockets with a tiny model: answers, events, keys, load, and life and death."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import Future
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from served import GOOD, check_error, check_good, error_of, events, raw, served, wait_until
from tiny_model import endless_model, save_tiny_model, tiny_model, tiny_tokenizer

from gpt2_chinese.decoding.completion import SamplingParams
from gpt2_chinese.decoding.engine import Engine
from gpt2_chinese.serving.fast_path import simple_post
from gpt2_chinese.serving.flags import parse_args, parse_origins
from gpt2_chinese.serving.keys import read_keys
from gpt2_chinese.serving.lifecycle import LoopErrors

ROOT = Path(__file__).resolve().parents[3]
ALL_OF_THE_PROCESS = {"gpt2_admitted_requests", "gpt2_tasks", "gpt2_http_requests"}
LONG = {"context": "一", "maxlength": 1_000_000, "samples": 8}


@pytest.fixture(scope="module", autouse=True)
def server(script):
    return script("server")


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

    served(test)


def test_a_seed_repeats_and_the_settings_reach_the_engine(server):
    engine = Engine(tiny_model(), tiny_tokenizer(), max_num_seqs=8)

    async def test(client):
        assert await check_good(client) == await check_good(client)
        fields = GOOD | {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "repetition_penalty": 1.5}
        async with client.post("/generate", json=fields) as response:
            texts = await response.json()
        params = SamplingParams(temperature=0.5, top_k=3, top_p=0.9, repetition_penalty=1.5)
        fields = {"samples": 2, "length": 6, "sampling_params": params, "seed": 1, "distinct": True}
        expected = await asyncio.to_thread(engine.complete, "一丁", **fields)
        assert texts == expected

    served(test, engine=engine)


def test_null_is_not_given_and_a_bom_and_any_content_type_are_taken(server):
    async def test(client):
        for data in (json.dumps(GOOD).encode("utf-8-sig"), json.dumps(GOOD | {"top_k": None}).encode()):
            for kind in ("application/json", "application/x-www-form-urlencoded", "text/plain; charset=gbk"):
                async with client.post("/generate", data=data, headers={"Content-Type": kind}) as response:
                    assert response.status == 200

    served(test)


def test_many_clients_get_what_they_would_get_alone(server):
    async def ask(client, seed):
        fields = {"context": "一" * (seed % 7), "seed": seed, "samples": 1 + seed % 5, "maxlength": 3 + seed % 20}
        async with client.post("/generate", json=fields) as response:
            return await response.json()

    async def test(client):
        alone = [await ask(client, seed) for seed in range(40)]
        assert await asyncio.gather(*(ask(client, seed) for seed in range(40))) == alone

    served(test)


def test_a_context_that_does_not_fit_is_said_in_a_header(server):
    async def test(client):
        async with client.post("/generate", json=GOOD | {"context": "一" * 100}) as response:
            assert response.headers["X-Context-Cut"] == "75"
            assert all(text.startswith("一" * 100) for text in await response.json())
        async with client.post("/generate", json=GOOD) as response:
            assert "X-Context-Cut" not in response.headers

    served(test)


def test_the_page_and_health(server):
    async def test(client):
        async with client.get("/") as response:
            assert response.status == 200 and response.content_type == "text/html"
            assert "续写" in await response.text()
        async with client.get("/health") as response:
            assert response.status == 200
            health = await response.json()
        assert health["status"] == "ready" and health["model"] == "tiny" and health["device"] == "cpu"
        assert (health["running"], health["waiting"], health["n_ctx"]) == (0, 0, 32)
        assert (health["maxlength"], health["samples"]) == (1024, 32)

    served(test)


def test_cors_admits_every_site_without_credentials(server):
    origin = {"Origin": "https://example.org"}

    async def test(client):
        preflight = origin | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
        async with client.options("/generate", headers=preflight) as response:
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

    served(test)


# Streams and stop strings.


def test_a_stream_has_the_texts_of_the_array(server):
    async def test(client):
        for stop in (None, "丐", ["乐", "丑丐"]):
            fields = {"context": "一丁", "maxlength": 30, "samples": 4, "seed": 5, "stop": stop}
            async with client.post("/generate", json=fields) as response:
                expected = await response.json()
                drawn = int(response.headers["X-Tokens"])
            async with client.post("/generate", json=fields | {"stream": True}) as response:
                assert response.headers["Cache-Control"] == "no-store"
                found = await events(response)
            texts = ["一丁"] * 4
            ended = {}
            for name, data in found[:-1]:
                if name == "text":
                    assert data["sample"] not in ended
                    texts[data["sample"]] += data["text"]
                else:
                    assert name == "end"
                    ended[data["sample"]] = data["finish_reason"]
            assert texts == expected
            assert set(ended) == {0, 1, 2, 3} and set(ended.values()) <= {"stop", "length"}
            name, data = found[-1]
            assert name == "done" and data["tokens"] == drawn and data["seconds"] >= 0

    served(test)


def test_deltas_come_while_the_model_works_and_a_client_that_leaves_frees_its_slots(server):
    engine = Engine(endless_model(), tiny_tokenizer(), max_num_seqs=8)

    async def test(client):
        async with client.post("/generate", json=LONG | {"stream": True}) as response:
            first = await response.content.readuntil(b"\n\n")
            assert first.startswith(b"event: text\ndata: ")
            assert engine.running == 8
        left = time.monotonic()
        await wait_until(lambda: not engine.running)
        assert time.monotonic() - left < 1
        await check_good(client)

    served(test, engine=engine, length=1_000_000)


def test_errors_after_a_stream_has_begun_are_events(server, monkeypatch, caplog):
    engine = Engine(endless_model(), tiny_tokenizer(), max_num_seqs=8)

    async def test(client):
        async with client.post("/generate", json=LONG | {"stream": True}) as response:
            name, data = (await events(response))[-1]
            assert name == "error" and data["error"]["code"] == "timeout"
        await wait_until(lambda: not engine.running)
        async with client.post(
            "/v1/completions", json={"prompt": "一", "max_tokens": 1000, "stream": True}
        ) as response:
            await response.content.readuntil(b"\n\n")
            monkeypatch.setattr(engine.decoder, "step", lambda *_: 1 / 0)
            name, data = (await events(response))[-1]
            assert name == "error" and data["error"]["code"] == "engine_stopped"

    served(test, engine=engine, length=1_000_000, request_seconds=0.3)


def test_a_client_that_does_not_read_is_disconnected(server):
    engine = Engine(endless_model(), tiny_tokenizer(), max_num_seqs=32)

    async def test(client):
        body = json.dumps({"context": "一", "maxlength": 1_000_000, "samples": 32, "stream": True}).encode()
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((client.host, client.port))
            connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            await wait_until(lambda: engine.running)
            await wait_until(lambda: not engine.running, 60)
        await check_good(client)

    served(test, engine=engine, length=1_000_000, body_seconds=0.3, send_buffer=4096)


# Keys, origins and metrics.


def test_a_key_is_asked_for_everywhere_but_on_the_page_and_health(server):
    async def test(client):
        guarded = [
            ("POST", "/generate"),
            ("POST", "/"),
            ("POST", "/v1/completions"),
            ("GET", "/v1/models"),
            ("GET", "/v1/models/tiny"),
            ("GET", "/metrics"),
            ("GET", "/openapi.json"),
            ("GET", "/nothing"),
        ]
        wrong = [None, "Bearer", "Bearer ", "Bearer wrong", "Basic one", "Bearer öne", "one", "Bearer one two"]
        for method, path in guarded:
            for header in wrong:
                headers = {"Authorization": header} if header else {}
                async with client.request(method, path, headers=headers, json=GOOD) as response:
                    assert response.headers["WWW-Authenticate"] == "Bearer"
                    error = await check_error(response, 401, "invalid_api_key")
                    assert error["type"] == "authentication_error"
        for key in ("one", "two"):
            async with client.post("/generate", json=GOOD, headers={"Authorization": f"bearer {key}"}) as response:
                assert response.status == 200
        for path in ("/", "/health"):
            for method in ("GET", "HEAD"):
                async with client.request(method, path) as response:
                    assert response.status == 200
        async with client.head("/metrics") as response:
            assert response.status == 401
        preflight = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
        preflight["Access-Control-Request-Headers"] = "authorization"
        async with client.options("/generate", headers=preflight) as response:
            assert response.status == 200

    served(test, keys=(b"one", b"two"))


def test_keys_come_from_flags_a_file_and_the_environment(server, tmp_path, monkeypatch):
    file = tmp_path / "keys.txt"
    file.write_text("b\n\n c \n", encoding="utf-8")
    monkeypatch.setenv("GPT2_CHINESE_API_KEY", "d")
    args = parse_args(["--api_key", "a", "--api_key", "b", "--api_key_file", str(file)])
    assert read_keys(args) == (b"a", b"b", b"c", b"d")
    shown = server.printable(parse_args(["--api_key", "secret"]), 1)
    assert shown.api_key == "<1 keys>" and "secret" not in str(shown)
    for wrong in ("", "a b", "ключ", "a\nb"):
        with pytest.raises(ValueError, match="--api_key: a key must be printable ASCII"):
            read_keys(parse_args([f"--api_key={wrong}"]))
    file.write_text("\n", encoding="utf-8")
    with pytest.raises(ValueError, match="has no key; write one key per line"):
        read_keys(parse_args(["--api_key_file", str(file)]))


def test_only_the_sites_that_are_named_are_admitted(server):
    async def allowed(client, origin):
        async with client.post("/generate", json=GOOD, headers={"Origin": origin}) as response:
            assert response.status == 200
            return response.headers.get("Access-Control-Allow-Origin")

    async def one(client):
        assert await allowed(client, "https://a.example") == "https://a.example"
        assert await allowed(client, "https://b.example") is None

    async def none(client):
        assert await allowed(client, "https://a.example") is None

    served(one, cors=tuple(parse_origins("https://a.example, http://c.example:8080")))
    served(none, cors=tuple(parse_origins("none")))
    for wrong in ("a.example", "https://a.example/", "ftp://a.example", ""):
        with pytest.raises(ValueError, match="is not \\*, none or a site"):
            parse_origins(wrong)


def test_metrics_count_requests_tokens_and_times(server):
    async def test(client):
        await check_good(client)
        async with client.post("/v1/completions", json={"prompt": "一丁", "max_tokens": 5, "stream": True}) as response:
            await response.read()
        async with client.post("/generate", data="{") as response:
            assert response.status == 400
        async with client.get("/nothing") as response:
            assert response.status == 404
        async with client.get("/metrics") as response:
            assert response.content_type == "text/plain"
            text = await response.text()
        families = {family.name: family for family in text_string_to_metric_families(text)}
        kinds = {name: family.type for name, family in families.items()}
        assert kinds == {
            "gpt2_admitted_requests": "gauge",
            "gpt2_tasks": "gauge",
            "gpt2_http_requests": "counter",
            "gpt2_ready": "gauge",
            "gpt2_full_speed": "gauge",
            "gpt2_running_sequences": "gauge",
            "gpt2_waiting_sequences": "gauge",
            "gpt2_prompt_tokens": "counter",
            "gpt2_generated_tokens": "counter",
            "gpt2_prefix_cache_hits": "counter",
            "gpt2_prefix_cache_reused_tokens": "counter",
            "gpt2_prefix_cache_bytes": "gauge",
            "gpt2_prefix_cache_capacity_bytes": "gauge",
            "gpt2_model_restarts": "counter",
            "gpt2_model_reloads": "counter",
            "gpt2_time_to_first_token_seconds": "histogram",
            "gpt2_time_per_token_seconds": "histogram",
        }
        values = {}
        for family in families.values():
            assert family.documentation
            for sample in family.samples:
                labels = dict(sample.labels)
                assert labels.pop("device") == "cpu"
                values[(sample.name, *labels.values())] = sample.value
                assert ("model" in labels) == (family.name not in ALL_OF_THE_PROCESS)
        for route, status, count in [
            ("/generate", "200", 1),
            ("/generate", "400", 1),
            ("/v1/completions", "200", 1),
            ("other", "404", 1),
        ]:
            assert values["gpt2_http_requests_total", route, status] == count
        assert values["gpt2_running_sequences", "tiny"] == values["gpt2_waiting_sequences", "tiny"] == 0
        assert values["gpt2_ready", "tiny"] == 1
        assert values["gpt2_prompt_tokens_total", "tiny"] == 3 + 3 + 3  # with the warm-up
        assert 3 <= values["gpt2_generated_tokens_total", "tiny"] <= 2 + 12 + 5
        first_token = "gpt2_time_to_first_token_seconds"
        assert values[f"{first_token}_count", "tiny"] == 2
        assert 0 < values[f"{first_token}_sum", "tiny"] < 10
        buckets = re.findall(r'^gpt2_time_to_first_token_seconds_bucket\{.*le="([^"]+)".*\} (\d+)', text, re.MULTILINE)
        assert [bound for bound, _ in buckets] == (
            "0.005 0.01 0.025 0.05 0.1 0.25 0.5 1 2.5 5 10 30 60 120 +Inf".split()
        )
        counts = [int(count) for _, count in buckets]
        assert counts == sorted(counts) and counts[-1] == 2

    served(test)


# Several models.


def test_requests_choose_among_several_models(server):
    endless = Engine(endless_model(), tiny_tokenizer(), max_num_seqs=8)

    async def test(client):
        async with client.get("/v1/models") as response:
            assert [model["id"] for model in (await response.json())["data"]] == ["tiny", "endless"]
        async with client.get("/v1/models/endless") as response:
            model = await response.json()
            assert (model["id"], model["root"], model["max_model_len"]) == ("endless", "endless", endless.n_ctx)
        fields = {"context": "一丁", "maxlength": 20, "samples": 1, "seed": 7}
        answers = {}
        for name in (None, "tiny", "endless"):
            async with client.post("/generate", json=fields | {"model": name}) as response:
                assert response.status == 200
                answers[name] = (await response.json())[0]
        assert answers[None] == answers["tiny"] != answers["endless"]
        async with client.post("/generate", json=fields | {"model": "other"}) as response:
            error = await check_error(response, 404, "model_not_found", "model")
            assert "tiny, endless" in error["message"]
        async with client.get("/metrics") as response:
            lines = (await response.text()).splitlines()
        for name, count in (("tiny", 2), ("endless", 1)):
            assert f'gpt2_time_to_first_token_seconds_count{{device="cpu",model="{name}"}} {count}.0' in lines
        comments = [line for line in lines if line.startswith("#")]
        assert len(comments) == len(set(comments)), "a metric's samples must stand together"

    served(test, others={"endless": endless})


def test_a_model_that_dies_leaves_the_others_working_and_health_says_which(server):
    endless = Engine(endless_model(), tiny_tokenizer(), max_num_seqs=8)

    async def test(client):
        endless.close()
        async with client.post("/generate", json=GOOD | {"model": "endless"}) as response:
            await check_error(response, 503, "engine_stopped")
        await check_good(client)
        async with client.get("/health") as response:
            health = await response.json()
        assert response.status == 503 and health["status"] == "dead"
        assert {model["model"]: model["status"] for model in health["models"]} == {"tiny": "ready", "endless": "dead"}

    served(test, others={"endless": endless})


# Loading.


def test_the_port_answers_while_the_model_loads(server):
    loaded = threading.Event()

    def load():
        assert loaded.wait(60)
        return Engine(tiny_model(), tiny_tokenizer(), max_num_seqs=8)

    async def test(client):
        async with client.get("/health") as response:
            assert response.status == 503 and (await response.json())["status"] == "loading"
        for path in ("/generate", "/v1/completions"):
            async with client.post(path, json=GOOD) as response:
                assert response.headers["Retry-After"]
                await check_error(response, 503, "loading")
        for path in ("/", "/metrics", "/openapi.json", "/v1/models"):
            async with client.get(path) as response:
                assert response.status == 200
        loaded.set()
        await client.service.loading_done.wait()
        await check_good(client)
        async with client.get("/health") as response:
            assert response.status == 200

    served(test, load=load, wait=False)


def test_full_speed_is_said_when_the_compiled_decoder_has_taken_over(server):
    engine = Engine(tiny_model(), tiny_tokenizer(), max_num_seqs=8)
    compiling: Future = Future()
    engine._next_decoder = compiling

    async def full_speed(client):
        async with client.get("/metrics") as response:
            text = await response.text()
        async with client.get("/health") as response:
            return (await response.json())["full_speed"], 'gpt2_full_speed{device="cpu",model="tiny"} 1.0' in text

    async def test(client):
        assert await full_speed(client) == (False, False)
        await check_good(client)
        compiling.set_result(engine.decoder)
        await check_good(client)
        assert await full_speed(client) == (True, True)

    served(test, engine=engine)


def test_a_model_that_cannot_be_loaded_is_dead_and_said_so(server):
    def load():
        raise ValueError("it is broken")

    async def test(client):
        await client.service.loading_done.wait()
        assert str(client.service.error) == "it is broken"
        async with client.get("/health") as response:
            assert response.status == 503 and (await response.json())["status"] == "dead"
        async with client.post("/generate", json=GOOD) as response:
            error = await check_error(response, 503, "engine_stopped")
            assert "broken" not in error["message"]

    served(test, load=load, wait=False)


# Load, time and death.


def test_a_server_that_drains_finishes_what_it_has_and_takes_nothing_new(server):
    engine = Engine(endless_model(), tiny_tokenizer(), max_num_seqs=8)

    async def test(client):
        busy = asyncio.create_task(client.post("/generate", json={"context": "一", "maxlength": 500, "samples": 8}))
        await wait_until(lambda: engine.running)
        client.service.draining = True
        async with client.post("/generate", json=GOOD) as response:
            assert response.headers["Retry-After"] and response.headers["Connection"] == "close"
            await check_error(response, 503, "draining")
        async with client.get("/health") as response:
            assert response.status == 503 and (await response.json())["status"] == "draining"
        assert client.service.admitted == 1
        response = await busy
        assert response.status == 200 and len(await response.json()) == 8
        assert client.service.admitted == 0

    served(test, engine=engine)


def test_connections_beyond_the_limit_are_refused_at_once(server):
    async def test(client):
        held = [await asyncio.open_connection(client.host, client.port) for _ in range(5)]
        for _, writer in held:
            writer.write(b"GET /hea")
        await asyncio.sleep(0.05)
        answer = await raw(client, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 503 ") and b"Retry-After: 1" in answer
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "too_many_connections"
        for _, writer in held:
            writer.close()
            await writer.wait_closed()
        await asyncio.sleep(0.05)
        await check_good(client)

    served(test, connections=5)


def test_slow_and_silent_connections_are_closed_and_disturb_no_one(server):
    """No bytes, half a head, a byte of the head now and then, half a body: all are closed in time."""

    async def slow(client, begin: bytes, drip: bytes) -> float:
        reader, writer = await asyncio.open_connection(client.host, client.port)
        writer.write(begin)
        start = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - start < 8:
                if drip:
                    writer.write(drip)
                with contextlib.suppress(asyncio.TimeoutError):
                    if await asyncio.wait_for(reader.read(65536), 0.1) == b"":
                        break
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        return time.monotonic() - start

    async def test(client):
        kinds = [
            (b"", b""),
            (b"GET /health HTT", b""),
            (b"POST /generate HTTP/1.1\r\n", b"X"),
            (b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n", b" "),
            (b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", b""),
            (b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /he", b"a"),
        ]
        many = [asyncio.create_task(slow(client, *kind)) for kind in kinds for _ in range(6)]
        await asyncio.sleep(0.1)
        while not all(task.done() for task in many):
            start = time.monotonic()
            await check_good(client)
            assert time.monotonic() - start < 1
            await asyncio.sleep(0.05)
        assert max(task.result() for task in many) < 4

    served(test, idle_seconds=0.5, body_seconds=0.5)


def test_health_answers_while_the_model_works(server):
    engine = Engine(endless_model(), tiny_tokenizer(), max_num_seqs=8)

    async def test(client):
        fields = {"context": "一", "maxlength": 1024, "samples": 8}
        busy = asyncio.create_task(client.post("/generate", json=fields))
        await wait_until(lambda: engine.running)
        for _ in range(10):
            async with client.get("/health") as response:
                assert response.status == 200
        assert engine.running and not busy.done()
        response = await busy
        assert len(await response.json()) == 8

    served(test, engine=engine)


def test_a_request_that_takes_too_long_is_504_and_frees_its_slots(server):
    engine = Engine(endless_model(), tiny_tokenizer(), max_num_seqs=8)

    async def test(client):
        fields = {"context": "一", "maxlength": 1_000_000, "samples": 8}
        async with client.post("/generate", json=fields) as response:
            await check_error(response, 504, "timeout")
        await wait_until(lambda: not engine.running)
        await check_good(client)

    served(test, engine=engine, length=1_000_000, request_seconds=0.3)


def test_a_client_that_goes_away_frees_its_slots(server):
    engine = Engine(endless_model(), tiny_tokenizer(), max_num_seqs=8)

    async def test(client):  # TestServer cancels handlers, as main() does
        fields = {"context": "一", "maxlength": 1_000_000, "samples": 8}
        busy = asyncio.create_task(client.post("/generate", json=fields))
        await wait_until(lambda: engine.running)
        busy.cancel()
        await wait_until(lambda: not engine.running)
        await check_good(client)

    served(test, engine=engine, length=1_000_000)


def test_too_much_work_is_429_with_retry_after(server):
    engine = Engine(endless_model(), tiny_tokenizer(), max_num_seqs=1, max_waiting=2)

    async def test(client):
        fields = {"context": "一", "maxlength": 200, "samples": 2}
        responses = await asyncio.gather(*(client.post("/generate", json=fields) for _ in range(8)))
        statuses = [response.status for response in responses]
        assert 200 in statuses and set(statuses) == {200, 429}
        refused = responses[statuses.index(429)]
        assert refused.headers["Retry-After"]
        await check_error(refused, 429, "full")
        await check_good(client)

    served(test, engine=engine)


def test_the_fast_path_answers_what_the_handlers_answer_and_keeps_the_connection(server):
    engine = Engine(endless_model(), tiny_tokenizer(), max_num_seqs=1, max_waiting=2)

    def request(path: str, *lines: str) -> bytes:
        head = "".join(f"{line}\r\n" for line in (f"POST {path} HTTP/1.1", "Host: x", "Content-Length: 2", *lines))
        return head.encode() + b"\r\n{}"

    def parts(answer: bytes) -> tuple[str, dict[str, str], dict]:
        head, _, body = answer.decode().partition("\r\n\r\n")
        first, *lines = head.split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        assert int(headers.pop("Content-Length")) == len(body.encode()) and headers.pop("Date").endswith("GMT")
        headers.pop("Server", None)
        return first, headers, error_of(body, "full")

    async def test(client):
        fields = {"context": "一", "maxlength": 1_000_000, "samples": 3}
        busy = asyncio.create_task(client.post("/generate", json=fields))
        await wait_until(lambda: engine.running and engine.waiting == 2)
        for path in ("/", "/generate", "/v1/completions"):
            long = parts(await raw(client, request(path, "Origin: https://a.example"), wait=0.3))
            assert long[1].pop("Access-Control-Allow-Origin")
            assert long[1].pop("Access-Control-Expose-Headers")
            short = parts(await raw(client, request(path), wait=0.3))
            assert short == long
        assert sum(client.service.response_counts[path, 429] for path in ("/", "/generate", "/v1/completions")) == 6
        twice = await raw(client, request("/") + request("/", "Origin: https://a.example") + request("/"), wait=0.3)
        assert twice.count(b"HTTP/1.1 429 Too Many Requests\r\n") == 3
        assert [part.count(b"Allow-Origin") for part in twice.split(b"HTTP/1.1 429")[1:]] == [0, 1, 0]
        closed = await raw(client, request("/", "Connection: close"))
        assert b"Connection: close" in closed
        busy.cancel()
        await wait_until(lambda: not engine.running)
        await check_good(client)

    served(test, engine=engine, length=1_000_000)


@pytest.mark.parametrize(
    ("lines", "body", "path"),
    [
        (["Content-Length: 2"], b"{}", "/generate"),
        (["Host: x", "content-length:2", "Connection: keep-alive", "X-Origin: y"], b"{}", "/generate"),
        (["Content-Length: 0"], b"", "/generate"),
        (["Content-Length: 3"], b"{}", None),  # the rest is still to come
        (["Content-Length: 1"], b"{}", None),  # and another request
        (["Content-Length: 2", "Content-Length: 2"], b"{}", None),
        (["Content-Length : 2"], b"{}", None),
        (["Content-Length: 2x"], b"{}", None),
        (["Content-Length: -2"], b"{}", None),
        ([], b"{}", None),
        (["Transfer-Encoding: chunked", "Content-Length: 2"], b"{}", None),
        (["Content-Length: 2", "expect: 100-continue"], b"{}", None),
        (["Content-Length: 2", "Origin: https://a.example"], b"{}", None),
        (["Content-Length: 2", "Connection: close"], b"{}", None),
        (["Content-Length: 2", "Connection: Upgrade, keep-alive"], b"{}", None),
        (["Content-Length: 2", "Upgrade: websocket"], b"{}", None),
        (["Content-Length: 2", "X: a\nTransfer-Encoding: chunked"], b"{}", None),
        (["Content-Length: 2", "No-Host: x"], b"{}", None),
        (["Content-Length: 2", "Host: x", "Host: y"], b"{}", None),
        (["Content-Length: 2", "X: a\x00b"], b"{}", None),
        (["Content-Length: 2", "X: a", " folded"], b"{}", None),
        (["Content-Length: 2", "X y: a"], b"{}", None),
        (["Content-Length: 2", "no colon"], b"{}", None),
        (["Content-Length: 2", "X: " + "x" * 5000], b"{}", None),
    ],
)
def test_only_a_whole_request_that_needs_nothing_else_takes_the_fast_path(lines, body, path):
    host = () if any(line.startswith(("Host", "No-Host")) for line in lines) else ("Host: x",)
    head = "".join(f"{line}\r\n" for line in ("POST /generate HTTP/1.1", *host, *lines))
    data = head.encode() + b"\r\n" + body
    simple = simple_post(data)
    assert (simple and simple.path) == path and (simple is None or simple.host == "x")
    assert simple_post(data[: len(head) // 2]) is None
    for other in (b"GET" + data[4:], data.replace(b"1.1", b"1.0", 1), b"\r\n" + data, b""):
        assert simple_post(other) is None


def test_a_large_request_that_is_refused_does_not_keep_the_small_ones_out(server):
    engine = Engine(endless_model(), tiny_tokenizer(), max_num_seqs=1, max_waiting=16)

    async def test(client):
        model = client.service.models[0]
        long = {"context": "一", "maxlength": 1_000_000, "samples": 2}
        busy = [asyncio.create_task(client.post("/generate", json=long)) for _ in range(2)]
        await wait_until(lambda: engine.running and engine.waiting == 3)
        async with client.post("/generate", json=long | {"samples": 14}) as response:
            await check_error(response, 429, "full")
        small = asyncio.create_task(client.post("/generate", json=long | {"samples": 1}))
        await wait_until(lambda: engine.waiting == 4)
        assert model.last_sequences == 1
        for task in (*busy, small):
            task.cancel()
        await wait_until(lambda: not engine.running and not engine.waiting)

    served(test, engine=engine, length=1_000_000)


def test_once_there_was_no_room_there_must_be_room_for_several(server):
    engine = Engine(endless_model(), tiny_tokenizer(), max_num_seqs=1, max_waiting=32)

    async def test(client):
        fields = {"context": "一", "maxlength": 1_000_000, "samples": 1}
        busy = [asyncio.create_task(client.post("/generate", json=fields))]
        await wait_until(lambda: engine.running and not engine.waiting)
        busy += [asyncio.create_task(client.post("/generate", json=fields)) for _ in range(32)]
        await wait_until(lambda: engine.waiting == 32)
        assert client.service.admission_error().status == 429
        for left in range(1, 4):
            busy.pop().cancel()
            await wait_until(lambda left=left: engine.waiting == 32 - left)
            assert client.service.admission_error().status == 429
        busy.pop().cancel()
        await wait_until(lambda: engine.waiting == 28)
        assert client.service.admission_error() is None
        for task in busy:
            task.cancel()
        await wait_until(lambda: not engine.running and not engine.waiting)
        await check_good(client)

    served(test, engine=engine, length=1_000_000)


def test_answers_keep_their_turn_and_a_body_is_never_taken_for_a_request(server):
    engine = Engine(endless_model(), tiny_tokenizer(), max_num_seqs=1, max_waiting=2)

    def request(body: bytes, path: str = "/generate") -> bytes:
        return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body

    async def statuses(client, *parts: bytes, wait: float = 0.5) -> list[bytes]:
        """Send the parts one after the other, so that each is read for itself; the statuses in the order they come."""
        reader, writer = await asyncio.open_connection(client.host, client.port)
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.05)
        answer = b""
        with contextlib.suppress(asyncio.TimeoutError):
            while part := await asyncio.wait_for(reader.read(65536), wait):
                answer += part
        writer.close()
        return re.findall(rb"HTTP/1\.[01] (\d{3}) ", answer)

    async def test(client):
        bad, inner = request(b"{"), request(b"{}")
        assert await statuses(client, bad, bad, bad) == [b"400"] * 3
        fields = {"context": "一", "maxlength": 400, "samples": 3}
        slow = request(json.dumps(fields).encode())
        # The first fills the server; what comes behind it on its connection is refused, but answered after it.
        answers = await statuses(client, slow, bad, bad, wait=5)
        assert answers[0] == b"200" and len(answers) == 3
        busy = asyncio.create_task(client.post("/generate", json=fields | {"maxlength": 1_000_000}))
        await wait_until(lambda: engine.running and engine.waiting == 2)
        assert await statuses(client, bad, bad, inner) == [b"429"] * 3
        # A body that looks like a request; one that comes in parts; two requests at once; more than one part of both.
        head, _, body = request(inner).partition(b"\r\n\r\n")
        assert await statuses(client, head + b"\r\n\r\n", body) == [b"429"]
        assert await statuses(client, inner, head + b"\r\n", b"\r\n", body, inner) == [b"429"] * 3
        assert await statuses(client, inner + inner[:-1], inner[-1:] + inner, inner) == [b"429"] * 4
        # What a proxy might read otherwise is left to aiohttp, which refuses it as it does on every day.
        doubled = inner.replace(b"Host: x", b"Host: x\r\nContent-Length: 9")
        assert await statuses(client, doubled) == [b"400"]
        chunked = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
        assert await statuses(client, chunked, inner) == [b"429"] * 2
        busy.cancel()
        await wait_until(lambda: not engine.running)
        await check_good(client)

    served(test, engine=engine, length=1_000_000)


def test_who_has_no_key_is_not_told_how_full_it_is(server):
    engine = Engine(endless_model(), tiny_tokenizer(), max_num_seqs=1, max_waiting=2)

    async def test(client):
        fields = {"context": "一", "maxlength": 1_000_000, "samples": 3}
        mine = {"Authorization": "Bearer k"}
        busy = asyncio.create_task(client.post("/generate", json=fields, headers=mine))
        await wait_until(lambda: engine.waiting)
        async with client.post("/generate", json=fields) as response:
            await check_error(response, 401, "invalid_api_key")
        async with client.post("/generate", json=fields, headers=mine) as response:
            await check_error(response, 429, "full")
        busy.cancel()

    served(test, engine=engine, length=1_000_000, keys=(b"k",))


def test_a_dead_model_thread_is_503_everywhere_and_no_one_waits(server, monkeypatch, caplog):
    engine = Engine(endless_model(), tiny_tokenizer(), max_num_seqs=8)

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

    served(test, engine=engine)


def test_a_fault_of_ours_is_logged_and_tells_the_client_nothing(server, monkeypatch, caplog):
    engine = Engine(tiny_model(), tiny_tokenizer(), max_num_seqs=8)

    async def test(client):
        with monkeypatch.context() as patch:
            patch.setattr(engine, "submit", lambda *_, **__: 1 / 0)
            async with client.post("/generate", json=GOOD) as response:
                error = await check_error(response, 500, "internal_error")
        assert "ZeroDivision" not in str(error)
        await check_good(client)

    served(test, engine=engine)
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
        (
            ["--model_path", "a/m", "--model_path", "b/m"],
            "2 models are called m; give each --model_path",
        ),
        (
            ["--model_path", "a", "--model_path", "b", "--model_name", "x"],
            "--model_name is given 1 times and",
        ),
        (["--model_name", ""], "a model has no name"),
        (["--batch_size", "4097"], "--batch_size must be at most 4096, it is 4097"),
    ],
)
def test_a_wrong_flag_is_named(server, flags, message):
    with pytest.raises((ValueError, OSError), match=message):
        server.main(["--port", "0", *flags])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="limits a running process as Linux does")
def test_a_process_without_files_says_so_once_and_recovers(tmp_path):
    import resource

    command = [sys.executable, "server.py", "--port", "0", "--model_path", str(save_tiny_model(tmp_path / "model"))]
    command += ["--lang", "en"]
    with (
        open(tmp_path / "err", "w+", encoding="utf-8") as err,
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=err, text=True) as process,
    ):
        try:
            url = next(line.split()[2] for line in process.stdout if line.startswith("serving on "))
            address = ("127.0.0.1", int(url.rpartition(":")[2]))
            files = max(int(path.name) for path in Path(f"/proc/{process.pid}/fd").iterdir()) + 4
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (files, files))

            def errors() -> list[str]:
                lines = (tmp_path / "err").read_text(encoding="utf-8").splitlines()
                return [line for line in lines if not line.startswith(("note: ", "compiling "))]

            connections = [socket.create_connection(address, timeout=60) for _ in range(20)]
            deadline = time.monotonic() + 30
            while not errors():
                assert time.monotonic() < deadline, "nothing is said"
                time.sleep(0.05)
            time.sleep(2.5)  # asyncio tries again every second
            for connection in connections:
                connection.close()
            with urllib.request.urlopen(f"{url}/health", timeout=60) as response:
                assert response.status == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
        assert len(errors()) == 1, errors()
        assert errors()[0].startswith("ERROR: no connection can be accepted: Too many open files; raise the limit")


class SocketWithoutFiles(socket.socket):
    """A listening socket of a process that may open no more files."""

    def accept(self):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


@pytest.mark.skipif(os.name == "nt", reason="the event loop of POSIX")
def test_a_port_that_closes_while_there_are_no_files_leaves_no_traceback(caplog):
    """asyncio listens again after a second, on a socket that is closed by then: 310 lines when the server stopped."""

    async def test() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(LoopErrors())
        with SocketWithoutFiles() as sock:
            sock.bind(("127.0.0.1", 0))
            sock.listen()
            server = await loop.create_server(asyncio.Protocol, sock=sock)
            with socket.create_connection(sock.getsockname(), timeout=60):
                await wait_until(lambda: caplog.records)
            server.close()
        await asyncio.sleep(1.5)
        loop.call_exception_handler({"message": "another error"})

    asyncio.run(test())
    said, another = (record.getMessage() for record in caplog.records)
    assert said.startswith("no connection can be accepted: ") and another.startswith("another error")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_the_process_cancels_for_clients_that_left_and_finishes_admitted_requests_at_sigterm(tmp_path):
    folder = save_tiny_model(tmp_path / "model", endless_model())
    command = [sys.executable, "server.py", "--port", "0", "--model_path", str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            url = ""
            for line in process.stdout:
                if line.startswith("serving on "):  # when the model is ready
                    url = line.split()[2]
                if line.lstrip().startswith("Windows"):
                    break
            assert '\\"context\\": \\"\\u4f60\\u597d\\"' in line
            host, port = url.removeprefix("http://").split(":")
            body = json.dumps({"context": "一", "maxlength": 1000, "samples": 32}).encode()
            head = f"POST / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"

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
            assert left_after < (time.monotonic() - start) / 2, (
                "the slots of a client that had disconnected were not freed"
            )
            assert answer.startswith(b"HTTP/1.1 200 OK")
            assert len(json.loads(answer.partition(b"\r\n\r\n")[2])) == 32
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0
    assert out.strip() == "stopped"
    assert all(line.startswith(("note: ", "compiling ")) for line in err.splitlines()), err
