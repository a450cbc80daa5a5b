"""Chapter headings told from sentences that look like them, in layouts of many books."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from gpt2_chinese.text.chapters import HeadingFinder, candidate, parse_number
from gpt2_chinese.text.division import divide, survey

CHINESE_DIGITS = "零一二三四五六七八九"
TITLES = (
    "山雨欲来 客栈 夜谈 旧竹篓 半山腰的灯火 东西还在他身上 少年与刀 渡口 风雪夜归人 故人 三封信 长街 谁是凶手 落日 "
    "城门 重逢 归途 一盏灯 石桥 春汛 药铺 老槐树 夜行船 断剑 借宿 雪中送炭 空屋 远客 旧约 黎明 潮声 暗巷 孤灯 秋水 "
    "残局 问路 迟来的信 围炉 井 月下"
).split()
SENTENCES = [
    "　　天色将晚，山道上走来一个少年，背着一只旧竹篓，脚步很急。",
    "　　“客官，里面请！”小二喊道，把毛巾往肩上一搭。",
    "　　他抖了抖衣袖，找了个靠窗的位子坐下，要了一壶热茶和两个馒头。",
    "　　雨下了整整一夜，到天亮的时候，河水已经漫过了石桥。",
    "　　“东西还在他身上。”隔壁的声音压得很低。",
    "　　老人没有回答，只是慢慢地把烟袋锅在鞋底上磕了磕。",
    "　　第二天，雨停了。",
    "　　她说得很慢，像是怕惊动了什么人，又像是在等他把话接下去。",
]
DECOYS = [
    "　　第三章他写了整整一个月，写到最后连手都抖了。",
    "　　第一回见面的时候，他就记住了她的名字。",
    "　　第二节课下课以后，大家都去了操场。",
    "　　第三集团军奉命连夜开拔。",
    "　　第一部分的工作已经完成，剩下的要等到春天。",
    "　　“第五章你看过没有？”她忽然问。",
    "　　第四章，他想，大概要重写。",
    "　　第二卷胶卷用完的时候，天已经黑了。",
    "　　第十章里的那句话，他一直记得。",
    "　　第一章写完了。",
    "　　第六章还没有看完，灯就灭了。",
    "　　楔子这个词，他是头一次听说。",
    "　　序章写得太长，编辑不满意。",
    "　　尾声渐渐远去，戏台上的灯也熄了。",
    "　　Chapter 3 was the hardest one to write.",
    "　　第七回了，他还是没有赢过一盘棋。",
    "　　第二回合开始之前，他先喝了一口水。",
    "　　第三节车厢里挤满了人。",
    "　　第一篇文章发表以后，他再也没有写过信。",
    "　　第八章的结尾",
    "　　1、先把水烧开。",
    "　　三、二、一！",
    "　　第九章我不想再写了。",
    "　　第一幕布景用的是旧的。",
]


def chinese(number: int) -> str:
    """A number below a thousand in Chinese numerals, as headings have it."""
    if number >= 100:
        rest = number % 100
        gap = "零" if 0 < rest < 10 else "一" if 10 <= rest < 20 else ""
        return CHINESE_DIGITS[number // 100] + "百" + gap + (chinese(rest) if rest else "")
    if number >= 10:
        tens = "" if number < 20 else CHINESE_DIGITS[number // 10]
        return tens + "十" + (CHINESE_DIGITS[number % 10] if number % 10 else "")
    return CHINESE_DIGITS[number]


def wide(number: int) -> str:
    return str(number).translate({ord("0") + digit: ord("０") + digit for digit in range(10)})


def title(number: int) -> str:
    return TITLES[number % len(TITLES)]


def couplet(number: int) -> str:
    halves = ["风雪夜少年投客栈", "石桥头老者问前程", "失竹篓林远追盗贼", "赠长刀故友送行人", "过渡口孤舟逢旧识"]
    return f"{halves[number % 5]}，{halves[(number + 2) % 5]}"


def book(
    heading: Callable[[int], str | list[str]],
    *,
    count: int = 24,
    first: int = 1,
    contents: Callable[[int], str] | None = None,
    volume: Callable[[int], str] | None = None,
    restart: bool = False,
    extras: tuple[str, ...] = (),
    before: tuple[str, ...] = (),
    blank: int = 1,
    skip: tuple[int, ...] = (),
    misprint: dict[int, int] | None = None,
    indent: bool = True,
    decoys: bool = True,
) -> list[tuple[bool, str]]:
    """A book as lines, each with whether a document begins with it.

    Args:
        heading: the line, or lines, of chapter n.
        contents: an entry of the table of contents; none without it.
        volume: the line before every eighth chapter.
        restart: numbers begin again in each volume.
        extras: headings without a number, behind the last chapter; `before` those before the first.
        skip, misprint: chapters that are missing, and that have another's number.
    """
    random.seed(count * 7 + blank)
    lines: list[tuple[bool, str]] = [(False, "《山雨》"), (False, "作者：佚名"), (False, "")]
    numbers = [number for number in range(first, first + count) if number not in skip]

    def printed(number: int) -> int:
        number = (misprint or {}).get(number, number)
        return (number - first) % 8 + 1 if restart else number

    if contents is not None:
        lines.append((False, "目录"))
        for number in numbers:
            if volume is not None and (number - first) % 8 == 0:
                lines.append((False, volume((number - first) // 8 + 1)))
            lines.append((False, contents(printed(number))))
        lines.append((False, ""))

    def body(length: int) -> None:
        for _ in range(length):
            pool = DECOYS if decoys and random.random() < 0.25 else SENTENCES
            line = random.choice(pool)
            lines.append((False, line if indent else line.strip()))
        lines.extend([(False, "")] * blank)

    for line in before:
        lines.append((True, line))
        body(5)
    for number in numbers:
        begun = False
        if volume is not None and (number - first) % 8 == 0:
            lines.append((True, volume((number - first) // 8 + 1)))
            lines.append((False, ""))
            begun = True
        made = heading(printed(number))
        for line in [made] if isinstance(made, str) else made:
            lines.append((not begun, line))
            begun = True
        body(random.randrange(6, 14))
    for line in extras:
        lines.append((True, line))
        body(6)
    return lines


LAYOUTS = {
    "第N章 题": book(lambda n: f"第{chinese(n)}章 {title(n)}"),
    "第N章　题，全角空格": book(lambda n: f"第{chinese(n)}章　{title(n)}"),
    "第N章题，不空": book(lambda n: f"第{chinese(n)}章{title(n)}"),
    "第N章：题": book(lambda n: f"第{chinese(n)}章：{title(n)}"),
    "第N章、题": book(lambda n: f"第{n}章、{title(n)}"),
    "第N章，无题": book(lambda n: f"第{chinese(n)}章"),
    "阿拉伯数字": book(lambda n: f"第{n}章 {title(n)}", count=120),
    "补零": book(lambda n: f"第{n:03}章 {title(n)}"),
    "全角数字": book(lambda n: f"第{wide(n)}章 {title(n)}"),
    "数字两边有空格": book(lambda n: f"第 {n} 章 {title(n)}"),
    "逐位数字": book(lambda n: f"第{''.join(CHINESE_DIGITS[int(digit)] for digit in str(n))}章 {title(n)}", count=40),
    "过百": book(lambda n: f"第{chinese(n)}章 {title(n)}", first=95, count=30),
    "大写数字": book(lambda n: f"第{'零壹贰叁肆伍陆柒捌玖'[n]}章 {title(n)}", count=9),
    "方括号": book(lambda n: f"【第{n}章】{title(n)}"),
    "方括号在外": book(lambda n: f"【第{n}章 {title(n)}】"),
    "书名号": book(lambda n: f"第{n}章《{title(n)}》"),
    "圆括号": book(lambda n: f"（第{chinese(n)}章） {title(n)}"),
    "等号": book(lambda n: f"===第{n}章 {title(n)}==="),
    "Markdown": book(lambda n: f"## 第{chinese(n)}章 {title(n)}"),
    "缩进的标题": book(lambda n: f"　　第{chinese(n)}章 {title(n)}"),
    "缩进的标题，不空行": book(lambda n: f"    第{n}章 {title(n)}", blank=0),
    "正文不缩进": book(lambda n: f"第{n}章 {title(n)}", indent=False, blank=0),
    "正文 第N章": book(lambda n: f"正文 第{chinese(n)}章 {title(n)}"),
    "书名 第N章": book(lambda n: f"山雨 第{chinese(n)}章 {title(n)}"),
    "回目，对句": book(lambda n: f"第{chinese(n)}回 {couplet(n)}"),
    "回目，对句不空": book(lambda n: f"第{chinese(n)}回{couplet(n)}"),
    "节": book(lambda n: f"第{n}节 {title(n)}"),
    "集": book(lambda n: f"第{chinese(n)}集 {title(n)}"),
    "话": book(lambda n: f"第{n}话 {title(n)}"),
    "卷一": book(lambda n: f"卷{chinese(n)} {title(n)}"),
    "卷之一": book(lambda n: f"卷之{chinese(n)}　{title(n)}"),
    "卷和章": book(lambda n: f"第{chinese(n)}章 {title(n)}", volume=lambda n: f"第{chinese(n)}卷 {title(n + 5)}"),
    "每卷从一数起": book(
        lambda n: f"第{chinese(n)}章 {title(n)}", volume=lambda n: f"第{chinese(n)}卷 {title(n + 5)}", restart=True
    ),
    "每部从一数起，无题": book(lambda n: f"第{n}章", volume=lambda n: f"第{chinese(n)}部", restart=True),
    "卷章同行": book(lambda n: f"第{chinese((n - 1) // 8 + 1)}卷 风起 第{chinese(n)}章 {title(n)}"),
    "有目录": book(lambda n: f"第{chinese(n)}章 {title(n)}", contents=lambda n: f"第{chinese(n)}章 {title(n)}"),
    "目录有页码": book(
        lambda n: f"第{chinese(n)}章 {title(n)}", contents=lambda n: f"第{chinese(n)}章 {title(n)}………{n * 12}"
    ),
    "目录无题": book(lambda n: f"第{n}章 {title(n)}", contents=lambda n: f"第{n}章"),
    "目录有卷": book(
        lambda n: f"第{n}章 {title(n)}",
        contents=lambda n: f"第{n}章 {title(n)}",
        volume=lambda n: f"第{chinese(n)}卷 {title(n + 5)}",
    ),
    "目录有卷，每卷从一数起": book(
        lambda n: f"第{n}章 {title(n)}",
        contents=lambda n: f"第{n}章 {title(n)}",
        volume=lambda n: f"第{chinese(n)}卷 {title(n + 5)}",
        restart=True,
    ),
    "题写两遍": book(lambda n: [f"第{n}章 {title(n)}", f"第{n}章 {title(n)}"]),
    "题写两遍，隔空行": book(lambda n: [f"第{n}章 {title(n)}", "", f"　　第{n}章 {title(n)}"]),
    "题在下一行": book(lambda n: [f"第{chinese(n)}章", title(n)]),
    "楔子、尾声、番外": book(
        lambda n: f"第{chinese(n)}章 {title(n)}",
        before=("楔子",),
        extras=("尾声", "番外一 旧事", "番外二：后来", "后记"),
    ),
    "序章、终章": book(lambda n: f"第{n}章 {title(n)}", before=("序章 雨",), extras=("终章 晴", "番外篇之渡口")),
    "缺章": book(lambda n: f"第{n}章 {title(n)}", skip=(5, 9, 10)),
    "印错一章": book(lambda n: f"第{n}章 {title(n)}", misprint={7: 77, 15: 51}),
    "重号": book(lambda n: f"第{n}章 {title(n * 3)}（{'上' if n % 2 else '下'}）"),
    "上下两篇": book(lambda n: f"第{(n + 1) // 2}章 {title(n)}（{'上' if n % 2 else '下'}）"),
    "题有问号和逗号": book(lambda n: f"第{n}章 {title(n)}，你来不来？"),
    "Chapter N": book(lambda n: f"Chapter {n}"),
    "CHAPTER N: Title": book(lambda n: f"CHAPTER {n}: The Long Way Home"),
    "Chapter in Roman numerals": book(
        lambda n: f"Chapter {['I', 'II', 'III', 'IV', 'V', 'VI', 'VII', 'VIII'][n - 1]}", count=8
    ),
    "光是数字": book(lambda n: str(n), decoys=False),
    "数字、题": book(lambda n: f"{n}、{title(n)}", decoys=False),
    "一、题": book(lambda n: f"{chinese(n)}、{title(n)}", decoys=False),
    "（一）": book(lambda n: f"（{chinese(n)}）", decoys=False),
    "N章 题": book(lambda n: f"{n:03}章 {title(n)}", decoys=False),
    # Forms that were written after the rules; only the last four of them changed these.
    "宽空格": book(lambda n: f"第{chinese(n)}章　　　　{title(n)}"),
    "连字符": book(lambda n: f"第{n}章-{title(n)}"),
    "下划线": book(lambda n: f"第{n}章_{title(n)}"),
    "破折号": book(lambda n: f"第{n}章——{title(n)}"),
    "点": book(lambda n: f"第{chinese(n)}章.{title(n)}"),
    "题后有求月票": book(lambda n: f"第{n}章 {title(n)}（求月票）"),
    "题后有字数": book(lambda n: f"第{n}章 {title(n)} [3200字]"),
    "Chapter N - Title": book(lambda n: f"Chapter {n} - The Road"),
    "卷·题 章": book(lambda n: f"卷二·风起 第{n}章 {title(n)}"),
    "卷：题 章：题": book(lambda n: f"第一卷：风起 第{n}章：{title(n)}"),
    "冒号后无题": book(lambda n: f"第{wide(n)}章："),
    "N. 题": book(lambda n: f"{n}. {title(n)}", decoys=False),
    "00N 题": book(lambda n: f"{n:03} {title(n)}", decoys=False),
    "繁体节": book(lambda n: f"第{chinese(n)}節　{title(n)}"),
    "题有书名": book(lambda n: f"第{n}章 《{title(n)}》之谜"),
    "题有叹号": book(lambda n: f"第{n}章{title(n)}！"),
    "题有省略号": book(lambda n: f"第{n}章 {title(n)}……"),
    "题有引号": book(lambda n: f"第{n}章 “{title(n)}”"),
    "不换行空格": book(lambda n: f"第{n}章\xa0{title(n)}"),
    "题有数字": book(lambda n: f"第{n}章 {n * 3}号房间"),
    "幕": book(lambda n: f"第{chinese(n)}幕 {title(n)}"),
    "星号": book(lambda n: f"★第{n}章★ {title(n)}"),
    "横线": book(lambda n: f"------第{n}章 {title(n)}------"),
    "直角引号": book(lambda n: f"第{n}話「{title(n)}」"),
    "长题": book(lambda n: f"第{n}章 {title(n)}之后的那个漫长而寒冷的冬天里发生的一件小事"),
    "PART": book(lambda n: f"PART {'ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT'.split()[n - 1]}", count=8),
    "字间空格": book(lambda n: f"第 {' '.join(chinese(n))} 章 {title(n)}"),
    "章节": book(lambda n: f"第{n}章节 {title(n)}"),
    "Vol.1 Chapter N": book(lambda n: f"Vol.1 Chapter {n}"),
    "Ch. N": book(lambda n: f"Ch. {n}"),
}


def found_headings(lines: list[tuple[bool, str]]) -> set[int]:
    finder = HeadingFinder()
    for _, line in lines:
        finder.add(line)
    return {heading.line for heading in finder.headings() if heading.begins_document}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_headings_of_a_layout_are_found_and_no_sentence(name):
    lines = LAYOUTS[name]
    expected = {number for number, (is_heading, _) in enumerate(lines) if is_heading}
    found = found_headings(lines)
    missed = [lines[number][1] for number in sorted(expected - found)]
    wrong = [lines[number][1] for number in sorted(found - expected)]
    assert len(expected & found) >= 0.95 * len(expected) and len(wrong) <= 1, (missed, wrong)


def test_precision_and_recall_over_all_layouts_are_at_least_99_percent(capsys):
    assert len(LAYOUTS) >= 30
    right = expected = found = 0
    for lines in LAYOUTS.values():
        true = {number for number, (is_heading, _) in enumerate(lines) if is_heading}
        told = found_headings(lines)
        right, expected, found = right + len(true & told), expected + len(true), found + len(told)
    with capsys.disabled():
        print(f"\nheadings: {expected:,}, precision {right / found:.4f}, recall {right / expected:.4f}")
    assert expected > 1000
    assert right / found >= 0.99
    assert right / expected >= 0.99


def test_a_text_of_decoys_only_has_no_headings():
    random.seed(3)
    lines = [(False, random.choice(DECOYS + SENTENCES)) for _ in range(3000)]
    assert not found_headings(lines)


@pytest.mark.parametrize(
    ("text", "number"),
    [("12", 12), ("０１２", 12), ("十", 10), ("廿三", 23), ("一百零五", 105), ("三百一十", 310), ("一二三", 123),
     ("两千", 2000), ("一千零一", 1001), ("壹佰贰拾叁", 123), ("一万零二", 10002), ("〇", 0)],
)  # fmt: skip
def test_numerals_have_their_values(text, number):
    assert parse_number(text) == number


def test_numerals_are_inverted_up_to_a_thousand():
    assert [parse_number(chinese(number)) for number in range(1, 1000)] == list(range(1, 1000))


@pytest.mark.parametrize(
    "line", ["", "　", "第", "第章", "第一", "今天是第一章", "第一章" + "很长" * 40, "chapter", "CD 1"]
)
def test_other_lines_are_no_candidates(line):
    assert candidate(line, 0) is None


def test_a_chapter_is_a_document_with_its_heading_and_without_blank_lines():
    text = "《山雨》\n作者：佚名\n\n第一章 山雨\n\n　　天色将晚。\n　　下雨了。\n\n第二卷 城里\n第二章　客栈\n请进。\n"
    found = survey([text])
    expected = ["《山雨》\n作者：佚名", "第一章 山雨\n天色将晚。\n下雨了。", "第二卷 城里\n第二章　客栈\n请进。"]
    assert list(divide([text[:20], text[20:]], "chapter", found)) == expected


@pytest.mark.parametrize("line", ["　　第三章 题三", "　　第九章 后来", "第三章", "第七章 题七"])
def test_a_heading_of_another_chapter_within_the_text_is_none(line):
    """Chapter 6 quotes it: its number does not go on the book's."""
    body = "　　天色将晚，山道上走来一个少年。\n" * 8
    quoted = {6: line + "\n"}
    text = "".join(f"第{chinese(n)}章 题{chinese(n)}\n{body}{quoted.get(n, '')}{body}" for n in range(1, 9))
    assert len(list(divide([text], "chapter", survey([text])))) == 8


@pytest.mark.parametrize(
    "headings",
    [
        ["第1章的秘密", "第2章的来历", "第3章的结局", "第4章的开头"],
        ["第1-2章 甲", "第3-4章 乙", "第5-6章 丙"],
        ["Chapter One", "Chapter Two", "Chapter Three"],
        ["第一章"],
    ],
)
def test_forms_that_few_books_have(headings):
    body = "　　天色将晚，山道上走来一个少年。\n" * 8
    text = "".join(f"{heading}\n{body}" for heading in headings)
    assert [document.split("\n")[0] for document in divide([text], "chapter", survey([text]))] == headings


def test_sections_stay_within_their_chapters():
    chapter = "第{}章 题\n第一节 甲\n　　这里是正文，有一些字。\n第二节 乙\n　　这里也是正文，字更多一些。\n"
    text = "".join(chapter.format(number) for number in range(1, 6))
    documents = list(divide([text], "chapter", survey([text])))
    assert [document.split("\n")[0] for document in documents] == [f"第{number}章 题" for number in range(1, 6)]
