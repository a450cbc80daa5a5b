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
import threading
import tracemalloc
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_run import run
from tiny_model import save_tiny_model, tiny_model

from gpt2_chinese.artifacts import atomic_write, disk_errors, make_folder, read_text_file, sha256_of, write_json
from gpt2_chinese.compiled import code_digest, read_cached_code, write_cached_code
from gpt2_chinese.model_folder import load_weights, save_model
from gpt2_chinese.text.bpe_tokenizer import BpeTokenizer, bytes_of_characters, definition_of_gpt2
from gpt2_chinese.text.corpus import read_train_json
from gpt2_chinese.text.pieces import check_vocabulary, read_manifest, read_pieces_tokenizer
from gpt2_chinese.text.preparation import PieceReport
from gpt2_chinese.text.tokenizers import TokenizerSpec, read_tokenizer
from gpt2_chinese.text.vocabulary import BERT_SPECIAL_TOKENS, Marks, read_vocabulary
from gpt2_chinese.training.checkpoints import latest_valid, read_checkpoint, verify, write_checkpoint
from gpt2_chinese.training.metrics import Metrics
from gpt2_chinese.training.plan import Plan
from gpt2_chinese.training.plan import _facts as facts_of_pieces
from gpt2_chinese.training.report_figures import read_curves, read_facts
from gpt2_chinese.training.run import read_prompts
from gpt2_chinese.training.token_cache import read_pieces
from gpt2_chinese.weights_file import read_weights_file

EXAMPLES = int(os.environ.get("GPT2_CHINESE_EXAMPLES", "500"))
FILES = 26  # that are damaged in turn; each counts as an example
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


@pytest.mark.filterwarnings("ignore")  # torch says that some kinds of tensors are new
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
        *(
            (lambda state, of=of: state | {"transformer.wpe.weight": of(state["transformer.wpe.weight"])}, "is sparse")
            for of in (
                torch.Tensor.to_sparse,
                torch.Tensor.to_sparse_csr,
                lambda matrix: matrix.to("meta"),
                lambda matrix: torch.nested.nested_tensor([matrix[0], matrix[1]]),
            )
        ),
        (
            lambda state: {"a": torch.zeros(1), "b": ["x" * 40 + str(number) for number in range(150_000)]},
            "to describe",
        ),
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


def too_large() -> str:
    """The JSON of a list that takes thirty times as much memory as its text."""
    return "[" + "[]," * 3_000_000 + "[]]"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((name, '{"a": ' + too_large() + "}") for name in ("config.json", "manifest.json", "special_tokens_map.json")),
        ("model.safetensors", struct.pack("<Q", len(too_large()) + 8) + b'{"a": ' + too_large().encode() + b"}\n"),
        ("vocab.txt", "\n" * 10_000_000),
        ("vocab.txt", "\r\n" * 10_000_000),
    ],
    ids=["config", "manifest", "special tokens", "header", "vocabulary", "vocabulary of Windows"],
)
def test_a_file_far_larger_than_any_good_one_is_refused_before_memory_is_taken(folder, name, content):
    if name == "vocab.txt":
        (folder / "manifest.json").unlink()  # which tells that it is another file
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"more than 2,097,152 bytes|no header of safetensors|of empty lines"):
            load_weights(folder)
        assert tracemalloc.get_traced_memory()[1] < 50 << 20
    finally:
        tracemalloc.stop()


# Byte-level BPE.


def gpt2_ids() -> dict[str, int]:
    tokens = ["<|endoftext|>", *bytes_of_characters(), "ab"]
    return {token: number for number, token in enumerate(tokens)}


def write_gpt2_files(folder: Path, ids: dict | None = None, merges: bytes = b"#version: 0.2\na b\n") -> Path:
    (folder / "vocab.json").write_text(json.dumps(ids or gpt2_ids()), encoding="utf-8")
    (folder / "merges.txt").write_bytes(merges)
    return folder / "vocab.json"


def described(**parts: object) -> str:
    return json.dumps(json.loads(definition_of_gpt2(gpt2_ids(), ["a b"])) | parts)


