"""The engine and its forward pass against transformers, and what requests get when they share the model."""

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
from tiny_model import endless_model, favour, tiny_model, tiny_tokenizer
from transformers import RepetitionPenaltyLogitsProcessor

from gpt2_chinese.decoding.compiled_decoder import CompiledDecoder
from gpt2_chinese.decoding.completion import EngineFull, EngineStopped, IncrementalDetokenizer, Prompt, Settings
from gpt2_chinese.decoding.decoder import Decoder
from gpt2_chinese.decoding.engine import Engine, choose_device, continuation
from gpt2_chinese.decoding.graph_decoder import GraphDecoder
from gpt2_chinese.model_folder import load_model

GREEDY = Settings(temperature=0)
WAIT = 60


@pytest.fixture(scope="module", params=["step by step", "as a graph"])
def engine(request):
    engine = Engine(tiny_model(), tiny_tokenizer(), rows=8)
    if request.param == "as a graph":
        engine.decoder = GraphDecoder(tiny_model(), rows=8)
        engine.decoder.capture = RecordedGraph
    with engine:
        yield engine
    if request.param == "as a graph":
        assert engine.decoder.capture and engine.decoder._graphs, "a capture has failed"


def random_prompts(count: int, longest: int) -> list[Prompt]:
    source = random.Random(3)
    return [
        Prompt("", (MASK_ID, *(source.randrange(5, 200) for _ in range(source.randrange(longest)))), 0)
        for _ in range(count)
    ]


def greedy_of_transformers(model, ids, length: int) -> list[int]:
    """The continuation of `ids`, without the [CLS] that ends it."""
    inputs = torch.tensor([ids])
    output = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=length,
        do_sample=False,
        suppress_tokens=[MASK_ID, PAD_ID, UNK_ID],
    )[0, len(ids) :].tolist()
    return output[: output.index(CLS_ID)] if CLS_ID in output else output


# The forward pass.


def test_reference_checkpoint_gives_the_reference_logits(reference):
    ids = json.loads((reference / "logits_input_ids.json").read_text(encoding="utf-8"))
    expected = np.load(reference / "logits.npy")
    model, _ = load_model(reference / "checkpoint", vocab_file=reference / "vocab_user.txt")
    decoder = Decoder(model, rows=2)
    # Half of each row by prefill, the other half token by token.
    for row in range(2):
        prefix = decoder.prefill(ids[row][:20])
        assert np.abs(prefix.logits.numpy() - expected[row, 19]).max() < 1e-4
        decoder.load(row, prefix)
    for position in range(20, 40):
        logits = decoder.step([ids[0][position], ids[1][position]], [position, position]).numpy()
        assert np.abs(logits - expected[:, position]).max() < 1e-4


def test_rows_of_different_lengths_get_the_logits_of_transformers():
    model = tiny_model()
    decoder = Decoder(model, rows=4)
    texts = [[2, 9, 8], [2], [2, 7, 7, 7, 7, 7, 30], [2, 60, 61]]
    with torch.inference_mode():
        for row, ids in enumerate(texts):
            decoder.load(row, decoder.prefill(ids))
        for token in (50, 51, 52):
            logits = decoder.step([token + row for row in range(4)], [len(ids) for ids in texts])
            for row, ids in enumerate(texts):
                ids.append(token + row)
                assert torch.allclose(logits[row], model(torch.tensor([ids])).logits[0, -1], atol=1e-4)


def test_a_row_has_the_same_logits_to_the_bit_beside_any_others():
    decoder = Decoder(tiny_model(), rows=20)
    with torch.inference_mode():
        prefixes = [decoder.prefill([2, *range(10, 10 + row)]) for row in range(20)]
        for row, prefix in enumerate(prefixes):
            decoder.load(row, prefix)
        lengths = [prefix.length for prefix in prefixes]
        whole = decoder.step([100] * 20, lengths)
        for first in (0, 7, 19):
            decoder.copy_row(first, 0, lengths[first])
            for size in range(1, 20):
                part = decoder.step([100] * size, [lengths[first], *lengths[1:size]])
                assert torch.equal(part[0], whole[first])


def test_attention_scaled_by_layer_and_another_activation_are_followed():
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
        assert torch.allclose(Decoder(other, rows=1).prefill(ids).logits, expected, atol=1e-4)


