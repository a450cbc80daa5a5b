"""What is held out: about a share of the text, the same whatever the vocabulary, never next to what is trained on."""

from __future__ import annotations

import numpy as np
import pytest
from book_order import MARKS
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_chinese.training.hold_out import MIN_BYTES, SLICE, HoldOut, split

BYTES = 3  # of every token but the marks
TEXTS = [b""] * 5 + [number.to_bytes(BYTES, "big") for number in range(5, 60_000)]


def corpus(lengths: list[int], seed: int = 0) -> np.ndarray:
    """Documents of pseudo-random tokens."""
    generator = np.random.default_rng(seed)
    return np.concatenate([[2, *generator.integers(5, 60_000, length), 1] for length in lengths]).astype(np.uint16)


def held_bytes(parts) -> int:
    return sum(end - begin for begin, end in parts.held_out) * BYTES


def test_a_hundredth_of_the_text_is_held_out_in_whole_documents():
    tokens = corpus([100] * 20_000)
    parts = split(tokens, MARKS, HoldOut(0.01), TEXTS)
    assert parts.slices == 0 and parts.documents == len(parts.held_out)
    assert 0.01 <= held_bytes(parts) / (len(tokens) * BYTES) < 0.0102
    assert all(tokens[begin] == 2 and tokens[end - 1] == 1 for begin, end in parts.held_out)


def test_small_corpora_hold_out_a_minimum_but_never_more_than_a_fifth():
    middling = split(corpus([100] * 400), MARKS, HoldOut(0.01), TEXTS)
    assert MIN_BYTES <= held_bytes(middling) < 1.1 * MIN_BYTES
    tokens = corpus([100] * 50)
    assert 0.15 < held_bytes(split(tokens, MARKS, HoldOut(0.01), TEXTS)) / (len(tokens) * BYTES) <= 0.2


def test_large_corpora_hold_out_a_maximum():
    parts = split(corpus([100] * 20_000), MARKS, HoldOut(0.1, max_bytes=30_000), TEXTS)
    assert 30_000 <= held_bytes(parts) < 33_000


def test_of_long_documents_slices_are_held_out_with_a_gap_on_both_sides():
    """Fifteen novels of 300,000 characters: not one of them is lost to the training."""
    tokens = corpus([300_000] * 15)
    parts = split(tokens, MARKS, HoldOut(0.01, gap=64), TEXTS)
    assert parts.documents == 0 and parts.slices == len(parts.held_out) > 15
    assert held_bytes(parts) / (len(tokens) * BYTES) == pytest.approx(0.01, rel=0.2)
    assert all(end - begin == pytest.approx(SLICE / BYTES, rel=0.6) for begin, end in parts.held_out)
    trained = np.zeros(len(tokens), bool)
    for begin, end in parts.kept:
        trained[begin:end] = True
    for begin, end in parts.held_out:
        inside = tokens[max(0, begin - 64) : end + 64]
        if not np.isin(inside, (1, 2)).any():  # inside one novel
            assert not trained[max(0, begin - 64) : end + 64].any()
    assert len(tokens) - trained.sum() <= sum(end - begin + 128 for begin, end in parts.held_out)
    assert {begin for begin, _ in parts.kept} - {0} == set(parts.breaks) - {len(tokens)}


def test_one_novel_alone_has_a_validation_set():
    parts = split(corpus([20_000]), MARKS, HoldOut(0.01, gap=128), TEXTS)
    assert parts.slices >= 2 and held_bytes(parts) >= MIN_BYTES


def test_a_short_story_alone_has_one_too_and_two_lines_have_none_left_over():
    parts = split(corpus([3_000]), MARKS, HoldOut(0.01, gap=8), TEXTS)
    assert 0 < held_bytes(parts) <= 0.2 * 3_000 * BYTES
    assert split(corpus([60]), MARKS, HoldOut(0.01), TEXTS).held_out == []


@settings(max_examples=50)
@given(st.lists(st.integers(0, 4_000), min_size=1, max_size=12), st.sampled_from([0.01, 0.3]), st.integers(0, 40))
def test_every_token_is_trained_on_held_out_or_in_a_gap(lengths, fraction, gap):
    tokens = corpus(lengths, seed=1)
    parts = split(tokens, MARKS, HoldOut(fraction, gap=gap), TEXTS)
    use = np.zeros(len(tokens), int)
    for begin, end in parts.kept:
        assert begin < end
        use[begin:end] += 1
    for begin, end in parts.held_out:
        use[begin:end] += 1
    assert use.max() == 1
    assert (use == 0).sum() <= 2 * gap * parts.slices
    assert sorted(parts.kept) == parts.kept and sorted(parts.held_out) == parts.held_out


def test_most_documents_stay_where_they_are_when_others_come():
    tokens = corpus([100] * 20_000)
    before = {tuple(tokens[begin:end]) for begin, end in split(tokens, MARKS, HoldOut(0.01), TEXTS).held_out}
    more = np.concatenate([tokens, corpus([100] * 2_000, seed=1)])
    after = {tuple(more[begin:end]) for begin, end in split(more, MARKS, HoldOut(0.01), TEXTS).held_out}
    assert len(before & after) > 0.9 * len(before)


def test_equal_documents_are_all_held_out_or_none_is():
    tokens = np.tile(corpus([100] * 50), 40)
    parts = split(tokens, MARKS, HoldOut(0.01), TEXTS)
    held = {tuple(tokens[begin:end]) for begin, end in parts.held_out}
    assert len(parts.held_out) == 40 * len(held)
