"""Checkpoints: a run that was killed at any moment goes on to the weights of one that was not, bit for bit."""

from __future__ import annotations

import json
import mmap
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import assert_same_weights, run, scalars, stopped_after, weights, write_documents, write_shape
from tqdm import tqdm

from gpt2_chinese.training import evaluation, saving
from gpt2_chinese.training.checkpoints import (
    checkpoints_in,
    delete_old,
    random_state,
    set_random_state,
    verify,
    write_checkpoint,
)
from gpt2_chinese.training.run import Run

KILLS = int(os.environ.get("KILLS", "3"))  # 50 by hand
SAVE_STEPS = 3
CHECKPOINTS = Path("model/checkpoints")
SETTINGS_OF_THE_FIRST_VERSION = {
    "the corpus (SHA-256)",
    "the vocabulary (SHA-256)",
    "the model's shape",
    "the kind of device",
    "the number of updates",
    *("--batch_size", "--gradient_accumulation", "--epochs", "--stride", "--seed", "--val_fraction", "--precision"),
    *("--lr", "--warmup_steps", "--schedule", "--decay_fraction", "--optimizer", "--muon_lr", "--max_grad_norm"),
    *("--embedding_init", "--pretrained_model"),
}
DROPOUT = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}


@pytest.fixture(autouse=True)
def documents(train):
    return write_documents([20] * 20)


def points(folder: str = "model") -> list[dict]:
    """The lines of metrics.jsonl, without the figures that the clock decides."""
    lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in lines]


def small_run_flags(precision: str = "fp32", optimizer: str = "adamw") -> list[str]:
    flags = ["--epochs", "2", "--batch_size", "2", "--gradient_accumulation", "2", "--save_steps", str(SAVE_STEPS)]
    flags += ["--precision", precision, "--optimizer", optimizer, "--val_fraction", "0.1", "--val_steps", "4"]
    flags += ["--stride", "5", "--weight_decay", "0.1", "--shift_windows", "--document_mask", "--calibrate"]
    if optimizer == "muon":
        flags += ["--character_lr", "0.05"]
    return [*flags, "--ngram_share", "0.3", "--patience", "20"]


