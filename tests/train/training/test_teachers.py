"""Soft targets: what teachers predict of a text, computed once for each token, with enough of the text before it."""

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
from gpt2_chinese.training.teachers import _stretches, bytes_of_soft_targets, soft_targets
from gpt2_chinese.training.windows import spans, window_batch

N_CTX, VOCAB_SIZE = 16, 200
TEXT = np.random.default_rng(0).integers(5, VOCAB_SIZE, 75)
PIECES = (50, 5, 20)  # the last two are one span
DOCUMENT_STARTS = np.array([0, 3, 40, 41])


def two_teachers():
    first, second = tiny_model().requires_grad_(False), tiny_model().requires_grad_(False)
    first.transformer.wte.weight.mul_(1.5)
    second.transformer.h[1].mlp.c_proj.weight.mul_(-2)
    return [first, second]


def targets_of(models, text=TEXT, pieces=PIECES, starts=None, autocast=nullcontext, **ranks):
    return soft_targets(models, text, pieces, starts, rows=VOCAB_SIZE, n_ctx=N_CTX, autocast=autocast, **ranks)


@given(st.integers(0, 100), st.integers(2, 40), st.integers(0, 300))
def test_every_token_of_a_span_but_the_last_has_one_and_a_quarter_of_a_window_before_it(begin, n_ctx, more):
    end = begin + n_ctx + more
    places = []
    for start, first, after in _stretches(begin, end, n_ctx):
        assert begin <= start <= end - n_ctx and 0 <= first <= after == n_ctx - 1
        places += range(start + first, start + after)
        assert start == begin or first >= n_ctx // 4 - 1
    assert places == list(range(begin, end - 1))


@pytest.mark.parametrize("starts", [None, DOCUMENT_STARTS])
@pytest.mark.parametrize(("length", "pieces"), [(len(TEXT), PIECES), (N_CTX, (N_CTX,))])
def test_a_soft_target_is_the_mean_of_what_each_teacher_says_in_one_window(starts, length, pieces, monkeypatch):
    """Each document is cut out and read alone, with transformers' own attention."""
    monkeypatch.setattr(teaching, "_WINDOWS_AT_ONCE", 2)
    models, text = two_teachers(), TEXT[:length]
    if starts is not None:
        starts = starts[starts < length]
    targets = targets_of(models, text, pieces, starts)
    assert targets.shape == (length, VOCAB_SIZE) and targets.dtype == torch.float16
    wanted = torch.zeros(targets.shape)
    for model in models:
        model.set_attn_implementation("eager")
    for span in spans(pieces, N_CTX):
        for start, first, end in _stretches(*span, N_CTX):
            for place in range(start + first, start + end):
                begin = start
                if starts is not None:
                    begin = max(start, int(starts[np.searchsorted(starts, place, side="right") - 1]))
                ids = torch.from_numpy(text[begin : place + 1])[None]
                with torch.no_grad():
                    wanted[place] = sum(torch.softmax(model(ids).logits[0, -1], 0) for model in models) / 2
    assert (wanted.sum(1) == 0).nonzero()[:, 0].tolist() == [end - 1 for _, end in spans(pieces, N_CTX)]
    torch.testing.assert_close(targets.float(), wanted, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("world_size", [2, 3, 9])
def test_the_parts_of_ranks_add_up_to_the_whole(world_size):
    models = two_teachers()
    parts = [targets_of(models, rank=rank, world_size=world_size) for rank in range(world_size)]
    torch.testing.assert_close(sum(parts), targets_of(models), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("compute", ["forward", "_loss"])
def test_learning_from_soft_targets_is_learning_from_the_teachers(compute, recompute):
    """In a window at the begin of a piece, where soft targets have just as much before them."""
    student, models = tiny_model(), two_teachers()
    starts = np.array([50, 0])
    windows = window_batch(TEXT, starts, N_CTX)
    results = []
    for given_teachers in ({"teachers": models}, {"soft_targets": targets_of(models)}):
        window_loss = WindowLoss(student, teacher_share=0.7, recompute=recompute, **given_teachers)
        student.zero_grad()
        loss = getattr(window_loss, compute)(windows, None, torch.from_numpy(starts))
        loss.backward()
        results.append([loss.detach(), *(parameter.grad.clone() for parameter in student.parameters())])
    for live, soft in zip(*results, strict=True):
        torch.testing.assert_close(soft, live, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("compute", ["forward", "_loss"])
def test_each_window_learns_the_soft_targets_of_its_own_place(compute, recompute):
    student = tiny_model()
    starts = torch.tensor([30, 2])
    windows = window_batch(TEXT, starts.numpy(), N_CTX)
    whole = torch.rand(len(TEXT), VOCAB_SIZE).half()
    elsewhere = whole.clone()
    elsewhere[:2] = elsewhere[30 + N_CTX - 1 :] = elsewhere[2 + N_CTX - 1 : 30] = 0
    gradients = []
    for targets in (whole, elsewhere, whole.roll(1, 0)):
        student.zero_grad()
        window_loss = WindowLoss(student, soft_targets=targets, teacher_share=0.5, recompute=recompute)
        getattr(window_loss, compute)(windows, None, starts).backward()
        gradients.append(student.transformer.wte.weight.grad.clone())
    assert torch.equal(gradients[0], gradients[1]) and not torch.equal(gradients[0], gradients[2])


def test_in_bf16_soft_targets_are_near_those_in_fp32():
    models = two_teachers()
    bf16 = targets_of(models, starts=DOCUMENT_STARTS, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    fp32 = targets_of(models, starts=DOCUMENT_STARTS)
    assert not torch.equal(bf16, fp32)
    torch.testing.assert_close(bf16, fp32, rtol=0.05, atol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "vocab_size", "epochs", "expected"),
    [
        (55_000, 3_000, 8, 330_000_000),
        (55_000, 3_000, 2, 330_000_000),
        (55_000, 3_000, 1, 0),  # the teachers predict once anyway
        (1 << 19, 1 << 10, 8, 1 << 30),
        ((1 << 19) + 1, 1 << 10, 8, 0),  # too much memory
    ],
)
def test_soft_targets_are_made_where_they_fit_and_are_wanted_more_than_once(tokens, vocab_size, epochs, expected):
    assert bytes_of_soft_targets(tokens, vocab_size, epochs) == expected
