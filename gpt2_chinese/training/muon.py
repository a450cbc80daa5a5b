"""Muon for the hidden matrices of a GPT-2, AdamW for its embeddings, norms and biases, as one optimizer.

Muon (Keller Jordan, 2024) steps along the orthogonalized momentum: every direction in which a matrix can change is
changed by as much. It wants the same learning rate as AdamW here, since a step has the root mean square of AdamW's
(Moonlight, 2025: 0.2 times the root of the longer side).
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn
from torch.optim.adamw import adamw

from gpt2_chinese.training.character_vectors import CharacterVectors
from gpt2_chinese.training.fused import TILE, Operation, run

# Odd polynomials a x + b x^3 + c x^5, one after the other, that take what lies between 0.01 and 1 to 1 +- 0.27: each is
# the one nearest to 1 on what the one before leaves (minimax, found by Remez' exchange; the greedy sequence of Polar
# Express, Amsel et al. 2025).
POLYNOMIALS = ((8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526))
WIDE = 2  # times as many columns as rows
ADAMW, SHARED = 0, -1  # instead of the matrices side by side in a parameter: AdamW's, and vectors of characters
TOKEN_EMBEDDING = "transformer.wte.weight"


def orthogonalize(matrices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Turn matrices [B, rows, columns], rows at most columns, into near-orthogonal ones of the same row space.

    Singular values of at least 1/40 of the greatest end between 0.7 and 1.3, much smaller ones below. It is computed in
    `dtype`, in matrix products alone: of X with polynomials of the Gram matrix G = X X^T.
    """
    x = matrices.to(dtype)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    gram = torch.bmm(x, x.mT)
    square = torch.bmm(gram, gram)
    # No eigenvalue of G is above the root of G^2's norm, which is near the greatest; X's own norm is some times as
    # great as its greatest singular value, and another polynomial would be needed to make up for that.
    bound = 1.01 * square.norm(dim=(1, 2), keepdim=True).sqrt() + 1e-7
    x, gram, square = x / bound.sqrt(), gram / bound, square / bound**2
    # In float32 a wide X is multiplied once, at the end: until then polynomials of G are, which are smaller.
    wide = dtype == torch.float32 and x.shape[2] >= WIDE * x.shape[1]
    product = polynomial = _polynomial(POLYNOMIALS[0], gram, square)
    if not wide:
        x = torch.bmm(polynomial, x)
    for coefficients in POLYNOMIALS[1:]:
        gram = torch.bmm(torch.bmm(polynomial, gram), polynomial) if wide else torch.bmm(x, x.mT)
        polynomial = _polynomial(coefficients, gram, torch.bmm(gram, gram))
        if wide:
            product = torch.bmm(polynomial, product)
        else:
            x = torch.bmm(polynomial, x)
    return torch.bmm(product, x) if wide else x


