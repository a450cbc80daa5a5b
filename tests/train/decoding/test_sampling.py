"""sampling.py against the reference's filter, transformers' processors and the distributions themselves."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper

from gpt2_chinese.decoding import sampling
from gpt2_chinese.decoding.sampling import (
    CompiledDraw,
    apply_repetition_penalty,
    apply_temperature,
    apply_top_k_top_p,
    draw,
    row_seed,
    uniforms,
)

torch.set_num_threads(1)


def kept(row: torch.Tensor) -> list[int]:
    return row.isfinite().nonzero().flatten().tolist()


def draw_with(logits, uniform, *, temperature=1.0, top_k=0, top_p=0.0) -> list[int]:
    """`draw` with the same settings for every row."""
    rows = len(logits)
    return draw(
        logits,
        torch.as_tensor(uniform, dtype=torch.float64),
        torch.full((rows,), float(temperature)),
        torch.full((rows,), top_k),
        torch.full((rows,), float(top_p)),
    ).tolist()


def test_filter_keeps_exactly_what_the_reference_keeps(reference):
    cases = json.loads((reference / "sampling_filter.json").read_text(encoding="utf-8"))
    assert len(cases) == 40
    for case in cases:
        result = apply_top_k_top_p(
            torch.tensor([case["logits"]]), torch.tensor([case["top_k"]]), torch.tensor([case["top_p"]])
        )
        assert kept(result[0]) == case["kept"], case


def test_filter_of_the_reference_holds_with_every_row_its_own_settings(reference):
    cases = json.loads((reference / "sampling_filter.json").read_text(encoding="utf-8"))
    for size in {len(case["logits"]) for case in cases}:
        group = [case for case in cases if len(case["logits"]) == size]
        result = apply_top_k_top_p(
            torch.tensor([case["logits"] for case in group]),
            torch.tensor([case["top_k"] for case in group]),
            torch.tensor([case["top_p"] for case in group]),
        )
        assert [kept(row) for row in result] == [case["kept"] for case in group]


def test_draw_reaches_all_that_the_reference_keeps_and_nothing_else(reference):
    cases = json.loads((reference / "sampling_filter.json").read_text(encoding="utf-8"))
    grid = (np.arange(20_000) + 0.5) / 20_000
    for case in cases:
        logits = torch.tensor([case["logits"]]).expand(len(grid), -1)
        drawn = set(draw_with(logits, grid, top_k=case["top_k"], top_p=case["top_p"]))
        assert drawn <= set(case["kept"]), case
        probability = torch.softmax(
            apply_top_k_top_p(logits[:1], *map(torch.tensor, ([case["top_k"]], [case["top_p"]]))), -1
        )
        assert drawn >= set((probability[0] > 1e-4).nonzero().flatten().tolist()), case


def test_top_k_equals_transformers_even_where_logits_tie():
    logits = torch.randint(-3, 4, (50, 40), generator=torch.Generator().manual_seed(0)).float()
    for top_k in (1, 2, 7, 39, 40):
        expected = TopKLogitsWarper(top_k)(None, logits)
        off = torch.zeros(50)
        assert torch.equal(apply_top_k_top_p(logits, torch.full((50,), top_k), off), expected)


def test_top_p_keeps_the_token_behind_exactly_p():
    """The reference removes what is above p, not what is at it; halves are exact, so nothing is rounded here."""
    logits = torch.tensor([[0.0, 0.0, -1.0, -1.0]])
    assert kept(apply_top_k_top_p(logits, torch.tensor([2]), torch.tensor([0.5]))[0]) == [0, 1]
    assert kept(apply_top_k_top_p(logits, torch.tensor([2]), torch.tensor([0.49]))[0]) == [0]


def test_repetition_penalty_equals_transformers():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 30, generator=generator)
    ids = torch.randint(0, 30, (4, 10), generator=generator)
    seen = torch.zeros(4, 30, dtype=torch.bool).scatter(1, ids, True)
    for penalty in (1.0, 1.3, 0.7):
        expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
        assert torch.equal(apply_repetition_penalty(logits, seen, torch.full((4,), penalty)), expected)


def test_temperature_equals_transformers_up_to_the_shift():
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    expected = TemperatureLogitsWarper(0.7)(None, logits)
    assert torch.allclose(
        torch.softmax(apply_temperature(logits, torch.full((3,), 0.7)), -1), torch.softmax(expected, -1), atol=1e-6
    )


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-4])
def test_a_tiny_temperature_takes_the_greatest_logit_and_makes_no_nan(temperature):
    logits = torch.tensor([[1.0, 3.0, 2.0, -torch.inf]])
    for top_k, top_p in ((0, 0.0), (2, 0.0), (0, 0.5)):
        assert draw_with(logits, [0.999], temperature=temperature, top_k=top_k, top_p=top_p) == [1]


def test_temperature_0_takes_the_greatest_logit_whatever_the_number():
    logits = torch.randn(64, 30, generator=torch.Generator().manual_seed(1))
    numbers = torch.rand(64, generator=torch.Generator().manual_seed(2))
    assert draw_with(logits, numbers, temperature=0) == logits.argmax(-1).tolist()


def test_a_banned_token_is_not_drawn_at_the_ends_of_the_interval():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    for number in (0.5 / 2**48, 1 - 0.5 / 2**48):
        for top_k in (0, 3, 4):
            assert draw_with(logits, [number], top_k=top_k)[0] in (1, 2)


def test_ties_that_reach_past_the_candidates_are_all_kept():
    """topk of the greatest few sees only a part of 300 equal logits; the reference keeps all of them."""
    logits = torch.zeros(1, 300)
    logits[0, 200] = 1.0
    grid = (np.arange(3000) + 0.5) / 3000
    drawn = set(draw_with(logits.expand(3000, -1), grid, top_k=5))
    assert drawn == set(range(300))


@given(
    rows=st.integers(1, 5),
    size=st.integers(1, 300),
    levels=st.integers(1, 40),
    top_k=st.lists(st.integers(0, 310), min_size=5, max_size=5),
    top_p=st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), min_size=5, max_size=5),
    temperature=st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=5, max_size=5),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None)
def test_a_row_draws_the_same_token_alone_and_beside_others(rows, size, levels, top_k, top_p, temperature, seed):
    """Few levels make many ties; short and whole rankings must agree on their order."""
    logits = torch.randint(0, levels, (rows, size), generator=torch.Generator().manual_seed(seed)).float() / 4
    numbers = uniforms([row_seed(seed, row) for row in range(rows)], [3] * rows)
    setting = torch.tensor(temperature[:rows]), torch.tensor(top_k[:rows]), torch.tensor(top_p[:rows])
    together = draw(logits, numbers, *setting).tolist()
    alone = [
        draw(logits[row : row + 1], numbers[row : row + 1], *(part[row : row + 1] for part in setting)).item()
        for row in range(rows)
    ]
    assert together == alone
    assert draw(logits, numbers, *setting, compiled=CompiledDraw(size)).tolist() == together
    allowed = apply_top_k_top_p(apply_temperature(logits, setting[0]), *setting[1:])
    for row, token in enumerate(together):
        assert setting[0][row] == 0 or allowed[row, token].isfinite()


def test_the_short_ranking_is_only_a_shortcut(monkeypatch):
    logits = torch.randn(40, 1000, generator=torch.Generator().manual_seed(0))
    numbers = uniforms(range(40), [0] * 40)
    short = draw_with(logits, numbers, top_k=30, top_p=0.9)
    monkeypatch.setattr(sampling, "FEW", 0)
    assert draw_with(logits, numbers, top_k=30, top_p=0.9) == short


@pytest.mark.parametrize("vocab_size", [7, 16, 300, 5003, 50_005])
def test_the_compiled_draw_gives_the_tokens_of_pytorch(vocab_size):
    generator = torch.Generator().manual_seed(vocab_size)
    compiled = CompiledDraw(vocab_size)
    for spread, dtype in ((1.0, torch.float32), (8.0, torch.float32), (3.0, torch.bfloat16)):  # bf16: many ties
        logits = (spread * torch.randn(200, vocab_size, generator=generator)).to(dtype).float()
        logits[:, :5] = -torch.inf
        setting = (
            torch.tensor([0.0, 1.0, 0.7, 1.0, 2.5]).repeat(40),
            torch.randint(0, min(150, 2 * vocab_size), (200,), generator=generator),
            torch.tensor([0.0, 0.9, 1.0, 0.3]).repeat(50),
        )
        numbers = uniforms(range(200), [1] * 200)
        seen = compiled(logits, numbers, *setting)
        few = (setting[0] == 0) | ((setting[1] > 0) & (setting[1] < min(sampling.FEW, vocab_size)))
        assert torch.equal(seen >= 0, few)
        expected = draw(logits, numbers, *setting)
        assert torch.equal(seen[few], expected[few])
        assert torch.equal(draw(logits, numbers, *setting, compiled=compiled), expected)


def test_the_compiled_draw_leaves_to_pytorch_what_it_has_no_room_for():
    logits = torch.zeros(3, 1000)
    logits[1, 500] = torch.inf
    logits[2, :996] = -torch.inf  # fewer than top_k can be drawn
    numbers = torch.full((3,), 0.5, dtype=torch.float64)
    setting = torch.ones(3), torch.full((3,), 5), torch.zeros(3)
    assert CompiledDraw(1000)(logits, numbers, *setting).tolist() == [-1, -1, 998]
    assert draw(logits, numbers, *setting, compiled=CompiledDraw(1000)).tolist()[::2] == [500, 998]


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.0), (5, 0.0), (0, 0.8), (6, 0.9)])
def test_draws_follow_the_distribution(top_k, top_p):
    """Chi-square of 40,000 draws, with the numbers of 40 seeds; 0.999 quantiles of the distribution."""
    logits = torch.tensor([[1.0, 0.0, 2.0, -1.0, 0.5, 1.5, -2.0, 0.2]])
    seeds = [row_seed(11, sample) for sample in range(40) for _ in range(1000)]
    numbers = uniforms(seeds, [step for _ in range(40) for step in range(1000)])
    counts = np.bincount(
        draw_with(logits.expand(len(seeds), -1), numbers, temperature=1.2, top_k=top_k, top_p=top_p), minlength=8
    )
    allowed = apply_top_k_top_p(logits / 1.2, torch.tensor([top_k]), torch.tensor([top_p]))
    expected = torch.softmax(allowed, -1)[0].numpy() * len(seeds)
    assert counts[expected == 0].sum() == 0
    some = expected > 0
    chi_square = ((counts[some] - expected[some]) ** 2 / expected[some]).sum()
    quantiles = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32}
    assert chi_square < quantiles[int(some.sum()) - 1]


def test_numbers_of_a_row_depend_on_its_seed_and_step_only():
    together = uniforms([5, 2**64 - 1, 5], [0, 9, 1])
    assert together.tolist() == [uniforms([s], [t]).item() for s, t in ((5, 0), (2**64 - 1, 9), (5, 1))]
    assert len(set(together.tolist())) == 3
    assert ((together > 0) & (together < 1)).all()


def test_samples_of_neighbouring_seeds_do_not_share_their_numbers():
    seeds = {row_seed(seed, sample) for seed in range(-50, 50) for sample in range(50)}
    assert len(seeds) == 5000
    numbers = uniforms(sorted(seeds), [0] * 5000)
    assert abs(numbers.mean() - 0.5) < 0.02
    assert len(set(numbers.tolist())) == 5000
