"""The figures of a training run, the same in TensorBoard and in metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from gpt2_chinese.artifacts import atomic_write


class Metrics:
    """Writes points to TensorBoard and, a JSON object a line, to a file.

    Args:
        writer_dir: TensorBoard's folder.
        path: of the JSON lines; points of an earlier run are replaced.
        resumed_from: the step of the checkpoint, when a run goes on: points after it are taken back, for they will
            come again.
    """

    def __init__(self, writer_dir: str | Path, path: Path, *, resumed_from: int = 0) -> None:
        self._path = path
        self._validated: set[int] = set()
        kept = []
        if resumed_from and path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    point = json.loads(line)
                except json.JSONDecodeError:  # a killed run has left half a line
                    continue
                if point["step"] <= resumed_from:
                    kept.append(line)
                    if point["kind"] == "validation":
                        self._validated.add(point["step"])
        with atomic_write(path) as file:
            file.writelines(line + "\n" for line in kept)
        self._file = open(path, "a", encoding="utf-8")
        self._writer = SummaryWriter(str(writer_dir), purge_step=resumed_from + 1 if resumed_from else None)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        self._writer.close()

    def train(self, step: int, epoch: float, **figures: float) -> None:
        """A point of the training; a figure's name is its tag."""
        self._add("train", step, epoch, figures, prefix="")

    def validation(self, step: int, epoch: float, *, completions: dict[str, str], **figures: float) -> None:
        """A measurement of the held-out documents, and the completions of --sample_prompts."""
        self._add("validation", step, epoch, figures, prefix="validation_", completions=completions)
        for number, (prompt, completion) in enumerate(completions.items(), start=1):
            self._writer.add_text(f"completion_{number}", prompt + completion, step)
        self._validated.add(step)
        self.flush()

    def has_validation(self, step: int) -> bool:
        """Whether the run that goes on had been measured here before it was killed."""
        return step in self._validated

    def flush(self) -> None:
        """Hand everything to the system: done before a checkpoint, so that no point before it is ever missing."""
        self._file.flush()
        self._writer.flush()

    def _add(self, kind: str, step: int, epoch: float, figures: dict[str, float], prefix: str, **more: Any) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(prefix + name, value, step)
        point = {
            "kind": kind,
            "step": step,
            "epoch": round(epoch, 4),
            **figures,
            **{k: v for k, v in more.items() if v},
        }
        self._file.write(json.dumps(point, ensure_ascii=False) + "\n")
