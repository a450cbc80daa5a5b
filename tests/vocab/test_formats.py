"""Stage 1 on files as people have them: every format, damaged ones, and folders full of other things."""

from __future__ import annotations

import gzip
import json
import os
import random
import sys
import zipfile

import docx
import pytest

from gpt2_chinese.text.formats import SUFFIXES, html_text, list_files, passed_over_lines

CONTAINER = (
    '<?xml version="1.0"?><container xmlns="urn:oasis:names:tc:opendocument:xmlns:container" version="1.0"><rootfiles>'
    '<rootfile full-path="OEBPS/book.opf" media-type="application/oebps-package+xml"/></rootfiles></container>'
)


def write_epub(path, pages: list[str]) -> None:
    """A book as publishers make them: pages in a folder, their names escaped, a table of contents among them."""
    items = "".join(
        f'<item id="p{number}" href="page%20{number}.xhtml" media-type="application/xhtml+xml"/>'
        for number in range(len(pages))
    )
    spine = "".join(f'<itemref idref="p{number}"/>' for number in range(len(pages)))
    package = (
        '<package xmlns="http://www.idpf.org/2007/opf" version="3.0"><manifest>'
        '<item id="nav" href="nav.xhtml" properties="nav" media-type="application/xhtml+xml"/>'
        f'{items}</manifest><spine><itemref idref="nav"/>{spine}</spine></package>'
    )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as book:
        book.writestr("mimetype", "application/epub+zip")
        book.writestr("META-INF/container.xml", CONTAINER)
        book.writestr("OEBPS/book.opf", package)
        book.writestr("OEBPS/nav.xhtml", "<html><body><nav><ol><li>第一章 山雨</li></ol></nav></body></html>")
        for number, page in enumerate(pages):
            head = "<html><head><title>书名</title><style>p {color: red}</style></head>"
            book.writestr(f"OEBPS/page {number}.xhtml", f"{head}<body>{page}</body></html>")


def write_docx(path, paragraphs: list[str], rows: list[list[str]] = []) -> None:  # noqa: B006
    document = docx.Document()
    for paragraph in paragraphs:
        document.add_paragraph(paragraph)
    if rows:
        table = document.add_table(len(rows), len(rows[0]))
        for row, cells in zip(table.rows, rows, strict=True):
            for cell, text in zip(row.cells, cells, strict=True):
                cell.text = text
    document.save(str(path))


@pytest.fixture
def build(script, tmp_path):
    """Run the stage on tmp_path/data, after writing files given by name and content; give the documents."""

    def run(files: dict[str, bytes] | None = None, *flags: str) -> list[str]:
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        for name, data in (files or {}).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        output = tmp_path / "train.json"
        script("build_trainfile").main(["--data_path", str(folder), "--output_path", str(output), *flags])
        return json.loads(output.read_text(encoding="utf-8"))

    return run


HTML = (
    "<html><head><title>标题</title><script>var a = '<p>不是文本</p>';</script></head><body><div>导航"
    "<p>第一段，<b>粗</b>体&amp;链接<a href='x'>在此</a>。</p>尾巴</div>第二段<br>换行\n  续行</body></html>"
)
SRT = (
    "\ufeff1\r\n00:00:01,000 --> 00:00:02,000\r\n<i>你来了。</i>\r\n\r\n2\r\n00:00:03,000 --> 00:00:04,000\r\n"
    "{\\an8}坐吧，\r\n喝茶。\r\n\r\n3\r\n00:00:05,000 --> 00:00:06,000\r\n1984\r\n"
)
GOLDEN = {
    "a.txt": ("甲\n乙\n", ["甲", "乙"]),
    "a.md": ("# 标题\n\n*正文*在此\n", ["# 标题", "*正文*在此"]),
    "a.jsonl": ('{"text": "甲\\n乙", "id": 1}\n\n{"text": "丙", "url": "http://a.b/c"}\n', ["甲\n乙", "丙"]),
    "b.jsonl": ('"甲"\n"乙"\n', ["甲", "乙"]),
    "c.jsonl": ('{"标题": "题", "正文": "甲"}\n', ["甲"]),
    "d.jsonl": ('{"id": "17", "留言": "只有一个字符串字段"}\n', ["只有一个字符串字段"]),
    "a.csv": (
        '编号,内容,作者\n1,"带逗号,和""引号""的\n一段",张三\n2,第二段,李四\n',
        ['带逗号,和"引号"的\n一段', "第二段"],
    ),
    "b.csv": ("id;body\n1;甲，乙\n", ["甲，乙"]),
    "c.csv": (
        "1,今天的天气很好，我们去爬山。\n2,图书馆里很安静。\n",
        ["今天的天气很好，我们去爬山。", "图书馆里很安静。"],
    ),
    "a.tsv": ("content\tscore\n甲,乙\t3\n", ["甲,乙"]),
    "a.html": (HTML, ["导航", "第一段，粗体&链接在此。", "尾巴", "第二段", "换行 续行"]),
    "a.srt": (SRT, ["你来了。", "坐吧， 喝茶。", "1984"]),
}


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030", "utf-16"])
@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize("name", GOLDEN)
def test_each_format_gives_its_documents_in_every_encoding(build, name, gzipped, encoding):
    text, expected = GOLDEN[name]
    data = text.removeprefix("\ufeff").encode(encoding)
    files = {name + ".gz": gzip.compress(data)} if gzipped else {name: data}
    assert build(files, "--encoding", encoding) == expected


