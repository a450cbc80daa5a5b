"""The blocks that are written out for a CPU, beside the same in PyTorch's operations."""

import ctypes
import functools
import math
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2_chinese.training import blocks, fused
from gpt2_chinese.training.blocks import Branch, Dropout, Norm, Shape, blocks_output, can_be_written_out
from gpt2_chinese.training.fused import Operation, add_softmax, cross_entropy_in_place, run
from gpt2_chinese.training.loss import WindowLoss, hidden_states, written_out_states

MARKS = {"bos_token_id": 0, "eos_token_id": 0}


def make_model(*, n_positions=300, dropout=0.0, **settings):
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "n_positions": n_positions, "n_embd": 24, "n_layer": 2, "n_head": 3} | MARKS
    rates = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), dropout)
    model = GPT2LMHeadModel(GPT2Config(**shape | rates | settings)).train()
    for parameter in model.parameters():  # biases and norms too, which begin as zeros and ones
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def states_and_gradients(model, states_of, outer, *, dtype=torch.float32):
    """What `states_of` makes of embeddings; and the gradients of them and of every parameter."""
    model.zero_grad()
    embedded = F.embedding(torch.arange(outer[..., 0].numel()) % 50, model.transformer.wte.weight.detach())
    embedded = embedded.view(outer.shape).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        states = states_of(embedded)
    (states.float() * outer).sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.transformer.parameters() if parameter.grad is not None]
    return [states.detach().float(), embedded.grad, *gradients]


def assert_near(found, wanted, tolerance):
    assert len(found) == len(wanted)
    for own, other in zip(found, wanted, strict=True):
        assert (own - other).norm() <= tolerance * other.norm() + 1e-6


def both_ways(model, length, *, first=None, dtype=torch.float32):
    """The written-out blocks' states and gradients, and transformers' with our attention."""
    WindowLoss(model)  # sets the attention
    outer = torch.randn(2, length, model.config.n_embd)
    position_ids = None if first is None else (torch.arange(length) % first).expand(2, -1).contiguous()
    ids = torch.zeros(2, length, dtype=torch.int64)
    return (
        states_and_gradients(model, lambda e: written_out_states(model, position_ids, e), outer, dtype=dtype),
        states_and_gradients(model, lambda e: hidden_states(model, ids, position_ids, e), outer, dtype=dtype),
    )


@pytest.mark.parametrize("length", [1, 7, 128, 129, 300])
@pytest.mark.parametrize("first", [None, 1, 50])
def test_states_and_gradients_are_those_of_transformers(length, first):
    written_out, wanted = both_ways(make_model(), length, first=first)
    assert_near(written_out, wanted, 1e-5)


def test_weights_of_long_windows_are_computed_again(monkeypatch):
    monkeypatch.setattr(blocks, "LONGEST_KEPT", 100)
    written_out, wanted = both_ways(make_model(), 200, first=30)
    assert_near(written_out, wanted, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_computed_again_is_the_same_to_the_bit(dtype):
    model = make_model(dropout=0.2)
    outer = torch.randn(2, 150, 24)

    def results(recompute):
        torch.manual_seed(3)
        states_of = functools.partial(blocks_output, model, first_keys=None, recompute=recompute)
        return states_and_gradients(model, states_of, outer, dtype=dtype)

    assert all(torch.equal(own, other) for own, other in zip(results(False), results(True), strict=True))


def test_bf16_is_as_near_to_float32_as_transformers_is():
    model = make_model()
    exact, _ = both_ways(model, 140)
    torch.manual_seed(1)
    outer = torch.randn(2, 140, 24)
    exact = states_and_gradients(model, lambda e: written_out_states(model, None, e), outer)
    ids = torch.zeros(2, 140, dtype=torch.int64)
    found = states_and_gradients(model, lambda e: written_out_states(model, None, e), outer, dtype=torch.bfloat16)
    theirs = states_and_gradients(model, lambda e: hidden_states(model, ids, None, e), outer, dtype=torch.bfloat16)

    def distance(some):
        return sum(float((own - other).norm() / other.norm()) for own, other in zip(some, exact, strict=True))

    assert distance(found) <= 1.2 * distance(theirs)
    assert distance(theirs) > 0


def mask_of(dropout, rows, width):
    """The scaled mask of a dropout over [rows, width]: what it makes of a branch of ones."""
    sizes = {"windows": 1, "length": rows, "heads": 1, "width": width, "dtype": torch.float32, "epsilon": 1e-5}
    ones, zeros = torch.ones(width), torch.zeros(width)
    branch = Branch(torch.ones(rows, width), zeros, dropout)
    shape = Shape(**sizes, dropouts=(), first_keys=None)
    return Norm(shape, torch.zeros(rows, width), branch, ones, zeros).stream


def plain_states(model, embedded, dropouts):
    """A GPT-2 in PyTorch's operations with given masks."""
    windows, length, width = embedded.shape
    heads, size = model.config.n_head, width // model.config.n_head
    hidden = embedded
    for block, (of_weights, of_output, of_network) in zip(model.transformer.h, dropouts, strict=True):
        product = block.attn.c_attn(block.ln_1(hidden)).view(windows, length, 3, heads, size)
        queries, keys, values = product.permute(2, 0, 3, 1, 4)
        scores = queries @ keys.mT / math.sqrt(size)
        weights = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -math.inf).softmax(-1)
        weights = weights * mask_of(of_weights, windows * heads * length, length).view(weights.shape)
        attended = (weights @ values).transpose(1, 2).reshape(embedded.shape)
        hidden = hidden + block.attn.c_proj(attended) * mask_of(of_output, windows * length, width).view(hidden.shape)
        inner = F.gelu(block.mlp.c_fc(block.ln_2(hidden)), approximate="tanh")
        hidden = hidden + block.mlp.c_proj(inner) * mask_of(of_network, windows * length, width).view(hidden.shape)
    return model.transformer.ln_f(hidden)