def with_ids(**ids: int) -> str:
    model = json.loads(described())["model"]
    return described(model=model | {"vocab": model["vocab"] | ids})


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        (with_ids(**{"a b": 258}), "has the token 'a b', which is not of bytes"),
        (with_ids(**{"你": 258}), "has the token '你', which is not of bytes"),
        (with_ids(zz=20_000_000), "259 tokens have ids from 0 to 20,000,000"),
        (with_ids(zz=4_000_000_000), "259 tokens have ids from 0 to 4,000,000,000"),
        (described(normalizer={"type": "Replace", "pattern": {"String": ""}, "content": "x"}), "replaces the empty"),
        (
            described(
                normalizer={
                    "type": "Sequence",
                    "normalizers": [{"type": "Replace", "pattern": {"Regex": ""}, "content": "x"}],
                }
            ),
            "replaces the empty",
        ),
    ],
)
def test_a_tokenizer_json_that_makes_no_tokenizer_is_told(tmp_path, definition, message):
    path = tmp_path / "tokenizer.json"
    path.write_text(definition, encoding="utf-8")
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message) as raised:
            read_tokenizer(path).build()
        assert str(path) in str(raised.value)
        assert tracemalloc.get_traced_memory()[1] < 50 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("ids", "merges", "message"),
    [
        ({}, b"q zzq\n", "vocab.json does not fit the merges.txt beside it"),
        ({}, b"abc\n", "vocab.json does not fit the merges.txt beside it"),
        ({}, b"a b\n\xff\xfe a", "merges.txt is not UTF-8: byte 4"),
        ({"zz": -1}, b"a b\n", "vocab.json is damaged: 259 tokens have ids from -1"),
        ({"zz": 20_000_000}, b"a b\n", "vocab.json is damaged: 259 tokens have ids from 0 to 20,000,000"),
    ],
)
def test_the_files_of_gpt2_are_told_apart_from_damaged_ones(tmp_path, ids, merges, message):
    assert read_tokenizer(write_gpt2_files(tmp_path)).build().encode("ab") == [257]
    with pytest.raises(ValueError, match=message):
        read_tokenizer(write_gpt2_files(tmp_path, gpt2_ids() | ids, merges))


@pytest.mark.parametrize("rules", [None, "x", 99, True, [1]])
def test_rules_that_nobody_knows_are_told(folder, rules):
    write_json(
        folder / "tokenizer_config.json", json.loads((folder / "tokenizer_config.json").read_text()) | {"rules": rules}
    )
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: rules is"):
        load_weights(folder)


# The stages before the training.

NO_MANIFESTS = [5, [], None, {"vocabulary": None}, {"vocabulary": 5}]


@pytest.mark.parametrize(
    "change",
    [*NO_MANIFESTS, {"corpus": None}, {"corpus": {"path": 5}}, {"options": [1]}, {"vocabulary": {"sha256": None}}],
)
def test_a_vocabularys_manifest_of_other_types_is_told(tmp_path, script, change):
    vocabulary, manifest = tmp_path / "v.txt", tmp_path / "v.manifest.json"
    vocabulary.write_text("a\n")
    good = {"vocabulary": {"sha256": sha256_of(vocabulary)}, "corpus": {"path": "a"}, "options": {"keep_case": True}}
    write_json(manifest, good)
    assert script("make-tokenized").kept_by_vocabulary(vocabulary) == {"keep_case": True}
    write_json(manifest, good | change if isinstance(change, dict) else change)
    with pytest.raises(ValueError, match=r"v\.manifest\.json is not a manifest of make-vocab\.py; delete it"):
        script("make-tokenized").kept_by_vocabulary(vocabulary)


@pytest.mark.parametrize("missing", ["kind", "rules"])
def test_pieces_whose_tokenizer_has_lost_its_kind_are_not_read_as_words(good, missing):
    settings = TokenizerSpec("char").settings()
    del settings[missing]
    if missing == "kind":
        with pytest.raises(ValueError, match="of another version of this program"):
            read_pieces_tokenizer({"tokenizer": settings}, good / "vocab.txt")
    else:  # as of an earlier version
        assert read_pieces_tokenizer({"tokenizer": settings}, good / "vocab.txt").kind == "char"


def stage_3_key(folder: Path) -> dict:
    """What make-tokenized.py compares with the manifest that is there."""
    file = {"path": str(folder / "nowhere"), "sha256": "0", "size": 3}
    return {"tokenizer": {}, "vocabulary": file, "corpus": file, "options": {"num_pieces": 3}}


def write_piece(folder: Path) -> dict:
    path = folder / "tokenized_train_0.txt"
    path.write_text("1 5 2 ")
    return {"file": path.name, "sha256": sha256_of(path), "tokens": 3, "documents": 1}


