"""Programs that others wrote as clients of the server: OpenAI's, Schemathesis on /openapi.json, vLLM's load test."""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from served import check_good, served
from tiny_model import endless_model, tiny_tokenizer

from gpt2_chinese.decoding.engine import Engine

openai = pytest.importorskip("openai", reason="the openai package is not installed")


@pytest.fixture(scope="module", autouse=True)
def server(script):
    return script("server")


def with_openai(test, *, keys: tuple[bytes, ...] = (b"secret",), **settings):
    """Run `test(client)` with OpenAI's client, which has the first key, in a thread beside the server."""

    async def run(http):
        def call():
            with openai.OpenAI(base_url=f"{http.url}/v1", api_key=keys[0].decode(), max_retries=0) as client:
                return test(client)

        return await asyncio.to_thread(call)

    return served(run, keys=keys, **settings)


def test_a_completion_and_its_usage():
    def test(client):
        answer = client.completions.create(model="tiny", prompt="一丁", seed=1)
        assert answer.object == "text_completion" and answer.model == "tiny" and answer.id.startswith("cmpl-")
        (choice,) = answer.choices
        assert choice.index == 0 and choice.finish_reason in ("stop", "length") and choice.logprobs is None
        assert answer.usage.prompt_tokens == 3 and 0 < answer.usage.completion_tokens <= 16
        assert answer.usage.total_tokens == 3 + answer.usage.completion_tokens
        again = client.completions.create(model="tiny", prompt="一丁", seed=1, best_of=1, user="me", logit_bias={})
        assert again.choices == answer.choices
        echoed = client.completions.create(model="tiny", prompt="一丁", seed=1, echo=True)
        assert echoed.choices[0].text == "一丁" + choice.text
        other = client.completions.create(model="tiny", prompt="一丁", seed=1, extra_body={"top_k": 1})
        greedy = client.completions.create(model="tiny", prompt="一丁", temperature=0)
        narrow = client.completions.create(model="tiny", prompt="一丁", top_p=0)
        assert other.choices[0].text == greedy.choices[0].text == narrow.choices[0].text
        assert client.completions.create(model="tiny", prompt="一", max_tokens=1, top_p=1).usage.completion_tokens <= 1

    with_openai(test)


def test_several_prompts_and_samples_and_ids_as_prompts():
    tokenizer = tiny_tokenizer()

    def test(client):
        def texts(prompt, n=1, **more):
            answer = client.completions.create(model="tiny", prompt=prompt, n=n, seed=4, max_tokens=8, extra_body=more)
            assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
            return [choice.text for choice in answer.choices]

        three = texts("一丁", n=3)
        assert len(set(three)) == 3
        assert texts("一丁") == texts("一丁", n=3, distinct=False)[:1], "what must differ is drawn otherwise"
        assert texts(["一丁", "七"], n=3) == three + texts("七", n=3)
        ids = [tokenizer.encode("一丁"), tokenizer.encode("七")]
        assert texts(ids[0], n=3) == three
        assert texts(ids, n=3) == three + texts("七", n=3)

    with_openai(test)


