"""Stage 2 in process: train.json to vocab_user.txt; Keras' Tokenizer and the thulac package are the oracles."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import pytest
from book_order import UNK_ID

from gpt2_chinese.text.char_tokenizer import CharTokenizer
from gpt2_chinese.text.tokenizers import read_tokenizer, recognise
from gpt2_chinese.text.vocabulary import BERT_SPECIAL_TOKENS, SPECIAL_TOKENS, read_vocabulary
from gpt2_chinese.text.word_tokenizer import BYTE_TOKENS, WordTokenizer

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    "高血压患者平时要少吃盐，多运动，按时吃药。体温38.5℃时要多喝水。",
    "感冒了怎么办？多喝水，多休息，一般7天左右就好了。OK, don't worry!",
    "患者可以吃维生素C，也可以吃苹果。少吃盐，多喝水。",
]


@pytest.fixture
def make_vocab(script, tmp_path):
    def run(documents: list[str], *flags: str) -> list[str]:
        (tmp_path / "train.json").write_text(json.dumps(documents, ensure_ascii=False), encoding="utf-8")
        path = tmp_path / "vocab.txt"
        arguments = ["--raw_data_path", str(tmp_path / "train.json"), "--vocab_file", str(path), *flags]
        script("make-vocab").main(arguments)
        return read_vocabulary(path)

    return run


@pytest.fixture(scope="session")
def thulac_cut():
    """The thulac package itself, as the reference's stage 2 calls it."""
    import thulac

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return thulac.thulac(seg_only=True).cut


@pytest.mark.parametrize("vocab_size", [10, 50000])
def test_compat_equals_thulac_and_keras(make_vocab, thulac_cut, vocab_size):
    """The reference's own way: THULAC's text form, fitted by Keras' Tokenizer document by document."""
    from tensorflow.keras.preprocessing.text import Tokenizer as KerasTokenizer

    keras = KerasTokenizer(num_words=vocab_size)
    keras.fit_on_texts([thulac_cut(document, text=True) for document in DOCUMENTS])
    expected = [*SPECIAL_TOKENS, *list(keras.index_word.values())[:vocab_size]]
    assert make_vocab(DOCUMENTS, "--compat", "--vocab_size", str(vocab_size)) == expected


def test_words_are_ranked_as_keras_does(script):
    from tensorflow.keras.preprocessing.text import Tokenizer as KerasTokenizer

    chooser = random.Random(1)
    words = chooser.choices([chr(0x4E00 + number) for number in range(300)], k=900)  # with many ties
    keras = KerasTokenizer(filters="", lower=False)
    keras.fit_on_texts([words])
    assert script("make-vocab").rank_words(dict(Counter(words))) == list(keras.index_word.values())


def test_keras_loaded_alone_is_the_keras_of_tensorflow():
    """The shortcut past TensorFlow's import must not become another Tokenizer, nor leave half a Keras behind."""
    code = """
import importlib.util, inspect, sys
spec = importlib.util.spec_from_file_location("make_vocab", "make-vocab.py")
module = importlib.util.module_from_spec(spec)
sys.modules["make_vocab"] = module
spec.loader.exec_module(module)
alone = module.load_keras_text()
assert not {"tensorflow", "keras"} & set(sys.modules), "TensorFlow was imported after all"
from tensorflow.keras.preprocessing.text import Tokenizer
print(inspect.getfile(Tokenizer) == alone.__file__, Tokenizer.__module__ == alone.__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]


def test_default_ranks_by_count_then_first_appearance(make_vocab):
    vocabulary = make_vocab(["水 盐 盐 药 水 茶"])
    assert vocabulary[5:9] == ["水", "盐", "药", "茶"]


def test_default_covers_what_the_reference_loses(make_vocab):
    vocabulary = make_vocab(DOCUMENTS)
    tokenizer = WordTokenizer(vocabulary)
    for text in (*DOCUMENTS, "维生素38!", "苹果盐", "don't 8.37, OK?"):
        ids = tokenizer.encode(text)
        assert UNK_ID not in ids
        assert tokenizer.decode(ids) == tokenizer.normalize(text)
    assert set(BYTE_TOKENS) <= set(vocabulary)
    ranked = vocabulary.index("多")
    assert ranked < vocabulary.index("##8"), "parts stand behind the ranked words"


@pytest.mark.parametrize("vocab_size", [1, 2, 10, 40, 80, 2048, 2100])
def test_the_size_limit_holds_and_half_of_it_is_for_words(make_vocab, vocab_size):
    vocabulary = make_vocab(DOCUMENTS, "--vocab_size", str(vocab_size))
    assert len(vocabulary) <= vocab_size + 5
    assert len(set(vocabulary)) == len(vocabulary)
    if vocab_size <= 40:
        assert len(vocabulary) == vocab_size + 5, "no place is wasted"


def test_words_of_more_than_100_characters_are_spelled(make_vocab):
    vocabulary = make_vocab(["看看 " + "x" * 101 + " 吧"] * 3)
    assert max(map(len, vocabulary)) <= 100
    assert UNK_ID not in WordTokenizer(vocabulary).encode("x" * 101)


def test_summary_says_what_is_covered(make_vocab, capsys):
    make_vocab(DOCUMENTS, "--vocab_size", "20")
    printed = capsys.readouterr().out
    assert "25 lines" in printed
    assert "words seen:" in printed and "kept cover" in printed
    assert "are spelled" in printed


def test_no_size_that_holds_the_bytes_leaves_anything_unknown(make_vocab, tmp_path):
    """A size at which half of the vocabulary cannot hold the corpus' characters once had 3 % [UNK]."""
    documents = ["".join(chr(0x4E00 + 7 * n + k) for k in range(3)) + "我们" * 5 for n in range(900)]
    config = tmp_path / "config.json"
    config.write_text('{"n_embd": 64, "n_layer": 2, "n_positions": 128}')
    flags = ["--report", str(tmp_path / "report.json"), "--model_config", str(config)]
    lines = 64 * len(make_vocab(documents, *flags))
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    for size in (257, 1000, report["recommended_vocab_size"]):
        tokenizer = WordTokenizer(make_vocab(documents, "--vocab_size", str(size)))
        assert not any(UNK_ID in tokenizer.encode(document) for document in documents)
    blocks = 2 * (12 * 64 * 64 + 13 * 64) + 128 * 64 + 2 * 64
    assert report["sizes"][-1]["embedding_share"] == pytest.approx(lines / (lines + blocks))


