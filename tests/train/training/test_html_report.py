"""The report of a run: its figures are those of the run, and the page needs nothing but itself."""

from __future__ import annotations

import asyncio
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from book_order import CLS_ID, MARKS, MASK_ID
from small_run import N_CTX, run, write_documents, write_shape
from tiny_model import tiny_tokenizer

from gpt2_chinese.artifacts import read_json
from gpt2_chinese.decoding import engine
from gpt2_chinese.text.pieces import read_manifest, text_of_tokens
from gpt2_chinese.text.vocabulary import SPECIAL_TOKENS
from gpt2_chinese.text.word_tokenizer import WordTokenizer
from gpt2_chinese.training import report_figures
from gpt2_chinese.training.copy_meter import copied_from, distinct_n, repetition
from gpt2_chinese.training.corpus_text import CorpusText
from gpt2_chinese.training.hold_out import HoldOut
from gpt2_chinese.training.html_report import render, result_sentence, write_report
from gpt2_chinese.training.ngram import measure_yardstick
from gpt2_chinese.training.plan import PLAN, Plan
from gpt2_chinese.training.report_figures import choose_beginnings, complete_beginnings, read_curves, thinned
from gpt2_chinese.training.report_pictures import CHINESE, loss_picture, smoothed, speed_picture
from gpt2_chinese.training.token_cache import Corpus, read_pieces

WORDS = 30
LENGTHS = [20 + number % 17 for number in range(70)]


class Page(HTMLParser):
    """The text of a page, and what its elements refer to."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.refers, self.tags = "", [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.refers += [value for name, value in attrs if name in ("src", "href", "xlink:href", "action", "srcset")]

    def handle_data(self, data):
        self.text += data


def read_report() -> tuple[dict, str]:
    return read_json("model/report.json"), Path("model/report.html").read_text(encoding="utf-8")


def own_tokenizer() -> WordTokenizer:
    return WordTokenizer([*SPECIAL_TOKENS, *(chr(0x4E00 + number) for number in range(WORDS))])


def own_corpus() -> Corpus:
    tokenizer = own_tokenizer()
    return read_pieces(
        "tokenized",
        vocab_size=WORDS + 5,
        marks=MARKS,
        manifest=read_manifest("tokenized"),
        hold_out=HoldOut(0.3, gap=N_CTX),
        token_texts=text_of_tokens(tokenizer),
    )


@pytest.fixture(scope="module")
def finished(script, tmp_path_factory) -> Path:
    """The folder of a finished run with its report; tests have copies of it."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            patch.delenv(name, raising=False)
        write_documents(LENGTHS, words=WORDS)
        write_shape()
        assert run(script("train"), "--val_fraction", "0.3", "--report", epochs=2, batch_size=4, val_steps=5) == 0
    return folder


