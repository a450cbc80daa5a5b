"""The trigram that a model learns from beside the text, held to one that is written straight from the formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from kneser_ney import END, BruteForce
from tiny_model import tiny_model

from gpt2_chinese.text.vocabulary import Marks
from gpt2_chinese.training import ngram_teacher
from gpt2_chinese.training.loss import HeadLoss, NgramTarget, WindowLoss
from gpt2_chinese.training.ngram_teacher import CACHE_TRUST, NgramTeacher

VOCAB_SIZE = 12
ONE_MARK, TWO_MARKS = (0, 0), (0, 1)
Documents = st.lists(st.lists(st.integers(2, 5), max_size=12), min_size=1, max_size=8)


def stream_of(documents: list[list[int]], marks: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of documents between their marks, and where these begin."""
    begin, end = marks
    starts = np.cumsum([0, *(len(one) + 2 for one in documents[:-1])])
    return np.array([token for one in documents for token in (begin, *one, end)]), starts


def teacher_of(
    documents: list[list[int]], marks: tuple[int, int] = ONE_MARK, vocab_size: int = VOCAB_SIZE
) -> NgramTeacher:
    tokens, starts = stream_of(documents, marks)
    named = Marks(begin=marks[0], end=marks[1], line_break=None, padding=None, unknown=None, never_produced=())
    return NgramTeacher(tokens, starts, vocab_size=vocab_size, marks=named)


def distributions(teacher: NgramTeacher, windows: list[list[int]], cache_share: float = 0.0) -> torch.Tensor:
    return teacher.predictions(torch.tensor(windows), cache_share).dense(slice(None), 1.0, torch.float32)


@pytest.mark.parametrize("marks", [ONE_MARK, TWO_MARKS])
@given(Documents, st.lists(st.integers(2, 6), min_size=1, max_size=8))
def test_it_expects_what_the_formula_says(marks, documents, unseen):
    teacher = teacher_of(documents, marks)
    # Two beginnings make one symbol more than the reference has, which knows a document's beginning as none.
    model = BruteForce(documents, 3, outcomes=VOCAB_SIZE)
    window = [marks[0], *unseen, marks[1], marks[0], unseen[0]]
    found = distributions(teacher, [window])
    torch.testing.assert_close(found.sum(1), torch.ones(len(window) - 1), rtol=1e-5, atol=0)
    symbols = ["<begin>", *unseen, END]
    for place in range(1, len(symbols)):
        context = tuple(symbols[max(0, place - 2) : place])
        for token in (*range(2, VOCAB_SIZE), END):
            expected = model.probability(context, token)
            assert found[place - 1, marks[1] if token == END else token] == pytest.approx(expected, rel=1e-4)
    assert found[len(symbols) - 1].tolist() == [float(token == marks[0]) for token in range(VOCAB_SIZE)]


def test_its_discounts_are_estimated_where_the_text_is_large_enough():
    generator = np.random.default_rng(0)
    weights = 1 / np.arange(1, 49)
    documents = [(generator.choice(48, 50, p=weights / weights.sum()) + 2).tolist() for _ in range(30)]
    teacher, model = teacher_of(documents, vocab_size=50), BruteForce(documents, 3, outcomes=50)
    assert [0.0, 0.5, 1.0, 1.5] not in (model.discounts[2], model.discounts[3])
    found = distributions(teacher, [[0, *documents[3], 0]])
    for place in range(1, 50):
        context = tuple(["<begin>", *documents[3]][max(0, place - 1) : place + 1])
        for token in (2, 7, 30, 49):
            assert found[place, token] == pytest.approx(model.probability(context, token), rel=1e-4)


