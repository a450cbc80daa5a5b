"""The CPU's dropout: how much it drops, that the mean stays, its gradients, and that no two draws are the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2_chinese.training.dropout import CpuDropout, draw_kept
from gpt2_chinese.training.loss import WindowLoss


@pytest.mark.parametrize("dropout", [0.0, 0.001, 0.1, 0.5, 0.9, 0.9999])
def test_the_stated_share_is_dropped(dropout):
    torch.manual_seed(0)
    kept = draw_kept(1_000_003, dropout, torch.float32)
    assert kept.shape == (1_000_003,) and set(kept.unique().tolist()) <= {0.0, 1.0}
    deviation = (dropout * (1 - dropout) / 1e6) ** 0.5
    assert 1 - kept.double().mean() == pytest.approx(dropout, abs=4 * deviation + 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_is_scaled_and_has_the_gradient(dtype):
    torch.manual_seed(0)
    units = torch.ones(3, 5, 700, dtype=dtype, requires_grad=True)
    dropped = CpuDropout(0.2)(units)
    assert dropped.dtype == dtype
    assert dropped.detach().unique().tolist() == [0, pytest.approx(1.25, rel=0.01)]
    dropped.sum().backward()
    assert torch.equal(units.grad, dropped.detach())
    assert dropped.double().mean().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_no_two_draws_are_the_same_and_a_seed_decides_them(backend):
    layer = CpuDropout(0.5)

    def twice(units):
        return layer(units), layer(units + 1) / 2

    drop = torch.compile(twice, backend=backend) if backend else twice
    units = torch.ones(1000, requires_grad=True)
    torch.manual_seed(3)
    first, second = drop(units)
    torch.manual_seed(3)
    again, _ = drop(units)
    assert torch.equal(first, again) and not torch.equal(first, second)
    (gradient,) = torch.autograd.grad((again * again).sum() / 4, units)
    assert torch.equal(gradient, again.detach())  # of what was drawn, not of another draw


def test_it_takes_the_place_of_pytorch_s_and_is_off_outside_training():
    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, n_positions=8, n_ctx=8, vocab_size=11)
    model = GPT2LMHeadModel(config)
    assert any(isinstance(module, nn.Dropout) for module in model.modules())
    names = model.state_dict().keys()
    WindowLoss(model.eval())
    assert not any(module.training for module in model.modules() if isinstance(module, CpuDropout))
    assert not any(isinstance(module, nn.Dropout) for module in model.modules())
    assert names == model.state_dict().keys() and model.config.resid_pdrop == 0.1
    units = torch.ones(9)
    assert torch.equal(CpuDropout(0.5).eval()(units), units) and torch.equal(CpuDropout(0.0)(units), units)
