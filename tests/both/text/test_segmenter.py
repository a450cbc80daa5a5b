"""The segmenter against the thulac package, whose words it must give for every string.

GPT2_CHINESE_EXAMPLES sets how many strings are drawn (default 300); the whole corpora are compared by
`python benchmarks/segmenter.py --verify`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import subprocess
import sys
import threading
import warnings
from contextlib import redirect_stdout
from io import StringIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gpt2_chinese.text import segmenter as segmenter_module
from gpt2_chinese.text.segmenter import CUT_BUFFER_LENGTH, NUMBER_MASK, Segmenter, make_trie, model_folder
from gpt2_chinese.text.vocabulary import SPECIAL_TOKENS

EXAMPLES = int(os.environ.get("GPT2_CHINESE_EXAMPLES", "300"))
DRAWN = settings(
    max_examples=EXAMPLES,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Oracle:
    """The thulac package, loaded once: its model takes three seconds and a gigabyte."""

    def __init__(self, folder: Path) -> None:
        import thulac

        self.folder = folder
        with redirect_stdout(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # it leaves a model file to the garbage collector
            self.thulac = thulac.thulac(seg_only=True)

    def cut_line(self, line):
        """The same for one line, without the list that `cut` copies for every word."""
        self.thulac._thulac__userDict = None
        with redirect_stdout(StringIO()):
            return list(self.thulac.cutline(line))

    def cut(self, text, user_words=()):
        from thulac.manage.Postprocesser import Postprocesser

        dictionary = None
        if user_words:  # what thulac.thulac(user_dict=path) makes of the file
            path = self.folder / "user_words.txt"
            path.write_text("".join(word + "\n" for word in user_words), encoding="utf-8")
            dictionary = Postprocesser(str(path), "uw", True)
        self.thulac._thulac__userDict = dictionary
        with redirect_stdout(StringIO()):
            return [word for word, _ in self.thulac.cut(text)]


@pytest.fixture(scope="session")
def oracle(tmp_path_factory) -> Oracle:
    return Oracle(tmp_path_factory.mktemp("oracle"))


@pytest.fixture(scope="session")
def segmenter() -> Segmenter:
    return Segmenter()


@pytest.fixture(scope="session")
def compat_segmenter() -> Segmenter:
    return Segmenter(SPECIAL_TOKENS)


MARKS = "，。？！：；‘’“”【】、《》~·@|#￥%…&*（）—-+=,.<>?/!;:'\"{}[]\\$^()_◤☆★「」『』〈〉－＋．＃"
PARTICLES = "不么也了价兮则吗否吧呀呃呢家来的给般连阿哦"
WORDS = (
    "北京 天安门 中华人民共和国 长江 乌鲁木齐 一心一意 画蛇添足 高血压 患者 研究生命起源 南京市长江大桥 医生 你好 "
    "明月几时有 二〇二四年 3月15日 １２：３０ 下雨天 http://thulac.thunlp.org/a?b=c [SEP] [CLS] [MASK] [PAD] [UNK] "
    "hello GPT-2 38.5℃ … …… —— ——— ?! ！！！ 、、 《红楼梦》 《 红楼梦》 《红 楼梦》 《一》 《》 《a》 "
    "《十个字的标题在这里呢吧》 "
    "《《红楼梦》》 《红楼，梦》 《红楼梦 《 》 》 ( ) 「 」 😀 👨‍👩‍👧 🇨🇳 é ё 한국 かな 𠀀 ﷺ"
).split(" ")
SPACES = " \u3000\t\r\v\f\x1c\x85\xa0\u2003\u2028\u200b\ufeff"
PIECES = st.one_of(
    st.sampled_from(WORDS),
    st.sampled_from(WORDS),
    st.text("的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下过", max_size=8),
    st.text(MARKS, max_size=4),
    st.text(PARTICLES, max_size=3),
    st.text(SPACES, max_size=3),
    st.text("0123456789０１２３年月日号时点分秒%", max_size=5),
    st.text("abcXYZａｂＺ", max_size=4),
    st.text(st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF), max_size=4),
    st.text(st.characters(categories=None), max_size=3),
    st.sampled_from(["\n", "\n\n", "\r\n", "\0", "\ud800", "\U0010ffff", "《", "》", " ", "\u3000"]),
)
TEXTS = st.lists(PIECES, max_size=24).map("".join)


@DRAWN
@given(text=TEXTS)
@example(text="")
@example(text="\n")
@example(text="  \n\u3000 \n")
@example(text="\0北京\0\0 \0")
def test_any_string_gives_the_words_of_thulac(segmenter, oracle, text):
    assert segmenter.cut(text) == oracle.cut(text)


@DRAWN
@given(text=TEXTS)
@example(text="我[SEP]你[MASK] [ CLS ] [[UNK]] [PAD][PAD]")
def test_special_tokens_as_user_dictionary(compat_segmenter, oracle, text):
    assert compat_segmenter.cut(text) == oracle.cut(text, SPECIAL_TOKENS)


USER_WORDS = st.lists(st.text("北京天安门长江大桥a[]，。1", min_size=1, max_size=5), min_size=1, max_size=12)


@settings(DRAWN, max_examples=max(EXAMPLES // 10, 30))
@given(
    words=USER_WORDS, texts=st.lists(st.text("北京天安门长江大桥a[]，。1 的在", max_size=20), min_size=1, max_size=8)
)
def test_any_user_dictionary(oracle, words, texts):
    ours = Segmenter(words)
    assert [ours.cut(text) for text in texts] == [oracle.cut(text, words) for text in texts]


def test_reference_lines(segmenter, reference):
    for line in json.loads((reference / "thulac_lines.json").read_text(encoding="utf-8")):
        assert segmenter.cut(line["text"]) == line["words"]


def test_every_hundredth_document_of_the_corpora(segmenter, oracle, corpora):
    for name in ("medical_qa.txt", "songci.txt"):
        documents = (corpora / name).read_text(encoding="utf-8").split("\n")
        for document in documents[::100]:
            assert segmenter.cut(document) == oracle.cut(document)


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "一二三四五六七八九。" * 5000,
        "一二三四五六七八九。" * 4999 + "一二三四五六七八九",
        "一二三四五六七八九。" * 9 + "北京的天气很好啊" * 6240 + "？！",
        "一" * 49_999,
        "北京的天气" * 9_999 + "很好啊啊。",
        "北京，" * 16_000 + "。" + "天安门的" * 12_000 + "！我们" + "天安门的" * 12_400 + "；我们",
        "北京" + " " * 60_000 + "天安门。",
        "北京的天气" * 9_999 + "很好  啊。",
    ],
    ids=["sentences", "no-end", "long-end", "longest", "weightless", "pieces", "spaces", "50,000-after-cleaning"],
)
def test_lines_of_fifty_thousand_characters(segmenter, oracle, text):
    assert segmenter.cut(text) == oracle.cut_line(text)


@pytest.mark.slow
def test_a_line_that_thulac_cannot_cut_is_cut_in_parts(segmenter, oracle):
    text = "北京的天气很好" * 8000 + "。"
    with pytest.raises(IndexError):
        oracle.cut_line(text)
    assert segmenter.cut(text) == oracle.cut_line(text[:49_999]) + oracle.cut_line(text[49_999:])


def test_words_are_the_cleaned_text(segmenter):
    text = "我  爱\u3000 北京\n\n天安门 "
    cleaned, ends = segmenter.segment(np.array([ord(character) for character in text], dtype=np.uint32))
    assert cleaned.tobytes().decode("utf-32-le") == "我 爱\u3000北京\n\n天安门 " == "".join(segmenter.cut(text))
    assert ends[-1] == len(cleaned) and (np.diff(ends) > 0).all()


def test_documents_joined_by_line_breaks_are_cut_one_by_one(segmenter, reference):
    documents = (reference / "data" / "edge_cases.txt").read_text(encoding="utf-8").split("\n")
    expected = [word for document in documents for word in [*segmenter.cut(document), "\n"]][:-1]
    assert segmenter.cut("\n".join(documents)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\0",
        "我\0爱北京",
        "\n",
        "天安门\n\n",
        "  \u3000 ",
        "\ud800北京",
        "𠮷野家",
        "我爱北京。" * 1000,
        "北" * (CUT_BUFFER_LENGTH + 1),
    ],
)
def test_cut_gives_the_words_of_segment(segmenter, text):
    cleaned, ends = segmenter.segment(np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32))
    characters = [chr(code_point) for code_point in cleaned]
    words = ["".join(characters[start:end]) for start, end in pairwise([0, *ends.tolist()])]
    assert segmenter.cut(text) == words


def test_threads_that_cut_at_once_get_their_own_words(segmenter):
    lines = [f"第{number}天，南京市长江大桥" + "欢迎你" * (number % 50) for number in range(500)]
    expected = [segmenter.cut(line) for line in lines]
    results: list[list[list[str]]] = []
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [
            threading.Thread(target=lambda: results.append([segmenter.cut(line) for line in lines])) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert results == [expected] * 4


def test_words_do_not_depend_on_the_texts_before():
    """The weights met before are kept in slots that other pairs of characters take over."""
    generator = np.random.default_rng(0)
    texts = ["".join(map(chr, generator.integers(0x4E00, 0x9FA5, 400))) for _ in range(300)]
    one = Segmenter()
    assert [one.cut(text) for text in texts + texts[::-1]][300:] == [one.cut(text) for text in texts[::-1]]
    assert [Segmenter().cut(text) for text in texts[:20]] == [one.cut(text) for text in texts[:20]]


def test_a_copy_in_another_process_or_thread_gives_the_same_words(compat_segmenter):
    text = "南京市长江大桥[SEP]欢迎你" * 50
    expected = compat_segmenter.cut(text)
    assert pickle.loads(pickle.dumps(compat_segmenter)).cut(text) == expected
    results = []
    threads = [threading.Thread(target=lambda: results.append(compat_segmenter.cut(text))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 8


@pytest.mark.slow
def test_other_compiled_code_can_call_it(segmenter):
    from numba import njit

    from gpt2_chinese.text.segmenter_kernel import segment_text

    @njit
    def longest_word(text, model):
        cleaned, ends = np.empty(len(text), np.uint32), np.empty(len(text), np.int32)
        _, words = segment_text(text, cleaned, ends, model)
        return np.diff(ends[:words]).max()

    text = np.array([ord(character) for character in "我爱北京天安门"], dtype=np.uint32)
    assert longest_word(text, segmenter.model) == len("天安门")


def test_loads_neither_numba_nor_thulac_nor_a_framework(segmenter):
    code = (
        "import sys; from gpt2_chinese.text.segmenter import Segmenter; print(Segmenter().cut('我爱北京'));"
        "print(sorted({'numba', 'thulac', 'torch', 'tensorflow', 'keras', 'transformers'} & set(sys.modules)))"
    )
    root = Path(__file__).resolve().parents[3]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, encoding="utf-8", check=True)
    assert result.stdout.splitlines() == ["['我', '爱', '北京']", "[]"] and result.stderr == ""


def test_all_characters_with_weights_have_numbers(segmenter):
    """A pair's slot is found by the numbers of its two characters: one without a number must not have weights."""
    cells = segmenter.model.features.reshape(-1, 2).astype(np.int64)
    numbered = segmenter.model.code_points[1:]
    pairs = np.flatnonzero(np.isin(cells[:, 1], numbered) & (cells[:, 1] >= 0))
    parents = cells[pairs, 0] + ord(" ")
    weighted = np.zeros(len(pairs), dtype=bool)
    for place in b"1234":
        leaves = cells[parents, 0] + place
        weighted |= (leaves >= 0) & (leaves < len(cells)) & (cells[leaves % len(cells), 1] == parents)
    seconds = pairs - cells[cells[pairs, 1], 0]
    assert weighted.sum() > 600_000 and np.isin(seconds[weighted], numbered).all()
    assert len(numbered) < NUMBER_MASK


