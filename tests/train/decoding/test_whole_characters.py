"""A text has whole characters only: the automaton beside Python's decoder, and draws beside an oracle."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from recorded_graph import RecordedGraph
from tiny_model import Characters, tiny_model
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from gpt2_chinese.decoding.batch_sampler import BatchSampler
from gpt2_chinese.decoding.completion import Prompt, SamplingParams
from gpt2_chinese.decoding.engine import Engine
from gpt2_chinese.decoding.graph_decoder import GraphDecoder
from gpt2_chinese.decoding.sampling import CompiledSampler
from gpt2_chinese.decoding.whole_characters import BOUNDARY, BYTE_TABLE, DEAD, CharacterMasks, after_bytes
from gpt2_chinese.text.bpe_tokenizer import BpeTokenizer
from gpt2_chinese.text.tokenizers import bytes_of_tokens
from gpt2_chinese.text.vocabulary import SPECIAL_TOKENS
from gpt2_chinese.text.word_tokenizer import BYTE_TOKENS, WordTokenizer
from gpt2_chinese.training.evaluation import complete

WORDS = [chr(0x4E00 + number) for number in range(20)]
HOT = SamplingParams(temperature=1.5, top_k=0)


def word_tokenizer() -> WordTokenizer:
    return WordTokenizer([*SPECIAL_TOKENS, *BYTE_TOKENS, *WORDS], segmenter=Characters())


def bpe_tokenizer() -> BpeTokenizer:
    """Trained on Chinese, so that many tokens are parts of characters, or end in the middle of one."""
    rust = RustTokenizer(BPE())
    rust.pre_tokenizer = ByteLevel(add_prefix_space=False)
    rust.decoder = ByteLevelDecoder()
    source = random.Random(1)
    lines = ["".join(chr(source.randrange(0x4E00, 0x4F00)) for _ in range(20)) for _ in range(300)]
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=340, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    rust.train_from_iterator(lines, trainer)
    return BpeTokenizer(rust.to_str())


TOKENIZERS = {"word": word_tokenizer, "bpe": bpe_tokenizer}


ENDINGS = [
    bytes(part) for size in range(4) for part in itertools.product((0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF), repeat=size)
]


def may_follow(data: bytes, before: bytes) -> bool:
    """By Python's decoder: whether some more bytes make these a text without U+FFFD."""
    for ending in ENDINGS:
        try:
            return "\ufffd" not in (before + data + ending).decode("utf-8")
        except UnicodeDecodeError:
            continue
    return False


def test_the_automaton_takes_every_character_and_nothing_else():
    characters = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000 and code != 0xFFFD]
    assert all(after_bytes(BOUNDARY, chr(code).encode()) == BOUNDARY for code in characters[::97])
    # As many ways from boundary to boundary as there are characters: so there is no other.
    ways, total = {BOUNDARY: 1}, 0
    for _ in range(4):
        following: dict[int, int] = {}
        for state, count in ways.items():
            for target in BYTE_TABLE[state].tolist():
                if target != DEAD:
                    following[target] = following.get(target, 0) + count
        total += following.pop(BOUNDARY, 0)
        ways = following
    assert total == len(characters) and not ways


def test_the_automaton_refuses_what_pythons_decoder_refuses():
    source = random.Random(0)
    for _ in range(5000):
        data = bytes(source.choice([*range(0x7E, 0x82), *range(0xBE, 0x100)]) for _ in range(source.randint(1, 4)))
        assert (after_bytes(BOUNDARY, data) != DEAD) == may_follow(data, b"")


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("precision", [None, "fp32", "graph"])
def test_no_text_has_a_replacement_character_or_ends_within_one(kind, precision):
    tokenizer = TOKENIZERS[kind]()
    model = tiny_model(vocab_size=len(tokenizer) + 3)
    engine = Engine(model, tokenizer, max_num_seqs=32, precision="fp32" if precision == "fp32" else None)
    if precision == "graph":
        engine.decoder = GraphDecoder(model, max_num_seqs=32)
        engine.decoder.capture = RecordedGraph
    masks = CharacterMasks(bytes_of_tokens(tokenizer), len(tokenizer))
    with engine:
        requests = [
            engine.submit(
                Prompt("", (tokenizer.marks.begin, 200), 0),
                samples=20,
                length=length,
                sampling_params=SamplingParams(temperature=1.5, top_k=top_k),
                seed=length,
            )
            for top_k in (0, 25)
            for length in (1, 2, 3, 4, 30)
        ]
        completions = [completion for request in requests for completion in request.future.result(60)]
    multibyte = 0
    for completion in completions:
        assert "\ufffd" not in completion.text
        start = masks.state_after([tokenizer.marks.begin, 200])
        states = [start]
        for id_ in completion.ids:
            states.append(int(masks.next_state[states[-1], id_]))
        assert DEAD not in states and (states[-1] == BOUNDARY or len(completion.ids) < 3)
        multibyte += len(states) - states.count(BOUNDARY)
    assert multibyte > 100, "the model should draw bytes of longer characters"


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("before", [b"", b"\xe4", b"\xe0", b"\xed", b"\xf0\x90", b"\xef\xbf"])
def test_draws_follow_the_probabilities_of_what_may_follow(compiled, before):
    """A chi-square test of 20,000 draws beside a distribution by NumPy and Python's decoder, at the 0.999 quantile."""
    tokenizer = word_tokenizer()
    size, repeats = len(tokenizer), 20_000
    logits = np.random.default_rng(0).normal(size=size).astype(np.float32)
    masks = CharacterMasks(bytes_of_tokens(tokenizer), size, tokenizer.marks.never_produced)
    sampler = BatchSampler(repeats, masks, end_id=tokenizer.marks.end, device=torch.device("cpu"))
    byte_id = {byte: tokenizer.vocabulary.index(BYTE_TOKENS[byte]) for byte in range(256)}
    ids = [tokenizer.marks.begin, *(byte_id[byte] for byte in before)]
    for slot in range(repeats):
        sampler.assign(slot, SamplingParams(top_k=40, temperature=1.3), slot, ids, length=50)
    rows = torch.from_numpy(np.repeat(logits[None], repeats, axis=0))
    tokens = sampler.sample(slice(0, repeats), rows, CompiledSampler(size) if compiled else None).numpy()

    allowed = np.zeros(size, dtype=bool)
    for id_, token in enumerate(tokenizer.vocabulary):
        if token in BYTE_TOKENS:
            allowed[id_] = may_follow(bytes([BYTE_TOKENS.index(token)]), before)
        else:
            allowed[id_] = not before and id_ not in tokenizer.marks.never_produced
    scores = np.where(allowed, logits.astype(np.float64) / np.float32(1.3), -np.inf)
    kept = scores >= np.sort(scores)[-40]
    probabilities = np.where(kept & allowed, np.exp(scores), 0)
    expected = probabilities / probabilities.sum() * repeats
    counts = np.bincount(tokens, minlength=size)
    assert counts[expected == 0].sum() == 0
    some = expected > 0
    chi_square = ((counts[some] - expected[some]) ** 2 / expected[some]).sum()
    degrees = int(some.sum()) - 1
    assert chi_square < degrees + 3.1 * (2 * degrees) ** 0.5 + 8


