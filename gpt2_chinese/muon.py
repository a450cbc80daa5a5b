"""Muon for the hidden matrices of a GPT-2, AdamW for its embeddings, norms and biases, as one optimizer.

Muon (Keller Jordan, 2024) steps along the orthogonalised momentum: every direction in which a matrix can change is
changed by as much. It wants the same learning rate as AdamW here, since a step has the root mean square of AdamW's
(Moonlight, 2025: 0.2 times the root of the longer side).
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn
from torch.optim.adamw import adamw

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a quintic that drives singular values towards 1, at the steepest
ITERATIONS = 5


def orthogonalised(matrices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Turn matrices [B, rows, columns], rows at most columns, into near-orthogonal ones of the same row space.

    Their singular values end between about 0.7 and 1.2. It is computed in `dtype`, in matrix products alone.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.to(dtype)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """Muon and AdamW over the parameters of a GPT-2, without weight decay.

    Args:
        model: matrices of its blocks go to Muon, the rest to AdamW.
        lr: of AdamW.
        muon_lr: of Muon.
        momentum: of Muon, in Nesterov's way.
        dtype: in which Muon orthogonalises; bfloat16 is enough, where the device computes it.

    A tensor `found_inf`, set as an attribute before `step`, leaves the step out where it is not 0, on the device.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        muon_lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        fused: list[nn.Parameter] = []
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if ".h." in f".{name}" and parameter.ndim == 2:
                (fused if name.endswith("attn.c_attn.weight") else matrices).append(parameter)
            else:
                others.append(parameter)
        defaults = {"betas": betas, "eps": eps, "momentum": momentum, "fused": True}
        groups: list[dict[str, Any]] = [
            {"params": fused, "lr": muon_lr, "parts": 3},  # queries, keys and values are three matrices side by side
            {"params": matrices, "lr": muon_lr, "parts": 1},
            {"params": others, "lr": lr, "parts": 0},  # AdamW
        ]
        super().__init__([group for group in groups if group["params"]], defaults)
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient."""
        assert closure is None
        found_inf = getattr(self, "found_inf", None)
        self._step_matrices(found_inf)
        for group in self.param_groups:
            if group["parts"] == 0:
                self._step_others(group, found_inf)

    def _step_others(self, group: dict[str, Any], found_inf: torch.Tensor | None) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            found_inf=found_inf,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=0.0,
            eps=group["eps"],
            maximize=False,
        )

    def _step_matrices(self, found_inf: torch.Tensor | None) -> None:
        # 1) momentum; the matrices of one shape, lying on their longer side, are collected to be multiplied at once
        shapes: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor, float]]] = defaultdict(list)
        for group in self.param_groups:
            for parameter in group["params"] if group["parts"] else []:
                gradient = parameter.grad
                if gradient is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"]
                changed = momentum.lerp(gradient, 1 - group["momentum"])
                momentum.copy_(changed if found_inf is None else torch.where(found_inf > 0, momentum, changed))
                direction = gradient.lerp(momentum, group["momentum"])
                for weights, part in zip(
                    parameter.chunk(group["parts"], dim=1), direction.chunk(group["parts"], dim=1), strict=True
                ):
                    if part.shape[0] > part.shape[1]:
                        weights, part = weights.mT, part.mT
                    shapes[tuple(part.shape)].append((weights, part, group["lr"]))
        # 2) orthogonalised, and added
        for (_, longer), members in shapes.items():
            steps = orthogonalised(torch.stack([part for _, part, _ in members]), self._dtype)
            if found_inf is not None:
                steps = torch.where(found_inf > 0, 0.0, steps)
            for (weights, _, lr), step in zip(members, steps, strict=True):
                weights.add_(step.to(weights.dtype), alpha=-lr * 0.2 * longer**0.5)
