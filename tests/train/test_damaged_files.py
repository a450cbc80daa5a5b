"""Files that are damaged, foreign or full disks: one line that names the file and the mend, and no memory taken."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import random
import shutil
import struct
import tracemalloc
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import save_tiny_model, tiny_model

from gpt2_chinese.artifacts import atomic_write, disk_errors, write_json
from gpt2_chinese.compiled import code_digest, read_cached_code, write_cached_code
from gpt2_chinese.model_folder import load_weights
from gpt2_chinese.text.corpus import read_train_json
from gpt2_chinese.text.pieces import read_manifest
from gpt2_chinese.text.vocabulary import Marks, read_vocabulary
from gpt2_chinese.training.checkpoints import latest_valid, read_checkpoint, verify, write_checkpoint
from gpt2_chinese.training.metrics import Metrics
from gpt2_chinese.training.plan import Plan
from gpt2_chinese.training.token_cache import read_pieces
from gpt2_chinese.weights_file import read_weights_file

EXAMPLES = int(os.environ.get("GPT2_CHINESE_EXAMPLES", "500"))
FILES = 14  # that are damaged in turn; each counts as an example
needs_posix = pytest.mark.skipif(os.name != "posix", reason="links, owners and permissions of POSIX")


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("good") / "model", tiny_model())


@pytest.fixture
def folder(good, tmp_path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


def set_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def set_weights(folder: Path, change) -> None:
    """Replace the safetensors by a pickle, changed."""
    state = read_weights_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(change(state), folder / "pytorch_model.bin")


CONFIGS = [
    ({"n_layer": 10**9}, "n_layer must be at most"),
    ({"n_positions": 10**12}, "n_positions must be at most"),
    ({"n_layer": 900}, "is missing"),
    ({"n_inner": "a"}, "n_inner must be a whole number"),
    ({"n_embd": True}, "n_embd must be a whole number"),
    ({"layer_norm_epsilon": None}, "layer_norm_epsilon must be a number"),
    ({"layer_norm_epsilon": math.nan}, "layer_norm_epsilon must be a number"),
    ({"activation_function": "swish_of_mine"}, "activation_function must be one that transformers has"),
    ({"activation_function": []}, "activation_function must be one that transformers has"),
    ({"scale_attn_weights": 1}, "scale_attn_weights must be true or false"),
]


@pytest.mark.parametrize(("values", "message"), CONFIGS)
def test_a_configuration_that_makes_no_model_is_told_before_memory_is_taken(folder, values, message):
    set_config(folder, **values)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message) as raised:
            load_weights(folder)
        assert str(folder) in str(raised.value) and "\n" not in str(raised.value)
        assert tracemalloc.get_traced_memory()[1] < 50 << 20
    finally:
        tracemalloc.stop()


def test_a_file_of_a_hundred_thousand_brackets_is_told(folder):
    for name in ("config.json", "manifest.json", "tokenizer_config.json"):
        kept = (folder / name).read_text()
        (folder / name).write_text("[" * 100_000)
        with pytest.raises(ValueError, match=f"{name} is nested too deeply"):
            load_weights(folder)
        (folder / name).write_text("[" + "9" * 10_000 + "]")
        with pytest.raises(ValueError, match=f"{name}.* (too many digits|must be|is a)"):
            load_weights(folder)
        (folder / name).write_text(kept)
    load_weights(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: {number: tensor for number, tensor in enumerate(state.values())},
            "does not hold a model's weights",
        ),
        (lambda state: state | {"transformer.wte.weight": torch.tensor(1.0)}, "should be a matrix"),
        (lambda state: state | {"transformer.h.0.ln_1.weight": torch.tensor(1.0)}, r"ln_1\.weight is \[\]"),
        (
            lambda state: state | {"transformer.wpe.weight": torch.zeros(1).expand(10**6, 48)},
            r"wpe\.weight is \[1000000",
        ),
        (lambda state: state | {"transformer.wpe.weight": torch.zeros(32, 48, dtype=torch.int64)}, "not of fractions"),
        (lambda state: list(state.values()), "does not hold a model's weights"),
    ],
)
def test_weights_of_other_types_and_shapes_are_told(folder, change, message):
    set_weights(folder, change)
    with pytest.raises(ValueError, match=message):
        load_weights(folder)


def test_weights_are_compared_with_the_manifest_and_headers_with_the_file(folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    name = "transformer.wpe.weight"

    def write(changed: dict, rest: bytes = data[8 + length :]) -> None:
        text = json.dumps(changed).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + rest)

    path.write_bytes(data[:-4] + b"abcd")
    with pytest.raises(ValueError, match="is not the file that .*manifest.json describes"):
        load_weights(folder)
    begin, end = header[name]["data_offsets"]
    for entry in (
        {"shape": [10**9, 48]},
        {"data_offsets": [begin, end - 4]},
        {"data_offsets": [begin - 4, end]},
        {"dtype": "F1"},
        {"shape": [-1, -1]},
        {"shape": None},
        {"data_offsets": [0, 10**18]},
    ):
        write(header | {name: header[name] | entry})
        with pytest.raises(ValueError, match="is damaged or no weights file"):
            load_weights(folder)
    for broken in (b"", data[:7], struct.pack("<Q", 2**62) + b"{}", data[:-1], data + b"x", data[:8] + b"[" * length):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="is damaged or no weights file"):
            load_weights(folder)


def test_an_archive_that_would_fill_the_memory_is_not_unpacked(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(30 << 20))
    with pytest.raises(ValueError, match="its parts have 31,457,280 bytes"):
        read_weights_file(path)


@pytest.mark.parametrize("rules", [None, "x", 99, True, [1]])
def test_rules_that_nobody_knows_are_told(folder, rules):
    write_json(
        folder / "tokenizer_config.json", json.loads((folder / "tokenizer_config.json").read_text()) | {"rules": rules}
    )
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: rules is"):
        load_weights(folder)


# Training.


def write_state(folder: Path, state: object, **manifest: object) -> Path:
    path = write_checkpoint(folder, 1, {"model": {}}, {})
    torch.save(state, path / "state.pt")
    return path


@pytest.mark.parametrize("state", [[1, 2], {}, {"model": {}}, torch.zeros(3), "text", [("model", 1)]])
def test_a_state_that_is_none_is_told(tmp_path, state):
    path = write_state(tmp_path, state)
    with pytest.raises(ValueError, match=r"state\.pt is no state of a run"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "change",
    [
        {"files": None},
        {"files": {"state.pt": 5}},
        {"files": {"../a": {"bytes": 1, "sha256": ""}}},
        {"settings": 5},
        {"step": "a"},
    ],
)
def test_a_checkpoints_manifest_of_other_types_is_told(tmp_path, change):
    path = write_checkpoint(tmp_path, 1, {"model": {}}, {})
    manifest = json.loads((path / "manifest.json").read_text()) | change
    manifest.pop("sha256")
    from gpt2_chinese.training.checkpoints import _digest

    write_json(path / "manifest.json", manifest | {"sha256": _digest(manifest)})
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        verify(path)


def test_metrics_that_were_cut_within_a_character_are_resumed(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    lines = [
        '{"kind": "train", "step": 1}',
        '{"kind": "validation", "step": 2, "completions": {"孩": "子\u2028"}}',
        "5",
        "[]",
    ]
    lines += ["[" * 100_000, '{"kind": "train", "step": "x"}', '{"kind": "train", "step": 3, "completions": "孩"}']
    path.write_bytes("\n".join(lines).encode()[:-3])
    with Metrics(tmp_path / "tb", path, resumed_from=2) as metrics:
        assert metrics.has_validation(2)
    assert path.read_text(encoding="utf-8").split("\n") == [*lines[:2], ""]
    assert "5 of 7 lines are damaged and left out" in capsys.readouterr().err


class FullDisk:
    """A file on a disk that is full after some bytes."""

    def __init__(self, file, room: int) -> None:
        self._file, self._room = file, room

    def write(self, data) -> int:
        self._room -= len(data)
        if self._room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._file.write(data)

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name):
        return getattr(self._file, name)


@pytest.mark.parametrize("room", [10, 5_000, 300_000])
def test_a_full_disk_at_a_checkpoint_is_one_line_and_the_last_checkpoint_stays(tmp_path, monkeypatch, room):
    write_checkpoint(tmp_path / "checkpoints", 1, {"model": torch.zeros(10)}, {})
    real = open
    monkeypatch.setattr(
        "gpt2_chinese.training.checkpoints.open",
        lambda path, mode: FullDisk(real(path, mode), room) if str(path).endswith("state.pt") else real(path, mode),
        raising=False,
    )
    with pytest.raises(OSError, match="No space left on device: .*step_2") as raised:
        write_checkpoint(tmp_path / "checkpoints", 2, {"model": torch.zeros(100_000)}, {})
    assert raised.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert latest_valid(tmp_path / "checkpoints", pytest.fail) == tmp_path / "checkpoints" / "step_1"


def test_a_full_disk_in_the_words_of_a_library_is_one_too(tmp_path):
    with pytest.raises(OSError, match="No space left on device: 'a'"), disk_errors("a"):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(RuntimeError, match="unexpected pos 64 vs 0"), disk_errors("a"):
        raise RuntimeError("unexpected pos 64 vs 0")


@needs_posix
def test_files_folders_and_parents_are_flushed_before_and_after_the_rename(tmp_path, monkeypatch):
    done: list[tuple[str, str]] = []

    def fsync(descriptor: int) -> None:
        done.append(("flush", os.readlink(f"/proc/self/fd/{descriptor}").rpartition("/")[2]))

    def replace(source, target) -> None:
        done.append(("rename", Path(target).name))
        os.rename(source, target)

    monkeypatch.setattr("gpt2_chinese.artifacts.os.fsync", fsync)
    monkeypatch.setattr("gpt2_chinese.artifacts.os.replace", replace)
    save_tiny_model(tmp_path / "parent" / "model")
    place = done.index(("rename", "model"))
    assert {("flush", "model.safetensors"), ("flush", ".model.tmp")} <= set(done[:place])
    assert done[place + 1 :] == [("flush", "parent")]
    done.clear()
    write_checkpoint(tmp_path / "checkpoints", 7, {"model": {}}, {})
    place = done.index(("rename", "step_7"))
    assert {("flush", "state.pt"), ("flush", ".step_7.tmp")} <= set(done[:place])
    assert done[place + 1] == ("flush", "checkpoints")
    done.clear()
    with atomic_write(tmp_path / "a") as file:
        file.write("x")
    assert done == [("flush", ".a.tmp"), ("rename", "a"), ("flush", tmp_path.name)]


# Files of others.


@needs_posix
def test_a_temporary_name_that_is_a_link_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("kept")
    for make in (Path.symlink_to, Path.hardlink_to):
        make(tmp_path / ".a.tmp", victim)
        with pytest.raises(OSError), atomic_write(tmp_path / "a") as file:
            file.write("written")
        assert victim.read_text() == "kept"
        (tmp_path / ".a.tmp").unlink(missing_ok=True)


@needs_posix
def test_compiled_code_that_others_may_write_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    write_cached_code("kernel", b"code")
    path = tmp_path / "kernel"
    assert read_cached_code("kernel") == b"code"
    path.chmod(0o666)
    assert read_cached_code("kernel") is None
    path.chmod(0o644)
    path.rename(tmp_path / "other")
    assert read_cached_code("other") is None  # of another kernel
    path.symlink_to(tmp_path / "other")
    assert read_cached_code("kernel") is None
    path.unlink()
    path.write_bytes(code_digest("kernel", b"code") + b"code")
    if os.geteuid() == 0:
        os.chown(path, 12345, 12345)
        assert read_cached_code("kernel") is None


# Fuzz: whatever is in a file, a reader gives a result or a ValueError (or OSError) of one line.


def damage(data: bytes, source: random.Random) -> bytes:
    """Bytes flipped, cut, doubled or exchanged; in JSON also a value of another type."""
    kind = source.randrange(6)
    if kind == 0 or not data:
        return data[: source.randrange(len(data) + 1)]
    place = source.randrange(len(data))
    if kind == 1:
        return data[:place] + bytes([source.randrange(256)]) + data[place + 1 :]
    if kind == 2:
        return data[:place] + data[place : place + 40] * source.choice([2, 50]) + data[place:]
    if kind == 3:
        return data[:place] + source.choice([b"\xff", b"\0", b"[", b'"', b"1e999", b"null", b"\n"]) + data[place:]
    try:
        value = json.loads(data)
        assert isinstance(value, dict) and value
    except (ValueError, AssertionError):
        return data[:place] + source.randbytes(8) + data[place + 8 :]
    strange = [None, 5, -1, 10**30, 1.5, "x", [], {}, True, [None], {"a": None}, "9" * 40, math.inf]
    holder = value
    while True:
        name = source.choice(list(holder))
        if isinstance(holder[name], dict) and holder[name] and source.random() < 0.7:
            holder = holder[name]
            continue
        holder[name] = source.choice(strange)
        return json.dumps(value).encode()


@pytest.fixture(scope="module")
def originals(good, tmp_path_factory):
    """Good files, and what reads each: its name, the file, a function of its folder."""
    folder = tmp_path_factory.mktemp("originals")
    state = {"model": {"a": torch.zeros(3)}, "optimizer": {}, "scaler": {}, "random": [], "progress": {}}
    checkpoint = write_checkpoint(folder, 5, state, {"--lr": 1.0})
    set_weights(pickled := Path(shutil.copytree(good, folder / "pickled")), lambda state: state)
    tokenized = folder / "tokenized"
    tokenized.mkdir()
    piece = {"file": "tokenized_train_0.txt", "sha256": "0", "tokens": 3, "documents": 1}
    write_json(tokenized / "manifest.json", {"vocabulary": {"path": "v", "sha256": "0", "size": 3}, "pieces": [piece]})
    (folder / "metrics").mkdir()
    (folder / "metrics" / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "epoch": 0.1, "loss": 3}\n' * 3)

    Plan({"epochs": 3, "lr": 1e-3}, ["why"], 5.0).write(folder / "metrics" / "plan.json")
    (folder / "metrics" / "train.json").write_text(json.dumps(["一二三", "四五"]), encoding="utf-8")
    pieces, marks = folder / "pieces", Marks(1, 2, None, None, None, ())
    pieces.mkdir()
    (pieces / "tokenized_train_0.txt").write_text("1 5 6 7 2 1 8 9 2\n", encoding="ascii")

    def resume(copy: Path) -> None:
        Metrics(copy / "tb", copy / "metrics.jsonl", resumed_from=2).__exit__(None, None, None)

    return [
        *(
            (good, name, load_weights)
            for name in ("config.json", "manifest.json", "tokenizer_config.json", "vocab.txt")
        ),
        (good, "model.safetensors", load_weights),
        (pickled, "pytorch_model.bin", load_weights),
        (good, "vocab.txt", lambda copy: read_vocabulary(copy / "vocab.txt")),
        (checkpoint, "manifest.json", verify),
        (checkpoint, "state.pt", read_checkpoint),
        (tokenized, "manifest.json", read_manifest),
        (folder / "metrics", "metrics.jsonl", resume),
        (folder / "metrics", "plan.json", lambda copy: Plan.read(copy / "plan.json").apply(Namespace())),
        (folder / "metrics", "train.json", lambda copy: list(read_train_json(copy / "train.json"))),
        (pieces, "tokenized_train_0.txt", lambda copy: read_pieces(copy, vocab_size=10, marks=marks)),
    ]


def peak_megabytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return next(int(line.split()[1]) // 1024 for line in status.splitlines() if line.startswith("VmHWM"))


@pytest.fixture(scope="module")
def steady_memory(originals):
    """The process takes hardly more memory for damaged files than for good ones."""
    forget_peak = Path("/proc/self/clear_refs")
    if not forget_peak.exists():
        yield
        return
    for folder, _, read in originals:
        read(folder)
    forget_peak.write_text("5", encoding="ascii")  # else it is that of the tests before
    before = peak_megabytes()
    yield
    assert peak_megabytes() < before + 100


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=EXAMPLES // FILES)
@given(st.integers(0, 2**40))
def test_no_damage_to_a_file_that_is_read_is_a_traceback_or_takes_memory(
    originals, steady_memory, tmp_path_factory, seed
):
    source = random.Random(seed)
    assert len(originals) == FILES
    for folder, name, read in originals:
        copy = tmp_path_factory.mktemp("copy") / "copy"
        shutil.copytree(folder, copy)
        content = damage((copy / name).read_bytes(), source)
        (copy / name).write_bytes(content)
        try:
            read(copy)
        except (ValueError, OSError) as error:
            assert not isinstance(error, (UnicodeError, json.JSONDecodeError, pickle.UnpicklingError))
            assert str(error) and "\n" not in str(error)
            assert any(part in str(error) for part in (str(copy), name)), error
        shutil.rmtree(copy)
