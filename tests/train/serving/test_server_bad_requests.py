"""Bad requests of every kind over real sockets: the error names the field, and a good request works after each."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import time

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from served import GOOD, Client, check_error, check_good, error_of, raw, served, wait_until
from tiny_model import endless_model, tiny_tokenizer

from gpt2_chinese.decoding.engine import Engine
from gpt2_chinese.serving.api import (
    CompletionRequest,
    Limits,
    generate_fields,
    parse_generate,
    parse_v1,
    v1_fields,
)
from gpt2_chinese.serving.errors import ApiError

V1_GOOD = {"prompt": "一丁", "max_tokens": 6, "n": 2, "seed": 1, "top_k": 30}
VOCAB_SIZE = 200


@pytest.fixture(scope="module", autouse=True)
def server(script):
    return script("server")


async def check_both(client: Client) -> None:
    """A good request of both kinds; with the same settings they give the same texts."""
    texts = await check_good(client)
    async with client.post("/v1/completions", json=V1_GOOD) as response:
        assert response.status == 200, await response.text()
        assert ["一丁" + choice["text"] for choice in (await response.json())["choices"]] == texts


CONTEXT = '"context": "一丁"'
SETTINGS_OF_BOTH = [
    *(
        (name, value, "wrong_type")
        for name in ("min_p", "presence_penalty", "frequency_penalty")
        for value in ('"1"', "true")
    ),
    *((name, value, "wrong_type") for name in ("no_repeat_ngram_size", "min_tokens") for value in ("1.5", '"3"', "[]")),
    *((name, value, "wrong_type") for name in ("ignore_eos", "distinct") for value in ("1", '"true"')),
    ("min_p", -0.1, "out_of_range"),
    ("min_p", 1.1, "out_of_range"),
    ("presence_penalty", 2.5, "out_of_range"),
    ("frequency_penalty", -2.5, "out_of_range"),
    ("no_repeat_ngram_size", -1, "out_of_range"),
    ("no_repeat_ngram_size", 1001, "out_of_range"),
    ("min_tokens", -1, "out_of_range"),
    ("min_tokens", 2**31, "out_of_range"),
    ("until", '"paragraph"', "out_of_range"),
    ("until", "5", "wrong_type"),
    ("logit_bias", "[]", "wrong_type"),
    ("logit_bias", '{"5": "1"}', "wrong_type"),
    ("logit_bias", '{"5": true}', "wrong_type"),
    ("logit_bias", '{"5": 101}', "out_of_range"),
    ("logit_bias", '{"200": 1}', "out_of_range"),
    ("logit_bias", '{"-1": 1}', "out_of_range"),
    ("logit_bias", '{"05": 1}', "out_of_range"),
    ("logit_bias", '{"\u0665": 1}', "out_of_range"),
    ("logit_bias", '{"' + "9" * 30 + '": 1}', "out_of_range"),
    ("logit_bias", json.dumps({str(id_): 1 for id_ in range(301)}), "out_of_range"),
    ("bad_words", '"一"', "wrong_type"),
    ("bad_words", "[5]", "wrong_type"),
    ("bad_words", '[""]', "out_of_range"),
    ("bad_words", '["  "]', "out_of_range"),
    ("bad_words", '["' + "一" * 65 + '"]', "out_of_range"),
    ("bad_words", json.dumps(["一"] * 33), "out_of_range"),
    ("bad_words", '["\\ud800"]', "invalid_character"),
    ("stop_token_ids", "5", "wrong_type"),
    ("stop_token_ids", "[5.5]", "wrong_type"),
    ("stop_token_ids", "[true]", "wrong_type"),
    ("stop_token_ids", "[200]", "out_of_range"),
    ("stop_token_ids", "[-1]", "out_of_range"),
    ("stop_token_ids", json.dumps([5] * 33), "out_of_range"),
]
"""Settings that /generate and /v1/completions share."""

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
        for value in ('"5"', "true", "5.5", "1e-3", "1e999", "[5]", "{}")
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
    # stop and stream
    *(
        (f'{{{CONTEXT}, "{name}": {value}}}', code, name)
        for name, value, code in [
            *SETTINGS_OF_BOTH,
            ("sort", '"newest"', "out_of_range"),
            ("sort", 1, "wrong_type"),
            ("scores", 1, "wrong_type"),
            ("best_of", 2, "unknown_field"),
            ("stop", 5, "wrong_type"),
            ("stop", "{}", "wrong_type"),
            ("stop", '["一", 5]', "wrong_type"),
            ("stop", "[null]", "wrong_type"),
            ("stop", '""', "out_of_range"),
            ("stop", '["一", ""]', "out_of_range"),
            ("stop", '["1", "2", "3", "4", "5"]', "out_of_range"),
            ("stop", '"' + "一" * 257 + '"', "out_of_range"),
            ("stop", '"\\ud800"', "invalid_character"),
            ("stream", 1, "wrong_type"),
            ("stream", '"true"', "wrong_type"),
            ("stream", "[]", "wrong_type"),
        ]
    ),
]
NOT_ABOUT_FIELDS = {"empty_body", "invalid_json", "not_utf8", "not_an_object", "duplicate_field"}

PROMPT = '"prompt": "一丁"'
V1_BAD_BODIES = [
    *((body, code, param) for body, code, param in BAD_BODIES if code in NOT_ABOUT_FIELDS),
    # prompt
    ("{}", "missing_field", "prompt"),
    ('{"context": "一丁"}', "unknown_field", "context"),
    ('{"prompt": null}', "missing_field", "prompt"),
    ('{"prompt": []}', "out_of_range", "prompt"),
    ('{"prompt": [[]]}', "out_of_range", "prompt"),
    ('{"prompt": [""' + ', ""' * 16 + "]}", "out_of_range", "prompt"),
    ('{"prompt": "\\ud800"}', "invalid_character", "prompt"),
    ('{"prompt": ["一", "\\udc00"]}', "invalid_character", "prompt"),
    *(
        (f'{{"prompt": {value}}}', "wrong_type", "prompt")
        for value in (
            "5",
            "true",
            "{}",
            '["一", 5]',
            '[5, "一"]',
            "[5.5]",
            "[true]",
            "[null]",
            '[[5], "一"]',
            "[[[5]]]",
        )
    ),
    *(
        (f'{{"prompt": {value}}}', "out_of_range", "prompt")
        for value in ("[-1]", "[200]", "[[5], [200]]", f"[{9**99}]")
    ),
    # what OpenAI's clients may send and this server does not have
    *(
        (f'{{{PROMPT}, "{name}": {value}}}', "unsupported", name)
        for name, value in [
            ("suffix", '"。"'),
            ("suffix", "[]"),
        ]
    ),
    *((f'{{{PROMPT}, "{name}": {value}}}', code, name) for name, value, code in SETTINGS_OF_BOTH),
    (f'{{{PROMPT}, "n": 3, "best_of": 2}}', "out_of_range", "best_of"),
    (f'{{{PROMPT}, "best_of": 2, "stream": true}}', "unsupported", "best_of"),
    (f'{{{PROMPT}, "max_completion_tokens": 0}}', "out_of_range", "max_completion_tokens"),
    (f'{{{PROMPT}, "sort": "likely"}}', "unknown_field", "sort"),
    (f'{{{PROMPT}, "max_tokens": 0, "echo": true}}', "out_of_range", "max_tokens"),
    (f'{{{PROMPT}, "max_tokens": 0, "logprobs": 1}}', "out_of_range", "max_tokens"),
    (f'{{{PROMPT}, "logit_bias": []}}', "wrong_type", "logit_bias"),
    (f'{{{PROMPT}, "messages": []}}', "unknown_field", "messages"),
    (f'{{{PROMPT}, "maxlength": 5}}', "unknown_field", "maxlength"),
    (f'{{{PROMPT}, "stream_options": 1}}', "wrong_type", "stream_options"),
    (f'{{{PROMPT}, "stream_options": {{"x": 1}}}}', "unknown_field", "stream_options.x"),
    (f'{{{PROMPT}, "stream_options": {{"include_usage": 1}}}}', "wrong_type", "stream_options.include_usage"),
    *(
        (f'{{{PROMPT}, "{name}": {value}}}', "wrong_type", name)
        for name, value in [
            ("model", 5),
            ("user", 5),
            ("echo", 1),
            ("logprobs", "true"),
            ("max_tokens", '"5"'),
            ("n", 1.5),
            ("best_of", '"1"'),
            ("temperature", '"hot"'),
        ]
    ),
    *(
        (f'{{{PROMPT}, "{name}": {value}}}', "out_of_range", name)
        for name, value in [
            ("max_tokens", 0),
            ("max_tokens", -1),
            ("max_tokens", 1025),
            ("n", 0),
            ("n", 33),
            ("best_of", 0),
            ("logprobs", -1),
            ("logprobs", 6),
            ("temperature", 11),
            ("top_p", 2),
            ("top_k", -1),
            ("seed", 2**63),
        ]
    ),
]


@pytest.mark.parametrize("path", ["/generate", "/", "/v1/completions"])
def test_every_bad_body_is_refused_by_name_and_a_good_request_works_after_it(path, caplog):
    table = V1_BAD_BODIES if path == "/v1/completions" else BAD_BODIES

    async def test(client):
        for body, code, param in table:
            data = body if isinstance(body, bytes) else body.encode()
            async with client.post(path, data=data) as response:
                error = await check_error(response, 400, code, param)
                assert param is None or param in ("?", "") or param.split(".")[0] in error["message"]
            await check_both(client)

    assert len(BAD_BODIES) > 100 and len(V1_BAD_BODIES) > 70
    served(test)
    assert not caplog.records


def test_another_model_is_not_there(caplog):
    async def test(client):
        async with client.post("/v1/completions", json=V1_GOOD | {"model": "gpt-4"}) as response:
            error = await check_error(response, 404, "model_not_found", "model")
            assert "tiny" in error["message"]
        async with client.get("/v1/models/gpt-4") as response:
            await check_error(response, 404, "model_not_found", "model")
        await check_both(client)

    served(test)


def test_errors_name_the_value_that_was_expected():
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

    served(test)


def test_ends_of_the_ranges_are_taken():
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
            {"maxlength": 5.0},
        ):
            async with client.post("/generate", json=GOOD | field) as response:
                assert response.status == 200, field

    served(test)


def test_other_paths_and_methods_are_errors_in_the_same_form():
    async def test(client):
        async with client.get("/nothing") as response:
            await check_error(response, 404, "not_found")
        async with client.get("/generate") as response:
            await check_error(response, 405, "method_not_allowed")
            assert "POST" in response.headers["Allow"]
        for method in ("PUT", "DELETE", "PATCH", "TRACE"):
            async with client.request(method, "/") as response:
                await check_error(response, 405, "method_not_allowed")
        async with client.post("/health") as response:
            await check_error(response, 405, "method_not_allowed")
        async with client.head("/generate") as response:
            assert response.status == 405
        await check_good(client)

    served(test)


@pytest.mark.parametrize("path", ["/", "/health", "/metrics", "/openapi.json", "/v1/models", "/v1/models/tiny"])
def test_head_has_the_headers_of_get_and_no_body(path):
    async def test(client):
        async with client.get(path) as response:
            body, of_get = await response.read(), response.headers
        async with client.head(path) as response:
            assert response.status == 200 and await response.read() == b""
            assert response.headers["Content-Type"] == of_get["Content-Type"]
            if path != "/metrics":  # its counters have counted the requests here
                assert int(response.headers["Content-Length"]) == len(body)
        async with client.head(path + "nothing" if path == "/" else path + "/nothing") as response:
            assert response.status == 404
        await check_good(client)

    served(test)


def test_a_body_too_large_is_413_with_and_without_its_length():
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

    served(test, body_bytes=2000)


def test_compressed_bodies_are_415_even_a_bomb():
    async def test(client):
        for encoding in ("gzip", "deflate", "br", "zstd", "identity", "nonsense"):
            data = gzip.compress(b" " * 50_000_000)
            async with client.post("/generate", data=data, headers={"Content-Encoding": encoding}) as response:
                await check_error(response, 415, "unsupported_encoding")
        await check_good(client)

    served(test)


def test_a_body_that_does_not_come_is_408():
    async def test(client):
        start = time.monotonic()
        answer = await raw(client, b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
        assert answer.startswith(b"HTTP/1.1 408 ") and b'"code": "body_timeout"' in answer
        assert time.monotonic() - start < 4
        await check_good(client)

    served(test, body_seconds=0.2)


HEAD = b"POST /generate HTTP/1.1\r\nHost: x\r\n"
BAD_HTTP = [
    HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
    HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    HEAD + b"Transfer-Encoding: gzip, nonsense\r\n\r\n{}",
    HEAD + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    HEAD + b"Content-Length: -5\r\n\r\n{}",
    HEAD + b"Content-Length: +2\r\n\r\n{}",
    HEAD + b"Content-Length: 0x2\r\n\r\n{}",
    HEAD + b"Content-Length: two\r\n\r\n{}",
    HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    HEAD + b"Content-Length: 99999999999999999999\r\n\r\n{}",
    HEAD + b"Expect: tea\r\nContent-Length: 2\r\n\r\n{}",
    HEAD + b"X: " + b"a" * 20_000 + b"\r\n\r\n",
    HEAD + b"X: y\r\n" * 2000 + b"\r\n",
    HEAD + b"X : y\r\n\r\n",
    HEAD + b": y\r\n\r\n",
    HEAD + b"no colon\r\n\r\n",
    HEAD + b"X: a\x00b\r\n\r\n",
    HEAD + b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
    b"POST /generate HTTP/9.9\r\nHost: x\r\n\r\n",
    b"POST /generate HTTP/1\r\nHost: x\r\n\r\n",
    b"POST /generate\r\n\r\n",
    b"POST  /generate HTTP/1.1\r\nHost: x\r\n\r\n",
    b"P@ST /generate HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /%ff%fe HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET http://[::1 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"\x00" * 100,
    b"nonsense\r\n\r\n",
    "你好\r\n\r\n".encode(),
]


def test_bytes_that_are_not_http_get_a_4xx_in_json_and_no_traceback(caplog):
    async def test(client):
        for request_bytes in BAD_HTTP:
            answer = await raw(client, request_bytes, wait=0.5)
            head, _, body = answer.partition(b"\r\n\r\n")
            assert re.match(rb"HTTP/\d\.\d 4\d\d ", answer), (request_bytes, answer)
            assert json.loads(body)["error"]["message"] and b"Traceback" not in answer, request_bytes
            await check_good(client)

    served(test, idle_seconds=0.3, body_seconds=0.3)
    assert not caplog.records


def test_expect_100_continue_is_answered_before_the_body(caplog):
    async def test(client):
        body = json.dumps(GOOD).encode()
        head = HEAD + b"Expect: 100-Continue\r\nContent-Length: %d\r\n\r\n" % len(body)
        answer = await raw(client, head + body, wait=0.5)
        assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")
        await check_good(client)

    served(test)
    assert not caplog.records


def test_half_of_a_request_is_dropped_in_silence(caplog):
    async def test(client):
        for begin in (b"", b"P", b"POST /gener", HEAD, HEAD + b"X: y\r\n"):
            assert await raw(client, begin, wait=2) == b""
        await check_good(client)

    served(test, idle_seconds=0.2)
    assert not caplog.records


def test_a_client_that_closes_its_half_of_the_connection_is_taken_for_gone(caplog):
    engine = Engine(endless_model(), tiny_tokenizer(), max_num_seqs=8)

    async def test(client):
        body = json.dumps({"context": "一", "maxlength": 1_000_000, "samples": 8}).encode()
        reader, writer = await asyncio.open_connection(client.host, client.port)
        writer.write(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        await wait_until(lambda: engine.running)
        writer.write_eof()
        assert await asyncio.wait_for(reader.read(), 10) == b""
        await wait_until(lambda: not engine.running and not client.service.pending_bytes)
        assert client.service.response_counts == {("/generate", 499): 1}
        writer.close()
        await check_good(client)

    served(test, engine=engine, length=1_000_000)
    assert not caplog.records


def test_a_client_that_leaves_in_the_middle_of_its_body_disturbs_no_one():
    async def test(client):
        for _ in range(20):
            _, writer = await asyncio.open_connection(client.host, client.port)
            writer.write(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
            writer.close()
        await check_good(client)

    served(test)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=5,
)
# Values near what is asked for find more than any value does.
LIKELY = st.sampled_from(
    [0, 1, 5, 0.5, -1, 1e300, "", "一", [], [5], ["一"], [[5]], {}, True, False, None, 2**63, 10**400]
)
NAMES = sorted({*generate_fields(Limits()), *v1_fields(Limits()), "x", "stream_options"})
BODIES = (
    st.dictionaries(st.sampled_from(NAMES), LIKELY | JSON_VALUES, max_size=6)
    | st.builds(
        lambda fields, text: {**fields, "context": text},
        st.dictionaries(st.sampled_from([*generate_fields(Limits())]), LIKELY | JSON_VALUES, max_size=4),
        st.text(),
    )
    | st.builds(
        lambda fields, prompt: {**fields, "prompt": prompt},
        st.dictionaries(st.sampled_from([*v1_fields(Limits())]), LIKELY | JSON_VALUES, max_size=4),
        st.text() | st.lists(st.text() | st.integers(-1, 201), max_size=3),
    )
    | JSON_VALUES
)
PARSERS = [lambda body: parse_generate(body, Limits()), lambda body: parse_v1(body, Limits(), lambda _: VOCAB_SIZE)]


def check_outcome(parse, data: bytes) -> None:
    limits = Limits()
    try:
        completion_request = parse(data)
    except ApiError as error:
        assert error.status == 400 and error.message and error.code
        return
    assert type(completion_request) is CompletionRequest
    assert 1 <= len(completion_request.contexts) <= limits.prompts
    for context in completion_request.contexts:
        assert isinstance(context, str) or (context and all(type(id_) is int for id_ in context))
    assert type(completion_request.samples) is int and 1 <= completion_request.samples <= limits.samples
    assert type(completion_request.length) is int and 1 <= completion_request.length <= limits.length
    setting = completion_request.settings
    assert 0 <= setting.temperature <= 10 and type(setting.top_k) is int and 0 <= setting.top_p <= 1
    assert 0.1 <= setting.repetition_penalty <= 10
    assert len(completion_request.stop) <= 4 and all(isinstance(one, str) and one for one in completion_request.stop)
    assert (
        type(completion_request.stream) is bool
        and type(completion_request.echo) is bool
        and completion_request.logprobs in (None, 0, 1, 2, 3, 4, 5)
    )


@given(BODIES)
@hypothesis_settings(max_examples=300)
def test_parsing_gives_a_completion_request_or_an_api_error_and_nothing_else(value):
    for parse in PARSERS:
        check_outcome(parse, json.dumps(value).encode())


@given(st.binary(max_size=200))
@hypothesis_settings(max_examples=300)
def test_parsing_takes_any_bytes(data):
    for parse in PARSERS:
        check_outcome(parse, data)


def test_any_body_over_http_is_answered_and_never_with_a_5xx(caplog):
    """Hypothesis runs beside the server, which stays up from one example to the next."""
    limits = {"length": 8, "samples": 3}

    async def test(client):
        loop = asyncio.get_running_loop()

        async def post(path: str, body: bytes) -> tuple[int, str]:
            async with client.post(path, data=body) as response:
                return response.status, await response.text()

        @given(
            st.sampled_from(["/generate", "/", "/v1/completions"]), BODIES.map(json.dumps).map(str.encode) | st.binary()
        )
        @hypothesis_settings(max_examples=150, suppress_health_check=list(HealthCheck))
        def ask(path, body):
            status, text = asyncio.run_coroutine_threadsafe(post(path, body), loop).result(30)
            assert status in (200, 400, 404), text
            if status != 200:
                error = json.loads(text)["error"]
                error_of(text, error["code"], error["param"])

        await asyncio.to_thread(ask)
        await check_both(client)

    served(test, **limits)
    assert not caplog.records
