"""Cleaning on request: what each rule changes, what it leaves alone, and that all of it is counted and shown."""

from __future__ import annotations

import json
import random
import sys

import pytest

from gpt2_chinese.text.cleaning import EXAMPLES, RULES, Cleaner, LineCounts, is_ad, parse_rules
from gpt2_chinese.text.corpus import split_lines

TEXT = "春天的早晨，老人在河边钓鱼。孩子们放学以后去图书馆读书。"


def clean(line: str, rules: str) -> str:
    return "".join(Cleaner(parse_rules(rules)).clean([line], "a.txt")).removesuffix("\n")


CHANGED = [
    ("mojibake", TEXT.encode().decode("latin-1"), TEXT),
    ("mojibake", "春天的早晨，老人在河边钓鱼".encode().decode("gb18030", "replace"), "春天的早晨，老人在河边钓"),
    ("mojibake", "春天的早晨，老人在河边".encode().decode("gb18030", "replace"), "春天的早晨，老人在河"),
    ("mojibake", "春天的早晨，老人在河".encode().decode("gb18030"), "春天的早晨，老人在河"),
    ("mojibake", "标题：" + "naïve café".encode().decode("cp1252"), "标题：naïve café"),
    ("html", "他&nbsp;说：&quot;好&quot;&amp;笑", '他 说："好"&笑'),
    ("html", "一&amp;nbsp;二&#x4E09;&#22235;", "一 二三四"),
    ("html", '<p class="a">一<b>二</b></p><p>三<br/>四</p><!-- 五 -->', "一二\n三\n四"),
    ("invisible", "\ufeff一\u200b二\ue123三\u200d四\x07五\u00ad六", "一二三四五六"),
    ("punctuation", "什么！！！！他说。。。。。好，，吧～～～", "什么！他说……好，吧～"),
    ("punctuation", "……………… 等等————", "…… 等等——"),
    ("punctuation", "***********", ""),
    ("indents", "　　 天色将晚。 \t", "天色将晚。"),
    ("simplified", "漢字轉換為簡體，這裡的頭髮很乾燥", "汉字转换为简体，这里的头发很干燥"),
]


@pytest.mark.parametrize(("rule", "before", "after"), CHANGED)
def test_each_rule_changes_what_it_is_for(rule, before, after):
    assert clean(before, rule) == after


KEPT = [
    ("mojibake", "naïve café, Ærøskøbing, 18 °C – “quoted”"),
    ("mojibake", TEXT),
    ("mojibake", "鎏金的、琉璃的、锟斤拷"),
    ("html", "如果 a < b 且 c > d，那么 x&y 或 R&D；?a=1&copy=2"),
    ("html", "List<String> 和 <stdio.h>"),
    ("invisible", "👨‍👩‍👧 می‌خواهم हिन्‍दी \t表"),
    ("punctuation", "什么？！他说……好——吧！！ 3.14 1...2 --flag C++"),
    ("indents", "一 二　三"),
    ("ads", "他在 3.5 公里外的 No.1 车站等车。version 2.0.cn3"),
    ("ads", "“今天的更新就到这里。”编辑说。"),
    ("ads", TEXT * 4 + "见 https://example.com/a"),
]


@pytest.mark.parametrize(("rule", "line"), KEPT)
def test_each_rule_leaves_alone_what_is_no_fault(rule, line):
    assert clean(line, rule) == line


@pytest.mark.parametrize(
    "line",
    [
        "手机用户请浏览m.example.com阅读，更优质的阅读体验。",
        "（本章完）",
        "(本章未完，请点击下一页继续阅读)",
        "最快更新，无弹窗阅读请到ｗｗｗ．ｅｘａｍｐｌｅ．ｃｏｍ",
        "www.example.org",
        "    https://example.net/book/1.html",
        "联系邮箱：someone@example.com",
        "请记住本书首发域名：example。com",
        "求收藏，求推荐票！",
        "【未完待续】",
    ],
)
def test_advertisements_are_left_out(line):
    assert is_ad(line)
    assert list(Cleaner(["ads"]).clean([f"一\n{line}\n二\n"], "a")) == ["一\n", "二\n", "\n"]


def test_rules_are_chosen_by_name():
    default = tuple(name for name in RULES if name != "simplified")
    assert parse_rules(None) == ()
    assert parse_rules("") == default
    assert parse_rules("no-ads, no-html") == tuple(name for name in default if name not in ("ads", "html"))
    assert parse_rules("ads,html") == ("html", "ads")
    assert parse_rules("default,simplified") == parse_rules("all") == tuple(RULES)
    assert parse_rules("all,no-ads") == tuple(name for name in RULES if name != "ads")
    with pytest.raises(ValueError, match="--clean adds: there is no rule adds; the rules are mojibake, html"):
        parse_rules("adds")


