"""The model folder in other programs: a process with transformers and thulac, and none of our code but the folder's.

The folder's tokenizer must give the tokens of ours. GPT2_CHINESE_EVERY=1 compares all documents of the shared corpora
(some minutes), the default is every hundredth.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny_model import tiny_model

from gpt2_chinese.decoding.completion import SamplingParams
from gpt2_chinese.decoding.engine import Engine
from gpt2_chinese.model_folder import save_model
from gpt2_chinese.text.char_tokenizer import CharTokenizer
from gpt2_chinese.text.segmenter import Segmenter
from gpt2_chinese.text.tokenization_gpt2_chinese import pieces_of_long_line
from gpt2_chinese.text.tokenizers import Tokenizer
from gpt2_chinese.text.vocabulary import SPECIAL_TOKENS
from gpt2_chinese.text.word_tokenizer import BYTE_TOKENS, WordSplitter, WordTokenizer

ROOT = Path(__file__).resolve().parents[2]
EVERY = int(os.environ.get("GPT2_CHINESE_EVERY", "100"))
CONTEXTS = ["高血压患者", "糖尿病人可以吃水果吗", "a"]
NEW_TOKENS = 12

# Runs in a folder of its own, without our package: {"folders", "texts", "contexts", "new_tokens"} in, answers out.
ELSEWHERE = """
import importlib.util, json, sys
from pathlib import Path

assert importlib.util.find_spec("gpt2_chinese") is None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

torch.set_num_threads(1)
asked = json.loads(Path("asked.json").read_text(encoding="utf-8"))
answers = {}
for name, folder in asked["folders"].items():
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ids = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in asked["texts"]]
    tokenizer.save_pretrained(name)
    again = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
    few = asked["texts"][::20]
    answers[name] = {
        "ids": ids,
        "texts": [tokenizer.decode(row) for row in ids],
        "steps": [tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens(row)) for row in ids],
        "again": [again.encode(text, add_special_tokens=False, verbose=False) for text in few]
        == [tokenizer.encode(text, add_special_tokens=False, verbose=False) for text in few],
        "begin": tokenizer("x")["input_ids"],
        "two": tokenizer("x", "x", return_special_tokens_mask=True)["special_tokens_mask"],
        "end": [tokenizer.decode([5, 1, 5], skip_special_tokens=skip) for skip in (False, True)],
        "size": len(tokenizer),
        "special": {key: [value, tokenizer.convert_tokens_to_ids(value)]
                    for key, value in tokenizer.special_tokens_map.items()},
        "limit": tokenizer.model_max_length,
    }
    tokenizer.add_tokens(["<extra>"])
    answers[name]["added"] = tokenizer("x<extra>x", add_special_tokens=False)["input_ids"]

folder = asked["folders"]["default"]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder)
answers["n_ctx"] = model.config.n_ctx
pipe = pipeline("text-generation", model=folder, tokenizer=tokenizer, trust_remote_code=True)
greedy = {"do_sample": False, "max_new_tokens": asked["new_tokens"]}
answers["pipeline"] = [pipe(text, **greedy)[0]["generated_text"] for text in asked["contexts"]]
batch = tokenizer(asked["contexts"], padding=True, return_tensors="pt")
answers["padded"] = batch["attention_mask"][:, 0].tolist()
answers["batch"] = model.generate(**batch, **greedy)[:, batch["input_ids"].shape[1] :].tolist()

if importlib.util.find_spec("ctranslate2"):
    import ctranslate2
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(folder, trust_remote_code=True).convert("converted")
    generator = ctranslate2.Generator("converted", compute_type="float32", inter_threads=1, intra_threads=1)
    prompts = [tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) for text in asked["contexts"]]
    results = generator.generate_batch(
        prompts, sampling_topk=1, max_length=asked["new_tokens"], include_prompt_in_result=False
    )
    answers["ctranslate2"] = [result.sequences_ids[0] for result in results]