def test_a_character_is_not_begun_where_too_few_tokens_are_left():
    tokenizer = word_tokenizer()
    masks = CharacterMasks(bytes_of_tokens(tokenizer), len(tokenizer), tokenizer.marks.never_produced)
    leads = {0xC3: 1, 0xE4: 2, 0xF0: 3}
    for byte, needed in leads.items():
        id_ = tokenizer.vocabulary.index(BYTE_TOKENS[byte])
        assert [bool(masks.banned(BOUNDARY, left)[id_]) for left in range(5)] == [left < needed for left in range(5)]
    assert not masks.banned(BOUNDARY, 0)[tokenizer.vocabulary.index(BYTE_TOKENS[0x41])]


def test_a_character_that_a_prompt_of_ids_begins_is_completed():
    tokenizer = word_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer))
    ids = [tokenizer.vocabulary.index(BYTE_TOKENS[byte]) for byte in "一".encode()[:2]]
    with Engine(model, tokenizer) as engine:
        for length in (1, 5):
            prompt = engine.prompt_from_ids(ids, length)
            request = engine.submit(prompt, samples=8, length=length, sampling_params=HOT, seed=1)
            for completion in request.future.result(60):
                first = tokenizer.vocabulary[completion.ids[0]]
                assert first in BYTE_TOKENS and 0x80 <= BYTE_TOKENS.index(first) <= 0xBF
                assert "\ufffd" not in completion.text and 0x4E00 <= ord(completion.text[0]) <= 0x4E3F


def test_a_vocabulary_with_a_few_bytes_begins_no_character_that_it_cannot_complete():
    names = [BYTE_TOKENS[byte] for byte in (0x41, 0xE4, 0xB8, 0xF0)]
    data = [None, *(bytes([BYTE_TOKENS.index(name)]) for name in names)]
    masks = CharacterMasks(data, len(data))
    assert masks.banned(BOUNDARY, 9).tolist() == [False, False, False, True, False]
    without = CharacterMasks(data[:3], 3)
    assert without.banned(BOUNDARY, 9).tolist() == [False, False, True]


def test_logprobs_are_those_of_the_model_whatever_is_left_out():
    tokenizer = word_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer))
    with Engine(model, tokenizer) as engine:
        prompt = engine.prompt("一", 20)
        completion = engine.submit(prompt, samples=1, length=20, sampling_params=HOT, seed=3, logprobs=0)
        result = completion.future.result(60)[0]
    ids = [*prompt.ids, *result.ids]
    with torch.inference_mode():
        scores = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    for place, one in enumerate(result.logprobs):
        expected = float(scores[len(prompt.ids) - 1 + place, result.ids[place]])
        assert one.logprob == pytest.approx(expected, abs=1e-3)


def test_samples_of_a_training_run_have_whole_characters():
    tokenizer = word_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), n_ctx=40)
    masks = CharacterMasks(bytes_of_tokens(tokenizer), len(tokenizer), tokenizer.marks.never_produced)
    texts = []
    for seed in range(30):
        ids = complete(model, [2, 270], rows=len(tokenizer), marks=tokenizer.marks, seed=seed, masks=masks)
        texts.append(tokenizer.decode(ids))
        assert masks.state_after(ids) == BOUNDARY or not ids
    assert not any("\ufffd" in text for text in texts)
    assert any(ord(character) > 0x2000 for text in texts for character in text if character not in WORDS)
