"""Where a run stands: with the weights and the random states it decides all that follows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DIVERGED_UPDATES = 50
TAKE_A_LOWER_LR = (
    "Take a lower --lr with --resume none (the model folders of earlier epochs and the checkpoints are untouched)"
)


class RunningLoss:
    """Sums over the updates of the epoch at hand, kept on the device so that adding to them waits for nothing.

    Reading a property waits for the device.
    """

    def __init__(self, device: torch.device, sums: Sequence[float] = ()) -> None:
        # loss times windows; windows; updates with a bad loss or gradient, in a row; the same, in all; updates in a row
        # whose loss is above `limit`. Checkpoints of earlier versions have the first four.
        self._sums = torch.tensor([*sums, *[0.0] * (5 - len(sums))], dtype=torch.float64, device=device)

    def add(self, loss: Tensor, is_finite: Tensor, windows: int, limit: float = math.inf) -> None:
        """Count an update: its mean loss over so many windows, or that it was bad and is left out."""
        one = torch.ones_like(self._sums[0])
        self._sums[:2] += torch.where(is_finite, torch.stack([loss.double(), one]) * windows, 0.0)
        self._sums[2] = torch.where(is_finite, 0.0, self._sums[2] + 1)
        self._sums[3] += ~is_finite
        self._sums[4] = torch.where(loss > limit, self._sums[4] + 1, 0.0)

    @property
    def windows(self) -> int:
        return int(self._sums[1])

    @property
    def mean(self) -> float:
        """The mean loss, in nats for a token; `windows` must not be 0."""
        loss_sum, windows, *_ = self._sums.tolist()
        return float(loss_sum / windows)

    @property
    def bad_in_a_row(self) -> int:
        return int(self._sums[2])

    @property
    def diverged_in_a_row(self) -> int:
        return int(self._sums[4])

    @property
    def bad(self) -> int:
        return int(self._sums[3])

    def start_epoch(self) -> None:
        self._sums[:2] = 0.0

    def tolist(self) -> list[float]:
        return list(self._sums.tolist())


@dataclass
class TrainingState:
    """
    Attributes:
        step: updates so far.
        skipped: of them left out because fp16 overflowed; the learning rate waits for them.
        epoch_seconds: in the epoch at hand.
        epoch_loss: mean of the last whole epoch.
        best_bits: the fewest bits per character of the validation set so far, after update `best_step`, when the
            training loss was `best_training_loss`.
        since_best: measurements since then.
        scale: the factor on the logits that the last measurement has found the best, 1 without --calibrate.
    """

    running: RunningLoss
    step: int = 0
    skipped: int = 0
    epoch_seconds: float = 0.0
    epoch_loss: float = math.nan
    best_bits: float = math.inf
    best_step: int = 0
    best_training_loss: float = math.nan
    since_best: int = 0
    scale: float = 1.0

    def advance(
        self, loss: Tensor, grad_norm: Tensor, *, windows: int, may_skip: bool, limit: float = math.inf
    ) -> None:
        """Count an update, given its mean loss, of so many windows, and the norm of its gradient.

        Args:
            may_skip: in fp16 a gradient that is not finite is no fault but an update that was left out.
            limit: a loss above it is worse than guessing.
        """
        self.step += 1
        if may_skip:
            self.skipped += not math.isfinite(grad_norm)
        self.running.add(loss, torch.isfinite(grad_norm) & torch.isfinite(loss), windows, limit)

    def check_finite(self, loss: Tensor, grad_norm: Tensor, *, max_bad_updates: int) -> None:
        """Stop a run whose weights are lost before it saves them. Reading the figures waits for the device.

        Raises:
            ValueError: so many updates in a row had a loss or a gradient that is not finite.
        """
        bad = self.running.bad_in_a_row
        if bad >= max_bad_updates:
            raise ValueError(
                f"update {self.step}: the loss is {loss.item()}, the norm of its gradient {grad_norm.item()}, {bad} "
                f"updates in a row. {TAKE_A_LOWER_LR}"
            )

    def check_converging(self, limit: float, *, max_bad_updates: int) -> None:
        """Stop a run that has learnt nothing or lost what it had learnt. Reading the figure waits for the device.

        Raises:
            ValueError: the loss of so many updates in a row, and of at least `DIVERGED_UPDATES`, was above `limit`.
        """
        in_a_row = self.running.diverged_in_a_row
        if in_a_row >= max(DIVERGED_UPDATES, max_bad_updates):
            raise ValueError(
                f"update {self.step}: the loss has been above {limit:.2f}, worse than guessing a token of the "
                f"vocabulary, for {in_a_row} updates: the run has diverged. {TAKE_A_LOWER_LR}"
            )

    def end_epoch(self, epoch: int) -> None:
        """Take the mean loss of an epoch (from 1).

        Raises:
            ValueError: every one of its updates was skipped.
        """
        if not self.running.windows:
            raise ValueError(f"every update of epoch {epoch} overflowed in fp16; take --precision fp32 or bf16")
        self.epoch_loss = self.running.mean

    def measured(self, bits_per_character: float, scale: float | None = None) -> bool:
        """Take a measurement of the validation set; gives whether it is the best so far."""
        self.scale = 1.0 if scale is None else scale
        if bits_per_character < self.best_bits:
            self.best_bits, self.best_step, self.since_best = bits_per_character, self.step, 0
            self.best_training_loss = self.training_loss
            return True
        self.since_best += 1
        return False

    @property
    def training_loss(self) -> float:
        """The mean of the current epoch, or of the one that has just ended. Reading it waits for the device."""
        return self.running.mean if self.running.windows else self.epoch_loss

    @property
    def overfits(self) -> bool:
        """Whether the training loss falls and the validation loss has not for two measurements; one may be chance."""
        return self.since_best > 1 and self.training_loss < self.best_training_loss

    def start_epoch(self) -> None:
        self.running.start_epoch()
        self.epoch_seconds = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Numbers, as checkpoints keep them."""
        return {
            "step": self.step,
            "skipped": self.skipped,
            "sums": self.running.tolist(),
            "epoch_seconds": self.epoch_seconds,
            "epoch_loss": self.epoch_loss,
            "best_bits": self.best_bits,
            "best_step": self.best_step,
            "best_training_loss": self.best_training_loss,
            "since_best": self.since_best,
            # Earlier versions can go on from a run that has none.
            **({"scale": self.scale} if self.scale != 1.0 else {}),
        }

    @classmethod
    def from_state_dict(cls, values: dict[str, Any], device: torch.device) -> TrainingState:
        rest = {name: value for name, value in values.items() if name != "sums"}
        return cls(RunningLoss(device, values["sums"]), **rest)
