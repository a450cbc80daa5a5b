"""Different samples of one request: never the same text twice, the model's distribution for each, and the same seed."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_graph import RecordedGraph
from tiny_model import endless_model, tiny_model, tiny_tokenizer

from gpt2_chinese.decoding.batch_sampler import BatchSampler
from gpt2_chinese.decoding.completion import SamplingParams, TextDelta
from gpt2_chinese.decoding.detokenizer import end_of_sentence
from gpt2_chinese.decoding.distinct import STUCK, UNIT, Codes, choose, divide, first_code
from gpt2_chinese.decoding.engine import Engine
from gpt2_chinese.decoding.graph_decoder import GraphDecoder
from gpt2_chinese.decoding.request_words import VocabularyWords, _TokenTexts
from gpt2_chinese.decoding.sampling import CompiledSampler, request_bits, sample_tokens, sequence_seed
from gpt2_chinese.decoding.whole_characters import CharacterMasks

WAIT = 60
COLD = SamplingParams(temperature=0.05)


@pytest.fixture(scope="module", params=["eager", "compiled", "graph"])
def engine(request):
    precision = "fp32" if request.param == "compiled" else None
    engine = Engine(tiny_model(), tiny_tokenizer(), max_num_seqs=8, precision=precision)
    if request.param == "graph":
        engine.decoder = GraphDecoder(tiny_model(), max_num_seqs=8)
        engine.decoder.capture = RecordedGraph
    with engine:
        yield engine


def texts_of(engine: Engine, context: str = "丁一", **fields) -> list[str]:
    fields = {"samples": 5, "length": 12, "sampling_params": COLD, "seed": 1, "distinct": True} | fields
    request = engine.submit(engine.prompt(context, fields["length"]), **fields)
    return [completion.text for completion in request.future.result(WAIT)]


@given(
    weights=st.lists(st.floats(1e-9, 1), min_size=1, max_size=40),
    samples=st.integers(2, 12),
    ends=st.integers(0, 2**40 - 1),
    remaining=st.integers(1, 60),
    bits=st.integers(0, 2**64 - 1).filter(lambda bits: bits % UNIT < UNIT - 1000),  # beyond: the rounding of bounds
)
@settings(max_examples=100)
def test_no_end_of_a_text_gets_two_codes_and_a_code_finds_its_interval(weights, samples, ends, remaining, bits):
    probabilities = np.array(weights)
    is_end = np.array([bool(ends >> index & 1) or remaining == 1 for index in range(len(weights))])
    found: list[int] = []
    for sample in range(samples):
        code = first_code(bits, sample, samples)
        index, inner, mass = choose(probabilities, is_end, code, samples * UNIT, np.zeros(2), remaining)
        if index == STUCK:
            continue
        assert 0 <= inner < mass <= samples * UNIT
        assert mass <= UNIT + 64 or not is_end[index]
        found.append(index)
    assert all(found.count(index) <= 1 for index in set(found) if is_end[index])
    # A code finds nothing only where there are fewer ends than codes and nothing else.
    assert len(found) == samples or (is_end.all() and len(found) == len(weights))


@given(
    masses=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    spread=st.floats(0.1, 8),
    remaining=st.integers(1, 40),
    seed=st.integers(0, 1000),
    min_p=st.sampled_from([0.0, 0.1]),
)
@settings(max_examples=60)
def test_the_compiled_choice_is_that_of_numpy(masses, spread, remaining, seed, min_p):
    generator, batch, size = np.random.default_rng(seed), len(masses), 60
    logits = torch.from_numpy((spread * generator.normal(size=(batch, size))).astype(np.float32))
    table = (generator.random(size) < 0.2).astype(np.int8)
    mass = np.array(masses) * UNIT + (np.array(masses) == 6)

    def codes() -> Codes:
        return Codes(
            code=(np.random.default_rng(seed).random(batch) * mass).astype(np.int64),
            mass=mass,
            remaining=np.full(batch, remaining),
            ends=np.full(batch, table.ctypes.data),
            end_tables=[table] * batch,
            doubt=np.tile([0.05, 3.0], (batch, 1)),
            next_code=np.zeros(batch, np.int64),
            next_mass=np.zeros(batch, np.int64),
        )

    parameters = (
        torch.from_numpy(generator.random(batch)),
        torch.ones(batch),
        torch.full((batch,), 20),
        torch.full((batch,), 0.9),
        torch.full((batch,), min_p),
    )
    one, other = codes(), codes()
    expected = sample_tokens(logits, *parameters, codes=one)
    assert torch.equal(sample_tokens(logits, *parameters, codes=other, compiled=CompiledSampler(size)), expected)
    has_code = (mass > UNIT) & (expected.numpy() != STUCK)
    for name in ("next_code", "next_mass"):
        difference = getattr(one, name)[has_code] - getattr(other, name)[has_code]
        assert (np.abs(difference) <= 64).all(), "they differ by more than the rounding of the sums"
    assert np.allclose(one.doubt[has_code], other.doubt[has_code])


def two_token_requests(requests: int, samples: int, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Texts of two tokens, as numbers [requests, samples], with logits [V] and then [V, V] by the first token."""
    size = len(first)
    slots = requests * samples
    sampler = BatchSampler(slots, CharacterMasks([None] * size, size), end_id=0, device=torch.device("cpu"))
    table = np.zeros(size, dtype=np.int8)
    for slot in range(slots):
        seed, sample = divmod(slot, samples)
        sampler.assign(
            slot,
            SamplingParams(top_k=size - 1),
            sequence_seed(seed, sample),
            [0],
            length=2,
            code=(first_code(request_bits(seed), sample, samples), samples * UNIT),
            end_table=table,
        )
    everything = slice(0, slots)
    compiled = CompiledSampler(size)
    begun = sampler.sample(everything, torch.from_numpy(np.tile(first, (slots, 1))), compiled).numpy()
    sampler.commit(everything, begun)
    ended = sampler.sample(everything, torch.from_numpy(second[begun]), compiled).numpy()
    return np.where(ended == STUCK, STUCK, begun * size + ended).reshape(requests, samples)


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64))
    weights[logits == logits.min(axis=-1, keepdims=True)] = 0  # top-k is one less than the vocabulary
    return weights / weights.sum(axis=-1, keepdims=True)


