"""Stages that are killed, run twice at once or run out of disk: nothing half is taken for whole.

KILLS sets the number of kills of each stage; the default keeps the suite short, and 100 is what is promised.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KILLS = int(os.environ.get("KILLS", "3"))
TEXT = "感冒了怎么办？多喝热水，好好休息，一般{}天左右就会好。体温38.{}℃以上要去医院，别硬扛。\n"


def command(stage: str, folder: Path) -> list[str]:
    flags = {
        "build_trainfile.py": ["--data_path", "data", "--output_path", "train.json"],
        "make-vocab.py": ["--raw_data_path", "train.json", "--vocab_file", "vocab.txt", "--workers", "2"],
        "make-tokenized.py": ["--raw_data_path", "train.json", "--vocab_filename", "vocab.txt", "--min_length", "20"]
        + ["--tokenized_data_path", "tokenized", "--num_pieces", "40", "--workers", "2"],
    }[stage]
    return [sys.executable, str(ROOT / stage), *flags]


def run(stage: str, folder: Path) -> str:
    done = subprocess.run(command(stage, folder), cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout


def artifacts(folder: Path) -> dict[str, bytes]:
    """Every file that a person or a later stage would see."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(files)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder in which every stage has run undisturbed, and its artifacts."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "data").mkdir()
    (folder / "config").symlink_to(ROOT / "config")
    text = "".join(TEXT.format(number % 9, number) for number in range(6000))
    (folder / "data" / "a.txt").write_text(text, encoding="utf-8")
    seconds = {}
    for stage in ("build_trainfile.py", "make-vocab.py", "make-tokenized.py"):
        begin = time.monotonic()
        run(stage, folder)
        seconds[stage] = time.monotonic() - begin
    return folder, artifacts(folder), seconds


@pytest.mark.parametrize(
    ("stage", "outputs"),
    [("build_trainfile.py", ["train.json"]), ("make-vocab.py", ["vocab.txt"]), ("make-tokenized.py", ["tokenized/*"])],
)
def test_a_killed_stage_run_again_gives_what_an_undisturbed_run_gives(whole, stage, outputs):
    folder, expected, seconds = whole
    generator = random.Random(stage)
    kept = 0
    for _ in range(KILLS):
        for pattern in outputs:
            for path in folder.glob(pattern):
                path.unlink()
        process = subprocess.Popen(
            command(stage, folder),
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(generator.uniform(0, 1.1 * seconds[stage]))
        process.send_signal(signal.SIGKILL)
        process.wait()
        for name, data in artifacts(folder).items():
            assert expected[name] == data, f"{name} is there but not whole"
        kept += "going on with an interrupted run" in run(stage, folder)
        assert artifacts(folder) == expected
    if KILLS >= 20 and stage == "make-tokenized.py":
        assert kept, "no run went on where a killed one was"


def test_workers_end_when_their_parent_is_killed(whole, tmp_path):
    folder, _, _ = whole
    for path in (folder / "tokenized").glob("*"):
        path.unlink()
    process = subprocess.Popen(
        command("make-tokenized.py", folder), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    while not list((folder / "tokenized").glob("*.txt")) and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("a worker is still there 15 seconds after its parent was killed")
    run("make-tokenized.py", folder)


def test_an_unchanged_second_run_only_checks(whole):
    folder, expected, _ = whole
    before = {path: path.stat().st_mtime_ns for path in (folder / "tokenized").glob("*.txt")}
    assert "nothing to do" in run("make-tokenized.py", folder)
    assert {path: path.stat().st_mtime_ns for path in (folder / "tokenized").glob("*.txt")} == before
    (folder / "tokenized" / "tokenized_train_3.txt").write_text("2 1 ")
    assert "nothing to do" not in run("make-tokenized.py", folder)
    assert artifacts(folder) == expected


@pytest.mark.parametrize("failing", range(1, 9))
def test_a_full_disk_leaves_the_old_artifacts_whole(whole, script, monkeypatch, failing):
    """Writes fail from the k-th flush on, as they do when the disk is full."""
    folder, expected, _ = whole
    monkeypatch.chdir(folder)
    calls = 0
    real = os.fsync

    def fsync(file_descriptor):
        nonlocal calls
        calls += 1
        if calls >= failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file_descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    # Another minimum length: every piece would become another one.
    flags = command("make-tokenized.py", folder)[2:] + ["--min_length", "45", "--workers", "1"]
    with pytest.raises(OSError, match="No space left on device: .*tokenized"):
        script("make-tokenized").main(flags)
    monkeypatch.undo()
    for name, data in artifacts(folder).items():
        if not name.startswith("tokenized/tokenized_train") or failing == 1:
            assert data == expected[name]
    monkeypatch.chdir(folder)
    if failing == 1:
        flags = command("build_trainfile.py", folder)[2:]
        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="No space left on device: .*train.json"):
            script("build_trainfile").main(flags)
        assert artifacts(folder) == expected
        monkeypatch.undo()
    run("make-tokenized.py", folder)
    assert artifacts(folder) == expected


def test_a_second_run_into_one_folder_is_refused(whole):
    from gpt2_chinese.artifacts import exclusive_lock

    folder, expected, _ = whole
    with exclusive_lock(folder / "tokenized"):
        done = subprocess.run(
            command("make-tokenized.py", folder), cwd=folder, capture_output=True, text=True, check=False
        )
    assert done.returncode == 2
    assert "error: " in done.stderr and "another run is writing into this folder" in done.stderr
    assert artifacts(folder) == expected
