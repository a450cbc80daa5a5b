"""Whole processes of server.py among hostile files and requests: nothing runs, nothing grows, nobody waits."""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from pathlib import Path

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import endless_model, save_tiny_model

from benchmarks import serving
from gpt2_chinese.decoding.completion import SamplingParams
from gpt2_chinese.serving.answer_size import largest_answer, longest_token_bytes
from gpt2_chinese.serving.api import CompletionRequest
from gpt2_chinese.serving.responses import json_pieces

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks at processes as Linux shows them"),
]
HOSTILE = ("signal", "enum", "types", "collections", "re", "os", "struct", "logging", "torch", "numpy", "json", "site")


def write_hostile_modules(folder: Path) -> Path:
    """Modules that leave a mark when they are imported; gives the mark's path."""
    mark = folder / "it_ran"
    for name in HOSTILE:
        (folder / f"{name}.py").write_text(f"open({str(mark)!r}, 'a').write({name!r})\nraise SystemExit(1)\n")
    return mark


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A server that was started in its model folder, which is full of modules with the names of Python's own."""
    folder = save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", endless_model())
    mark = write_hostile_modules(folder)
    before = os.getcwd()
    os.chdir(folder)
    try:
        server = serving.Server(".", "--device", "cpu")
    finally:
        os.chdir(before)
    with server:
        yield server, folder, mark


def run(test):
    return asyncio.run(test())


async def post(session: aiohttp.ClientSession, path: str, **fields) -> tuple[int, bytes]:
    async with session.post(path, json=fields) as response:
        return response.status, await response.read()


def test_modules_in_the_folder_that_one_stands_in_do_not_run(hostile):
    server, _, mark = hostile
    assert len(server.processes()) == 2 and not mark.exists()


def test_processes_that_are_not_forked_do_not_run_the_folders_modules_either(tmp_path, monkeypatch):
    import multiprocessing

    from gpt2_chinese.parallel import safe_folder

    mark = write_hostile_modules(tmp_path)
    monkeypatch.chdir(tmp_path)
    with safe_folder() as folder:
        process = multiprocessing.get_context("spawn").Process(target=os.getpid)
        process.start()
    process.join(60)
    assert process.exitcode == 0 and not mark.exists()
    assert (os.getcwd(), folder) == (str(tmp_path), str(tmp_path))


def test_weights_that_are_truncated_or_overwritten_while_they_are_served_are_not_those_that_answer(hostile):
    server, folder, _ = hostile
    fields = {"context": "一丁", "maxlength": 20, "samples": 2, "seed": 5}

    async def test() -> None:
        async with serving.open_session(server.url) as session:
            first = await post(session, "/generate", **fields)
            weights = folder / "model.safetensors"
            kept = weights.read_bytes()
            for content in (os.urandom(len(kept)), b""):
                with open(weights, "r+b") as file:
                    file.truncate(len(content))
                    file.write(content)
                assert await post(session, "/generate", **fields) == first
            weights.write_bytes(kept)
        assert first[0] == 200
        assert "model.safetensors" not in "".join(
            Path(f"/proc/{pid}/maps").read_text(encoding="utf-8") for pid in server.processes()
        )

    run(test)


def test_health_answers_beside_the_largest_answers_and_larger_ones_are_refused(hostile):
    """{"prompt": ["孩子"] * 16, "n": 32, ...} was answered with 95 MB, and nobody else for four seconds."""
    server, _, _ = hostile
    large = {"n": 32, "logprobs": 5, "temperature": 10, "top_k": 0, "seed": 1}

    async def test() -> None:
        async with serving.open_session(server.url) as session:
            health: list[float] = []
            watching = asyncio.create_task(serving.watch_health(session, health))
            status, body = await post(session, "/v1/completions", prompt=["孩子"] * 16, max_tokens=1024, **large)
            assert status == 400 and json.loads(body)["error"]["code"] == "answer_too_large", body
            answers = await asyncio.gather(
                *(post(session, "/v1/completions", prompt="孩子", max_tokens=100, **large) for _ in range(2))
            )
            watching.cancel()
        assert [status for status, _ in answers] == [200] * 2
        choices = json.loads(answers[0][1])["choices"]
        assert len(choices) == 32 and all(len(choice["logprobs"]["tokens"]) == 100 for choice in choices)
        assert all(len(top) >= 5 for choice in choices for top in choice["logprobs"]["top_logprobs"])
        # Under 50 ms on a machine that does nothing else, see benchmarks/soak.py.
        assert sorted(health)[int(0.9 * len(health))] < 0.25, health

    run(test)


def test_short_contexts_do_not_wait_behind_long_ones_and_random_ones_leave_no_memory(hostile):
    server, _, _ = hostile
    source = random.Random(1)

    def long(alphabet: str) -> str:
        return "".join(source.choices(alphabet, k=60_000))

    async def test() -> None:
        async with serving.open_session(server.url) as session:
            small = {"maxlength": 1, "samples": 1, "seed": 1}
            for _ in range(10):
                await post(session, "/generate", context=long("0123456789"), **small)
            before = server.resources()["megabytes"]
            waiting = [
                asyncio.create_task(post(session, "/generate", context=long(alphabet), **small))
                for alphabet in ["abcdefghij", "0123456789"] * 10
            ]
            await asyncio.sleep(0.3)
            begin = time.perf_counter()
            assert (await post(session, "/generate", context="一丁" * 300, **small))[0] == 200
            took = time.perf_counter() - begin
            unfinished = sum(not task.done() for task in waiting)
            assert [(await task)[0] for task in waiting] == [200] * 20
            assert unfinished > 5 and took < 1.5
            assert server.resources()["megabytes"] < before + 60

    run(test)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=300),
    lambda inside: st.lists(inside, max_size=5) | st.dictionaries(st.text(max_size=5), inside, max_size=4),
    max_leaves=40,
)


@settings(max_examples=50)
@given(values, st.integers(1, 700))
def test_json_in_pieces_is_json(value, count):
    for one in (value, [value] * count, {"choices": [{"a": [1.5] * count, "b": value}], "c": value}):
        assert "".join(json_pieces(one)) == json.dumps(one, ensure_ascii=False)


@settings(max_examples=50)
@given(st.integers(1, 4), st.integers(0, 20), st.none() | st.integers(0, 5), st.booleans())
def test_no_answer_is_larger_than_what_was_computed(samples, length, logprobs, scored):
    tokens = ["你", '"' * 7, "\u0001", "##ing", "[UNK]", "�"]
    longest = max(tokens, key=lambda token: len(json.dumps(token, ensure_ascii=False).encode()))
    scored = scored and logprobs is not None
    contexts = ("上文\n", (3, 4, 5))
    request = CompletionRequest(contexts, length, samples, SamplingParams(), 0, logprobs=logprobs, scored=scored)
    number = -sys.float_info.max
    many = length + (4 if scored else 0)
    top = {f"{place}"[:1] + longest[1:]: number for place in range((logprobs or 0) + 1)}
    choices = [
        {
            "text": (context if isinstance(context, str) else longest * 3) + (" " + longest) * length,
            "index": 0,
            "logprobs": None
            if logprobs is None
            else {
                "tokens": [longest] * many,
                "token_logprobs": [number] * many,
                "top_logprobs": [top] * many if logprobs else None,
                "text_offset": [123456] * many,
            },
            "finish_reason": "length",
        }
        for context in contexts
        for _ in range(samples)
    ]
    size = len(json.dumps(choices, ensure_ascii=False).encode())
    assert size <= largest_answer(request, longest_token_bytes(tokens), n_ctx=8)
