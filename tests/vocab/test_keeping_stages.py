"""White space and case kept on request from the texts to the pieces, for words and characters."""

from __future__ import annotations

import json

import pytest

from gpt2_chinese.text.tokenizers import TokenizerSpec
from gpt2_chinese.text.vocabulary import read_vocabulary
from gpt2_chinese.text.word_tokenizer import SPACE_TOKEN

LINES = [
    "明月几时有　把酒问青天 不知天上宫阙 今夕是何年",
    "他用 iPhone 写了一首 Rap 给 Lily 听 后来又写了一首",
    "床前明月光 疑是地上霜",
]


@pytest.fixture
def stages(script, tmp_path):
    """Run the three stages on LINES, and give what decoding the piece gives."""

    def run(tokenizer: str, *flags: str, tokenize: tuple[str, ...] = ()) -> list[str]:
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / "a.txt").write_text("\n".join(LINES), encoding="utf-8")
        corpus, vocabulary, pieces = tmp_path / "train.json", tmp_path / "vocab.txt", tmp_path / "tokenized"
        common = ["--tokenizer", tokenizer, "--workers", "1"]
        script("build_trainfile").main(["--data_path", str(tmp_path / "data"), "--output_path", str(corpus)])
        script("make-vocab").main(
            ["--raw_data_path", str(corpus), "--vocab_file", str(vocabulary), "--vocab_size", "500", *common, *flags]
        )
        script("make-tokenized").main(
            ["--raw_data_path", str(corpus), "--vocab_filename", str(vocabulary), "--tokenized_data_path", str(pieces),
             "--num_pieces", "1", "--min_length", "0", *common, *tokenize]
        )  # fmt: skip
        manifest = json.loads((pieces / "manifest.json").read_text(encoding="utf-8"))
        spec = TokenizerSpec(**manifest["tokenizer"], vocabulary=tuple(read_vocabulary(vocabulary, strict=False)))
        built = spec.build()
        ids = [int(id_) for id_ in (pieces / "tokenized_train_0.txt").read_text().split()]
        text = built.decode(ids)
        return [line for line in text.split("\n") if line]

    return run


@pytest.mark.parametrize("tokenizer", ["word", "char"])
def test_on_request_all_stages_keep_case_and_spaces(stages, tokenizer, tmp_path):
    expected = [line.replace("　", " ") for line in LINES]
    assert stages(tokenizer, "--keep_case", "--keep_spaces") == expected
    assert SPACE_TOKEN in (tmp_path / "vocab.txt").read_text(encoding="utf-8").split("\n")


@pytest.mark.parametrize("tokenizer", ["word", "char"])
def test_unasked_both_are_as_before(stages, tokenizer, tmp_path):
    lines = stages(tokenizer)
    assert lines[0] == "明月几时有把酒问青天不知天上宫阙今夕是何年"
    assert lines[1].startswith("他用iphone写了一首rap给lily听")
    assert SPACE_TOKEN not in (tmp_path / "vocab.txt").read_text(encoding="utf-8").split("\n")


def test_a_literal_sign_never_enters_a_vocabulary_that_keeps_no_spaces(script, tmp_path):
    (tmp_path / "train.json").write_text(json.dumps([f"甲{SPACE_TOKEN}乙 {SPACE_TOKEN} 丙"] * 20), encoding="utf-8")
    for tokenizer in ("word", "char"):
        vocabulary = tmp_path / f"{tokenizer}.txt"
        script("make-vocab").main(
            ["--raw_data_path", str(tmp_path / "train.json"), "--vocab_file", str(vocabulary), "--vocab_size", "400",
             "--tokenizer", tokenizer, "--workers", "1"]
        )  # fmt: skip
        assert SPACE_TOKEN not in vocabulary.read_text(encoding="utf-8").split("\n")


def test_flags_that_contradict_each_other_are_refused(script, capsys):
    for flags in (["--compat", "--keep_case"], ["--tokenizer", "bpe", "--keep_spaces"]):
        with pytest.raises(SystemExit):
            script("make-vocab").parse_args(flags)
        assert "GPT2-Chinese keeps neither, BPE both" in capsys.readouterr().err
