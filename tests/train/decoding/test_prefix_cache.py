"""Contexts that begin like former ones: the same bits as without a prefix cache, in bounded memory."""

from __future__ import annotations

import random
import zlib

import numpy as np
import pytest
import torch
from book_order import MASK_ID
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tiny_model import endless_model, random_model, tiny_model, tiny_tokenizer

from gpt2_chinese.decoding.backend import PrefixCacheState
from gpt2_chinese.decoding.compiled_decoder import MIN_SHARED_TOKENS, PREFILL_CHUNK, CompiledDecoder
from gpt2_chinese.decoding.completion import Prompt, SamplingParams
from gpt2_chinese.decoding.engine import Engine
from gpt2_chinese.decoding.prefix_cache import (
    BLOCK_TOKENS,
    MAX_OVERWRITTEN_TOKENS,
    MIN_BLOCK_TOKENS,
    MIN_REUSED_TOKENS,
    BlockTree,
    common_length,
)

WAIT = 60
BLOCK_BYTES = 2 * 4 * BLOCK_TOKENS  # of the smallest tree: keys and values of one float


# The tree of blocks.


def keys_and_values(ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """As a model's, they depend on a token and all before it: a checksum of these, exact as a float32."""
    sums = [zlib.crc32(bytes(ids[: place + 1])) & 0xFFFFFF for place in range(len(ids))]
    keys = np.array(sums, dtype=np.float32).reshape(1, 1, len(ids), 1)
    return keys, -keys


def store(tree: BlockTree, ids: list[int]) -> None:
    tree.store(ids, *keys_and_values(ids))


def check_load(tree: BlockTree, ids: list[int], begin: int = 0) -> int:
    """Load what there is of a context; returns its length."""
    length = tree.match(ids)
    expected = keys_and_values(ids[:length])
    loaded = np.zeros_like(expected[0]), np.zeros_like(expected[1])
    begin = min(begin, length)
    tree.load(ids[:length], begin, *loaded)
    for got, right in zip(loaded, expected, strict=True):
        assert not got[:, :, :begin].any() and np.array_equal(got[:, :, begin:], right[:, :, begin:])
    return length


texts = st.lists(st.integers(0, 2), max_size=4 * BLOCK_TOKENS)
edits = st.lists(st.tuples(st.floats(0, 1), texts), max_size=30)


@hypothesis_settings(deadline=None)
@given(edits, st.integers(0, 7), st.integers(0, 60))
def test_what_is_loaded_belongs_to_the_context_whatever_was_stored_before(edits, num_blocks, begin):
    """Each context is a part of the one before, and other tokens after it."""
    tree = BlockTree(1, 1, 1, num_blocks * BLOCK_BYTES + 5)
    ids: list[int] = []
    for kept, added in edits:
        ids = (ids[: round(kept * len(ids))] + added)[: 8 * BLOCK_TOKENS]
        check_load(tree, ids, begin)
        store(tree, ids)
        found = check_load(tree, ids, begin)
        assert found >= min(len(ids), num_blocks * BLOCK_TOKENS) - MIN_BLOCK_TOKENS + 1
        assert tree.used_bytes <= tree.capacity_bytes == num_blocks * BLOCK_BYTES


@given(texts, texts)
def test_the_common_length_is_that_of_a_loop(first, second):
    expected = next((n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    assert common_length(first, second) == (min(len(first), len(second)) if expected is None else expected)


def context(name: int, length: int) -> list[int]:
    return [name, *(number % 100 for number in range(1, length))]


def test_the_context_that_was_used_least_recently_is_forgotten_first_and_from_its_end():
    tree = BlockTree(1, 1, 1, 6 * BLOCK_BYTES)
    first, second, third = (context(name, 3 * BLOCK_TOKENS) for name in (101, 102, 103))
    store(tree, first)
    store(tree, second)
    assert check_load(tree, first) == len(first)  # which uses it
    store(tree, third[: 2 * BLOCK_TOKENS])
    assert [tree.match(ids) for ids in (first, second, third)] == [48, 16, 32]
    store(tree, third)
    assert [tree.match(ids) for ids in (first, second, third)] == [48, 0, 48]


def test_contexts_share_the_blocks_of_their_common_beginning():
    tree = BlockTree(1, 1, 1, 100 * BLOCK_BYTES)
    beginning = context(101, 4 * BLOCK_TOKENS)
    for name in range(10):
        store(tree, [*beginning, *context(name, BLOCK_TOKENS)])
    assert tree.used_bytes == (4 + 10) * BLOCK_BYTES
    assert all(check_load(tree, [*beginning, *context(name, BLOCK_TOKENS)]) == 5 * BLOCK_TOKENS for name in range(10))


def test_typing_takes_no_more_memory_than_the_text():
    """Every keystroke replaces the last tokens by others, as the tokenization of a longer text does."""
    tree = BlockTree(1, 1, 1, 100 * BLOCK_BYTES)
    text = context(101, 5 * BLOCK_TOKENS)
    for length in range(MIN_REUSED_TOKENS, len(text)):
        store(tree, [*text[:length], 111, 112, 113])
        store(tree, [*text[:length], 121])
        assert check_load(tree, text[:length]) > length - MIN_BLOCK_TOKENS
        assert tree.used_bytes <= ((length + 3) // BLOCK_TOKENS + 1) * BLOCK_BYTES


def test_a_context_that_differs_earlier_does_not_replace_another_one():
    tree = BlockTree(1, 1, 1, 100 * BLOCK_BYTES)
    text = context(101, BLOCK_TOKENS)
    other = [*text[: -MAX_OVERWRITTEN_TOKENS - 1], 111, 112]
    store(tree, text)
    store(tree, other)
    assert check_load(tree, text) == len(text) and check_load(tree, other) == len(other)


# The decoder.


def edited(source: random.Random, ids: list[int], longest: int) -> list[int]:
    """As a person would: type some tokens, delete some, change one in the middle, or begin another text."""
    kind = source.choice(["type", "type", "type", "delete", "change", "again", "new"])
    if kind == "delete":
        ids = ids[: max(1, len(ids) - source.randrange(1, 20))]
    elif kind == "change":
        place = source.randrange(1, len(ids) + 1)
        ids = [*ids[:place], source.randrange(5, 200), *ids[place + 1 :]]
    elif kind == "new":
        ids = [MASK_ID, *(source.randrange(5, 200) for _ in range(source.randrange(longest)))]
    elif kind == "type":
        ids = [*ids, *(source.randrange(5, 200) for _ in range(source.choice([1, 1, 1, 2, 40])))]
    return ids[:longest]


def check_slot(decoder: CompiledDecoder, plain: CompiledDecoder, slot: int, length: int) -> None:
    for cache, right in ((decoder.key_cache, plain.key_cache), (decoder.value_cache, plain.value_cache)):
        assert np.array_equal(cache[:, slot, :, :length], right[:, slot, :, :length])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("num_blocks", [0, 5, 40])
def test_edited_contexts_get_the_bits_of_a_decoder_without_a_cache(precision, num_blocks):
    """Two slots in turns or together, prefills of their own and decode steps between them; keys and values too."""
    model, longest = random_model(n_positions=150), 149
    assert longest > PREFILL_CHUNK
    block_bytes = 2 * 2 * 48 * BLOCK_TOKENS * 4  # at least: the vectors of a head are padded to whole registers
    plain = CompiledDecoder(model, 3, precision)
    decoder = CompiledDecoder(model, 3, precision, prefix_cache_bytes=num_blocks * 2 * block_bytes + 1)
    assert (decoder.prefix_cache.state().capacity_bytes > 0) == (num_blocks > 0)
    source = random.Random(precision)
    texts = [[MASK_ID, 7], [MASK_ID, 9]]
    for _ in range(60):
        texts = [edited(source, ids, longest) for ids in texts]
        if source.random() < 0.2:
            texts[1] = texts[0][: source.randrange(1, len(texts[0]) + 1)]
        if source.random() < 0.3:
            ids = texts[source.randrange(2)]
            kept = decoder.prefill(ids, store=source.random() < 0.5)
            assert torch.equal(kept.logits, plain.prefill(ids).logits)
            decoder.load_prefill(2, kept)
        prompts = list(enumerate(texts))[: source.choice([1, 2])]
        logits = decoder.prefill_batch(prompts)
        assert torch.equal(logits, plain.prefill_batch(prompts))
        lengths = [len(ids) for _, ids in prompts]
        for _ in range(source.randrange(4)):
            if max(lengths) == 150:
                break
            tokens = [source.randrange(5, 200) for _ in lengths]
            assert torch.equal(decoder.step(tokens, lengths), plain.step(tokens, lengths))
            lengths = [length + 1 for length in lengths]
        for slot, length in enumerate(lengths):
            check_slot(decoder, plain, slot, length)
        decoder.copy_slot(0, 2, lengths[0])
        plain.copy_slot(0, 2, lengths[0])
        check_slot(decoder, plain, 2, lengths[0])
    state = decoder.prefix_cache.state()
    assert state.hits > 20 and state.reused_tokens > 20 * state.hits
    assert state.used_bytes <= state.capacity_bytes
    assert plain.prefix_cache is None


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_context_cut_anywhere_has_the_bits_of_the_whole_in_a_model_as_wide_as_gpt2(precision):
    model = random_model(n_embd=768, n_head=12, n_layer=2, n_positions=128)
    ids = [MASK_ID, *(number * 7 % 190 + 5 for number in range(109))]
    expected = CompiledDecoder(model, 1, precision).prefill_batch([(0, ids)])
    decoder = CompiledDecoder(model, 1, precision, prefix_cache_bytes=1 << 30)
    for cut in (*range(2, 30), 63, 64, 95, 96, 97, 108, 109):
        decoder.prefill_batch([(0, [*ids[:cut], 3, 4])])
        before = decoder.prefix_cache.state().reused_tokens
        assert torch.equal(decoder.prefill_batch([(0, ids)]), expected), cut
        assert decoder.prefix_cache.state().reused_tokens - before >= cut


def test_what_a_slot_held_after_a_text_that_is_written_over_it_is_not_taken_for_its_continuation():
    """Scoring a prompt writes over the slot of prompts that are prefilled on their own."""
    decoder = CompiledDecoder(random_model(n_positions=64), 1, "fp32", prefix_cache_bytes=1)
    former, scored = [MASK_ID, *range(10, 50)], [MASK_ID, *range(60, 80)]
    decoder.prefill(former)
    for _ in decoder.prompt_logits(scored):
        pass
    ids = [*scored, *former[len(scored) :], 7]
    expected = CompiledDecoder(random_model(n_positions=64), 1, "fp32").prefill(ids)
    assert torch.equal(decoder.prefill(ids).logits, expected.logits)
    assert decoder.prefix_cache.state().reused_tokens == len(scored)


def count_computed(decoder: CompiledDecoder, monkeypatch) -> list[int]:
    """A list that gets the number of tokens of every pass through the model."""
    passes, run = [], decoder._run
    monkeypatch.setattr(decoder, "_run", lambda tokens, *others: passes.append(len(tokens)) or run(tokens, *others))
    return passes


def test_only_new_tokens_are_computed_and_a_continuation_that_was_chosen_is_known(monkeypatch):
    decoder = CompiledDecoder(random_model(n_positions=150), 4, "fp32", prefix_cache_bytes=1 << 30)
    passes = count_computed(decoder, monkeypatch)
    ids = [MASK_ID, *range(10, 90)]
    decoder.prefill_batch([(0, ids)])
    decoder.prefill_batch([(0, [*ids, 91])])
    decoder.prefill_batch([(0, [*ids, 91])])  # asked again: the logits are those of the last token
    decoder.prefill_batch([(1, [*ids[:40], 92])])
    assert passes == [81, 1, 1, 1]
    decoder.copy_slot(0, 1, 82)
    decoder.step([95, 96], [82, 82])
    decoder.step([97, 98], [83, 83])
    passes.clear()
    assert decoder.tokens_to_prefill([*ids, 91, 96, 98, 99]) == 1
    decoder.prefill_batch([(2, [*ids, 91, 96, 98, 99])])
    assert passes == [1]


def test_prompts_that_are_prefilled_together_share_their_beginning(monkeypatch):
    prompts = [[MASK_ID, *range(10, 80), 100 + number] for number in range(4)]
    prompts.append([MASK_ID, *range(10, 10 + MIN_SHARED_TOKENS // 2), 150])  # shares too little to wait
    prompts.append([MASK_ID, 160])
    plain = CompiledDecoder(random_model(n_positions=150), 6, "fp32")
    decoder = CompiledDecoder(random_model(n_positions=150), 6, "fp32", prefix_cache_bytes=1)  # has no room for a block
    passes = count_computed(decoder, monkeypatch)
    logits = decoder.prefill_batch(list(enumerate(prompts)))
    assert torch.equal(logits, plain.prefill_batch(list(enumerate(prompts))))
    assert passes == [72 + 18 + 2, 3]
    for slot, ids in enumerate(prompts):
        check_slot(decoder, plain, slot, len(ids))


def test_the_memory_is_bounded_by_the_flag_and_by_the_model():
    model = random_model(n_positions=64)
    small = CompiledDecoder(model, 8, "fp32", prefix_cache_bytes=200_000).prefix_cache.state()
    assert 100_000 < small.capacity_bytes <= 200_000
    decoder = CompiledDecoder(model, 8, "fp32", prefix_cache_bytes=1 << 40)
    cache_bytes = decoder.key_cache.nbytes + decoder.value_cache.nbytes
    assert 0.9 * cache_bytes < decoder.prefix_cache.state().capacity_bytes <= cache_bytes
    source = random.Random(1)
    for _ in range(200):
        decoder.prefill_batch([(0, [MASK_ID, *(source.randrange(5, 200) for _ in range(60))])])
    state = decoder.prefix_cache.state()
    assert state.used_bytes == state.capacity_bytes


# The engine.


def make_engine(prefix_cache_bytes: int, *, n_ctx: int = 64, max_num_seqs: int = 6, precision: str = "fp32") -> Engine:
    model = endless_model(n_ctx=n_ctx)
    return Engine(
        model,
        tiny_tokenizer(),
        max_num_seqs=max_num_seqs,
        precision=precision,
        prefix_cache_bytes=prefix_cache_bytes,
    )


def typed_contexts(source: random.Random, count: int) -> list[str]:
    """A text that grows by a character or a word, and is now and then cut back or changed."""
    contexts, text = [], "一"
    for _ in range(count):
        kind = source.random()
        if kind < 0.1:
            text = text[: max(1, len(text) - source.randrange(8))]
        elif kind < 0.2:
            place = source.randrange(len(text))
            text = text[:place] + chr(0x4E00 + source.randrange(190)) + text[place + 1 :]
        else:
            text += source.choice(["hello", "ing", "world", ",", *(chr(0x4E00 + n) for n in range(40))])
        contexts.append(text)
    return contexts


def answers(engine: Engine, contexts: list[str]) -> list:
    """Completions with logprobs and scores: several requests at once, of which some are cancelled."""
    results = []
    for begin in range(0, len(contexts), 3):
        requests = [
            engine.submit(
                engine.prompt(context, 10),
                samples=1 + (begin + number) % 5,
                length=10,
                sampling_params=SamplingParams(repetition_penalty=1.3, top_k=20),
                seed=begin + number,
                logprobs=2,
                scores=True,
                distinct=number == 1,
            )
            for number, context in enumerate(contexts[begin : begin + 3])
        ]
        cancelled = engine.submit(engine.prompt(contexts[begin][::-1], 10), samples=3, length=1_000_000, seed=1)
        results += [request.future.result(WAIT) for request in requests]
        cancelled.cancel()
        cancelled.future.result(WAIT)
    return results


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_typed_contexts_get_the_texts_scores_and_logprobs_of_an_engine_without_a_cache(precision):
    """The texts outgrow n_ctx: their beginning is left out, the positions shift, and nothing is reused by mistake."""
    contexts = typed_contexts(random.Random(precision), 90)
    with (
        make_engine(0, n_ctx=40, precision=precision) as plain,
        make_engine(100_000, n_ctx=40, precision=precision) as engine,
    ):
        assert max(plain.prompt(context, 10).truncated for context in contexts) > 0
        assert answers(engine, contexts) == answers(plain, contexts)
        assert plain.prefix_cache == PrefixCacheState()
        state = engine.prefix_cache
        assert state.hits > 40 and state.reused_tokens > 10 * state.hits
        assert 0 < state.used_bytes <= state.capacity_bytes <= 100_000
        assert engine.prompt_tokens > state.reused_tokens


def test_a_context_that_exceeds_n_ctx_reuses_nothing_of_one_that_began_earlier():
    with make_engine(1 << 30, n_ctx=32) as engine:
        text = "".join(chr(0x4E00 + number) for number in range(40))
        for length in range(33, 41):
            prompt = engine.prompt(text[:length], 5)
            assert prompt.truncated and len(prompt.ids) == 27
            engine.submit(prompt, samples=2, length=3).future.result(WAIT)
        assert engine.prefix_cache.reused_tokens == 0
        engine.submit(prompt, samples=2, length=3).future.result(WAIT)  # the same again
        assert engine.prefix_cache.reused_tokens == 26


def test_a_long_text_continues_after_its_second_half_as_without_a_cache():
    prompts = [Prompt("", (MASK_ID, *range(20, 20 + length)), 0) for length in (3, 9, 30)]

    def texts_of(engine: Engine, length: int = 100) -> list:
        requests = [engine.submit(prompt, samples=2, length=length, seed=3) for prompt in prompts for _ in range(2)]
        return [request.future.result(WAIT) for request in requests]

    with make_engine(0, n_ctx=32) as plain, make_engine(1 << 30, n_ctx=32) as engine:
        texts_of(engine, 1)
        of_prompts, expected = engine.prefix_cache.used_bytes, texts_of(plain)
        assert texts_of(engine) == expected == texts_of(engine)
        assert engine.prefix_cache.hits > 0
        assert engine.prefix_cache.used_bytes == of_prompts > 0, "the second halves take room from prompts"


def test_samples_that_wait_for_a_slot_share_a_prefill_that_reused_tokens():
    text = "".join(chr(0x4E00 + number) for number in range(30))
    with make_engine(0) as plain, make_engine(1 << 30, max_num_seqs=2) as engine:
        for length in (20, 21, 22):
            arguments = {"samples": 5, "length": 6, "seed": length}
            assert engine.complete(text[:length], **arguments) == plain.complete(text[:length], **arguments)
        state = engine.prefix_cache
        assert (state.hits, state.reused_tokens) == (2, 21 + 22)


def test_prompts_of_which_most_is_known_are_admitted_together(monkeypatch):
    """The limit of tokens that are prefilled between two decode steps is one of computed tokens."""
    monkeypatch.setattr("gpt2_chinese.decoding.engine.MAX_PREFILL_TOKENS_PER_STEP", 40)
    with make_engine(1 << 30) as engine:
        texts = ["".join(chr(0x4E00 + first + number) for number in range(30)) for first in (0, 50, 100)]
        for text in texts:
            engine.complete(text, samples=1, length=2, seed=1)
        sizes, prefill_batch = [], engine.decoder.prefill_batch
        monkeypatch.setattr(
            engine.decoder, "prefill_batch", lambda prompts: sizes.append(len(prompts)) or prefill_batch(prompts)
        )
        with engine._changed:  # so that the model thread sees all of them at once
            requests = [engine.submit(engine.prompt(text + "丁", 2), samples=2, length=2, seed=1) for text in texts]
        for request in requests:
            request.future.result(WAIT)
        assert sizes == [3]


def test_decoders_of_pytorch_have_no_cache_and_say_so():
    with Engine(tiny_model(), tiny_tokenizer(), max_num_seqs=2, prefix_cache_bytes=1 << 20) as engine:
        engine.complete("一丁", samples=1, length=2, seed=1)
        engine.complete("一丁七", samples=1, length=2, seed=1)
        assert engine.prefix_cache == PrefixCacheState(0, 0, 0, 0)


@pytest.mark.parametrize(("width", "computed_again"), [(64, 6), (768, 1)])
def test_only_a_small_model_computes_a_short_context_as_a_whole(width, computed_again):
    decoder = CompiledDecoder(random_model(n_embd=width), 2, "fp32", prefix_cache_bytes=1 << 20)
    ids = list(range(5, 11))
    decoder.prefill_batch([(0, ids)])
    assert decoder.tokens_to_prefill(ids) == computed_again
    assert decoder.tokens_to_prefill([*ids, 11, 12, 13]) == 3  # known from the slot
