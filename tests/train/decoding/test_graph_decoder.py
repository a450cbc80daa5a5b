"""The step that CUDA captures, on the CPU: against Decoder and transformers, recorded and repeated as a graph is."""

from __future__ import annotations

import contextlib
import random

import pytest
import torch
from book_order import CLS_ID, MASK_ID
from recorded_graph import RecordedGraph
from tiny_model import endless_model, tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2_chinese.decoding import engine
from gpt2_chinese.decoding.completion import Settings
from gpt2_chinese.decoding.decoder import Decoder
from gpt2_chinese.decoding.engine import Engine
from gpt2_chinese.decoding.graph_decoder import WARM_UPS, CudaCapture, GraphDecoder, Size, decoder_on_gpu, doubled

WAIT = 60


def random_model(**shape) -> GPT2LMHeadModel:
    """Weights of such a size that the logits are far apart and attention is far from uniform."""
    torch.manual_seed(3)
    shape = {"vocab_size": 203, "n_positions": 150, "n_embd": 48, "n_layer": 2, "n_head": 4} | shape
    model = GPT2LMHeadModel(GPT2Config(bos_token_id=MASK_ID, eos_token_id=CLS_ID, **shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def random_ids(count: int, seed: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(203) for _ in range(count)]


def all_sizes(decoder: GraphDecoder) -> list[Size]:
    longest = decoder.keys[0].shape[2]
    sizes = [Size(rows, keys) for rows in doubled(1, decoder.rows) for keys in doubled(64, longest)]
    return sorted(sizes, key=lambda size: (size.rows * size.keys, size))


def load(decoder: Decoder, texts: list[list[int]]) -> list[int]:
    """Prefill each text into its row; give the lengths."""
    for row, ids in enumerate(texts):
        decoder.load(row, decoder.prefill(ids))
    return [len(ids) for ids in texts]


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
def test_every_size_gives_the_logits_of_the_plain_step_and_of_transformers(shape):
    model = random_model(**shape)
    n_ctx, vocab_size = model.config.n_positions, model.config.vocab_size
    plain, decoder = Decoder(model, rows=5), GraphDecoder(model, rows=5)
    assert decoder.sizes[-1] == Size(5, -(-n_ctx // 16) * 16) and decoder.sizes[-1].keys >= n_ctx
    tried = set()
    for size in all_sizes(decoder):
        decoder.sizes = [size]
        longest = min(size.keys, n_ctx) - 1
        texts = [[i % vocab_size for i in random_ids(longest, 0)], [2], [7 % vocab_size] * (longest // 2 + 1)]
        texts = (texts * 2)[: size.rows]
        lengths = load(plain, texts)
        assert load(decoder, texts) == lengths
        tokens = list(range(len(texts)))
        logits = decoder.step(tokens, lengths)
        assert torch.allclose(logits, plain.step(tokens, lengths), atol=1e-5, rtol=1e-5)
        with torch.inference_mode():
            for row, ids in enumerate(texts):
                expected = model(torch.tensor([[*ids, tokens[row]]])).logits[0, -1]
                assert torch.allclose(logits[row], expected, atol=1e-4)
        tried.add(size)
    assert len(tried) >= 4


def test_a_row_has_the_same_bits_alone_in_any_crowd_and_at_any_size():
    decoder, lonely = (GraphDecoder(random_model(), rows=12) for _ in range(2))
    texts = [random_ids(length, length) for length in (1, 30, 62, 63, 64, 65, 100, 126, 127, 128, 140, 2)]
    lengths = load(decoder, texts)
    alone = []
    for row, ids in enumerate(texts):
        lonely.load(0, lonely.prefill(ids))
        alone.append(lonely.step([100 + row], [len(ids)])[0])
    used = set()
    for count in range(1, 13):
        used.add(next(size for size in decoder.sizes if size.rows >= count and size.keys > max(lengths[:count])))
        together = decoder.step([100 + row for row in range(count)], lengths[:count])
        assert torch.equal(together, torch.stack(alone[:count])), count
    assert len(used) > 1 or len(decoder.sizes) == 1


def test_a_size_that_rounds_otherwise_is_not_used():
    class Uneven(GraphDecoder):
        def _static_step(self, size):
            super()._static_step(size)
            if size.rows == 2:
                self._outputs[1, 5] = torch.nextafter(self._outputs[1, 5], torch.tensor(torch.inf))

    even, uneven = GraphDecoder(random_model(), rows=4), Uneven(random_model(), rows=4)
    assert not any(size.rows == 2 for size in uneven.sizes)
    assert [size for size in even.sizes if size.rows != 2] == uneven.sizes


def test_rows_that_are_not_in_the_step_keep_what_they_hold():
    decoder = GraphDecoder(random_model(), rows=7)
    lengths = load(decoder, [random_ids(9, row) for row in range(7)])
    before = [part[5:7].clone() for part in (*decoder.keys, *decoder.values)]
    for size in all_sizes(decoder):
        if size.rows >= 5:
            decoder.sizes = [size]
            decoder.step([8] * 5, lengths[:5])
    for part, held in zip((*decoder.keys, *decoder.values), before, strict=True):
        assert torch.equal(part[5:7], held)


def test_logits_of_a_step_stay_when_the_next_one_is_done():
    decoder = GraphDecoder(random_model(), rows=2)
    load(decoder, [[2, 9], [2, 8]])
    first = decoder.step([4, 5], [2, 2])
    kept = first.clone()
    decoder.step([6, 7], [3, 3])
    assert torch.equal(first, kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_near_and_what_overflowed_is_not_left_to_the_next_text(dtype):
    model = random_model()
    decoder, exact = GraphDecoder(model, rows=3, dtype=dtype), Decoder(model, rows=3)
    assert decoder.prefill([2]).keys[0].dtype == decoder.dtype == dtype
    if dtype == torch.float16:
        old = decoder.prefill([2] * 40)
        with torch.inference_mode():
            for part in (*old.keys, *old.values):
                part[:, 20:] = torch.inf
                part[:, 30:] = torch.nan
        decoder.load(1, old)
    texts = [random_ids(length, length) for length in (5, 9, 14)]
    lengths = load(decoder, texts)
    load(exact, texts)
    logits, expected = decoder.step([3, 4, 5], lengths), exact.step([3, 4, 5], lengths)
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()


# As a graph.


def recorded(decoder: GraphDecoder, captured: list[RecordedGraph] | None = None) -> GraphDecoder:
    """The decoder with recordings in place of CUDA's captures, which are collected."""

    def capture(work):
        graph = RecordedGraph(work)
        if captured is not None:
            captured.append(graph)
        return graph

    decoder.capture = capture
    return decoder


def test_one_recording_of_each_size_does_for_all_tokens_lengths_and_rows():
    plain, captured = GraphDecoder(random_model(), rows=6), []
    decoder = recorded(GraphDecoder(random_model(), rows=6), captured)
    decoder.sizes = plain.sizes = all_sizes(decoder)
    source = random.Random(2)
    for _ in range(60):
        count = source.randint(1, 6)
        texts = [random_ids(source.randint(1, 149), source.random()) for _ in range(count)]
        lengths = load(plain, texts)
        load(decoder, texts)
        tokens = random_ids(count, source.random())
        assert torch.equal(decoder.step(tokens, lengths), plain.step(tokens, lengths))
    assert len(captured) == len(decoder._graphs) <= len(decoder.sizes)
    assert len(captured) >= 8


def test_a_graph_is_not_computed_by_the_step_s_python(monkeypatch):
    decoder = recorded(GraphDecoder(random_model(), rows=1))
    load(decoder, [[2, 9]])
    expected = decoder.step([4], [2])
    monkeypatch.setattr(decoder, "_static_step", None)
    assert torch.equal(decoder.step([4], [2]), expected)


def test_a_step_that_cannot_be_captured_is_done_without_a_graph_and_said_once(capsys):
    model = random_model()
    expected = GraphDecoder(model, rows=2)
    decoder = recorded(GraphDecoder(model, rows=2))
    activation = decoder.activation
    decoder.activation = lambda hidden: activation(hidden) * int(torch.ones(1, device=hidden.device))
    texts = [[2, 9, 8], [2]]
    lengths = load(decoder, texts)
    load(expected, texts)
    for token in (4, 5):
        assert torch.equal(decoder.step([token] * 2, lengths), expected.step([token] * 2, lengths))
    assert not decoder._graphs
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: decoding without a CUDA graph, which is slower: operation not permitted")


@pytest.mark.parametrize("writes", [True, False])
def test_a_graph_with_other_numbers_than_its_step_or_none_is_not_used(writes, capsys):
    decoder = GraphDecoder(random_model(), rows=1)
    load(decoder, [[2, 9]])
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
    assert "a replayed step has other numbers" in capsys.readouterr().err


def test_logits_that_are_no_numbers_do_not_end_the_graphs(capsys):
    decoder = recorded(GraphDecoder(random_model(), rows=1))
    decoder.norm[1][0] = torch.nan
    load(decoder, [[2, 9]])
    assert decoder.step([4], [2]).isnan().all()
    assert decoder._graphs and not capsys.readouterr().err


class FakeCuda:
    """What CudaCapture asks of torch.cuda, noted in its order."""

    def __init__(self, monkeypatch) -> None:
        self.events: list = []
        self.streams = ["current"]
        made = iter(["warming", "capturing"])
        for name in ("device", "stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "Stream", lambda: FakeStream(next(made), self.events))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: FakeStream(self.streams[-1], self.events))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
        end = lambda *arguments: self.events.append(("memory ended", *arguments))  # noqa: E731
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)

    @contextlib.contextmanager
    def device(self, device):
        self.events.append(("device", device.index))
        yield

    @contextlib.contextmanager
    def stream(self, stream):
        before = list(self.streams)
        self.streams.append(stream.name)
        yield
        self.streams[:] = before

    @contextlib.contextmanager
    def graph(self, graph, *, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        self.streams.append(stream.name)
        self.events.append(("capture", pool))
        yield  # what fails within leaves the stream as it is, as torch does
        self.streams.pop()


class FakeStream:
    def __init__(self, name, events) -> None:
        self.name, self.events = name, events

    def wait_stream(self, other) -> None:
        self.events.append((self.name, "waits for", other.name))


def test_a_capture_is_warmed_up_beside_the_graphs_memory_and_one_that_fails_leaves_no_trace(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    capture = CudaCapture(torch.device("cuda", 1))
    capture(lambda: cuda.events.append(cuda.streams[-1]))
    warmed = [("warming", "waits for", "current"), *["warming"] * WARM_UPS, ("current", "waits for", "warming")]
    captured = [("device", 1), *warmed, ("capture", (0, 7))]
    assert cuda.events == [("device", 1), *captured, "capturing"]
    assert cuda.streams == ["current"]
    cuda.events.clear()

    def fails() -> None:
        if cuda.streams[-1] == "capturing":
            raise RuntimeError("operation not permitted")
        cuda.events.append(cuda.streams[-1])

    with pytest.raises(RuntimeError, match="not permitted"):
        capture(fails)
    assert cuda.events == [*captured, ("memory ended", 1, (0, 7))]
    assert len(capture._graphs) == 2, "a graph whose capture failed must live on"


def test_an_engine_gives_the_texts_of_the_plain_decoder_alone_in_a_crowd_and_behind_a_full_window():
    model = endless_model(n_ctx=80)
    settings = [Settings(temperature=0), Settings(temperature=0, repetition_penalty=2.0), Settings(), Settings(top_k=0)]

    def texts(decoding: Engine, together: bool) -> list[list[str]]:
        def submit(number: int):
            prompt = decoding.prompt("一丁七"[: number % 4] * 9, 100)
            return decoding.submit(prompt, samples=2, length=100, settings=settings[number % 4], seed=number)

        if not together:
            return [[one.text for one in submit(number).future.result(WAIT)] for number in range(8)]
        tickets = [submit(number) for number in range(8)]
        return [[one.text for one in ticket.future.result(WAIT)] for ticket in tickets]

    with Engine(model, tiny_tokenizer(), rows=5) as decoding:
        expected = texts(decoding, together=False)
    decoding = Engine(model, tiny_tokenizer(), rows=5)
    decoding.decoder = recorded(GraphDecoder(model, rows=5))
    with decoding:
        assert texts(decoding, together=True) == expected
        assert texts(decoding, together=False) == expected
        assert len(decoding.decoder._graphs) > 1


def test_the_cpu_has_no_graphs_and_a_gpu_computes_as_precision_says(monkeypatch, capsys):
    model = random_model()
    assert GraphDecoder(model, rows=1).capture is None
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("auto", torch.float32), (None, None)):
        assert decoder_on_gpu(model, 1, precision).dtype == (dtype or torch.float32)
    assert decoder_on_gpu(model.bfloat16(), 1, "auto").dtype == torch.bfloat16
    assert not capsys.readouterr().err
    assert decoder_on_gpu(model.float(), 1, "int8").dtype == torch.float32
    assert "--precision int8 is for CPUs" in capsys.readouterr().err
    made = []
    monkeypatch.setattr(engine, "decoder_on_gpu", lambda *arguments: made.append(arguments) or Decoder(model, 1))

    class OnGpu:
        """A model that says it is on a GPU."""

        device = torch.device("cuda")

    Engine(OnGpu(), tiny_tokenizer(words=["一"]), rows=1, precision="bf16")
    assert [arguments[1:] for arguments in made] == [(1, "bf16")]
