"""What the scripts that prepare texts say, in Chinese: a table of two columns, applied where a line is written.

The left column is the sentence of the code with {} for its values, and a test finds each of them in the code; the right
column is the same in Chinese, with {0}, {1} … for the values. What is not in the table stays English. The words
"error:", "warning:" and "note:" stay as they are, so that they can be searched for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, TextIO

TABLE: tuple[tuple[str, str], ...] = (
    # build_trainfile.py
    (
        "{}: {} files, {} documents, {} characters",
        "{0}：{1} 个文件，{2} 篇文档，{3} 字",
    ),
    (
        "chapters: {}",
        "章节：{0}",
    ),
    (
        "line breaks taken out: {}",
        "接起的断行：{0}",
    ),
    (
        "cleaned:",
        "清洗：",
    ),
    (
        "  {}: {} lines changed, {} left out",
        "  {0}：修改 {1} 行，去掉 {2} 行",
    ),
    (
        "duplicates left out: {} exact, {} near",
        "去掉的重复文档：完全相同 {0} 篇，近似 {1} 篇",
    ),
    (
        "{} documents ({}) are not longer than {} characters: make-tokenized.py leaves them out unless it is "
        "given a smaller --min_length than {}",
        "{0} 篇文档（{1}）不超过 {2} 字：make-tokenized.py 会丢弃它们，除非给出比 {3} 小的 --min_length",
    ),
    (
        "that is every document; --document paragraph or file makes longer ones",
        "全部文档都是这样；--document paragraph 或 file 能得到更长的文档",
    ),
    (
        "{} has no chapter headings: it is one document",
        "{0} 没有章节标题，整个文件是一篇文档",
    ),
    (
        "{} has no document: it is empty or blank",
        "{0} 没有文档：文件是空的或只有空白",
    ),
    (
        "passed over: {}",
        "跳过：{0}",
    ),
    (
        "{}: {} records, their text is in {}",
        "{0}：{1} 条记录，文本在 {2}",
    ),
    (
        "{}: {} of {} records have no text in {} and are passed over, the first in line {}",
        "{0}：{2} 条记录中有 {1} 条在 {3} 里没有文本，已跳过，第一条在第 {4} 行",
    ),
    (
        "{}: {} lines are no JSON objects or strings and are passed over, the first is line {}",
        "{0}：{1} 行不是 JSON 对象或字符串，已跳过，第一处是第 {2} 行",
    ),
    (
        "{}: {} bytes are not {} and were {}",
        "{0}：{1} 个字节不是 {2}，处理方式：{3}",
    ),
    (
        "--data_path {}: there is no such folder; put your texts into one",
        "--data_path {0}：没有这个文件夹，请把文本放进一个文件夹",
    ),
    (
        "--data_path {}: there is no text in {} files; nothing was written",
        "--data_path {0}：{1} 个文件里都没有文本，没有写入任何文件",
    ),
    (
        "--encoding {}: there is no such encoding; use utf-8, gb18030, big5, utf-16 or auto",
        "--encoding {0}：没有这种编码，请用 utf-8、gb18030、big5、utf-16 或 auto",
    ),
    (
        "{}: reading it needs a package that is not installed: pip install {} (requirements-vocab.txt has it), "
        "or move the file away",
        "{0}：读取它需要尚未安装的软件包：pip install {1}（requirements-vocab.txt 里有），或移走这个文件",
    ),
    (
        "{}, line {}: {}; correct the line, or pass such lines over with --on_error skip",
        "{0}，第 {1} 行：{2}；请改正，或用 --on_error skip 跳过这样的行",
    ),
    (
        "{} is not a whole {} file ({}); save or copy it again",
        "{0} 不是完整的 {1} 文件（{2}）；请重新保存或复制",
    ),
    (
        "--clean {}: there is no rule {}; the rules are {}",
        "--clean {0}：没有规则 {1}；规则有 {2}",
    ),
    # make-vocab.py
    (
        "words seen: {}, {} different; {} kept cover {}",
        "词数：{0}，不同的词 {1} 个；保留的 {2} 个覆盖 {3}",
    ),
    (
        "what other sizes would cover (embedding: its share of the parameters of {}):",
        "其他大小的覆盖率（embedding：词嵌入占 {0} 参数的比例）：",
    ),
    (
        "recommended: --vocab_size {}, the largest that spells all and whose rarest word is seen {} times (or "
        "else the smallest that spells them): rarer words are hardly learnt, better spelled",
        "推荐：--vocab_size {0}，它能表示全部文本，且最少见的词也出现 {1} 次（否则取能表示全部文本的最小值）；更"
        "少见的词很难学会，不如回退到子词和字",
    ),
    # make-tokenized.py
    (
        "tokenizer: {}; {} tokens of {}; a document is {} … {}",
        "分词器：{0}；{2} 的 {1} 个 token；文档标记 {3} … {4}",
    ),
    (
        "{}: {} pieces, {} tokens, {}",
        "{0}：{1} 个分片，{2} 个 token，{3}",
    ),
    (
        "documents: {}, kept {}; dropped {} that are not longer than {} characters, {} with nothing left after "
        "cleaning",
        "文档：{0} 篇，保留 {1} 篇；丢弃 {2} 篇不超过 {3} 字的，{4} 篇清洗后为空的",
    ),
    (
        "[UNK]: {} of {} tokens ({}); words spelled with several tokens: {} of {} ({})",
        "[UNK]：{1} 个 token 中有 {0} 个（{2}）；由多个 token 表示的词：{4} 个中有 {3} 个（{5}）",
    ),
    (
        "{}: nothing to do; corpus, vocabulary and options are those of the pieces there",
        "{0}：无事可做，语料、词表和参数与已有分片相同",
    ),
    (
        "resuming an interrupted run: {} of {} pieces are kept",
        "继续中断的运行：{1} 个分片中保留 {0} 个",
    ),
    (
        "most frequent unknown words: {}",
        "出现最多的未知词：{0}",
    ),
    (
        "none of the {} documents in {} is longer than --min_length {} characters; give a smaller --min_length, "
        "or make longer documents with build_trainfile.py --document paragraph or file; nothing was written",
        "{1} 的 {0} 篇文档都不超过 --min_length {2} 字；请调小 --min_length，或用 build_trainfile.py --document "
        "paragraph 或 file 得到更长的文档；没有写入任何文件",
    ),
    (
        "there is no {}: run build_trainfile.py first, or name the file with --raw_data_path",
        "没有 {0}：请先运行 build_trainfile.py，或用 --raw_data_path 指定文件",
    ),
    (
        "--raw_data_path {}: there is no document in it; nothing was written",
        "--raw_data_path {0}：其中没有文档，没有写入任何文件",
    ),
    (
        "interrupted",
        "已中断",
    ),
)

_PREFIX = re.compile(r"(?:error: |warning: |note: )?")


def language_of(environment: Mapping[str, str], arguments: Sequence[str] = ()) -> str:
    """ "zh" or "en": what --lang says, or else the locale of a process, LC_ALL, LC_MESSAGES and LANG, the first set."""
    for index, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name == "--lang":
            return value or "".join(arguments[index + 1 : index + 2])
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        if locale := environment.get(name):
            return "zh" if locale.lower().startswith("zh") else "en"
    return "en"


@lru_cache(maxsize=1)
def _patterns() -> list[tuple[re.Pattern[str], str]]:
    # The longer a sentence is, the less it can be mistaken for another.
    ordered = sorted(TABLE, key=lambda row: -len(row[0].replace("{}", "")))
    return [(re.compile("(.+?)".join(map(re.escape, english.split("{}")))), chinese) for english, chinese in ordered]


def translated(text: str) -> str:
    """A text that a script writes, line by line in Chinese as far as the table has it."""
    return "\n".join(map(_translated_line, text.split("\n")))


def _translated_line(line: str) -> str:
    prefix = _PREFIX.match(line)[0]  # type: ignore[index]
    rest = line[len(prefix) :]
    if not rest.strip():
        return line
    for pattern, chinese in _patterns():
        if found := pattern.fullmatch(rest):
            return prefix + chinese.format(*found.groups())
    return line


class TranslatedStream:
    """A stream that writes what it is given in Chinese; everything else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(translated(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
