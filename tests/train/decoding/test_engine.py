"""The engine and its forward pass beside transformers, and what requests get when they share a batch."""

from __future__ import annotations

import json
import random
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from book_order import CLS_ID, MASK_ID, PAD_ID, UNK_ID
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from recorded_graph import RecordedGraph
from tiny_model import (
    endless_model,
    greedy_by_transformers,
    prefill_slots,
    random_prompts,
    set_likeliest,
    tiny_model,
    tiny_tokenizer,
)
from transformers import RepetitionPenaltyLogitsProcessor

from gpt2_chinese.decoding.compiled_decoder import CompiledDecoder
from gpt2_chinese.decoding.completion import EngineFull, EngineStopped, Prompt, SamplingParams
from gpt2_chinese.decoding.decoder import Decoder
from gpt2_chinese.decoding.engine import Engine, choose_device
from gpt2_chinese.decoding.graph_decoder import GraphDecoder
from gpt2_chinese.model_folder import load_model

GREEDY = SamplingParams(temperature=0)
WAIT = 60


@pytest.fixture(scope="module", params=["eager", "graph"])
def engine(request):
    engine = Engine(tiny_model(), tiny_tokenizer(), max_num_seqs=8)
    if request.param == "graph":
        engine.decoder = GraphDecoder(tiny_model(), max_num_seqs=8)
        engine.decoder.capture = RecordedGraph
    with engine:
        yield engine
    if request.param == "graph":
        assert engine.decoder.capture and engine.decoder._graphs, "a capture failed"


# The forward pass.


def test_reference_checkpoint_gives_the_reference_logits(reference):
    ids = json.loads((reference / "logits_input_ids.json").read_text(encoding="utf-8"))
    expected = np.load(reference / "logits.npy")
    model, _ = load_model(reference / "checkpoint", vocab_file=reference / "vocab_user.txt")
    decoder = Decoder(model, max_num_seqs=2)
    # The first 20 tokens by prefill, the others by decode steps.
    for slot in range(2):
        prefilled = decoder.prefill(ids[slot][:20])
        assert np.abs(prefilled.logits.numpy() - expected[slot, 19]).max() < 1e-4
        decoder.load_prefill(slot, prefilled)
    for position in range(20, 40):
        logits = decoder.step([ids[0][position], ids[1][position]], [position, position]).numpy()
        assert np.abs(logits - expected[:, position]).max() < 1e-4


def test_sequences_of_different_lengths_get_the_logits_of_transformers():
    model = tiny_model()
    decoder = Decoder(model, max_num_seqs=4)
    texts = [[2, 9, 8], [2], [2, 7, 7, 7, 7, 7, 30], [2, 60, 61]]
    prefill_slots(decoder, texts)
    with torch.inference_mode():
        for token in (50, 51, 52):
            logits = decoder.step([token + slot for slot in range(4)], [len(ids) for ids in texts])
            for slot, ids in enumerate(texts):
                ids.append(token + slot)
                assert torch.allclose(logits[slot], model(torch.tensor([ids])).logits[0, -1], atol=1e-4)


def test_logits_are_the_same_to_the_bit_whatever_the_batch():
    decoder = Decoder(tiny_model(), max_num_seqs=20)
    lengths = prefill_slots(decoder, [[2, *range(10, 10 + slot)] for slot in range(20)])
    with torch.inference_mode():
        whole = decoder.step([100] * 20, lengths)
        for first in (0, 7, 19):
            decoder.copy_slot(first, 0, lengths[first])
            for size in range(1, 20):
                part = decoder.step([100] * size, [lengths[first], *lengths[1:size]])
                assert torch.equal(part[0], whole[first])