def test_weights_that_are_not_finite_are_refused_by_name():
    model = tiny_model()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"transformer\.h\.1\.mlp\.c_fc\.weight.*diverged"):
        Engine(model, tiny_tokenizer())


# What is decoded.


def test_greedy_equals_transformers_alone_and_all_at_once(engine):
    prompts = random_prompts(50, longest=16)
    model = tiny_model()
    expected = [greedy_of_transformers(model, prompt.ids, 15) for prompt in prompts]
    assert len({tuple(ids) for ids in expected}) > 20
    together = [engine.submit(prompt, samples=1, length=15, settings=GREEDY) for prompt in prompts]
    assert [list(ticket.future.result(WAIT)[0].ids) for ticket in together] == expected
    for prompt, ids in zip(prompts, expected, strict=True):
        ticket = engine.submit(prompt, samples=1, length=15, settings=GREEDY)
        assert list(ticket.future.result(WAIT)[0].ids) == ids


def test_a_seed_gives_the_same_alone_in_a_crowd_and_streamed(engine):
    source = random.Random(1)
    requests = []
    for number, prompt in enumerate(random_prompts(24, longest=20)):
        settings = Settings(
            temperature=source.choice([0, 0.7, 1, 1.5]),
            top_k=source.choice([0, 5, 30]),
            top_p=source.choice([0, 0.8]),
            repetition_penalty=source.choice([1, 1.2]),
        )
        requests.append((prompt, source.randrange(1, 6), source.randrange(1, 40), settings, number))

    def submit(request, on_delta=None):
        prompt, samples, length, settings, seed = request
        return engine.submit(
            prompt,
            samples=samples,
            length=length,
            settings=settings,
            seed=seed,
            on_delta=on_delta,
            stop=[chr(0x4E00 + seed), "乐乒", "world"] if seed % 2 else [],
            logprobs=2 if seed % 3 else None,
        )

    alone = [submit(request).future.result(WAIT) for request in requests]
    assert {completion.finish_reason for completions in alone for completion in completions} == {"stop", "length"}
    streamed = [[] for _ in requests]
    tickets = [submit(request, pieces.append) for request, pieces in zip(requests, streamed, strict=True)]
    assert [ticket.future.result(WAIT) for ticket in tickets] == alone
    for pieces, completions in zip(streamed, alone, strict=True):
        for number, completion in enumerate(completions):
            own = [piece for piece in pieces if piece.sample == number]
            assert "".join(piece.text for piece in own) == completion.text
            assert [piece.finish_reason for piece in own] == [None] * (len(own) - 1) + [completion.finish_reason]
            assert sum((piece.logprobs for piece in own), ()) == completion.logprobs


def test_samples_differ_and_do_not_depend_on_how_many_there_are(engine):
    five = engine.complete("一丁", samples=5, length=20, seed=4)
    assert len(set(five)) == 5
    assert engine.complete("一丁", samples=2, length=20, seed=4) == five[:2]
    assert engine.complete("一丁", samples=5, length=20, seed=5) != five
    assert engine.complete("一丁", samples=5, length=20) != engine.complete("一丁", samples=5, length=20)


@pytest.mark.parametrize("rows", [2, 5])
def test_samples_share_one_prefill_even_when_they_join_one_after_the_other(rows, monkeypatch):
    with Engine(tiny_model(), tiny_tokenizer(), rows=8) as wide:
        expected = wide.complete("一丁", samples=5, length=12, seed=1)
    with Engine(tiny_model(), tiny_tokenizer(), rows=rows) as narrow:
        calls = []
        prefill = narrow.decoder.prefill
        monkeypatch.setattr(narrow.decoder, "prefill", lambda ids: calls.append(ids) or prefill(ids))
        assert narrow.complete("一丁", samples=5, length=12, seed=1) == expected
        assert len(calls) == 1