@pytest.mark.parametrize("length", [9, 150])
def test_dropout_has_the_gradients_of_the_masks_that_it_drew(length, monkeypatch):
    model = make_model(dropout=0.3)
    drawn = list(blocks._dropouts(list(model.transformer.h), True))
    monkeypatch.setattr(blocks, "_dropouts", lambda *_: drawn)
    outer = torch.randn(2, length, 24)
    found = states_and_gradients(model, lambda e: blocks_output(model, e, None), outer)
    assert_near(found, states_and_gradients(model, lambda e: plain_states(model, e, drawn), outer), 1e-5)


def test_what_dropout_keeps_is_a_fair_share_and_differs_from_seed_to_seed():
    masks = torch.stack(
        [mask_of(Dropout(seed, round(0.3 * 2**32)), 400, 250) for seed in (1, 2, 1 << 40, (1 << 62) + 1)]
    )
    kept = (masks > 0).double()
    assert (kept.mean((1, 2)) - 0.7).abs().max() < 0.007  # five standard errors of 100,000 units
    assert (masks[masks > 0] - 1 / 0.7).abs().max() < 1e-6
    flat = kept.flatten(1) - 0.7
    correlations = flat @ flat.T / flat.shape[1] / 0.21
    assert (correlations - torch.eye(4)).abs().max() < 0.02
    for shift in (1, 2, 16, 250):  # neighbours in a row and in a column
        assert (flat[0, shift:] * flat[0, :-shift]).mean().abs() / 0.21 < 0.02


def test_dropout_is_decided_by_the_generator_of_torch():
    model = make_model(dropout=0.3)
    embedded = torch.randn(2, 20, 24)

    def states(seed):
        torch.manual_seed(seed)
        return blocks_output(model, embedded, None)

    assert torch.equal(states(1), states(1)) and not torch.equal(states(1), states(2))
    model.eval()
    assert torch.equal(states(1), states(2))


@pytest.mark.parametrize("has_openmp", [True, False])
def test_no_result_depends_on_the_number_of_threads(monkeypatch, has_openmp):
    if has_openmp and fused._openmp_parallel() is None:
        pytest.skip("PyTorch's OpenMP cannot be called here")
    monkeypatch.setattr(fused, "_openmp_works", has_openmp)
    unused = "_helpers" if has_openmp else "_openmp_parallel"
    monkeypatch.setattr(fused, unused, lambda *_: pytest.fail("the other threads were to be used"))
    monkeypatch.setattr(fused, "_NUMBERS_WORTH_A_THREAD", 1)
    model = make_model(dropout=0.2)
    outer = torch.randn(2, 150, 24)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            # PyTorch's own products may differ with its threads, so only ours get more.
            monkeypatch.setattr(fused, "_threads", lambda threads=threads: threads)
            torch.manual_seed(3)
            results.append(states_and_gradients(model, lambda e: blocks_output(model, e, None), outer))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(own, theirs) for own, theirs in zip(results[0], other, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="only PyTorch's packages for Linux have GNU's OpenMP")
def test_openmp_of_pytorch_is_found_and_calls_a_function_in_each_of_its_threads():
    parallel = fused._openmp_parallel()
    assert parallel is not None
    threads = []
    parallel(ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: threads.append(threading.get_native_id())), None, 2, 0)
    assert 1 <= len(set(threads)) == len(threads) <= 2  # OMP_THREAD_LIMIT and others may allow fewer


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_a_forked_process_has_threads_of_its_own(monkeypatch):
    monkeypatch.setattr(fused, "_NUMBERS_WORTH_A_THREAD", 1)
    monkeypatch.setattr(fused, "_threads", lambda: 2)
    logits = torch.randn(300, 40)
    targets = torch.arange(300) % 40
    expected = cross_entropy_in_place(logits.clone(), targets).tolist()
    child = os.fork()
    if not child:
        try:
            status = 0 if cross_entropy_in_place(logits, targets).tolist() == expected else 1
        except BaseException:
            status = 2
        os._exit(status)  # this process has nothing to do with the rest of the tests
    for _ in range(300):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("it waits for threads that it has not")
    assert status == 0