def test_attention_scaled_by_layer_and_another_activation_function_are_supported():
    torch.manual_seed(0)
    model = tiny_model()
    config = model.config
    config.scale_attn_by_inverse_layer_idx = True
    config.activation_function = "relu"
    other = type(model)(config).eval()
    other.load_state_dict(model.state_dict())
    ids = [2, 9, 8, 7, 30]
    with torch.inference_mode():
        expected = other(torch.tensor([ids])).logits[0, -1]
        assert not torch.allclose(expected, model(torch.tensor([ids])).logits[0, -1], atol=1e-2)
        assert torch.allclose(Decoder(other, max_num_seqs=1).prefill(ids).logits, expected, atol=1e-4)


def test_weights_that_are_not_finite_are_refused_by_name():
    model = tiny_model()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"transformer\.h\.1\.mlp\.c_fc\.weight.*diverged"):
        Engine(model, tiny_tokenizer())


# What is generated.


def test_greedy_equals_transformers_alone_and_in_a_batch(engine):
    prompts = random_prompts(50, longest=16)
    model = tiny_model()
    expected = [greedy_by_transformers(model, prompt, 15) for prompt in prompts]
    assert len({tuple(ids) for ids in expected}) > 20
    together = [engine.submit(prompt, samples=1, length=15, sampling_params=GREEDY) for prompt in prompts]
    assert [list(request.future.result(WAIT)[0].ids) for request in together] == expected
    for prompt, ids in zip(prompts, expected, strict=True):
        request = engine.submit(prompt, samples=1, length=15, sampling_params=GREEDY)
        assert list(request.future.result(WAIT)[0].ids) == ids


def test_a_seed_gives_the_same_alone_in_a_batch_and_streamed(engine):
    source = random.Random(1)
    cases = []
    for number, prompt in enumerate(random_prompts(24, longest=20)):
        params = SamplingParams(
            temperature=source.choice([0, 0.7, 1, 1.5]),
            top_k=source.choice([0, 5, 30]),
            top_p=source.choice([0, 0.8]),
            repetition_penalty=source.choice([1, 1.2]),
        )
        cases.append((prompt, source.randrange(1, 6), source.randrange(1, 40), params, number))

    def submit(case, on_delta=None):
        prompt, samples, length, params, seed = case
        return engine.submit(
            prompt,
            samples=samples,
            length=length,
            sampling_params=params,
            seed=seed,
            on_delta=on_delta,
            stop=[chr(0x4E00 + seed), "乐乒", "world"] if seed % 2 else [],
            logprobs=2 if seed % 3 else None,
        )

    alone = [submit(case).future.result(WAIT) for case in cases]
    assert {completion.finish_reason for completions in alone for completion in completions} == {"stop", "length"}
    streamed = [[] for _ in cases]
    requests = [submit(case, deltas.append) for case, deltas in zip(cases, streamed, strict=True)]
    assert [request.future.result(WAIT) for request in requests] == alone
    for deltas, completions in zip(streamed, alone, strict=True):
        for sample, completion in enumerate(completions):
            own = [delta for delta in deltas if delta.sample == sample]
            assert "".join(delta.text for delta in own) == completion.text
            assert [delta.finish_reason for delta in own] == [None] * (len(own) - 1) + [completion.finish_reason]
            assert sum((delta.logprobs for delta in own), ()) == completion.logprobs


def test_samples_differ_and_do_not_depend_on_how_many_there_are(engine):
    five = engine.complete("一丁", samples=5, length=20, seed=4)
    assert len(set(five)) == 5
    assert engine.complete("一丁", samples=2, length=20, seed=4) == five[:2]
    assert engine.complete("一丁", samples=5, length=20, seed=5) != five
    assert engine.complete("一丁", samples=5, length=20) != engine.complete("一丁", samples=5, length=20)