def test_a_text_longer_than_the_window_goes_on_behind_its_second_half():
    """Greedy, with a repetition penalty over the whole text: without it a random model says one word for ever."""
    model = endless_model(n_ctx=16)
    penalised = RepetitionPenaltyLogitsProcessor(2.0)
    settings = Settings(temperature=0, repetition_penalty=2.0)
    with Engine(model, tiny_tokenizer(), rows=3) as engine, torch.inference_mode():
        for first in range(20, 30):
            text = [MASK_ID, first, 21]
            window = list(text)
            while len(text) < 63:
                if len(window) > 16:
                    window = window[-8:]
                logits = penalised(torch.tensor([text]), model(torch.tensor([window])).logits[:, -1])[0]
                logits[[MASK_ID, PAD_ID, UNK_ID]] = -torch.inf
                text.append(int(logits.argmax()))
                window.append(text[-1])
            assert len(set(text)) > 20, "a text of few different tokens shows little"
            prompt = Prompt("", (MASK_ID, first, 21), 0)
            for completion in engine.submit(prompt, samples=2, length=60, settings=settings).future.result(WAIT):
                assert list(completion.ids) == text[3:]


def test_unknown_padding_and_mask_are_never_produced():
    model = tiny_model()
    favour(model, UNK_ID, PAD_ID, MASK_ID)
    with Engine(model, tiny_tokenizer(), rows=4) as engine:
        prompt = engine.prompt("一", 20)
        for settings in (GREEDY, Settings(), Settings(top_k=0), Settings(top_k=1), Settings(top_p=0.5)):
            for completion in engine.submit(prompt, samples=4, length=20, settings=settings).future.result(WAIT):
                assert not {UNK_ID, PAD_ID, MASK_ID} & set(completion.ids)


def test_rows_behind_the_vocabulary_are_never_produced():
    model = tiny_model()
    favour(model, *range(150, 200))
    tokenizer = tiny_tokenizer(words=[chr(0x4E00 + number) for number in range(145)])
    with Engine(model, tokenizer, rows=4) as engine:
        for settings in (GREEDY, Settings(top_k=0)):
            ticket = engine.submit(engine.prompt("一", 20), samples=4, length=20, settings=settings)
            assert all(id_ < 150 for completion in ticket.future.result(WAIT) for id_ in completion.ids)


def test_a_sample_stops_at_the_end_of_its_document():
    model = tiny_model()
    favour(model, CLS_ID)
    with Engine(model, tiny_tokenizer(), rows=4) as engine:
        completions = engine.submit(engine.prompt("一", 20), samples=3, length=20, settings=GREEDY).future.result(WAIT)
    assert [(c.text, c.ids, c.finish_reason) for c in completions] == [("一", (), "stop")] * 3


def test_repetition_penalty_counts_the_prompt_and_what_was_produced(engine):
    model = tiny_model()
    for prompt in random_prompts(5, longest=10):
        inputs = torch.tensor([prompt.ids])
        expected = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=15,
            do_sample=False,
            repetition_penalty=1.8,
            suppress_tokens=[MASK_ID, PAD_ID, UNK_ID],
        )[0, len(prompt.ids) :].tolist()
        settings = Settings(temperature=0, repetition_penalty=1.8)
        ids = engine.submit(prompt, samples=1, length=15, settings=settings).future.result(WAIT)[0].ids
        assert list(ids) == [id_ for id_ in expected if id_ != CLS_ID]


# Contexts and texts.


@pytest.mark.parametrize(
    "context",
    ["", "一丁", "Hello ", "hello", "  一 \t", "一\n", "一\r\n", "\x00一\ufffd", "É", "[CLS]", "😀", "𠀀", "一" * 500],
)
def test_a_completion_begins_with_the_context_exactly_as_given(engine, context):
    for text in engine.complete(context, samples=3, length=8, seed=2):
        assert text.startswith(context)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
@hypothesis_settings(max_examples=60, deadline=None)
def test_any_context_is_completed(context):
    for text in SHARED.complete(context, samples=2, length=3, seed=2):
        assert text.startswith(context)
        text.encode("utf-8")


SHARED: Engine


@pytest.fixture(autouse=True, scope="module")
def shared_engine(engine):
    """Hypothesis calls a test many times and takes no fixtures with it."""
    global SHARED
    SHARED = engine


@pytest.mark.parametrize(
    ("context", "words", "expected"),
    [
        ("hello", ["world"], " world"),
        ("hello ", ["world"], "world"),
        ("hello\n", ["world"], "world"),
        ("hello", ["##ing", "world"], "ing world"),
        ("hello", [","], " ,"),
        ("hello", ["一", "丁"], "一丁"),
        ("一", ["hello"], "hello"),
        ("一", ["[SEP]", "丁"], "\n丁"),
        ("", ["hello", "world"], "hello world"),
    ],
)
def test_a_space_stands_only_where_the_tokenizer_joins_with_one(context, words, expected):
    tokenizer = tiny_tokenizer()
    prompt = Prompt(context, (MASK_ID, *tokenizer.encode(context)), 0)
    assert continuation(tokenizer, prompt, [tokenizer.vocabulary.index(word) for word in words]) == expected