@pytest.fixture
def reported(finished, script, monkeypatch, tmp_path):
    """train.py as a module, in a copy of the folder of a finished run."""
    shutil.copytree(finished, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    return script("train")


def test_the_figures_are_those_of_the_run(reported):
    figures, html = read_report()
    points = [json.loads(line) for line in Path("model/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    measured = [point for point in points if point["kind"] == "validation"]
    losses = [point["loss"] for point in points if point["kind"] == "train"]
    assert figures["validation"]["bits_per_character"] == [point["bits_per_character"] for point in measured]
    assert figures["training"]["loss"] == pytest.approx(losses)
    # Every token of this corpus is a character but the end of a document.
    assert figures["corpus"]["tokens_per_character"] == pytest.approx(1 + 1 / np.mean(LENGTHS), rel=0.02)
    ratio = figures["corpus"]["tokens_per_character"] / math.log(2)
    assert figures["training"]["bits_per_character"] == pytest.approx([loss * ratio for loss in losses], rel=1e-3)
    best = min(measured, key=lambda point: point["bits_per_character"])
    assert figures["models"]["best"]["bits_per_character"] == best["bits_per_character"]
    assert figures["models"]["final"]["update"] == measured[-1]["step"] == figures["updates"]
    assert figures["settings"]["batch_size"] == 4 and figures["model"]["parameters"] > 0

    tokenizer = own_tokenizer()
    corpus = own_corpus()
    yardstick = measure_yardstick(corpus.tokens, corpus.held_out, tokenizer)
    assert figures["yardstick"]["bits_per_character"] == pytest.approx(yardstick.bits_per_character)
    english, chinese = result_sentence(best["bits_per_character"], figures["yardstick"])
    assert english in html and chinese in html
    assert re.fullmatch(r"\d\.\d\d bits per character; counting \(7-gram\) \d\.\d\d", english)


def test_the_page_says_how_the_models_are_calibrated(reported):
    figures, html = read_report()
    assert "calibrated" not in html and "logit_scale" not in figures["validation"]
    figures["models"]["best"]["logit_scale"], figures["models"]["final"]["logit_scale"] = 0.9, 0.84
    figures["models"]["final"]["update"] = figures["models"]["best"]["update"] + 1
    page = render(figures)
    assert "logits are those of the training times 0.90, 0.84, which suits" in page
    assert "logits 是训练所得乘以 0.90、0.84，" in page


def test_a_calibrated_run_has_its_factors_in_the_report(reported):
    flags = ["--val_fraction", "0.3", "--report", "--calibrate", "--overwrite"]
    assert run(reported, *flags, epochs=1, batch_size=4) == 0
    figures, html = read_report()
    (scale,) = figures["validation"]["logit_scale"]
    assert figures["models"]["best"]["logit_scale"] == scale and f"training times {scale:.2f}, which suits" in html


def test_completions_stand_beside_what_really_followed(reported):
    figures, html = read_report()
    tokenizer = own_tokenizer()
    held_out = [text for _, text in CorpusText(own_corpus().held_out, tokenizer)]
    shown = figures["completions"]["shown"]
    assert len(shown) == min(10, figures["completions"]["beginnings"]) >= 5
    for one in shown:
        assert any(text.startswith(one["beginning"] + one["original"]) for text in held_out)
        assert len(one["beginning"]) == 2 and len(one["original"]) == figures["completions"]["max_tokens"] == 5
        assert f"{one['beginning']}</span>{one['completion']}</div>" in html
        assert f"{one['beginning']}</span>{one['original']}</div>" in html
    assert len({one["beginning"] for one in shown}) == len(shown)


def test_the_report_alone_is_the_same_again(reported, capsys):
    figures, html = read_report()
    assert reported.main(["--report_only", "model", "--device", "cpu", "--val_fraction", "0.5"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"report: {Path('model/report.html')}"
    assert re.fullmatch(r"report: \d\.\d\d bits per character; counting \(7-gram\) \d\.\d\d", printed[-2])
    again, html_again = read_report()
    assert again == figures and html_again == html


def test_the_page_is_one_small_file_without_network(reported):
    _, html = read_report()
    page = Page(html)
    assert len(html.encode()) < 2_000_000
    assert not page.refers or all(one.startswith("#") for one in page.refers)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert "default-src 'none'" in html
    assert set(re.findall(r"https?://[^\"\s]+", html)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert page.tags.count("svg") == 2


def test_without_held_out_text_what_cannot_be_computed_is_left_out_with_a_sentence(train):
    write_documents(LENGTHS[:8], words=WORDS)
    assert run(train, "--report", epochs=1, batch_size=4) == 0
    figures, html = read_report()
    assert figures["yardstick"] is None and figures["models"] == {"best": None, "final": None}
    assert figures["completions"]["beginnings"] == 0 and figures["completions"]["shown"] == []
    quality = figures["quality"]
    assert quality["unprompted"]["texts"] == 200 and quality["completions"] is quality["originals"] is None
    for sentence in ("No text was held out", "没有留出验证集", "There are no beginnings", "没有可用的开头"):
        assert sentence in html
    assert "bits per character; counting" not in html


def test_the_best_model_completes_where_there_is_one_and_the_plan_is_told(reported):
    Plan({"batch_size": 16}, ["two <minutes>", "on two cores"]).write(Path("model") / PLAN)
    assert reported.main(["--report_only", "model", "--device", "cpu"]) == 0
    figures, html = read_report()
    assert figures["completions"]["model"] == figures["models"]["best"]["folder"] == "best_model"
    assert figures["plan"] == {"batch_size": 16, "reason": "two <minutes>\non two cores"}
    assert "two &lt;minutes&gt;\non two cores" in html and "计划" in html


def test_a_plan_may_be_given_and_have_its_reason_in_both_languages(reported):
    plan = {"dropout": 0.1, "reason": {"en": "a small corpus", "zh": "语料少"}}
    path = write_report(Path("model"), own_corpus(), own_tokenizer(), plan=plan)
    assert "a small corpus" in path.read_text(encoding="utf-8") and "语料少" in path.read_text(encoding="utf-8")


def test_other_pieces_or_an_unfinished_run_are_refused(reported):
    write_documents([*LENGTHS, *LENGTHS], words=WORDS)
    with pytest.raises(ValueError, match="the pieces were made again since"):
        reported.main(["--report_only", "model", "--device", "cpu"])
    shutil.rmtree("model/final_model")
    with pytest.raises(FileNotFoundError, match="finish it with --resume"):
        reported.main(["--report_only", "model", "--device", "cpu"])


def test_texts_of_the_corpus_are_text_on_the_page(reported):
    figures, _ = read_report()
    evil = "</span><script>alert(1)</script>&amp;"
    figures["completions"]["shown"][0]["completion"] = evil
    figures["quality"]["longest_copies"] = [
        {"text": evil, "characters": 37, "unprompted": False, "document": 1, "character": 1}
    ]
    page = Page(render(figures))
    assert "script" not in page.tags and page.text.count(evil) == 2


def test_copying_repetition_and_variety_are_those_of_the_completions(reported):
    figures, _ = read_report()
    tokenizer = own_tokenizer()
    corpus = own_corpus()
    held_out = CorpusText(corpus.held_out, tokenizer, lengths=corpus.held_out_lengths)
    training = CorpusText(corpus.tokens, tokenizer)
    beginnings = choose_beginnings(held_out, tokenizer, max_size=2, length=5, seed=0)
    model, options = Path("model/best_model"), {"length": 5, "device": "cpu", "precision": "auto"}
    texts = complete_beginnings(model, beginnings, count=200, seed=0, **options)
    ours, quality = [text for _, text in texts], figures["quality"]
    assert len(ours) == 200 and [ours[0], ours[1]] == [one["completion"] for one in figures["completions"]["shown"][:2]]
    assert quality["completions"]["copied_characters"] == sum(copied_from(training, ours).copied)
    assert quality["completions"]["repeated_4_grams"] == repetition(ours)
    assert quality["originals"]["distinct_2"] == distinct_n([beginning.original for beginning in beginnings])
    by_itself = complete_beginnings(model, [], count=100, seed=200, **options)
    assert {context for context, _ in by_itself} == {""}
    written = [text for _, text in by_itself]
    assert quality["unprompted"]["copied_characters"] == sum(copied_from(training, written).copied)
    assert quality["unprompted"]["repeated_4_grams"] == repetition(written)
    assert quality["searched_characters"] == sum(len(text) for _, text in training)


def test_a_report_does_not_wait_for_a_decoder_that_has_to_be_compiled(reported, monkeypatch):
    def make_compiled(*arguments: object) -> None:
        raise AssertionError("the compiled decoder was made")

    monkeypatch.setattr(engine, "make_cpu_decoder", make_compiled)
    monkeypatch.setattr(report_figures, "is_decoder_cached", lambda: False)
    options = {"length": 8, "device": "cpu", "precision": "auto", "seed": 1, "count": 3}
    assert len(complete_beginnings(Path("model/best_model"), [], **options)) == 3
    monkeypatch.setattr(report_figures, "is_decoder_cached", lambda: True)
    with pytest.raises(AssertionError, match="the compiled decoder was made"):
        complete_beginnings(Path("model/best_model"), [], **options)


def test_beginnings_are_at_most_a_third_of_a_document_and_no_two_are_alike():
    tokenizer = tiny_tokenizer()
    sizes = {10: [0, 2], 20: [3], 30: [7], 50: [40, 40], 100: [30]}
    documents = [[MASK_ID, *range(first, first + size), CLS_ID] for first, many in sizes.items() for size in many]
    text = CorpusText(np.array(sum(documents, [])), tokenizer)
    found = choose_beginnings(text, tokenizer, max_size=4, length=6, seed=3)
    assert sorted(len(beginning.ids) - 1 for beginning in found) == [1, 2, 4, 4]
    for beginning in found:
        rest = next(one for one in documents if one[: len(beginning.ids)] == beginning.ids)[len(beginning.ids) : -1]
        assert beginning.original == tokenizer.decode(rest[:6])


def test_long_runs_are_thinned_and_half_a_line_is_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    point = {"kind": "train", "epoch": 0.5, "learning_rate": 1e-3, "tokens_per_second": 10.0}
    lines = [json.dumps(point | {"step": step, "loss": step % 2}) for step in range(1, 4001)]
    lines.insert(20, json.dumps({"kind": "validation", "step": 9, "epoch": 0.1, "completions": {"a": "b"}}))
    path.write_text("\n".join([*lines, '{"kind": "tr']), encoding="utf-8")
    curves = read_curves(path)
    assert len(curves.training["update"]) == 400 and curves.validation == {}
    assert curves.training["update"][0] == 5.5 and curves.training["loss"] == [0.5] * 400


def test_what_is_not_finite_is_left_out_of_a_mean():
    assert thinned([1.0, math.nan, 3.0, math.inf], points=2) == [1.0, 3.0]
    assert thinned([math.nan, 2.0], points=2) == [None, 2.0]
    assert thinned([]) == []
    values = np.array([1.0, np.nan, *[3.0] * 30])
    assert np.isfinite(smoothed(values)).all() and smoothed(values)[-1] == 3


def test_every_label_of_the_pictures_is_there_in_both_languages():
    training = {"update": [1, 2, 3], "bits_per_character": [5.0, None, 4.0], "learning_rate": [0.0, 1e-3, 0.0]}
    training["tokens_per_second"] = [10.0, 12.0, 11.0]
    figures = {"training": training, "validation": {"update": [3], "bits_per_character": [4.2]}}
    figures["yardstick"] = {"bits_per_character": 4.5}
    pictures = loss_picture(figures) + speed_picture(figures)
    labels = re.findall(r"<text[^>]*>(.*?)</text>", pictures, re.DOTALL)
    words = [label for label in labels if re.search("[a-z]", re.sub("<.*?>", "", label))]
    assert len(words) == 10 and all('class="en"' in label and 'class="zh"' in label for label in words)
    assert {re.search('class="en">(.*?)<', label)[1] for label in words} == set(CHINESE)
    assert loss_picture(figures) + speed_picture(figures) == pictures


def test_a_browser_shows_one_language_at_a_time_and_asks_for_nothing(reported):
    browser = pytest.importorskip("browser", reason="the playwright package is not installed")
    if browser.CHROMIUM is None:
        pytest.skip("no Chromium is installed (apt-get install chromium)")

    async def look() -> None:
        async with browser.browser_tab() as tab:
            await tab.open(Path("model/report.html").resolve().as_uri())
            visible = "[...document.querySelectorAll('h2 .{}')].filter(one => one.offsetParent).length"
            sections = await tab.js("document.querySelectorAll('h2').length")
            assert [await tab.js(visible.format(one)) for one in ("zh", "en")] == [sections, 0]
            await tab.click(".en-label")
            assert [await tab.js(visible.format(one)) for one in ("zh", "en")] == [0, sections]
            assert len(tab.requests) == 1 and not tab.faults

    asyncio.run(look())
