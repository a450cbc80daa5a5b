"""The compiled decoder against transformers, and a row's numbers whatever is beside it. The first run compiles."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import llvmlite.binding as llvm
import numba
import numpy as np
import pytest
import torch
from book_order import CLS_ID, MASK_ID, PAD_ID, UNK_ID
from tiny_model import endless_model, tiny_model, tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2_chinese import compiled
from gpt2_chinese.decoding import compiled_decoder, decoder_kernel, engine, sampling
from gpt2_chinese.decoding.compiled_decoder import (
    DOT_PRODUCTS,
    LANES,
    MAX_ROWS,
    PANEL,
    CompiledDecoder,
    fastest_decoder,
)
from gpt2_chinese.decoding.completion import Prompt, Settings
from gpt2_chinese.decoding.decoder import Decoder
from gpt2_chinese.decoding.engine import Engine
from gpt2_chinese.model_folder import load_model

WAIT = 60
GREEDY = Settings(temperature=0)


def random_model(**shape) -> GPT2LMHeadModel:
    """Weights of such a size that the logits are far apart and attention is far from uniform."""
    torch.manual_seed(3)
    shape = {"vocab_size": 203, "n_positions": 40, "n_embd": 48, "n_layer": 2, "n_head": 4} | shape
    model = GPT2LMHeadModel(GPT2Config(bos_token_id=MASK_ID, eos_token_id=CLS_ID, **shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def kept_weights(model: GPT2LMHeadModel, precision: str) -> GPT2LMHeadModel:
    """The model with its weights as the decoder keeps them; biases, norms and positions stay as they are."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2 or "wpe" in name or precision == "fp32":
                continue
            if precision == "bf16":
                parameter.copy_(parameter.bfloat16())
            else:
                inputs = 1 if "wte" in name or "lm_head" in name else 0  # the others are stored as (in, out)
                scale = parameter.abs().amax(dim=inputs, keepdim=True) / 127
                parameter.copy_((parameter / scale).round() * scale)
    return model


