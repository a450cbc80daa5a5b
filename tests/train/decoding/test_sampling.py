"""sampling.py beside the reference's filter, transformers' processors and the distributions themselves."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper

from gpt2_chinese.decoding import sampling
from gpt2_chinese.decoding.logits_processing import apply_repetition_penalty
from gpt2_chinese.decoding.sampling import (
    CompiledSampler,
    apply_temperature,
    apply_top_k_top_p,
    sample_tokens,
    sequence_seed,
    splitmix64,
    uniform_random,
)

torch.set_num_threads(1)


def kept(row: torch.Tensor) -> list[int]:
    return row.isfinite().nonzero().flatten().tolist()


def sample_with(logits, uniform, *, temperature=1.0, top_k=0, top_p=0.0) -> list[int]:
    """`sample_tokens` with the same parameters for every sequence."""
    batch = len(logits)
    return sample_tokens(
        logits,
        torch.as_tensor(uniform, dtype=torch.float64),
        torch.full((batch,), float(temperature)),
        torch.full((batch,), top_k),
        torch.full((batch,), float(top_p)),
    ).tolist()


def test_the_filter_keeps_exactly_what_the_reference_keeps(reference):
    cases = json.loads((reference / "sampling_filter.json").read_text(encoding="utf-8"))
    assert len(cases) == 40
    for case in cases:
        result = apply_top_k_top_p(
            torch.tensor([case["logits"]]), torch.tensor([case["top_k"]]), torch.tensor([case["top_p"]])
        )
        assert kept(result[0]) == case["kept"], case


def test_the_filter_is_the_reference_s_for_a_batch_with_parameters_of_each_sequence(reference):
    cases = json.loads((reference / "sampling_filter.json").read_text(encoding="utf-8"))
    for size in {len(case["logits"]) for case in cases}:
        group = [case for case in cases if len(case["logits"]) == size]
        result = apply_top_k_top_p(
            torch.tensor([case["logits"] for case in group]),
            torch.tensor([case["top_k"] for case in group]),
            torch.tensor([case["top_p"] for case in group]),
        )
        assert [kept(row) for row in result] == [case["kept"] for case in group]


def test_exactly_the_tokens_that_the_reference_keeps_are_sampled(reference):
    cases = json.loads((reference / "sampling_filter.json").read_text(encoding="utf-8"))
    grid = (np.arange(20_000) + 0.5) / 20_000
    for case in cases:
        logits = torch.tensor([case["logits"]]).expand(len(grid), -1)
        sampled = set(sample_with(logits, grid, top_k=case["top_k"], top_p=case["top_p"]))
        assert sampled <= set(case["kept"]), case
        probability = torch.softmax(
            apply_top_k_top_p(logits[:1], *map(torch.tensor, ([case["top_k"]], [case["top_p"]]))), -1
        )
        assert sampled >= set((probability[0] > 1e-4).nonzero().flatten().tolist()), case


def test_top_k_equals_transformers_even_with_ties():
    logits = torch.randint(-3, 4, (50, 40), generator=torch.Generator().manual_seed(0)).float()
    for top_k in (1, 2, 7, 39, 40):
        expected = TopKLogitsWarper(top_k)(None, logits)
        off = torch.zeros(50)
        assert torch.equal(apply_top_k_top_p(logits, torch.full((50,), top_k), off), expected)


def test_top_p_keeps_the_token_after_exactly_p():
    """The reference removes what is above p, not what is equal to it; halves are exact, so nothing is rounded here."""
    logits = torch.tensor([[0.0, 0.0, -1.0, -1.0]])
    assert kept(apply_top_k_top_p(logits, torch.tensor([2]), torch.tensor([0.5]))[0]) == [0, 1]
    assert kept(apply_top_k_top_p(logits, torch.tensor([2]), torch.tensor([0.49]))[0]) == [0]


def test_the_repetition_penalty_equals_transformers():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 30, generator=generator)
    ids = torch.randint(0, 30, (4, 10), generator=generator)
    seen = torch.zeros(4, 30, dtype=torch.bool).scatter(1, ids, True)
    for penalty in (1.0, 1.3, 0.7):
        expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
        assert torch.equal(apply_repetition_penalty(logits, seen, torch.full((4,), penalty)), expected)


def test_the_temperature_equals_transformers_up_to_the_shift():
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    expected = TemperatureLogitsWarper(0.7)(None, logits)
    assert torch.allclose(
        torch.softmax(apply_temperature(logits, torch.full((3,), 0.7)), -1), torch.softmax(expected, -1), atol=1e-6
    )


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-4])
def test_a_tiny_temperature_is_greedy_and_makes_no_nan(temperature):
    logits = torch.tensor([[1.0, 3.0, 2.0, -torch.inf]])
    for top_k, top_p in ((0, 0.0), (2, 0.0), (0, 0.5)):
        assert sample_with(logits, [0.999], temperature=temperature, top_k=top_k, top_p=top_p) == [1]


def test_temperature_0_is_greedy_whatever_the_random_number():
    logits = torch.randn(64, 30, generator=torch.Generator().manual_seed(1))
    numbers = torch.rand(64, generator=torch.Generator().manual_seed(2))
    assert sample_with(logits, numbers, temperature=0) == logits.argmax(-1).tolist()


def test_a_suppressed_token_is_not_sampled_at_the_ends_of_the_interval():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    for number in (0.5 / 2**48, 1 - 0.5 / 2**48):
        for top_k in (0, 3, 4):
            assert sample_with(logits, [number], top_k=top_k)[0] in (1, 2)


def test_more_ties_than_candidates_are_all_kept():
    """The candidates are only a part of 300 equal logits; the reference keeps all of them."""
    logits = torch.zeros(1, 300)
    logits[0, 200] = 1.0
    grid = (np.arange(3000) + 0.5) / 3000
    sampled = set(sample_with(logits.expand(3000, -1), grid, top_k=5))
    assert sampled == set(range(300))


@given(
    rows=st.integers(1, 5),
    size=st.integers(1, 300),
    levels=st.integers(1, 40),
    top_k=st.lists(st.integers(0, 310), min_size=5, max_size=5),
    top_p=st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), min_size=5, max_size=5),
    temperature=st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=5, max_size=5),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150)
def test_a_sequence_gets_the_same_token_alone_and_in_any_batch(rows, size, levels, top_k, top_p, temperature, seed):
    """Few levels make many ties, on whose order the sorted candidates and the fully sorted logits must agree."""
    logits = torch.randint(0, levels, (rows, size), generator=torch.Generator().manual_seed(seed)).float() / 4
    numbers = uniform_random([sequence_seed(seed, row) for row in range(rows)], [3] * rows)
    parameters = torch.tensor(temperature[:rows]), torch.tensor(top_k[:rows]), torch.tensor(top_p[:rows])
    together = sample_tokens(logits, numbers, *parameters).tolist()
    alone = [
        sample_tokens(
            logits[row : row + 1], numbers[row : row + 1], *(part[row : row + 1] for part in parameters)
        ).item()
        for row in range(rows)
    ]
    assert together == alone
    assert sample_tokens(logits, numbers, *parameters, compiled=CompiledSampler(size)).tolist() == together
    allowed = apply_top_k_top_p(apply_temperature(logits, parameters[0]), *parameters[1:])
    for row, token in enumerate(together):
        assert parameters[0][row] == 0 or allowed[row, token].isfinite()


def test_sorting_only_the_candidates_gives_the_tokens_of_sorting_all(monkeypatch):
    logits = torch.randn(40, 1000, generator=torch.Generator().manual_seed(0))
    numbers = uniform_random(range(40), [0] * 40)
    partial = sample_with(logits, numbers, top_k=30, top_p=0.9)
    monkeypatch.setattr(sampling, "MAX_PARTIAL_TOP_K", 0)
    assert sample_with(logits, numbers, top_k=30, top_p=0.9) == partial


@pytest.mark.parametrize("vocab_size", [7, 16, 300, 5003, 50_005])
def test_the_compiled_sampler_gives_the_tokens_of_pytorch(vocab_size):
    generator = torch.Generator().manual_seed(vocab_size)
    compiled = CompiledSampler(vocab_size)
    for spread, dtype in ((1.0, torch.float32), (8.0, torch.float32), (3.0, torch.bfloat16)):  # bf16: many ties
        logits = (spread * torch.randn(200, vocab_size, generator=generator)).to(dtype).float()
        logits[:, :5] = -torch.inf
        parameters = (
            torch.tensor([0.0, 1.0, 0.7, 1.0, 2.5]).repeat(40),
            torch.randint(0, min(150, 2 * vocab_size), (200,), generator=generator),
            torch.tensor([0.0, 0.9, 1.0, 0.3]).repeat(50),
        )
        numbers = uniform_random(range(200), [1] * 200)
        tokens = compiled(logits, numbers, *parameters)
        temperature, top_k, _ = parameters
        is_compiled = (temperature == 0) | ((top_k > 0) & (top_k < min(sampling.MAX_PARTIAL_TOP_K, vocab_size)))
        assert torch.equal(tokens >= 0, is_compiled)
        expected = sample_tokens(logits, numbers, *parameters)
        assert torch.equal(tokens[is_compiled], expected[is_compiled])
        assert torch.equal(sample_tokens(logits, numbers, *parameters, compiled=compiled), expected)


def test_the_compiled_sampler_leaves_to_pytorch_what_it_has_no_room_for():
    logits = torch.zeros(3, 1000)
    logits[1, 500] = torch.inf
    logits[2, :996] = -torch.inf  # fewer candidates than top_k
    numbers = torch.full((3,), 0.5, dtype=torch.float64)
    parameters = torch.ones(3), torch.full((3,), 5), torch.zeros(3)
    assert CompiledSampler(1000)(logits, numbers, *parameters).tolist() == [-1, -1, 998]
    assert sample_tokens(logits, numbers, *parameters, compiled=CompiledSampler(1000)).tolist()[::2] == [500, 998]


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.0), (5, 0.0), (0, 0.8), (6, 0.9)])
def test_samples_follow_the_distribution(top_k, top_p):
    """A chi-square test of 40,000 tokens, with the numbers of 40 seeds, at the 0.999 quantiles."""
    logits = torch.tensor([[1.0, 0.0, 2.0, -1.0, 0.5, 1.5, -2.0, 0.2]])
    seeds = [sequence_seed(11, sample) for sample in range(40) for _ in range(1000)]
    numbers = uniform_random(seeds, [step for _ in range(40) for step in range(1000)])
    counts = np.bincount(
        sample_with(logits.expand(len(seeds), -1), numbers, temperature=1.2, top_k=top_k, top_p=top_p), minlength=8
    )
    allowed = apply_top_k_top_p(logits / 1.2, torch.tensor([top_k]), torch.tensor([top_p]))
    expected = torch.softmax(allowed, -1)[0].numpy() * len(seeds)
    assert counts[expected == 0].sum() == 0
    some = expected > 0
    chi_square = ((counts[some] - expected[some]) ** 2 / expected[some]).sum()
    quantiles = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32}
    assert chi_square < quantiles[int(some.sum()) - 1]


def test_the_random_numbers_of_a_sequence_depend_on_its_seed_and_index_only():
    together = uniform_random([5, 2**64 - 1, 5], [0, 9, 1])
    assert together.tolist() == [uniform_random([s], [t]).item() for s, t in ((5, 0), (2**64 - 1, 9), (5, 1))]
    assert len(set(together.tolist())) == 3
    assert ((together > 0) & (together < 1)).all()


def test_samples_of_consecutive_seeds_have_different_random_numbers():
    seeds = {sequence_seed(seed, sample) for seed in range(-50, 50) for sample in range(50)}
    assert len(seeds) == 5000
    numbers = uniform_random(sorted(seeds), [0] * 5000)
    assert abs(numbers.mean() - 0.5) < 0.02
    assert len(set(numbers.tolist())) == 5000


def test_splitmix64_gives_the_published_outputs():
    """The widely published test vector: the first five outputs for the seed 1234567."""
    outputs = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert splitmix64([1234567] * 5, range(1, 6)).tolist() == outputs