def test_each_sample_has_the_distribution_of_the_model_where_no_text_would_come_twice():
    """A chi-square test for each of three samples of 3,000 requests, at the 0.9999 quantile."""
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=9).astype(np.float32), generator.normal(size=(9, 9)).astype(np.float32)
    probabilities = (softmax(first)[:, None] * softmax(second)).ravel()
    assert probabilities.max() < 1 / 3
    texts = two_token_requests(3000, 3, first, second)
    assert all(len(set(row)) == 3 for row in texts.tolist()) and (texts >= 0).all()
    for sample in range(3):
        counts = np.bincount(texts[:, sample], minlength=81)
        expected = 3000 * probabilities
        assert counts[expected == 0].sum() == 0
        often = expected >= 5
        rest = expected[~often].sum()
        chi_square = ((counts[often] - expected[often]) ** 2 / expected[often]).sum()
        if rest:
            chi_square += (counts[~often].sum() - rest) ** 2 / rest
        degrees = int(often.sum())
        assert chi_square < degrees + 3.8 * (2 * degrees) ** 0.5 + 10


def test_a_text_that_would_come_twice_always_comes_once_and_the_others_in_proportion():
    first = np.array([-9, 3.5, -9.5, -10], dtype=np.float32)  # always 1
    second = np.tile(np.array([3.0, 1.0, 0.5, 0.0, -0.5, -1.0, -9.0], np.float32)[:4], (4, 1))
    second[1] = [3.0, 1.0, 0.4, -9.0]
    texts = two_token_requests(2000, 2, first, second)
    assert all(len(set(row)) == 2 for row in texts.tolist())
    likeliest = (texts == 4).any(axis=1)
    assert likeliest.mean() > 0.99, "its probability is 0.82, so it would come 1.6 times"
    others = np.bincount(texts[texts > 4] - 4, minlength=3)[1:3]
    assert others[0] / others[1] == pytest.approx(np.exp(0.6), rel=0.15)


def test_lengths_are_in_proportion_to_the_probabilities_unless_they_exceed_a_unit():
    probabilities = np.array([0.7, 0.2, 0.1])
    free = divide(probabilities, np.zeros(3, bool), 3 * UNIT, 0.9)
    assert np.allclose(free, probabilities * 3 * UNIT)
    limited = divide(probabilities, np.array([True, False, False]), 3 * UNIT, 0.9)
    assert np.allclose(limited / UNIT, [1, 4 / 3, 2 / 3]) and limited.sum() == pytest.approx(3 * UNIT)
    assert divide(probabilities, np.ones(3, bool), 5 * UNIT, 0.9).sum() < 3 * UNIT


# In the engine.


def test_samples_of_a_request_are_different_texts(engine):
    duplicates = 0
    for seed in range(3):
        for context in ("丁一", "一", "世界"):
            texts = texts_of(engine, context, seed=seed)
            assert len(set(texts)) == 5
            plain = texts_of(engine, context, seed=seed, distinct=False)
            duplicates += len(set(plain)) < 5
    assert duplicates > 1, "the test should have what it is about"


def test_a_seed_gives_the_same_texts_alone_streamed_and_in_any_batch(engine):
    cases = [(f"{chr(0x4E00 + number)}一", number) for number in range(6)]
    alone = [texts_of(engine, context, seed=seed) for context, seed in cases]
    deltas: list[list[TextDelta]] = [[] for _ in cases]
    requests = [
        engine.submit(
            engine.prompt(context, 12),
            samples=5,
            length=12,
            sampling_params=COLD,
            seed=seed,
            distinct=True,
            on_delta=received.append,
        )
        for (context, seed), received in zip(cases, deltas, strict=True)
    ]
    for request, texts, received, (context, _) in zip(requests, alone, deltas, cases, strict=True):
        assert [completion.text for completion in request.future.result(WAIT)] == texts
        streamed = [context + "".join(one.text for one in received if one.sample == sample) for sample in range(5)]
        assert streamed == texts
        assert sum(one.finish_reason is not None for one in received) == 5