@pytest.mark.parametrize("max_num_seqs", [2, 5])
def test_samples_share_one_prefill_even_if_they_are_admitted_one_after_the_other(max_num_seqs, monkeypatch):
    with Engine(tiny_model(), tiny_tokenizer(), max_num_seqs=8) as wide:
        expected = wide.complete("一丁", samples=5, length=12, seed=1)
    with Engine(tiny_model(), tiny_tokenizer(), max_num_seqs=max_num_seqs) as narrow:
        calls = []
        prefill = narrow.decoder.prefill
        monkeypatch.setattr(narrow.decoder, "prefill", lambda ids: calls.append(ids) or prefill(ids))
        assert narrow.complete("一丁", samples=5, length=12, seed=1) == expected
        assert len(calls) == 1


def test_a_text_longer_than_n_ctx_continues_after_its_second_half():
    """Greedy, with a repetition penalty over the whole text, since a random model would repeat one word for ever."""
    model = endless_model(n_ctx=16)
    penalty = RepetitionPenaltyLogitsProcessor(2.0)
    params = SamplingParams(temperature=0, repetition_penalty=2.0)
    with Engine(model, tiny_tokenizer(), max_num_seqs=3) as engine, torch.inference_mode():
        for first in range(20, 30):
            text = [MASK_ID, first, 21]
            window = list(text)
            while len(text) < 63:
                if len(window) > 16:
                    window = window[-8:]
                logits = penalty(torch.tensor([text]), model(torch.tensor([window])).logits[:, -1])[0]
                logits[[MASK_ID, PAD_ID, UNK_ID]] = -torch.inf
                text.append(int(logits.argmax()))
                window.append(text[-1])
            assert len(set(text)) > 20, "few different tokens would prove little"
            prompt = Prompt("", (MASK_ID, first, 21), 0)
            for completion in engine.submit(prompt, samples=2, length=60, sampling_params=params).future.result(WAIT):
                assert list(completion.ids) == text[3:]


def test_unknown_padding_and_mask_are_never_sampled():
    model = tiny_model()
    set_likeliest(model, UNK_ID, PAD_ID, MASK_ID)
    with Engine(model, tiny_tokenizer(), max_num_seqs=4) as engine:
        prompt = engine.prompt("一", 20)
        for params in (
            GREEDY,
            SamplingParams(),
            SamplingParams(top_k=0),
            SamplingParams(top_k=1),
            SamplingParams(top_p=0.5),
        ):
            for completion in engine.submit(prompt, samples=4, length=20, sampling_params=params).future.result(WAIT):
                assert not {UNK_ID, PAD_ID, MASK_ID} & set(completion.ids)


def test_ids_beyond_the_vocabulary_are_never_sampled():
    model = tiny_model()
    set_likeliest(model, *range(150, 200))
    tokenizer = tiny_tokenizer(words=[chr(0x4E00 + number) for number in range(145)])
    with Engine(model, tokenizer, max_num_seqs=4) as engine:
        for params in (GREEDY, SamplingParams(top_k=0)):
            request = engine.submit(engine.prompt("一", 20), samples=4, length=20, sampling_params=params)
            assert all(id_ < 150 for completion in request.future.result(WAIT) for id_ in completion.ids)


def test_a_sample_ends_with_its_document():
    model = tiny_model()
    set_likeliest(model, CLS_ID)
    with Engine(model, tiny_tokenizer(), max_num_seqs=4) as engine:
        completions = engine.submit(
            engine.prompt("一", 20), samples=3, length=20, sampling_params=GREEDY
        ).future.result(WAIT)
    assert [(c.text, c.ids, c.finish_reason) for c in completions] == [("一", (), "stop")] * 3


def test_the_repetition_penalty_counts_the_prompt_and_the_completion(engine):
    model = tiny_model()
    params = SamplingParams(temperature=0, repetition_penalty=1.8)
    for prompt in random_prompts(5, longest=10):
        expected = greedy_by_transformers(model, prompt, 15, repetition_penalty=1.8)
        request = engine.submit(prompt, samples=1, length=15, sampling_params=params)
        assert list(request.future.result(WAIT)[0].ids) == expected


# Contexts and texts.


