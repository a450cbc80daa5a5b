"""Vectors of characters: the embeddings move as if they were sums of vectors that tokens share."""

from __future__ import annotations

import pytest
import torch
from small_run import assert_same_weights, run, weights, write_documents
from tiny_model import tiny_model
from torch import nn

from gpt2_chinese.training import trainable
from gpt2_chinese.training.character_vectors import CharacterVectors
from gpt2_chinese.training.muon import Muon

CPU = torch.device("cpu")
TEXTS = [*(text.encode() for text in ["", "医", "医生", "生病", "病", "hat"]), "药".encode()[:2], b"\x8d"]
FIRST = torch.tensor([0, 1, 1, 2, 3, 4, 5, 6])  # the vector of each token; those without text have their own
LAST = torch.tensor([7, 8, 9, 10, 10, 11, 12, 13])


def gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def optimizer_of(model: nn.Module, lr: float = 1e-2, character_lr: float = 5e-2, decay: float = 0.0) -> Muon:
    return Muon(
        model,
        lr=lr,
        muon_lr=lr,
        weight_decay=decay,
        muon_weight_decay=decay,
        characters=CharacterVectors(TEXTS, CPU),
        character_lr=character_lr,
    )


def test_tokens_with_the_same_first_or_last_character_share_a_vector():
    characters = CharacterVectors(TEXTS, CPU)
    assert characters.num_vectors == 14
    gradient = torch.randn(len(TEXTS) + 3, 5, generator=torch.Generator().manual_seed(1))
    sums = torch.zeros(14, 5)
    for vectors in (FIRST, LAST):
        sums.index_add_(0, vectors, gradient[: len(TEXTS)])
    gathered = characters.gather(gradient)
    assert sorted(gathered.sum(dim=1).tolist()) == pytest.approx(sorted(sums.sum(dim=1).tolist()))
    # Each token moves by as much as its two vectors do.
    torch.testing.assert_close(characters.spread(gathered), sums[FIRST] + sums[LAST])


def test_steps_are_adamw_s_on_a_sum_of_vectors():
    """Beside a model whose embedding is the sum of parameters, whose gradients autograd finds."""
    model = tiny_model()
    begun = model.transformer.wte.weight.detach().clone()
    optimizer = optimizer_of(model)
    own, vectors = nn.Parameter(begun.clone()), nn.Parameter(torch.zeros(14, begun.shape[1]))
    reference = torch.optim.AdamW(
        [{"params": [own], "lr": 1e-2}, {"params": [vectors], "lr": 5e-2}],
        betas=(0.9, 0.999),
        eps=1e-6,
        weight_decay=0.0,
    )

    def embedding() -> torch.Tensor:
        others = begun.new_zeros(len(begun) - len(TEXTS), begun.shape[1])
        return own + torch.cat([vectors[FIRST] + vectors[LAST], others])

    for step in range(4):
        gradients(model, step)
        reference.zero_grad()
        (embedding() * model.transformer.wte.weight.grad).sum().backward()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(model.transformer.wte.weight, embedding(), rtol=1e-5, atol=1e-6)
    assert (model.transformer.wte.weight - own).abs().max() > 0.1


def test_the_sums_decay():
    model = tiny_model()
    begun = model.transformer.wte.weight.detach().clone()
    optimizer = optimizer_of(model, decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model.transformer.wte.weight, begun * (1 - 1e-2 * 0.5))


def test_a_run_with_vectors_of_characters_learns_other_embeddings_with_a_padded_vocabulary_too(train, monkeypatch):
    write_documents([20] * 20)
    flags = ["--optimizer", "muon", "--lr", "1e-3"]
    for name, more in (("plain", []), ("shared", ["--character_lr", "0.05"])):
        assert run(train, *flags, *more, output_dir=name, writer_dir=f"{name}/tb") == 0
    monkeypatch.setattr(trainable, "PADDED_DEVICES", {"cpu"})
    assert run(train, *flags, "--character_lr", "0.05", output_dir="padded", writer_dir="padded/tb") == 0
    assert_same_weights(weights("shared/final_model"), weights("padded/final_model"), rtol=1e-4, atol=1e-6)
    plain, shared = (weights(f"{name}/final_model")["transformer.wte.weight"] for name in ("plain", "shared"))
    assert (plain - shared).abs().max() > 0.05


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optimizer", "adamw"], "--character_lr 0.1 is for --optimizer muon"),
        (
            ["--optimizer", "muon", "--amp_backend", "apex"],
            "--character_lr has no form for --amp_backend apex",
        ),
    ],
)
def test_vectors_of_characters_are_muon_s_and_torch_s(train, flags, message):
    write_documents([20] * 20)
    with pytest.raises(ValueError, match=message):
        run(train, "--character_lr", "0.1", *flags)
