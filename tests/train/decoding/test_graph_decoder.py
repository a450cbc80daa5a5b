"""The step that CUDA captures, on the CPU: beside Decoder and transformers, recorded and replayed like a graph."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch
from recorded_graph import FakeCuda, RecordedGraph
from tiny_model import endless_model, prefill_slots, random_model, tiny_tokenizer

from gpt2_chinese.decoding import engine
from gpt2_chinese.decoding.completion import SamplingParams
from gpt2_chinese.decoding.decoder import Decoder
from gpt2_chinese.decoding.engine import Engine
from gpt2_chinese.decoding.graph_decoder import (
    WARMUP_STEPS,
    CudaCapture,
    GraphDecoder,
    StepSize,
    doubling,
    make_gpu_decoder,
)

WAIT = 60
long_model = partial(random_model, n_positions=150)  # of several sizes


def random_ids(count: int, seed: float) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(203) for _ in range(count)]


def all_sizes(decoder: GraphDecoder) -> list[StepSize]:
    cache_length = decoder.key_cache[0].shape[2]
    sizes = [
        StepSize(num_seqs, num_keys)
        for num_seqs in doubling(1, decoder.max_num_seqs)
        for num_keys in doubling(64, cache_length)
    ]
    return sorted(sizes, key=lambda size: (size.num_seqs * size.num_keys, size))


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"n_embd": 33, "n_head": 3, "n_inner": 50, "n_positions": 70},
        {"activation_function": "relu", "scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False},
        {"vocab_size": 256, "n_positions": 128, "n_layer": 1},
        {"n_positions": 5},
    ],
    ids=str,
)
def test_every_size_gives_the_logits_of_the_eager_step_and_of_transformers(shape):
    model = long_model(**shape)
    n_ctx, vocab_size = model.config.n_positions, model.config.vocab_size
    eager, decoder = Decoder(model, max_num_seqs=5), GraphDecoder(model, max_num_seqs=5)
    assert decoder.sizes[-1] == StepSize(5, -(-n_ctx // 16) * 16) and decoder.sizes[-1].num_keys >= n_ctx
    tried = set()
    for size in all_sizes(decoder):
        decoder.sizes = [size]
        longest = min(size.num_keys, n_ctx) - 1
        texts = [[i % vocab_size for i in random_ids(longest, 0)], [2], [7 % vocab_size] * (longest // 2 + 1)]
        texts = (texts * 2)[: size.num_seqs]
        lengths = prefill_slots(eager, texts)
        assert prefill_slots(decoder, texts) == lengths
        tokens = list(range(len(texts)))
        logits = decoder.step(tokens, lengths)
        assert torch.allclose(logits, eager.step(tokens, lengths), atol=1e-5, rtol=1e-5)
        with torch.inference_mode():
            for slot, ids in enumerate(texts):
                expected = model(torch.tensor([[*ids, tokens[slot]]])).logits[0, -1]
                assert torch.allclose(logits[slot], expected, atol=1e-4)
        tried.add(size)
    assert len(tried) >= 4


def test_logits_are_the_same_to_the_bit_alone_in_any_batch_and_at_any_size():
    decoder, single = (GraphDecoder(long_model(), max_num_seqs=12) for _ in range(2))
    texts = [random_ids(length, length) for length in (1, 30, 62, 63, 64, 65, 100, 126, 127, 128, 140, 2)]
    lengths = prefill_slots(decoder, texts)
    alone = []
    for slot, ids in enumerate(texts):
        single.load_prefill(0, single.prefill(ids))
        alone.append(single.step([100 + slot], [len(ids)])[0])
    used = set()
    for count in range(1, 13):
        longest = max(lengths[:count])
        used.add(next(size for size in decoder.sizes if size.num_seqs >= count and size.num_keys > longest))
        together = decoder.step([100 + slot for slot in range(count)], lengths[:count])
        assert torch.equal(together, torch.stack(alone[:count])), count
    assert len(used) > 1 or len(decoder.sizes) == 1


def test_a_size_that_rounds_otherwise_is_not_used():
    class Uneven(GraphDecoder):
        def _static_step(self, size):
            super()._static_step(size)
            if size.num_seqs == 2:
                self._outputs[1, 5] = torch.nextafter(self._outputs[1, 5], torch.tensor(torch.inf))

    even, uneven = GraphDecoder(long_model(), max_num_seqs=4), Uneven(long_model(), max_num_seqs=4)
    assert not any(size.num_seqs == 2 for size in uneven.sizes)
    assert [size for size in even.sizes if size.num_seqs != 2] == uneven.sizes


def test_slots_that_are_not_in_the_step_keep_their_keys_and_values():
    decoder = GraphDecoder(long_model(), max_num_seqs=7)
    lengths = prefill_slots(decoder, [random_ids(9, slot) for slot in range(7)])
    before = [cache[5:7].clone() for cache in (*decoder.key_cache, *decoder.value_cache)]
    for size in all_sizes(decoder):
        if size.num_seqs >= 5:
            decoder.sizes = [size]
            decoder.step([8] * 5, lengths[:5])
    for cache, expected in zip((*decoder.key_cache, *decoder.value_cache), before, strict=True):
        assert torch.equal(cache[5:7], expected)


def test_the_logits_of_a_step_are_not_overwritten_by_the_next_one():
    decoder = GraphDecoder(long_model(), max_num_seqs=2)
    prefill_slots(decoder, [[2, 9], [2, 8]])
    first = decoder.step([4, 5], [2, 2])
    copy = first.clone()
    decoder.step([6, 7], [3, 3])
    assert torch.equal(first, copy)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_near_fp32_and_an_overflow_does_not_reach_the_next_sequence_of_a_slot(dtype):
    model = long_model()
    decoder, exact = GraphDecoder(model, max_num_seqs=3, dtype=dtype), Decoder(model, max_num_seqs=3)
    assert decoder.prefill([2]).keys[0].dtype == decoder.dtype == dtype
    if dtype == torch.float16:
        former = decoder.prefill([2] * 40)
        with torch.inference_mode():
            for part in (*former.keys, *former.values):
                part[:, 20:] = torch.inf
                part[:, 30:] = torch.nan
        decoder.load_prefill(1, former)
    texts = [random_ids(length, length) for length in (5, 9, 14)]
    lengths = prefill_slots(decoder, texts)
    prefill_slots(exact, texts)
    logits, expected = decoder.step([3, 4, 5], lengths), exact.step([3, 4, 5], lengths)
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()


# As a graph.


def recorded(decoder: GraphDecoder, captured: list[RecordedGraph] | None = None) -> GraphDecoder:
    """The decoder with recordings, which are appended to `captured`, in place of CUDA graphs."""

    def capture(work):
        graph = RecordedGraph(work)
        if captured is not None:
            captured.append(graph)
        return graph

    decoder.capture = capture
    return decoder


def test_one_graph_of_each_size_serves_all_tokens_lengths_and_slots():
    static, captured = GraphDecoder(long_model(), max_num_seqs=6), []
    decoder = recorded(GraphDecoder(long_model(), max_num_seqs=6), captured)
    decoder.sizes = static.sizes = all_sizes(decoder)
    source = random.Random(2)
    for _ in range(60):
        count = source.randint(1, 6)
        texts = [random_ids(source.randint(1, 149), source.random()) for _ in range(count)]
        lengths = prefill_slots(static, texts)
        prefill_slots(decoder, texts)
        tokens = random_ids(count, source.random())
        assert torch.equal(decoder.step(tokens, lengths), static.step(tokens, lengths))
    assert len(captured) == len(decoder._graphs) <= len(decoder.sizes)
    assert len(captured) >= 8


def test_a_replayed_step_does_not_run_its_python(monkeypatch):
    decoder = recorded(GraphDecoder(long_model(), max_num_seqs=1))
    prefill_slots(decoder, [[2, 9]])
    expected = decoder.step([4], [2])
    monkeypatch.setattr(decoder, "_static_step", None)
    assert torch.equal(decoder.step([4], [2]), expected)


def test_a_step_that_cannot_be_captured_runs_without_a_graph_and_says_so_once(capsys):
    model = long_model()
    expected = GraphDecoder(model, max_num_seqs=2)
    decoder = recorded(GraphDecoder(model, max_num_seqs=2))
    activation = decoder.activation
    decoder.activation = lambda hidden: activation(hidden) * int(torch.ones(1, device=hidden.device))
    texts = [[2, 9, 8], [2]]
    lengths = prefill_slots(decoder, texts)
    prefill_slots(expected, texts)
    for token in (4, 5):
        assert torch.equal(decoder.step([token] * 2, lengths), expected.step([token] * 2, lengths))
    assert not decoder._graphs
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: decoding without a CUDA graph, which is slower: operation not permitted")


@pytest.mark.parametrize("writes", [True, False])
def test_a_graph_that_writes_other_logits_than_its_step_or_none_is_not_used(writes, capsys):
    decoder = GraphDecoder(long_model(), max_num_seqs=1)
    prefill_slots(decoder, [[2, 9]])
    expected = decoder.step([4], [2])

    class Wrong:
        def __init__(self, work) -> None:
            pass

        def replay(self) -> None:
            if writes:
                decoder._outputs.fill_(1.0)

    decoder.capture = Wrong
    assert torch.equal(decoder.step([4], [2]), expected)
    assert torch.equal(decoder.step([4], [2]), expected)
    assert "the replayed graph gives other logits than the step itself" in capsys.readouterr().err


def test_nan_logits_do_not_stop_the_use_of_graphs(capsys):
    decoder = recorded(GraphDecoder(long_model(), max_num_seqs=1))
    decoder.ln_f[1][0] = torch.nan
    prefill_slots(decoder, [[2, 9]])
    assert decoder.step([4], [2]).isnan().all()
    assert decoder._graphs and not capsys.readouterr().err


def test_a_capture_is_warmed_up_on_another_stream_and_a_failed_one_restores_stream_and_allocator(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    capture = CudaCapture(torch.device("cuda", 1))
    capture(lambda: cuda.events.append(cuda.streams[-1]))
    warmup = [("warm-up", "waits for", "current"), *["warm-up"] * WARMUP_STEPS, ("current", "waits for", "warm-up")]
    captured = [("device", 1), *warmup, ("begin capture", (0, 7))]
    assert cuda.events == [("device", 1), *captured, "capture"]
    assert cuda.streams == ["current"]
    cuda.events.clear()

    def fails() -> None:
        if cuda.streams[-1] == "capture":
            raise RuntimeError("operation not permitted")
        cuda.events.append(cuda.streams[-1])

    with pytest.raises(RuntimeError, match="not permitted"):
        capture(fails)
    assert cuda.events == [*captured, ("allocation to pool ended", 1, (0, 7))]
    assert len(capture._graphs) == 2, "a graph whose capture failed must be kept"


def test_an_engine_gives_the_texts_of_the_eager_decoder_alone_in_a_batch_and_beyond_n_ctx():
    model = endless_model(n_ctx=80)
    params = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0, repetition_penalty=2.0),
        SamplingParams(),
        SamplingParams(top_k=0),
    ]

    def texts(engine: Engine, together: bool) -> list[list[str]]:
        def submit(number: int):
            prompt = engine.prompt("一丁七"[: number % 4] * 9, 100)
            return engine.submit(prompt, samples=2, length=100, sampling_params=params[number % 4], seed=number)

        if not together:
            return [[one.text for one in submit(number).future.result(WAIT)] for number in range(8)]
        requests = [submit(number) for number in range(8)]
        return [[one.text for one in request.future.result(WAIT)] for request in requests]

    with Engine(model, tiny_tokenizer(), max_num_seqs=5) as eager:
        expected = texts(eager, together=False)
    graphs = Engine(model, tiny_tokenizer(), max_num_seqs=5)
    graphs.decoder = recorded(GraphDecoder(model, max_num_seqs=5))
    with graphs:
        assert texts(graphs, together=True) == expected
        assert texts(graphs, together=False) == expected
        assert len(graphs.decoder._graphs) > 1


def test_a_cpu_has_no_graphs_and_precision_chooses_the_dtype_on_a_gpu(monkeypatch, capsys):
    model = long_model()
    assert GraphDecoder(model, max_num_seqs=1).capture is None
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("auto", torch.float32), (None, None)):
        assert make_gpu_decoder(model, 1, precision).dtype == (dtype or torch.float32)
    assert make_gpu_decoder(model.bfloat16(), 1, "auto").dtype == torch.bfloat16
    assert not capsys.readouterr().err
    assert make_gpu_decoder(model.float(), 1, "int8").dtype == torch.float32
    assert "--precision int8 is for CPUs" in capsys.readouterr().err
    calls = []
    monkeypatch.setattr(engine, "make_gpu_decoder", lambda *arguments: calls.append(arguments) or Decoder(model, 1))

    class OnGpu:
        """A model that says it is on a GPU."""

        device = torch.device("cuda")

    Engine(OnGpu(), tiny_tokenizer(words=["一"]), max_num_seqs=1, precision="bf16")
    assert [arguments[1:] for arguments in calls] == [(1, "bf16")]
