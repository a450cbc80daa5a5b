"""Byte-level BPE: every string comes back, whole characters only, and a file of another kind is refused."""

from __future__ import annotations

import json
import random
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

tokenizers = pytest.importorskip("tokenizers")

from gpt2_chinese.text.bpe_tokenizer import BpeTokenizer, bytes_of_characters  # noqa: E402
from gpt2_chinese.text.tokenizers import read_tokenizer  # noqa: E402


def definition(*special: str, text: str = "中国人民 hello world 你好世界") -> str:
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(special),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([text] * 3, trainer)
    return made.to_str()


@pytest.fixture(scope="module")
def tokenizer() -> BpeTokenizer:
    return BpeTokenizer(definition("<|endoftext|>", "<pad>"))


@settings(max_examples=1000)
@given(st.text(max_size=40))
def test_every_string_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text == tokenizer.normalize(text)
    joiner = tokenizer.joiner()
    pieces = [joiner.push(id_) for id_ in ids]
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces).replace(text, "")


@settings(max_examples=300)
@given(st.lists(st.integers(0, 299), max_size=30))
def test_any_ids_are_text_as_python_decodes_their_bytes(tokenizer, ids):
    ids = [id_ % len(tokenizer) for id_ in ids if id_ % len(tokenizer) not in (0, 1)]
    data = b"".join(tokenizer.token_bytes[id_] for id_ in ids)
    assert tokenizer.decode([*ids, 0]) == data.decode("utf-8", errors="replace") + ("\n\n" if ids else "")
    assert data.decode("utf-8", errors="replace").startswith(tokenizer.decode(ids))


def test_other_threads_run_while_a_long_text_is_encoded(tokenizer):
    text = "".join(random.Random(1).choices("中国人民你好世界", k=2_000_000))
    gaps, done = [0.0], threading.Event()

    def watch() -> None:
        last = time.perf_counter()
        while not done.wait(0.001):
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    thread = threading.Thread(target=watch)
    thread.start()
    begin = time.perf_counter()
    ids = tokenizer.encode_batch([text])[0]
    assert tokenizer.encode(text) == ids
    took = time.perf_counter() - begin
    done.set()
    thread.join()
    assert max(gaps) < took / 3  # of two times; the list of the numbers is made under the lock


def test_the_name_of_a_special_token_is_text(tokenizer):
    ids = tokenizer.encode("a<|endoftext|>b")
    assert not set(ids) & {0, 1} and tokenizer.decode(ids) == "a<|endoftext|>b"
    assert tokenizer.marks.begin == tokenizer.marks.end == 0 and tokenizer.marks.never_produced == (1,)


def test_the_table_of_bytes_is_that_of_gpt2():
    assert sorted(bytes_of_characters().values()) == list(range(256))
    assert set(bytes_of_characters()) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def test_vocab_json_with_merges_is_read(tmp_path: Path, tokenizer):
    model = json.loads(tokenizer.definition)["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    for path in (tmp_path, tmp_path / "vocab.json"):
        read = read_tokenizer(path).build()
        assert read.encode("中国 hello") == tokenizer.encode("中国 hello")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "neither a tokenizer.json nor GPT-2's vocab.json"),
        ("[]", "neither a tokenizer.json"),
        ('{"model": {"type": "WordPiece"}}', "is a WordPiece tokenizer, .*--tokenizer char"),
        ('{"model": {"type": "BPE"}}', "BPE tokenizer without bytes"),
        ('{"model": {"type": "BPE"}, "decoder": {"type": "ByteLevel"}}', "is damaged: "),
        ("{", "is not JSON: line 1"),
    ],
)
def test_another_file_is_named_with_what_is_wrong(tmp_path, text, message):
    path = tmp_path / "tokenizer.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"tokenizer.json.*{message}"):
        read_tokenizer(path)


def test_an_end_of_text_is_needed(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(definition("<oops>"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer\.json has none of <\|endoftext\|>.*--document_marks"):
        read_tokenizer(path)