BYTES = [f"<0x{byte:02X}>" for byte in "龘".encode()]


@pytest.mark.parametrize(
    ("words", "stop", "pushed", "text", "stopped"),
    [
        (["一", "丁", "七"], ["丁"], ["一", "", ""], "一", True),
        (["一", "丁", "七"], ["一"], ["", "", ""], "", True),
        (["一", "丁", "七"], ["丁万"], ["一", "", "丁七"], "一丁七", False),
        (["一", "丁", "丁", "万"], ["丁万"], ["一", "", "丁", ""], "一丁", True),
        # a stop string ends the text that is complete first; of two that end together the longer one
        (["一丁七万"], ["丁七万", "七"], ["一丁"], "一丁", True),
        (["一丁七万"], ["七", "丁七"], ["一"], "一", True),
        (["一", "丁七", "万"], ["一丁七上", "丁七"], ["", "一", ""], "一", True),
        (["hello", "world"], ["lo wo"], ["hel", ""], "hel", True),
        (["hello", "##ing"], ["oi"], ["hell", ""], "hell", True),
        # a character in bytes appears when it is whole, and may be a stop string
        (["一", *BYTES, "丁"], [], ["一", "", "", "龘", "丁"], "一龘丁", False),
        (["一", *BYTES, "丁"], ["龘"], ["一", "", "", "", ""], "一", True),
        (["一", *BYTES[:2]], [], ["一", "", ""], "一", False),
        (["一", "[SEP]", "丁"], ["\n"], ["一", "", ""], "一", True),
    ],
)
def test_text_is_given_as_it_settles_and_ends_before_the_stop_string(words, stop, pushed, text, stopped):
    tokenizer = tiny_tokenizer(words=[*dict.fromkeys(words)])
    growing = IncrementalDetokenizer(tokenizer, Prompt("", (MASK_ID,), 0), stop)
    assert [growing.push(tokenizer.vocabulary.index(word)) for word in words] == pushed
    assert growing.rest() == text.removeprefix("".join(pushed))
    assert growing.text == text
    assert growing.stopped == stopped


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=4), st.data())
def test_a_stop_string_is_found_whatever_the_borders_of_the_tokens(text, stop, data):
    ends = [next((end for end in range(len(text) + 1) if text[:end].endswith(one)), len(text) + 1) for one in stop]
    end, length = min(((end, -len(one)) for end, one in zip(ends, stop, strict=True)), default=(len(text) + 1, 0))
    expected = text if end > len(text) else text[: end + length]
    words = []
    rest = text
    while rest:
        size = data.draw(st.integers(1, min(5, len(rest))))
        words.append(rest[:size] if not words else "##" + rest[:size])
        rest = rest[size:]
    tokenizer = tiny_tokenizer(words=[*dict.fromkeys(words)] or ["一"])
    growing = IncrementalDetokenizer(tokenizer, Prompt("", (MASK_ID,), 0), stop)
    given = ""
    for word in words:
        given += growing.push(tokenizer.vocabulary.index(word))
        assert expected.startswith(given), "what was given out belonged to the stop string"
    assert given + growing.rest() == growing.text == expected
    assert growing.stopped == (end <= len(text))