def test_more_samples_than_slots_are_different_too(engine):
    texts = texts_of(engine, samples=30, seed=3)
    assert len(texts) == len(set(texts)) == 30


def test_one_sample_has_the_text_that_its_seed_always_gave(engine):
    for seed in range(4):
        assert texts_of(engine, samples=1, seed=seed) == texts_of(engine, samples=1, seed=seed, distinct=False)


@pytest.mark.parametrize(
    ("params", "length", "stop", "expected"),
    [
        (SamplingParams(temperature=0), 12, (), 1),
        (SamplingParams(top_k=1), 12, (), 1),
        (SamplingParams(top_k=2), 1, (), 2),
        (SamplingParams(top_p=1e-6, top_k=0), 12, (), 1),
        (SamplingParams(top_k=2), 3, tuple(chr(0x4E00 + number) for number in range(190)), 2),
    ],
)
def test_where_the_model_has_fewer_texts_fewer_come(engine, params, length, stop, expected):
    reasons: list[str | None] = []
    request = engine.submit(
        engine.prompt("丁一", length),
        samples=6,
        length=length,
        sampling_params=params,
        seed=2,
        stop=stop,
        distinct=True,
        on_delta=lambda delta: reasons.append(delta.finish_reason),
    )
    completions = request.future.result(WAIT)
    texts = [completion.text for completion in completions]
    assert len(set(texts)) == len(texts) <= expected and texts
    assert len(texts) + reasons.count("missing") == request.samples


def test_as_many_texts_come_as_narrow_filters_leave(engine):
    """Most steps have one candidate, so that samples meet at ends that are taken; they begin again."""
    params = SamplingParams(temperature=0.12, top_p=0.7)
    few = 0
    for number in range(8):
        context = chr(0x4E00 + number)
        plain = texts_of(engine, context, samples=60, length=6, sampling_params=params, distinct=False)
        texts = texts_of(engine, context, samples=6, length=6, sampling_params=params)
        assert min(6, len(set(plain))) <= len(texts) == len(set(texts))
        few += len(texts) < 6
    assert few


@pytest.mark.parametrize("precision", [None, "fp32"])
def test_texts_that_different_tokens_spell_alike_come_once(precision):
    words = ["一", "一一", "一一一", "##一", "二", "二一"]
    tokenizer = tiny_tokenizer(words=words)
    model = tiny_model(vocab_size=len(tokenizer))
    with Engine(model, tokenizer, max_num_seqs=16, precision=precision) as engine:
        duplicates = 0
        for seed in range(9):
            for stop in ((), ("一一",)):
                fields = {"samples": 8, "length": 3, "seed": seed, "stop": stop, "sampling_params": SamplingParams()}
                texts = texts_of(engine, "二", **fields)
                assert len(set(texts)) == len(texts)
                plain = texts_of(engine, "二", **fields, distinct=False)
                duplicates += len(set(plain)) < len(plain)
    assert duplicates > 9


def test_samples_that_end_with_a_sentence_differ():
    tokenizer = tiny_tokenizer()
    with Engine(endless_model(), tokenizer, max_num_seqs=8) as engine:
        for seed in range(5):
            texts = texts_of(engine, seed=seed, until_sentence=True, length=30, samples=8)
            assert len(set(texts)) == 8


@given(
    stop=st.lists(st.text("ab。！”\n.", min_size=1, max_size=2), max_size=3),
    until_sentence=st.booleans(),
    more=st.lists(st.text("ab。！”“\n. ", max_size=4), max_size=20),
)
@settings(max_examples=200, deadline=None)
def test_the_tokens_that_end_a_text_are_those_whose_texts_do(stop, until_sentence, more):
    tokenizer = tiny_tokenizer()
    words = VocabularyWords(tokenizer, len(tokenizer) + 3)
    texts = [*tokenizer.vocabulary, *more]
    words._texts = _TokenTexts(texts)
    words._vocab_size = len(texts)
    expected = [
        int(any(one in text for one in stop) or (until_sentence and end_of_sentence(f"一{text}", 1) is not None))
        for text in texts
    ]
    expected[tokenizer.marks.end] = 1
    assert words.end_table(tuple(stop), until_sentence, ()).tolist() == expected


def test_a_new_stop_string_costs_little_in_a_large_vocabulary():
    """The decoding thread looks for it while everyone waits; a loop over 200,000 tokens took a second for each."""
    texts = _TokenTexts([f"第{number}个词" for number in range(200_000)])
    begin = time.perf_counter()
    for number in range(50):
        assert texts.with_string(f"第{number}77个") == ([number * 100 + 77] if number else [])
    assert texts.with_sentence_end == []
    assert time.perf_counter() - begin < 20
