"""The candidates of the HTTP API: different texts, scores, order, sentences, settings; /tokenize and /detokenize."""

from __future__ import annotations

import json

import pytest
from served import served
from tiny_model import endless_model, tiny_model, tiny_tokenizer

from gpt2_chinese.decoding.engine import Engine


@pytest.fixture(scope="module", autouse=True)
def server(script):
    return script("server")


COLD = {"context": "一丁", "maxlength": 8, "samples": 6, "seed": 1, "temperature": 0.05}


async def post(client, path: str, body: dict, status: int = 200):
    async with client.post(path, json=body) as response:
        answer = await response.json()
        assert response.status == status, answer
        return answer, response.headers


async def events_of(client, body: dict) -> list[tuple[str, dict]]:
    async with client.post("/generate", json=body | {"stream": True}) as response:
        blocks = (await response.text()).split("\n\n")
    lines = [block.split("\n") for block in blocks if block and not block.startswith(":")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in lines]


def test_samples_are_different_texts_unless_that_is_turned_off():
    async def test(client):
        texts, headers = await post(client, "/generate", COLD)
        assert len(set(texts)) == 6 and "X-Samples-Missing" not in headers
        same, _ = await post(client, "/generate", COLD | {"distinct": False})
        assert len(set(same)) < 6
        v1 = {"prompt": "一丁", "max_tokens": 8, "n": 6, "seed": 1, "temperature": 0.05, "top_k": 30}
        answer, _ = await post(client, "/v1/completions", v1)
        assert ["一丁" + choice["text"] for choice in answer["choices"]] == texts
        assert [choice["index"] for choice in answer["choices"]] == list(range(6))

    served(test)


def test_an_answer_says_where_the_model_has_fewer_texts():
    async def test(client):
        greedy = COLD | {"temperature": 0}
        texts, headers = await post(client, "/generate", greedy)
        assert len(texts) == 1 and headers["X-Samples-Missing"] == "5"
        few = COLD | {"temperature": 1, "top_k": 2, "maxlength": 1}
        texts, headers = await post(client, "/generate", few)
        assert len(texts) == 2 and headers["X-Samples-Missing"] == "4"
        for body, missing in ((greedy, 5), (few, 4)):
            name, done = (await events_of(client, body))[-1]
            assert name == "done" and done["missing"] == missing
        v1 = {"prompt": ["一", "丁"], "max_tokens": 1, "n": 3, "top_k": 2, "temperature": 1}
        answer, headers = await post(client, "/v1/completions", v1)
        assert len(answer["choices"]) == 4 and answer["missing_samples"] == 2 == int(headers["X-Samples-Missing"])
        async with client.post("/v1/completions", json=v1 | {"stream": True}) as response:
            chunks = [json.loads(line[6:]) for line in (await response.text()).split("\n\n")[:-2]]
        assert chunks[-1]["missing_samples"] == 2 and not chunks[-1]["choices"]
        assert {choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]} <= {None, "stop", "length"}

    served(test)


def test_candidates_are_ranked_by_their_scores():
    async def test(client):
        body = COLD | {"temperature": 1, "scores": True}
        plain, _ = await post(client, "/generate", body)
        assert [one["text"] for one in plain] == (await post(client, "/generate", body | {"scores": False}))[0]
        ranked, _ = await post(client, "/generate", body | {"sort": "likely"})
        assert ranked == sorted(plain, key=lambda one: -one["score"]) and len({one["score"] for one in plain}) > 1
        assert all(one["finish_reason"] in ("stop", "length") and one["score"] < 0 for one in plain)
        events = await events_of(client, body | {"sort": "likely"})
        scores = {data["sample"]: data["score"] for name, data in events if name == "end"}
        assert [scores[sample] for sample in range(6)] == [one["score"] for one in plain]
        assert events[-1][1]["order"] == sorted(scores, key=lambda sample: -scores[sample])

    served(test)


def test_best_of_returns_the_likeliest():
    async def test(client):
        v1 = {"prompt": "一丁", "max_tokens": 8, "seed": 3, "top_k": 30}
        scored, _ = await post(
            client, "/generate", {"context": "一丁", "maxlength": 8, "samples": 6, "seed": 3, "scores": True}
        )
        best = [one["text"] for one in sorted(scored, key=lambda one: -one["score"])][:2]
        answer, _ = await post(client, "/v1/completions", v1 | {"n": 2, "best_of": 6})
        assert ["一丁" + choice["text"] for choice in answer["choices"]] == best

    served(test)


