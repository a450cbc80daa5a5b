"""On a GPU: precisions, torch.compile, checkpoints, decoding. Skipped without one; `pytest -m gpu` runs these."""

from __future__ import annotations

import os
import random
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from book_order import CLS_ID, MASK_ID
from small_run import assert_same_weights, scalars, weights, write_documents, write_shape
from tiny_model import (
    Characters,
    endless_model,
    greedy_by_transformers,
    prefill_slots,
    random_prompts,
    save_tiny_model,
    tiny_model,
    tiny_tokenizer,
)
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2_chinese.decoding.completion import SamplingParams
from gpt2_chinese.decoding.decoder import Decoder
from gpt2_chinese.decoding.engine import Engine, choose_device
from gpt2_chinese.decoding.graph_decoder import GraphDecoder
from gpt2_chinese.decoding.sampling import sample_tokens, sequence_seed, uniform_random
from gpt2_chinese.model_folder import load_model, load_weights
from gpt2_chinese.text.word_tokenizer import WordTokenizer
from gpt2_chinese.training.character_vectors import CharacterVectors
from gpt2_chinese.training.checkpoints import checkpoints_in
from gpt2_chinese.training.loss import WindowLoss
from gpt2_chinese.training.muon import Muon

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    # Other versions of torch and Triton have warnings of their own while they compile.
    pytest.mark.filterwarnings("default"),
]

DROPOUT = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
SHAPE = {"n_embd": 64, "n_ctx": 16, "n_positions": 16}


@pytest.fixture(autouse=True)
def files(train):
    write_documents([20] * 30)
    write_shape(**SHAPE)


def run(train, name: str, *flags: str, device: str = "0") -> int:
    """A small training run, with its files in the folder `name`."""
    argv = ["--device", device, "--model_config", "shape.json", "--lr", "3e-3", "--epochs", "2", "--batch_size", "4"]
    argv += ["--val_fraction", "0.1", "--stride", "9", "--compile", "off", "--output_dir", name]
    return train.main([*argv, "--writer_dir", f"{name}/tb", *flags])


