"""Encodings told by how probable a text is as language: right or refused, never wrong in silence."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from passages import CHINESE, ENCODINGS, JAPANESE, SIMPLIFIED, TRADITIONAL, texts_in

from gpt2_chinese.text.encodings import EncodingNotTold, most_probable
from gpt2_chinese.text.file_encoding import LineReader, Sample, Told, tell


def told(data: bytes, block: int = 1 << 20) -> Told:
    sample = Sample()
    for start in range(0, len(data), block):
        sample.add(data[start : start + block])
    sample.add(b"", final=True)
    return tell(sample)


def outcome(name: str, data: bytes) -> str:
    try:
        found = told(data).encoding
    except EncodingNotTold:
        return "refused"
    truth = data.decode(name.partition(",")[0])
    return "right" if data.decode(found).lstrip("\ufeff") == truth.lstrip("\ufeff") else f"wrong: {found}"


def test_every_encoding_of_the_table_is_right_or_refused_and_the_chinese_ones_are_right():
    assert len(ENCODINGS) >= 20
    results = {name: [outcome(name, data) for data in texts_in(name)] for name in ENCODINGS}
    wrong = [
        (name, len(data), result)
        for name, row in results.items()
        for data, result in zip(texts_in(name), row, strict=True)
        if result.startswith("wrong") and len(data) >= 200
    ]
    assert wrong == []
    of_chinese = Counter(result for name in CHINESE for result in results[name])
    assert of_chinese["right"] >= 0.99 * of_chinese.total(), of_chinese
    of_all = Counter(result for row in results.values() for result in row)
    assert of_all["right"] >= 0.97 * of_all.total(), of_all


@pytest.mark.parametrize("name", ["gbk", "big5hkscs", "cp932", "cp949", "utf-8"])
def test_one_bad_byte_does_not_spoil_a_file(name):
    for data in texts_in(name)[4:]:
        at = data.index(b"\n") if b"\n" in data else len(data) // 2
        found = told(data[:at] + b"\xff" + data[at:]).encoding
        assert data.decode(found) == data.decode(name)


OTHER_LANGUAGES = {
    "cp1251": "Вечером дождь прекратился, и дети снова вышли во двор играть в мяч до самой темноты.",
    "koi8_r": "Вечером дождь прекратился, и дети снова вышли во двор играть в мяч до самой темноты.",
    "cp1253": "Το βράδυ η βροχή σταμάτησε και τα παιδιά βγήκαν πάλι στην αυλή για να παίξουν μέχρι να νυχτώσει.",
    "cp1255": "בערב פסק הגשם והילדים יצאו שוב אל החצר לשחק בכדור עד שירד החושך והאימהות קראו להם הביתה.",
    "cp1256": "توقف المطر في المساء وخرج الأطفال مرة أخرى إلى الساحة ليلعبوا بالكرة حتى حل الظلام.",
    "cp874": "ตอนเย็นฝนหยุดตก เด็ก ๆ จึงออกไปเล่นบอลที่สนามอีกครั้งจนกระทั่งมืดค่ำ",
    "cp1252": "Le soir, la pluie avait cessé et les élèves étaient déjà sortis dans la cour où ils répétaient.",
    "cp1250": "Wieczorem deszcz ustał i dzieci znów wyszły na podwórze, żeby grać w piłkę aż do późnej nocy.",
    "cp1254": "Akşam yağmur dindi ve çocuklar karanlık çökünceye kadar top oynamak için yeniden bahçeye çıktılar.",
    "mac_roman": "Le soir, la pluie avait cessé et les élèves étaient déjà sortis dans la cour où ils répétaient.",
}


@pytest.mark.parametrize("encoding", OTHER_LANGUAGES)
def test_text_of_another_language_is_refused_and_not_taken_for_chinese(encoding):
    data = OTHER_LANGUAGES[encoding].encode(encoding)
    for times in (1, 2, 4, 16):
        with pytest.raises(EncodingNotTold):
            told(b"\n".join([data] * times))


def test_english_with_a_few_chinese_words_or_curly_quotes_is_never_wrong():
    english = b"The quick brown fox jumps over the lazy dog, and nobody knows why it should do so.\n" * 3
    data = english + "他说".encode("gbk") + english + "医生的话".encode("gbk") + english
    assert outcome("gbk", data) in ("right", "refused")
    with pytest.raises(EncodingNotTold):
        told(english + b"It doesn\x92t matter, \x93he said\x94, and he didn\x92t look up.\n")


@pytest.mark.parametrize("seed", range(3))
def test_noise_is_refused(seed):
    with pytest.raises(EncodingNotTold):
        told(random.Random(seed).randbytes(2000))


@pytest.mark.parametrize("passages", [SIMPLIFIED, TRADITIONAL, JAPANESE])
def test_valid_utf8_is_utf8_whatever_else_it_may_be(passages):
    for passage in passages:
        for end in range(1, len(passage)):
            assert told(passage[:end].encode()) == Told("utf-8")


def test_an_encoding_of_seven_bits_is_said_to_be_valid_utf8_too():
    assert told("\n".join(JAPANESE).encode("iso2022_jp")).is_utf8_too
    assert told(b"about ~{ braces and \x1b[31mcolours\x1b[0m of a terminal\n" * 5) == Told("utf-8")


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
def test_two_encodings_in_one_file_are_told_with_the_line_where_the_second_begins(block):
    first, second = "\n".join(SIMPLIFIED[:4]).encode(), "\n".join(SIMPLIFIED[4:]).encode("gbk")
    data = b"ascii only\n\n" + first + b"\n" + second
    assert told(data, block) == Told("utf-8", also="gb18030", changes_at=7)


def test_lines_of_two_encodings_and_bad_bytes_are_read_each_as_what_it_is():
    lines = [line.encode(("utf-8", "big5")[number % 3 == 1]) for number, line in enumerate(TRADITIONAL)]
    lines[3] = lines[3][:30] + b"\xff\xfe" + lines[3][30:]
    reader = LineReader("utf-8", None, "\ufffd")
    expected = list(TRADITIONAL)
    expected[3] = expected[3][:10] + "\ufffd\ufffd" + expected[3][10:]
    assert reader.read(b"\n".join(lines)) == "\n".join(expected)
    assert reader.other_lines == {"cp950": 4}
    assert reader.bad_bytes == 2


def test_a_refusal_names_what_came_nearest():
    with pytest.raises(EncodingNotTold, match="looks like cp1251.*russian"):
        most_probable(OTHER_LANGUAGES["cp1251"].encode("cp1251"))