def test_a_gpu_s_operations_give_the_same_as_the_compiled_code(monkeypatch):
    generator = np.random.default_rng(1)
    documents = [(generator.integers(0, 40, 50) ** 2 // 45 + 2).tolist() for _ in range(30)]
    teacher = teacher_of(documents, vocab_size=50)
    tokens, _ = stream_of(documents, ONE_MARK)
    predictions = teacher.predictions(torch.from_numpy(tokens[: 40 * 30].reshape(40, 30)), 0.3)
    monkeypatch.setattr(ngram_teacher, "CACHE_ROWS", 100)
    for part in (slice(None), slice(7, 300)):
        found = predictions.dense(part, 0.5, torch.float32)
        # A type that the compiled code does not have takes the other way.
        torch.testing.assert_close(found, predictions.dense(part, 0.5, torch.float64).float())


def cached(before: list[int], token: int) -> float:
    """The cache's probability of a token, straight from the formula; `before` has the document's tokens."""
    follow = [after for one, after in zip(before, before[1:], strict=False) if one == before[-1]]
    return (follow.count(token) + before.count(token) / len(before)) / (len(follow) + 1)


@pytest.mark.parametrize("marks", [ONE_MARK, TWO_MARKS])
@given(st.lists(st.lists(st.integers(2, 5), max_size=9), min_size=1, max_size=4), st.integers(0, 6), st.floats(0.01, 1))
def test_a_part_of_it_is_what_stands_before_in_the_document(marks, documents, cut, cache_share):
    teacher = teacher_of([[2, 3, 4, 2, 3], [5, 3, 2, 4]], marks)
    window = stream_of(documents, marks)[0].tolist()[cut:]
    if len(window) < 2:
        return
    without, found = distributions(teacher, [window]), distributions(teacher, [window], cache_share)
    torch.testing.assert_close(found.sum(1), torch.ones(len(window) - 1), rtol=1e-5, atol=0)
    before: list[int] = []
    for place, token in enumerate(window[:-1]):
        before = [] if token in marks else [*before, token]
        of_cache = cache_share * len(before) / (len(before) + CACHE_TRUST)
        for other in range(VOCAB_SIZE):
            expected = (1 - of_cache) * without[place, other] + (of_cache * cached(before, other) if before else 0)
            assert found[place, other] == pytest.approx(float(expected), rel=1e-4, abs=1e-7)


def test_a_window_that_begins_inside_a_document_knows_one_token_less():
    teacher = teacher_of([[2, 3, 4], [5, 3, 2], [4, 3, 2]])
    inside, whole = distributions(teacher, [[3, 4, 0]]), distributions(teacher, [[2, 3, 4, 0]])
    assert not torch.equal(inside[0], whole[1])
    torch.testing.assert_close(inside[1], whole[2])


def test_rows_of_several_windows_lie_one_after_the_other_and_can_be_taken_in_parts():
    teacher = teacher_of([[2, 3, 4, 2, 3], [5, 3, 2, 4]])
    windows = [[0, 2, 3, 4], [3, 2, 4, 0], [2, 0, 0, 5]]
    predictions = teacher.predictions(torch.tensor(windows), 0.4)
    whole = predictions.dense(slice(None), 0.5, torch.float32)
    for row, window in enumerate(windows):
        torch.testing.assert_close(whole[3 * row : 3 * row + 3], 0.5 * distributions(teacher, [window], 0.4))
    parts = [predictions.dense(slice(begin, begin + 4), 0.5, torch.float32) for begin in range(0, 9, 4)]
    assert torch.equal(torch.cat(parts), whole)
    assert predictions.dense(slice(None), 0.5, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("documents", [[[]], [[], []], [[2]], [[2], []]])
def test_a_text_without_trigrams_teaches_what_it_has(documents):
    found = distributions(teacher_of(documents), [[0, 2, 2, 3]])
    torch.testing.assert_close(found.sum(1), torch.ones(3))


def test_a_large_text_is_counted_by_documents_and_in_bounds(monkeypatch):
    monkeypatch.setattr(ngram_teacher, "MAX_TOKENS", 40)
    documents = [[2, 3, 4, 5, 2, 3]] * 20
    assert teacher_of(documents).counted_tokens == 40  # every fourth document
    assert teacher_of([[2, 3] * 100]).counted_tokens == 40
    uneven = [[2, 3] * 50 if number % 8 == 0 else [] for number in range(40)]  # the chosen ones are the long ones
    assert teacher_of(uneven).counted_tokens == 40


OF_CACHE = {(0.36, 0.24): 0.5, (0.8, 0.1): 0.5, (0.1, 0.5): 0.24, (0.0, 0.5): 0.2, (0.0, 1.0): 0.2}
"""What the cache has of the n-gram, for shares of teachers and n-gram: a fifth of both together, at most a half."""


def mixed_losses(model, input_ids: torch.Tensor, ngram: NgramTeacher, teacher, shares: tuple[float, float]):
    """The loss of the text, and the mixed one, straight from the definition."""
    logits = model(input_ids).logits[:, :-1].flatten(0, 1)
    of_text = F.cross_entropy(logits, input_ids[:, 1:].flatten(), reduction="sum")
    expected = ngram.predictions(input_ids, OF_CACHE[shares]).dense(slice(None), 1.0, torch.float32)
    of_ngram = F.cross_entropy(logits, expected, reduction="sum")
    with torch.no_grad():
        taught = torch.softmax(teacher(input_ids).logits[:, :-1].flatten(0, 1), 1)
    of_teacher = F.cross_entropy(logits, taught, reduction="sum")
    return of_text, (1 - sum(shares)) * of_text + shares[0] * of_teacher + shares[1] * of_ngram


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("compute", ["forward", "_loss"])
@pytest.mark.parametrize("shares", OF_CACHE)
@pytest.mark.parametrize("is_soft", [False, True])
def test_the_gradient_is_that_of_the_three_losses_mixed_and_the_value_that_of_the_text(
    compute, shares, recompute, is_soft
):
    model, teacher = tiny_model(), tiny_model().requires_grad_(False)
    teacher.transformer.wte.weight.mul_(1.5)
    generator = torch.Generator().manual_seed(0)
    ngram = teacher_of([torch.randint(2, 200, (60,), generator=generator).tolist() for _ in range(5)], vocab_size=200)
    input_ids = torch.randint(0, 200, (3, 16), generator=generator)
    shared = {"teacher_share": shares[0], "ngram_share": shares[1]}
    taught: dict[str, object] = {"teachers": [teacher]}
    if is_soft:
        with torch.no_grad():
            taught = {"soft_targets": torch.softmax(teacher(input_ids).logits.flatten(0, 1), 1)}
    window_loss = WindowLoss(model, ngram=ngram, recompute=recompute, **taught, **shared)
    of_text, mixed = mixed_losses(model, input_ids, ngram, teacher, shares)
    mixed.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    loss = getattr(window_loss, compute)(input_ids, None, torch.tensor([0, 16, 32]))
    loss.backward()
    torch.testing.assert_close(loss, of_text.detach(), rtol=1e-5, atol=0)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4)


def test_in_bf16_the_gradient_is_near_that_in_fp32():
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(30, 16, generator=generator), torch.randn(VOCAB_SIZE, 16, generator=generator)
    windows = torch.randint(2, 6, (2, 16), generator=generator)
    targets = windows[:, 1:].flatten()
    target = NgramTarget(teacher_of([[2, 3, 4, 2, 3], [5, 3, 2, 4]]).predictions(windows, 0.3), 1.0)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        hidden.grad, _ = None, hidden.requires_grad_()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            HeadLoss.apply(hidden, head, targets, 0.5, None, target).backward()
        gradients.append(hidden.grad)
    torch.testing.assert_close(*gradients, rtol=2e-2, atol=2e-2 * gradients[0].abs().max().item())


def test_the_gradient_is_the_same_wherever_its_numbers_lie_in_memory():
    """Rows of a few numbers close to each other were once added up in another order: 1 in 100 of these differed."""
    generator = torch.Generator().manual_seed(0)
    teacher = teacher_of(torch.randint(5, 35, (60, 60), generator=generator).tolist(), vocab_size=35)
    windows, neighbours = torch.randint(0, 35, (2, 8), generator=generator), []
    hidden, head = torch.randn(14, 8, generator=generator), torch.randn(35, 8, generator=generator)
    taught = [torch.randn(14, 8, generator=generator), torch.randn(35, 8, generator=generator)]
    found = set()
    for _ in range(2000):
        neighbours = [*neighbours[-50:], torch.empty(int(torch.randint(1, 5000, (1,), generator=generator)))]
        target = NgramTarget(teacher.predictions(windows, 0.3), 0.4)
        mine = hidden.clone().requires_grad_()
        copies = [tensor.clone() for tensor in (*taught, *taught)]
        HeadLoss.apply(mine, head.clone(), windows[:, 1:].flatten(), 0.7, None, target, None, *copies).backward()
        found.add(mine.grad.numpy().tobytes())
    assert len(found) == 1