def losses(name: str) -> list[float]:
    return scalars(f"{name}/tb")["loss"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_fp32_losses_are_those_of_the_cpu_up_to_rounding_although_the_vocabulary_is_padded(train, optimizer):
    flags = ["--precision", "fp32", "--optimizer", optimizer]
    if optimizer == "muon":
        flags += ["--character_lr", "1e-2"]
    run(train, "cpu", *flags, device="cpu")
    run(train, "gpu", *flags)
    np.testing.assert_allclose(losses("gpu"), losses("cpu"), rtol=2e-3 if optimizer == "muon" else 1e-4)
    assert load_model("gpu/final_model")[0].config.vocab_size == 35
    measured = [scalars(f"{name}/tb")["validation_bits_per_character"] for name in ("gpu", "cpu")]
    np.testing.assert_allclose(measured[0], measured[1], rtol=2e-3)


@pytest.mark.parametrize(
    "flags", [[], ["--gradient_checkpointing"], pytest.param(["--compile", "on"], marks=pytest.mark.slow)]
)
def test_a_trigram_is_learnt_from_as_on_the_cpu(train, flags):
    taught = ["--precision", "fp32", "--ngram_share", "0.4"]
    run(train, "cpu", *taught, device="cpu")
    run(train, "gpu", *taught, *flags)
    np.testing.assert_allclose(losses("gpu"), losses("cpu"), rtol=1e-4)


@pytest.mark.parametrize("flags", [["--precision", "bf16"], ["--fp16"]])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_lower_precision_stays_near_fp32(train, flags, optimizer):
    run(train, "exact", "--precision", "fp32", "--optimizer", optimizer)
    run(train, "low", *flags, "--optimizer", optimizer)
    # With fp16 the first updates may be skipped, until the loss scale is small enough.
    np.testing.assert_allclose(losses("low"), losses("exact"), rtol=0.05)
    assert all(torch.isfinite(tensor).all() for tensor in weights("low/final_model").values())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_fp16_throughout_trains_with_finite_weights_and_a_falling_loss(train, optimizer):
    """O3 keeps the weights and the optimizer state in fp16, so its losses may be far from those of fp32."""
    run(train, "fp16", "--fp16", "--fp16_opt_level", "O3", "--optimizer", optimizer)
    tensors = weights("fp16/final_model").values()
    assert all(tensor.dtype == torch.float16 and torch.isfinite(tensor).all() for tensor in tensors)
    assert np.mean(losses("fp16")[-8:]) < np.mean(losses("fp16")[:8])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_losses_are_the_eager_ones_up_to_rounding(train, capsys, precision):
    run(train, "eager", "--precision", precision)
    run(train, "compiled", "--precision", precision, "--compile", "on")
    assert "compiling" in capsys.readouterr().out
    np.testing.assert_allclose(losses("compiled"), losses("eager"), rtol=1e-4 if precision == "fp32" else 0.02)


@pytest.mark.parametrize(
    "flags",
    [
        ["--precision", "fp32"],
        ["--precision", "bf16"],
        ["--fp16"],
        ["--precision", "bf16", "--optimizer", "muon"],
        ["--precision", "bf16", "--gradient_checkpointing"],
        ["--precision", "fp32", "--ngram_share", "0.4", "--document_mask"],
        ["--precision", "bf16", "--teacher", "teacher/final_model"],
        pytest.param(["--precision", "bf16", "--compile", "on"], marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_ends_with_the_same_bits(train, monkeypatch, flags):
    write_shape(**SHAPE, **DROPOUT)
    deterministic = torch.are_deterministic_algorithms_enabled()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)  # otherwise the order of the embedding's gradient varies
    try:
        if "--teacher" in flags:
            run(train, "teacher")
        run(train, "whole", *flags)
        original, calls = train.train_update, []

        def stopping(*args, **kwargs):
            calls.append(1)
            if len(calls) == 7:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(train, "train_update", stopping)
            assert run(train, "parts", *flags) == 143
        assert checkpoints_in(Path("parts/checkpoints"))[0][0] == 7
        assert run(train, "parts", *flags, "--resume") == 0
    finally:
        torch.use_deterministic_algorithms(deterministic)
    assert losses("parts") == losses("whole")
    assert_same_weights(weights("whole/final_model"), weights("parts/final_model"))


def test_updates_that_are_not_finite_are_skipped_without_synchronization(train, monkeypatch):
    original, calls = WindowLoss.forward, []

    def poisoned(self, *given):
        calls.append(1)
        loss = original(self, *given)
        return loss * float("nan") if len(calls) in (3, 4) else loss

    monkeypatch.setattr(WindowLoss, "forward", poisoned)
    for optimizer in ("adamw", "muon"):
        calls.clear()
        assert run(train, optimizer, "--precision", "fp32", "--optimizer", optimizer, "--log_step", "5") == 0
        assert all(torch.isfinite(tensor).all() for tensor in weights(f"{optimizer}/final_model").values())


def test_out_of_memory_is_an_error_that_says_how_much_was_wanted(train, monkeypatch):
    def greedy(*_, **__):
        return torch.empty(1 << 50, dtype=torch.uint8, device="cuda")

    monkeypatch.setattr(train, "train_update", greedy)
    with pytest.raises(ValueError, match=r"micro-batch of 4 windows of 16 tokens, when [\d.]+ \w+ more were wanted"):
        run(train, "greedy")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="a single GPU")
def test_two_gpus_equal_one(train):
    run(train, "one", "--precision", "fp32")
    run(train, "two", "--precision", "fp32", device="0,1")
    np.testing.assert_allclose(losses("two"), losses("one"), rtol=1e-4)


# Decoding.

WAIT = 600
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GREEDY = SamplingParams(temperature=0)


def wide_model(n_positions: int = 300) -> GPT2LMHeadModel:
    """Heads of 64 as in GPT-2, which the fused attention kernels take, an odd vocabulary, and several sizes of keys."""
    torch.manual_seed(5)
    shape = {"vocab_size": 1005, "n_positions": n_positions, "n_embd": 256, "n_layer": 3, "n_head": 4}
    config = GPT2Config(bos_token_id=MASK_ID, eos_token_id=CLS_ID, **shape)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model.cuda()


def random_texts(count: int, longest: int) -> list[list[int]]:
    source = random.Random(1)
    return [[source.randrange(1005) for _ in range(source.randint(1, longest))] for _ in range(count)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_graph_gives_the_bits_of_its_step_and_the_logits_of_the_eager_one(dtype, capsys):
    model = wide_model()
    graphs, steps, exact = (GraphDecoder(model, 12, kind) for kind in (dtype, dtype, torch.float32))
    steps.capture = exact.capture = None
    eager = Decoder(model, 12, dtype)
    source = random.Random(2)
    for _ in range(30):
        texts = random_texts(12, 299)[: source.randint(1, 12)]
        source.shuffle(texts)
        lengths = prefill_slots(graphs, texts)
        for decoder in (steps, exact, eager):
            prefill_slots(decoder, texts)
        tokens = [source.randrange(1005) for _ in texts]
        logits = graphs.step(tokens, lengths)
        assert torch.equal(logits, steps.step(tokens, lengths))
        expected = exact.step(tokens, lengths)
        tolerance = (1e-4 if dtype == torch.float32 else 0.1) * float(expected.abs().max())
        assert (logits - expected).abs().max() < tolerance
        assert (eager.step(tokens, lengths) - expected).abs().max() < tolerance
    print("sizes:", *graphs.sizes, "padded to a multiple of", graphs.pad_to_multiple_of)
    assert len(graphs._graphs) > 1 and graphs.capture is not None
    assert "without a CUDA graph" not in capsys.readouterr().err


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_on_a_gpu_are_the_same_to_the_bit_alone_and_in_any_batch(dtype):
    model = wide_model()
    batched, single = (GraphDecoder(model, 32, dtype) for _ in range(2))
    texts = random_texts(32, 299)
    lengths = prefill_slots(batched, texts)
    alone = []
    for slot, ids in enumerate(texts):
        prefill_slots(single, [ids])
        alone.append(single.step([slot], [len(ids)])[0])
    for count in range(1, 33):
        together = batched.step(list(range(count)), lengths[:count])
        assert torch.equal(together, torch.stack(alone[:count])), count


def test_greedy_on_a_gpu_equals_transformers():
    model, prompts = tiny_model().cuda(), random_prompts(40, longest=16)
    with Engine(model, tiny_tokenizer(), max_num_seqs=16) as engine:
        requests = [engine.submit(prompt, samples=1, length=15, sampling_params=GREEDY) for prompt in prompts]
        ours = [list(request.future.result(WAIT)[0].ids) for request in requests]
        assert isinstance(engine.decoder, GraphDecoder) and engine.decoder._graphs and engine.decoder.capture
    assert ours == [greedy_by_transformers(model, prompt, 15) for prompt in prompts]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_seed_on_a_gpu_gives_the_same_alone_in_a_batch_and_streamed(precision):
    model = endless_model(n_ctx=100).cuda()
    model = model.half() if precision == "fp16" else model
    precision = "auto" if precision == "fp16" else precision
    source = random.Random(1)
    lengths = [source.randint(1, 150) for _ in range(12)]
    contexts = ["一丁" * (seed % 7) for seed in range(12)]
    with Engine(model, tiny_tokenizer(), max_num_seqs=8, precision=precision) as engine:

        def submit(seed: int, on_delta=None):
            params = SamplingParams(
                temperature=[0, 0.7, 1.5][seed % 3],
                top_k=[0, 30][seed % 2],
                top_p=[0, 0.8][seed % 5 == 0],
                repetition_penalty=[1, 1.2][seed % 4 == 0],
            )
            return engine.submit(
                engine.prompt(contexts[seed], lengths[seed]),
                samples=2,
                length=lengths[seed],
                sampling_params=params,
                seed=seed,
                on_delta=on_delta,
                logprobs=2,
            )

        alone = [submit(seed).future.result(WAIT) for seed in range(12)]
        streamed: list[list] = [[] for _ in range(12)]
        requests = [submit(seed, streamed[seed].append) for seed in range(12)]
        assert [request.future.result(WAIT) for request in requests] == alone
    for context, deltas, completions in zip(contexts, streamed, alone, strict=True):
        for sample, completion in enumerate(completions):
            text = "".join(delta.text for delta in deltas if delta.sample == sample)
            assert text == completion.text[len(context) :]


def test_tokens_sampled_on_a_gpu_are_those_of_the_cpu_with_one_synchronization():
    logits = torch.randn(24, 5005, generator=torch.Generator().manual_seed(0)).mul(3).round(decimals=1)
    numbers = uniform_random([sequence_seed(3, sample) for sample in range(24)], range(24))
    temperature = torch.tensor([0.0, 0.7, 1.0] * 8)
    top_k, top_p = torch.tensor([0, 30, 200, 5] * 6), torch.tensor([0.0, 0.0, 0.9] * 8)
    expected = sample_tokens(logits, numbers, temperature, top_k, top_p)
    assert sample_tokens(logits.cuda(), numbers, temperature, top_k, top_p).tolist() == expected.tolist()
    decoder = GraphDecoder(wide_model(), 4)
    lengths = prefill_slots(decoder, random_texts(4, 50))
    decoder.step([1, 2, 3, 4], lengths)  # captures
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as synchronizations:
            warnings.simplefilter("always")
            logits = decoder.step([1, 2, 3, 4], lengths)
            assert not synchronizations
            sample_tokens(logits, numbers[:4], temperature[:4], torch.full((4,), 30), torch.zeros(4))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([one for one in synchronizations if "synchroniz" in str(one.message)]) == 1


def test_vectors_of_characters_get_the_same_gradients_to_the_bit_each_time():
    texts = [chr(0x4E00 + number % 7).encode() for number in range(3000)]
    gradient = torch.randn(len(texts), 64, device="cuda")
    characters = CharacterVectors(texts, gradient.device)
    once = characters.gather(gradient)
    assert all(torch.equal(characters.gather(gradient), once) for _ in range(20))
    on_cpu = CharacterVectors(texts, torch.device("cpu")).gather(gradient.cpu())
    torch.testing.assert_close(once.cpu(), on_cpu, rtol=1e-4, atol=1e-4)


def test_vectors_of_characters_do_not_move_by_numbers_that_are_none():
    model = tiny_model().cuda()
    characters = CharacterVectors([b"a", b"ab", b"b"], torch.device("cuda"))
    optimizer = Muon(model, lr=1e-2, muon_lr=1e-2, characters=characters, character_lr=1e-2)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = model.transformer.wte.weight.detach().clone()
    optimizer.found_inf = torch.ones((), device="cuda")
    optimizer.step()
    assert torch.equal(model.transformer.wte.weight, before)
    optimizer.found_inf = torch.zeros((), device="cuda")
    optimizer.step()
    assert not torch.equal(model.transformer.wte.weight, before)


def test_a_step_that_cuda_cannot_capture_runs_without_a_graph(capsys):
    model = wide_model()
    decoder, after = GraphDecoder(model, 4), GraphDecoder(model, 4)
    activation = decoder.activation
    decoder.activation = lambda hidden: activation(hidden) * int(torch.ones(1, device="cuda"))
    texts = random_texts(4, 100)
    lengths = prefill_slots(decoder, texts)
    stream = torch.cuda.current_stream()
    logits = [decoder.step([token] * 4, lengths) for token in range(3)]
    assert torch.cuda.current_stream() == stream
    assert decoder.capture is None and not decoder._graphs
    assert capsys.readouterr().err.count("without a CUDA graph") == 1
    # The allocator is restored: memory can be freed, and another decoder can capture.
    torch.cuda.empty_cache()
    prefill_slots(after, texts)
    for token in range(3):
        assert torch.equal(after.step([token] * 4, lengths), logits[token])
    assert after._graphs and after.capture is not None


def test_a_model_folder_is_decoded_on_the_last_gpu(tmp_path):
    device = choose_device(str(torch.cuda.device_count() - 1))
    folder = save_tiny_model(tmp_path / "model")
    model, tokenizer = load_weights(folder, device=device)
    tokenizer = WordTokenizer(tokenizer.vocabulary, segmenter=Characters())  # needs no installed thulac
    with Engine(model, tokenizer, max_num_seqs=3, precision="bf16") as engine:
        texts = engine.complete("一丁", samples=3, length=20, seed=4)
        assert engine.complete("一丁", samples=2, length=20, seed=4) == texts[:2]
        assert engine.decoder.device == device and engine.decoder.dtype == torch.bfloat16
        assert isinstance(engine.decoder, GraphDecoder) and engine.decoder.capture
