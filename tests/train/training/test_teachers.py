"""What teachers predict of a text is stored: once for every token, as the models say it with text enough before it."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import tiny_model

from gpt2_chinese.training import teachers as teaching
from gpt2_chinese.training.loss import WindowLoss
from gpt2_chinese.training.teachers import _stretches, mean_distributions, stored_bytes
from gpt2_chinese.training.windows import window_batch

N_CTX, VOCAB_SIZE = 16, 200
TEXT = np.random.default_rng(0).integers(5, VOCAB_SIZE, 75)
DOCUMENT_STARTS = np.array([0, 3, 40, 41])


def two_teachers():
    first, second = tiny_model().requires_grad_(False), tiny_model().requires_grad_(False)
    first.transformer.wte.weight.mul_(1.5)
    second.transformer.h[1].mlp.c_proj.weight.mul_(-2)
    return [first, second]


@given(st.integers(2, 40), st.integers(0, 300))
def test_every_token_but_the_last_is_asked_for_once_and_with_a_quarter_of_a_window_before_it(n_ctx, more):
    tokens = n_ctx + more
    places = []
    for start, first, end in _stretches(tokens, n_ctx):
        assert 0 <= start <= tokens - n_ctx and 0 <= first <= end == n_ctx - 1
        places += range(start + first, start + end)
        assert start == 0 or first >= n_ctx // 4 - 1
    assert places == list(range(tokens - 1))


@pytest.mark.parametrize("starts", [None, DOCUMENT_STARTS])
@pytest.mark.parametrize("length", [len(TEXT), N_CTX])
def test_the_stored_distribution_is_the_mean_of_what_each_says_in_one_window(starts, length, monkeypatch):
    monkeypatch.setattr(teaching, "_WINDOWS_AT_ONCE", 2)
    models, text = two_teachers(), TEXT[:length]
    if starts is not None:
        starts = starts[starts < length]
    stored = mean_distributions(models, text, starts, rows=VOCAB_SIZE, n_ctx=N_CTX, autocast=nullcontext)
    assert stored.shape == (length, VOCAB_SIZE) and stored.dtype == torch.float16
    assert not stored[-1].any()
    for start, first, end in _stretches(length, N_CTX):
        for place in range(start + first, start + end):
            begin = start
            if starts is not None:
                begin = max(start, int(starts[np.searchsorted(starts, place, side="right") - 1]))
            ids = torch.from_numpy(text[begin : place + 1])[None]
            with torch.no_grad():
                wanted = sum(torch.softmax(model(ids).logits[0, -1], 0) for model in models) / 2
            torch.testing.assert_close(stored[place].float(), wanted, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("compute", ["forward", "_loss"])
def test_learning_from_what_is_stored_is_learning_from_the_teachers(compute, recompute):
    """Windows at places where the stored predictions have just as much before them as the live ones."""
    student, models = tiny_model(), two_teachers()
    stored = mean_distributions(models, TEXT, None, rows=VOCAB_SIZE, n_ctx=N_CTX, autocast=nullcontext)
    starts = np.array([0])
    windows = window_batch(TEXT, starts, N_CTX)
    results = []
    for given_teachers in ({"teachers": models}, {"distributions": stored}):
        window_loss = WindowLoss(student, teacher_share=0.7, recompute=recompute, **given_teachers)
        student.zero_grad()
        loss = getattr(window_loss, compute)(windows, None, torch.from_numpy(starts))
        loss.backward()
        results.append([loss.detach(), *(parameter.grad.clone() for parameter in student.parameters())])
    for live, from_memory in zip(*results, strict=True):
        torch.testing.assert_close(from_memory, live, rtol=1e-3, atol=1e-4)


def test_each_window_learns_what_is_stored_of_its_own_place():
    student = tiny_model()
    starts = torch.tensor([30, 2])
    windows = window_batch(TEXT, starts.numpy(), N_CTX)
    stored = torch.rand(len(TEXT), VOCAB_SIZE).half()
    elsewhere = stored.clone()
    elsewhere[:2] = elsewhere[30 + N_CTX - 1 :] = elsewhere[2 + N_CTX - 1 : 30] = 0
    gradients = []
    for distributions in (stored, elsewhere, stored.roll(1, 0)):
        student.zero_grad()
        WindowLoss(student, distributions=distributions, teacher_share=0.5)(windows, None, starts).backward()
        gradients.append(student.transformer.wte.weight.grad.clone())
    assert torch.equal(gradients[0], gradients[1]) and not torch.equal(gradients[0], gradients[2])


def test_in_bf16_what_is_stored_is_near_what_is_computed_in_fp32():
    models = two_teachers()
    stored = [
        mean_distributions(models, TEXT, DOCUMENT_STARTS, rows=VOCAB_SIZE, n_ctx=N_CTX, autocast=autocast)
        for autocast in (nullcontext, lambda: torch.autocast("cpu", torch.bfloat16))
    ]
    assert not torch.equal(*stored)
    torch.testing.assert_close(*stored, rtol=0.05, atol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "vocab_size", "epochs", "expected"),
    [
        (55_000, 3_000, 8, 330_000_000),
        (55_000, 3_000, 2, 330_000_000),
        (55_000, 3_000, 1, 0),  # asked for once anyway
        (1 << 19, 1 << 10, 8, 1 << 30),
        ((1 << 19) + 1, 1 << 10, 8, 0),  # too much memory
    ],
)
def test_predictions_are_stored_where_they_fit_and_are_wanted_more_than_once(tokens, vocab_size, epochs, expected):
    assert stored_bytes(tokens, vocab_size, epochs) == expected
