"""What the scripts say: the sentences of the code, {} for values, and the same in Chinese; messages.py applies it."""

from __future__ import annotations

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
        "{} documents ({}) are not longer than {} characters: make-tokenized.py leaves them out unless it is given "
        "a smaller --min_length than {}",
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
        "{}: reading it needs a package that is not installed: pip install {} (requirements-vocab.txt has it), or "
        "move the file away",
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
    (
        "--clean_report needs --clean or --deduplicate: without them there is nothing to report",
        "--clean_report 需要 --clean 或 --deduplicate：否则没有可报告的内容",
    ),
    (
        "passed over, after {} documents of it: {}",
        "已跳过（之前读了 {0} 篇文档）：{1}",
    ),
    (
        "{}: --document {} ({})",
        "{0}：--document {1}（{2}）",
    ),
    (
        "{} lines, {} of them of at most {} characters",
        "{0} 行，其中 {1} 行不超过 {2} 字",
    ),
    (
        "{} chapter headings",
        "{0} 个章节标题",
    ),
    (
        "{} groups of lines between blank ones",
        "{0} 段由空行隔开的文字",
    ),
    (
        "{}, broken at about {} characters: --join_lines joins them",
        "{0}，约每 {1} 字断行：--join_lines 可以接起来",
    ),
    (
        "{}, and {} characters are too many for one document",
        "{0}，而 {1} 字对一篇文档太多",
    ),
    (
        "it is valid UTF-8 and was read as {}; if the text is wrong, use --encoding utf-8",
        "它是有效的 UTF-8，却按 {0} 读取；若文字不对，请用 --encoding utf-8",
    ),
    (
        "{} lines are not {} and were read as {}",
        "{0} 行不是 {1}，按 {2} 读取",
    ),
    (
        "{} bytes are not {} and were {}",
        "{0} 个字节不是 {1}，{2}",
    ),
    (
        "replaced by U+FFFD",
        "已换成 U+FFFD",
    ),
    (
        "it was read in part only: {}",
        "只读取了一部分：{0}",
    ),
    (
        "{} NUL characters; if this is a text in UTF-16, use --encoding utf-16",
        "{0} 个 NUL 字符；若文本是 UTF-16，请用 --encoding utf-16",
    ),
    (
        "{}: {} page breaks and vertical tabs became spaces",
        "{0}：{1} 个分页符和垂直制表符变为空格",
    ),
    (
        "{}, line {}, byte {}: not {}; {}",
        "{0} 第 {1} 行第 {2} 个字节：不是 {3}；{4}",
    ),
    (
        "--on_error skip or replace continues after such bytes",
        "用 --on_error skip 或 replace 可以越过这样的字节",
    ),
    (
        "from here on it looks like {}; --on_error skip or replace reads each line as what it is",
        "从这里起像是 {0}；用 --on_error skip 或 replace 可以按各行的编码读取",
    ),
    (
        "the rest of the file is {}; {}",
        "文件的其余部分是 {0}；{1}",
    ),
    (
        "it looks like {} and {} in one file; --encoding auto tells them apart",
        "一个文件里像是有 {0} 和 {1}；--encoding auto 可以分辨",
    ),
    (
        "it looks like {}: --encoding {} (--encoding auto finds it for each file; {})",
        "看起来是 {0}：请用 --encoding {1}（--encoding auto 会判断每个文件的编码；{2}）",
    ),
    (
        "give the file's encoding, such as --encoding gb18030, big5 or utf-16 ",
        "请给出文件的编码，如 --encoding gb18030、big5 或 utf-16",
    ),
    (
        "{}(--encoding auto finds it for each file; {})",
        "{0}（--encoding auto 会判断每个文件的编码；{1}）",
    ),
    (
        "{}: the encoding cannot be told: {}; give it, such as --encoding gb18030, or convert it to UTF-8",
        "{0}：无法判断编码：{1}；请给出编码，如 --encoding gb18030，或转换为 UTF-8",
    ),
    (
        "it is in none of the encodings that are tried",
        "它不是所试的任何一种编码",
    ),
    (
        "{}, line {}: the encoding changes here; some lines are {}, others {}; --on_error skip or replace reads "
        "each line as what it is, or convert the file to UTF-8",
        "{0} 第 {1} 行：编码在这里改变，有些行是 {2}，有些是 {3}；用 --on_error skip 或 replace 可以按各行的编码"
        "读取，或把文件转换为 UTF-8",
    ),
    (
        "--data_path {}: there is no .txt or .txt.gz file in it, nor another that is read ({}){}; put your texts "
        "there, one document a line",
        "--data_path {0}：里面没有 .txt、.txt.gz 或其他可读取的文件（{1}）{2}；请放入文本，每行一篇文档",
    ),
    (
        " (passed over: {})",
        "（跳过：{0}）",
    ),
    (
        "--text_field {}: {} has no field {}; its fields are {}",
        "--text_field {0}：{1} 没有字段 {2}；它的字段有 {3}",
    ),
    (
        "{}: which field is the text cannot be told; its fields are {}; give one or several with --text_field, "
        "such as --text_field {}, or move the file away",
        "{0}：无法判断哪个字段是文本；它的字段有 {1}；请用 --text_field 指定一个或几个，如 --text_field {2}，或移"
        "走这个文件",
    ),
    (
        "{} is not a text but {}; save it as a text file in UTF-8, or move it away",
        "{0} 不是文本文件，而是{1}；请另存为 UTF-8 文本，或移走它",
    ),
    (
        "{} is not compressed, though its name ends in .gz; name it {}",
        "{0} 没有压缩，文件名却以 .gz 结尾；请改名为 {1}",
    ),
    (
        "{} is compressed with gzip, though its name does not say so; name it {}.gz",
        "{0} 是 gzip 压缩的，文件名却没有写明；请改名为 {1}.gz",
    ),
    (
        "--similarity {}: it is a share from 0.5 to 1",
        "--similarity {0}：应在 0.5 到 1 之间",
    ),
    (
        "{} of the {} places for comparing made room for later documents; a few duplicates may be missed",
        "用于比较的 {1} 个位置里有 {0} 个让给了后面的文档；可能漏掉几篇重复的文档",
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
        "recommended: --vocab_size {}, the largest that spells all and whose rarest word is seen {} times (or else "
        "the smallest that spells them): rarer words are hardly learnt, better spelled",
        "推荐：--vocab_size {0}，它能表示全部文本，且最少见的词也出现 {1} 次（否则取能表示全部文本的最小值）；更少"
        "见的词很难学会，不如回退到子词和字",
    ),
    (
        "{}: {} lines: 5 special tokens, {} {}",
        "{0}：{1} 行：5 个特殊 token，{2} 个 {3}",
    ),
    (
        "{}, {} {} to spell other words",
        "{0}，{1} 个用来表示其他词的{2}",
    ),
    (
        "characters, parts and bytes",
        "字、子词和字节",
    ),
    (
        "{} words, seen {} times, {}",
        "{0} 个词（出现 {1} 次）{2}",
    ),
    (
        "are spelled",
        "回退到字、子词或字节",
    ),
    (
        "become [UNK]",
        "成为 [UNK]",
    ),
    (
        "--vocab_size auto: {} for {} MB",
        "--vocab_size auto：{1} MB 文本用 {0}",
    ),
    (
        "  --vocab_size   words kept  covered  spelled  rarest seen  embedding",
        "  --vocab_size     保留词数   覆盖率   回退率     最少次数  embedding",
    ),
    (
        "--{} {}: give at least 1",
        "--{0} {1}：至少为 1",
    ),
    (
        "--model_config {}: there is no such file; config/ has some",
        "--model_config {0}：没有这个文件；config/ 里有几个",
    ),
    (
        "--raw_data_path {}: there is no word in it; nothing was written",
        "--raw_data_path {0}：其中没有词，没有写入任何文件",
    ),
    (
        "--raw_data_path {}: there is no text in it; nothing was written",
        "--raw_data_path {0}：其中没有文本，没有写入任何文件",
    ),
    (
        "--raw_data_path {}: its only document is {}, the name of a file, not its text; put that file into data/ "
        "and run build_trainfile.py",
        "--raw_data_path {0}：唯一的文档是 {1}，这是文件名而不是文本；请把那个文件放进 data/，再运行 "
        "build_trainfile.py",
    ),
    (
        "--raw_data_path {} is a folder, not the file that build_trainfile.py writes; {}",
        "--raw_data_path {0} 是文件夹，不是 build_trainfile.py 写出的文件；{1}",
    ),
    (
        "run build_trainfile.py on it first",
        "请先对它运行 build_trainfile.py",
    ),
    (
        "give {}",
        "请给出 {0}",
    ),
    (
        "{} is not UTF-8 ({}); build it again with build_trainfile.py",
        "{0} 不是 UTF-8（{1}）；请用 build_trainfile.py 重新制作",
    ),
    (
        "{}, character {}, after document {}: {}; it must be a JSON array of strings, as build_trainfile.py writes it",
        "{0} 第 {1} 个字符，第 {2} 篇文档之后：{3}；它必须是字符串的 JSON 数组，如 build_trainfile.py 写出的那样",
    ),
    (
        "it does not begin with [",
        "它不以 [ 开头",
    ),
    (
        "a string is missing here",
        "这里缺少一个字符串",
    ),
    (
        "the file ends inside a string",
        "文件在字符串中间结束",
    ),
    (
        "a comma or ] is missing here",
        "这里缺少逗号或 ]",
    ),
    (
        "there is something behind the closing ]",
        "结尾的 ] 后面还有内容",
    ),
    (
        "{}: {} tokens: {}, 256 bytes, {} merges; {} tokens per character of the first {} characters",
        "{0}：{1} 个 token：{2}、256 个字节、{3} 次合并；前 {5} 字每字 {4} 个 token",
    ),
    (
        "what other sizes would give (embedding: its share of the parameters of {}):",
        "其他大小的结果（embedding：词嵌入占 {0} 参数的比例）：",
    ),
    (
        "recommended: --vocab_size {}, the largest whose last merges are seen {} times in that sample: rarer "
        "tokens are hardly learnt",
        "推荐：--vocab_size {0}，即最后的合并在样本中仍出现 {1} 次的最大值；更少见的 token 很难学会",
    ),
    (
        "write to another --vocab_file, or replace it with --overwrite",
        "请写到别的 --vocab_file，或用 --overwrite 替换",
    ),
    (
        "--vocab_file {} is a folder; name the file to write",
        "--vocab_file {0} 是文件夹；请给出要写的文件",
    ),
    (
        "{} is not a vocabulary that this script has written; {}",
        "{0} 不是这个脚本写出的词表；{1}",
    ),
    (
        "{} was changed since this script wrote it; {}",
        "{0} 在写出之后被改过；{1}",
    ),
    (
        "{} was made from {}, not from {}; {}",
        "{0} 由 {1} 制成，而不是 {2}；{3}",
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
        "changed: {}, such as {}",
        "改动：{0}，如 {1}",
    ),
    (
        "{} letters to lower case",
        "{0} 个字母改为小写",
    ),
    (
        "{} characters, of which an accent or another mark was dropped",
        "{0} 个字符去掉了重音或其他标记",
    ),
    (
        "{} characters of white space, dropped beside Chinese, in runs and at the ends of lines",
        "{0} 个空白字符（汉字旁边、连续的和行末的）被去掉",
    ),
    (
        "{} control characters, dropped",
        "{0} 个控制字符被去掉",
    ),
    (
        "characters (WordPiece)",
        "字（WordPiece）",
    ),
    (
        "{}, as GPT2-Chinese",
        "{0}，与 GPT2-Chinese 相同",
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
        "none of the {} documents in {} is longer than --min_length {} characters; give a smaller --min_length, or "
        "make longer documents with build_trainfile.py --document paragraph or file; nothing was written",
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
    (
        "--{} {}: give {} or more",
        "--{0} {1}：至少为 {2}",
    ),
    (
        "{} has a tokenizer of kind {}, not {}; leave --tokenizer out",
        "{0} 的分词器是 {1}，不是 {2}；请去掉 --tokenizer",
    ),
    (
        "the pieces in {} are of the {} {}, not of {}; write to another --tokenized_data_path, replace them with "
        "--overwrite, or give {} {}",
        "{0} 里的分片来自 {2}（{1}），而不是 {3}；请写到别的 --tokenized_data_path，用 --overwrite 替换，或给出 "
        "{4} {5}",
    ),
    (
        "{} has no ## parts, so words outside it may become [UNK]; it comes from make-vocab.py --compat or from "
        "GPT2-Chinese: build one without --compat, or give --compat here too",
        "{0} 里没有 ## 子词，词表外的词可能成为 [UNK]；它来自 make-vocab.py --compat 或 GPT2-Chinese：请不用 "
        "--compat 重新制作，或在这里也加 --compat",
    ),
    (
        "removed {} pieces of an earlier run that had more of them",
        "删除了之前运行多出的 {0} 个分片",
    ),
    (
        "{} has no {}, {} or vocab.json with merges.txt; name the vocabulary that the model was trained with "
        "(--vocab_file), or copy it there under its name",
        "{0} 里没有 {1}、{2} 或带 merges.txt 的 vocab.json；请用 --vocab_file 指定训练模型时的词表，或按原名复制到那里",
    ),
    (
        "{} is neither a tokenizer.json nor GPT-2's vocab.json with a merges.txt beside it",
        "{0} 既不是 tokenizer.json，也不是旁边有 merges.txt 的 GPT-2 vocab.json",
    ),
    # every script
    (
        "settings: {}",
        "设置：{0}",
    ),
    (
        "argument {}: {}",
        "参数 {0}：{1}",
    ),
    (
        "unrecognized arguments: {}",
        "不认识的参数：{0}",
    ),
    (
        "the following arguments are required: {}",
        "缺少必需的参数：{0}",
    ),
    (
        "expected one argument",
        "需要一个值",
    ),
    (
        "expected {} arguments",
        "需要 {0} 个值",
    ),
    (
        "invalid choice: {} (choose from {})",
        "没有 {0} 这个选项，可选：{1}",
    ),
    (
        "invalid {} value: {}",
        "{1} 不是有效的值（{0}）",
    ),
    (
        "ambiguous option: {} could match {}",
        "{0} 有歧义，可能是 {1}",
    ),
    (
        "{} is not above 0",
        "{0} 不大于 0",
    ),
    (
        "{} is below 0",
        "{0} 小于 0",
    ),
    (
        "{} is not a number from 0 to below 1",
        "{0} 不是 0 到 1 之间的数（可以是 0，不能是 1）",
    ),
    (
        "{} is not a number above 0, at most 1",
        "{0} 不是大于 0 且不超过 1 的数",
    ),
    (
        "{} is not a number of 0 or more",
        "{0} 不是大于等于 0 的数",
    ),
    (
        "{} is not a number above 0",
        "{0} 不是大于 0 的数",
    ),
    (
        "compiling {}, once on this machine: less than a minute",
        "正在编译 {0}，这台机器上只需一次，不到一分钟",
    ),
    (
        "the compiled code cannot be kept in {}, so every run will compile it: set NUMBA_CACHE_DIR to a folder "
        "that can be written",
        "编译好的代码无法保存到 {0}，每次运行都要重新编译：请把 NUMBA_CACHE_DIR 设为可写的文件夹",
    ),
    (
        "{}: another run is writing it; wait for its end, or stop it",
        "{0}：另一次运行正在写入，请等它结束或停止它",
    ),
    (
        "{}: another run is writing into this folder; wait for its end, or stop it",
        "{0}：另一次运行正在写入这个文件夹，请等它结束或停止它",
    ),
    (
        "{} is not UTF-8: byte {}; save it as UTF-8, or copy it again if it is damaged",
        "{0} 不是 UTF-8：第 {1} 个字节；请把它另存为 UTF-8，如果文件已损坏，请重新复制",
    ),
    (
        "{} has more than {} bytes; it is damaged or another file, copy it again",
        "{0} 超过 {1} 字节；它已损坏或是别的文件，请重新复制",
    ),
    (
        "{} is not JSON: line {}, column {}: {}",
        "{0} 不是 JSON：第 {1} 行第 {2} 列：{3}",
    ),
    (
        "the pieces in {} are of an earlier {} and are replaced",
        "{0} 里的分片是旧的（{1} 已改变），现在替换",
    ),
    # vocabularies and pieces
    (
        "there is no vocabulary {}: run make-vocab.py first, or name the file with --vocab_file (make-vocab.py) or "
        "--vocab_filename (make-tokenized.py)",
        "没有词表 {0}：请先运行 make-vocab.py，或用 --vocab_file（make-vocab.py）或 --vocab_filename（"
        "make-tokenized.py）指定文件",
    ),
    (
        "there is no vocabulary {}: run make-vocab.py first, or name the file with --vocab_file",
        "没有词表 {0}：请先运行 make-vocab.py，或用 --vocab_file 指定文件",
    ),
    (
        "there is no vocabulary {}; name the file with --vocab_file",
        "没有词表 {0}，请用 --vocab_file 指定文件",
    ),
    (
        "{} has thousands of empty lines; build the vocabulary with make-vocab.py",
        "{0} 有上千个空行；请用 make-vocab.py 生成词表",
    ),
    (
        "{}, line {}: byte {} is not UTF-8; build it with make-vocab.py",
        "{0} 第 {1} 行：第 {2} 个字节不是 UTF-8；请用 make-vocab.py 制作词表",
    ),
    (
        "{} is empty; build the vocabulary with make-vocab.py",
        "{0} 是空的；请用 make-vocab.py 制作词表",
    ),
    (
        "{}, line {} is empty; delete it, or build the vocabulary with make-vocab.py",
        "{0} 第 {1} 行是空的；请删除这一行，或用 make-vocab.py 制作词表",
    ),
    (
        "{}, line {}: {} stands in line {} already; delete one of them, or build the vocabulary with make-vocab.py",
        "{0} 第 {1} 行：{2} 在第 {3} 行已经出现；请删除其中一行，或用 make-vocab.py 制作词表",
    ),
    (
        "there is no {}; give a vocabulary, a tokenizer.json or a model folder",
        "没有 {0}；请给出词表、tokenizer.json 或模型文件夹",
    ),
    (
        "there is no folder {}: run make-tokenized.py first, or name it with --tokenized_data_path",
        "没有文件夹 {0}：请先运行 make-tokenized.py，或用 --tokenized_data_path 指定",
    ),
    (
        "there is no tokenized_train_0.txt in {}: run make-tokenized.py first",
        "{0} 里没有 tokenized_train_0.txt：请先运行 make-tokenized.py",
    ),
    (
        "{} has tokenized_train_{}.txt, but not {}{}; {}, or delete the pieces left from an earlier run",
        "{0} 里有 tokenized_train_{1}.txt，却没有 {2}{3}；{4}，或删除上一次运行留下的分片",
    ),
    (
        " and {} more",
        " 等另外 {0} 个",
    ),
    (
        "run make-tokenized.py again",
        "请重新运行 make-tokenized.py",
    ),
    (
        "{}: make-tokenized.py is still running or was interrupted; {} (it resumes)",
        "{0}：make-tokenized.py 还在运行或被中断；{1}（它会接着做）",
    ),
    (
        "{} is not a manifest of make-tokenized.py; {}",
        "{0} 不是 make-tokenized.py 的清单；{1}",
    ),
    (
        "{} is damaged, or of another program; write to another --tokenized_data_path, or replace it and the pieces "
        "with --overwrite",
        "{0} 已损坏，或是别的程序的文件；请写到另一个 --tokenized_data_path，或用 --overwrite 连同各分块一起替换",
    ),
    (
        "{} is not a manifest of make-vocab.py; delete it, and run make-vocab.py again",
        "{0} 不是 make-vocab.py 的清单；请删除它，再运行 make-vocab.py",
    ),
    (
        "{} does not tell of a training; copy it again, or train again",
        "{0} 里没有训练记录；请重新复制，或重新训练",
    ),
    (
        "{} of the tokens are [UNK]: {} has not the characters of this text; make one of it with make-vocab.py, "
        "which spells every character in bytes, or with --tokenizer bpe",
        "{0} 的 token 是 [UNK]：{1} 里没有这份文本的字；请用 make-vocab.py 为它制作词表（每个字都能用字节表示），"
        "或用 --tokenizer bpe",
    ),
    (
        "{}, or go on all the same with --allow_unk",
        "{0}，或用 --allow_unk 仍然继续",
    ),
    (
        "{} is not the vocabulary that {} was made with; {}, with --vocab_filename {}",
        "{0} 不是制作 {1} 时用的词表；{2}，并加上 --vocab_filename {3}",
    ),
    (
        "the tokenizer in {} is of another version of this program; {}",
        "{0} 里的分词器是本程序另一个版本的；{1}",
    ),
    (
        "{} lists {}, which is not there; {}",
        "{0} 列出了 {1}，但它不存在；{2}",
    ),
    (
        "{} does not know {}; delete that piece, or {}",
        "{0} 里没有 {1}；请删除这个分片，或{2}",
    ),
    (
        "{} is not the file that {} describes; {}",
        "{0} 不是 {1} 描述的文件；{2}",
    ),
    (
        "{}, byte {}: {} is no part of an id; {}",
        "{0} 第 {1} 个字节：{2} 不属于 token ID；{3}",
    ),
    (
        "{}, number {}: id {} is outside the vocabulary of {} tokens; the piece was made with another vocabulary: {}",
        "{0} 第 {1} 个数：ID {2} 超出词表（{3} 个 token）；这个分片是用另一个词表制作的：{4}",
    ),
    (
        "{} cannot be written ({}): its ids are kept in {} during this run",
        "{0} 无法写入（{1}）：这次运行期间 token ID 放在 {2}",
    ),
    # model folders and devices
    (
        "there is no model configuration {}; config/ has some to choose from",
        "没有模型配置 {0}；config/ 里有几个可选",
    ),
    (
        "{}: a model configuration is a JSON object, this is a {}",
        "{0}：模型配置应是 JSON 对象，这是 {1}",
    ),
    (
        "{}: {} must be a whole number above 0, it is {}",
        "{0}：{1} 必须是大于 0 的整数，现在是 {2}",
    ),
    (
        "{}: {} must be at most {}, it is {}",
        "{0}：{1} 最多为 {2}，现在是 {3}",
    ),
    (
        "{}: {} must be a number from 0 to below 1, it is {}",
        "{0}：{1} 必须大于等于 0 且小于 1，现在是 {2}",
    ),
    (
        "{}: {} must be a number above 0, at most 1, it is {}",
        "{0}：{1} 必须大于 0 且不超过 1，现在是 {2}",
    ),
    (
        "{}: {} must be true or false, it is {}",
        "{0}：{1} 必须是 true 或 false，现在是 {2}",
    ),
    (
        "{}: activation_function must be one that transformers has, it is {}",
        "{0}：activation_function 必须是 transformers 有的函数，现在是 {1}",
    ),
    (
        "{}: n_embd {} is not a multiple of n_head {}",
        "{0}：n_embd {1} 不是 n_head {2} 的倍数",
    ),
    (
        "{}: n_ctx {} is more than n_positions {}",
        "{0}：n_ctx {1} 大于 n_positions {2}",
    ),
    (
        "{}: n_ctx is {}, and a window needs a token to predict another from",
        "{0}：n_ctx 是 {1}，窗口至少要有两个 token",
    ),
    (
        "there is no model folder {}; train.py writes one, model/final_model by default",
        "没有模型文件夹 {0}；train.py 会写出它，默认是 model/final_model",
    ),
    (
        "{} is not a model folder: it has no {}",
        "{0} 不是模型文件夹：里面没有 {1}",
    ),
    (
        "{} has no weights: neither {} nor {}, nor an index of shards",
        "{0} 里没有权重：没有 {1} 和 {2}，也没有分片权重的索引",
    ),
    (
        "{} has no {}: these are not the weights of a GPT-2",
        "{0} 里没有 {1}：这不是 GPT-2 的权重",
    ),
    (
        "{} is not the file that {} describes: it has been changed since train.py wrote it; put the old one back, "
        "or train again",
        "{0} 不是 {1} 描述的文件：train.py 写出后它被改过；请恢复原文件，或重新训练",
    ),
    (
        "{} is not the file that {} describes: it is damaged or another program has written it; copy it again, or "
        "delete {} if it is what you want",
        "{0} 不是 {1} 描述的文件：它已损坏或由别的程序写出；请重新复制，若确实要用它就删除 {2}",
    ),
    (
        "{} and {} disagree: the model was trained with the latter; leave out --vocab_file, or name a model of the "
        "other vocabulary",
        "{0} 与 {1} 不一致：模型是用后者训练的；请去掉 --vocab_file，或换用那个词表的模型",
    ),
    (
        "the vocabulary has {} tokens, but {} knows only {}; give the vocabulary that it was trained with",
        "词表有 {0} 个 token，而 {1} 只有 {2} 个；请给出训练它时的词表",
    ),
    (
        "{} has {} rows for {} tokens: the other rows are cut off",
        "{0} 有 {1} 行而词表有 {2} 个 token：去掉多余的行",
    ),
    (
        "{}: {} causal masks of an old transformers are not needed and left out",
        "{0}：旧版 transformers 的 {1} 个因果掩码用不到，已忽略",
    ),
    (
        "{} is damaged or no weights file: {}; {}",
        "{0} 已损坏或不是权重文件：{1}；{2}",
    ),
    (
        "it ends too early",
        "文件不完整",
    ),
    (
        "copy it again, or train again",
        "请重新复制，或重新训练",
    ),
    (
        "copy the folder again, or train again",
        "请重新复制这个文件夹，或重新训练",
    ),
    (
        "the weights in {} do not fit its {}: {}{}",
        "{0} 里的权重与它的 {1} 不符：{2}{3}",
    ),
    (
        "the memory does not suffice for {}; end other programs, or take a smaller model",
        "内存不足以读取 {0}；请关闭其他程序，或用更小的模型",
    ),
    (
        "{} is there already and is not a model folder; move it away, or save elsewhere",
        "{0} 已经存在且不是模型文件夹；请移走它，或保存到别处",
    ),
    (
        "{} is the best model of this run on its validation set, {} bits per character after update {}; {} is of "
        "update {}",
        "{0} 是这次训练在验证集上最好的模型（第 {2} 步，每字符 {1} 比特）；{3} 是第 {4} 步的",
    ),
    (
        "--device {}: give numbers of GPUs, as 0 or 0,1, or cpu",
        "--device {0}：请给出 GPU 编号，如 0 或 0,1，或 cpu",
    ),
    (
        "no CUDA GPU is visible: training on the CPU",
        "没有可用的 CUDA GPU：在 CPU 上训练",
    ),
    (
        "out of memory with a micro-batch of {} windows of {} tokens{}. Take a smaller --batch_size and as much "
        "more --gradient_accumulation (they are {} and {}; their product decides the result), "
        "--gradient_checkpointing, or a smaller --model_config",
        "内存或显存不足（OOM）：一个微批次有 {0} 个窗口，每个 {1} 个 token{2}。请调小 --batch_size 并相应调大 "
        "--gradient_accumulation（现在是 {3} 和 {4}，结果由它们的乘积决定），或用 --gradient_checkpointing，或换更"
        "小的 --model_config",
    ),
    (
        ", when {} more were wanted",
        "，还需要 {0}",
    ),
    (
        "--device {}: this machine has {} GPUs, numbered from 0",
        "--device {0}：这台机器有 {1} 块 GPU，序号从 0 开始",
    ),
    (
        "GPU {} is not there: training on {}",
        "没有 GPU {0}：在 {1} 上训练",
    ),
    (
        "--device {}: it must be auto, cpu, cuda or a GPU's number, such as 0",
        "--device {0}：应为 auto、cpu、cuda 或 GPU 编号，如 0",
    ),
    (
        "--device {}: this machine has {} CUDA devices; use --device cpu",
        "--device {0}：这台机器有 {1} 个 CUDA 设备；请用 --device cpu",
    ),
    (
        "--fp16 and --precision {} contradict each other: leave one out",
        "--fp16 与 --precision {0} 矛盾：请去掉一个",
    ),
    (
        "--amp_backend apex is for fp16: add --fp16, or leave it out",
        "--amp_backend apex 用于 fp16：请加上 --fp16，或去掉它",
    ),
    (
        "this {} has no bf16 instructions",
        "这个 {0} 没有 bf16 指令",
    ),
    (
        "this {} multiplies bf16 more slowly than fp32",
        "这个 {0} 用 bf16 做乘法比 fp32 慢",
    ),
    # train.py: what is decided before the first update
    (
        "corpus     {}: {} tokens{}",
        "语料       {0}：{1} 个 token{2}",
    ),
    (
        "; {} held out, {} tokens",
        "；{0}留作验证集，{1} 个 token",
    ),
    (
        "{} slices of long documents",
        "长文档的 {0} 个片段",
    ),
    (
        "{} of {} documents",
        "{1} 篇文档中的 {0} 篇",
    ),
    (
        "{} documents and {}",
        "{0} 篇文档和{1}",
    ),
    (
        "; {} held out, {} tokens; {} tokens beside the slices left out",
        "；{0}留作验证集，{1} 个 token；片段旁边的 {2} 个 token 不用",
    ),
    (
        "vocabulary {}: {} tokens{}",
        "词表       {0}：{1} 个 token{2}",
    ),
    (
        " (instead of the {} of {})",
        "（不是 {1} 里写的 {0}）",
    ),
    (
        "model      {}: {} layers, n_embd {}, {} heads, n_ctx {}, dropout {}; {} parameters",
        "模型       {0}：{1} 层，n_embd {2}，{3} 个注意力头，n_ctx {4}，dropout {5}；{6} 个参数",
    ),
    (
        "windows    {} of {} tokens, stride {}{}; shuffled with seed {}",
        "窗口       {0} 个，每个 {1} 个 token，步幅 {2}{3}；按随机种子 {4} 打乱",
    ),
    (
        " (not {}, which would leave tokens out)",
        "（不是 {0}，那样会漏掉 token）",
    ),
    (
        "run        {} epochs of {} updates{} = {} updates of {} x {} windows",
        "训练       {0} 轮，每轮 {1} 步{2} = {3} 步，每步 {4} x {5} 个窗口",
    ),
    (
        "optimizer  {}, learning rate {} after {} updates of warm-up, {}; gradients clipped to {}{}",
        "优化器     {0}，学习率 {1}，预热 {2} 步，{3}；梯度裁剪到 {4}{5}",
    ),
    (
        "Muon at {} and AdamW (vectors of characters: {})",
        "Muon（{0}）和 AdamW（字向量：{1}）",
    ),
    (
        "Muon at {} and AdamW",
        "Muon（{0}）和 AdamW",
    ),
    (
        "then linear decay to 0",
        "之后线性降到 0",
    ),
    (
        "then constant, with linear decay to 0 over the last {} of the run",
        "之后不变，在最后的 {0} 里线性降到 0",
    ),
    (
        "then cosine decay to 0",
        "之后按余弦降到 0",
    ),
    (
        "; weight decay {} (Muon) and {}",
        "；权重衰减 {0}（Muon）和 {1}",
    ),
    (
        "; weight decay {}",
        "；权重衰减 {0}",
    ),
    (
        "precision  {} on {}{}",
        "精度       {0}，在 {1} 上{2}",
    ),
    (
        " ({})",
        "（{0}）",
    ),
    (
        "memory     about {} GiB on each device",
        "内存       每个设备约 {0} GiB",
    ),
    (
        "the warm-up of {} updates is longer than the run: --lr is never reached",
        "{0} 步的预热比整个训练还长：学习率到不了 --lr",
    ),
    (
        "--length {} is more than the model's n_ctx of {} tokens: a longer text goes on from its last {} to {} tokens "
        "only",
        "--length {0} 超过模型的 n_ctx（{1} 个 token）：更长的文本只根据最后 {2} 到 {3} 个 token 续写",
    ),
    (
        "--topk {} is more than the vocabulary's {} tokens: the same as --topk 0",
        "--topk {0} 超过词表的 {1} 个 token：与 --topk 0 相同",
    ),
    (
        "--lr {} suits models of 100 million parameters; one of {} hardly learns new texts with it: try "
        "--optimizer muon --lr 1.5e-2 --muon_lr 6e-3",
        "--lr {0} 适合参数一亿左右的模型；参数只有 {1} 个的模型用它几乎学不到新文本：请试 "
        "--optimizer muon --lr 1.5e-2 --muon_lr 6e-3",
    ),
    (
        "--log_step {} is longer than the run: only its last update is logged",
        "--log_step {0} 比整个训练还长：只记录最后一步",
    ),
    (
        "writes     {}, TensorBoard in {} every {} updates",
        "输出       {0}，每 {2} 步写一次 TensorBoard（{1}）",
    ),
    (
        "{} parameters for {} tokens in {} epochs: the model will overfit and memorise the texts. More text, a "
        "smaller --model_config or at most 4 epochs help",
        "{0} 个参数、{1} 个 token、{2} 轮：模型会过拟合，背下原文。可以增加文本、换更小的 --model_config，或最多训"
        "练 4 轮",
    ),
    (
        "embedding  initialised from the co-occurrences of {} tokens",
        "词嵌入     按 {0} 个 token 的共现统计初始化",
    ),
    (
        "embedding  {} tokens of {} on the layers of {}: {} rows found in {}, {} composed of several, {} new",
        "词嵌入     {1} 的 {0} 个 token 用在 {2} 的各层上：{3} 行取自 {4}，{5} 行由几行合成，{6} 行是新的",
    ),
    (
        "compiling: the first update takes a minute or so",
        "正在编译：第一步需要一分钟左右",
    ),
    (
        "not compiled: {}",
        "没有编译：{0}",
    ),
    (
        "the corpus is a single short document, so there is no validation set",
        "语料只有一篇短文档，因此没有验证集",
    ),
    (
        "--batch_size {} is less than a window for each of {} devices; raise it",
        "--batch_size {0} 不够 {1} 个设备各一个窗口，请调大",
    ),
    (
        "--embedding_init {} is for new models, and --pretrained_model {} has an embedding; leave one of them out",
        "--embedding_init {0} 用于新模型，而 --pretrained_model {1} 已有词嵌入；请去掉一个",
    ),
    (
        "the pieces were made with {}, the model was trained with {}: make the pieces again with make-tokenized.py "
        "--vocab_filename {}; or add --vocab_file {}, which keeps the model's layers and gives the tokens of that "
        "vocabulary rows of their own",
        "分片是用 {0} 制作的，模型是用 {1} 训练的：请用 make-tokenized.py --vocab_filename {2} 重新制作分片；或加"
        "上 --vocab_file {3}，它保留模型的各层，并为那个词表的 token 生成词嵌入",
    ),
    (
        "{} has {} tokens to train on, and one window has {} (n_ctx in {}): there is nothing to train on. Put more "
        "text into data/ (100,000 characters are a small corpus) and run build_trainfile.py, make-vocab.py and "
        "make-tokenized.py again, or take a --model_config with a smaller n_ctx (config/model_config_mini.json has "
        "128)",
        "{0} 只有 {1} 个 token 可训练，而一个窗口是 {2} 个（{3} 的 n_ctx）：没有可训练的内容。请在 data/ 里放更多文"
        "本（10 万字是小语料），重新运行 build_trainfile.py、make-vocab.py 和 make-tokenized.py，或换 n_ctx 更小的 "
        "--model_config（config/model_config_mini.json 是 128）",
    ),
    (
        "--teacher {} knows {} positions, and a window of this run has {} (n_ctx): take a --model_config with "
        "smaller windows, or another teacher",
        "--teacher {0} 有 {1} 个位置，而这次训练的窗口是 {2}（n_ctx）：请换窗口更小的 --model_config，或换教师模型",
    ),
    (
        "--teacher_share {} and --ngram_share {} are parts of one whole and more than 1 together: lower one of them",
        "--teacher_share {0} 和 --ngram_share {1} 是同一个整体的两部分，合计超过 1：请调低其中一个",
    ),
    (
        "--character_lr {} is for --optimizer muon: give that too, or leave --character_lr out",
        "--character_lr {0} 只用于 --optimizer muon：请一并给出，或去掉 --character_lr",
    ),
    (
        "--character_lr has no form for --amp_backend apex: take torch's, or leave --character_lr out",
        "--character_lr 不能与 --amp_backend apex 一起使用：请用 torch，或去掉 --character_lr",
    ),
    (
        "--plan needs --minutes, the time to plan for",
        "--plan 需要 --minutes，即要规划的时间",
    ),
    (
        "--sample_prompts is not in this terminal's encoding; name a file instead, with a prompt a line",
        "--sample_prompts 不是这个终端的编码，请改为给出一个文件，每行一个提示词",
    ),
    (
        "--eval_only measures a model folder: name it with --pretrained_model",
        "--eval_only 测量一个模型文件夹：请用 --pretrained_model 指定",
    ),
    (
        "--raw: make-tokenized.py ended with the error above; nothing was trained",
        "--raw：make-tokenized.py 以上面的错误结束，没有训练",
    ),
    (
        "--{} is for a run without torchrun; run the same without it, once, for what it does",
        "--{0} 不能与 torchrun 一起用；请先不用 torchrun 运行一次",
    ),
    (
        "--device {} has no GPU for local rank {}; list one for each",
        "--device {0} 没有给本机进程 {1} 的 GPU；请为每个进程列出一块",
    ),
    # train.py: the plan of --minutes
    (
        "measuring how fast this machine trains",
        "正在测量这台机器的训练速度",
    ),
    (
        "plan       {}",
        "规划       {0}",
    ),
    (
        "plan       as in {}",
        "规划       同 {0}",
    ),
    (
        "plan       about {} updates, {} epochs, fit into the time",
        "规划       约 {0} 步，{1} 轮，在时间之内",
    ),
    (
        "{} tokens in {} documents, vocabulary {}, {} minutes left",
        "{0} 个 token，{1} 篇文档，词表 {2}，还剩 {3} 分钟",
    ),
    (
        "{}: {} tokens/s here, {} epochs in the time",
        "{0}：这里每秒 {1} 个 token，时间内 {2} 轮",
    ),
    (
        "many epochs for such a model: a trigram of the tokens and a cache of each document are learnt from too",
        "对这样的模型训练轮数多：同时学习 token 的三元语法和每个文档的缓存",
    ),
    (
        "several epochs: dropout {}, weight decay {} and {} (Muon), windows at other places in each",
        "训练多轮：dropout {0}，权重衰减 {1} 和 {2}（Muon），每轮的窗口位置不同",
    ),
    (
        "few epochs for such a model, little is memorised: no dropout and little weight decay",
        "这样的模型几轮之内记不住多少语料：不用 dropout，权重衰减很小",
    ),
    (
        "a text of this size is memorised after {} epochs: some {} minutes are enough; more text is what helps",
        "这么多文本 {0} 轮之后就会被背下：约 {1} 分钟就够；有用的是更多文本",
    ),
    (
        "expected: about {} bits per character if the text is like medical_qa.txt, a megaword of modern prose; "
        "less text or verse gives more bits",
        "预计：若文本与 medical_qa.txt 相似（百万词的现代散文），约每字符 {0} 比特；文本更少或是诗词则更多",
    ),
    (
        "much text for the time: less is held out, so that measuring it takes 2 % of the time at most",
        "对这段时间来说语料很多：少留验证集，让测量最多占 2 % 的时间",
    ),
    (
        "{} tokens and the shape {}",
        "{0} 个 token 和结构 {1}",
    ),
    (
        "the shape {}",
        "结构 {0}",
    ),
    (
        "not tried before: {}; the plan is an extrapolation",
        "没有试过：{0}；这个规划是外推",
    ),
    (
        "--minutes {}: {} seconds are left, too few to train",
        "--minutes {0}：只剩 {1} 秒，不够训练",
    ),
    (
        "{} has no tokens: put text into data/ and run the stages before again",
        "{0} 里没有 token：请在 data/ 里放文本，重新运行前几步",
    ),
    # train.py: progress and the end
    (
        "the remaining {} updates will take about {}",
        "剩下的 {0} 步约需 {1}",
    ),
    (
        "epoch {} of {}: loss {}, {} s, {} tokens/s; saved {}",
        "第 {0} 轮（共 {1} 轮）：损失 {2}，{3} 秒，每秒 {4} 个 token；已保存 {5}",
    ),
    (
        "; fp16 overflowed and skipped {} updates so far",
        "；fp16 溢出，至今跳过 {0} 步",
    ),
    (
        "; {} updates skipped so far, with a loss or gradient that was not finite",
        "；至今跳过 {0} 步，因为损失或梯度不是有限的数",
    ),
    (
        "update {}: validation loss {}, perplexity {}, {}{} bits per character{}",
        "第 {0} 步：验证集损失 {1}，困惑度 {2}，每字符 {3}{4} 比特{5}",
    ),
    (
        ", with its logits times {}",
        "，logits 乘以 {0}",
    ),
    (
        "--calibrate measures held-out text, and --val_fraction 0 holds none out: leave one of them out",
        "--calibrate 要用验证集测量，而 --val_fraction 0 不留验证集：请去掉其中一个",
    ),
    (
        "overfitting since update {}: the training loss falls, the validation loss does not",
        "从第 {0} 步起过拟合：训练损失下降，验证集损失不再下降",
    ),
    (
        "stopped after update {} of {}; the checkpoint is {}. The same command with --resume continues exactly "
        "from there",
        "在第 {0} 步停止（共 {1} 步）；检查点是 {2}。同样的命令加 --resume 会准确地从那里继续",
    ),
    (
        "trained {} updates{}; the last model is in {}",
        "训练了 {0} 步{1}；最后的模型在 {2}",
    ),
    (
        " of {}, {} measurements without gain",
        "（共 {0} 步，连续 {1} 次测量没有改进）",
    ),
    (
        "the best model, {}, has {} bits per character and is in {}",
        "最好的模型（{0}）每字符 {1} 比特，在 {2}",
    ),
    (
        "the same",
        "就是它",
    ),
    (
        "of update {}",
        "第 {0} 步",
    ),
    (
        "{} on {} documents of {}: loss {}, perplexity {}, {} bits per character",
        "{0}，{2} 的 {1} 篇文档：损失 {3}，困惑度 {4}，每字符 {5} 比特",
    ),
    (
        "report: {}",
        "报告：{0}",
    ),
    (
        "counting {}-grams of the training text",
        "统计训练文本的 {0}-gram",
    ),
    (
        "completions of {}",
        "{0} 的续写",
    ),
    (
        "there is no {}: a report is of a finished run; name its --output_dir, or finish it with --resume",
        "没有 {0}：报告属于已结束的训练；请指定它的 --output_dir，或用 --resume 完成训练",
    ),
    (
        "{} has {} tokens to train on, {} was trained on {}: the pieces were made again since; train again, or put "
        "the old ones back",
        "{0} 有 {1} 个 token，而 {2} 训练时是 {3} 个：分片已重新制作；请重新训练，或恢复原来的分片",
    ),
    (
        "update {}: the loss is {}, the norm of its gradient {}, {} updates in a row. {}",
        "第 {0} 步：损失是 {1}，梯度范数是 {2}，已连续 {3} 步。{4}",
    ),
    (
        "update {}: the loss has been above {}, worse than guessing a token of the vocabulary, for {} updates: the "
        "run has diverged. {}",
        "第 {0} 步：损失已连续 {2} 步高于 {1}，比从词表里随机猜还差：训练已发散。{3}",
    ),
    (
        "Take a lower --lr with --resume none (the model folders of earlier epochs and the checkpoints are untouched)",
        "请调低 --lr 并加 --resume none（之前各轮的模型文件夹和检查点没有改动）",
    ),
    (
        "every update of epoch {} overflowed in fp16; take --precision fp32 or bf16",
        "第 {0} 轮的每一步都在 fp16 里溢出；请用 --precision fp32 或 bf16",
    ),
    # train.py: resuming, and what lies in the output folder
    (
        "the checkpoint was made with {}, this is {}: not bit for bit",
        "检查点由 {0} 写出，现在是 {1}：结果不会按位一致",
    ),
    (
        "there is no checkpoint in {}: starting at the beginning",
        "{0} 里没有检查点：从头开始",
    ),
    (
        "--resume {}: there is no such checkpoint; they are in {}",
        "--resume {0}：没有这个检查点；检查点在 {1}",
    ),
    (
        "resuming from {}, after update {} of {}",
        "从 {0} 继续，已完成第 {1} 步（共 {2} 步）",
    ),
    (
        "an earlier run in {} is deleted: {}",
        "删除 {0} 里之前的训练：{1}",
    ),
    (
        "{} is of a run that was interrupted after update {} of {}: continue it with --resume, take another "
        "--output_dir, or start over with --resume none, which deletes it",
        "{0} 属于在第 {1} 步（共 {2} 步）中断的训练：请用 --resume 继续，换一个 --output_dir，或用 --resume none 重"
        "新开始（会删除它）",
    ),
    (
        "{} holds an earlier run ({}), and nothing of it is replaced unasked: take another --output_dir, or add "
        "--overwrite, which deletes it",
        "{0} 里有之前的训练（{1}），不会擅自替换：请换一个 --output_dir，或加 --overwrite（会删除它）",
    ),
    (
        "--{} {} is part of the run that --overwrite would delete: take another --output_dir",
        "--{0} {1} 属于 --overwrite 要删除的训练：请换一个 --output_dir",
    ),
    (
        "{} cannot be resumed: {}. Give what it was made with, or take another --output_dir, or start over with "
        "--resume none",
        "{0} 无法继续：{1}。请给出原来的设置，换一个 --output_dir，或用 --resume none 重新开始",
    ),
    (
        "{} was {}, is {}",
        "{0}原来是 {1}，现在是 {2}",
    ),
    (
        "the corpus (SHA-256)",
        "语料（SHA-256）",
    ),
    (
        "the vocabulary (SHA-256)",
        "词表（SHA-256）",
    ),
    (
        "the model's shape",
        "模型的结构",
    ),
    (
        "the kind of device",
        "设备类型",
    ),
    (
        "the number of updates",
        "总步数",
    ),
    (
        "what --ngram_share adds",
        "--ngram_share 加入的内容",
    ),
    (
        "a trigram",
        "三元语法",
    ),
    (
        "a trigram and a cache",
        "三元语法和缓存",
    ),
    (
        "when --teacher predicts",
        "--teacher 的预测何时计算",
    ),
    (
        "once",
        "只算一次",
    ),
    (
        "in every window",
        "每个窗口都算",
    ),
    (
        "the span of windows",
        "窗口所在的范围",
    ),
    (
        "a piece",
        "一个分片",
    ),
    (
        "the whole text",
        "整个文本",
    ),
    (
        "{} does not fit this run, or is damaged: {}; resume from another checkpoint, or start over with --resume none",
        "{0} 与这次训练不符或已损坏：{1}；请从别的检查点继续，或用 --resume none 重新开始",
    ),
    (
        "no checkpoint in {} is valid; start over with --resume none, which deletes them",
        "{0} 里没有有效的检查点；请用 --resume none 重新开始（会删除它们）",
    ),
    (
        "{} is damaged: it is not as it was written",
        "{0} 已损坏：与写出时不同",
    ),
    (
        "{} cannot be read: {}; {}",
        "{0} 无法读取：{1}；{2}",
    ),
    # generate.py
    (
        "text (an empty line ends): ",
        "文本（空行结束）： ",
    ),
    (
        "the text is longer than the model's {} tokens; its first {} were cut off",
        "文本比模型的 {0} 个 token 长；开头的 {1} 个 token 被截去",
    ),
    (
        "the model has {} different completions of this text, not {}",
        "对这段文本，模型只有 {0} 个不同的续写，不到 {1} 个",
    ),
    (
        "{} samples written to {}",
        "{0} 个续写已写入 {1}",
    ),
    (
        "{} articles written to {}/{title}-{article}.txt",
        "{0} 篇文章已写入 {1}/{{标题}}-{{文章}}.txt",
    ),
    (
        "{} changes nothing: {}",
        "{0} 不起作用：{1}",
    ),
    (
        "the model folder has its own config.json",
        "模型文件夹有自己的 config.json",
    ),
    (
        "every completion is decoded with a KV cache",
        "续写总是用 KV 缓存解码",
    ),
    (
        "the model folder says what its tokenizer is",
        "模型文件夹说明了它的分词器",
    ),
    (
        "--{} must be from {} to {}, it is {}",
        "--{0} 必须在 {1} 到 {2} 之间，现在是 {3}",
    ),
    (
        "--length must be 1 or more, or -1 for the model's n_ctx, it is {}",
        "--length 至少为 1，或用 -1 表示模型的 n_ctx，现在是 {0}",
    ),
    (
        "--best_of must not be less than --nsamples, {}, it is {}",
        "--best_of 不能小于 --nsamples（{0}），现在是 {1}",
    ),
    (
        "--bad_words has a text of white space only; leave it out",
        "--bad_words 里有只含空白的文本，请去掉",
    ),
    (
        "--{} must be 1 or more, it is {}",
        "--{0} 至少为 1，现在是 {1}",
    ),
    (
        "--save_samples_path {} is not a folder",
        "--save_samples_path {0} 不是文件夹",
    ),
    (
        "the typed text is not in this terminal's encoding, {}",
        "输入的文本不是这个终端的编码 {0}",
    ),
    (
        "--logit_bias {}: write a token id, = and a number, such as 25=-2.5",
        "--logit_bias {0}：请写 token ID、= 和一个数，如 25=-2.5",
    ),
    (
        "--logit_bias {}: the number must be from -100 to 100",
        "--logit_bias {0}：数必须在 -100 到 100 之间",
    ),
    (
        "--titles and --titles_file are two ways to say the same; leave one out",
        "--titles 和 --titles_file 作用相同，请去掉一个",
    ),
    (
        "--titles_file {} has no title; write one on a line",
        "--titles_file {0} 里没有标题；请每行写一个",
    ),
    (
        "decoding with PyTorch in float32, which is slower: {}",
        "用 PyTorch 以 float32 解码，比较慢：{0}",
    ),
    (
        "the vocabulary has {} tokens and the model {}: they do not belong together",
        "词表有 {0} 个 token，模型有 {1} 个：它们不匹配",
    ),
    (
        "the model's n_ctx is {}; completing a context needs 2 or more",
        "模型的 n_ctx 是 {0}；续写至少需要 2",
    ),
    (
        "the model's weight {} has values that are not finite: its training diverged; take an earlier model_epoch "
        "folder, or train again with a smaller --lr",
        "模型的权重 {0} 里有不是有限的数：训练发散了；请用较早的 model_epoch 文件夹，或用更小的 --lr 重新训练",
    ),
    # server.py
    (
        "listening on {}, loading {}",
        "正在监听 {0}，加载 {1}",
    ),
    (
        "{} is ready{} on {}, {} s after the start",
        "{0} 已就绪{1}（{2}），启动后 {3} 秒",
    ),
    (
        " at full speed",
        "，全速运行",
    ),
    (
        "{} is at full speed, {} s after the start",
        "{0} 已全速运行，启动后 {1} 秒",
    ),
    (
        "serving on {} (Ctrl-C stops); open it in a browser, or try",
        "服务地址 {0}（Ctrl-C 停止）；请在浏览器里打开，或试试",
    ),
    (
        "{} is reloaded{}, {} s",
        "{0} 已重新加载{1}，{2} 秒",
    ),
    (
        "stopped",
        "已停止",
    ),
    (
        "a model has stopped, and it is not to be started again (--no-restart)",
        "一个模型已停止，且不再启动（--no-restart）",
    ),
    (
        "the process of device {} has ended",
        "设备 {0} 的进程已结束",
    ),
    (
        "{}; was it killed, or is the memory too small for it?",
        "{0}；它被杀死了，还是内存不够？",
    ),
    (
        "the model's process has ended with status {}",
        "模型的进程以状态 {0} 结束",
    ),
    (
        "the memory does not suffice for {} and --batch_size {}",
        "内存不足以运行 {0} 和 --batch_size {1}",
    ),
    (
        "--watch: there is no model folder in {} yet; train.py writes one after an epoch",
        "--watch：{0} 里还没有模型文件夹；train.py 在一轮之后写出",
    ),
    (
        "--port must be from 0 to 65535, it is {}",
        "--port 必须在 0 到 65535 之间，现在是 {0}",
    ),
    (
        "--{} must be above 0 seconds, it is {}",
        "--{0} 必须大于 0 秒，现在是 {1}",
    ),
    (
        "--batch_size must be at most {}, it is {}",
        "--batch_size 最多为 {0}，现在是 {1}",
    ),
    (
        "--model_name is given {} times and --model_path {} times; give one name for each",
        "--model_name 给了 {0} 次，--model_path 给了 {1} 次；请为每个模型给一个名字",
    ),
    (
        "{}; give each --model_path a --model_name of its own",
        "{0}；请为每个 --model_path 给不同的 --model_name",
    ),
    (
        "a model has no name",
        "有一个模型没有名字",
    ),
    (
        "{} models are called {}",
        "{0} 个模型都叫 {1}",
    ),
    (
        "--cors_origins {}: {} is not *, none or a site such as https://a.example",
        "--cors_origins {0}：{1} 不是 *、none 或 https://a.example 这样的网站",
    ),
    (
        "{}_file {} is not UTF-8 at byte {}; a key is printable ASCII",
        "{0}_file {1} 的第 {2} 个字节不是 UTF-8；密钥是可打印的 ASCII",
    ),
    (
        "{}_file {} has no key; write one key per line",
        "{0}_file {1} 里没有密钥；请每行写一个",
    ),
    (
        "{}: a key must be printable ASCII without spaces, and not empty",
        "{0}：密钥必须是不含空格的可打印 ASCII，不能为空",
    ),
    (
        "--host {}: there is no such host ({}); use 127.0.0.1, or 0.0.0.0 for all",
        "--host {0}：没有这个主机（{1}）；请用 127.0.0.1，或用 0.0.0.0 表示所有地址",
    ),
    (
        "port {} on {} {}",
        "{1} 的端口 {0} {2}",
    ),
    (
        "is in use; stop the program that uses it, or choose another --port (0 is any free one)",
        "已被占用；请停止占用它的程序，或换一个 --port（0 表示任意空闲端口）",
    ),
    (
        "is not allowed; choose a --port from 1024 on",
        "不允许使用；请选 1024 以上的 --port",
    ),
    (
        "cannot be used: {}",
        "无法使用：{0}",
    ),
    (
        "--device: several devices are not possible on Windows; start one server per --port instead",
        "--device：Windows 上不能用多个设备；请为每个 --port 启动一个服务",
    ),
    # what is wrong with files, models and packages
    (
        "--compat is for words and characters, which GPT2-Chinese has; leave it out for BPE",
        "--compat 用于 GPT2-Chinese 有的按词和按字两种分词器，BPE 请去掉它",
    ),
    (
        "most frequent unknown words:",
        "最常见的未知词：",
    ),
    (
        "  --vocab_size       tokens  tokens per character  rarest seen  embedding",
        "  --vocab_size     token 数      每字符 token 数   最少出现  词嵌入",
    ),
    (
        "--compat writes GPT2-Chinese's vocabulary of words; leave out --compat or --tokenizer",
        "--compat 写出 GPT2-Chinese 的按词词表；请去掉 --compat 或 --tokenizer",
    ),
    (
        "--keep_case and --keep_spaces are for words and characters: GPT2-Chinese keeps neither, BPE both",
        "--keep_case 和 --keep_spaces 用于按词和按字：GPT2-Chinese 两者都不保留，BPE 两者都保留",
    ),
    (
        "--report is about the default vocabulary; leave out --compat or --report",
        "--report 针对默认词表；请去掉 --compat 或 --report",
    ),
    (
        "--model_config {}: {} must be a number",
        "--model_config {0}：{1} 必须是数字",
    ),
    (
        "others may write this file, so its code is not run",
        "其他用户可以写这个文件，因此不运行其中的代码",
    ),
    (
        "the vocabulary has {} tokens, the model {}",
        "词表有 {0} 个 token，模型有 {1} 个",
    ),
    (
        "{}: {} is {} and should be a matrix; {}",
        "{0}：{1} 是 {2}，应当是矩阵；{3}",
    ),
    (
        "{}: a manifest is a JSON object, this is a {}",
        "{0}：清单应当是 JSON 对象，这里是 {1}",
    ),
    (
        "the weights in {}: {} is of {}, not of fractions; {}",
        "{0} 里的权重：{1} 的类型是 {2}，不是小数；{3}",
    ),
    (
        "{} has no weight_map, which says in which file each weight is; copy it again",
        "{0} 没有 weight_map，它说明每个权重在哪个文件里；请重新复制",
    ),
    (
        "{} names {}, which is not in {}; copy it there",
        "{0} 提到 {1}，但 {2} 里没有；请复制进去",
    ),
    (
        "{} is another name of a file; delete it",
        "{0} 是另一个文件的别名（链接），请删除它",
    ),
    (
        "{} is nested too deeply; it is damaged, copy it again",
        "{0} 嵌套过深，已损坏，请重新复制",
    ),
    (
        "{} has a number of too many digits; it is damaged, copy it again",
        "{0} 里有位数过多的数字，已损坏，请重新复制",
    ),
    (
        "another run is writing it; wait for its end, or stop it",
        "另一个进程正在写它；请等它结束，或停止它",
    ),
    (
        "another run is writing into this folder; wait for its end, or stop it",
        "另一次运行正在写这个文件夹；请等它结束，或停止它",
    ),
    (
        "--amp_backend apex: {}. NVIDIA removed amp from apex in May 2025 (and the package `apex` on PyPI is "
        "another program); leave the flag out, torch has had the same inside since 1.6",
        "--amp_backend apex：{0}。NVIDIA 在 2025 年 5 月从 apex 中去掉了 amp（PyPI 上的 `apex` 是另一个程序）；"
        "请去掉这个参数，torch 从 1.6 起自带同样的功能",
    ),
    (
        "{}: llama.cpp's GPT-2 has gelu_new, not {}",
        "{0}：llama.cpp 的 GPT-2 用 gelu_new，不是 {1}",
    ),
    (
        "{}: {} MB, for llama.cpp",
        "{0}：{1} MB，供 llama.cpp 使用",
    ),
    (
        "it has no header of safetensors",
        "它没有 safetensors 的文件头",
    ),
    (
        "its header is not a JSON object",
        "它的文件头不是 JSON 对象",
    ),
    (
        "it has {} bytes and describes {}",
        "它有 {0} 字节，而文件头写的是 {1} 字节",
    ),
    (
        "{} does not hold a model's weights by name; copy it again, or take another",
        "{0} 里没有按名称保存的模型权重；请重新复制，或换一个文件",
    ),
    (
        "its header is not JSON",
        "它的文件头不是 JSON",
    ),
    (
        "it does not describe {} as it must",
        "它对 {0} 的描述不合格式",
    ),
    (
        "its tensors overlap or leave room between them",
        "它的张量互相重叠，或者之间有空隙",
    ),
    (
        "{} is damaged or no weights file: {} is sparse, nested or without numbers; {}",
        "{0} 已损坏或不是权重文件：{1} 是稀疏或嵌套的张量，或者没有数值；{2}",
    ),
    (
        "{} is damaged or no weights file: it takes {} bytes to describe it; {}",
        "{0} 已损坏或不是权重文件：描述它就用了 {1} 字节；{2}",
    ),
    (
        "--scheduler needs the package distributed, here and on the cluster: pip install distributed",
        "--scheduler 需要本机和集群上都有 distributed：pip install distributed",
    ),
    (
        "--scheduler {}: no Dask scheduler answers there ({})",
        "--scheduler {0}：那里没有 Dask 调度器响应（{1}）",
    ),
    (
        "a worker process died (killed, or out of memory); try again, with fewer --workers if memory was short",
        "一个工作进程退出了（被结束，或内存用尽）；请重试，如果内存不足请减少 --workers",
    ),
    (
        "is a {} tokenizer{}, and only byte-level BPE is read from a tokenizer.json; for WordPiece give its "
        "vocab.txt with --tokenizer char",
        "是 {0} 分词器{1}，而 tokenizer.json 只支持字节级 BPE；WordPiece 请用 --tokenizer char 给出它的 vocab.txt",
    ),
    (
        "has {}, which ends a document; name the one it has with --document_marks",
        "有表示文档结尾的 {0}；请用 --document_marks 指定它的标记",
    ),
    (
        "is not a tokenizer.json of the tokenizers package; copy it again",
        "不是 tokenizers 包的 tokenizer.json，请重新复制",
    ),
    (
        "is damaged: {}; copy it again",
        "已损坏：{0}；请重新复制",
    ),
    (
        "is damaged: its normalizer replaces the empty text; copy it again",
        "已损坏：它的 normalizer 会替换空文本；请重新复制",
    ),
    (
        "is damaged: {} tokens have ids from {} to {}; copy it again",
        "已损坏：{0} 个 token 的 ID 从 {1} 到 {2}；请重新复制",
    ),
    (
        "has the token {}, which is not of bytes; copy it again",
        "有不由字节组成的 token {0}；请重新复制",
    ),
    (
        "does not fit the merges.txt beside it: {}; copy both again",
        "与旁边的 merges.txt 不符：{0}；请重新复制这两个文件",
    ),
    (
        "id {} is not in the vocabulary of {} tokens",
        "ID {0} 不在 {1} 个 token 的词表里",
    ),
    (
        "the nearest one is {}, but the text is hardly {}",
        "最接近的是 {0}，但这段文字不像{1}",
    ),
    (
        "it looks like {} or a similar encoding of a {} language",
        "看起来像 {0}，或{1}语言的类似编码",
    ),
    (
        "it may be {} or {}",
        "可能是 {0} 或 {1}",
    ),
    (
        "has no [UNK], which stands for characters that are not in it; add a line [UNK]",
        "没有 [UNK]，它代表词表里没有的字；请加一行 [UNK]",
    ),
    (
        "this tokenizer cuts words with THULAC: pip install thulac==0.2.2",
        "这个分词器用 THULAC 切词：pip install thulac==0.2.2",
    ),
    (
        "has neither [UNK] nor the 256 bytes, so some characters have no id; add a line [UNK]",
        "既没有 [UNK] 也没有 256 个字节，有些字没有 ID；请加一行 [UNK]",
    ),
    (
        "--clean: the rule {} needs a package that is not installed: pip install {} (requirements-vocab.txt "
        "has it), or turn it off with --clean no-{}",
        "--clean：规则 {0} 需要没有安装的包：pip install {1}（requirements-vocab.txt 里有），或用 --clean "
        "no-{2} 关掉它",
    ),
    (
        "{} is a vocabulary of words or characters; for --tokenizer bpe give a tokenizer.json",
        "{0} 是按词或按字的词表；--tokenizer bpe 请给出 tokenizer.json",
    ),
    (
        "{} must be a JSON object, it is {}; copy it again",
        "{0} 必须是 JSON 对象，这里是 {1}；请重新复制",
    ),
    (
        "{}: BPE keeps both anyway; leave it out",
        "{0}：BPE 本来就两者都保留，请去掉它",
    ),
    (
        "{}: GPT2-Chinese keeps neither; leave out --compat or {}",
        "{0}：GPT2-Chinese 两者都不保留；请去掉 --compat 或 {1}",
    ),
    (
        "{}: the vocabulary has no token {} for white space; build it with make-vocab.py --keep_spaces",
        "{0}：词表没有表示空白的 token {1}；请用 make-vocab.py --keep_spaces 制作词表",
    ),
    (
        "{}: the model is of older rules ({}), which keep neither",
        "{0}：模型用的是旧规则（{1}），两者都不保留",
    ),
    (
        "--document_marks is for vocabularies of characters and BPE; words have [MASK] and [CLS]",
        "--document_marks 用于按字和 BPE 的词表；按词的词表有 [MASK] 和 [CLS]",
    ),
    (
        "{}: rules is {}, this version has {}; copy the file again, or update this program",
        "{0}：规则是 {1}，本版本是 {2}；请重新复制文件，或更新本程序",
    ),
    (
        "the thulac package is not installed: pip install thulac==0.2.2",
        "没有安装 thulac 包：pip install thulac==0.2.2",
    ),
    (
        "{} is not the model of thulac 0.2.2: pip install --force-reinstall thulac==0.2.2",
        "{0} 不是 thulac 0.2.2 的模型：pip install --force-reinstall thulac==0.2.2",
    ),
    (
        "user word {}: a word is not empty and has no white space and no U+0000 in it",
        "用户词 {0}：词不能为空，也不能含空白和 U+0000",
    ),
    (
        "has no {}, which {}; put it on a line of its own where the model was trained with it, or name the "
        "tokens that begin and end a document with --document_marks",
        "没有 {0}（{1}）；如果模型是用它训练的，请把它单独写成一行，或用 --document_marks 指定文档开头和结尾的 token",
    ),
    (
        "--data_path {}: there is no such folder; put your TXT files into one",
        "--data_path {0}：没有这个文件夹；请把 TXT 文件放进一个文件夹",
    ),
    (
        "--data_path {}: there is no .txt or .txt.gz file in it; put your texts there, one document a line",
        "--data_path {0}：里面没有 .txt 或 .txt.gz 文件；请把文本放进去，每行一篇文档",
    ),
    (
        "{}: not {}; {}",
        "{0}：不是 {1}；{2}",
    ),
    (
        "no JSON string ({})",
        "不是 JSON 字符串（{0}）",
    ),
    (
        "the whole was refused",
        "整个被拒绝",
    ),
    (
        "{} has {} bytes when unpacked, more than {}; divide it",
        "{0} 解压后有 {1} 字节，超过 {2}；请拆分它",
    ),
    (
        "META-INF/container.xml names no package",
        "META-INF/container.xml 没有写明 package",
    ),
    (
        "it has no pages",
        "它没有页面",
    ),
    (
        "{}, line {}: no row of a table ({}); correct it",
        "{0} 第 {1} 行：不是表格的一行（{2}）；请改正",
    ),
    (
        "{} is not an e-book that can be read ({}); convert it again",
        "{0} 不是能读的电子书（{1}）；请重新转换",
    ),
    (
        "{}, line {}: a quotation mark is not closed within {} lines; double the quotation marks inside a "
        "text, or remove this one",
        "{0} 第 {1} 行：引号在 {2} 行内没有结束；请把文本里的引号写成两个，或删去这一个",
    ),
    (
        "{}: its part {} cannot be read ({}); convert or copy it again",
        "{0}：其中的 {1} 读不出来（{2}）；请重新转换或复制",
    ),
    (
        "{} is of a run that was interrupted, after its teachers or one of them: continue it with --resume, "
        "take another --output_dir, or start over with --resume none, which deletes it",
        "{0} 里的训练在教师模型之后（或其中一个之后）中断了：请用 --resume 继续，换一个 --output_dir，或用 "
        "--resume none 删除它重新开始",
    ),
    (
        "{}: {} of {} lines are damaged and left out",
        "{0}：{2} 行中有 {1} 行损坏，已略去",
    ),
    (
        "--minutes plans by {}, which is not there; {}",
        "--minutes 按 {0} 规划，而它不存在；{1}",
    ),
    (
        "{} is not a plan that train.py --minutes wrote",
        "{0} 不是 train.py --minutes 写的规划",
    ),
    (
        "copy it again, or start over with --resume none",
        "请重新复制，或用 --resume none 重新开始",
    ),
    (
        "plan       teacher {} of {} in {}, {} minutes",
        "规划       第 {0} 个教师模型（共 {1} 个），在 {2}，{3} 分钟",
    ),
    (
        "plan       the last model learns from the text and from the teachers ({})",
        "规划       最后一个模型从文本和教师模型（{0} 个）学习",
    ),
    (
        "time for teachers ({} of {}, {} s each) and a model that learns from the text and from them, {} epochs",
        "时间够先训练教师模型（{1}，{0} 个，各 {2} 秒），再训练一个从文本和它们学习的模型，{3} 轮",
    ),
    (
        "characters {} vectors of first and last characters of tokens",
        "字向量     {0} 个（token 的首字和末字）",
    ),
    (
        "teachers   their predictions of the text are kept, {} MiB",
        "教师模型   已存下对全部文本的预测，{0} MiB",
    ),
    (
        "trigram    counted in {} of {} tokens",
        "三元语法   统计了 {1} 个 token 中的 {0} 个",
    ),
    (
        "a small text: a trigram of the tokens and a cache of each document are learnt from too",
        "小语料：同时学习 token 的三元语法和每个文档的缓存",
    ),
    (
        "a small text: tokens that begin or end alike share vectors of these characters (--character_lr)",
        "小语料：首字或末字相同的 token 共享字向量（--character_lr）",
    ),
    (
        "{} is no state of a run: it has no {}; {}",
        "{0} 不是训练状态：没有 {1}；{2}",
    ),
    (
        "{} cannot be read: {}",
        "{0} 读不出来：{1}",
    ),
    (
        "{} is damaged: it is no manifest of a checkpoint",
        "{0} 已损坏：不是检查点的清单",
    ),
    (
        "{} is missing",
        "缺少 {0}",
    ),
    (
        "{} is damaged: it has {} bytes and was written with {}",
        "{0} 已损坏：有 {1} 字节，写入时是 {2} 字节",
    ),
    (
        "{} is damaged: its SHA-256 is not that of {}",
        "{0} 已损坏：SHA-256 与 {1} 里的不同",
    ),
    (
        "--precision int8 is for CPUs; this GPU computes in the model's own precision",
        "--precision int8 用于 CPU；这块 GPU 按模型自己的精度计算",
    ),
    (
        "the replayed graph gives other logits than the step itself",
        "重放的计算图给出的 logits 与单步计算不同",
    ),
    (
        "decoding without a CUDA graph, which is slower: {}",
        "解码时不用 CUDA graph，会慢一些：{0}",
    ),
    (
        "character {} is half of a surrogate pair (U+{}), not a character; send the text as UTF-8",
        "第 {0} 个字符是代理对的一半（U+{1}），不是字符；请用 UTF-8 发送文本",
    ),
    (
        "the model has cross-attention; only a plain GPT-2 can be decoded",
        "模型带有交叉注意力；只能解码普通的 GPT-2",
    ),
    (
        "the compiled decoder has no activation function {}",
        "编译的解码器没有激活函数 {0}",
    ),
    (
        "--prefix_cache must be 0 or more megabytes, it is {}",
        "--prefix_cache 必须是 0 或更大的兆字节数，现在是 {0}",
    ),
    (
        "{}: another run has put other pieces there; start this run again",
        "{0}：另一次训练已经放入别的分片；请重新开始这次训练",
    ),
    (
        "a rank was killed, or memory ran out; the same command with --resume goes on from a checkpoint",
        "有一个进程（rank）被终止，或内存不足；同一条命令加上 --resume 可从检查点继续",
    ),
    (
        "memory ran out; smaller values of the flags that are numbers need less",
        "内存不足；减小数值参数可以少占内存",
    ),
    (
        "{} is not from 0 to {}",
        "{0} 不在 0 到 {1} 之间",
    ),
    # progress bars
    ("reading", "读取"),
    ("counting words", "统计词"),
    ("counting characters", "统计字"),
    ("tokenizing", "分词"),
    ("measuring", "测量"),
    ("predictions of the teachers", "计算教师模型的预测"),
    ("reading pieces", "读取分片"),
    (" documents", " 篇"),
    (" batches", " 批"),
    (" pieces", " 片"),
    (" updates", " 步"),
)
