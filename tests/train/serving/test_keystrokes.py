"""An input box before server.py: a context that grows gets the answers of a server without a prefix cache."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families
from served import check_good, served, wait_until
from tiny_model import endless_model, save_tiny_model, tiny_tokenizer

from benchmarks import serving
from gpt2_chinese.decoding.engine import Engine
from gpt2_chinese.serving.flags import check_flags, parse_args

TEXT = "一丁七hello,万丈三上。下不world与丐丑专且丕世丘"


@pytest.fixture(scope="module", autouse=True)
def server(script):
    return script("server")


def engine_with(prefix_cache_bytes: int) -> Engine:
    model = endless_model(n_ctx=64)
    return Engine(model, tiny_tokenizer(), max_num_seqs=8, precision="fp32", prefix_cache_bytes=prefix_cache_bytes)


def requests_of(text: str) -> list[dict]:
    """What a person types, character by character, with a word taken back; the keys are the seeds."""
    typed = [text[:length] for length in range(1, len(text) + 1)]
    typed[12:12] = [typed[11][:-count] for count in (1, 2, 3)]
    return [
        {"context": context, "maxlength": 8, "samples": 3, "seed": number, "sort": "likely"}
        for number, context in enumerate(typed)
    ]


async def values_of(client) -> dict[str, float]:
    """The metrics of the model, by their names."""
    async with client.get("/metrics") as response:
        families = text_string_to_metric_families(await response.text())
    return {sample.name: sample.value for family in families for sample in family.samples if "model" in sample.labels}


def test_typed_contexts_get_the_answers_of_a_server_without_a_cache(server):
    async def type_text(client) -> tuple[list, dict[str, float]]:
        answers = []
        for fields in requests_of(TEXT):
            async with client.post("/generate", json=fields) as response:
                assert response.status == 200
                answers.append(await response.json())
        return answers, await values_of(client)

    expected, without = served(type_text, engine=engine_with(0))
    answers, values = served(type_text, engine=engine_with(1 << 20))
    assert answers == expected
    assert all(value == 0 for name, value in without.items() if name.startswith("gpt2_prefix_cache"))
    assert values["gpt2_prefix_cache_hits_total"] > 15
    tokens = values["gpt2_prefix_cache_reused_tokens_total"]
    assert 0.5 < tokens / values["gpt2_prompt_tokens_total"] < 1
    assert 0 < values["gpt2_prefix_cache_bytes"] <= values["gpt2_prefix_cache_capacity_bytes"] <= 1 << 20


def test_keystrokes_that_replace_one_another_leave_the_cache_as_it_should_be(server):
    """The page cancels a request when the next key is pressed; several people type at once."""

    async def test(client) -> list:
        async def type_and_leave(name: str) -> list:
            for fields in requests_of(name + TEXT):
                request = client.post("/generate", json=fields | {"maxlength": 1000})
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(request, 0.005)
            async with client.post("/generate", json=requests_of(name + TEXT)[-1]) as response:
                return await response.json()

        answers = await asyncio.gather(*map(type_and_leave, "天地人"))
        model = client.service.models[0]
        await wait_until(lambda: model.running == model.waiting == 0)
        await check_good(client)
        return answers

    limits = {"length": 1000}
    assert served(test, engine=engine_with(1 << 20), **limits) == served(test, engine=engine_with(0), **limits)


def test_a_size_below_0_is_named():
    with pytest.raises(ValueError, match="--prefix_cache must be 0 or more megabytes, it is -1"):
        check_flags(parse_args(["--prefix_cache", "-1"]))
    assert parse_args([]).prefix_cache == 256


# Whole processes.


def ask(server: serving.Server, path: str, fields: dict | None = None) -> dict | list:
    data = None if fields is None else json.dumps(fields).encode()
    headers = {"Authorization": "Bearer secret"} if path.startswith("/admin") else {}
    with urllib.request.urlopen(urllib.request.Request(server.url + path, data, headers), timeout=60) as response:
        return json.load(response)


def metrics(server: serving.Server) -> dict[str, float]:
    with urllib.request.urlopen(server.url + "/metrics") as response:
        families = text_string_to_metric_families(response.read().decode())
        return {sample.name: sample.value for family in families for sample in family.samples}


@pytest.mark.slow
def test_the_flag_reaches_the_models_process_and_a_reload_empties_the_cache(tmp_path, monkeypatch):
    folder = str(save_tiny_model(tmp_path / "tiny", endless_model(n_ctx=64)))
    monkeypatch.setenv("GPT2_CHINESE_ADMIN_KEY", "secret")
    answers = {}
    for flags in ([], ["--prefix_cache", "0"]):
        with serving.Server(folder, "--device", "cpu", *flags) as server:
            deadline = time.monotonic() + 120
            while not ask(server, "/health")["full_speed"]:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            found = answers[tuple(flags)] = {}

            def type_text(name: str, server=server, found=found) -> None:
                found[name] = [ask(server, "/generate", fields) for fields in requests_of(name + TEXT)]

            people = [threading.Thread(target=type_text, args=(name,)) for name in "天地人"]
            for person in people:
                person.start()
            for person in people:
                person.join(60)
            values = metrics(server)
            if flags:
                assert values["gpt2_prefix_cache_hits_total"] == values["gpt2_prefix_cache_capacity_bytes"] == 0
                continue
            assert values["gpt2_prefix_cache_hits_total"] > 50 and values["gpt2_prefix_cache_bytes"] > 0
            assert ask(server, "/admin/reload", {}) == {"reloaded": ["tiny"]}
            after = metrics(server)
            assert after["gpt2_prefix_cache_bytes"] == 0 < after["gpt2_prefix_cache_capacity_bytes"]
            assert after["gpt2_prefix_cache_hits_total"] >= values["gpt2_prefix_cache_hits_total"]
            assert ask(server, "/generate", requests_of("天" + TEXT)[-1]) == found["天"][-1]
    assert len(answers[()]) == 3 and answers[()] == answers["--prefix_cache", "0"]
