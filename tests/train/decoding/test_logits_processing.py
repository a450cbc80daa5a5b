"""What changes the logits before a draw, in PyTorch and compiled, beside transformers' processors and formulas."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import Characters, endless_model, set_likeliest, tiny_model, tiny_tokenizer
from transformers import (
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from gpt2_chinese.decoding.batch_sampler import BatchSampler
from gpt2_chinese.decoding.completion import SamplingParams
from gpt2_chinese.decoding.detokenizer import end_of_sentence
from gpt2_chinese.decoding.engine import Engine
from gpt2_chinese.decoding.sampling import CompiledSampler, top_k_top_p_mask
from gpt2_chinese.decoding.whole_characters import CharacterMasks
from gpt2_chinese.text.vocabulary import SPECIAL_TOKENS
from gpt2_chinese.text.word_tokenizer import BYTE_TOKENS, WordTokenizer

SIZE, END = 60, 1
WAIT = 60


def processed(
    params: SamplingParams, prompt: list[int], made: list[int], logits: torch.Tensor, *, compiled: bool, **more
):
    """The logits of one sequence as a draw has changed them."""
    sampler = BatchSampler(3, CharacterMasks([None] * SIZE, SIZE, [2]), end_id=END, device=torch.device("cpu"))
    sampler.assign(1, params, 5, prompt, length=len(made) + 1, **more)
    compiled_sampler = CompiledSampler(SIZE) if compiled else None
    for token in made:
        sampler.commit(slice(1, 2), np.array([token]))
    rows = logits.clone()[None]
    sampler.sample(slice(1, 2), rows, compiled_sampler)
    return rows[0]


def by_transformers(processor, ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    result = processor(torch.tensor([ids]), logits.clone()[None])[0]
    result[2] = -torch.inf
    return result


tokens = st.lists(st.integers(5, 12), min_size=1, max_size=25)


@given(
    prompt=tokens,
    made=st.lists(st.integers(5, 12), max_size=25),
    size=st.integers(1, 4),
    penalty=st.sampled_from([0.5, 1.0, 1.3]),
    compiled=st.booleans(),
    seed=st.integers(0, 100),
)
@settings(max_examples=80)
def test_each_setting_equals_transformers(prompt, made, size, penalty, compiled, seed):
    logits = torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))
    ids = prompt + made
    words = [[5], [6, 7], [8, 8, 9]]
    cases = [
        ({"no_repeat_ngram_size": size}, {}, NoRepeatNGramLogitsProcessor(size)),
        ({"repetition_penalty": penalty}, {}, RepetitionPenaltyLogitsProcessor(penalty)),
        ({"bad_words": ("x",)}, {"bad_words": tuple(map(tuple, words))}, NoBadWordsLogitsProcessor(words)),
        ({"logit_bias": ((7, 2.5), (40, -3.0))}, {}, SequenceBiasLogitsProcessor([[[7], 2.5], [[40], -3.0]])),
    ]
    for fields, more, processor in cases:
        result = processed(SamplingParams(**fields), prompt, made, logits, compiled=compiled, **more)
        expected = by_transformers(processor, ids, logits)
        assert torch.allclose(result, expected, atol=1e-6), fields


@given(
    prompt=tokens,
    made=st.lists(st.integers(5, 12), max_size=25),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
    compiled=st.booleans(),
)
@settings(max_examples=60)
def test_presence_and_frequency_are_openais_formula_over_the_completion(prompt, made, presence, frequency, compiled):
    logits = torch.randn(SIZE, generator=torch.Generator().manual_seed(1))
    params = SamplingParams(presence_penalty=presence, frequency_penalty=frequency)
    result = processed(params, prompt, made, logits, compiled=compiled)
    counts = torch.from_numpy(np.bincount(made, minlength=SIZE).astype(np.float32)) if made else torch.zeros(SIZE)
    expected = logits - counts * frequency - (counts > 0) * presence
    expected[2] = -torch.inf
    assert torch.allclose(result, expected, atol=1e-4)


@pytest.mark.parametrize("compiled", [False, True])
def test_all_settings_together_follow_the_order_of_vllm(compiled):
    """Bias, repetition, frequency and presence, then what is banned."""
    logits = torch.randn(SIZE, generator=torch.Generator().manual_seed(4))
    prompt, made = [5, 6, 7, 8], [6, 7, 9, 6]
    params = SamplingParams(
        repetition_penalty=1.5,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        no_repeat_ngram_size=2,
        logit_bias=((9, 4.0),),
        min_tokens=9,
        stop_token_ids=(30,),
    )
    result = processed(params, prompt, made, logits, compiled=compiled)
    expected = logits.clone()
    expected[9] += 4
    seen = torch.tensor([5, 6, 7, 8, 9])
    expected[seen] = torch.where(expected[seen] > 0, expected[seen] / 1.5, expected[seen] * 1.5)
    for token, count in ((6, 2), (7, 1), (9, 1)):
        expected[token] -= 0.25 * count + 0.5
    expected[[2, 7, END, 30]] = -torch.inf  # 7 has followed 6
    assert torch.allclose(result, expected, atol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_document_s_end_and_stop_tokens_wait_for_min_tokens(compiled):
    logits = torch.zeros(SIZE)

    def banned(made: int, **fields) -> list[bool]:
        params = SamplingParams(stop_token_ids=(30,), **fields)
        row = processed(params, [5], [6] * made, logits, compiled=compiled)
        return [bool(row[id_] == -torch.inf) for id_ in (END, 30)]

    assert [banned(made, min_tokens=2) for made in range(4)] == [[True] * 2, [True] * 2, [False] * 2, [False] * 2]
    assert banned(3, ignore_eos=True) == [True, False]
    assert banned(1, ignore_eos=True, min_tokens=2) == [True, True]


@given(seed=st.integers(0, 500), min_p=st.floats(0.001, 1), top_k=st.integers(1, 20))
@settings(max_examples=60)
def test_min_p_keeps_what_transformers_keeps(seed, min_p, top_k):
    logits = 3 * torch.randn(1, 40, generator=torch.Generator().manual_seed(seed))
    best, ids = logits.sort(dim=-1, descending=True)
    keep, _ = top_k_top_p_mask(best - best[:, :1], torch.tensor([top_k]), torch.zeros(1), torch.tensor([min_p]))
    expected = MinPLogitsWarper(min_p)(None, logits)[0].isfinite()
    expected &= torch.zeros(40, dtype=torch.bool).scatter(0, ids[0, :top_k], True)
    assert set(ids[0, keep[0]].tolist()) == set(expected.nonzero().flatten().tolist())


# In the engine.


@pytest.mark.parametrize("precision", [None, "fp32"])
def test_a_bad_word_is_never_in_a_text_however_it_is_spelled(precision):
    words = ["一", "丁", "一丁", "##ab", "a", "##b", "ab"]
    tokenizer = WordTokenizer([*SPECIAL_TOKENS, *BYTE_TOKENS, *words], segmenter=Characters())
    model = tiny_model(vocab_size=len(tokenizer))
    source = random.Random(0)
    with torch.no_grad():
        model.transformer.wte.weight[261:] *= 1.6  # the words come often
        for byte in "一ab".encode():
            model.transformer.wte.weight[tokenizer.vocabulary.index(BYTE_TOKENS[byte])] *= 1.5
    with Engine(model, tokenizer, max_num_seqs=32, precision=precision) as engine:
        found = 0
        for seed in range(6):
            for bad in (("一丁",), ("ab", "丁一")):
                fields = {"samples": 16, "length": 12, "seed": seed}
                prompt = engine.prompt(source.choice(["一", "a", "丁"]), 12)
                for banned in ((), bad):
                    params = SamplingParams(top_k=40, bad_words=banned)
                    request = engine.submit(prompt, sampling_params=params, **fields)
                    texts = [one.text.removeprefix(prompt.context) for one in request.future.result(WAIT)]
                    hits = sum(any(word in text for word in bad) for text in texts)
                    found += hits if not banned else 0
                    assert not banned or not hits
        assert found > 5


def test_where_nothing_is_left_the_text_ends():
    tokenizer = tiny_tokenizer(words=["一"])
    model = tiny_model(vocab_size=len(tokenizer))
    for precision in (None, "fp32"):
        with Engine(model, tokenizer, precision=precision) as engine:
            params = SamplingParams(bad_words=("一", "\n"), ignore_eos=True)
            request = engine.submit(engine.prompt("一", 5), samples=2, length=5, sampling_params=params)
            for completion in request.future.result(WAIT):
                assert completion.text == "一" and completion.finish_reason == "stop"


def test_stop_tokens_end_a_text_and_are_not_part_of_it():
    model = endless_model()
    set_likeliest(model, 20, 21)
    with Engine(model, tiny_tokenizer()) as engine:
        prompt = engine.prompt("一", 8)
        greedy = {"samples": 1, "length": 8}
        plain = engine.submit(prompt, sampling_params=SamplingParams(temperature=0), **greedy).future.result(WAIT)[0]
        stop = plain.ids[-1]
        params = SamplingParams(temperature=0, stop_token_ids=(stop,), min_tokens=3)
        stopped = engine.submit(prompt, sampling_params=params, **greedy).future.result(WAIT)[0]
        assert stop not in stopped.ids[3:] and len(stopped.ids) >= 3
        with pytest.raises(ValueError, match="not in the vocabulary"):
            engine.submit(prompt, sampling_params=SamplingParams(logit_bias=((10_000, 1.0),)), **greedy)


@pytest.mark.parametrize("precision", [None, "fp32"])
def test_scores_are_the_mean_log_probabilities_of_the_model(precision):
    model = tiny_model()
    with Engine(model, tiny_tokenizer(), precision=precision) as engine:
        prompt = engine.prompt("一丁", 12)
        params = SamplingParams(temperature=0.8, frequency_penalty=1.0, logit_bias=((30, 2.0),))
        request = engine.submit(prompt, samples=4, length=12, sampling_params=params, seed=1, scores=True)
        for completion in request.future.result(WAIT):
            ids = [*completion.ids, *([END] if completion.finish_reason == "stop" else [])]
            with torch.inference_mode():
                logits = model(torch.tensor([[*prompt.ids, *ids]])).logits[0].double()
            scores = torch.log_softmax(logits, -1)[len(prompt.ids) - 1 : -1]
            expected = scores[torch.arange(len(ids)), torch.tensor(ids)].mean()
            assert completion.score == pytest.approx(float(expected), abs=2e-3)


@pytest.mark.parametrize(
    ("text", "context", "expected"),
    [
        ("好的。谢谢", "", "好的。"),
        ("真的？！然后", "", "真的？！"),
        ("他说：“好。”然后", "", "他说：“好。”"),
        ("好。”她说", "他说：“", "好。”"),
        ("好。还有。”她说", "“", "好。还有。”"),
        ("38.5度", "", None),
        ("it is. And", "", "it is."),
        ("第一行\n第二行", "", "第一行"),
        ("\n第二行", "", None),
        ("没有结束", "", None),
        ("（好。）再来", "", "（好。）"),
    ],
)
def test_a_sentence_ends_with_its_marks_and_quotes(text, context, expected):
    end = end_of_sentence(text, 0, context)
    assert (None if end is None else text[:end]) == expected


def test_until_sentence_ends_a_completion_and_streams_the_same():
    tokenizer = tiny_tokenizer()
    model = endless_model()
    with torch.no_grad():
        model.transformer.wte.weight[tokenizer.vocabulary.index("。")] *= 1.5
    with Engine(model, tokenizer, max_num_seqs=16) as engine:
        streamed: dict[int, str] = {}
        request = engine.submit(
            engine.prompt("一", 30),
            samples=16,
            length=30,
            seed=1,
            until_sentence=True,
            on_delta=lambda delta: streamed.update({delta.sample: streamed.get(delta.sample, "") + delta.text}),
        )
        completions = request.future.result(WAIT)
    ended = [one for one in completions if "。" in one.text]
    assert len(ended) > 3
    assert all(one.text.index("。") == len(one.text) - 1 and one.finish_reason == "stop" for one in ended)
    assert all(len(one.ids) == 30 for one in completions if one.finish_reason == "length")
    assert ["一" + streamed[sample] for sample in range(16)] == [one.text for one in completions]


@given(seed=st.integers(0, 1000), top_k=st.sampled_from([0, 1, 5, 30]), top_p=st.sampled_from([0.0, 0.8]))
@settings(max_examples=30, deadline=None)
def test_slots_draw_the_same_tokens_and_scores_with_and_without_the_compiled_code(seed, top_k, top_p):
    """From the second slot on, with tokens committed before, one row with a bias and one at temperature 0."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(4, 3, SIZE, generator=generator) * 3
    params = [
        SamplingParams(top_k=top_k, top_p=top_p),
        SamplingParams(logit_bias=((7, 2.5),)),
        SamplingParams(temperature=0),
    ]
    drawn = []
    for compiled in (None, CompiledSampler(SIZE)):
        sampler = BatchSampler(4, CharacterMasks([None] * SIZE, SIZE, [2]), end_id=END, device=torch.device("cpu"))
        for slot, one in enumerate(params, 1):
            sampler.assign(slot, one, seed + slot, [5, 6], length=9, scores=slot != 3)
        for logits in steps:
            rows = logits.clone()
            tokens = sampler.sample(slice(1, 4), rows, compiled)
            expected = torch.log_softmax(logits, dim=-1)
            scores = sampler.logprobs(slice(1, 4), rows, tokens)
            assert [row for row, _ in scores] == [0, 1]
            for row, score in scores:
                assert score == pytest.approx(float(expected[row, tokens[row]]), abs=1e-5)
            sampler.commit(slice(1, 4), tokens.numpy())
            drawn.append(tokens.tolist())
    assert drawn[:4] == drawn[4:]