Path("answers.json").write_text(json.dumps(answers), encoding="utf-8")
"""


def odd_strings(count: int) -> list[str]:
    """Strings that meet every rule of the tokenizer, in every neighbourhood; always the same."""
    draw = random.Random(5)
    pieces = [
        *"高血压患者的药，。！？《》（）…— \n\t\r\u3000\u2028\u00a0\u0000\ufffd\u200b",
        *"aZé0９Ａ#%[]\"'._-é한あПß𠮷😀",
        *("38.5℃", "##", "[SEP]", "[MASK]", "[UNK]", "[cls]", "<0xE9>", "http://a.b/c?d=1", "COVID-19", "二〇二六年"),
        *("北京天安门", "hello, world", "e\u0301", "İ", "１２３", "  ", "\r\n"),
    ]
    strings = ["".join(draw.choices(pieces, k=draw.randrange(1, 30))) for _ in range(count)]
    return ["", " ", "\n", "\n\n", *SPECIAL_TOKENS, *strings, "药" * 50_001, "药。" + "1  a" * 13_000 + "。药"]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    texts = odd_strings(300)
    shared = Path(os.environ.get("GPT2_CHINESE_REFERENCE", ROOT.parent / "shared" / "reference")).parent / "corpora"
    for path in [ROOT / "data" / "daily_health_qa.txt", *sorted(shared.glob("*.txt"))]:
        documents = path.read_text(encoding="utf-8").splitlines()
        texts += documents[:: EVERY if path.parent == shared else 10]
    return texts


@pytest.fixture(scope="module")
def vocabulary() -> list[str]:
    """Words and characters of the shipped corpus, parts, and bytes, so that every way to spell is taken."""
    corpus = (ROOT / "data" / "daily_health_qa.txt").read_text(encoding="utf-8")[:60_000]
    words = [word for word, _ in Counter(WordSplitter()(corpus)).most_common(1500) if word != "\n"]
    characters = [character for character, _ in Counter("".join(words)).most_common(600)]
    parts = [f"##{character}" for character in "0123456789.abcdeghlnort高药"]
    return list(dict.fromkeys([*SPECIAL_TOKENS, "x", *words, *characters, *parts, *BYTE_TOKENS]))


@pytest.fixture(scope="module")
def tokenizers(vocabulary) -> dict[str, Tokenizer]:
    """One of each kind whose code travels; `hub` has the marks of UER's checkpoints."""
    characters = [token for token in vocabulary[len(SPECIAL_TOKENS) :] if len(token) == 1 or token.startswith("##")]
    characters = [*SPECIAL_TOKENS, *characters]
    return {
        "default": WordTokenizer(vocabulary),
        "compat": WordTokenizer(vocabulary, compat=True),
        "characters": CharTokenizer(characters),
        "characters_compat": CharTokenizer(characters, compat=True),
        "hub": CharTokenizer(characters, lowercase=False, begin="[CLS]", end="[SEP]", line_break=None),
    }


@pytest.fixture(scope="module")
def model(vocabulary):
    model = tiny_model(n_ctx=48, vocab_size=len(vocabulary))
    with torch.no_grad():  # no greedy text has bytes: other programs draw those that make no character, too
        model.transformer.wte.weight[[vocabulary.index(token) for token in BYTE_TOKENS]] = 0.0
    return model