def test_settings_of_vllm_and_openai_work_in_both_routes():
    tokenizer = tiny_tokenizer()
    wanted = tokenizer.vocabulary.index("乙")

    async def test(client):
        settings = {"logit_bias": {str(wanted): 100}, "seed": 1, "distinct": False}
        texts, _ = await post(client, "/generate", {"context": "一", "maxlength": 3, "samples": 2} | settings)
        assert texts == ["一乙乙乙"] * 2
        v1 = {"prompt": "一", "max_completion_tokens": 4, "n": 1} | settings
        for more, text in [
            ({}, "乙乙乙乙"),
            ({"stop_token_ids": [wanted]}, ""),
            ({"stop_token_ids": [wanted], "min_tokens": 2}, None),
            ({"no_repeat_ngram_size": 1}, None),
            ({"bad_words": ["乙"]}, None),
            ({"bad_words": ["乙乙"]}, None),
            ({"ignore_eos": True, "min_p": 0.5, "presence_penalty": 0.1, "frequency_penalty": 0.1}, "乙乙乙乙"),
        ]:
            answer, _ = await post(client, "/v1/completions", v1 | more)
            found = answer["choices"][0]["text"]
            assert found == text if text is not None else found.count("乙") <= 2 and "乙乙" not in found, more
            if "ignore_eos" in more:
                assert answer["usage"]["completion_tokens"] == 4

    served(test)


def test_a_completion_ends_with_its_sentence():
    async def test(client):
        body = {"context": "一", "maxlength": 40, "samples": 7, "seed": 2, "until": "sentence"}
        texts, _ = await post(client, "/generate", body)
        assert any(text.endswith("。") for text in texts)
        assert all("。" not in text[:-1] for text in texts)

    model = endless_model()
    served(test, engine=Engine(model, tiny_tokenizer(), max_num_seqs=8))


@pytest.mark.parametrize("text", ["一丁七", "hello world, 一", "", "一\n丁"])
def test_tokenize_and_detokenize_have_vllms_names(text):
    tokenizer = tiny_tokenizer()

    async def test(client):
        answer, _ = await post(client, "/tokenize", {"prompt": text, "return_token_strs": True})
        ids = [tokenizer.marks.begin, *tokenizer.encode(text)]
        names = [tokenizer.vocabulary[id_] for id_ in ids]
        assert answer == {"count": len(ids), "max_model_len": 32, "tokens": ids, "token_strs": names}
        plain, _ = await post(client, "/tokenize", {"prompt": text, "add_special_tokens": False, "model": "tiny"})
        assert plain == {"count": len(ids) - 1, "max_model_len": 32, "tokens": ids[1:], "token_strs": None}
        back, _ = await post(client, "/detokenize", {"tokens": ids})
        assert back == {"prompt": tokenizer.decode(ids)}

    served(test)


@pytest.mark.parametrize(
    ("path", "body", "code", "param"),
    [
        ("/tokenize", {}, "missing_field", "prompt"),
        ("/tokenize", {"prompt": 5}, "wrong_type", "prompt"),
        ("/tokenize", {"prompt": "\ud800"}, "invalid_character", "prompt"),
        ("/tokenize", {"prompt": "一", "add_special_tokens": 1}, "wrong_type", "add_special_tokens"),
        ("/tokenize", {"prompt": "一", "messages": []}, "unknown_field", "messages"),
        ("/detokenize", {}, "missing_field", "tokens"),
        ("/detokenize", {"tokens": 5}, "wrong_type", "tokens"),
        ("/detokenize", {"tokens": ["5"]}, "wrong_type", "tokens"),
        ("/detokenize", {"tokens": [200]}, "out_of_range", "tokens"),
        ("/detokenize", {"tokens": [-1]}, "out_of_range", "tokens"),
        ("/detokenize", {"tokens": [5], "prompt": "一"}, "unknown_field", "prompt"),
    ],
)
def test_bad_requests_of_tokenize_and_detokenize_are_refused_by_name(path, body, code, param):
    async def test(client):
        answer, _ = await post(client, path, body, 400)
        assert answer["error"]["code"] == code and answer["error"]["param"] == param
        async with client.post(path, data=b"{") as response:
            assert response.status == 400 and (await response.json())["error"]["code"] == "invalid_json"
        await post(client, path, {"prompt": "一"} if path == "/tokenize" else {"tokens": [5]})
        missing = {"prompt": "一"} if path == "/tokenize" else {"tokens": [5]}
        await post(client, path, missing | {"model": "gpt-4"}, 404)

    served(test, engine=Engine(tiny_model(), tiny_tokenizer(), max_num_seqs=4))