def largest_difference(model: GPT2LMHeadModel, decoder: CompiledDecoder, texts: list[list[int]]) -> float:
    """Half of each text by prefill, then token by token, all rows together; beside the whole text at once."""
    largest = 0.0
    with torch.inference_mode():
        expected = [model(torch.tensor([ids])).logits[0] for ids in texts]
        halves = [max(1, len(ids) // 2) for ids in texts]
        for row, (ids, half) in enumerate(zip(texts, halves, strict=True)):
            prefix = decoder.prefill(ids[:half])
            decoder.load(row, prefix)
            largest = max(largest, float((prefix.logits - expected[row][half - 1]).abs().max()))
        for step in range(min(len(ids) - half for ids, half in zip(texts, halves, strict=True))):
            lengths = [half + step for half in halves]
            logits = decoder.step([ids[length] for ids, length in zip(texts, lengths, strict=True)], lengths)
            for row, length in enumerate(lengths):
                largest = max(largest, float((logits[row] - expected[row][length]).abs().max()))
    return largest


SHAPES: list[dict] = [
    {},
    {"n_embd": 8, "n_head": 1, "n_layer": 1, "vocab_size": 7},
    {"n_embd": 40, "n_head": 5, "vocab_size": 64},
    {"n_embd": 128, "n_head": 1, "n_layer": 1},
    {"n_embd": 160, "n_head": 2, "n_layer": 1},
    {"n_embd": 33, "n_head": 3, "n_inner": 50},
    {"n_embd": 60, "n_head": 4, "activation_function": "relu", "scale_attn_by_inverse_layer_idx": True},
    {"tie_word_embeddings": False},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_any_shape_has_the_logits_of_transformers_with_the_same_weights(shape, precision):
    model = random_model(**shape)
    decoder = CompiledDecoder(model, rows=3, precision=precision)
    source = random.Random(5)
    vocab_size = model.config.vocab_size
    texts = [[source.randrange(vocab_size) for _ in range(length)] for length in (2, 9, 24)]
    assert largest_difference(kept_weights(model, precision), decoder, texts) < 1e-4


# INT8: the inputs of the products are rounded too.


def rounded_inputs(inputs: torch.Tensor) -> torch.Tensor:
    """Each row as its 256 steps stand for it: of equal size, from the least of the row and 0 to the greatest."""
    least = inputs.amin(dim=-1, keepdim=True).clamp_max(0)
    scale = (inputs.amax(dim=-1, keepdim=True).clamp_min(0) - least) / 255
    zero = (0.5 - least / scale).floor()
    return scale * ((inputs / scale + (zero + 0.5)).floor().clamp(0, 255) - zero)


def with_rounded_inputs(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """The model with 8-bit weights, whose products round their inputs: INT8's arithmetic in floats."""
    for name, module in kept_weights(model, "int8").named_modules():
        if name.endswith(("c_attn", "c_proj", "c_fc", "lm_head")):
            module.register_forward_pre_hook(lambda _, arguments: (rounded_inputs(arguments[0]),))
    return model


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_of_any_shape_has_the_logits_of_transformers_with_inputs_rounded_alike(shape):
    model = random_model(**shape)
    decoder = CompiledDecoder(model, rows=3, precision="int8")
    vocab_size = model.config.vocab_size
    tokens = torch.arange(min(vocab_size, 100))[:, None]
    logits = torch.stack([decoder.prefill(ids).logits for ids in tokens.tolist()])
    with torch.inference_mode():
        exact = model(tokens).logits[:, 0]
        apart = (logits - with_rounded_inputs(model)(tokens).logits[:, 0]).abs().amax(dim=1)
    # A number at the edge between two steps may be rounded to either; most tokens have none.
    assert float((apart < 1e-4).float().mean()) > 0.8
    rounding = (logits - exact).abs().amax(dim=1)
    assert float(apart.max()) < float(rounding.max())
    source = random.Random(5)
    texts = [[source.randrange(vocab_size) for _ in range(length)] for length in (2, 9, 24)]
    assert largest_difference(model, decoder, texts) < 2 * float(rounding.max())


def test_int8_is_near_fp32():
    model = random_model(n_embd=128, n_layer=3, n_positions=64)
    ids = [number * 7 % 203 for number in range(60)]
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    decoder = CompiledDecoder(model, rows=1, precision="int8")
    logits = torch.stack([decoder.prefill(ids[:length]).logits for length in range(1, 61)])
    assert float((logits - expected).square().mean().sqrt() / expected.std()) < 0.05
    assert float((logits.argmax(dim=1) == expected.argmax(dim=1)).float().mean()) > 0.9


@pytest.mark.parametrize("name", DOT_PRODUCTS)
def test_every_instruction_gives_exact_sums_of_integers(name, monkeypatch):
    features = llvm.get_host_cpu_features()
    needed = {"vpdpbusd": {16: "avx512vnni", 8: "avxvnni"}, "vpmaddwd": {16: "avx512bw", 8: "avx2", 4: "sse2"}}
    if name in needed and not features.get(needed[name].get(LANES, "")):
        pytest.skip("this processor has no such instruction")
    rows, groups = 2, 37
    monkeypatch.setattr(decoder_kernel, "MAX_ROWS", rows)  # the compiler takes its time for each number of rows
    multiply = decoder_kernel.integer_multiplication(name)

    @numba.njit
    def call(*arguments):
        multiply(*arguments)

    source = np.random.default_rng(3)
    weights = source.integers(-127, 128, (groups, PANEL, 4), dtype=np.int8)
    codes = source.integers(0, 256, (groups, rows, 4), dtype=np.uint8)
    # The greatest of all, in the halves of the panel with either sign: 16 bits would not hold two of their products.
    weights[:9, ::3], weights[:9, 1::3], codes[:9] = 127, -127, 255
    spans = np.zeros(rows, dtype=[("scale", np.float32), ("zero", np.int32)])
    spans["scale"], spans["zero"] = (0.25, 3.0), (200, 7)
    scales = source.random(PANEL).astype(np.float32)
    totals = weights.sum(axis=(0, 2), dtype=np.int32)
    results = np.zeros((rows, PANEL), dtype=np.float32)
    arrays = [array.ctypes.data for array in (weights, codes, results, spans, scales, totals)]
    call(rows, arrays[0], arrays[1], groups, arrays[2], 64, arrays[0], *arrays[3:])
    steps = codes.astype(np.int64) - spans["zero"][None, :, None]
    exact = np.einsum("grk,gck->rc", steps, weights.astype(np.int64))
    assert np.abs(exact).max() > 2**15
    assert np.array_equal(results, exact.astype(np.float32) * (spans["scale"][:, None] * scales))


@pytest.mark.slow
def test_a_processor_without_the_instruction_has_the_same_integers(tmp_path):
    """In a process of its own that is told of a processor without AVX-512; it compiles for that."""
    script = """
import sys
import llvmlite.binding as llvm
features = llvm.get_host_cpu_features()
for name in list(features):
    if name.startswith("avx512") or name in ("avxvnni", "evex512"):
        features[name] = False
llvm.get_host_cpu_features = lambda: features
llvm.get_host_cpu_name = lambda: "haswell"
import test_decoder as tests
from gpt2_chinese.decoding import compiled_decoder
assert compiled_decoder.DOT_PRODUCT == "vpmaddwd" and compiled_decoder.LANES == 8
tests.test_int8_of_any_shape_has_the_logits_of_transformers_with_inputs_rounded_alike({})
tests.test_a_row_has_the_same_bits_alone_in_any_crowd_and_by_any_number_of_threads("int8")
"""
    if not llvm.get_host_cpu_features().get("avx2"):
        pytest.skip("this processor has no AVX2")
    here = Path(__file__).parent
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, [here, here.parents[1] / "helpers", here.parents[2]]))
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {file.name.partition("-")[0] for file in tmp_path.iterdir()} == {"decoder_kernel", "sampling_kernel"}


def test_code_for_another_processor_is_not_taken(monkeypatch):
    """A processor with fewer instructions needs code of its own: the name of the file says for whom it is."""
    name = compiled.cache_file_name(compiled_decoder.KERNEL, compiled_decoder.SOURCES)
    features = llvm.get_host_cpu_features()
    features["avx512vnni"] = not features.get("avx512vnni")
    monkeypatch.setattr(llvm, "get_host_cpu_features", lambda: features)
    assert compiled.cache_file_name(compiled_decoder.KERNEL, compiled_decoder.SOURCES) != name


def test_reference_checkpoint_gives_the_reference_logits(reference):
    ids = json.loads((reference / "logits_input_ids.json").read_text(encoding="utf-8"))
    expected = np.load(reference / "logits.npy")
    model, _ = load_model(reference / "checkpoint", vocab_file=reference / "vocab_user.txt")
    decoder = CompiledDecoder(model, rows=2, precision="fp32")
    for row in range(2):
        prefix = decoder.prefill(ids[row][:20])
        assert np.abs(prefix.logits.numpy() - expected[row, 19]).max() < 1e-4
        decoder.load(row, prefix)
    for position in range(20, 40):
        logits = decoder.step([ids[0][position], ids[1][position]], [position, position]).numpy()
        assert np.abs(logits - expected[:, position]).max() < 1e-4
    rounded = CompiledDecoder(model, rows=1, precision="bf16")
    assert largest_difference(kept_weights(model, "bf16"), rounded, [ids[0]]) < 1e-4


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_row_has_the_same_bits_alone_in_any_crowd_and_by_any_number_of_threads(precision):
    rows = 33
    alone = CompiledDecoder(random_model(), rows=rows, precision=precision, threads=1)
    crowd = CompiledDecoder(random_model(), rows=rows, precision=precision, threads=3)
    prefixes = [alone.prefill([2, *range(10, 10 + row)]) for row in range(rows)]
    expected = []
    for row, prefix in enumerate(prefixes):
        assert torch.equal(crowd.prefill([2, *range(10, 10 + row)]).logits, prefix.logits)
        alone.load(0, prefix)
        crowd.load(row, prefix)
        expected.append(alone.step([100 + row], [prefix.length])[0])
    for size in range(1, rows + 1):
        logits = crowd.step([100 + row for row in range(size)], [prefix.length for prefix in prefixes[:size]])
        assert torch.equal(logits, torch.stack(expected[:size])), size
    crowd.copy_row(20, 0, prefixes[20].length)
    assert torch.equal(crowd.step([120], [prefixes[20].length])[0], expected[20])
    crowd.close()


def test_a_prompt_longer_than_one_pass_has_the_bits_of_its_tokens_one_by_one():
    model = random_model(n_positions=250)
    decoder = CompiledDecoder(model, rows=1, precision="fp32")
    ids = [number * 7 % 203 for number in range(230)]
    decoder.load(0, decoder.prefill(ids[:3]))
    for position in range(3, 230):
        logits = decoder.step([ids[position]], [position])
    assert torch.equal(decoder.prefill(ids).logits, logits[0])
    with torch.inference_mode():
        assert torch.allclose(logits[0], model(torch.tensor([ids])).logits[0, -1], atol=1e-3)


def test_rows_of_a_block_and_columns_of_a_panel_fit_the_registers():
    assert PANEL in (8, 16, 32) and MAX_ROWS in (6, 12)


def test_greedy_equals_transformers_alone_and_all_at_once():
    source = random.Random(3)
    model = tiny_model()
    prompts = [
        Prompt("", (MASK_ID, *(source.randrange(5, 200) for _ in range(source.randrange(16)))), 0) for _ in range(50)
    ]
    expected = []
    for prompt in prompts:
        inputs = torch.tensor([prompt.ids])
        ids = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=15,
            do_sample=False,
            suppress_tokens=[MASK_ID, PAD_ID, UNK_ID],
        )[0, len(prompt.ids) :].tolist()
        expected.append(ids[: ids.index(CLS_ID)] if CLS_ID in ids else ids)
    assert len({tuple(ids) for ids in expected}) > 20
    with Engine(model, tiny_tokenizer(), rows=20, precision="fp32") as decoding:
        assert isinstance(decoding.decoder, CompiledDecoder)
        together = [decoding.submit(prompt, samples=1, length=15, settings=GREEDY) for prompt in prompts]
        assert [list(ticket.future.result(WAIT)[0].ids) for ticket in together] == expected
        for prompt, ids in zip(prompts, expected, strict=True):
            ticket = decoding.submit(prompt, samples=1, length=15, settings=GREEDY)
            assert list(ticket.future.result(WAIT)[0].ids) == ids


def test_a_seed_gives_the_same_alone_and_in_a_crowd():
    with Engine(endless_model(), tiny_tokenizer(), rows=13, precision="auto") as decoding:
        assert decoding.decoder.precision == "bf16"
        requests = [("一丁"[: 1 + number % 2] * (1 + number % 7), 1 + number % 4, 30 + number) for number in range(20)]

        def submit(context, samples, length):
            return decoding.submit(decoding.prompt(context, length), samples=samples, length=length, seed=length)

        alone = [submit(*request).future.result(WAIT) for request in requests]
        tickets = [submit(*request) for request in requests]
        assert [ticket.future.result(WAIT) for ticket in tickets] == alone


# Without compiled code.


def test_where_nothing_can_be_compiled_pytorch_decodes_and_says_so(monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError("no compiler for this processor")

    monkeypatch.setattr(compiled_decoder, "load_function", fail)
    decoder = fastest_decoder(tiny_model(), 2, "auto")
    assert isinstance(decoder, Decoder)
    assert "slower: no compiler for this processor" in capsys.readouterr().err
    assert torch.equal(decoder.prefill([2, 9]).logits, Decoder(tiny_model(), 2).prefill([2, 9]).logits)


def test_an_activation_that_is_not_compiled_is_left_to_pytorch(capsys):
    model = random_model(activation_function="silu")
    assert isinstance(fastest_decoder(model, 1, "bf16"), Decoder)
    assert "no activation function silu" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_refused_by_name():
    model = random_model()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"transformer\.h\.1\.mlp\.c_fc\.weight.*diverged"):
        fastest_decoder(model, 1, "auto")


def test_damaged_code_is_not_at_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "cache_folders", lambda: [tmp_path])
    assert not compiled_decoder.is_decoder_cached()
    for module in (compiled_decoder, sampling):
        assert not compiled_decoder.is_decoder_cached()
        compiled.write_cached_code(compiled.cache_file_name(module.KERNEL, module.SOURCES), b"code")
    assert compiled_decoder.is_decoder_cached()
    for file in tmp_path.iterdir():
        whole = file.read_bytes()
        file.write_bytes(whole[:-1])
        assert not compiled_decoder.is_decoder_cached()
        file.write_bytes(whole)