@pytest.mark.parametrize(
    "context",
    ["", "一丁", "Hello ", "hello", "  一 \t", "一\n", "一\r\n", "\x00一\ufffd", "É", "[CLS]", "😀", "𠀀", "一" * 500],
)
def test_a_completion_begins_with_the_context_exactly_as_given(engine, context):
    for text in engine.complete(context, samples=3, length=8, seed=2):
        assert text.startswith(context)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
@hypothesis_settings(max_examples=60)
def test_any_context_is_completed(context):
    for text in SHARED.complete(context, samples=2, length=3, seed=2):
        assert text.startswith(context)
        text.encode("utf-8")


SHARED: Engine


@pytest.fixture(autouse=True, scope="module")
def shared_engine(engine):
    """Hypothesis calls a test many times, which a fixture of the test itself does not support."""
    global SHARED
    SHARED = engine


def test_a_stop_string_ends_a_sample_and_releases_its_slot(engine):
    prompt = engine.prompt("一丁", 30)
    whole = engine.submit(prompt, samples=4, length=30, seed=9).future.result(WAIT)
    stop = whole[0].text[6:8]
    cut = engine.submit(prompt, samples=4, length=30, seed=9, stop=[stop]).future.result(WAIT)
    assert cut[0].text == whole[0].text[: whole[0].text.index(stop, 2)] and cut[0].finish_reason == "stop"
    assert len(cut[0].ids) < len(whole[0].ids)
    for before, after in zip(whole, cut, strict=True):
        assert before.text.startswith(after.text) and stop not in after.text[2:]


def test_logprobs_are_those_of_the_raw_logits(engine):
    model = tiny_model()
    prompt = engine.prompt("一丁", 12)
    params = SamplingParams(temperature=0.3, top_k=3, repetition_penalty=1.5)
    for count in (0, 5):
        request = engine.submit(prompt, samples=2, length=12, sampling_params=params, seed=3, logprobs=count)
        for completion in request.future.result(WAIT):
            ids = [*prompt.ids, *completion.ids]
            with torch.inference_mode():
                scores = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
            for index, (id_, one) in enumerate(zip(completion.ids, completion.logprobs, strict=True)):
                row = scores[len(prompt.ids) + index - 1]
                assert one.token == engine.tokenizer.vocabulary[id_]
                assert one.logprob == pytest.approx(float(row[id_]), abs=1e-3)
                likeliest = {engine.tokenizer.vocabulary[best] for best in row.topk(count).indices.tolist()}
                assert set(one.top) == likeliest | {one.token}
                assert one.top[one.token] == one.logprob
                assert completion.text[2:][one.offset :].startswith(one.token.replace("[SEP]", "\n").strip("#"))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_prompt_is_scored_as_transformers_would(compiled):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with Engine(model, tokenizer, max_num_seqs=4, precision="fp32" if compiled else None) as engine:
        assert isinstance(engine.decoder, CompiledDecoder) == compiled
        context_ids = tokenizer.encode("一丁七\n乐")
        cases = [
            (engine.prompt("一丁七\n乐", 0), 1),
            (engine.prompt_from_ids([MASK_ID, *context_ids], 0), 0),
            (engine.prompt("一", 0), 1),
            (engine.prompt("一丁七" * 50, 4), 0),
        ]
        for prompt, added in cases:
            assert prompt.added == added
            with torch.inference_mode():
                scores = torch.log_softmax(model(torch.tensor([prompt.ids])).logits[0].double(), dim=-1)
            for length in (0, 4):
                request = engine.submit(prompt, samples=2, length=length, seed=1, logprobs=2, score_prompt=True)
                completions = request.future.result(WAIT)
                assert all(len(completion.ids) <= length for completion in completions)
                assert length or {completion.finish_reason for completion in completions} == {"length"}
                logprobs = request.prompt_logprobs
                assert [one.token for one in logprobs] == [tokenizer.vocabulary[id_] for id_ in prompt.ids[added:]]
                for position, one in enumerate(logprobs, start=added):
                    if position == 0:
                        assert one.logprob is None and one.top is None
                        continue
                    row, id_ = scores[position - 1], prompt.ids[position]
                    assert one.logprob == pytest.approx(float(row[id_]), abs=1e-4)
                    likeliest = {tokenizer.vocabulary[best] for best in row.topk(2).indices.tolist()}
                    assert set(one.top) == likeliest | {one.token} and one.top[one.token] == one.logprob
                    text = {"[SEP]": "\n", "[MASK]": ""}.get(one.token, one.token)
                    assert prompt.context[one.offset :].startswith(text)
        alone = engine.submit(cases[0][0], samples=1, length=9, seed=1).future.result(WAIT)
        both = engine.submit(cases[0][0], samples=1, length=9, seed=1, logprobs=0, score_prompt=True).future.result(
            WAIT
        )
        assert both[0].text == alone[0].text