@pytest.mark.parametrize("change", [*NO_MANIFESTS, {"pieces": None}, {"pieces": [5]}, {"pieces": [{"file": "a"}]}])
def test_pieces_whose_manifest_is_of_other_types_are_replaced_when_that_is_said(tmp_path, script, change):
    stage, key = script("make-tokenized"), stage_3_key(tmp_path)
    good = key | {"pieces": [write_piece(tmp_path)]}
    write_json(tmp_path / "manifest.json", good)
    assert stage.unchanged(tmp_path, key)
    write_json(tmp_path / "manifest.json", good | change if isinstance(change, dict) else change)
    assert not stage.unchanged(tmp_path, key)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged, or of another program.*--overwrite"):
        stage.check_replaceable(tmp_path, key, overwrite=False)
    stage.check_replaceable(tmp_path, key, overwrite=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda line: 5,
        lambda line: [1, 2, 3],
        lambda line: ["a", None, None],
        lambda line: [-1, *line[1:]],
        lambda line: [3, *line[1:]],
        lambda line: [0, line[1] | {"file": 5}, line[2]],
        lambda line: [0, line[1] | {"sha256": None}, line[2]],
        lambda line: [0, line[1], {}],
        lambda line: [0, line[1], line[2] | {"x": 1}],
        lambda line: [0, line[1], line[2] | {"unknown_words": {"a": "b"}}],
        lambda line: [0, line[1], line[2] | {"examples": {"case": 5}}],
    ],
)
def test_a_line_of_progress_of_other_types_is_work_to_be_done_again(tmp_path, script, change):
    stage, key, path = script("make-tokenized"), stage_3_key(tmp_path), tmp_path / ".progress.jsonl"
    line = [0, write_piece(tmp_path), vars(PieceReport(documents=1, tokens=3))]
    path.write_text("".join(json.dumps(value) + "\n" for value in (key, line)))
    assert set(stage.Progress(tmp_path, key).finished) == {0}
    path.write_text("".join(json.dumps(value) + "\n" for value in (key, change(line))))
    assert not stage.Progress(tmp_path, key).finished
    path.write_bytes(b"\xff\xfe" + path.read_bytes())
    assert not stage.Progress(tmp_path, key).finished


# Texts that flags name, as a Chinese Windows saves them.


def test_texts_in_gbk_are_told_with_the_file_and_what_mends_it(tmp_path, script):
    path = tmp_path / "texts.txt"
    path.write_text("\ufeff孩子\r\n医生\r\n", encoding="utf-8", newline="")
    flags = Namespace(titles=None, titles_file=str(path))
    assert script("generate").read_titles(flags) == read_prompts(str(path)) == ["孩子", "医生"]
    path.write_bytes("孩子\n".encode("gbk"))
    for read in (lambda: script("generate").read_titles(flags), lambda: read_prompts(str(path))):
        with pytest.raises(ValueError, match=r"texts\.txt is not UTF-8: byte 0; save it as UTF-8"):
            read()


# Training.


WORDS_AS_BEFORE = {"kind": "word", "compat": False, "rules": 2}


@pytest.mark.parametrize(
    "change",
    [
        {"unknown_tokens": 0},
        {"unknown_tokens": 0, "tokens": "x", "documents": 2},
        {"unknown_tokens": 0, "tokens": 77, "documents": None},
        {"unknown_tokens": "5", "tokens": 77, "documents": 2},
        {"tokenizer": [1]},
        *(
            {"tokenizer": WORDS_AS_BEFORE | wrong}
            for wrong in ({"rules": 99}, {"rules": "x"}, {"kind": 5}, {"begin": 5})
        ),
        {"tokenizer": {"kind": "char", "begin": None}},
        {"options": None},
        {"tokenizer_rules": [1]},
    ],
)
def test_a_manifest_of_pieces_of_other_types_is_told_by_the_training(train, change):
    path = Path("tokenized/manifest.json")
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | change)
    with pytest.raises(ValueError, match=r"manifest\.json.*; run make-tokenized\.py again"):
        run(train, epochs=1)


@pytest.mark.parametrize("change", [{"pieces": "x"}, {"size": None}])
def test_a_manifest_of_pieces_of_other_types_is_told_by_the_plan(train, change):
    path = Path("tokenized/manifest.json")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["pieces"][0]["tokens"] = change.get("pieces", 3)
    manifest["vocabulary"]["size"] = change.get("size", 5)
    write_json(path, manifest)
    with pytest.raises(ValueError, match=r"manifest\.json is not a manifest of make-tokenized\.py"):
        facts_of_pieces(Namespace(minutes=1, tokenized_data_path="tokenized"), 60.0)


