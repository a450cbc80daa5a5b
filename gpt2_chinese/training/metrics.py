"""The figures of a training run, the same in TensorBoard and in metrics.jsonl."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from gpt2_chinese.artifacts import atomic_write, disk_errors


def read_point(line: bytes) -> dict[str, Any] | None:
    """A point of metrics.jsonl; None for a line that is none."""
    try:
        point = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(point, dict) or type(point.get("step")) is not int or not isinstance(point.get("kind"), str):
        return None
    return point


def _without_full_disks(report: Callable[[threading.ExceptHookArgs], Any]) -> Callable[[threading.ExceptHookArgs], Any]:
    """A `threading.excepthook` that is silent of a full disk in TensorBoard's thread, which ours raises too."""

    def hook(args: threading.ExceptHookArgs) -> None:
        if not isinstance(args.exc_value, OSError) or type(args.thread).__name__ != "_AsyncWriterThread":
            report(args)

    return hook


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
            lines = path.read_bytes().splitlines()
            points = [read_point(line) for line in lines]
            if None in points[:-1]:  # a killed run leaves half a line, and no more
                damaged = sum(point is None for point in points)
                print(f"note: {path}: {damaged} of {len(lines)} lines are damaged and left out", file=sys.stderr)
            for line, point in zip(lines, points, strict=True):
                if point is not None and point["step"] <= resumed_from:
                    kept.append(line.decode("utf-8"))
                    if point["kind"] == "validation":
                        self._validated.add(point["step"])
        with atomic_write(path) as file:
            file.writelines(line + "\n" for line in kept)
        self._writer_dir, self._excepthook = writer_dir, threading.excepthook
        threading.excepthook = _without_full_disks(self._excepthook)
        with disk_errors(writer_dir):
            self._writer = SummaryWriter(str(writer_dir), purge_step=resumed_from + 1 if resumed_from else None)
        self._file = open(path, "a", encoding="utf-8")

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            with suppress(OSError) if error is not None else nullcontext():  # the first error is told, not its echo
                with disk_errors(self._path):
                    self._file.close()
                with disk_errors(self._writer_dir):
                    self._writer.close()
        finally:
            threading.excepthook = self._excepthook

    def train(self, step: int, epoch: float, **figures: float) -> None:
        """A point of the training; a figure's name is its tag."""
        self._add("train", step, epoch, figures, prefix="")

    def validation(self, step: int, epoch: float, *, completions: dict[str, str], **figures: float) -> None:
        """A measurement of the held-out documents, and the completions of --sample_prompts."""
        self._add("validation", step, epoch, figures, prefix="validation_", completions=completions)
        with disk_errors(self._writer_dir):
            for number, (prompt, completion) in enumerate(completions.items(), start=1):
                self._writer.add_text(f"completion_{number}", prompt + completion, step)
        self._validated.add(step)
        self.flush()

    def has_validation(self, step: int) -> bool:
        """Whether the run that goes on had been measured here before it was killed."""
        return step in self._validated

    def flush(self) -> None:
        """Hand everything to the system: done before a checkpoint, so that no point before it is ever missing."""
        with disk_errors(self._path):
            self._file.flush()
        with disk_errors(self._writer_dir):
            self._writer.flush()

    def _add(self, kind: str, step: int, epoch: float, figures: dict[str, float], prefix: str, **more: Any) -> None:
        with disk_errors(self._writer_dir):
            for name, value in figures.items():
                self._writer.add_scalar(prefix + name, value, step)
        point = {
            "kind": kind,
            "step": step,
            "epoch": round(epoch, 4),
            **figures,
            **{k: v for k, v in more.items() if v},
        }
        with disk_errors(self._path):
            self._file.write(json.dumps(point, ensure_ascii=False) + "\n")