def test_stop_strings_end_a_sample_and_free_its_row(engine):
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
    settings = Settings(temperature=0.3, top_k=3, repetition_penalty=1.5)
    for wanted in (0, 5):
        ticket = engine.submit(prompt, samples=2, length=12, settings=settings, seed=3, logprobs=wanted)
        for completion in ticket.future.result(WAIT):
            ids = [*prompt.ids, *completion.ids]
            with torch.inference_mode():
                scores = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
            for place, (id_, one) in enumerate(zip(completion.ids, completion.logprobs, strict=True)):
                row = scores[len(prompt.ids) + place - 1]
                assert one.token == engine.tokenizer.vocabulary[id_]
                assert one.logprob == pytest.approx(float(row[id_]), abs=1e-3)
                likeliest = {engine.tokenizer.vocabulary[best] for best in row.topk(wanted).indices.tolist()}
                assert set(one.top) == likeliest | {one.token}
                assert one.top[one.token] == one.logprob
                assert completion.text[2:][one.offset :].startswith(one.token.replace("[SEP]", "\n").strip("#"))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_prompt_is_scored_as_transformers_would(compiled):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with Engine(model, tokenizer, rows=4, precision="fp32" if compiled else None) as decoding:
        assert isinstance(decoding.decoder, CompiledDecoder) == compiled
        given = tokenizer.encode("一丁七\n乐")
        cases = [
            (decoding.prompt("一丁七\n乐", 0), 1),
            (decoding.prompt_of_ids([MASK_ID, *given], 0), 0),
            (decoding.prompt("一", 0), 1),
            (decoding.prompt("一丁七" * 50, 4), 0),
        ]
        for prompt, implied in cases:
            assert prompt.implied == implied
            with torch.inference_mode():
                scores = torch.log_softmax(model(torch.tensor([prompt.ids])).logits[0].double(), dim=-1)
            for length in (0, 4):
                ticket = decoding.submit(prompt, samples=2, length=length, seed=1, logprobs=2, scored=True)
                completions = ticket.future.result(WAIT)
                assert all(len(completion.ids) <= length for completion in completions)
                assert length or {completion.finish_reason for completion in completions} == {"length"}
                scored = ticket.prompt_logprobs
                assert [one.token for one in scored] == [tokenizer.vocabulary[id_] for id_ in prompt.ids[implied:]]
                for place, one in enumerate(scored, start=implied):
                    if place == 0:
                        assert one.logprob is None and one.top is None
                        continue
                    row, id_ = scores[place - 1], prompt.ids[place]
                    assert one.logprob == pytest.approx(float(row[id_]), abs=1e-4)
                    likeliest = {tokenizer.vocabulary[best] for best in row.topk(2).indices.tolist()}
                    assert set(one.top) == likeliest | {one.token} and one.top[one.token] == one.logprob
                    text = {"[SEP]": "\n", "[MASK]": ""}.get(one.token, one.token)
                    assert prompt.context[one.offset :].startswith(text)
        alone = decoding.submit(cases[0][0], samples=1, length=9, seed=1).future.result(WAIT)
        both = decoding.submit(cases[0][0], samples=1, length=9, seed=1, logprobs=0, scored=True).future.result(WAIT)
        assert both[0].text == alone[0].text


def test_ids_as_a_prompt_are_completed_like_their_text(engine):
    ids = engine.tokenizer.encode("一丁七")
    prompt = engine.prompt("一丁七", 5)
    assert engine.prompt_of_ids(ids, 5) == prompt
    assert engine.prompt_of_ids([MASK_ID, *ids], 5) == replace(prompt, implied=0)
    assert engine.prompt_of_ids(ids * 50, 10).cut > 0
    for wrong in (-1, len(engine.tokenizer)):
        with pytest.raises(ValueError, match=f"id {wrong} is not in the vocabulary"):
            engine.prompt_of_ids([wrong], 5)


def test_one_sample_can_be_cancelled_and_the_others_go_on(endless):
    prompt = endless.prompt("一", 40)
    whole = endless.submit(prompt, samples=3, length=40, seed=1).future.result(WAIT)
    seen = []

    def cancel_the_second(piece):
        seen.append(piece)
        if piece.sample == 1:
            ticket.cancel(1)

    holder = endless.submit(prompt, samples=8, length=3)  # all rows are taken until `ticket` is assigned
    ticket = endless.submit(prompt, samples=3, length=40, seed=1, on_delta=cancel_the_second)
    completions = ticket.future.result(WAIT)
    holder.future.result(WAIT)
    assert [c.finish_reason for c in completions] == ["length", "cancelled", "length"]
    assert len(completions[1].ids) <= 2 and (completions[0], completions[2]) == (whole[0], whole[2])


def test_tokens_are_counted():
    with Engine(endless_model(), tiny_tokenizer(), rows=4) as engine:
        ticket = engine.submit(engine.prompt("一丁", 8), samples=3, length=7)
        before = time.monotonic()
        ticket.future.result(WAIT)
        assert (engine.prompt_tokens, engine.generated_tokens) == (3, 21)
        assert before - WAIT < ticket.first_token_at <= time.monotonic()