@pytest.mark.parametrize("word", ["", "a b", "\u3000", "a\0"])
def test_user_words_that_no_text_can_have_are_refused(word):
    with pytest.raises(ValueError, match="user word"):
        Segmenter(["北京", word])


def test_trie_of_many_words_has_them_and_no_others():
    words = [chr(0x4E00 + i % 300) + chr(0x5000 + i // 3) + "a" * (i % 4) for i in range(2000)]
    trie = make_trie(words)

    def has(word: str) -> bool:
        state = 0
        for code in [*map(ord, word), 0]:
            cell = trie[2 * state] + code
            if cell >= len(trie) // 2 or trie[2 * cell + 1] != state:
                return False
            state = cell
        return True

    assert all(map(has, words))
    assert not any(
        has(word) for word in {w + "b" for w in words} | {w[:1] for w in words} | {w + "a" for w in words} - set(words)
    )


def test_missing_or_strange_model_says_what_to_install(monkeypatch, tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    for path in model_folder().iterdir():
        if path.name in ("cws_dat.bin", "ns.dat", "idiom.dat", "singlepun.dat", "cws_label.txt", "cws_model.bin"):
            (folder / path.name).symlink_to(path)
    monkeypatch.setattr(segmenter_module, "model_folder", lambda: folder)
    (folder / "cws_label.txt").unlink()
    (folder / "cws_label.txt").write_text("0\n1\n2\n3\n")
    with pytest.raises(ValueError, match="thulac==0.2.2"):
        Segmenter()
    (folder / "cws_label.txt").unlink()
    with pytest.raises(FileNotFoundError, match="cws_label.txt"):
        Segmenter()
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install thulac==0.2.2"):
        Segmenter()
