"""What a vocabulary, a tokenizer.json or a model folder has is recognised, said and kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpt2_chinese.artifacts import write_lines
from gpt2_chinese.text.tokenizers import TokenizerSpec, read_tokenizer, recognise, vocabulary_of_folder
from gpt2_chinese.text.vocabulary import SPECIAL_TOKENS

BERT = [
    "[PAD]",
    *(f"[unused{n}]" for n in range(1, 100)),
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *"中国你好abc",
    "##a",
    "Hi",
]
WORDS = [*SPECIAL_TOKENS, "中国", "你", "好"]


@pytest.mark.parametrize(
    ("tokens", "kind"),
    [
        (WORDS, "word"),
        (["[SEP]", "[PAD]", "[CLS]", "[MASK]", "[UNK]", "的", "我们"], "word"),
        (BERT, "char"),
        (["[UNK]", "[CLS]", "[MASK]", "[SEP]", "[PAD]", "狺", "从"], "char"),
        ([*SPECIAL_TOKENS, "你", "好"], "word"),
    ],
)
def test_words_are_told_from_characters(tokens, kind):
    assert recognise(tokens) == kind


def write_folder(folder: Path, tokens: list[str], **files: object) -> Path:
    folder.mkdir()
    write_lines(folder / "vocab.txt", tokens)
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"config": {"tokenizer_class": "BertTokenizer"}}, ("char", False, True, "[CLS]", "[SEP]", None)),
        (
            {"config": {"tokenizer_class": "BertTokenizer"}, "tokenizer_config": {"do_lower_case": False}},
            ("char", False, False, "[CLS]", "[SEP]", None),
        ),
        (
            {"tokenizer_config": {"tokenizer_class": "BertTokenizerFast", "bos_token": "[MASK]", "eos_token": "[CLS]"}},
            ("char", False, True, "[MASK]", "[CLS]", "[SEP]"),
        ),
        (
            {
                "config": {"tokenizer_class": "BertTokenizer", "bos_token_id": 50256},
                "special_tokens_map": {"bos_token": {"content": "<|endoftext|>"}, "eos_token": "<|endoftext|>"},
            },
            ("char", False, True, "[CLS]", "[SEP]", None),
        ),
        ({"config": {}}, ("char", True, True, "[MASK]", "[CLS]", "[SEP]")),
    ],
)
def test_a_folder_tells_its_tokenizer(tmp_path, files, expected):
    spec = read_tokenizer(write_folder(tmp_path / "m", BERT, **files))
    assert (spec.kind, spec.compat, spec.lowercase, spec.begin, spec.end, spec.line_break) == expected
    assert vocabulary_of_folder(tmp_path / "m") == tmp_path / "m" / "vocab.txt"


def test_what_a_manifest_keeps_makes_the_same_tokenizer(tmp_path):
    write_lines(tmp_path / "v.txt", BERT)
    spec = read_tokenizer(tmp_path / "v.txt", kind="char").with_marks("[CLS]", "[SEP]")
    assert (spec.begin, spec.end, spec.line_break) == ("[CLS]", "[SEP]", None)
    again = read_tokenizer(tmp_path / "v.txt", settings=json.loads(json.dumps(spec.settings())))
    assert again == spec and isinstance(again, TokenizerSpec)
    assert again.build().encode("中\n国") == spec.build().encode("中国")


@pytest.mark.parametrize(
    ("write", "flags", "message"),
    [
        (lambda p: None, {}, r"there is no vocabulary .*v\.txt"),
        (lambda p: write_lines(p, BERT), {"kind": "bpe"}, r"v\.txt is a vocabulary .* for --tokenizer bpe"),
        (lambda p: write_lines(p, ["a"]), {}, r"v\.txt has no \[MASK\], which begins .*--document_marks"),
        (lambda p: write_lines(p, [*WORDS, "你"]), {}, r"v\.txt, line 9: '你' stands in line 7 already"),
        (lambda p: p.mkdir(), {}, r"v\.txt has no vocab\.txt, tokenizer\.json or vocab\.json"),
        (lambda p: p.write_bytes(b"\xff\n"), {}, r"v\.txt, line 1: byte 0 is not UTF-8"),
    ],
)
def test_a_bad_vocabulary_is_named_with_the_mend(tmp_path, write, flags, message):
    path = tmp_path / "v.txt"
    write(path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_tokenizer(path, **flags)


def test_words_have_marks_of_their_own(tmp_path):
    write_lines(tmp_path / "v.txt", WORDS)
    with pytest.raises(ValueError, match="--document_marks is for vocabularies of characters and BPE"):
        read_tokenizer(tmp_path / "v.txt").with_marks("[CLS]", "[SEP]")
