"""server.py with models as they are published: texts, events and scored prompts of each tokenizer."""

from __future__ import annotations

import math

import pytest
from layouts import LAYOUTS, write_layout
from served import events, served
from transformers import AutoModelForCausalLM

from gpt2_chinese.decoding.engine import Engine
from gpt2_chinese.model_folder import load_weights

pytest.importorskip("tokenizers")
torch = pytest.importorskip("torch")
CONTEXT = "我们多喝水 abc\n1"


@pytest.fixture(scope="module", autouse=True)
def server(script):
    return script("server")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_published_model_completes_streams_and_scores(tmp_path, layout):
    folder = write_layout(tmp_path / layout, layout)
    model, tokenizer = load_weights(folder)
    fields = {"context": CONTEXT, "maxlength": 9, "samples": 3, "seed": 2}
    scored_fields = {"model": "tiny", "prompt": CONTEXT, "max_tokens": 4, "temperature": 0, "echo": True, "logprobs": 2}

    async def test(client):
        async with client.post("/generate", json=fields) as response:
            texts = await response.json()
        async with client.post("/generate", json=fields | {"stream": True}) as response:
            found = await events(response)
        async with client.post("/v1/completions", json=scored_fields) as response:
            return texts, found, await response.json()

    texts, found, answer = served(test, engine=Engine(model, tokenizer, max_num_seqs=4, precision="fp32"))
    assert len(texts) == 3 and all(text.startswith(CONTEXT) for text in texts)
    streamed = [CONTEXT] * 3
    for name, data in found:
        if name == "text":
            streamed[data["sample"]] += data["text"]
    assert streamed == texts

    # the score of every token of prompt and completion is that of transformers
    choice = answer["choices"][0]
    assert choice["text"].startswith(CONTEXT)
    scores = choice["logprobs"]["token_logprobs"]
    ids = [tokenizer.marks.begin, *tokenizer.encode(CONTEXT)]
    drawn = answer["usage"]["completion_tokens"]
    elsewhere = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for _ in range(drawn):
            logits = elsewhere(torch.tensor([ids])).logits[0, -1]
            logits[list(tokenizer.marks.never_produced)] = -math.inf
            ids.append(int(logits.argmax()))
        expected = elsewhere(torch.tensor([ids])).logits[0].log_softmax(-1)
    wanted = [float(expected[place, id_]) for place, id_ in enumerate(ids[1:])]
    given = [score for score in scores if score is not None][-len(wanted) :]
    assert given[: len(given) - drawn] == pytest.approx(
        wanted[len(wanted) - len(given) : len(wanted) - drawn], abs=1e-3
    )