def test_characters_stand_alone_and_letters_are_parts(make_vocab):
    vocabulary = make_vocab(["Hello 世界 2023 hello 世", *["hello 世界"] * 4], "--tokenizer", "char")
    assert vocabulary[:5] == list(BERT_SPECIAL_TOKENS) and vocabulary[5:8] == ["hello", "世", "界"]
    assert {"h", "##h", "2", "##0", "##3", "z", "##z"} <= set(vocabulary) and "2023" not in vocabulary
    assert recognise(vocabulary) == "char"
    tokenizer = CharTokenizer(vocabulary)
    assert tokenizer.tokenize("世界 hello 2023") == ["世", "界", "hello", "2", "##0", "##2", "##3"]


def test_bpe_is_a_tokenizer_json_that_keeps_case_and_begins_with_the_end_of_text(script, tmp_path, capsys):
    pytest.importorskip("tokenizers")
    (tmp_path / "train.json").write_text(json.dumps(["Hello 世界 hello 世界"] * 20), encoding="utf-8")
    path, report = tmp_path / "tokenizer.json", tmp_path / "report.json"
    flags = ["--raw_data_path", str(tmp_path / "train.json"), "--vocab_file", str(path), "--report", str(report)]
    script("make-vocab").main([*flags, "--tokenizer", "bpe", "--vocab_size", "270"])
    spec = read_tokenizer(path)
    tokenizer = spec.build()
    assert spec.kind == "bpe" and len(tokenizer) <= 270 and tokenizer.vocabulary[0] == "<|endoftext|>"
    assert tokenizer.decode(tokenizer.encode("Hello, 新世界")) == "Hello, 新世界"
    rows = json.loads(report.read_text(encoding="utf-8"))["sizes"]
    assert [row["vocab_size"] for row in rows] == [len(tokenizer)], "larger ones were not trained"
    assert rows[0]["tokens_per_character"] < 1 and "recommended: --vocab_size" in capsys.readouterr().out


