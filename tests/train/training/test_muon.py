"""Muon: its steps are those of torch's own on each matrix, and AdamW's on the rest."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tiny_model import tiny_model
from torch import nn

from gpt2_chinese.precision import Precision
from gpt2_chinese.training.character_vectors import CharacterVectors
from gpt2_chinese.training.muon import Muon, orthogonalize
from gpt2_chinese.training.optimizers import make_optimizer


def with_singular_values(values: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.linalg.qr(torch.randn(size, shape[0], generator=generator)).Q for size in shape)
    return left * values @ right.T


@pytest.mark.parametrize("shape", [(8, 8), (8, 32), (5, 7), (32, 40)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0.28), (torch.bfloat16, 0.5)])
def test_singular_values_from_a_fortieth_of_the_greatest_come_near_one(shape, dtype, tolerance):
    """The row and column spaces stay: what comes out is U f(S) V^T for the matrix U S V^T."""
    values = torch.logspace(0, -1.6, shape[0])
    for scale in (1e-8, 1.0, 1e8):
        matrix = with_singular_values(values * scale, shape)
        result = orthogonalize(matrix[None], dtype)[0].float()
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        inside = left.T @ result @ right.T
        assert (inside.diagonal() - 1).abs().max() < tolerance
        assert (inside - torch.diag(inside.diagonal())).abs().max() < (1e-3 if dtype == torch.float32 else 0.2)


@pytest.mark.parametrize("shape", [(8, 8), (8, 32), (5, 7)])
def test_matrices_are_orthogonalised_together_as_alone(shape):
    matrices = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([orthogonalize(matrix[None], torch.float32) for matrix in matrices])
    torch.testing.assert_close(orthogonalize(matrices, torch.float32), alone, rtol=1e-4, atol=1e-5)


def gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_steps_are_torch_s_on_the_matrices_and_adamw_s_on_the_rest():
    model = tiny_model()
    reference = copy.deepcopy(model)
    ours = Muon(model, lr=1e-2, muon_lr=3e-2)
    hidden, others, fused = {}, [], []
    for name, parameter in reference.named_parameters():
        if ".h." in name and parameter.ndim == 2:
            if "c_attn" in name:
                fused += [(parameter, [nn.Parameter(part.detach().clone()) for part in parameter.chunk(3, dim=1)])]
            else:
                hidden[name] = parameter
        else:
            others.append(parameter)
    parts = [part for _, three in fused for part in three]
    settings = {"lr": 3e-2, "momentum": 0.95, "weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
    theirs = torch.optim.Muon([*hidden.values(), *parts], **settings)
    adamw = torch.optim.AdamW(others, lr=1e-2, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0)
    for step in range(3):
        gradients(model, step)
        gradients(reference, step)
        for parameter, three in fused:
            for part, gradient in zip(three, parameter.grad.chunk(3, dim=1), strict=True):
                part.grad = gradient.clone()
        ours.step()
        theirs.step()
        adamw.step()
    for parameter, three in fused:
        parameter.data = torch.cat([part.data for part in three], dim=1)
    begun = tiny_model()
    for (name, mine), other, old in zip(
        model.named_parameters(), reference.parameters(), begun.parameters(), strict=True
    ):
        if ".h." in name and mine.ndim == 2:
            # torch has other polynomials, so what both take for orthogonal differs, by up to 0.3 of a singular value.
            moved, expected = (mine - old).flatten(), (other - old).flatten()
            assert torch.cosine_similarity(moved, expected, dim=0) > 0.97, name
            assert 0.9 < moved.norm() / expected.norm() < 1.25, name
        else:
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("characters", [None, CharacterVectors([b"a", b"ab", b"b"], torch.device("cpu"))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_state_goes_on_exactly(dtype, characters):
    model = tiny_model()
    optimizer = Muon(model, lr=1e-2, muon_lr=1e-2, dtype=dtype, characters=characters, character_lr=1e-2)
    gradients(model, 1)
    optimizer.step()
    twin = copy.deepcopy(model)
    again = Muon(twin, lr=1.0, muon_lr=1.0, dtype=dtype, characters=characters, character_lr=1.0)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in (model, twin):
        gradients(each, 2)
    optimizer.step()
    again.step()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_an_update_of_a_number_that_is_none_is_not_applied(kind):
    model = tiny_model()
    optimizer = make_optimizer(model, 1e-2, optimizer=kind)
    precision = Precision("fp32", torch.device("cpu"))
    gradients(model, 1)
    precision.step(optimizer, 1.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    state = copy.deepcopy(optimizer.state_dict()["state"])
    gradients(model, 2)
    next(model.parameters()).grad[0, 0] = np.nan
    assert torch.isnan(precision.step(optimizer, 1.0))
    assert all(torch.equal(mine, old) for mine, old in zip(model.parameters(), before, strict=True))
    for number, values in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, state[number][name]) for name, value in values.items())
    gradients(model, 2)
    precision.step(optimizer, 1.0)
    assert not torch.equal(next(model.parameters()), before[0])


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_weight_decay_takes_a_share_of_the_learning_rate_from_all_but_norms_and_biases(kind):
    plain, decayed = tiny_model(), tiny_model()
    before = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
    settings = {"weight_decay": 0.1, "muon_weight_decay": 0.5}
    for model, decay in ((plain, {}), (decayed, settings)):
        optimizer = make_optimizer(model, 1e-2, optimizer=kind, muon_lr=2e-2, **decay)
        gradients(model, 3)
        Precision("fp32", torch.device("cpu")).step(optimizer, 1.0)
    for (name, one), other in zip(plain.named_parameters(), decayed.parameters(), strict=True):
        rate = 0.0
        if one.ndim == 2:
            rate = 2e-2 * 0.5 if kind == "muon" and ".h." in name else 1e-2 * 0.1
        torch.testing.assert_close(other, one - rate * before[name], rtol=1e-5, atol=1e-6, msg=name)


def test_an_update_of_a_number_that_is_none_decays_nothing():
    model = tiny_model()
    optimizer = make_optimizer(model, 1e-2, optimizer="muon", weight_decay=0.1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    gradients(model, 3)
    next(model.parameters()).grad[0, 0] = torch.nan
    Precision("fp32", torch.device("cpu")).step(optimizer, 1.0)
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
