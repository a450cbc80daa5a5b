"""The optimizers and the schedule of their learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from gpt2_chinese.training.character_vectors import CharacterVectors
from gpt2_chinese.training.muon import Muon

PEAK = "highest_lr"  # of a parameter group: the rate that the schedule multiplies


def make_optimizer(
    model: nn.Module,
    lr: float,
    *,
    optimizer: str = "adamw",
    muon_lr: float | None = None,
    weight_decay: float = 0.0,
    muon_weight_decay: float | None = None,
    dtype: torch.dtype = torch.float32,
    characters: CharacterVectors | None = None,
    character_lr: float = 0.0,
) -> torch.optim.Optimizer:
    """The reference's AdamW, save that torch adds eps after the bias correction (docs/differences.md); or Muon.

    Args:
        muon_lr: of the matrices that Muon updates; `lr` if None.
        weight_decay: decoupled (Loshchilov and Hutter 2019): an update takes this share of the learning rate from
            each weight; norms and biases do not decay.
        muon_weight_decay: of the matrices that Muon updates; `weight_decay` if None.
        dtype: in which Muon orthogonalizes.
        characters, character_lr: as of Muon, for `optimizer` "muon" only.
    """
    made: torch.optim.Optimizer
    if optimizer == "muon":
        made = Muon(
            model,
            lr=lr,
            muon_lr=muon_lr or lr,
            weight_decay=weight_decay,
            muon_weight_decay=weight_decay if muon_weight_decay is None else muon_weight_decay,
            dtype=dtype,
            characters=characters,
            character_lr=character_lr,
        )
    else:
        assert characters is None
        made = torch.optim.AdamW(_decay_groups(model, weight_decay), lr=lr, betas=(0.9, 0.999), eps=1e-6, fused=True)
    for group in made.param_groups:
        group[PEAK] = group["lr"]
    return made


def _decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters that decay, and those that do not."""
    parameters = list(model.parameters())
    if weight_decay == 0.0:
        return [{"params": parameters, "weight_decay": 0.0}]
    return [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]


def learning_rate_factor(
    step: int, *, warmup_steps: int, total_steps: int, schedule: str = "linear", decay_fraction: float = 0.4
) -> float:
    """The share of the peak learning rate at update `step` (from 0): a linear warm-up from 0, then down to 0.

    Args:
        schedule: linear; wsd (warm-up, stable, decay), which is constant and then decays linearly over the last
            `decay_fraction` of the run; cosine.
    """
    if step < warmup_steps:
        return step / warmup_steps
    left = max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))
    if schedule == "wsd":
        return min(1.0, max(0, total_steps - step) / max(1.0, decay_fraction * total_steps))
    if schedule == "cosine":
        return 0.5 - 0.5 * math.cos(math.pi * left)
    return left


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give every parameter group this share of its peak learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group[PEAK] * factor
