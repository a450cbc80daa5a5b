"""The report of a training run: one page that opens anywhere, in Chinese and English, and the same figures as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping
from html import escape
from itertools import count
from pathlib import Path
from typing import Any

from gpt2_chinese.artifacts import atomic_write, write_json
from gpt2_chinese.best_model import FINAL_MODEL
from gpt2_chinese.command_line import message_language, remark
from gpt2_chinese.model_folder import CONFIG, read_config
from gpt2_chinese.precision import choose_devices
from gpt2_chinese.text.pieces import check_vocabulary, read_manifest, read_pieces_tokenizer, text_of_tokens
from gpt2_chinese.text.tokenizers import Tokenizer, vocabulary_of_folder
from gpt2_chinese.training.hold_out import MAX_BYTES, MIN_BYTES, HoldOut
from gpt2_chinese.training.report_figures import gather_figures, read_facts
from gpt2_chinese.training.report_pictures import loss_picture, speed_picture
from gpt2_chinese.training.run import choose_vocabulary
from gpt2_chinese.training.token_cache import Corpus, read_pieces

REPORT_HTML, REPORT_JSON = "report.html", "report.json"

_SETTINGS = (
    ("epochs", "epochs", "轮数"),
    ("batch_size", "windows of a micro-batch", "微批次的窗口数"),
    ("gradient_accumulation", "micro-batches of an update", "一个训练步的微批次数"),
    ("optimizer", "optimizer", "优化器"),
    ("lr", "peak learning rate", "最高学习率"),
    ("muon_lr", "peak learning rate of Muon", "Muon 的最高学习率"),
    ("schedule", "schedule", "学习率调度"),
    ("warmup_steps", "updates of warm-up", "预热步数"),
    ("dropout", "dropout", "dropout"),
    ("weight_decay", "weight decay", "权重衰减"),
    ("muon_weight_decay", "weight decay of Muon", "Muon 的权重衰减"),
    ("seed", "seed", "随机种子"),
)
"""Flags that the table shows, with their names in both languages; all others are below it."""

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.6 system-ui, "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", sans-serif; color: #1c1c1c;
  max-width: 60rem; margin: 0 auto; padding: 1rem 1.2rem 4rem; background: #fff; }
h1 { font-size: 1.6rem; margin: 0.4rem 0; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 0.6rem; border-bottom: 1px solid #ddd; padding-bottom: 0.2rem; }
.switch { float: right; } .switch label { cursor: pointer; padding: 0 0.4rem; color: #777; }
input.language { position: absolute; opacity: 0; }
#to-zh:checked ~ .page .switch .zh-label, #to-en:checked ~ .page .switch .en-label { color: #000; font-weight: 600; }
#to-zh:checked ~ .page .en, #to-en:checked ~ .page .zh { display: none; }
#to-zh:focus-visible ~ .page .zh-label, #to-en:focus-visible ~ .page .en-label { outline: 2px solid #2563a8; }
.result { font-size: 1.25rem; margin: 0.8rem 0 0.2rem; } .verdict { margin: 0 0 0.6rem; color: #444; }
.note { color: #555; font-size: 0.9rem; }
table { border-collapse: collapse; width: 100%; margin: 0.5rem 0; }
th, td { text-align: left; vertical-align: top; padding: 0.3rem 0.6rem 0.3rem 0; border-bottom: 1px solid #eee; }
th { font-weight: 600; color: #444; } td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; } .beginning { font-weight: 600; }
svg { width: 100%; height: auto; font-family: inherit; } figure { margin: 0.6rem 0; }
summary { cursor: pointer; } code { font-size: 0.85rem; overflow-wrap: anywhere; }
@media print { .switch { display: none; } }
"""


