"""Held-out documents: every token is predicted once, bits per character add up, and nothing of it touches the run."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from book_order import CLS_ID, MARKS, MASK_ID, SEP_ID, UNK_ID
from hypothesis import given
from hypothesis import strategies as st
from small_run import run, scalars, write_documents, write_pieces, write_shape
from tiny_model import tiny_model, tiny_tokenizer

from gpt2_chinese.text.pieces import text_of_tokens
from gpt2_chinese.text.vocabulary import read_vocabulary
from gpt2_chinese.text.word_tokenizer import BYTE_TOKENS, WordTokenizer
from gpt2_chinese.training.evaluation import (
    AS_IT_IS,
    SCALES,
    Documents,
    bits_per_character,
    complete,
    count_characters,
    document_windows,
    evaluate,
    losses_at_scales,
    sum_of_losses,
)
from gpt2_chinese.training.hold_out import HoldOut
from gpt2_chinese.training.loss import with_scaled_logits
from gpt2_chinese.training.token_cache import read_pieces


@given(st.integers(0, 50), st.integers(1, 100), st.integers(2, 20))
def test_each_token_but_the_first_is_counted_once_with_half_a_window_before_it(begin, length, n_ctx):
    counted = []
    for number, (start, end, first) in enumerate(document_windows(begin, begin + length, n_ctx)):
        assert begin <= start < first < end <= begin + length and end - start <= n_ctx
        assert number == 0 or first - start >= n_ctx // 2
        counted += range(first, end)
    assert counted == list(range(begin + 1, begin + length))


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_loss_is_that_of_transformers_one_document_after_the_other(batch_size):
    model, tokenizer = tiny_model(n_ctx=32), tiny_tokenizer()
    generator = np.random.default_rng(0)
    documents = [[MASK_ID, *generator.integers(5, 195, length).tolist(), CLS_ID] for length in (3, 30, 1, 0, 17)]
    nats = tokens = 0.0
    for document in documents:
        ids = torch.tensor([document])
        logits = model(ids).logits[0, :-1]
        nats += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        tokens += len(document) - 1
    held_out = Documents(np.array(sum(documents, []), np.uint16), 32, tokenizer)
    measured = evaluate(model, held_out, rows=200, batch_size=batch_size, autocast=nullcontext)
    assert measured.tokens == tokens
    assert measured.loss == pytest.approx(nats / tokens, rel=1e-5)
    assert measured.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-4)


@given(st.integers(1, 150), st.integers(1, 50), st.floats(0, 60), st.integers(0, 2**32 - 1))
def test_losses_at_scales_are_those_of_logits_times_each(rows, columns, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(rows, columns, generator=generator)
    targets = torch.randint(columns, (rows,), generator=generator)
    targets[::3] = -100  # is not counted
    expected = [F.cross_entropy(logits * scale, targets, reduction="none", ignore_index=-100) for scale in SCALES]
    assert torch.equal(losses_at_scales(logits, targets, AS_IT_IS)[0], expected[SCALES.index(1.0)])
    logits[::3, 0] = math.inf  # nor is anything else of it
    found = losses_at_scales(logits.clone(), targets, SCALES)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_a_scale_of_the_logits_is_one_of_the_last_norm_and_leaves_the_model_as_it_was():
    model, tokenizer = tiny_model(n_ctx=32), tiny_tokenizer()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.tensor([[MASK_ID, 7, 8, 9, 7, 30, CLS_ID]])
    documents = Documents(ids[0].numpy(), 32, tokenizer)
    nats, tokens = sum_of_losses(model, documents, rows=200, batch_size=2, autocast=nullcontext, scales=SCALES)
    logits = model(ids).logits
    for scale, of_scale in zip(SCALES, nats, strict=True):
        with with_scaled_logits(model, scale):
            torch.testing.assert_close(model(ids).logits, logits * scale)
            measured = evaluate(model, documents, rows=200, batch_size=2, autocast=nullcontext)
        assert measured.loss == pytest.approx(of_scale.item() / 6, rel=1e-4) and measured.scale is None
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert tokens == 6
    assert documents.evaluation(nats.numpy() * math.nan, 6, SCALES).scale == 1.0
    best = documents.evaluation(nats.numpy(), 6, SCALES)
    assert best.loss == pytest.approx(nats.min().item() / 6) and best.scale == SCALES[nats.argmin()]


def test_characters_are_those_of_the_text_and_an_unknown_one_is_charged():
    tokenizer = tiny_tokenizer(words=["hello", "##ing", "你", "好", *BYTE_TOKENS])
    bytes_ = [tokenizer.vocabulary.index(BYTE_TOKENS[byte]) for byte in "鬱".encode()]
    ids = [MASK_ID, 7, 8, SEP_ID, 5, 6, *bytes_, UNK_ID, CLS_ID]
    assert count_characters(np.array(ids), tokenizer) == (len("你好\nhelloing鬱") + 1, 1)
    assert bits_per_character(math.log(2) * 30, 10, 0) == pytest.approx(3)
    assert bits_per_character(0.0, 10, 1) == pytest.approx(math.log2(0x110000) / 10)


def test_leaving_characters_out_of_the_vocabulary_does_not_pay():
    """A sure model of text that is all `[UNK]` is worse than one that knows nothing of 5,000 characters."""
    assert bits_per_character(0.0, 100, 100) > bits_per_character(100 * math.log(5000), 100, 0)


def test_measuring_touches_no_random_state_and_leaves_the_model_in_training():
    model, tokenizer = tiny_model().train(), tiny_tokenizer()
    before = torch.get_rng_state()
    documents = Documents(np.array([MASK_ID, 7, 8, 9, CLS_ID]), 32, tokenizer)
    first = evaluate(model, documents, rows=200, batch_size=2, autocast=nullcontext)
    assert first == evaluate(model, documents, rows=200, batch_size=2, autocast=nullcontext)
    continuation = complete(model, [MASK_ID, 7], rows=200, marks=MARKS, seed=1)
    assert (
        continuation
        == complete(model, [MASK_ID, 7], rows=200, marks=MARKS, seed=1)
        != complete(model, [2, 7], rows=200, marks=MARKS, seed=2)
    )
    assert not {MASK_ID, UNK_ID, CLS_ID} & set(continuation) and len(continuation) <= 30
    assert torch.equal(before, torch.get_rng_state()) and model.training


def test_a_run_measures_after_epochs_and_every_val_steps_and_eval_only_finds_the_same(train, capsys):
    documents = write_documents([20] * 30)
    write_shape(resid_pdrop=0.1)
    flags = ["--val_fraction", "0.1", "--val_steps", "3", "--batch_size", "4", "--sample_prompts", "一，丁"]
    assert run(train, *flags, epochs=2) == 0
    output = capsys.readouterr().out
    assert "of 30 documents held out" in output and "bits per character" in output and "    一|" in output
    points = [json.loads(line) for line in Path("model/metrics.jsonl").read_text("utf-8").splitlines()]
    measured = [point for point in points if point["kind"] == "validation"]
    updates = len(points) - len(measured)
    assert [point["step"] for point in measured] == [
        step for step in range(1, updates + 1) if step % 3 == 0 or step in (updates // 2, updates)
    ]
    assert measured[-1]["epoch"] == 2 and set(measured[-1]["completions"]) == {"一", "丁"}
    curves = scalars()
    assert curves["validation_bits_per_character"][-1] == pytest.approx(measured[-1]["bits_per_character"])
    assert points[0].keys() >= {"loss", "learning_rate", "gradient_norm", "tokens_per_second", "step", "epoch"}

    # The documents held out, measured by themselves, give the figure of the run's end.
    hold_out, texts = HoldOut(0.1, gap=8), text_of_tokens(WordTokenizer(read_vocabulary("vocab/vocab_user.txt")))
    corpus = read_pieces("tokenized", marks=MARKS, vocab_size=35, hold_out=hold_out, token_texts=texts)
    held_out = corpus.held_out.tolist()
    kept = [document for document in documents if str(document)[1:-1] in str(held_out)]
    assert sum(kept, []) == held_out and 0 < len(kept) < 15
    write_pieces(kept, words=30)
    flags = ["--eval_only", "--pretrained_model", "model/final_model", "--precision", "fp32", "--device", "cpu"]
    capsys.readouterr()
    assert train.main(flags) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["loss"] == pytest.approx(measured[-1]["loss"], rel=1e-5)
    assert printed["bits_per_character"] == pytest.approx(measured[-1]["bits_per_character"], rel=1e-5)


def test_eval_only_asks_for_a_model(train):
    with pytest.raises(ValueError, match="name it with --pretrained_model"):
        train.main(["--eval_only", "--device", "cpu"])


def test_a_single_document_is_trained_on_and_not_held_out(train, capsys):
    write_documents([60], num_pieces=1)
    assert run(train, "--val_fraction", "0.01", epochs=1) == 0
    assert "a single short document, so there is no validation set" in capsys.readouterr().out