def _polynomial(coefficients: tuple[float, float, float], gram: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
    """a + b G + c G^2, which takes X to a X + b X X^T X + c (X X^T)^2 X."""
    a, b, c = coefficients
    polynomial = b * gram + c * square
    polynomial.diagonal(dim1=1, dim2=2).add_(a)
    return polynomial


class Muon(torch.optim.Optimizer):
    """Muon and AdamW over the parameters of a GPT-2, with decoupled weight decay.

    Args:
        model: matrices of its blocks go to Muon, the rest to AdamW.
        lr: of AdamW.
        muon_lr: of Muon.
        weight_decay: of the embeddings; norms and biases do not decay.
        muon_weight_decay: of the matrices that Muon updates.
        momentum: of Muon, in Nesterov's way.
        dtype: in which Muon orthogonalizes; bfloat16 is enough, where the device computes it.
        characters: if given, the token embeddings share vectors of characters, which AdamW updates.
        character_lr: of these vectors. They do not decay, but the embeddings do.

    A tensor `found_inf`, set as an attribute before `step`, leaves the step out where it is not 0, on the device.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        muon_lr: float,
        weight_decay: float = 0.0,
        muon_weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
        characters: CharacterVectors | None = None,
        character_lr: float = 0.0,
    ) -> None:
        fused: list[nn.Parameter] = []
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        decaying: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if ".h." in f".{name}" and parameter.ndim == 2:
                (fused if name.endswith("attn.c_attn.weight") else matrices).append(parameter)
            elif weight_decay and parameter.ndim == 2:
                decaying.append(parameter)
            else:
                others.append(parameter)
        defaults = {"betas": betas, "eps": eps, "momentum": momentum, "fused": True}
        groups: list[dict[str, Any]] = [
            # queries, keys and values are three matrices side by side
            {"params": fused, "lr": muon_lr, "weight_decay": muon_weight_decay, "parts": 3},
            {"params": matrices, "lr": muon_lr, "weight_decay": muon_weight_decay, "parts": 1},
            {"params": others, "lr": lr, "weight_decay": 0.0, "parts": ADAMW},
            {"params": decaying, "lr": lr, "weight_decay": weight_decay, "parts": ADAMW},
        ]
        self._characters = characters
        if characters is not None:
            self._embedding = next(one for name, one in model.named_parameters() if name.endswith(TOKEN_EMBEDDING))
            steps = self._embedding.new_zeros(characters.num_vectors, self._embedding.shape[1])
            groups.append({"params": [nn.Parameter(steps)], "lr": character_lr, "weight_decay": 0.0, "parts": SHARED})
        super().__init__([group for group in groups if group["params"]], defaults)
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient."""
        assert closure is None
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and found_inf.device.type == "cpu":
            if found_inf.item():
                return
            found_inf = None
        self._step_matrices(found_inf)
        for group in self.param_groups:
            if group["parts"] == SHARED:
                self._step_characters(group, found_inf)
            elif group["parts"] == ADAMW:
                self._step_others(group, found_inf)

    def _step_characters(self, group: dict[str, Any], found_inf: torch.Tensor | None) -> None:
        """The vectors themselves are in the embedding already, so the parameter that stands for them holds a step."""
        if self._characters is None or self._embedding.grad is None:
            return
        (steps,) = group["params"]
        steps.zero_()
        steps.grad = self._characters.gather(self._embedding.grad)
        self._step_others(group, found_inf)
        steps.grad = None
        moved = self._characters.spread(steps)
        self._embedding[: len(moved)].add_(moved)

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
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _step_matrices(self, found_inf: torch.Tensor | None) -> None:
        # The matrices of one shape, lying on their longer side, are multiplied at once.
        shapes: dict[tuple[int, int], list[_Matrices]] = defaultdict(list)
        for group in self.param_groups:
            for parameter in group["params"] if group["parts"] > 0 else []:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                matrices = _Matrices(parameter, parameter.grad, state["momentum"], group, found_inf)
                shapes[matrices.shape].append(matrices)
        for shape, members in shapes.items():
            device = members[0].parameter.device
            slots = torch.empty(sum(member.parts for member in members), *shape, dtype=self._dtype, device=device)
            sizes = [member.parts for member in members]
            for member, part in zip(members, slots.split(sizes), strict=True):
                member.write_directions(part)
            steps = orthogonalize(slots, self._dtype)
            for member, part in zip(members, steps.split(sizes), strict=True):
                member.add(part)


class _Matrices:
    """A parameter that is one matrix or some side by side, with the figures of an update."""

    def __init__(
        self,
        parameter: nn.Parameter,
        gradient: torch.Tensor,
        momentum: torch.Tensor,
        group: dict[str, Any],
        found_inf: torch.Tensor | None,
    ) -> None:
        self.parameter, self._gradient, self._momentum, self._found_inf = parameter, gradient, momentum, found_inf
        self.parts: int = group["parts"]
        self._lr, self._beta = group["lr"], group["momentum"]
        self._keep = 1.0 - group["lr"] * group["weight_decay"]
        self._height, self._width = parameter.shape[0], parameter.shape[1] // self.parts
        self._is_tall = self._height > self._width
        self._is_fused = found_inf is None and all(
            tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.is_contiguous()
            for tensor in (parameter, gradient, momentum)
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of one matrix that lies on its longer side."""
        return min(self._height, self._width), max(self._height, self._width)

    def write_directions(self, slots: torch.Tensor) -> None:
        """Decay the weights, update the momentum, and write what is to be orthogonalized, [parts, rows, columns]."""
        if self._is_fused:
            numbers = torch.tensor([self._beta, self._keep])
            arguments = (self._gradient, self._momentum, self.parameter, *self._sizes(), slots, numbers)
            run(Operation.MOMENTUM, slots.dtype, -(-self._height // TILE), slots.numel(), *arguments)
            return
        stopped = None if self._found_inf is None else self._found_inf > 0
        if self._keep != 1.0:
            self.parameter.mul_(self._keep if stopped is None else torch.where(stopped, 1.0, self._keep))
        changed = self._momentum.lerp(self._gradient, 1 - self._beta)
        self._momentum.copy_(changed if stopped is None else torch.where(stopped, self._momentum, changed))
        slots.copy_(self._split(self._gradient.lerp(self._momentum, self._beta)))

    def add(self, steps: torch.Tensor) -> None:
        """Add what has been orthogonalized, [parts, rows, columns]."""
        alpha = -self._lr * 0.2 * max(self.shape) ** 0.5
        if self._is_fused:
            arguments = (self.parameter, *self._sizes(), steps.contiguous(), torch.tensor([alpha]))
            run(Operation.ADD_STEPS, steps.dtype, -(-self._height // TILE), steps.numel(), *arguments)
            return
        if self._found_inf is not None:
            steps = torch.where(self._found_inf > 0, 0.0, steps)
        self._split(self.parameter).add_(steps.to(self.parameter.dtype), alpha=alpha)

    def _sizes(self) -> tuple[int, int, int, int]:
        return self._height, self._width, self.parts, int(self._is_tall)

    def _split(self, whole: torch.Tensor) -> torch.Tensor:
        """A view of [height, parts width] as [parts, rows, columns]."""
        parts = whole.view(self._height, self.parts, self._width).movedim(1, 0)
        return parts.mT if self._is_tall else parts
