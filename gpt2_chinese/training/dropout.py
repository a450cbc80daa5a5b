"""Dropout for training on a CPU, where PyTorch draws a random number for each unit, which takes most of its time."""

from __future__ import annotations

import torch
from torch import nn

_STEPS = 1 << 16  # of a probability: a drawn word of 64 bits decides about four units


def draw_kept(count: int, dropout: float, dtype: torch.dtype) -> torch.Tensor:
    """Which of `count` units are kept, as ones and zeros of `dtype` on the CPU, by its default generator.

    Args:
        dropout: the probability of a zero, to 1/65,536.
    """
    words = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    threshold = round(dropout * _STEPS) - _STEPS // 2
    return words.view(torch.int16)[:count].ge(min(threshold, _STEPS // 2 - 1)).to(dtype)


# Opaque to torch.compile, whose own random numbers are slow; with the tag it neither merges two draws nor repeats one.
@torch.library.custom_op(
    "gpt2_chinese::draw_kept", mutates_args=(), device_types="cpu", tags=(torch.Tag.nondeterministic_seeded,)
)
def _draw_kept(units: torch.Tensor, dropout: float) -> torch.Tensor:
    return draw_kept(units.numel(), dropout, units.dtype).view(units.shape)


@_draw_kept.register_fake
def _(units: torch.Tensor, dropout: float) -> torch.Tensor:
    return torch.empty_like(units, memory_format=torch.contiguous_format)


class CpuDropout(nn.Module):
    """What `nn.Dropout` does (Srivastava et al. 2014, scaled in training), some times faster."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, units: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return units
        return (units * _draw_kept(units.detach(), self.p)).mul_(1 / (1 - self.p))


def use_cpu_dropout(model: nn.Module) -> None:
    """Give a model on a CPU the faster dropout."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout):
                setattr(module, name, CpuDropout(child.p).train(child.training))
