"""The embedding that begins at co-occurrences: its matrix against one counted by hand, and what its vectors say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from small_run import run, weights
from tiny_model import tiny_model

from gpt2_chinese.training.embedding_init import (
    STANDARD_DEVIATION,
    _positive_information,
    init_embedding_from_cooccurrence,
)
from gpt2_chinese.training.embedding_init import cooccurrence_embedding as embed


def test_information_is_what_the_formula_gives():
    tokens, size = [0, 1, 2, 1, 1, 3], 5
    counts = np.zeros((size, size))
    for place, token in enumerate(tokens):
        for distance in (1, 2):
            if place + distance < len(tokens):
                other = tokens[place + distance]
                counts[token, other] += 1 / distance
                counts[other, token] += 1 / distance
    totals = counts.sum(axis=1)
    shares = totals**0.75 / sum(totals**0.75)
    expected = np.zeros((size, size))
    for a, b in zip(*counts.nonzero(), strict=True):
        both = (math.log(counts[a, b] / (totals[a] * shares[b])), math.log(counts[b, a] / (totals[b] * shares[a])))
        expected[a, b] = sum(max(0.0, value) for value in both) / 2
    found = _positive_information(np.array(tokens, np.uint16), size, 2).to_dense()
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    assert (expected > 0).sum() > 4


def text(seed: int = 0) -> np.ndarray:
    """Of two kinds of sentence: 5 and 6 stand between 10 and 11, 7 and 8 between 12 and 13."""
    random = np.random.default_rng(seed)
    kinds = random.integers(2, size=3000)
    middles = np.where(kinds == 0, random.integers(5, 7, size=3000), random.integers(7, 9, size=3000))
    return np.stack([10 + 2 * kinds, middles, 11 + 2 * kinds], axis=1).flatten().astype(np.uint16)


def test_tokens_with_the_same_neighbours_lie_together():
    torch.manual_seed(0)
    random = torch.randn(20, 8) * 0.02
    made = embed(text(), random)
    alike = torch.nn.functional.cosine_similarity(made[:, None], made[None], dim=2)
    assert alike[5, 6] > 0.9 and alike[7, 8] > 0.9 and alike[5, 7] < 0.1
    occurring = [5, 6, 7, 8, 10, 11, 12, 13]
    assert made[occurring].std().item() == pytest.approx(STANDARD_DEVIATION, rel=1e-4)
    others = [row for row in range(20) if row not in occurring]
    assert torch.equal(made[others], random[others])


@pytest.mark.parametrize("width", [4, 64])
def test_any_width_will_do_and_the_same_seed_gives_the_same(width):
    random = torch.randn(20, width)
    torch.manual_seed(1)
    first = embed(text(), random)
    torch.manual_seed(1)
    assert torch.equal(embed(text(), random), first)
    assert first.shape == (20, width) and first.isfinite().all()


@pytest.mark.parametrize("tokens", [[], [3], [3, 3, 3, 3]])
def test_a_corpus_that_says_nothing_leaves_finite_numbers(tokens):
    random = torch.randn(20, 8)
    made = embed(np.array(tokens, np.uint16), random)
    assert made.isfinite().all() and torch.equal(made[4:], random[4:])


def test_a_model_gets_it_in_its_head_too_and_other_random_numbers_stay():
    model = tiny_model()
    before = model.transformer.wte.weight.detach().clone()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert init_embedding_from_cooccurrence(model, text(), seed=1) == 9000
    assert torch.equal(torch.get_rng_state(), state)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert not torch.equal(model.transformer.wte.weight[5:9], before[5:9])
    # Without an opinion, the model holds no token for much likelier than another, not even the one before.
    with torch.no_grad():
        likely = model(torch.tensor([[5, 6, 7]])).logits.softmax(dim=-1)
    assert likely.max() < 3 / likely.shape[-1]


def test_a_run_begins_there_alone_and_with_two_ranks(train, capfd):
    run(train, "--embedding_init", "cooccurrence", epochs=1)
    assert "embedding  initialised from the co-occurrences of" in capfd.readouterr().out
    alone = weights()
    run(train, "--embedding_init", "cooccurrence", epochs=1, device="cpu,cpu", output_dir="two", writer_dir="two/tb")
    for name, value in weights("two/final_model").items():
        torch.testing.assert_close(value, alone[name], rtol=1e-4, atol=1e-5)
    run(train, epochs=1, output_dir="plain", writer_dir="plain/tb")
    assert not torch.equal(weights("plain/final_model")["transformer.wte.weight"], alone["transformer.wte.weight"])


def test_a_model_that_has_an_embedding_is_refused(train):
    run(train, epochs=1)
    with pytest.raises(ValueError, match="--embedding_init cooccurrence is for new models"):
        run(train, "--embedding_init", "cooccurrence", pretrained_model="model/final_model", output_dir="other")