@pytest.fixture(scope="module")
def answers(tmp_path_factory, texts, vocabulary, tokenizers, model):
    """What the other process says of a folder of each tokenizer."""
    place = tmp_path_factory.mktemp("elsewhere")
    folders = {}
    for name, tokenizer in tokenizers.items():
        folders[name] = str(place / f"{name}_model")
        of_its_size = model if len(tokenizer) == len(vocabulary) else tiny_model(n_ctx=48, vocab_size=len(tokenizer))
        save_model(folders[name], of_its_size, tokenizer, facts={})
    asked = {"folders": folders, "texts": texts, "contexts": CONTEXTS, "new_tokens": NEW_TOKENS}
    (place / "asked.json").write_text(json.dumps(asked), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(place / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", ELSEWHERE], cwd=place, env=environment, capture_output=True, encoding="utf-8"
    )
    assert result.returncode == 0, result.stderr
    assert "succeed" not in result.stdout  # thulac's announcement
    return json.loads((place / "answers.json").read_text(encoding="utf-8"))


KINDS = ["default", "compat", "characters", "characters_compat", "hub"]


@pytest.mark.parametrize("name", KINDS)
def test_the_folder_s_tokenizer_gives_our_tokens_and_our_text(answers, texts, tokenizers, name):
    found = answers[name]
    ours = tokenizers[name]
    different = [text for text, ids in zip(texts, found["ids"], strict=True) if ids != ours.encode(text)]
    print(f"{len(texts)} texts, {len(different)} differ")
    assert different == []
    assert found["texts"] == found["steps"] == [ours.decode(ids) for ids in found["ids"]]
    assert found["again"] is True


@pytest.mark.parametrize("name", KINDS)
def test_special_tokens_are_those_of_the_training(answers, tokenizers, name):
    found, size = answers[name], len(tokenizers[name])
    begin, end = ("[CLS]", "[SEP]") if name == "hub" else ("[MASK]", "[CLS]")
    assert found["special"] == {  # a [SEP] that is a line break is text: vLLM leaves special tokens out
        "bos_token": [begin, SPECIAL_TOKENS.index(begin)],
        "eos_token": [end, SPECIAL_TOKENS.index(end)],
        "pad_token": ["[PAD]", 3],
        "unk_token": ["[UNK]", 4],
    }
    assert found["begin"] == [SPECIAL_TOKENS.index(begin), 5]
    assert found["two"] == ([1, 0, 0] if name == "hub" else [1, 0, 0, 0])
    assert found["end"] == ["xx" if name == "hub" else "x\n\nx", "xx"]
    assert found["size"] == size
    assert found["limit"] == answers["n_ctx"] == 48
    assert found["added"] == [5, size, 5]


@pytest.fixture(scope="module")
def greedy(vocabulary, model) -> list[tuple[str, list[int]]]:
    """The engine's likeliest completions: text and ids."""
    with Engine(model, WordTokenizer(vocabulary), max_num_seqs=1) as engine:
        requests = [
            engine.submit(
                engine.prompt(context, NEW_TOKENS),
                samples=1,
                length=NEW_TOKENS,
                sampling_params=SamplingParams(temperature=0),
            )
            for context in CONTEXTS
        ]
        return [(request.future.result()[0].text, list(request.future.result()[0].ids)) for request in requests]


def test_the_pipeline_continues_as_the_engine_does(answers, greedy):
    assert answers["pipeline"] == [text for text, _ in greedy]


def test_a_batch_padded_on_the_left_is_completed_as_one_by_one(answers, greedy):
    assert sorted(answers["padded"]) == [0, 0, 1]
    assert [without_end(row) for row in answers["batch"]] == [without_end(ids) for _, ids in greedy]


def test_ctranslate2_generates_the_same_tokens(answers, greedy):
    if "ctranslate2" not in answers:
        pytest.skip("ctranslate2 is not installed")
    assert [without_end(row) for row in answers["ctranslate2"]] == [without_end(ids) for _, ids in greedy]


def without_end(ids: list[int]) -> list[int]:
    return ids[: ids.index(1)] if 1 in ids else ids


@pytest.mark.parametrize("text", ["a" * 60_000, "药。" * 30_000, "药" * 49_998 + "。" + "药" * 3 + "。", "", "药。"])
def test_long_lines_are_cut_where_thulac_cuts_them(text):
    pieces = pieces_of_long_line(text)
    assert "".join(pieces) == text and len(pieces) > 1 or pieces == [text]
    assert [word for piece in pieces for word in Segmenter().cut(piece)] == Segmenter().cut(text)