def test_a_prompt_of_ids_is_completed_like_its_text(engine):
    ids = engine.tokenizer.encode("一丁七")
    prompt = engine.prompt("一丁七", 5)
    assert engine.prompt_from_ids(ids, 5) == prompt
    assert engine.prompt_from_ids([MASK_ID, *ids], 5) == replace(prompt, added=0)
    assert engine.prompt_from_ids(ids * 50, 10).truncated > 0
    for wrong in (-1, len(engine.tokenizer)):
        with pytest.raises(ValueError, match=f"id {wrong} is not in the vocabulary"):
            engine.prompt_from_ids([wrong], 5)


def test_one_sample_can_be_cancelled_and_the_others_continue(endless):
    prompt = endless.prompt("一", 40)
    whole = endless.submit(prompt, samples=3, length=40, seed=1).future.result(WAIT)
    seen = []

    def cancel_the_second(delta):
        seen.append(delta)
        if delta.sample == 1:
            request.cancel(1)

    blocking = endless.submit(prompt, samples=8, length=3)  # takes all slots until `request` is assigned
    request = endless.submit(prompt, samples=3, length=40, seed=1, on_delta=cancel_the_second)
    completions = request.future.result(WAIT)
    blocking.future.result(WAIT)
    assert [c.finish_reason for c in completions] == ["length", "cancelled", "length"]
    assert len(completions[1].ids) <= 2 and (completions[0], completions[2]) == (whole[0], whole[2])


def test_tokens_are_counted():
    with Engine(endless_model(), tiny_tokenizer(), max_num_seqs=4) as engine:
        request = engine.submit(engine.prompt("一丁", 8), samples=3, length=7)
        before = time.monotonic()
        request.future.result(WAIT)
        assert (engine.prompt_tokens, engine.generated_tokens) == (3, 21)
        assert before - WAIT < request.first_token_at <= time.monotonic()


def test_half_of_a_surrogate_pair_is_an_error_that_names_its_position(engine):
    with pytest.raises(ValueError, match=r"character 2 is half of a surrogate pair \(U\+D800\)"):
        engine.prompt("一\ud800", 5)


def test_a_long_context_is_truncated_from_the_left_with_room_for_the_completion(engine):
    ids = engine.tokenizer.encode("一丁" * 50)
    prompt = engine.prompt("一丁" * 50, 10)
    assert prompt.ids == tuple(ids[-22:]) and prompt.truncated == 101 - 22
    assert engine.prompt("一丁" * 50, 1000).ids == tuple(ids[-16:])
    fits = engine.prompt("一" * 31, 10)
    assert fits.truncated == 0 and fits.ids == (MASK_ID, *engine.tokenizer.encode("一" * 31))
    assert engine.submit(fits, samples=1, length=10, seed=0).future.result(WAIT)


def test_positions_that_were_never_trained_are_not_used():
    with Engine(tiny_model(n_ctx=16, n_positions=64), tiny_tokenizer(), max_num_seqs=1) as engine:
        assert engine.n_ctx == 16
        assert len(engine.prompt("一" * 40, 4).ids) == 12