def test_half_a_surrogate_pair_is_named_with_its_place(engine):
    with pytest.raises(ValueError, match=r"character 2 is half of a surrogate pair \(U\+D800\)"):
        engine.prompt("一\ud800", 5)


def test_a_long_context_is_cut_from_the_left_with_room_for_the_completion(engine):
    ids = engine.tokenizer.encode("一丁" * 50)
    prompt = engine.prompt("一丁" * 50, 10)
    assert prompt.ids == tuple(ids[-22:]) and prompt.cut == 101 - 22
    assert engine.prompt("一丁" * 50, 1000).ids == tuple(ids[-16:])
    fits = engine.prompt("一" * 31, 10)
    assert fits.cut == 0 and fits.ids == (MASK_ID, *engine.tokenizer.encode("一" * 31))
    assert engine.submit(fits, samples=1, length=10, seed=0).future.result(WAIT)


def test_positions_that_were_never_trained_are_not_used():
    with Engine(tiny_model(n_ctx=16, n_positions=64), tiny_tokenizer(), rows=1) as engine:
        assert engine.n_ctx == 16
        assert len(engine.prompt("一" * 40, 4).ids) == 12


# Life and death.


@pytest.fixture(scope="module")
def endless():
    with Engine(endless_model(), tiny_tokenizer(), rows=8) as engine:
        yield engine


def test_a_cancelled_request_frees_its_rows_and_one_that_waits_never_starts(endless):
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


def test_a_future_that_its_waiter_cancels_does_not_kill_the_engine(endless):
    engine = endless
    ticket = engine.submit(engine.prompt("一", 8), samples=2, length=20)
    assert not ticket.future.cancel()
    ticket.future.result(WAIT)
    assert engine.alive


def test_too_many_waiting_sequences_are_refused_at_once():
    with Engine(endless_model(), tiny_tokenizer(), rows=1, max_waiting=4) as engine:
        prompt = engine.prompt("一", 8)
        busy = engine.submit(prompt, samples=1, length=1_000_000)
        queued = engine.submit(prompt, samples=3, length=2)
        with pytest.raises(EngineFull, match="wait already"):
            for _ in range(3):
                engine.submit(prompt, samples=2, length=2)
        busy.cancel()
        assert len(queued.future.result(WAIT)) == 3


def test_everyone_hears_of_a_model_thread_that_died(monkeypatch, caplog):
    with Engine(tiny_model(), tiny_tokenizer(), rows=2) as engine:
        all_are_in = threading.Event()
        monkeypatch.setattr(engine.decoder, "step", lambda *_: all_are_in.wait(WAIT) / 0)
        tickets = [engine.submit(engine.prompt("一", 8), samples=2, length=20) for _ in range(3)]
        all_are_in.set()
        for ticket in tickets:
            with pytest.raises(EngineStopped, match="ZeroDivisionError"):
                ticket.future.result(WAIT)
        assert not engine.alive
        with pytest.raises(EngineStopped):
            engine.submit(engine.prompt("一", 8), samples=1, length=1)
    assert "the model thread has stopped" in caplog.text


def test_closing_lets_no_one_wait_and_leaves_no_thread():
    before = threading.active_count()
    with Engine(endless_model(), tiny_tokenizer(), rows=1) as engine:
        tickets = [engine.submit(engine.prompt("一", 8), samples=1, length=1_000_000) for _ in range(2)]
    for ticket in tickets:
        with pytest.raises(EngineStopped, match="closed"):
            ticket.future.result(WAIT)
    assert threading.active_count() == before
    with pytest.raises(EngineStopped, match="closed"):
        engine.submit(Prompt("", (MASK_ID,), 0), samples=1, length=1)


def test_a_vocabulary_larger_than_the_model_is_refused():
    with pytest.raises(ValueError, match="do not belong together"):
        Engine(tiny_model(vocab_size=150), tiny_tokenizer())


def test_devices_by_name():
    assert choose_device("cpu") == torch.device("cpu")
    for name in ("gpu", "-1", "99", "x,0"):
        with pytest.raises(ValueError, match=f"--device {name}"):
            choose_device(name)
    if not torch.cuda.is_available():
        assert choose_device("auto") == torch.device("cpu")
        with pytest.raises(ValueError, match="use --device cpu"):
            choose_device("0,1,2,3")
