"""The compiled decoder beside transformers, and its logits whatever else is in the batch. The first run compiles."""

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
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import (
    endless_model,
    greedy_by_transformers,
    prefill_slots,
    random_model,
    random_prompts,
    tiny_model,
    tiny_tokenizer,
)
from transformers import GPT2LMHeadModel

from gpt2_chinese import compiled
from gpt2_chinese.decoding import batch_sampler, compiled_decoder, decoder_kernel, sampling
from gpt2_chinese.decoding import engine as engine_module
from gpt2_chinese.decoding.compiled_decoder import CompiledDecoder, make_cpu_decoder
from gpt2_chinese.decoding.completion import SamplingParams
from gpt2_chinese.decoding.decoder import Decoder
from gpt2_chinese.decoding.engine import Engine
from gpt2_chinese.decoding.packing import (
    BF16,
    BF16_FLOATS,
    BF16_FORM,
    BF16_PAIRS,
    DOT_PRODUCTS,
    LANES,
    MAX_BLOCK_ROWS,
    PANEL_COLUMNS,
    PRECISION_CODES,
    pack_twelve_bits,
    pack_weights,
)
from gpt2_chinese.model_folder import load_model

WAIT = 60
GREEDY = SamplingParams(temperature=0)


def round_keys_and_values(_: torch.nn.Module, __: tuple, output: torch.Tensor) -> torch.Tensor:
    queries, others = output.tensor_split([output.shape[-1] // 3], dim=-1)
    return torch.cat([queries, others.bfloat16().float()], dim=-1)


def round_weights(model: GPT2LMHeadModel, precision: str) -> GPT2LMHeadModel:
    """Round the weights of a model, and its keys and values, as the decoder does.

    Biases, layer norms and positions are not rounded.
    """
    if precision != "fp32":
        for block in model.transformer.h:
            block.attn.c_attn.register_forward_hook(round_keys_and_values)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2 or "wpe" in name or precision == "fp32":
                continue
            if precision == "bf16":
                parameter.copy_(parameter.bfloat16())
            else:
                inputs = 1 if "wte" in name or "lm_head" in name else 0  # Conv1D stores (in, out)
                scale = parameter.abs().amax(dim=inputs, keepdim=True) / 127
                parameter.copy_((parameter / scale).round() * scale)
    return model


def largest_difference(model: GPT2LMHeadModel, decoder: CompiledDecoder, texts: list[list[int]]) -> float:
    """Of the logits beside the model's own: half of each text by prefill, the rest by decode steps of all texts."""
    with torch.inference_mode():
        expected = [model(torch.tensor([ids])).logits[0] for ids in texts]
    largest = 0.0
    halves = [max(1, len(ids) // 2) for ids in texts]
    for slot, (ids, half) in enumerate(zip(texts, halves, strict=True)):
        prefilled = decoder.prefill(ids[:half])
        decoder.load_prefill(slot, prefilled)
        largest = max(largest, float((prefilled.logits - expected[slot][half - 1]).abs().max()))
    for step in range(min(len(ids) - half for ids, half in zip(texts, halves, strict=True))):
        lengths = [half + step for half in halves]
        logits = decoder.step([ids[length] for ids, length in zip(texts, lengths, strict=True)], lengths)
        for slot, length in enumerate(lengths):
            largest = max(largest, float((logits[slot] - expected[slot][length]).abs().max()))
    return largest


SHAPES: list[dict] = [
    {},
    {"n_embd": 8, "n_head": 1, "n_layer": 1, "vocab_size": 7},
    {"n_embd": 40, "n_head": 5, "vocab_size": 64},
    {"n_embd": 128, "n_head": 1, "n_layer": 1},
    {"n_embd": 160, "n_head": 2, "n_layer": 1},
    {"n_embd": 33, "n_head": 3, "n_inner": 50},
    {"n_embd": 96, "n_head": 3, "n_inner": 50, "n_layer": 1},
    {"n_embd": 60, "n_head": 4, "activation_function": "relu", "scale_attn_by_inverse_layer_idx": True},
    {"tie_word_embeddings": False},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_any_shape_has_the_logits_of_transformers_with_the_same_weights(shape, precision, monkeypatch):
    monkeypatch.setitem(PRECISION_CODES, "bf16", BF16)
    model = random_model(**shape)
    decoder = CompiledDecoder(model, max_num_seqs=3, precision=precision)
    source = random.Random(5)
    vocab_size = model.config.vocab_size
    texts = [[source.randrange(vocab_size) for _ in range(length)] for length in (2, 9, 24)]
    assert largest_difference(round_weights(model, precision), decoder, texts) < 1e-4


# bf16 in 12 bits.


def unpack_twelve_bits(packed: np.ndarray, table: np.ndarray, precision: int) -> np.ndarray:
    """What `pack_twelve_bits` has packed: bf16 as uint16 [PANEL_COLUMNS, inputs]."""
    steps = packed.reshape(-1, 3, 4 * LANES)
    unpacked = np.zeros((PANEL_COLUMNS, 4 * len(steps)), dtype=np.uint16)
    for column in range(PANEL_COLUMNS):
        for row in range(unpacked.shape[1]):
            step, pair = steps[row // 4], row // 2 % 2
            # Four columns of both halves of the panel have 16 bytes: 8 of the one half or input, then the other's.
            half, parity = column // LANES, row % 2
            place = {
                BF16_PAIRS: half * 8 + column % 4 * 2 + parity,
                BF16_FLOATS: parity * 8 + column % 4 * 2 + half,
            }[precision] + column % LANES // 4 * 16
            number = step[2, place] >> 4 * pair & 15
            unpacked[column, row] = int(table[number]) << 8 | int(step[pair, place])
    return unpacked


def as_floats(words: np.ndarray) -> np.ndarray:
    """bf16, given as uint16, as float32."""
    return (words.astype(np.uint32) << 16).view(np.float32)


def in_12_bits(weight: torch.Tensor) -> torch.Tensor:
    """A matrix (out, in) as this CPU's form of 12 bits has it."""
    packed = pack_weights(weight, BF16_FORM)
    panels = [unpack_twelve_bits(*panel, BF16_FORM) for panel in zip(packed.panels, packed.high_bytes, strict=True)]
    return torch.from_numpy(as_floats(np.concatenate(panels))[: weight.shape[0], : weight.shape[1]].copy())


def round_weights_to_12_bits(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """Like `round_weights`, and then each matrix `in_12_bits`."""
    for name, module in round_weights(model, "bf16").named_modules():
        if name.endswith(("c_attn", "c_proj", "c_fc")):  # they store (in, out)
            module.weight.data = in_12_bits(module.weight.data.t()).t().contiguous()
        elif name.endswith(("wte", "lm_head")):
            module.weight.data = in_12_bits(module.weight.data)
    return model


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_shape_has_the_logits_of_transformers_with_weights_of_12_bits(shape):
    if BF16_FORM != BF16_FLOATS:
        pytest.skip("this CPU multiplies other weights")
    model = random_model(**shape)
    decoder = CompiledDecoder(model, max_num_seqs=3, precision="bf16")
    source = random.Random(5)
    vocab_size = model.config.vocab_size
    texts = [[source.randrange(vocab_size) for _ in range(length)] for length in (2, 9, 24)]
    has_whole_vectors = all(width % LANES == 0 for width in (model.config.n_embd, model.config.n_inner or LANES))
    assert (decoder._precision_code == BF16_FLOATS) == has_whole_vectors
    rounded = round_weights_to_12_bits(model) if has_whole_vectors else round_weights(model, "bf16")
    assert largest_difference(rounded, decoder, texts) < 1e-4


@pytest.mark.parametrize("precision", [BF16_FLOATS, BF16_PAIRS])
@given(
    seed=st.integers(0, 2**32 - 1),
    vectors=st.sampled_from([1, 3]),
    log_scale=st.floats(-30, 3),
    spread=st.sampled_from([0.0, 0.5, 2.0, 6.0]),
)
def test_bf16_in_12_bits_is_the_nearest_number_that_a_panel_has(precision, seed, vectors, log_scale, spread):
    generator = torch.Generator().manual_seed(seed)
    shape = PANEL_COLUMNS, vectors * LANES
    weights = torch.randn(shape, generator=generator) * 10 ** (
        log_scale + spread * torch.randn(shape, generator=generator)
    )
    weights = (weights * (torch.rand(shape, generator=generator) < 0.95)).clamp(-1e30, 1e30).bfloat16()
    packed, table = (array[0] for array in pack_twelve_bits(weights.view(torch.int16)[None], precision))

    unpacked = as_floats(unpack_twelve_bits(packed, table, precision))

    low_bytes = np.arange(256, dtype=np.uint16)
    numbers = as_floats(table[:15, None].astype(np.uint16) << 8 | low_bytes).astype(np.float64)
    numbers = np.unique(np.append(numbers, 0.0))
    expected = np.float64(weights.float().numpy())
    places = np.searchsorted(numbers, expected).clip(1, len(numbers) - 1)
    nearest = np.minimum(np.abs(expected - numbers[places]), np.abs(expected - numbers[places - 1]))
    assert (np.abs(expected - unpacked) == nearest).all()
    assert (np.abs(expected - unpacked) <= np.abs(expected).max() * 2.0**-13).all()
    if not spread:
        assert (expected != unpacked).sum() <= 6 + 0.005 * expected.size


# INT8 and, on some CPUs, bf16: the inputs of the products are quantized or rounded too.


def quantize_inputs(inputs: torch.Tensor) -> torch.Tensor:
    """Quantize and dequantize each row: 256 equal steps from the minimum of the row and 0 to the maximum."""
    minimum = inputs.amin(dim=-1, keepdim=True).clamp_max(0)
    scale = (inputs.amax(dim=-1, keepdim=True).clamp_min(0) - minimum) / 255
    zero_point = (0.5 - minimum / scale).floor()
    return scale * ((inputs / scale + (zero_point + 0.5)).floor().clamp(0, 255) - zero_point)


def round_inputs(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.bfloat16().float()


def with_converted_inputs(model: GPT2LMHeadModel, precision: str) -> GPT2LMHeadModel:
    """Round the weights to 8 or 12 bits, and convert the inputs of the products: the decoder's arithmetic in floats."""
    convert = {"int8": quantize_inputs, "bf16": round_inputs}[precision]
    model = round_weights_to_12_bits(model) if precision == "bf16" else round_weights(model, precision)
    for name, module in model.named_modules():
        if name.endswith(("c_attn", "c_proj", "c_fc", "lm_head")):
            module.register_forward_pre_hook(lambda _, arguments: (convert(arguments[0]),))
    return model


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_any_shape_has_the_logits_of_transformers_with_converted_inputs(shape, precision):
    if precision == "bf16" and BF16_FORM != BF16_PAIRS:
        pytest.skip("this CPU rounds no inputs")
    model = random_model(**shape)
    decoder = CompiledDecoder(model, max_num_seqs=3, precision=precision)
    vocab_size = model.config.vocab_size
    tokens = torch.arange(min(vocab_size, 100))[:, None]
    logits = torch.stack([decoder.prefill(ids).logits for ids in tokens.tolist()])
    with torch.inference_mode():
        exact = model(tokens).logits[:, 0]
        difference = (logits - with_converted_inputs(model, precision)(tokens).logits[:, 0]).abs().amax(dim=1)
    # An input halfway between two codes or two numbers of bf16 may be rounded to either; most tokens have none.
    assert float((difference < 1e-4).float().mean()) > 0.8
    rounding = (logits - exact).abs().amax(dim=1)
    assert float(difference.max()) < float(rounding.max())
    source = random.Random(5)
    texts = [[source.randrange(vocab_size) for _ in range(length)] for length in (2, 9, 24)]
    assert largest_difference(model, decoder, texts) < 2 * float(rounding.max())


def test_int8_is_near_fp32():
    model = random_model(n_embd=128, n_layer=3, n_positions=64)
    ids = [number * 7 % 203 for number in range(60)]
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    decoder = CompiledDecoder(model, max_num_seqs=1, precision="int8")
    logits = torch.stack([decoder.prefill(ids[:length]).logits for length in range(1, 61)])
    assert float((logits - expected).square().mean().sqrt() / expected.std()) < 0.05
    assert float((logits.argmax(dim=1) == expected.argmax(dim=1)).float().mean()) > 0.9


@pytest.mark.parametrize("name", DOT_PRODUCTS)
def test_every_dot_product_instruction_gives_exact_integer_sums(name, monkeypatch):
    features = llvm.get_host_cpu_features()
    needed = {"vpdpbusd": {16: "avx512vnni", 8: "avxvnni"}, "vpmaddwd": {16: "avx512bw", 8: "avx2", 4: "sse2"}}
    if name in needed and not features.get(needed[name].get(LANES, "")):
        pytest.skip("this CPU has no such instruction")
    rows, groups, group = 2, 38, DOT_PRODUCTS[name]
    monkeypatch.setattr(decoder_kernel, "MAX_BLOCK_ROWS", rows)  # the compile time grows with the number of rows
    multiply = decoder_kernel.make_multiply_int8(name)

    @numba.njit
    def call(*arguments):
        multiply(*arguments)

    source = np.random.default_rng(3)
    weights = source.integers(-127, 128, (groups, PANEL_COLUMNS, group), dtype=np.int8)
    codes = source.integers(0, 256, (groups, rows, group), dtype=np.int16 if group == 2 else np.uint8)
    # The extremes, with either sign in both halves of the panel: 16 bits would not hold two of their products.
    weights[:18, ::3], weights[:18, 1::3], codes[:18] = 127, -127, 255
    quantizations = np.zeros(rows, dtype=[("scale", np.float32), ("zero_point", np.int32)])
    quantizations["scale"], quantizations["zero_point"] = (0.25, 3.0), (200, 7)
    scales = source.random(PANEL_COLUMNS).astype(np.float32)
    weight_sums = weights.sum(axis=(0, 2), dtype=np.int32)
    results = np.zeros((rows, PANEL_COLUMNS), dtype=np.float32)
    arrays = [array.ctypes.data for array in (weights, codes, results, quantizations, scales, weight_sums)]
    call(rows, arrays[0], arrays[1], groups, arrays[2], 64, arrays[0], *arrays[3:])
    inputs = codes.astype(np.int64) - quantizations["zero_point"][None, :, None]
    exact = np.einsum("grk,gck->rc", inputs, weights.astype(np.int64))
    assert np.abs(exact).max() > 2**15
    assert np.array_equal(results, exact.astype(np.float32) * (quantizations["scale"][:, None] * scales))


@pytest.mark.slow
def test_a_cpu_without_avx512_has_exact_int8_and_12_bits(tmp_path):
    """In a process that sees a CPU without AVX-512 and compiles for it."""
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
from gpt2_chinese.decoding import packing
assert packing.DOT_PRODUCT == "vpmaddwd" and packing.LANES == 8
assert packing.BF16_FORM == packing.BF16_FLOATS
tests.test_any_shape_has_the_logits_of_transformers_with_converted_inputs({}, "int8")
tests.test_any_shape_has_the_logits_of_transformers_with_weights_of_12_bits({})
import pytest
for precision in ("int8", "bf16"):
    with pytest.MonkeyPatch.context() as patch:
        tests.test_logits_are_the_same_to_the_bit_alone_in_any_batch_and_with_any_number_of_threads(
            precision, {"n_embd": 144, "n_head": 12, "n_layer": 1}, 2, patch
        )
"""
    if not llvm.get_host_cpu_features().get("avx2"):
        pytest.skip("this CPU has no AVX2")
    here = Path(__file__).parent
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, [here, here.parents[1] / "helpers", here.parents[2]]))
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {file.name.partition("-")[0] for file in tmp_path.iterdir()} == {
        "decoder_kernel",
        "logits_kernel",
        "sampling_kernel",
    }


def test_cached_code_of_another_cpu_is_not_used(monkeypatch):
    """The instructions of the CPU are part of the cache key."""
    name = compiled.cache_file_name(compiled_decoder.KERNEL_MODULE, compiled_decoder.KERNEL_SOURCES)
    features = llvm.get_host_cpu_features()
    features["avx512vnni"] = not features.get("avx512vnni")
    monkeypatch.setattr(llvm, "get_host_cpu_features", lambda: features)
    assert compiled.cache_file_name(compiled_decoder.KERNEL_MODULE, compiled_decoder.KERNEL_SOURCES) != name


def test_reference_checkpoint_gives_the_reference_logits(reference, monkeypatch):
    ids = json.loads((reference / "logits_input_ids.json").read_text(encoding="utf-8"))
    expected = np.load(reference / "logits.npy")
    model, _ = load_model(reference / "checkpoint", vocab_file=reference / "vocab_user.txt")
    decoder = CompiledDecoder(model, max_num_seqs=2, precision="fp32")
    for slot in range(2):
        prefilled = decoder.prefill(ids[slot][:20])
        assert np.abs(prefilled.logits.numpy() - expected[slot, 19]).max() < 1e-4
        decoder.load_prefill(slot, prefilled)
    for position in range(20, 40):
        logits = decoder.step([ids[0][position], ids[1][position]], [position, position]).numpy()
        assert np.abs(logits - expected[:, position]).max() < 1e-4
    default_bf16 = CompiledDecoder(model, max_num_seqs=1, precision="bf16").prefill(ids[0][:20]).logits.numpy()
    assert np.abs(default_bf16 - expected[0, 19]).max() < 0.02 * np.abs(expected[0, 19]).max()
    monkeypatch.setitem(PRECISION_CODES, "bf16", BF16)
    rounded = CompiledDecoder(model, max_num_seqs=1, precision="bf16")
    assert largest_difference(round_weights(model, "bf16"), rounded, [ids[0]]) < 1e-4


@pytest.mark.parametrize(
    ("shape", "threads"),
    [
        ({}, 3),
        ({"n_embd": 144, "n_head": 12, "n_layer": 1, "n_inner": 100}, 2),
        ({"n_embd": 144, "n_head": 12, "n_layer": 1, "n_inner": 96}, 2),
        ({"n_embd": 132, "n_head": 12, "n_layer": 1}, 5),
    ],
    ids=str,
)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16 with floats", "int8"])
def test_logits_are_the_same_to_the_bit_alone_in_any_batch_and_with_any_number_of_threads(
    precision, shape, threads, monkeypatch
):
    monkeypatch.setitem(PRECISION_CODES, "bf16 with floats", BF16)
    monkeypatch.setattr(compiled_decoder, "MIN_PARALLEL_PRODUCTS", 0)
    slots = 33
    single = CompiledDecoder(random_model(**shape), max_num_seqs=slots, precision=precision, threads=1)
    batched = CompiledDecoder(random_model(**shape), max_num_seqs=slots, precision=precision, threads=threads)
    prompts = [single.prefill([2, *range(10, 10 + slot)]) for slot in range(slots)]
    lengths = [prompt.length for prompt in prompts]
    expected = []
    for slot, prompt in enumerate(prompts):
        assert torch.equal(batched.prefill([2, *range(10, 10 + slot)]).logits, prompt.logits)
        single.load_prefill(0, prompt)
        batched.load_prefill(slot, prompt)
        expected.append(single.step([100 + slot], [prompt.length])[0])
    for size in range(1, slots + 1):
        logits = batched.step([100 + slot for slot in range(size)], lengths[:size])
        assert torch.equal(logits, torch.stack(expected[:size])), size
    batched.copy_slot(20, 0, lengths[20])
    assert torch.equal(batched.step([120], [lengths[20]])[0], expected[20])
    batched.close()


def test_a_chunked_prefill_gives_the_bits_of_decode_steps():
    model = random_model(n_positions=250)
    decoder = CompiledDecoder(model, max_num_seqs=1, precision="fp32")
    ids = [number * 7 % 203 for number in range(230)]
    decoder.load_prefill(0, decoder.prefill(ids[:3]))
    for position in range(3, 230):
        logits = decoder.step([ids[position]], [position])
    assert torch.equal(decoder.prefill(ids).logits, logits[0])
    with torch.inference_mode():
        assert torch.allclose(logits[0], model(torch.tensor([ids])).logits[0, -1], atol=1e-3)


def test_a_block_of_rows_and_a_panel_of_columns_fit_the_registers():
    assert PANEL_COLUMNS in (8, 16, 32) and MAX_BLOCK_ROWS in (6, 12)


def test_greedy_equals_transformers_alone_and_in_a_batch():
    model, prompts = tiny_model(), random_prompts(50, longest=16)
    expected = [greedy_by_transformers(model, prompt, 15) for prompt in prompts]
    assert len({tuple(ids) for ids in expected}) > 20
    with Engine(model, tiny_tokenizer(), max_num_seqs=20, precision="fp32") as engine:
        assert isinstance(engine.decoder, CompiledDecoder)
        together = [engine.submit(prompt, samples=1, length=15, sampling_params=GREEDY) for prompt in prompts]
        assert [list(request.future.result(WAIT)[0].ids) for request in together] == expected
        for prompt, ids in zip(prompts, expected, strict=True):
            request = engine.submit(prompt, samples=1, length=15, sampling_params=GREEDY)
            assert list(request.future.result(WAIT)[0].ids) == ids


def test_a_seed_gives_the_same_alone_and_in_a_batch():
    with Engine(endless_model(), tiny_tokenizer(), max_num_seqs=13, precision="auto") as engine:
        assert engine.decoder.precision == "bf16"
        cases = [("一丁"[: 1 + number % 2] * (1 + number % 7), 1 + number % 4, 30 + number) for number in range(20)]

        def submit(context, samples, length):
            return engine.submit(engine.prompt(context, length), samples=samples, length=length, seed=length)

        alone = [submit(*case).future.result(WAIT) for case in cases]
        requests = [submit(*case) for case in cases]
        assert [request.future.result(WAIT) for request in requests] == alone


# Without compiled code, and until it is compiled.


def test_pytorch_decodes_where_nothing_can_be_compiled_and_says_so(monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError("no compiler for this CPU")

    monkeypatch.setattr(compiled_decoder, "load_function", fail)
    decoder = make_cpu_decoder(tiny_model(), 2, "auto")
    assert isinstance(decoder, Decoder)
    assert "slower: no compiler for this CPU" in capsys.readouterr().err
    assert torch.equal(decoder.prefill([2, 9]).logits, Decoder(tiny_model(), 2).prefill([2, 9]).logits)


def test_pytorch_decodes_a_model_whose_activation_function_is_not_compiled(capsys):
    model = random_model(activation_function="silu")
    assert isinstance(make_cpu_decoder(model, 1, "bf16"), Decoder)
    assert "no activation function silu" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_refused_by_name():
    model = random_model()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"transformer\.h\.1\.mlp\.c_fc\.weight.*diverged"):
        make_cpu_decoder(model, 1, "auto")


def test_damaged_code_does_not_count_as_cached(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "cache_folders", lambda: [tmp_path])
    assert not compiled_decoder.is_decoder_cached()
    for module in (compiled_decoder, sampling, batch_sampler):
        assert not compiled_decoder.is_decoder_cached()
        compiled.write_cached_code(compiled.cache_file_name(module.KERNEL_MODULE, module.KERNEL_SOURCES), b"code")
    assert compiled_decoder.is_decoder_cached()
    for file in tmp_path.iterdir():
        whole = file.read_bytes()
        file.write_bytes(whole[:-1])
        assert not compiled_decoder.is_decoder_cached()
        file.write_bytes(whole)


def test_the_engine_decodes_at_once_and_switches_to_the_compiled_decoder_within_a_text(monkeypatch):
    may_build = threading.Event()

    def build(*arguments):
        assert may_build.wait(WAIT)
        return make_cpu_decoder(*arguments)

    params = SamplingParams(temperature=0, repetition_penalty=2.0)
    with Engine(endless_model(), tiny_tokenizer(), max_num_seqs=4) as engine:
        prompt = engine.prompt("一丁", 100)
        expected = engine.submit(prompt, samples=3, length=100, sampling_params=params).future.result(WAIT)
    monkeypatch.setattr(engine_module, "is_decoder_cached", lambda: False)
    monkeypatch.setattr(engine_module, "make_cpu_decoder", build)
    arrived = threading.Event()

    def block_once(delta):
        """Block the model thread at its first token until the compiled decoder is ready."""
        if not arrived.is_set():
            arrived.set()
            may_build.set()
            engine._next_decoder.result(WAIT)

    engine = Engine(
        endless_model(), tiny_tokenizer(), max_num_seqs=4, precision="fp32", wait=False, prefix_cache_bytes=1 << 20
    )
    with engine:
        assert isinstance(engine.decoder, Decoder) and not engine.at_full_speed
        assert engine.prefix_cache.capacity_bytes == 0
        request = engine.submit(prompt, samples=3, length=100, sampling_params=params, on_delta=block_once)
        assert request.future.result(WAIT) == expected
        assert isinstance(engine.decoder, CompiledDecoder) and engine.at_full_speed
        for _ in range(2):
            request = engine.submit(prompt, samples=3, length=100, sampling_params=params)
            assert request.future.result(WAIT) == expected
        assert engine.prefix_cache.hits > 0 < engine.prefix_cache.capacity_bytes


def test_an_idle_engine_switches_too_and_calls_on_step_end(monkeypatch):
    may_build, switched = threading.Event(), threading.Event()
    monkeypatch.setattr(engine_module, "is_decoder_cached", lambda: False)
    monkeypatch.setattr(
        engine_module, "make_cpu_decoder", lambda *arguments: may_build.wait(WAIT) and Decoder(arguments[0], 4)
    )

    def on_step_end() -> None:
        if engine.at_full_speed:
            switched.set()

    engine = Engine(
        tiny_model(), tiny_tokenizer(), max_num_seqs=4, precision="fp32", wait=False, on_step_end=on_step_end
    )
    with engine:
        assert not engine.at_full_speed
        may_build.set()
        assert switched.wait(WAIT)


def test_a_closed_decoder_leaves_no_thread():
    def make() -> tuple[CompiledDecoder, set[threading.Thread]]:
        before = set(threading.enumerate())  # those of other tests may end meanwhile
        decoder = CompiledDecoder(random_model(), max_num_seqs=1, threads=4)
        return decoder, set(threading.enumerate()) - before

    decoder, threads = make()
    assert len(threads) == 3
    decoder.close()
    assert not threads & set(threading.enumerate())
    decoder, threads = make()
    decoder.prefill([2, 3])
    del decoder
    assert len(threads) == 3 and not threads & set(threading.enumerate())


@pytest.mark.parametrize("kind", [Decoder, CompiledDecoder])
def test_prompts_that_are_prefilled_together_give_the_bits_of_each_alone(kind):
    model = random_model()
    texts = [[2, *range(9, 9 + length)] for length in (1, 30, 2, 17, 29, 5)]
    together, alone = kind(model, max_num_seqs=6), kind(model, max_num_seqs=6)
    logits = together.prefill_batch(list(enumerate(texts)))
    assert torch.equal(logits, torch.stack([alone.prefill(ids).logits for ids in texts]))
    lengths = prefill_slots(alone, texts)
    steps = [decoder.step([8] * 6, lengths) for decoder in (together, alone)]
    assert torch.equal(*steps)


def test_requests_that_wait_together_are_admitted_together():
    with Engine(endless_model(), tiny_tokenizer(), max_num_seqs=8, precision="fp32") as engine:
        alone = [engine.complete("一丁"[:1] * n, samples=2, length=6, seed=n) for n in (1, 2, 3)]
        arrived, may_continue = threading.Event(), threading.Event()

        def block(_):
            arrived.set()
            may_continue.wait(WAIT)

        first = engine.submit(engine.prompt("丁", 2), samples=1, length=2, on_delta=block)
        assert arrived.wait(WAIT)
        prompts = [engine.prompt("一" * n, 6) for n in (1, 2, 3)]
        requests = [engine.submit(prompt, samples=2, length=6, seed=n) for n, prompt in enumerate(prompts, start=1)]
        calls, prefill_batch = [], engine.decoder.prefill_batch
        engine.decoder.prefill_batch = lambda prompts: calls.append(len(prompts)) or prefill_batch(prompts)
        may_continue.set()
        texts = [[completion.text for completion in request.future.result(WAIT)] for request in requests]
        first.future.result(WAIT)
    assert calls == [3]
    assert texts == alone
