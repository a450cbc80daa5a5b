"""What a file's documents are, told by its form, and lines that a PDF file broke made whole."""

from __future__ import annotations

from collections import Counter

import pytest

from gpt2_chinese.text.division import choose_unit, divide, joined, survey

SENTENCE = "天色将晚，山道上走来一个少年，背着一只旧竹篓，脚步很急，像是有人在后面追他"
VERSE = "明月几时有\n把酒问青天\n不知天上宫阙\n今夕是何年\n"
FORMS = {
    "chapter": "".join(f"第{number}章 题目\n　　{SENTENCE}。\n\n" for number in range(1, 6)),
    "paragraph": (VERSE + "\n") * 6,
    "line": f"{SENTENCE}。{SENTENCE}。\n" * 10,
    "file": VERSE,
}


@pytest.mark.parametrize("unit", FORMS)
def test_auto_takes_what_the_form_of_a_file_suggests_and_says_why(unit):
    chosen, reason = choose_unit(survey([FORMS[unit]]))
    assert chosen == unit
    word = {"chapter": "5 chapter headings", "paragraph": "6 groups of lines"}.get(unit, "lines, ")
    assert word in reason


def test_a_long_file_of_short_lines_is_not_one_document():
    assert choose_unit(survey(["今天天气很好。\n" * 40_000]))[0] == "line"


def test_lines_broken_at_the_width_of_a_page_are_noticed():
    text = SENTENCE * 20
    broken = "\n".join(text[start : start + 35] for start in range(0, len(text), 35))
    unit, reason = choose_unit(survey([broken]))
    assert unit == "file" and "--join_lines" in reason and "35 characters" in reason


def paragraphs(number: int) -> list[str]:
    return [
        SENTENCE + f"，第{index}次回头。" + "他没有停下" * (index % 7) + "很" * (index % 11) + "远。"
        for index in range(number)
    ]


def broken(texts: list[str], width: int, indent: str) -> str:
    lines = []
    for text in texts:
        text = indent + text
        lines += [text[start : start + width] for start in range(0, len(text), width)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("indent", ["", "　　"])
@pytest.mark.parametrize("width", [20, 31])
def test_joined_lines_are_the_paragraphs_before_they_were_broken(width, indent):
    texts = paragraphs(30)
    text = broken(texts, width, indent)
    counts: Counter[str] = Counter()
    lines = list(divide([text], "line", survey([text]), join=True, counts=counts))
    if indent:
        assert lines == texts
    else:  # without indents, a paragraph whose last line is full cannot be told from one that goes on
        assert sum(line in texts for line in lines) >= 0.8 * len(texts)
    assert counts["joined"] == text.count("\n") - len(lines)
    assert "".join(lines) == "".join(texts)


def test_headings_are_not_joined():
    body = broken(paragraphs(3), 20, "")
    text = "".join(f"第{number}章 题目的字数也不少于二十个字才行呢\n{body}" for number in "一二三")
    documents = list(divide([text], "chapter", survey([text]), join=True))
    assert [document.split("\n")[0] for document in documents] == [
        f"第{number}章 题目的字数也不少于二十个字才行呢" for number in "一二三"
    ]


@pytest.mark.parametrize(
    ("first", "second", "whole"),
    [
        ("他走到河", "边。", "他走到河边。"),
        ("a deep", "sleep", "a deep sleep"),
        ("an inter-", "national", "an international"),
        ("在 Linux", "上", "在 Linux上"),
        ("1999-", "2000", "1999- 2000"),
    ],
)
def test_two_parts_of_a_line(first, second, whole):
    assert joined(first, second) == whole


@pytest.mark.parametrize("unit", ["line", "paragraph", "file", "chapter"])
def test_the_form_of_blocks_changes_nothing(unit):
    text = FORMS["chapter"]
    found = survey([text])
    whole = list(divide([text], unit, found))
    assert list(divide(list(text), unit, survey(list(text)))) == whole