def test_lines_of_many_chapters_and_files_are_repeated_and_no_others():
    counts = LineCounts()
    slogan, common = "本站提供海量小说在线阅读服务", "他点了点头，什么也没有说。"
    chapters = [
        [f"第{n}章 题", f"只在第{n}处的一句话在这里", slogan] + [common] * (n in (1, 5, 9, 13)) for n in range(100)
    ]
    counts.add_file(chapters)
    for number in range(100):
        counts.add_file([[f"第{number}份文件只有一次的句子", "每个文件末尾都有的一句话"]])
    counts.finish()
    assert (
        counts.is_repeated(slogan)
        and counts.is_repeated(f" {slogan}！")
        and counts.is_repeated("每个文件末尾都有的一句话")
    )
    assert not counts.is_repeated(common) and not counts.is_repeated("只在第3处的一句话在这里")
    assert not counts.is_repeated("第1章 题")


def test_memory_of_counted_lines_is_bounded(monkeypatch):
    monkeypatch.setattr("gpt2_chinese.text.cleaning.MAX_COUNTED_LINES", 1000)
    counts = LineCounts()
    for number in range(50):
        counts.add_file([[f"第{number}号文件的第{line}行的内容" for line in range(300)] + ["每个文件都有的一行文字"]])
        assert len(counts._in_files) <= 1000 + 301
    counts.finish()
    assert counts.is_repeated("每个文件都有的一行文字")


def test_examples_are_twenty_drawn_from_all_and_counts_are_exact():
    cleaner = Cleaner(["indents"])
    lines = list(cleaner.clean([f"　{number}\n" for number in range(1000)], "a.txt"))
    assert lines[5] == "5\n"
    found = cleaner.found["indents"]
    assert (found.changed, found.left_out, len(found.examples)) == (1000, 0, EXAMPLES)
    assert max(int(example.place.split()[-1]) for example in found.examples) > 500


def test_a_first_pass_counts_nothing_and_gives_the_same():
    text = "　一！！！！\n<b>二</b>\n（本章完）\n"
    cleaner = Cleaner(parse_rules(""))
    first = list(cleaner.clean([text], "a", count=False))
    assert all(found.changed == found.left_out == 0 for found in cleaner.found.values())
    assert list(cleaner.clean([text], "a")) == first == ["一！\n", "二\n", "\n"]


def test_any_blocks_give_the_same_lines():
    random.seed(2)
    alphabet = "一二。！&<>b/　\n\u200b.com\ue000"
    for _ in range(200):
        text = "".join(random.choice(alphabet) for _ in range(60))
        assert list(Cleaner(parse_rules("")).clean(list(text), "a")) == list(
            Cleaner(parse_rules("")).clean([text], "a")
        )
        assert list(split_lines([text])) == [line[:-1] for line in Cleaner([]).clean([text], "a")]


def run(script, tmp_path, *flags: str) -> list[str]:
    flags = ("--data_path", str(tmp_path / "data"), "--output_path", str(tmp_path / "train.json"), *flags)
    script("build_trainfile").main(list(flags))
    return json.loads((tmp_path / "train.json").read_text(encoding="utf-8"))


def test_the_stage_cleans_on_request_only_and_reports_it(script, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    chapter = "第{}章 题\n　　天色将晚&nbsp;，山道上走来第{}个少年。\n　　读好书就到好读书的网站来\n（本章完）\n"
    text = "".join(chapter.format(number, number) for number in range(1, 13))
    (tmp_path / "data" / "a.txt").write_text(text, encoding="utf-8")
    assert run(script, tmp_path) == [line.strip() for line in text.strip().split("\n")]
    report = tmp_path / "data" / "report.txt"
    documents = run(script, tmp_path, "--document", "chapter", "--clean", "--clean_report", str(report))
    assert documents == [f"第{n}章 题\n天色将晚 ，山道上走来第{n}个少年。" for n in range(1, 13)]
    printed = capsys.readouterr().out
    assert "  html: 12 lines changed, 0 left out" in printed
    assert "  ads: 0 lines changed, 12 left out" in printed
    assert "  repeated: 0 lines changed, 12 left out" in printed
    written = report.read_text(encoding="utf-8")
    assert written.count("- （本章完）") == 12 and "+ 　　天色将晚 ，山道上走来第1个少年。" in written
    assert f"{tmp_path}/data/a.txt, line 2" in written
    assert run(script, tmp_path, "--clean", "no-repeated,no-ads")[2] == "读好书就到好读书的网站来"


def test_a_report_without_cleaning_is_refused(script, tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(ValueError, match="--clean_report needs --clean or --deduplicate"):
        run(script, tmp_path, "--clean_report", str(tmp_path / "r"))


@pytest.mark.parametrize(("module", "rules"), [("ftfy", ""), ("opencc", "simplified")])
def test_a_missing_package_is_named_with_the_rule(monkeypatch, module, rules):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"needs a package that is not installed: pip install {module}==.*--clean no-"):
        Cleaner(parse_rules(rules))
