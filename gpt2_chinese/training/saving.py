"""Model folders, checkpoints, and how a run goes on from one."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from gpt2_chinese.best_model import BEST_MODEL, FINAL_MODEL
from gpt2_chinese.command_line import remark
from gpt2_chinese.model_folder import CONFIG, save_model
from gpt2_chinese.training.checkpoints import (
    check_settings,
    checkpoints_in,
    delete_old,
    latest_valid,
    random_state,
    read_checkpoint,
    set_random_state,
    verify,
    write_checkpoint,
)
from gpt2_chinese.training.loss import unpadded, with_scaled_logits
from gpt2_chinese.training.plan import MEASURED_UPDATES, TEACHERS
from gpt2_chinese.training.ranks import Rank
from gpt2_chinese.training.run import CHECKPOINTS, METRICS, OTHER_FILES, Run
from gpt2_chinese.training.state import RunningLoss, TrainingState
from gpt2_chinese.training.trainable import Trainable


def save_model_folder(run: Run, trainable: Trainable, state: TrainingState, name: str, *, epoch: int) -> Path:
    """Write the model as it stands, after so many epochs, to a folder of --output_dir.

    `best_model` and `final_model` follow a measurement, and so they are calibrated where that is asked for.
    """
    scale = state.scale if name in (BEST_MODEL, FINAL_MODEL) else 1.0
    facts: dict[str, Any] = {
        "epoch": epoch,
        "updates": state.step,
        "loss": state.epoch_loss,
        "best_validation": {"updates": state.best_step, "bits_per_character": state.best_bits}
        if state.best_step
        else None,
        "corpus_tokens": len(run.corpus.tokens),
        "settings": vars(run.args),
    }
    if run.args.calibrate:
        facts["logit_scale"] = scale
    with unpadded(trainable.model, trainable.vocab_rows), with_scaled_logits(trainable.model, scale):
        save_model(run.output / name, trainable.model, run.tokenizer, facts=facts)
    return run.output / name


def save_checkpoint(run: Run, rank: Rank, trainable: Trainable, state: TrainingState, *, is_last: bool = False) -> Path:
    """Write what the run goes on from; every rank calls this, rank 0 writes. `is_last`: it ends before its time."""
    random_states = rank.gather(random_state(rank.device))
    folder = run.output / CHECKPOINTS
    if rank.is_main:
        contents = {
            "model": trainable.model.state_dict(),
            "optimizer": trainable.optimizer.state_dict(),
            "scaler": trainable.precision.state_dict(),
            "random": random_states,
            "progress": state.state_dict(),
            "made_with": _made_with(),
        }
        is_last = is_last or state.step == run.total_steps
        write_checkpoint(folder, state.step, contents, run.settings() | {"ranks": rank.world_size}, is_last=is_last)
        delete_old(folder, keep=run.args.keep_checkpoints)
    return folder / f"step_{state.step}"


def restore(run: Run, rank: Rank, trainable: Trainable, resume: Path | None) -> TrainingState:
    """The state at the beginning of a run, or exactly that of a checkpoint, of which only rank 0 reads the files.

    Args:
        resume: the checkpoint, found valid (`find_checkpoint`); the model, the optimizer and the random states of every
            rank become its own.
    """
    saved = rank.broadcast(read_checkpoint(resume) if resume is not None and rank.is_main else None)
    if saved is None:
        return TrainingState(RunningLoss(rank.device))
    if rank.is_main and saved.get("made_with") != _made_with():
        remark(f"note: the checkpoint was made with {saved.get('made_with')}, this is {_made_with()}: not bit for bit")
    try:
        trainable.model.load_state_dict(saved["model"])
        trainable.optimizer.load_state_dict(saved["optimizer"])
        trainable.precision.load_state_dict(saved["scaler"])
        set_random_state(saved["random"][rank.number], rank.device)
        return TrainingState.from_state_dict(saved["progress"], rank.device)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{resume} does not fit this run, or is damaged: {reason}; resume from another checkpoint, or start over "
            "with --resume none"
        ) from error


def _made_with() -> str:
    """What decides the order of sums, and so their last bits."""
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads"


def find_checkpoint(run: Run, ranks: int) -> Path | None:
    """The checkpoint to resume, found valid and of the same settings; None for a new run, after making room for it.

    Raises:
        ValueError: there is no valid one, or it is of another run, or an interrupted run would be lost.
    """
    folder, resume = run.output / CHECKPOINTS, run.args.resume
    if resume in (None, "none"):
        _make_room(run)
        return None
    if resume == "auto":
        path = latest_valid(folder, warn=lambda message: print(f"warning: {message}", file=sys.stderr))
        if path is None and not (run.output / TEACHERS).is_dir():
            remark(f"note: there is no checkpoint in {folder}: starting at the beginning")
        if path is None:
            return None
    else:
        path = Path(resume)
        if not path.is_dir():
            raise FileNotFoundError(f"--resume {path}: there is no such checkpoint; they are in {folder}")
    manifest = verify(path)
    if run.plan is not None:
        run.limit_updates(manifest["settings"].get("the number of updates", 0))
        run.plan.is_settled = manifest["step"] >= MEASURED_UPDATES
    check_settings(path, manifest["settings"], run.settings() | {"ranks": ranks})
    # What came after it will come again.
    delete_old(folder, keep=run.args.keep_checkpoints, up_to=manifest["step"])
    remark(f"resuming from {path}, after update {manifest['step']:,} of {run.total_steps:,}")
    return path


def _make_room(run: Run) -> None:
    """Delete what an earlier run has written to --output_dir, if that was asked for.

    Raises:
        ValueError: there is something, and it was not asked for; or it is what this run is to start from.
    """
    found = _written_by_a_run(run.output)
    if not found:
        return
    names = ", ".join(path.name for path in found)
    if not (run.args.overwrite or run.args.resume == "none"):
        if run.output / TEACHERS in found and run.output / FINAL_MODEL not in found:
            raise ValueError(
                f"{run.output} is of a run that was interrupted, after its teachers or one of them: continue it with "
                "--resume, take another --output_dir, or start over with --resume none, which deletes it"
            )
        for step, path in checkpoints_in(run.output / CHECKPOINTS)[:1]:
            total = _interrupted(path, step)
            if total:
                raise ValueError(
                    f"{path} is of a run that was interrupted after update {step:,} of {total}: continue it with "
                    "--resume, take another --output_dir, or start over with --resume none, which deletes it"
                )
        raise ValueError(
            f"{run.output} holds an earlier run ({names}), and nothing of it is replaced unasked: take another "
            "--output_dir, or add --overwrite, which deletes it"
        )
    deleted = {path.resolve() for path in found}
    sources = {"pretrained_model": [run.args.pretrained_model], "teacher": run.args.teacher.split(",")}
    if run.plan is not None and run.plan.teachers:
        del sources["teacher"]  # they are made anew
    for flag, source in [(flag, Path(folder)) for flag, folders in sources.items() for folder in folders if folder]:
        if deleted & {source.resolve(), *source.resolve().parents}:
            raise ValueError(
                f"--{flag} {source} is part of the run that --overwrite would delete: take another --output_dir"
            )
    remark(f"note: an earlier run in {run.output} is deleted: {names}")
    events = "events.out.tfevents.*"
    points = [
        path for pattern in (events, f"{TEACHERS}/*/{events}") for path in Path(run.args.writer_dir).glob(pattern)
    ]
    for path in [*found, *points]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _written_by_a_run(output: Path) -> list[Path]:
    """What train.py writes to --output_dir and finds there: model folders, checkpoints, figures, the report."""
    if not output.is_dir():
        return []
    models = re.compile(rf"{FINAL_MODEL}|{BEST_MODEL}|model_epoch[1-9]\d*")
    files = {METRICS, *OTHER_FILES}
    return sorted(
        path
        for path in output.iterdir()
        if (path.name in files and path.is_file())
        or (path.name == CHECKPOINTS and checkpoints_in(path))
        or (path.name == TEACHERS and path.is_dir())
        or (models.fullmatch(path.name) and (path / CONFIG).is_file())
    )


def _interrupted(path: Path, step: int) -> str:
    """How many updates the run of a checkpoint was to have, if it ended before its end; else nothing."""
    try:
        manifest = verify(path)
    except ValueError:
        return "an unknown number"
    total = manifest["settings"].get("the number of updates")
    is_last = manifest.get("is_last", step == total)  # earlier versions did not write it
    return "" if is_last else f"{total or 'an unknown number'}"
