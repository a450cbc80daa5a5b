"""What a server shows to strangers, and whom it answers: headers, names, sites, keys."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from served import GOOD, check_error, check_good, events, raw, served, wait_until
from tiny_model import endless_model, save_tiny_model, tiny_model, tiny_tokenizer

from gpt2_chinese.decoding.completion import Prompt, SamplingParams
from gpt2_chinese.decoding.engine import Engine
from gpt2_chinese.serving import openai_completions, writing
from gpt2_chinese.serving.answer_size import largest_detokenize_answer, largest_tokenize_answer, longest_token_bytes
from gpt2_chinese.serving.flags import parse_args
from gpt2_chinese.serving.hosts import LOOPBACK_NAMES, allowed_hosts, name_of
from gpt2_chinese.serving.keys import hide_keys, read_admin_keys, read_keys
from gpt2_chinese.serving.openai_completions import OpenAICompletion
from gpt2_chinese.serving.responses import EncodedItems
from gpt2_chinese.serving.service import MAX_TOKENIZE_REQUESTS
from gpt2_chinese.text.word_tokenizer import BYTE_TOKENS

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def server(script):
    return script("server")


def test_every_response_has_the_headers_of_owasp_and_no_versions(server):
    async def test(client):
        heads = []
        for method, path in (
            ("GET", "/"),
            ("GET", "/health"),
            ("POST", "/generate"),
            ("GET", "/nothing"),
            ("PUT", "/"),
        ):
            async with client.request(method, path, json=GOOD if method == "POST" else None) as response:
                heads.append({name.lower(): value for name, value in response.headers.items()})
        for data in (b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01 TLS\r\n\r\n"):
            head = (await raw(client, data, wait=1)).partition(b"\r\n\r\n")[0].decode()
            heads.append({line.partition(": ")[0].lower(): line.partition(": ")[2] for line in head.split("\r\n")[1:]})
        for head in heads:
            assert head["x-content-type-options"] == "nosniff" and head["x-frame-options"] == "DENY", head
            assert "frame-ancestors 'none'" in head["content-security-policy"], head
            assert head["server"] == "gpt2-chinese", head

    served(test)


def test_names_that_are_not_the_servers_are_refused_on_loopback(server):
    async def test(client):
        client.service.hosts = allowed_hosts("127.0.0.1", "gpt.example, b.example", "127.0.0.1")
        for host in ("127.0.0.1", "localhost:5005", "[::1]:80", "GPT.example", "gpt.example.:443"):
            async with client.post("/generate", json=GOOD, headers={"Host": host}) as response:
                assert response.status == 200, host
        for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:5005", ""):
            for method, path in (("POST", "/generate"), ("GET", "/health"), ("GET", "/")):
                async with client.request(method, path, headers={"Host": host}) as response:
                    await check_error(response, 421, "wrong_host")

    served(test)
    assert allowed_hosts("0.0.0.0", "", "0.0.0.0") is None and allowed_hosts("127.0.0.1", "*", "127.0.0.1") is None
    assert allowed_hosts("::1", "", "::1") == LOOPBACK_NAMES
    assert "a" in (allowed_hosts("0.0.0.0", "a", "0.0.0.0") or ())
    # A name, or another way to write an address, is what it stands for.
    for host, address in (("127.1", "127.0.0.1"), ("My-Laptop", "127.0.1.1"), ("v6", "::1"), ("m", "::ffff:127.0.0.1")):
        assert allowed_hosts(host, "", address) == LOOPBACK_NAMES | {host.lower()}
    assert [name_of(one) for one in ("[::1]", "A.b:1", "a.")] == ["::1", "a.b", "a"]


def test_a_name_that_is_not_the_servers_is_refused_under_overload_too(server):
    engine = Engine(endless_model(), tiny_tokenizer(), max_num_seqs=1, max_waiting=2)

    async def test(client):
        client.service.hosts = allowed_hosts("127.0.0.1", "", "127.0.0.1")
        busy = asyncio.create_task(client.post("/generate", json={"context": "一", "maxlength": 100_000, "samples": 3}))
        await wait_until(lambda: engine.running and engine.waiting == 2)
        for host, status in (("localhost", 429), ("evil.example", 421), ("127.0.0.1:80", 429)):
            head = f"POST /generate HTTP/1.1\r\nHost: {host}\r\nContent-Length: 2\r\n\r\n{{}}"
            assert (await raw(client, head.encode(), wait=0.3)).startswith(f"HTTP/1.1 {status} ".encode())
        busy.cancel()

    served(test, engine=engine, length=100_000)


def test_only_the_completing_routes_can_be_read_by_other_sites(server):
    async def test(client):
        headers = {"Origin": "https://a.example"}
        for path in ("/generate", "/"):
            async with client.post(path, json=GOOD, headers=headers) as response:
                assert response.headers["Access-Control-Allow-Origin"]
        for path in ("/health", "/metrics", "/v1/models", "/openapi.json"):
            async with client.get(path, headers=headers) as response:
                assert response.status == 200 and "Access-Control-Allow-Origin" not in response.headers, path

    served(test)


def test_an_expect_header_is_answered_alike_for_every_method(server):
    async def test(client):
        for method in ("GET", "POST"):
            answer = await raw(
                client, f"{method} / HTTP/1.1\r\nHost: x\r\nExpect: 5\r\nContent-Length: 0\r\n\r\n".encode(), wait=1
            )
            assert (
                answer.startswith(b"HTTP/1.1 417") and b"application/json" in answer and b"expectation_failed" in answer
            )

    served(test)


def test_a_slow_but_steady_reader_gets_the_whole_answer(server):
    """It was cut off after --body_timeout seconds, however much it had read."""
    engine = Engine(endless_model(), tiny_tokenizer(), max_num_seqs=32)

    async def test(client):
        body = json.dumps({"context": "一" * 2000, "maxlength": 100, "samples": 32}).encode()
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(connection, (client.host, client.port))
            head = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
            await loop.sock_sendall(connection, head + body)
            received, begin = b"", time.monotonic()
            while part := await loop.sock_recv(connection, 4096):
                received += part
                await asyncio.sleep(0.03)
        assert time.monotonic() - begin > 1
        assert len(json.loads(received.partition(b"\r\n\r\n")[2])) == 32

    served(test, engine=engine, body_seconds=0.5, send_buffer=4096)


def test_a_key_is_compared_as_it_was_sent(server, tmp_path):
    """A byte that is not UTF-8 became a question mark, so that it opened a server whose key has one there."""

    async def test(client):
        for sent, status in ((b"k?", 200), (b"k\xff", 401), (b"k\xc3", 401), ("k\ufffd".encode(), 401)):
            head = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer " + sent
            body = json.dumps(GOOD).encode()
            answer = await raw(client, head + b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            assert answer.startswith(b"HTTP/1.1 %d" % status), sent

    served(test, keys=(b"k?",))
    file = tmp_path / "keys"
    file.write_bytes(b"good\nk\xff\n")
    with pytest.raises(ValueError, match="--api_key_file .*keys is not UTF-8 at byte 6"):
        read_keys(parse_args(["--api_key_file", str(file)]))
    file.write_bytes("\ufeffgood\n".encode())
    assert read_keys(parse_args(["--api_key_file", str(file)])) == (b"good",)


def test_an_admin_key_opens_nothing_but_admin_and_without_one_there_is_no_admin(server, monkeypatch):
    async def closed(client):
        async with client.post("/admin/reload", json={}) as response:
            await check_error(response, 404, "not_found")

    served(closed)
    monkeypatch.setenv("GPT2_CHINESE_ADMIN_KEY", "b\nc")
    assert read_admin_keys(parse_args(["--admin_key", "a"])) == (b"a", b"b", b"c")


def test_keys_leave_the_command_line(monkeypatch):
    monkeypatch.delenv("GPT2_CHINESE_API_KEY", raising=False)
    argv = [
        "python",
        "server.py",
        "--api_key",
        "a",
        "--port",
        "1",
        "--api_key=b",
        "--api_key_file",
        "f",
        "--admin_key",
        "c",
    ]
    rest, keys = hide_keys(argv)
    assert rest == ["python", "server.py", "--port", "1", "--api_key_file", "f"]
    assert keys == {"GPT2_CHINESE_API_KEY": "a\nb", "GPT2_CHINESE_ADMIN_KEY": "c"}


def test_the_smallest_top_p_is_the_narrowest():
    with Engine(tiny_model(), tiny_tokenizer(), max_num_seqs=8) as engine:
        texts = [
            [one.text for one in request.future.result(60)]
            for top_p in (1e-50, 1e-30, 1e-9)
            if (
                request := engine.submit(
                    Prompt("一", (2, 40), 0, 1),
                    samples=4,
                    length=9,
                    seed=1,
                    sampling_params=SamplingParams(top_k=0, top_p=top_p, temperature=3),
                )
            )
        ]
    assert texts[0] == texts[1] == texts[2] and len(set(texts[0])) == 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks at processes as Linux shows them")
def test_a_server_outlives_the_reader_of_its_output_and_shows_no_key(tmp_path):
    folder = save_tiny_model(tmp_path / "tiny", tiny_model())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--model_path", str(folder), "--port", str(port), "--device", "cpu", "--api_key", "s3cret"]
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    command = [sys.executable, str(ROOT / "server.py"), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"settings: ")
        process.stdout.close()  # as `head -1` does
        status, deadline = 0, time.monotonic() + 60
        try:
            while status != 200 and process.poll() is None and time.monotonic() < deadline:
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
                        status = response.status
                except (urllib.error.URLError, ConnectionError):
                    time.sleep(0.05)
            assert status == 200 and process.poll() is None
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    assert b"s3cret" not in path.read_bytes()
                except (FileNotFoundError, ProcessLookupError):
                    continue
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()


def test_health_and_a_good_request_go_on_without_room_for_answers(server):
    """Of all answers together only so many bytes are under way."""
    engine = Engine(endless_model(), tiny_tokenizer(), max_num_seqs=8)

    async def test(client):
        busy = asyncio.create_task(client.post("/generate", json={"context": "一", "maxlength": 1000, "samples": 8}))
        await wait_until(lambda: engine.running)
        async with client.post("/generate", json={"context": "一", "maxlength": 1000, "samples": 8}) as response:
            assert response.headers["Retry-After"]
            await check_error(response, 429, "full")
        busy.cancel()
        await wait_until(lambda: not engine.running and not client.service.pending_bytes)
        await check_good(client)
        async with client.post("/generate", json={"context": "一", "maxlength": 1000, "samples": 32}) as response:
            await check_error(response, 400, "answer_too_large", "maxlength")

    served(test, engine=engine, answer_bytes=100_000, pending_bytes=100_000)


def test_texts_that_are_tokenized_count_until_their_tokens_are_read(server):
    """Answers of /tokenize were bounded by nothing, and made in the event loop."""
    engine = Engine(tiny_model(), tiny_tokenizer(), max_num_seqs=4)
    fields = {"prompt": "一" * 20_000, "return_token_strs": True}
    size = largest_tokenize_answer(fields["prompt"], longest_token_bytes(engine.tokenizer.vocabulary), with_names=True)

    async def test(client):
        body = json.dumps(fields, ensure_ascii=False).encode()
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((client.host, client.port))
            connection.sendall(b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            await wait_until(lambda: client.service.pending_bytes == size)
            await asyncio.sleep(0.5)
            assert client.service.pending_bytes == size
            for path, more in (("/tokenize", fields), ("/detokenize", {"tokens": [7] * 20_000})):
                async with client.post(path, json=more) as response:
                    assert response.headers["Retry-After"]
                    await check_error(response, 429, "full")
        await wait_until(lambda: not client.service.pending_bytes)
        async with client.post("/tokenize", json=fields) as response:
            answer = await response.read()
        assert json.loads(answer)["count"] == 20_001 and len(answer) <= size
        for path, more, field in (
            ("/tokenize", {**fields, "prompt": "一" * 21_000}, "prompt"),
            ("/detokenize", {"tokens": [7] * 300_000}, "tokens"),
        ):
            async with client.post(path, json=more) as response:
                await check_error(response, 400, "answer_too_large", field)
        client.service.models[0].tokenize_requests = MAX_TOKENIZE_REQUESTS
        async with client.post("/tokenize", json={"prompt": "一"}) as response:
            await check_error(response, 429, "full")

    limits = {"answer_bytes": size, "pending_bytes": size + 1000, "body_bytes": 1 << 20, "body_seconds": 30.0}
    served(test, engine=engine, send_buffer=4096, **limits)


@pytest.mark.parametrize("text", ["각" * 30, "İ", "\x01", "Å\u212b", "hello", "一 丁", '"\\\n', ""])
@pytest.mark.parametrize("words", [None, ["一", *BYTE_TOKENS]])
def test_no_tokens_are_more_than_was_computed(text, words):
    tokenizer = tiny_tokenizer(words=words)
    ids = [tokenizer.marks.begin, *tokenizer.encode(text)]
    names = [tokenizer.vocabulary[id_] for id_ in ids]
    token_bytes = longest_token_bytes(tokenizer.vocabulary)
    for with_names in (False, True):
        answer = {"count": len(ids), "max_model_len": 1024, "tokens": ids, "token_strs": names if with_names else None}
        size = len(json.dumps(answer, ensure_ascii=False).encode())
        assert size <= largest_tokenize_answer(text, token_bytes, with_names=with_names)
    answer = {"prompt": tokenizer.decode(ids)}
    assert len(json.dumps(answer, ensure_ascii=False).encode()) <= largest_detokenize_answer(ids, token_bytes)


def test_large_answers_are_encoded_in_a_thread_of_their_own_and_prompts_once(server, monkeypatch):
    """Each sample's first chunk repeats the logprobs of the prompt: 4.9 MB for 24 samples stopped all others."""
    engine = Engine(endless_model(), tiny_tokenizer(), max_num_seqs=8)
    body = {
        "prompt": ["一丁七", "万"],
        "n": 8,
        "max_tokens": 20,
        "logprobs": 5,
        "echo": True,
        "seed": 1,
        "temperature": 5,
    }
    calls: list[tuple[str, str]] = []

    def recorded(owner: type, name: str) -> None:
        function = getattr(owner, name)

        def call(*args: object, **kwargs: object) -> object:
            calls.append((name, threading.current_thread().name))
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    async def chunks(client) -> list[list[dict]]:
        """The choices of each sample: its chunks in a stream, and then its whole."""
        async with client.post("/v1/completions", json=body | {"stream": True}) as response:
            found = [data["choices"][0] for _, data in await events(response) if data != "[DONE]"]
        async with client.post("/v1/completions", json=body) as response:
            assert response.status == 200, await response.text()
            found += (await response.json())["choices"]
        return [[one for one in found if one["index"] == index] for index in range(16)]

    async def test(client):
        recorded(OpenAICompletion, "delta")
        recorded(OpenAICompletion, "body")
        recorded(OpenAICompletion, "_prompt_arrays")
        large = await chunks(client)
        assert {name for name, _ in calls} == {"delta", "body", "_prompt_arrays"}
        assert all(thread.startswith("encoding") for _, thread in calls), calls
        inline = 1 << 40
        monkeypatch.setattr(writing, "MAX_INLINE_ANSWER", inline)
        monkeypatch.setattr(openai_completions, "MAX_INLINE_ANSWER", inline)
        assert await chunks(client) == large

    encoded: list[EncodedItems] = []
    of = EncodedItems.of
    monkeypatch.setattr(EncodedItems, "of", lambda items: encoded.append(of(items)) or encoded[-1])
    served(test, engine=engine)
    assert len(encoded) == 2 * 2 * 4  # answers, prompts, arrays