def write_run(folder: Path, **manifest: object) -> Path:
    settings = {"tokenized_data_path": "tokenized", "vocab_file": None, "val_fraction": 0.01, "val_bytes": [1, 2]}
    (folder / "final_model").mkdir(parents=True, exist_ok=True)
    write_json(folder / "final_model" / "manifest.json", {"facts": {"updates": 5, "settings": settings}} | manifest)
    (folder / "metrics.jsonl").write_text(
        '{"kind": "train", "step": 1, "epoch": 0.1, "loss": 3}\n'
        '{"kind": "validation", "step": 1, "epoch": 0.1, "loss": 3.0}\n'
    )
    return folder


@pytest.mark.parametrize(
    "facts", [5, [1], *({"settings": one} for one in (5, [1], {"val_bytes": 5}, {"tokenized_data_path": None}))]
)
def test_facts_of_other_types_are_told_by_the_report(tmp_path, facts):
    assert read_facts(write_run(tmp_path))["updates"] == 5
    assert read_facts(write_run(tmp_path, facts=None)) == {}
    if isinstance(facts, dict) and isinstance(facts["settings"], dict):
        facts["settings"] = {"tokenized_data_path": "tokenized", "val_fraction": 0.01} | facts["settings"]
    with pytest.raises(ValueError, match=r"final_model/manifest\.json does not tell of a training"):
        read_facts(write_run(tmp_path, facts=facts))
    for content in (5, None, []):
        write_json(tmp_path / "final_model" / "manifest.json", content)
        with pytest.raises(ValueError, match=r"final_model/manifest\.json does not tell of a training"):
            read_facts(tmp_path)


def test_lines_of_metrics_that_are_none_are_left_out_of_the_report(tmp_path):
    path = write_run(tmp_path) / "metrics.jsonl"
    good = read_curves(path)
    assert good.training["loss"] == good.validation["loss"] == [3]
    lines = [b"5", b"[]", b"[" * 100_000, b"\xe5", b'{"kind": "train"}', b'{"kind": "train", "step": "x", "epoch": 1}']
    lines += [
        b'{"kind": "train", "step": 2, "epoch": null}',
        b'{"kind": "train", "step": 2, "epoch": 1' + b"0" * 400 + b"}",
    ]
    lines += [b'{"kind": "validation", "step": 2, "epoch": 1, "loss": "x"}']
    path.write_bytes(path.read_bytes() + b"\n".join(lines))
    assert read_curves(path) == good


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


@pytest.mark.parametrize("fails_at", [0, 1, 5])
def test_a_full_disk_under_tensorboard_is_one_line_that_names_its_folder(tmp_path, monkeypatch, capfd, fails_at):
    written = []

    def write(self, data: bytes) -> None:
        written.append(data)
        if len(written) > fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", write)
    hook = threading.excepthook
    with pytest.raises(OSError, match="No space left on device: '.*tb'"):
        with Metrics(tmp_path / "tb", tmp_path / "metrics.jsonl") as metrics:
            for step in range(10):
                metrics.train(step, 0.0, loss=1.0)
            metrics.flush()
    threading.excepthook = hook
    assert capfd.readouterr().err == ""


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
    assert done[0] == ("flush", tmp_path.name), "the name of a new parent is on the disk as well"
    place = done.index(("rename", "model"))
    assert {("flush", "model.safetensors"), ("flush", ".model.tmp")} <= set(done[:place])
    assert done[place + 1 :] == [("flush", "parent")]
    done.clear()
    write_checkpoint(tmp_path / "checkpoints", 7, {"model": {}}, {})
    place = done.index(("rename", "step_7"))
    assert {("flush", "state.pt"), ("flush", ".step_7.tmp")} <= set(done[:place])
    assert done[place + 1] == ("flush", "checkpoints")
    assert done[0] == ("flush", tmp_path.name)
    done.clear()
    with atomic_write(tmp_path / "a") as file:
        file.write("x")
    assert done == [("flush", ".a.tmp"), ("rename", "a"), ("flush", tmp_path.name)]
    done.clear()
    with atomic_write(tmp_path / "new" / "deep" / "a") as file:
        file.write("x")
    parents = [("flush", tmp_path.name), ("flush", "new")]
    assert done == [*parents, ("flush", ".a.tmp"), ("rename", "a"), ("flush", "deep")]
    done.clear()
    make_folder(tmp_path / "new" / "deep")
    assert done == []


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
    for parts in ([data], data.split(b"\n")):  # a file of JSON, or a line of one
        number = source.randrange(len(parts))
        try:
            value = json.loads(parts[number])
            assert isinstance(value, (dict, list)) and value
        except (ValueError, AssertionError):
            continue
        parts[number] = json.dumps(with_another_type(value, source)).encode()
        return b"\n".join(parts)
    return data[:place] + source.randbytes(8) + data[place + 8 :]