# Cancelling, limits, failures.


@pytest.fixture(scope="module")
def endless():
    with Engine(endless_model(), tiny_tokenizer(), max_num_seqs=8) as engine:
        yield engine


def test_a_cancelled_request_releases_its_slots_and_a_waiting_one_never_starts(endless):
    engine = endless
    long = engine.submit(engine.prompt("一", 8), samples=8, length=1_000_000, seed=1)
    waiting = engine.submit(engine.prompt("丁", 8), samples=3, length=5, seed=1)
    deadline = time.monotonic() + WAIT
    while engine.running < 8:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    waiting.cancel()
    assert [c.finish_reason for c in waiting.future.result(WAIT)] == ["cancelled"] * 3
    long.cancel()
    assert [c.finish_reason for c in long.future.result(WAIT)] == ["cancelled"] * 8
    assert engine.complete("一", samples=8, length=3)
    assert engine.running == 0 and engine.waiting == 0


def test_a_caller_that_cancels_the_future_does_not_stop_the_engine(endless):
    engine = endless
    request = engine.submit(engine.prompt("一", 8), samples=2, length=20)
    assert not request.future.cancel()
    request.future.result(WAIT)
    assert engine.alive


def test_a_request_beyond_max_waiting_is_refused_at_once():
    with Engine(endless_model(), tiny_tokenizer(), max_num_seqs=1, max_waiting=4) as engine:
        prompt = engine.prompt("一", 8)
        busy = engine.submit(prompt, samples=1, length=1_000_000)
        queued = engine.submit(prompt, samples=3, length=2)
        with pytest.raises(EngineFull, match="wait already"):
            for _ in range(3):
                engine.submit(prompt, samples=2, length=2)
        busy.cancel()
        assert len(queued.future.result(WAIT)) == 3


def test_all_requests_fail_when_the_model_thread_fails(monkeypatch, caplog):
    with Engine(tiny_model(), tiny_tokenizer(), max_num_seqs=2) as engine:
        all_submitted = threading.Event()
        monkeypatch.setattr(engine.decoder, "step", lambda *_: all_submitted.wait(WAIT) / 0)
        requests = [engine.submit(engine.prompt("一", 8), samples=2, length=20) for _ in range(3)]
        all_submitted.set()
        for request in requests:
            with pytest.raises(EngineStopped, match="ZeroDivisionError"):
                request.future.result(WAIT)
        assert not engine.alive
        with pytest.raises(EngineStopped):
            engine.submit(engine.prompt("一", 8), samples=1, length=1)
    assert "the model thread has stopped" in caplog.text


def test_closing_fails_all_requests_and_leaves_no_thread():
    before = threading.active_count()
    with Engine(endless_model(), tiny_tokenizer(), max_num_seqs=1) as engine:
        requests = [engine.submit(engine.prompt("一", 8), samples=1, length=1_000_000) for _ in range(2)]
    for request in requests:
        with pytest.raises(EngineStopped, match="closed"):
            request.future.result(WAIT)
    assert threading.active_count() == before
    with pytest.raises(EngineStopped, match="closed"):
        engine.submit(Prompt("", (MASK_ID,), 0), samples=1, length=1)


def test_a_vocabulary_larger_than_the_model_is_refused():
    with pytest.raises(ValueError, match="do not belong together"):
        Engine(tiny_model(vocab_size=150), tiny_tokenizer())


def test_a_device_is_chosen_by_its_name():
    assert choose_device("cpu") == torch.device("cpu")
    for name in ("gpu", "-1", "99", "x,0"):
        with pytest.raises(ValueError, match=f"--device {name}"):
            choose_device(name)
    if not torch.cuda.is_available():
        assert choose_device("auto") == torch.device("cpu")
        with pytest.raises(ValueError, match="use --device cpu"):
            choose_device("0,1,2,3")