def test_books_and_word_files_are_read_in_their_order(build, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    write_docx(tmp_path / "data" / "a.docx", ["第一段。", "", "第二段。"], [["左", "右"]])
    write_epub(
        tmp_path / "data" / "b.epub", ["<h1>第一章 山雨</h1><p>天色将晚。</p>", "<h1>第二章 客栈</h1><p>请进。</p>"]
    )
    assert build() == ["第一段。", "第二段。", "左\t右", "第一章 山雨", "天色将晚。", "第二章 客栈", "请进。"]
    chapters = ["第一章 山雨\n天色将晚。", "第二章 客栈\n请进。"]
    assert build(None, "--document", "auto")[-2:] == chapters
    printed = capsys.readouterr()
    assert "b.epub: --document chapter (2 chapter headings)" in printed.err
    # Without headings that are known, the parts of the book are its chapters.
    write_epub(tmp_path / "data" / "b.epub", ["<h1>山雨</h1><p>天色将晚。</p>", "<h1>客栈</h1><p>请进。</p>"])
    assert build(None, "--document", "chapter")[-2:] == ["山雨\n天色将晚。", "客栈\n请进。"]


def test_a_record_is_a_document_and_can_be_divided(build):
    files = {"a.jsonl": json.dumps({"text": "一\n二\n\n三"}).encode()}
    assert build(files) == build(files, "--document", "auto") == ["一\n二\n\n三"]
    assert build(files, "--document", "paragraph") == ["一\n二", "三"]


def test_fields_can_be_named_and_joined(build):
    files = {"a.jsonl": '{"title": "题", "author": "某", "words": "文"}\n{"title": "二题", "words": null}\n'.encode()}
    assert build(files, "--text_field", "words") == ["文"]
    assert build(files, "--text_field", "title,words") == ["题\n文", "二题"]
    files = {"a.jsonl": b'"x"', "b.csv": "甲,乙\n一,二\n".encode()}
    assert build(files, "--text_field", "2")[1:] == ["二"]


def test_records_without_text_and_bad_lines_are_counted(build, capsys):
    lines = ['{"text": "甲"}', '{"text": 5}', '{"text": " "}', "[1]", '{"text": "乙"', '{"text": "丙"}']
    assert build({"a.jsonl": "\n".join(lines).encode()}, "--on_error", "skip") == ["甲", "丙"]
    printed = capsys.readouterr().err
    assert "2 of 6 records have no text in text and are passed over, the first in line 2" in printed
    assert "2 lines are no JSON objects or strings and are passed over, the first is line 4" in printed


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2: not JSON .* --on_error skip"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}\n", "line 1: not JSON"),
        ("a.jsonl", '{"标题": "甲", "作者": "乙"}'.encode(), "its fields are 标题, 作者; .*--text_field"),
        ("a.csv", "标题,作者\n甲,乙\n".encode(), "which field is the text cannot be told; its fields are 标题, 作者"),
        ("a.csv", ('text\n"' + "甲\n" * 6000).encode(), "line 2: a quotation mark is not closed"),
        ("a.epub", b"no book", r"a\.epub is not a whole \.epub file"),
        ("a.docx", b"PK\x03\x04 cut", r"a\.docx is not a whole \.docx file"),
    ],
)
def test_damage_is_one_line_that_names_file_and_remedy(build, name, data, message):
    with pytest.raises(ValueError, match=message) as caught:
        build({name: data})
    assert "\n" not in str(caught.value)