def run_until(train, moment: float, flags: list[str], updates: mmap.mmap, device: str = "cpu") -> bool:
    """Train in a process of its own that is killed with SIGKILL at a moment, with its ranks; whether it came to its end
    before.

    `updates` is told how many updates the process has made. The moment is counted from the start, with two ranks, which
    take long to start, from the first point of the log.
    """
    log = Path("model/metrics.jsonl")
    size = log.stat().st_size if log.exists() else 0
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setsid()
            # tqdm's lock is shared by forked processes, and one that is killed would never give it back.
            tqdm.set_lock(threading.RLock())
            original = train.train_update

            def counted(*args, **kwargs):
                result = original(*args, **kwargs)
                updates[:8] = (int.from_bytes(updates[:8], "little") + 1).to_bytes(8, "little")
                return result

            train.train_update = counted
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open("stderr.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            status = run(train, *flags, device=device)
        finally:
            os._exit(status)
    deadline = time.monotonic() + moment
    if "," in device:
        while not (log.exists() and log.stat().st_size > size) and not os.waitid(
            os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT
        ):
            time.sleep(0.005)
        deadline = time.monotonic() + moment
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert os.waitstatus_to_exitcode(status) == 0, Path("stderr.txt").read_text(encoding="utf-8")
            return True
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.parametrize(("precision", "optimizer"), [("fp32", "adamw"), ("bf16", "adamw"), ("fp32", "muon")])
def test_kills_at_random_moments_change_no_bit_and_lose_one_interval_at_most(train, precision, optimizer):
    write_shape(**DROPOUT)
    flags = small_run_flags(precision, optimizer)
    began = time.monotonic()
    assert run(train, *flags, "--output_dir", "whole", "--writer_dir", "whole/tb") == 0
    duration = time.monotonic() - began
    generator = random.Random(7)
    kills = 0
    while kills < KILLS or not Path("model/final_model").exists():
        if Path("model/final_model").exists():  # it was faster than its killers: once more
            assert_same_weights(weights("whole/final_model"), weights())
            shutil.rmtree("model")
        start = max([step for step, _ in checkpoints_in(CHECKPOINTS)], default=0)
        updates = mmap.mmap(-1, 8)
        moment = generator.uniform(0, duration) if kills < KILLS else 600.0
        if not run_until(train, moment, [*flags, "--resume"], updates):
            kills += 1
            reached = start + int.from_bytes(updates[:8], "little")
            whole = [step for step, path in checkpoints_in(CHECKPOINTS) if verify(path)["step"] == step]
            assert reached - max(whole, default=0) <= SAVE_STEPS
    assert_same_weights(weights("whole/final_model"), weights())
    assert_same_weights(weights("whole/model_epoch1"), weights("model/model_epoch1"))
    assert_same_weights(weights("whole/best_model"), weights("model/best_model"))
    assert points() == points("whole"), "a point is missing, there twice, or another"


@pytest.mark.slow
@pytest.mark.skipif("KILLS" not in os.environ, reason="takes minutes: by hand, with KILLS=12")
@pytest.mark.parametrize(("precision", "optimizer"), [("fp32", "adamw"), ("bf16", "adamw"), ("fp32", "muon")])
def test_kills_of_two_ranks_change_no_bit(train, precision, optimizer):
    write_shape(**DROPOUT)
    flags = small_run_flags(precision, optimizer)
    assert run(train, *flags, "--output_dir", "whole", "--writer_dir", "whole/tb", device="cpu,cpu") == 0
    generator = random.Random(8)
    kills, resumed = 0, 0
    while kills < KILLS or not Path("model/final_model").exists():
        if Path("model/final_model").exists():  # it was faster than its killers: once more
            assert_same_weights(weights("whole/final_model"), weights())
            shutil.rmtree("model")
        resumed += bool(checkpoints_in(CHECKPOINTS))
        moment = generator.uniform(0, 0.6) if kills < KILLS else 600.0  # the updates take 0.7 s
        kills += not run_until(train, moment, [*flags, "--resume"], mmap.mmap(-1, 8), "cpu,cpu")
    assert resumed
    assert_same_weights(weights("whole/final_model"), weights())
    assert_same_weights(weights("whole/best_model"), weights("model/best_model"))
    assert points() == points("whole"), "a point is missing, there twice, or another"


def interrupted(train, monkeypatch, after: int, *flags: str) -> None:
    """Leave the checkpoints of a run that was stopped by SIGTERM after some updates."""
    with stopped_after(train, monkeypatch, after):
        assert run(train, *small_run_flags(), *flags) == 143


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("name", ["state.pt", "manifest.json"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_it_gone_on_from(train, monkeypatch, capsys, damage, name):
    run(train, *small_run_flags(), "--output_dir", "whole", "--writer_dir", "whole/tb")
    interrupted(train, monkeypatch, 7)
    assert [step for step, _ in checkpoints_in(CHECKPOINTS)] == [7, 6]
    damage(CHECKPOINTS / "step_7" / name)
    capsys.readouterr()
    assert run(train, *small_run_flags(), "--resume") == 0
    printed = capsys.readouterr()
    assert f"step_7/{name}" in printed.err and "falling back to model/checkpoints/step_6" in printed.err
    assert "resuming from model/checkpoints/step_6, after update 6 of" in printed.out
    assert_same_weights(weights("whole/final_model"), weights())
    assert scalars()["loss"] == scalars("whole/tb")["loss"]


def test_when_every_checkpoint_is_damaged_nothing_is_started_in_their_place(train, monkeypatch):
    interrupted(train, monkeypatch, 7)
    for step in (6, 7):
        flip_a_bit(CHECKPOINTS / f"step_{step}" / "state.pt")
    with pytest.raises(ValueError, match=r"no checkpoint in model/checkpoints is valid; .*--resume none"):
        run(train, *small_run_flags(), "--resume")
    with pytest.raises(ValueError, match=r"step_7/state\.pt is damaged: its SHA-256"):
        run(train, *small_run_flags(), "--resume", str(CHECKPOINTS / "step_7"))
    with pytest.raises(FileNotFoundError, match="--resume model/checkpoints/step_9: there is no such checkpoint"):
        run(train, *small_run_flags(), "--resume", str(CHECKPOINTS / "step_9"))


def test_an_earlier_run_is_neither_lost_nor_resumed_unasked(train, monkeypatch, capsys):
    interrupted(train, monkeypatch, 4)
    with pytest.raises(ValueError, match=r"interrupted after update 4 of \d+: continue it .*--resume, .*--resume none"):
        run(train, *small_run_flags())
    assert run(train, *small_run_flags(), "--resume", "none") == 0
    assert "note: an earlier run in model is deleted: checkpoints, " in capsys.readouterr().out
    first = weights()
    with pytest.raises(ValueError, match=r"model holds an earlier run \(.*final_model.*\).*--output_dir.*--overwrite"):
        run(train, *small_run_flags(), epochs=1)
    assert_same_weights(first, weights())
    with pytest.raises(ValueError, match=r"model/final_model is part of the run that --overwrite would delete"):
        run(train, "--tokenized_data_path", "tokenized", "--pretrained_model", "model/final_model", "--overwrite")
    assert run(train, *small_run_flags(), "--overwrite") == 0
    assert_same_weights(first, weights())
    assert run(train, *small_run_flags(), "--overwrite", epochs=1) == 0
    assert not Path("model/model_epoch2").exists(), "nothing of two runs is mixed"
    assert run(train, *small_run_flags(), "--overwrite") == 0
    assert run(train, *small_run_flags(), "--resume") == 0, "there is nothing left to do"
    assert_same_weights(first, weights())


def test_a_named_checkpoint_is_gone_back_to(train, monkeypatch):
    interrupted(train, monkeypatch, 7)
    assert run(train, *small_run_flags(), "--resume", str(CHECKPOINTS / "step_6")) == 0
    run(train, *small_run_flags(), "--output_dir", "whole", "--writer_dir", "whole/tb")
    assert_same_weights(weights("whole/final_model"), weights())


def test_another_number_of_threads_is_said_for_sums_are_then_rounded_otherwise(train, monkeypatch, capsys):
    interrupted(train, monkeypatch, 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert run(train, *small_run_flags(), "--resume") == 0
    assert "this is torch" in (output := capsys.readouterr().out) and "7 threads: not bit for bit" in output


def test_resume_without_a_checkpoint_begins(train, capsys):
    assert run(train, *small_run_flags(), "--resume") == 0
    assert "no checkpoint in model/checkpoints: starting at the beginning" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--batch_size", "4"], "--batch_size was 2, is 4"),
        (["--lr", "1e-3"], "--lr was 0.01, is 0.001"),
        (["--optimizer", "muon"], "--optimizer was adamw, is muon"),
        (["--val_fraction", "0.2"], "--val_fraction was 0.1, is 0.2"),
        (["--precision", "bf16"], "--precision was fp32, is bf16"),
        (["--device", "cpu,cpu"], "ranks was 1, is 2"),
    ],
)
def test_a_run_of_other_settings_is_not_gone_on_with(train, monkeypatch, flags, named):
    interrupted(train, monkeypatch, 2)
    with pytest.raises(ValueError, match=f"step_2 cannot be resumed: .*{named}"):
        run(train, *small_run_flags(), "--resume", *flags)


def test_another_corpus_or_shape_is_not_gone_on_with(train, monkeypatch):
    interrupted(train, monkeypatch, 2)
    write_shape(n_layer=1)
    with pytest.raises(ValueError, match="cannot be resumed: the model's shape was"):
        run(train, *small_run_flags(), "--resume")
    write_shape()
    write_documents([21] * 30)
    with pytest.raises(ValueError, match=r"cannot be resumed: the corpus \(SHA-256\) was"):
        run(train, *small_run_flags(), "--resume")


def test_what_only_reports_may_change_when_a_run_goes_on(train, monkeypatch):
    write_shape(**DROPOUT)
    run(train, *small_run_flags(), "--output_dir", "whole", "--writer_dir", "whole/tb")
    interrupted(train, monkeypatch, 5)
    changed = ["--log_step", "2", "--save_steps", "0", "--keep_checkpoints", "1", "--val_steps", "3"]
    assert run(train, *small_run_flags(), *changed, "--resume") == 0
    assert_same_weights(weights("whole/final_model"), weights())
    assert len(checkpoints_in(CHECKPOINTS)) == 1


def test_the_latest_checkpoints_stay(train):
    run(train, *small_run_flags(), "--keep_checkpoints", "3")
    steps = [step for step, _ in checkpoints_in(CHECKPOINTS)]
    total = len(scalars()["loss"])
    expected = [step for step in range(total, 0, -1) if step % SAVE_STEPS == 0 or step in (total, total // 2)]
    assert steps == expected[:3]
    assert all(verify(path)["step"] == step for step, path in checkpoints_in(CHECKPOINTS))


@pytest.mark.slow
def test_two_ranks_go_on_with_the_dropout_of_each(train, monkeypatch):
    write_shape(**DROPOUT)
    flags = [*small_run_flags(), "--save_steps", "0"]
    run(train, *flags, "--output_dir", "whole", "--writer_dir", "whole/tb", device="cpu,cpu")
    # After the first epoch, as if the run had been killed in the second.
    shutil.copytree("whole", "model")
    delete_old(CHECKPOINTS, keep=1, up_to=verify(checkpoints_in(CHECKPOINTS)[1][1])["step"])
    shutil.rmtree("model/final_model")
    assert run(train, *flags, "--resume", device="cpu,cpu") == 0
    assert_same_weights(weights("whole/final_model"), weights())


# --- the parts


def test_random_numbers_go_on_where_they_were(tmp_path):
    device = torch.device("cpu")
    path = write_checkpoint(tmp_path, 1, {"random": random_state(device)}, {})
    expected = [random.random(), np.random.rand(), torch.rand(3).tolist()]
    set_random_state(torch.load(path / "state.pt", weights_only=True)["random"], device)
    assert [random.random(), np.random.rand(), torch.rand(3).tolist()] == expected


def test_a_checkpoint_that_was_half_written_is_never_seen(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "c", 1, {"model": torch.ones(3)}, {})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError):
        write_checkpoint(tmp_path / "c", 2, {"model": torch.ones(3)}, {})
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["step_1"]
    (tmp_path / "c" / ".step_3.tmp").mkdir()
    (tmp_path / "c" / ".step_2.old").mkdir()
    (tmp_path / "c" / "mine").mkdir()
    delete_old(tmp_path / "c", keep=1)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["mine", "step_1"]


# --- a measurement that is broken off


def stopped_in_measurement(train, monkeypatch, number: int) -> float:
    """Send SIGTERM in the middle of the `number`-th measurement, which lasts a minute; the seconds until the end."""
    original, measurements, sent = evaluation.Documents.batch, [], []

    def slow(self, windows):
        windows = list(windows)
        measurements.extend([1] * (windows[0] == self.windows[0]))
        if len(measurements) == number:
            sent.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return original(self, windows)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation.Documents, "batch", slow)
        assert run(train, *small_run_flags()) == 143
    return time.monotonic() - sent[0]


@pytest.mark.parametrize("at_epoch_end", [False, True])
def test_a_measurement_is_broken_off_nothing_is_saved_twice_and_the_run_resumes(
    train, monkeypatch, capsys, at_epoch_end
):
    write_shape(**DROPOUT)
    assert run(train, *small_run_flags(), "--output_dir", "whole", "--writer_dir", "whole/tb") == 0
    measured = [point["step"] for point in points("whole") if point["kind"] == "validation"]
    epoch = measured[-1] // 2
    step = next(step for step in measured if (step == epoch if at_epoch_end else step % SAVE_STEPS and step != epoch))
    written: list[int] = []
    original = saving.write_checkpoint
    monkeypatch.setattr(
        saving, "write_checkpoint", lambda *args, **named: written.append(args[1]) or original(*args, **named)
    )
    assert stopped_in_measurement(train, monkeypatch, 1 + measured.index(step)) < 2.0
    assert f"stopped after update {step} of {measured[-1]}" in capsys.readouterr().out
    assert written[-1] == step and len(written) == len(set(written))
    assert step not in [point["step"] for point in points() if point["kind"] == "validation"]
    assert run(train, *small_run_flags(), "--resume") == 0
    assert_same_weights(weights("whole/final_model"), weights())
    assert points() == points("whole")


@pytest.mark.parametrize(
    ("more", "refused"),
    [
        ([], None),
        (["--shift_windows"], "the span of windows was a piece, is the whole text"),
        (["--ngram_share", "0.3"], "what --ngram_share adds was a trigram, is a trigram and a cache"),
    ],
)
def test_a_checkpoint_of_an_earlier_version_is_resumed_unless_it_was_trained_otherwise(
    train, monkeypatch, more, refused
):
    flags = ["--epochs", "2", "--batch_size", "2", "--save_steps", "3", *more]
    assert run(train, *flags, output_dir="whole") == 0
    of_now = Run.settings
    with monkeypatch.context() as patch, stopped_after(train, monkeypatch, 7):
        had = {*SETTINGS_OF_THE_FIRST_VERSION, *more[:1]}
        patch.setattr(Run, "settings", lambda self: {k: v for k, v in of_now(self).items() if k in had})
        assert run(train, *flags) == 143
    if refused:
        with pytest.raises(ValueError, match=refused):
            run(train, *flags, "--resume")
    else:
        assert run(train, *flags, "--resume") == 0
        assert_same_weights(weights("whole/final_model"), weights())