def write_report(
    output_dir: Path,
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    plan: Mapping[str, Any] | None = None,
    device: str = "cpu",
    precision: str | None = "auto",
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> Path:
    """Write report.html and report.json of a finished run into its folder, and give the path of the page.

    It takes some seconds to some minutes: n-grams are counted, 200 completions are decoded (by best_model, else by
    final_model) and compared with the training text. For a corpus of any size it takes about 0.8 GB of memory besides
    the model (`ngram.MAX_CHARACTERS`), since larger texts are sampled; the page says so. `gather_figures` describes
    the arguments and errors.
    """
    figures = gather_figures(
        output_dir, corpus, tokenizer, plan=plan, device=device, precision=precision, seed=seed, say=say
    )
    sentence = result_sentence(_best_bits(figures), figures["yardstick"])
    if sentence is not None:
        say(f"report: {sentence[message_language() == 'zh']}")
    write_json(output_dir / REPORT_JSON, figures)
    with atomic_write(output_dir / REPORT_HTML) as file:
        file.write(render(figures))
    return output_dir / REPORT_HTML


def report_of_folder(args: argparse.Namespace) -> int:
    """Write the report of a run again (`train.py --report_only FOLDER`); gives the exit status.

    The pieces, the vocabulary and what is held out are those that the run's manifest names; pieces that are not there
    any more are looked for in --tokenized_data_path.

    Raises:
        ValueError, FileNotFoundError: the folder is not of a finished run, or its pieces have changed.
    """
    output_dir = Path(args.report_only)
    settings = argparse.Namespace(**vars(args) | read_facts(output_dir).get("settings", {}))
    pieces = Path(settings.tokenized_data_path)
    if not pieces.is_dir():
        pieces = Path(args.tokenized_data_path)
    manifest = read_manifest(pieces)
    vocab_file = choose_vocabulary(settings.vocab_file, manifest)
    if not vocab_file.is_file():
        vocab_file = vocabulary_of_folder(output_dir / FINAL_MODEL) or vocab_file
    check_vocabulary(pieces, manifest, vocab_file)
    tokenizer = read_pieces_tokenizer(manifest, vocab_file).build()
    least, most = settings.val_bytes or (MIN_BYTES, MAX_BYTES)
    n_ctx = read_config(output_dir / FINAL_MODEL / CONFIG).n_ctx
    corpus = read_pieces(
        pieces,
        vocab_size=len(tokenizer),
        marks=tokenizer.marks,
        manifest=manifest,
        hold_out=HoldOut(settings.val_fraction, least, most, gap=n_ctx),
        token_texts=text_of_tokens(tokenizer),
    )
    device = str(choose_devices(args.device)[0][0])
    print(f"report: {write_report(output_dir, corpus, tokenizer, device=device, say=remark)}")
    return 0


# --- the page


def render(figures: Mapping[str, Any]) -> str:
    """The page, of the figures alone."""
    sections = [
        _summary(figures),
        _section("Curves", "曲线", _curves(figures)),
        _section("What was trained on what", "训练数据与设置", _settings(figures)),
        _section("Plan", "计划", _plan(figures["plan"])) if figures["plan"] else "",
        _section("Completions of held-out beginnings", "验证集开头的续写", _completions(figures["completions"])),
        _section("Copying, repetition, variety", "照抄、重复与多样性", _quality(figures)),
    ]
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return f"""<!DOCTYPE html>
<html lang="zh">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>训练报告 · Training report</title>
<style>{_STYLE}</style>
</head>
<body>
<input class="language" type="radio" name="language" id="to-zh" checked>
<input class="language" type="radio" name="language" id="to-en">
<div class="page">
<nav class="switch"><label class="zh-label" for="to-zh">中文</label>·<label class="en-label" for="to-en">English</label>
</nav>
{"".join(sections)}
</div>
</body>
</html>
"""


def both(english: str, chinese: str) -> str:
    """Text in both languages, of which the page shows one; HTML is given and kept."""
    return f'<span class="en" lang="en">{english}</span><span class="zh" lang="zh">{chinese}</span>'


def result_sentence(model: float | None, yardstick: Mapping[str, Any] | None) -> tuple[str, str] | None:
    """The model's figure beside that of counting, English and Chinese; None where neither is known.

    Example:
        >>> result_sentence(3.117, {"order": 7, "bits_per_character": 3.4402})[0]
        '3.12 bits per character; counting (7-gram) 3.44'
    """
    english, chinese = [], []
    if model is not None:
        english.append(f"{model:.2f} bits per character")
        chinese.append(f"每字符 {model:.2f} 比特")
    if yardstick is not None:
        english.append(f"counting ({yardstick['order']}-gram) {yardstick['bits_per_character']:.2f}")
        chinese.append(f"计数（{yardstick['order']}-gram）{yardstick['bits_per_character']:.2f}")
    return ("; ".join(english), "；".join(chinese)) if english else None


def _best_bits(figures: Mapping[str, Any]) -> float | None:
    """The bits per character of the best measurement, None where nothing was measured."""
    best = figures["models"]["best"]
    return None if best is None else best.get("bits_per_character")


def _summary(figures: Mapping[str, Any]) -> str:
    bits, yardstick = _best_bits(figures), figures["yardstick"]
    parts = [f"<h1>{both('Training report', '训练报告')}</h1>"]
    parts.append(f'<p class="note">{escape(figures["folder"])} · {figures["date"]}</p>')
    sentence = result_sentence(bits, yardstick)
    if sentence is not None:
        parts.append(f'<p class="result">{both(*sentence)}</p>')
    if bits and yardstick:
        verdict = (
            (
                "The model predicts held-out text better than counting what stands in the training text.",
                "模型对验证集文本的预测优于对训练文本的计数。",
            )
            if bits < yardstick["bits_per_character"]
            else (
                "The model does not beat counting: it has learnt nothing yet that a table of n-grams does not have. "
                "Train longer, or on more text.",
                "模型还没有超过计数：n-gram 表里没有的东西，它还没有学到。请训练更久，或增加文本。",
            )
        )
        parts.append(f'<p class="verdict">{both(*verdict)}</p>')
    if yardstick and yardstick["is_sample"]:
        counted, documents = yardstick["counted_characters"], yardstick["training_documents"]
        parts.append(
            _note(
                f"The n-grams were counted in a sample, {counted:,} characters of {yardstick['counted_documents']:,} "
                f"of {documents:,} documents; all of the text would give fewer bits.",
                f"n-gram 只统计了抽样文本：{documents:,} 篇文档中的 {yardstick['counted_documents']:,} 篇，共 "
                f"{counted:,} 个字符。统计全部文本，比特数会更低。",
            )
        )
    if not figures["corpus"]["held_out_tokens"]:
        parts.append(
            _note(
                "No text was held out, so nothing here says how well the model predicts new text "
                "(--val_fraction above 0 holds some out).",
                "没有留出验证集，因此无法衡量模型对新文本的预测（--val_fraction 大于 0 时会留出）。",
            )
        )
    parts.append(_models(figures["models"]))
    return "\n".join(parts)


def _models(models: Mapping[str, Any]) -> str:
    best, final = models["best"], models["final"]
    if best is None:
        return ""
    rows = [(both("best", "最佳"), best)]
    if final is not None and final["update"] != best["update"]:
        rows.append((both("last", "最终"), final))
    elif final is not None:
        rows = [(both("best and last", "最佳，也是最终"), best)]
    head = [
        both("model", "模型"),
        both("folder", "文件夹"),
        both("update", "训练步"),
        both("epoch", "轮"),
        both("loss", "损失"),
        both("perplexity", "困惑度"),
        both("bits per character", "每字符比特数"),
    ]
    cells = []
    for name, row in rows:
        error = row.get("bits_per_character_error")
        bits = row.get("bits_per_character")
        cells.append(
            [
                name,
                escape(row["folder"] or "–"),
                f"{row['update']:,}",
                f"{row['epoch']:.2f}",
                f"{row['loss']:.4f}",
                f"{row['perplexity']:,.2f}" if "perplexity" in row else "–",
                ("–" if bits is None else f"{bits:.4f}") + (f" ± {error:.4f}" if error else ""),
            ]
        )
    note = ""
    if best["folder"] is None:
        note = _note(
            "The weights of the best measurement are not in a folder best_model.",
            "最佳一次测量的权重没有保存在 best_model 文件夹里。",
        )
    scales = [f"{row['logit_scale']:.2f}" for _, row in rows if row.get("logit_scale") is not None]
    if scales:
        note += _note(
            f"The models are calibrated: their logits are those of the training times {', '.join(scales)}, which suits "
            "the held-out text best.",
            f"模型经过校准：logits 是训练所得乘以 {'、'.join(scales)}，这最适合验证集。",
        )
    return _table(head, cells, numbers=range(2, 7)) + note


def _curves(figures: Mapping[str, Any]) -> str:
    if not figures["training"]["update"]:
        return _note("metrics.jsonl has no points of the training.", "metrics.jsonl 里没有训练数据点。")
    speeds = sorted(value for value in figures["training"]["tokens_per_second"] if value is not None)
    speed = speeds[len(speeds) // 2] if speeds else 0.0
    ratio = figures["corpus"]["tokens_per_character"]
    return (
        f"<figure>{loss_picture(figures)}</figure>"
        + _note(
            "Loss in bits per character: the loss of a token over ln 2, times the tokens of a character "
            f"({ratio:.3f} in the training text). The dashed line is what counting needs for the same held-out text. "
            "Training loss is measured with dropout, where there is any.",
            f"损失以每字符比特数表示：每个 token 的损失除以 ln 2，再乘以每个字符的 token 数（训练文本为 {ratio:.3f}）。"
            "虚线是计数对同一验证集所需的比特数。有 dropout 时，训练集的损失是带 dropout 测量的。",
        )
        + f"<figure>{speed_picture(figures)}</figure>"
        + _note(
            f"The median throughput was {speed:,.0f} tokens per second.",
            f"吞吐量的中位数是每秒 {speed:,.0f} 个 token。",
        )
    )


def _settings(figures: Mapping[str, Any]) -> str:
    corpus, model, settings = figures["corpus"], figures["model"], figures["settings"]
    held_out = (
        f"{corpus['held_out_documents']:,} documents, {corpus['held_out_slices']:,} slices, "
        f"{corpus['held_out_tokens']:,} tokens",
        f"{corpus['held_out_documents']:,} 篇文档，{corpus['held_out_slices']:,} 个片段，"
        f"{corpus['held_out_tokens']:,} 个 token",
    )
    rows = [
        (
            both("training text", "训练文本"),
            both(
                f"{corpus['tokens']:,} tokens, about {corpus['characters_about']:,} characters",
                f"{corpus['tokens']:,} 个 token，约 {corpus['characters_about']:,} 个字符",
            ),
        ),
        (both("documents in all", "文档总数"), f"{corpus['documents']:,}"),
        (both("held out", "验证集"), both(*held_out) if corpus["held_out_tokens"] else both("nothing", "无")),
        (
            both("vocabulary", "词表"),
            both(f"{model['vocabulary']:,} tokens", f"{model['vocabulary']:,} 个 token") + f" ({model['tokenizer']})",
        ),
        (
            both("model", "模型"),
            both(
                f"{model['n_layer']} layers, n_embd {model['n_embd']}, {model['n_head']} heads, n_ctx "
                f"{model['n_ctx']}; {model['parameters']:,} parameters",
                f"{model['n_layer']} 层，n_embd {model['n_embd']}，{model['n_head']} 个注意力头，n_ctx "
                f"{model['n_ctx']}；{model['parameters']:,} 个参数",
            ),
        ),
        (both("updates", "训练步数"), f"{figures['updates']:,}" if figures["updates"] is not None else "–"),
    ]
    for flag, english, chinese in _SETTINGS:
        if settings.get(flag) is not None:
            rows.append((both(english, chinese), escape(f"{settings[flag]}")))
    flags = " ".join(f"--{name}={value}" for name, value in settings.items())
    details = f"<details><summary>{both('all flags', '全部参数')}</summary><code>{escape(flags)}</code></details>"
    return _table([], rows) + details


def _plan(plan: Mapping[str, Any]) -> str:
    rows = [(escape(str(name)), escape(_plain(value))) for name, value in plan.items() if name != "reason"]
    reason = plan.get("reason")
    if isinstance(reason, Mapping):
        text = both(escape(str(reason.get("en", ""))), escape(str(reason.get("zh", ""))))
    else:
        text = escape(_plain(reason)) if reason else ""
    return (f'<p class="text">{text}</p>' if text else "") + _table([], rows)


def _completions(completions: Mapping[str, Any]) -> str:
    how = (
        f"By {completions['model']}; temperature {completions['temperature']:g}, top-p {completions['top_p']:g}, at "
        f"most {completions['max_tokens']} tokens, seed {completions['seed']}.",
        f"由 {completions['model']} 生成；温度 {completions['temperature']:g}，top-p {completions['top_p']:g}，最多 "
        f"{completions['max_tokens']} 个 token，随机种子 {completions['seed']}。",
    )
    if not completions["shown"]:
        return _note(
            "There are no beginnings: no text was held out, or its documents are too short.",
            "没有可用的开头：没有验证集，或其中的文档太短。",
        )
    head = [both("completion", "模型续写"), both("what really followed", "原文")]
    rows = []
    for one in completions["shown"]:
        beginning = f'<span class="beginning">{escape(one["beginning"])}</span>'
        rows.append([f'<div class="text">{beginning}{escape(one[key])}</div>' for key in ("completion", "original")])
    return _note(*how) + _table(head, rows)


def _quality(figures: Mapping[str, Any]) -> str:
    quality, completions = figures["quality"], figures["completions"]
    names = {
        "completions": both("completions", "模型续写"),
        "unprompted": both("written without a beginning", "无提示词的生成"),
        "originals": both("what really followed", "原文"),
    }
    columns = [quality[name] for name in names if quality[name] is not None]
    head = ["", *(name for key, name in names.items() if quality[key] is not None)]
    rows = [
        [both("texts", "文本数"), *(f"{column['texts']:,}" for column in columns)],
        [both("characters", "字符数"), *(f"{column['characters']:,}" for column in columns)],
        [
            both(
                f"characters that stand verbatim in the training text, in runs of {quality['min_run']} and more",
                f"与训练文本逐字相同的字符（连续 {quality['min_run']} 字以上）",
            ),
            *(f"{column['copied_characters']:,} ({_percent(column['copied_share'])})" for column in columns),
        ],
        [
            both("repetition: 4-grams that stand earlier in the same text", "重复：同一文本中再次出现的 4-gram"),
            *(_percent(column["repeated_4_grams"]) for column in columns),
        ],
        [
            both("variety: distinct-2, of the same amount of text", "多样性：distinct-2（等量文本）"),
            *(_percent(column["distinct_2"]) for column in columns),
        ],
    ]
    count, without, beginnings = completions["count"], quality["unprompted"]["texts"], completions["beginnings"]
    source = (
        (
            f"{count} completions of {beginnings} held-out beginnings, and {without} texts of which the model writes "
            "the beginning too. A model that has memorised its texts shows it most in the latter.",
            f"{beginnings} 个验证集开头的 {count} 个续写，以及没有提示词的 {without} 个生成文本。"
            "背下原文的模型，在后者里最明显。",
        )
        if beginnings
        else (
            f"{without} texts of which the model writes the beginning too.",
            f"没有提示词的 {without} 个生成文本。",
        )
    )
    parts = [_note(*source), _table(head, rows, numbers=range(1, len(head)))]
    if quality["is_sample"]:
        parts.append(
            _note(
                f"The copies were looked for in a sample of {quality['searched_characters']:,} characters of the "
                "training text: there may be more.",
                f"只在训练文本的抽样（{quality['searched_characters']:,} 个字符）中查找，实际可能更多。",
            )
        )
    copies = quality["longest_copies"]
    if not copies:
        parts.append(
            _note(
                f"No text of the model has {quality['min_run']} characters in a row that stand in the training text.",
                f"模型生成的文本都不包含训练文本中连续的 {quality['min_run']} 个字符。",
            )
        )
        return "".join(parts)
    head = [both("characters", "字符数"), both("the longest copies", "最长的照抄片段"), both("where", "位置")]
    rows = [
        [
            f"{one['characters']:,}",
            f'<div class="text">{escape(one["text"])}</div>',
            both(
                f"document {one['document']:,}, character {one['character']:,}",
                f"第 {one['document']:,} 篇文档，第 {one['character']:,} 个字符",
            ),
        ]
        for one in copies
    ]
    note = _note(
        "Documents are counted in the order of the pieces, without those that are held out.",
        "文档按分片的顺序计数，不含验证集。",
    )
    return "".join([*parts, _table(head, rows, numbers=range(1)), note])


# --- elements


def _section(english: str, chinese: str, contents: str) -> str:
    return f"<section><h2>{both(english, chinese)}</h2>{contents}</section>\n"


def _note(english: str, chinese: str) -> str:
    return f'<p class="note">{both(escape(english), escape(chinese))}</p>'


def _table(head: Iterable[str], rows: Iterable[Iterable[str]], numbers: Iterable[int] = ()) -> str:
    """A table of cells that are HTML; columns in `numbers` are aligned to the right."""
    right = set(numbers)

    def row(cells: Iterable[str], tag: str) -> str:
        classes = (' class="number"' if number in right else "" for number in count())
        return (
            "<tr>" + "".join(f"<{tag}{of}>{cell}</{tag}>" for cell, of in zip(cells, classes, strict=False)) + "</tr>"
        )

    head = list(head)
    top = row(head, "th") if head else ""
    return f"<table>{top}{''.join(row(cells, 'td') for cells in rows)}</table>"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
