"""The whole chain by subprocess, each stage in its environment: TXT files to an answer of the server."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VOCAB_PYTHON = ROOT / ".venv-vocab" / "bin" / "python"
DOCUMENTS = [
    "感冒了怎么办？多喝热水，好好休息，一般一个星期左右就会好。如果发烧38.5℃以上，要去医院看医生。",
    "孩子不爱吃饭怎么办？少吃零食，多运动，饭前不喝饮料。家长不要追着喂，一天两天不会饿坏的。",
    "晚上睡不着怎么办？睡前不看手机，不喝咖啡和浓茶。躺下半小时还睡不着，就起来看看书。OK, good night!",
] * 4


def run(python: Path | str, *command: str, cwd: Path, status: int = 0) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [str(python), *command], cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=300
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder after stages 1 to 4."""
    if not VOCAB_PYTHON.exists():
        pytest.skip("no .venv-vocab; `make envs` builds it")
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "data").mkdir()
    (folder / "data" / "a.txt").write_text("\n".join(DOCUMENTS) + "\n", encoding="utf-8")
    (folder / "config").symlink_to(ROOT / "config")
    run(VOCAB_PYTHON, str(ROOT / "build_trainfile.py"), cwd=folder)
    run(VOCAB_PYTHON, str(ROOT / "make-vocab.py"), cwd=folder)
    run(sys.executable, str(ROOT / "make-tokenized.py"), "--min_length", "20", "--num_pieces", "3", cwd=folder)
    flags = ["--model_config", "config/model_config_test.json", "--device", "cpu", "--epochs", "2", "--lr", "0.01"]
    run(sys.executable, str(ROOT / "train.py"), *flags, cwd=folder)
    return folder


def test_every_artifact_is_where_the_next_stage_looks(folder):
    names = ["data/train.json", "vocab/vocab_user.txt", "tokenized/tokenized_train_0.txt", "tokenized/manifest.json"]
    names += [f"model/{model}/{file}" for model in ("model_epoch1", "model_epoch2", "final_model")
              for file in ("config.json", "model.safetensors", "generation_config.json")]  # fmt: skip
    assert [name for name in names if not (folder / name).is_file()] == []
    assert list((folder / "tensorboard_summary").rglob("events.out.tfevents*"))


def test_generate_completes_a_prefix(folder):
    flags = ["--prefix", "感冒了", "--nsamples", "2", "--length", "10", "--seed", "1", "--device", "cpu"]
    first = run(sys.executable, str(ROOT / "generate.py"), *flags, cwd=folder)
    assert first.count("\n感冒了") == 2
    assert run(sys.executable, str(ROOT / "generate.py"), *flags, cwd=folder).endswith(first[-40:])


def test_the_example_asks_a_server(folder):
    printed = run(sys.executable, str(ROOT / "examples" / "ask_server.py"), "--context", "孩子", cwd=folder)
    answer = json.loads(re.search(r"^\[\n.*?^\]", printed, re.MULTILINE | re.DOTALL).group())
    assert len(answer) == 5
    assert all(text.startswith("孩子") for text in answer)
    assert "server stopped with status 0" in printed


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["make-tokenized.py"], "there is no vocabulary"),
        (["train.py", "--device", "cpu"], "make-tokenized.py"),
        (["generate.py", "--prefix", "好"], "train.py"),
        (["server.py"], "train.py"),
    ],
)
def test_a_stage_run_too_early_names_the_one_before(tmp_path, command, message):
    (tmp_path / "config").symlink_to(ROOT / "config")
    printed = run(sys.executable, str(ROOT / command[0]), *command[1:], cwd=tmp_path, status=2)
    assert re.search(r"^error: .*" + re.escape(message), printed, re.MULTILINE)


def test_a_vocabulary_exchanged_after_tokenizing_is_refused(folder):
    vocabulary = folder / "vocab" / "vocab_user.txt"
    old = vocabulary.read_bytes()
    vocabulary.write_bytes(old + "新词\n".encode())
    try:
        flags = ["--model_config", "config/model_config_test.json", "--device", "cpu", "--output_dir", "other"]
        printed = run(sys.executable, str(ROOT / "train.py"), *flags, cwd=folder, status=2)
        assert re.search(r"^error: .*vocab_user\.txt.*manifest\.json.*make-tokenized\.py", printed, re.MULTILINE)
        assert not (folder / "other").exists()
    finally:
        vocabulary.write_bytes(old)