def test_the_engine_serves_at_once_and_switches_in_the_middle_of_a_text(monkeypatch):
    may_build = threading.Event()

    def build(*arguments):
        assert may_build.wait(WAIT)
        return fastest_decoder(*arguments)

    with Engine(endless_model(), tiny_tokenizer(), rows=4) as decoding:
        settings = Settings(temperature=0, repetition_penalty=2.0)
        prompt = decoding.prompt("一丁", 100)
        expected = decoding.submit(prompt, samples=3, length=100, settings=settings).future.result(WAIT)
    monkeypatch.setattr(engine, "is_decoder_cached", lambda: False)
    monkeypatch.setattr(engine, "fastest_decoder", build)
    arrived = threading.Event()

    def seen(piece):
        """Hold the model's thread at its first token until the compiled decoder is there."""
        if not arrived.is_set():
            arrived.set()
            may_build.set()
            decoding._next_decoder.result(WAIT)

    with Engine(endless_model(), tiny_tokenizer(), rows=4, precision="fp32", wait=False) as decoding:
        assert isinstance(decoding.decoder, Decoder) and not decoding.at_full_speed
        ticket = decoding.submit(prompt, samples=3, length=100, settings=settings, on_delta=seen)
        assert ticket.future.result(WAIT) == expected
        assert isinstance(decoding.decoder, CompiledDecoder) and decoding.at_full_speed