def test_a_stream_has_the_text_of_the_answer_and_its_usage():
    def test(client):
        fields = dict(model="tiny", prompt=["一丁", "七"], n=2, seed=3, max_tokens=12, stop=["乐", "丑"], logprobs=2)
        answer = client.completions.create(**fields)
        chunks = list(client.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
        assert len({chunk.id for chunk in chunks}) == 1
        for choice in answer.choices:
            own = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
            assert "".join(part.text for part in own) == choice.text
            assert [part.finish_reason for part in own] == [None] * (len(own) - 1) + [choice.finish_reason]
            assert sum((part.logprobs.tokens for part in own), []) == choice.logprobs.tokens
            assert sum((part.logprobs.token_logprobs for part in own), []) == choice.logprobs.token_logprobs
        assert chunks[-1].choices == [] and chunks[-1].usage == answer.usage
        assert all(chunk.usage is None for chunk in chunks[:-1])
        del fields["logprobs"]
        echoed = list(client.completions.create(**fields, stream=True, echo=True))
        texts = ["".join(part.text for chunk in echoed for part in chunk.choices if part.index == i) for i in range(4)]
        assert texts == [prompt + choice.text for prompt, choice in zip(["一丁", "一丁", "七", "七"], answer.choices)]  # noqa: B905

    with_openai(test)


def test_logprobs_name_tokens_and_the_likeliest():
    def test(client):
        answer = client.completions.create(model="tiny", prompt="一丁", logprobs=3, temperature=0, max_tokens=6)
        logprobs = answer.choices[0].logprobs
        assert len(logprobs.tokens) == answer.usage.completion_tokens
        for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
            assert top[token] == logprob <= 0 and 3 <= len(top) <= 4
        assert logprobs.text_offset[0] == 0 and logprobs.text_offset == sorted(logprobs.text_offset)
        none = client.completions.create(model="tiny", prompt="一丁", logprobs=0, temperature=0, max_tokens=6)
        assert none.choices[0].logprobs.top_logprobs is None
        assert none.choices[0].logprobs.token_logprobs == logprobs.token_logprobs

    with_openai(test)


def test_echo_with_logprobs_scores_the_prompt():
    def test(client):
        fields = dict(model="tiny", prompt=["一丁七", "七"], n=2, seed=3, max_tokens=4, echo=True, logprobs=1)
        answer = client.completions.create(**fields)
        only = client.completions.create(**fields | {"max_tokens": 0})
        for choice, scored in zip(answer.choices, only.choices, strict=True):
            prompt = "一丁七" if choice.index < 2 else "七"
            assert scored.text == prompt and choice.text.startswith(prompt) and scored.finish_reason == "length"
            assert scored.logprobs.tokens == list(prompt) and scored.logprobs.text_offset == list(range(len(prompt)))
            assert choice.logprobs.tokens[: len(prompt)] == list(prompt)
            assert choice.logprobs.token_logprobs[: len(prompt)] == scored.logprobs.token_logprobs
            assert all(logprob < 0 for logprob in choice.logprobs.token_logprobs)
            for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
                assert choice.text[offset:].startswith(token.replace("[SEP]", "\n").strip("#"))
        assert only.usage.completion_tokens == 0
        parts: dict[int, list] = {0: [], 1: [], 2: [], 3: []}
        for chunk in client.completions.create(**fields, stream=True):
            parts[chunk.choices[0].index].append(chunk.choices[0])
        for choice in answer.choices:
            own = parts[choice.index]
            assert "".join(part.text for part in own) == choice.text
            assert sum((part.logprobs.tokens for part in own), []) == choice.logprobs.tokens
            assert sum((part.logprobs.text_offset for part in own), []) == choice.logprobs.text_offset
        ids = client.completions.create(**fields | {"prompt": [2, 5, 6], "max_tokens": 0}).choices[0].logprobs
        assert ids.tokens[0] == "[MASK]" and ids.token_logprobs[0] is None and len(ids.tokens) == 3

    with_openai(test)


def test_the_request_of_vllm_s_load_test_gets_all_its_tokens_and_their_number():
    """The fields and the reading of `vllm bench serve` 0.32; benchmarks/beside_vllm.py runs the program itself."""
    fields = {"model": "tiny", "prompt": "一丁", "max_tokens": 12, "repetition_penalty": 1.0, "logprobs": None}
    fields |= {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}

    async def test(client):
        async with client.get("/v1/models") as response:  # without --model
            assert (await response.json())["data"][0]["root"] == "tiny"
        async with client.post("/v1/completions", json=fields, headers={"x-request-id": "bench-0"}) as response:
            assert response.status == 200
            events = (await response.text()).split("\n\n")
        chunks = [json.loads(event.removeprefix("data: ")) for event in events if event.startswith("data: {")]
        assert [len(chunk["choices"]) for chunk in chunks] == [1] * (len(chunks) - 1) + [0] and len(chunks) > 2
        assert (chunks[-1]["usage"]["prompt_tokens"], chunks[-1]["usage"]["completion_tokens"]) == (3, 12)

    served(test)


def test_stop_strings_end_a_text_before_them():
    def test(client):
        whole = client.completions.create(model="tiny", prompt="一", seed=2, max_tokens=30).choices[0]
        stop = whole.text[4:6]
        for stops in (stop, [stop, "没有这个"]):
            cut = client.completions.create(model="tiny", prompt="一", seed=2, max_tokens=30, stop=stops).choices[0]
            assert cut.text == whole.text[: whole.text.index(stop)] and cut.finish_reason == "stop"

    with_openai(test, engine=Engine(endless_model(), tiny_tokenizer(), max_num_seqs=8))


def test_models_and_errors_are_those_that_the_client_knows():
    def test(client):
        (model,) = client.models.list().data
        assert model.id == "tiny" and client.models.retrieve("tiny") == model
        with pytest.raises(openai.NotFoundError) as raised:
            client.completions.create(model="gpt-4", prompt="一")
        assert raised.value.code == "model_not_found" and raised.value.param == "model"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt-4")
        for fields, param in [
            ({"temperature": 99}, "temperature"),
            ({"n": 2, "best_of": 1}, "best_of"),
            ({"n": 2, "best_of": 3, "stream": True}, "best_of"),
            ({"presence_penalty": 2.1}, "presence_penalty"),
            ({"suffix": "。"}, "suffix"),
            ({"echo": True, "max_tokens": 0}, "max_tokens"),
            ({"extra_body": {"min_p": 1.1}}, "min_p"),
            ({"extra_body": {"mirostat": 2}}, "mirostat"),
        ]:
            with pytest.raises(openai.BadRequestError) as raised:
                client.completions.create(model="tiny", prompt="一", **fields)
            assert raised.value.param == param and raised.value.type == "invalid_request_error"
        with pytest.raises(openai.AuthenticationError) as raised:
            client.with_options(api_key="wrong").models.list()
        assert raised.value.code == "invalid_api_key"

    with_openai(test)


def test_too_much_and_too_slow_raise_what_the_client_knows():
    def test(client):
        with pytest.raises(openai.InternalServerError) as raised:
            client.completions.create(model="tiny", prompt="一", max_tokens=1_000_000, n=8)
        assert raised.value.status_code == 504 and raised.value.code == "timeout"
        with pytest.raises(openai.APIError, match="no answer within"):
            list(client.completions.create(model="tiny", prompt="一", max_tokens=1_000_000, n=8, stream=True))

    with_openai(
        test, engine=Engine(endless_model(), tiny_tokenizer(), max_num_seqs=8), length=1_000_000, request_seconds=0.3
    )


def test_a_client_chooses_among_several_models():
    def test(client):
        assert [model.id for model in client.models.list()] == ["tiny", "endless"]
        texts = {}
        for name in ("tiny", "endless"):
            answer = client.completions.create(model=name, prompt="一丁", max_tokens=12, seed=3)
            assert answer.model == name
            texts[name] = answer.choices[0].text
            chunks = client.completions.create(model=name, prompt="一丁", max_tokens=12, seed=3, stream=True)
            assert "".join(chunk.choices[0].text for chunk in chunks) == texts[name]
        assert texts["tiny"] != texts["endless"]
        with pytest.raises(openai.NotFoundError, match="this server has tiny, endless"):
            client.completions.create(model="large", prompt="一丁")

    with_openai(test, others={"endless": Engine(endless_model(), tiny_tokenizer(), max_num_seqs=8)})


# The description.


def test_the_description_has_the_limits_of_this_server():
    async def test(client):
        async with client.get("/openapi.json") as response:
            document = await response.json()
        assert document["openapi"].startswith("3.1")
        routes = {(path, method) for path, methods in document["paths"].items() for method in methods}
        served_routes = {
            (resource.canonical, route.method.lower())
            for resource in client.app.router.resources()
            for route in resource
            if route.method not in ("OPTIONS", "HEAD")  # HEAD is where GET is
        }
        assert routes - {("/v1/models/{model}", "parameters")} == served_routes
        body = document["paths"]["/generate"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert body["properties"]["samples"]["maximum"] == 7 and body["properties"]["maxlength"]["maximum"] == 99

    served(test, samples=7, length=99)


def test_the_description_of_health_has_every_status_and_field():
    async def test(client):
        async with client.get("/openapi.json") as response:
            described = await response.json()
        schema = described["paths"]["/health"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
        of_model = schema["properties"]["models"]["items"]
        model, engine = client.service.models[0], client.service.models[0].engine
        server_statuses, model_statuses = set(), set()
        for changes in ({}, {"engine": None}, {"engine": DeadEngine(engine)}, {"error": ValueError()}):
            model.restart = "error" not in changes
            for name, value in changes.items():
                setattr(model, name, value)
            for client.service.draining in (False, True):
                async with client.get("/health") as response:
                    health = await response.json()
                assert set(health) == set(schema["required"]) and set(health["models"][0]) == set(of_model["required"])
                server_statuses.add(health["status"])
                model_statuses.add(health["models"][0]["status"])
        model.engine, model.error, client.service.draining = engine, None, False
        assert server_statuses == set(schema["properties"]["status"]["enum"])
        assert model_statuses == set(of_model["properties"]["status"]["enum"])

    served(test)


class DeadEngine:
    """An engine whose process has died."""

    alive = False

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_schemathesis_finds_no_answer_that_the_description_does_not_have(mode, caplog):
    """Requests as described are taken, others refused with a 4xx; every answer has the form that is described."""
    schemathesis = pytest.importorskip("schemathesis", reason="the schemathesis package is not installed")

    def beyond_a_schema(body: object) -> bool:
        """What depends on two fields, which the description says in words only."""
        if not isinstance(body, dict):
            return False
        n = body.get("n") or 1
        scored = bool(body.get("echo")) and body.get("logprobs") is not None
        best_of = body.get("best_of") or n
        lengths = [body.get("max_tokens"), body.get("max_completion_tokens")]
        return best_of < n or (best_of > n and bool(body.get("stream"))) or (0 in lengths and not scored)

    async def test(client):
        async with client.get("/openapi.json") as response:
            document = await response.json()
        for path in ("/generate", "/", "/v1/completions", "/tokenize", "/detokenize"):
            body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
            body["properties"]["model"] = {"enum": ["tiny", None]}
        schema = schemathesis.openapi.from_dict(document)
        schema.config.update(base_url=client.url)
        chosen, positive = schemathesis.GenerationMode(mode), schemathesis.GenerationMode.POSITIVE
        sent = 0

        def check(operation):
            nonlocal sent
            # Without a body there is nothing to be wrong.
            strategy = operation.as_strategy(generation_mode=chosen if operation.body else positive)

            @hypothesis_settings(max_examples=25, derandomize=True, suppress_health_check=list(HealthCheck))
            @given(strategy)
            def ask(case):
                nonlocal sent
                if mode == "positive" and beyond_a_schema(case.body):
                    return
                sent += 1
                case.call_and_validate(timeout=30)

            ask()

        def run():
            for result in schema.get_all_operations():
                check(result.ok())

        await asyncio.to_thread(run)
        assert sent > 50
        await check_good(client)

    served(test, length=6, samples=3, prompts=3)
    assert not [record for record in caplog.records if record.name == "server"]