def test_auto_learns_bpe_from_documents_of_the_whole_corpus_but_not_from_all(script, tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    module = script("make-vocab")
    corpus = tmp_path / "train.json"
    documents = [chr(0x4E00 + number // 10) * 4 for number in range(1000)]  # a hundred characters, ten documents each
    corpus.write_text(json.dumps(documents, ensure_ascii=False), encoding="utf-8")
    monkeypatch.setattr(module, "size_for_a_small_model", lambda size, smallest: 1000)
    flags = ["--raw_data_path", str(corpus), "--vocab_file", str(tmp_path / "v.json"), "--overwrite"]

    def merged(size: str) -> list[str]:
        module.main([*flags, "--tokenizer", "bpe", "--vocab_size", size])
        tokenizer = read_tokenizer(tmp_path / "v.json").build()
        return [text for text in documents[::10] if len(tokenizer.encode(text)) == 1]

    assert len(merged("1000")) == len(merged("auto")) == 100
    monkeypatch.setattr(module, "BPE_LEARNT_AT_LEAST", 400)
    monkeypatch.setattr(module, "BPE_LEARNT_FROM", 0)
    assert len(merged("1000")) == 100
    known = merged("auto")
    assert 5 < len(known) <= 80
    places = [documents.index(text) for text in known]
    assert min(places) < 200 and max(places) > 800


def test_compat_is_for_words(script, capsys):
    with pytest.raises(SystemExit):
        script("make-vocab").main(["--compat", "--tokenizer", "char"])
    assert "--compat writes GPT2-Chinese's vocabulary of words" in capsys.readouterr().err


@pytest.mark.parametrize(("documents", "message"), [([], "there is no word"), (["\x00", " "], "there is no word")])
def test_a_corpus_without_words_is_refused(make_vocab, tmp_path, documents, message):
    with pytest.raises(ValueError, match=message):
        make_vocab(documents)
    assert not (tmp_path / "vocab.txt").exists()


def test_stage_one_is_named_when_it_has_not_run(script, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"build_trainfile\.py first"):
        script("make-vocab").main(["--raw_data_path", str(tmp_path / "no.json"), "--vocab_file", str(tmp_path / "v")])


@pytest.mark.parametrize("size", ["0", "-1", "many"])
def test_bad_size_is_refused(script, size, capsys):
    with pytest.raises(SystemExit):
        script("make-vocab").main(["--vocab_size", size])
    assert "--vocab_size" in capsys.readouterr().err


@pytest.mark.parametrize(("size", "name"), [(50000, "vocab_user.txt"), (500, "vocab_500.txt")])
def test_compat_equals_the_reference_byte_for_byte(script, reference, tmp_path, size, name):
    path = tmp_path / name
    flags = ["--raw_data_path", str(reference / "data" / "train.json"), "--vocab_file", str(path)]
    script("make-vocab").main([*flags, "--vocab_size", str(size), "--compat"])
    assert path.read_bytes() == (reference / name).read_bytes()


def test_a_folder_and_the_name_of_a_file_are_no_corpus(script, tmp_path):
    with pytest.raises(ValueError, match="is a folder, not the file that build_trainfile.py writes; run build"):
        script("make-vocab").main(["--raw_data_path", str(tmp_path), "--vocab_file", str(tmp_path / "v.txt")])
    (tmp_path / "train.json").write_text('["train.txt"]', encoding="utf-8")
    with pytest.raises(ValueError, match=r"is a folder.*give .*train\.json"):
        script("make-vocab").main(["--raw_data_path", str(tmp_path)])
    with pytest.raises(ValueError, match=r"its only document is 'train\.txt', the name of a file"):
        script("make-vocab").main(["--raw_data_path", str(tmp_path / "train.json")])


def test_from_another_working_folder_the_projects_files_are_found_and_the_users_are_its_own(
    make_vocab, script, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    make_vocab(DOCUMENTS)
    (tmp_path / "data").mkdir()
    (tmp_path / "train.json").rename("data/train.json")
    script("make-vocab").main([])
    assert len(read_vocabulary(tmp_path / "vocab" / "vocab_user.txt")) > 5


def test_a_vocabulary_of_another_corpus_or_of_somebody_else_is_replaced_on_request_only(make_vocab, script, tmp_path):
    make_vocab(DOCUMENTS)
    make_vocab(DOCUMENTS[:2])  # the corpus has changed
    before = (tmp_path / "vocab.txt").read_bytes()
    (tmp_path / "other.json").write_text(json.dumps(DOCUMENTS), encoding="utf-8")
    flags = ["--raw_data_path", str(tmp_path / "other.json"), "--vocab_file", str(tmp_path / "vocab.txt")]
    with pytest.raises(ValueError, match=r"was made from .*train\.json, not from .*other\.json.*--overwrite"):
        script("make-vocab").main(flags)
    (tmp_path / "vocab.txt").write_bytes(before + "字\n".encode())
    with pytest.raises(ValueError, match=r"vocab\.txt was changed since this script wrote it.*--overwrite"):
        make_vocab(DOCUMENTS)
    (tmp_path / "vocab.manifest.json").unlink()
    (tmp_path / "vocab.txt").write_text("[PAD]\n[unused1]\n[UNK]\n的\n", encoding="utf-8")
    with pytest.raises(ValueError, match="is not a vocabulary that this script has written.*--overwrite"):
        make_vocab(DOCUMENTS)
    assert make_vocab(DOCUMENTS, "--overwrite")[:5] == list(SPECIAL_TOKENS)


def test_a_vocabulary_of_an_earlier_version_has_no_manifest_and_is_replaced(make_vocab, tmp_path):
    make_vocab(DOCUMENTS)
    (tmp_path / "vocab.manifest.json").unlink()
    assert make_vocab(DOCUMENTS)[:5] == list(SPECIAL_TOKENS)