def test_two_python_threads_may_train_at_once(monkeypatch):
    monkeypatch.setattr(fused, "_NUMBERS_WORTH_A_THREAD", 1)
    monkeypatch.setattr(fused, "_threads", lambda: 2)
    models = [make_model() for _ in range(2)]
    outer = torch.randn(2, 64, 24)
    barrier = threading.Barrier(2)

    def train(model):
        barrier.wait()
        return [states_and_gradients(model, lambda e: blocks_output(model, e, None), outer) for _ in range(5)]

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(train, models)
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(own, theirs) for own, theirs in zip(one, other, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 200),
    st.integers(1, 90),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([0.01, 1.0, 30.0]),
    st.integers(0, 10**6),
)
def test_cross_entropy_and_its_gradient_are_those_of_torch(rows, columns, dtype, spread, seed):
    torch.manual_seed(seed)
    logits = (spread * torch.randn(rows, columns)).to(dtype)
    targets = torch.randint(columns, (rows,))
    wanted = logits.double().requires_grad_()
    losses = F.cross_entropy(wanted, targets, reduction="none")
    losses.sum().backward()
    found = cross_entropy_in_place(logits, targets)
    torch.testing.assert_close(found.double(), losses.detach(), rtol=1e-5, atol=1e-5)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(logits.double(), wanted.grad, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_logit_that_is_not_finite_makes_its_row_nan_and_no_other(bad, dtype):
    logits = torch.randn(3, 40).to(dtype)
    logits[1, 20] = bad
    losses = cross_entropy_in_place(logits, torch.tensor([1, 2, 3]))
    assert losses.isnan().tolist() == [False, True, False]
    assert logits.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("place", ["ln_1.weight", "attn.c_attn.weight", "mlp.c_fc.bias", "mlp.c_proj.weight"])
def test_weights_that_are_not_finite_make_states_that_are_not(place):
    model = make_model()
    model.transformer.h[0].get_parameter(place).data[0] = math.nan
    assert not blocks_output(model, torch.randn(1, 5, 24), None).isfinite().all()


def test_large_inputs_of_gelu_neither_overflow_nor_vanish():
    inputs = torch.tensor([[-1e30, -100.0, -10.0, -1.0, 0.0, 1.0, 10.0, 100.0, 1e30]])
    outputs = torch.empty_like(inputs)
    run(Operation.GELU, torch.float32, 1, inputs.numel(), inputs, inputs.numel(), torch.zeros(9), outputs)
    torch.testing.assert_close(outputs, F.gelu(inputs, approximate="tanh"), atol=1e-6, rtol=1e-5)


def test_only_what_is_written_out_is_taken_for_it():
    assert can_be_written_out(make_model())
    assert not can_be_written_out(make_model(activation_function="relu"))
    assert not can_be_written_out(make_model(activation_function="gelu"))
    assert not can_be_written_out(make_model(scale_attn_weights=False))
    assert not can_be_written_out(make_model(scale_attn_by_inverse_layer_idx=True))
    assert not can_be_written_out(make_model(add_cross_attention=True))
    assert not can_be_written_out(make_model().bfloat16())
    model = make_model()
    model.transformer.h[1] = nn.Identity()
    assert not can_be_written_out(model)


def test_a_second_backward_pass_is_an_error():
    model = make_model()
    states = blocks_output(model, torch.randn(1, 5, 24, requires_grad=True), None)
    states.sum().backward(retain_graph=True)
    with pytest.raises(AssertionError, match="second backward"):
        states.sum().backward()


def test_other_types_than_the_compiled_ones_are_refused_and_left_to_pytorch():
    logits = torch.zeros(3, 40, dtype=torch.float16)
    with pytest.raises(AssertionError):
        cross_entropy_in_place(logits, torch.tensor([1, 2, 3]))
    with torch.autocast("cpu", torch.float16):
        assert not can_be_written_out(make_model())
    with torch.autocast("cpu", torch.bfloat16):
        assert can_be_written_out(make_model())


def test_numbers_that_do_not_lie_side_by_side_are_refused():
    with pytest.raises(AssertionError):
        cross_entropy_in_place(torch.zeros(40, 3).T, torch.tensor([1, 2, 3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distributions_are_wanted_in_their_share(dtype):
    torch.manual_seed(0)
    logits, others = (2 * torch.randn(70, 40)).to(dtype), [(2 * torch.randn(70, 40)).to(dtype) for _ in range(3)]
    targets = torch.randint(40, (70,))
    mean = torch.stack([other.double().softmax(1) for other in others]).mean(0)
    wanted = logits.double().requires_grad_()
    losses = F.cross_entropy(wanted, targets, reduction="none")
    (0.4 * losses.sum() + 0.6 * F.cross_entropy(wanted, mean, reduction="sum")).backward()
    distributions = torch.zeros_like(logits)
    for other in others:
        add_softmax(other, distributions, 1 / 3)
    found = cross_entropy_in_place(logits, targets, distributions, 0.6)
    torch.testing.assert_close(found.double(), losses.detach(), rtol=1e-5, atol=1e-5)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(logits.double(), wanted.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("target", [-1, 40])
def test_a_target_outside_the_vocabulary_is_an_error(target):
    with pytest.raises(AssertionError):
        cross_entropy_in_place(torch.zeros(3, 40), torch.tensor([1, target, 3]))
