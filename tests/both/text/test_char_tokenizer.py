"""Characters: the ids of BERT's WordPiece as the `tokenizers` package has it, and with compat GPT2-Chinese's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpt2_chinese.text.char_tokenizer import CharTokenizer
from gpt2_chinese.text.vocabulary import read_vocabulary

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
VOCABULARY = ["[PAD]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY += [*LETTERS, *("##" + letter for letter in LETTERS), *"，。！？,.!?-'\"()[]#%￥℃", "hello", "##ing", "2023"]
VOCABULARY += [
    *(chr(code) for code in range(0x4E00, 0x4F00)),
    *"的一是了我不人在他有这个上们来到时大地为子中你说生国",
    "é",
    "##é",
    "カ",
]
UER = {"begin": "[CLS]", "end": "[SEP]", "line_break": None}

TEXT = st.text(
    st.one_of(
        st.sampled_from("的一是了我不人在他有这个上们来到时大地为子中你说生国"),
        st.sampled_from("abcXYZéÉßΣσİ0123456789#[]<>.,!?-_/'\"，。！？：；“”（）—￥％ＡＢ１２ "),
        st.sampled_from(" \t\u3000\u00a0\u2028\x1c\x85\u200b\u0000\ufffd\u0301"),
        st.sampled_from("ガ가한국어ภาษาไทยعربيةنमस्ते😀👍🏻"),
        st.characters(max_codepoint=0x52F, exclude_categories=["Cs", "Cn"]),  # newer characters are not in all tables
    ),
    max_size=40,
)


@pytest.fixture(scope="module")
def rust(tmp_path_factory):
    tokenizers = pytest.importorskip("tokenizers")
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    made = {}
    for lowercase in (False, True):
        made[lowercase] = tokenizers.BertWordPieceTokenizer(str(path), lowercase=lowercase)
        made[lowercase]._tokenizer.encode_special_tokens = True
    return made


@settings(max_examples=1000)
@given(text=TEXT, lowercase=st.booleans())
def test_ids_are_those_of_bert(rust, text, lowercase):
    tokenizer = CharTokenizer(VOCABULARY, lowercase=lowercase, **UER)
    assert tokenizer.encode(text) == rust[lowercase].encode(text, add_special_tokens=False).ids


@settings(max_examples=500)
@given(text=st.text(st.sampled_from("的中国abXé09,.!?-[]# \n"), max_size=30), compat=st.booleans(), bert=st.booleans())
@example(text="Xa a", compat=True, bert=False)
def test_decode_of_encode_is_normalize(text, compat, bert):
    tokenizer = CharTokenizer(VOCABULARY, compat=compat, lowercase=True, **(UER if bert else {}))
    ids = tokenizer.encode(text)
    if tokenizer.marks.unknown not in ids:
        assert tokenizer.decode(ids) == tokenizer.normalize(text)
    if not compat:
        joiner = tokenizer.joiner()
        assert "".join(map(joiner.push, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("你好 hello, world! 3.5 km", "你好hello, world! 3.5 km"),
        ("it's 1,234 (ok)", "it's 1,234(ok)"),
        ("他说:好, ok", "他说:好,ok"),
    ],
)
def test_text_has_no_spaces_between_chinese_and_guesses_the_others(text, expected):
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *"你好他说hokmwrld3512i'sm,!.():",
        *("##" + c for c in LETTERS),
        "hello",
    ]
    tokenizer = CharTokenizer(list(dict.fromkeys(words)), **UER)
    assert tokenizer.decode(tokenizer.encode(text)) == expected


def test_a_line_break_is_sep_or_white_space():
    assert CharTokenizer(VOCABULARY).tokenize("中\n国") == ["中", "[SEP]", "国"]
    assert CharTokenizer(VOCABULARY, **UER).tokenize("中\n国") == ["中", "国"]


def test_names_of_special_tokens_are_text_save_with_compat():
    assert "[CLS]" not in CharTokenizer(VOCABULARY).tokenize("中[CLS]国")
    assert CharTokenizer(VOCABULARY, compat=True).tokenize("中[CLS]国") == ["中", "[CLS]", "国"]


def test_digits_stand_alone_with_compat_only():
    assert CharTokenizer(VOCABULARY).tokenize("2023年") == ["2023", "[UNK]"]
    assert CharTokenizer(VOCABULARY, compat=True).tokenize("2023") == ["2", "0", "2", "3"]


def test_marks_that_are_missing_are_named():
    with pytest.raises(ValueError, match=r"has no \[MASK\], which begins a document.*--document_marks"):
        CharTokenizer([token for token in VOCABULARY if token != "[MASK]"])
    with pytest.raises(ValueError, match=r"has no \[UNK\]"):
        CharTokenizer([token for token in VOCABULARY if token != "[UNK]"])


@pytest.mark.parametrize("name", ["vocab_small", "vocab_guwen"])
def test_reference_ids_line_by_line(reference: Path, name: str):
    folder = reference / "char_level"
    tokenizer = CharTokenizer(read_vocabulary(folder / f"{name}.txt", strict=False), compat=True)
    cases = json.loads((folder / "tokenize_char_lines.json").read_text(encoding="utf-8"))[name]
    assert len(cases) == 124
    for case in cases:
        # The reference's pipeline makes [SEP] of a line break before its tokenizer, which takes it for white space.
        text = case["text"].replace("\n", " ")
        assert tokenizer.tokenize(text) == case["tokens"], case["text"]
        assert tokenizer.encode(text) == case["ids"], case["text"]