def with_another_type(value: dict | list, source: random.Random) -> dict | list:
    """A JSON value in which something is of another type, or missing."""
    strange = [None, 5, -1, 10**30, 1.5, "x", [], {}, True, [None], {"a": None}, "9" * 40, math.inf]
    holder = value
    while True:
        name = source.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        if isinstance(holder[name], (dict, list)) and holder[name] and source.random() < 0.7:
            holder = holder[name]
            continue
        if source.random() < 0.2:
            del holder[name]
        else:
            holder[name] = source.choice(strange)
        return value


@pytest.fixture(scope="module")
def originals(good, tmp_path_factory, script):
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

    bpe, gpt2 = folder / "bpe", folder / "gpt2"
    save_model(bpe, tiny_model(vocab_size=258), BpeTokenizer(described()), facts={})
    (bpe / "manifest.json").unlink()  # which tells of every change
    write_json(bpe / "special_tokens_map.json", {"eos_token": {"content": "<|endoftext|>"}, "pad_token": None})
    gpt2.mkdir()
    write_gpt2_files(gpt2)
    stage, key = script("make-tokenized"), stage_3_key(folder)
    (stage_3 := folder / "stage_3").mkdir()
    piece = write_piece(stage_3)
    write_json(stage_3 / "manifest.json", key | {"pieces": [piece]})
    lines = [
        key,
        [0, piece, vars(PieceReport(documents=1, tokens=3, unknown_words={"a": 1}, examples={"case": ["a"]}))],
    ]
    (stage_3 / ".progress.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (stage_2 := folder / "stage_2").mkdir()
    (stage_2 / "v.txt").write_text("".join(f"{token}\n" for token in [*BERT_SPECIAL_TOKENS, "一"]), encoding="utf-8")
    made_from = {"vocabulary": {"path": "v.txt", "sha256": sha256_of(stage_2 / "v.txt"), "size": 6}}
    write_json(stage_2 / "v.manifest.json", made_from | {"corpus": {"path": "a"}, "options": {"keep_case": True}})
    (stage_2 / "titles.txt").write_text("孩子\n医生\n", encoding="utf-8")
    settings = TokenizerSpec("char").settings()
    write_json(
        stage_2 / "manifest.json",
        made_from
        | {"pieces": [piece], "tokenizer": settings}
        | dict.fromkeys(("tokens", "documents", "unknown_tokens"), 1),
    )
    trained = write_run(folder / "trained")

    def read_bpe(copy: Path) -> None:
        load_weights(copy)[1].encode("ab 一")

    def tokenize_again(copy: Path) -> None:
        stage.unchanged(copy, key)
        stage.check_replaceable(copy, key, overwrite=False)

    def train_on(copy: Path) -> None:
        manifest = read_manifest(copy)
        check_vocabulary(copy, manifest, copy / "v.txt")
        read_pieces_tokenizer(manifest, copy / "v.txt").build().encode("一")
        facts_of_pieces(Namespace(minutes=1, tokenized_data_path=copy), 60.0)

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
        *((bpe, name, read_bpe) for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")),
        *((gpt2, name, lambda copy: read_tokenizer(copy / "vocab.json")) for name in ("vocab.json", "merges.txt")),
        (stage_2, "v.manifest.json", lambda copy: stage.kept_by_vocabulary(copy / "v.txt")),
        (stage_2, "manifest.json", train_on),
        (stage_2, "titles.txt", lambda copy: read_text_file(copy / "titles.txt")),
        (stage_3, "manifest.json", tokenize_again),
        (stage_3, ".progress.jsonl", lambda copy: stage.Progress(copy, key)),
        (trained, "metrics.jsonl", lambda copy: read_curves(copy / "metrics.jsonl")),
        (trained, "final_model/manifest.json", read_facts),
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
