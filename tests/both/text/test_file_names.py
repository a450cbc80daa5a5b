"""Natural order of names, and the files that systems and editors leave beside a text."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2_chinese.text.file_names import chinese_number, is_hidden_or_lock, natural_key


@pytest.mark.parametrize(
    "names",
    [
        ["第1章.txt", "第2章.txt", "第9章.txt", "第10章.txt", "第12章.txt", "第100章.txt"],
        [
            "第一章",
            "第二章",
            "第九章",
            "第十章",
            "第十一章",
            "第十九章",
            "第二十章",
            "第二十一章",
            "第一百零三章",
            "第一千章",
        ],
        ["a1", "a2", "a２", "a10", "a１１", "b1"],
        ["卷①", "卷②", "卷⑩", "卷Ⅻ", "卷⑳"],
        ["1.2.txt", "1.10.txt", "2.txt", "二十.txt", "a.txt", "B.txt", "c.txt"],
        ["९", "١٠", "๑๑"],
    ],
)
def test_names_are_in_the_order_of_the_numbers_in_them(names):
    shuffled = list(names)
    for seed in range(5):
        random.Random(seed).shuffle(shuffled)
        assert sorted(shuffled, key=natural_key) == names


@pytest.mark.parametrize(
    ("numeral", "number"),
    [("十", 10), ("二十", 20), ("一百零三", 103), ("两千〇一十", 2010), ("二〇二六", 2026), ("三万五千", 35000),
     ("一億二千萬", 120_000_000), ("廿三", 23), ("壹佰贰拾叁", 123), ("万", 10_000)],
)  # fmt: skip
def test_chinese_numerals_have_their_value(numeral, number):
    assert chinese_number(numeral) == number


@given(st.lists(st.text(), max_size=6))
def test_any_names_can_be_ordered_and_different_ones_differ(names):
    keys = sorted(map(natural_key, names))
    assert len(set(keys)) == len(set(names))


@pytest.mark.parametrize("name", [".a.txt", "._a.txt", "~$a.txt", ".~lock.a.txt#", "#a.txt#", ".DS_Store", "a.txt~"])
def test_files_of_systems_and_editors_are_known(name):
    assert is_hidden_or_lock(Path(name))


@pytest.mark.parametrize("name", ["a.txt", "第~1章.txt", "a.b.txt", "a#.txt"])
def test_texts_are_no_files_of_editors(name):
    assert not is_hidden_or_lock(Path(name))