def test_an_engine_without_work_switches_too_and_says_so(monkeypatch):
    may_build, switched = threading.Event(), threading.Event()
    monkeypatch.setattr(engine, "is_decoder_cached", lambda: False)
    monkeypatch.setattr(engine, "fastest_decoder", lambda *arguments: may_build.wait(WAIT) and Decoder(arguments[0], 4))

    def on_step_end() -> None:
        if decoding.at_full_speed:
            switched.set()

    decoding = Engine(tiny_model(), tiny_tokenizer(), rows=4, precision="fp32", wait=False, on_step_end=on_step_end)
    with decoding:
        assert not decoding.at_full_speed
        may_build.set()
        assert switched.wait(WAIT)


def test_a_closed_decoder_leaves_no_thread():
    before = threading.active_count()
    decoder = CompiledDecoder(random_model(), rows=1, threads=4)
    assert threading.active_count() == before + 3
    decoder.close()
    assert threading.active_count() == before
    decoder = CompiledDecoder(random_model(), rows=1, threads=4)
    decoder.prefill([2, 3])
    del decoder
    assert threading.active_count() == before


@pytest.mark.parametrize("kind", [Decoder, CompiledDecoder])
def test_prompts_that_join_together_get_what_each_gets_alone(kind):
    model = random_model()
    texts = [[2, *range(9, 9 + length)] for length in (1, 30, 2, 17, 29, 5)]
    together, alone = kind(model, rows=6), kind(model, rows=6)
    logits = together.prefill_rows(list(enumerate(texts)))
    for row, ids in enumerate(texts):
        prefix = alone.prefill(ids)
        alone.load(row, prefix)
        assert torch.equal(logits[row], prefix.logits)
    steps = [decoder.step([8] * 6, [len(ids) for ids in texts]) for decoder in (together, alone)]
    assert torch.equal(*steps)


def test_requests_that_come_at_once_join_at_once():
    with Engine(endless_model(), tiny_tokenizer(), rows=8, precision="fp32") as decoding:
        alone = [decoding.complete("一丁"[:1] * n, samples=2, length=6, seed=n) for n in (1, 2, 3)]
        arrived, held = threading.Event(), threading.Event()

        def hold(_):
            arrived.set()
            held.wait(WAIT)

        first = decoding.submit(decoding.prompt("丁", 2), samples=1, length=2, on_delta=hold)
        assert arrived.wait(WAIT)
        prompts = [decoding.prompt("一" * n, 6) for n in (1, 2, 3)]
        tickets = [decoding.submit(prompt, samples=2, length=6, seed=n) for n, prompt in enumerate(prompts, start=1)]
        calls, prefill_rows = [], decoding.decoder.prefill_rows
        decoding.decoder.prefill_rows = lambda prompts: calls.append(len(prompts)) or prefill_rows(prompts)
        held.set()
        texts = [[completion.text for completion in ticket.future.result(WAIT)] for ticket in tickets]
        first.future.result(WAIT)
    assert calls == [3]
    assert texts == alone