def test_zip_files_that_are_no_books_are_refused_and_passed_over_on_request(build, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for name in ("a.epub", "b.docx"):
        with zipfile.ZipFile(tmp_path / "data" / name, "w") as archive:
            archive.writestr("x", "y")
    with pytest.raises(ValueError, match="a.epub is not an e-book that can be read"):
        build()
    assert build({"c.txt": "甲".encode()}, "--on_error", "skip", "--clean") == ["甲"]
    printed = capsys.readouterr().err
    assert "warning: passed over, after 0 documents of it:" in printed and "b.docx is not a whole .docx file" in printed


def test_text_field_that_is_missing_is_named(build):
    with pytest.raises(ValueError, match="--text_field words: .*a.jsonl has no field words; its fields are text"):
        build({"a.jsonl": b'{"text": "a"}'}, "--text_field", "words")


def test_a_missing_package_is_named_only_when_a_file_needs_it(build, monkeypatch):
    for name in ("selectolax", "selectolax.lexbor", "docx"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    assert build({"a.txt": "甲".encode(), "b.jsonl": b'"c"'}) == ["甲", "c"]
    with pytest.raises(ValueError, match=r"c.html: reading it needs a package .* pip install selectolax=="):
        build({"c.html": b"<p>a</p>"})


def test_everything_passed_over_is_named_and_counted(build, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "nowhere.txt").symlink_to(folder / "gone.txt")
    (folder / "x.txt").mkdir()
    (folder / "loop").symlink_to(folder)
    (folder / "full.txt").mkdir()
    os.mkfifo(folder / "pipe.txt")
    files = {
        "full.txt/b.TXT": "乙".encode(),
        "a.txt": "甲".encode(),
        "empty.txt": b"",
        "scan.pdf": b"%PDF",
        "old.doc": b"",
        "README": b"",
        ".DS_Store": b"",
        "~$a.docx": b"lock",
        "__MACOSX/a.txt": b"",
    }
    assert build(files) == ["甲", "乙"]
    printed = capsys.readouterr().err
    assert "passed over: 10" in printed
    for said in [
        "a link to nowhere (1): ",
        "a folder that is called like a file, with nothing to read in it (1): ",
        "a link to a folder that is read already (1): ",
        "neither a file nor a folder (1): ",
        ".pdf is not read: export its text as .txt (1): ",
        ".doc is not read: save it as .docx (1): ",
        "no suffix is not read (1): ",
        "a hidden, lock or system file (3): ",
        "empty.txt has no document: it is empty or blank",
    ]:
        assert said in printed


def test_many_names_of_a_reason_are_counted_and_cut(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    for number in range(50):
        (tmp_path / f"{number:02}.pdf").touch()
    (line,) = passed_over_lines(list_files(tmp_path).passed_over)[1:]
    assert "(50)" in line and "19.pdf and 30 more" in line


def test_own_output_in_the_folder_is_neither_read_nor_named(script, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("甲", encoding="utf-8")
    for _ in range(2):
        flags = ["--data_path", str(tmp_path), "--output_path", str(tmp_path / "train.json")]
        script("build_trainfile").main(flags)
    assert "passed over" not in capsys.readouterr().err


def test_inline_elements_do_not_break_a_line(tmp_path):
    page = "<ul><li>一<i>个</i><li>两<span>个</span></ul><table><tr><td>左<td>右</table><pre>a\nb</pre>&nbsp;尾&lt;"
    assert html_text(page, tmp_path).split("\n") == ["一个", "两个", "左", "右", "a b", "\xa0尾<"]


def test_a_thousand_mixed_files_are_all_accounted_for(build, tmp_path, capsys):
    """Documents with unique names go in, in all formats and encodings; the same come out, in the order of the files."""
    random.seed(1)
    folder = tmp_path / "data"
    expected: dict[tuple[str, ...], list[str]] = {}
    passed_over = 0
    for number in range(1000):
        kind = random.choice([*SUFFIXES, ".txt", ".txt", ".txt.gz", ".jsonl.gz", ".pdf", ".ds", "hidden"])
        parts = (*(f"卷{random.randrange(5)}" for _ in range(random.randrange(3))), f"{number:04}{kind}")
        if kind == "hidden":
            parts = (*parts[:-1], f".{number:04}.txt")
        path = folder.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = [f"第{number}份的第{index}篇，天气很好。" for index in range(random.randrange(1, 4))]
        encoding = random.choice(["utf-8", "utf-8-sig", "utf-16"])
        lines = "\n".join(texts)
        bare = kind.removesuffix(".gz")
        if kind in (".pdf", ".ds", "hidden"):
            passed_over += 1
        else:
            expected[parts] = texts
        if bare in (".txt", ".md"):
            data = lines.encode(encoding)
        elif bare == ".jsonl":
            data = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts).encode(encoding)
        elif bare in (".csv", ".tsv"):
            data = "\r\n".join(["content", *texts]).encode(encoding)
        elif bare == ".srt":
            data = "\n".join(f"1\n00:00:00,000 --> 00:00:01,000\n{text}\n" for text in texts).encode(encoding)
        elif bare in (".html", ".htm", ".xhtml"):
            data = f"<body>{''.join(f'<p>{text}</p>' for text in texts)}</body>".encode(encoding)
        elif bare == ".epub":
            write_epub(path, ["".join(f"<p>{text}</p>" for text in texts)])
            continue
        elif bare == ".docx":
            write_docx(path, texts)
            continue
        else:
            data = b"\0"
        path.write_bytes(gzip.compress(data) if kind.endswith(".gz") else data)
    assert build(None, "--encoding", "auto") == [text for parts in sorted(expected) for text in expected[parts]]
    assert f"passed over: {passed_over}\n" in capsys.readouterr().err
