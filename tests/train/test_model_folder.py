"""The model folder: what is saved is what is loaded, by us and by transformers, and half a folder is never seen."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from gpt2_chinese import model_folder as checkpoint
from gpt2_chinese.artifacts import write_lines
from gpt2_chinese.decoding.decoder import Decoder
from gpt2_chinese.model_folder import load_model, load_weights, read_config, save_model
from gpt2_chinese.text.vocabulary import SPECIAL_TOKENS
from gpt2_chinese.text.word_tokenizer import WordTokenizer
from gpt2_chinese.training.loss import WindowLoss

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[2]
SHAPE = {"n_ctx": 12, "n_positions": 16, "n_embd": 8, "n_head": 2, "n_layer": 2, "vocab_size": 20}


def make_tokenizer(size: int = 20, *, compat: bool = False) -> WordTokenizer:
    return WordTokenizer([*SPECIAL_TOKENS, *(chr(0x4E00 + number) for number in range(size - 5))], compat=compat)


def make_model(path: Path, **shape: object) -> GPT2LMHeadModel:
    path.write_text(json.dumps(SHAPE | shape), encoding="utf-8")
    torch.manual_seed(1)
    return GPT2LMHeadModel(read_config(path))


@pytest.fixture
def model(tmp_path):
    return make_model(tmp_path / "shape.json")


@pytest.fixture
def folder(tmp_path, model):
    save_model(tmp_path / "model", model, make_tokenizer(), facts={"loss": 1.5})
    return tmp_path / "model"


def logits(model: GPT2LMHeadModel, size: int = 20) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(torch.arange(12).reshape(1, 12) % size).logits


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def test_the_reference_s_checkpoint_gives_its_logits(reference, capsys):
    model, tokenizer = load_model(reference / "checkpoint", vocab_file=reference / "vocab_user.txt")
    input_ids = torch.tensor(json.loads((reference / "logits_input_ids.json").read_text(encoding="utf-8")))
    with torch.no_grad():
        found = model(input_ids).logits.numpy()
    expected = np.load(reference / "logits.npy")
    assert expected.shape == (2, 40, 4425)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert tokenizer.compat and len(tokenizer) == 4425
    assert model.config.n_ctx == 64
    assert "2 causal masks" in capsys.readouterr().err


def test_a_saved_model_is_the_same_after_loading(folder, model):
    loaded, tokenizer = load_model(folder)
    assert torch.equal(logits(loaded), logits(model))
    assert not loaded.training
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert tokenizer.vocabulary == make_tokenizer().vocabulary
    assert tokenizer.compat is False
    assert loaded.config.n_ctx == 12 and loaded.config.n_positions == 16
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_compat_comes_back(tmp_path, model):
    save_model(tmp_path / "model", model, make_tokenizer(compat=True), facts={})
    assert load_model(tmp_path / "model")[1].compat is True


def test_transformers_loads_the_folder_without_a_missing_or_surplus_weight(folder, model):
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert torch.equal(logits(loaded), logits(model))
    generation = loaded.generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (2, 1, 3)
    assert generation.suppress_tokens == [2, 3, 4]


def test_the_folder_has_what_other_programs_look_for(folder):
    assert sorted(path.name for path in folder.iterdir()) == [
        "char_tokenizer.py",
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors",
        "tokenization_gpt2_chinese.py",
        "tokenizer_config.json",
        "vocab.txt",
        "vocabulary.py",
        "word_tokenizer.py",
    ]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    expected = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_ctx": 12, "n_positions": 16}
    expected |= {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 3, "vocab_size": 20, "dtype": "float32"}
    assert config.items() >= expected.items()
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["facts"] == {"loss": 1.5}
    assert manifest["vocabulary"]["sha256"] == checkpoint.sha256_of(folder / "vocab.txt")


def test_the_attention_used_for_training_is_not_written_into_the_folder(tmp_path, model, script):
    before = logits(model)  # by transformers' own attention, which rounds otherwise
    WindowLoss(model)
    save_model(tmp_path / "model", model, make_tokenizer(), facts={})
    assert "causal" not in (tmp_path / "model" / "config.json").read_text(encoding="utf-8")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model")), before)


def test_weights_go_where_and_into_what_is_asked(folder, model):
    loaded, _ = load_model(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(loaded).float(), logits(model), atol=0.02, rtol=0)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
@pytest.mark.parametrize("head", [True, False])
def test_old_folders_load_with_and_without_prefix_head_and_masks(tmp_path, folder, model, capsys, prefix, head):
    state = load_file(folder / "model.safetensors")
    old = {prefix + name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    for layer in range(2):
        old[f"{prefix}h.{layer}.attn.bias"] = torch.ones(1, 1, 16, 16)
        old[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    if head:
        old["lm_head.weight"] = state["transformer.wte.weight"]
    (folder / "model.safetensors").unlink()
    torch.save(old, folder / "pytorch_model.bin")
    loaded, _ = load_model(folder)
    assert torch.equal(logits(loaded), logits(model))
    assert "4 causal masks" in capsys.readouterr().err


def test_rows_beyond_the_vocabulary_are_cut_and_said(tmp_path, folder, model, capsys):
    for name in ("manifest.json", "vocab.txt"):
        (folder / name).unlink()
    write_lines(tmp_path / "small.txt", make_tokenizer(15).vocabulary)
    loaded, tokenizer = load_model(folder, vocab_file=tmp_path / "small.txt")
    assert len(tokenizer) == loaded.config.vocab_size == loaded.lm_head.out_features == 15
    # The kept logits are the same, to what another matrix size rounds.
    torch.testing.assert_close(logits(loaded, 15), logits(model, 15)[..., :15], atol=1e-6, rtol=1e-5)
    assert "20 rows for 15 tokens" in capsys.readouterr().err


def break_weights(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def rename_weight(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["transformer.h.1.mlp.new"] = state.pop("transformer.h.1.ln_1.weight")
    save_file(state, folder / "model.safetensors")


def add_word(folder: Path) -> None:
    (folder / "vocab.txt").write_text("\n".join([*make_tokenizer(19).vocabulary, "new"]), encoding="utf-8")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def empty_pickle(folder: Path) -> None:
    no_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")


def other_pickle(folder: Path) -> None:
    no_weights(folder)
    torch.save([1, 2], folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (no_weights, FileNotFoundError, "model has no weights: neither model.safetensors nor pytorch_model.bin"),
        (break_weights, ValueError, "model.safetensors is damaged"),
        (empty_pickle, ValueError, "pytorch_model.bin is damaged"),
        (other_pickle, ValueError, "does not hold a model's weights"),
        (rename_weight, ValueError, r"h\.1\.ln_1\.weight is missing; .*h\.1\.mlp\.new is not part of the model"),
        (lambda f: edit(f / "config.json", n_embd=4), ValueError, r"do not fit its config.json: .*and \d+ more"),
        (lambda f: edit(f / "config.json", n_layer=1), ValueError, "is not part of the model"),
        (lambda f: (f / "config.json").write_text("{"), ValueError, "config.json is not JSON"),
        (lambda f: (f / "config.json").unlink(), FileNotFoundError, "not a model folder: it has no config.json"),
        (lambda f: (f / "vocab.txt").unlink(), FileNotFoundError, r"has no vocab\.txt.*--vocab_file"),
        (
            add_word,
            ValueError,
            r"vocab\.txt is not the file that .*manifest",
        ),
        (lambda f: (f / "manifest.json").write_text("[]"), ValueError, "manifest is a JSON object"),
    ],
)
def test_a_damaged_folder_is_explained_instead_of_loaded_in_part(folder, damage, error, message):
    damage(folder)
    with pytest.raises(error, match=message):
        load_model(folder)


def test_a_pickle_that_runs_code_is_refused(folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    no_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"transformer.wte.weight": Evil()}, protocol=2))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is damaged or no weights file"):
        load_model(folder)
    torch.save({"transformer.wte.weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is damaged or no weights file"):
        load_model(folder)
    assert not (tmp_path / "ran").exists()


def test_a_vocabulary_other_than_the_folder_s_is_refused(tmp_path, folder):
    write_lines(tmp_path / "same.txt", make_tokenizer().vocabulary)
    load_model(folder, vocab_file=tmp_path / "same.txt")
    write_lines(tmp_path / "other.txt", [*SPECIAL_TOKENS, "x"])
    with pytest.raises(ValueError, match=r"other\.txt and .*vocab\.txt disagree"):
        load_model(folder, vocab_file=tmp_path / "other.txt")


def test_a_vocabulary_larger_than_the_model_is_refused(tmp_path, folder):
    for name in ("manifest.json", "vocab.txt"):
        (folder / name).unlink()
    write_lines(tmp_path / "large.txt", make_tokenizer(21).vocabulary)
    with pytest.raises(ValueError, match="vocabulary has 21 tokens, but .* knows only 20"):
        load_model(folder, vocab_file=tmp_path / "large.txt")


def test_a_folder_that_is_not_there_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model folder .*absent; train\.py writes one"):
        load_model(tmp_path / "absent")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": 3}, "n_embd 8 is not a multiple of n_head 3"),
        ({"n_ctx": 17}, "n_ctx 17 is more than n_positions 16"),
        ({"n_layer": 0}, "n_layer must be a whole number above 0, it is 0"),
        ({"n_layer": True}, "n_layer must be a whole number above 0, it is True"),
        ({"n_embd": "8"}, "n_embd must be a whole number above 0, it is '8'"),
        ({"vocab_size": None}, "vocab_size must be"),
        ({"attn_pdrop": 1.5}, "attn_pdrop must be a number from 0 to below 1"),
    ],
)
def test_a_shape_that_makes_no_model_names_file_key_and_value(tmp_path, changes, message):
    (tmp_path / "shape.json").write_text(json.dumps(SHAPE | changes), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"shape\.json: {message}"):
        read_config(tmp_path / "shape.json")


def test_one_of_n_ctx_and_n_positions_is_enough(tmp_path):
    for key in ("n_ctx", "n_positions"):
        shape = {name: value for name, value in SHAPE.items() if name != key}
        (tmp_path / "shape.json").write_text(json.dumps(shape), encoding="utf-8")
        config = read_config(tmp_path / "shape.json")
        assert config.n_ctx == config.n_positions
    with pytest.raises(FileNotFoundError, match="no model configuration"):
        read_config(tmp_path / "absent.json")
    (tmp_path / "shape.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match="is a JSON object, this is a list"):
        read_config(tmp_path / "shape.json")


def test_the_shipped_configurations_are_those_of_the_book():
    root = Path(__file__).resolve().parents[2] / "config"
    for name in ("model_config.json", "model_config_small.json"):
        shape = json.loads((root / name).read_text(encoding="utf-8"))
        assert (shape["n_layer"], shape["n_head"], shape["n_embd"]) == (12, 12, 768)
        assert (shape["vocab_size"], shape["n_ctx"], shape["n_positions"]) == (50005, 1024, 1024)
        assert (shape["initializer_range"], shape["layer_norm_epsilon"]) == (0.02, 1e-5)
        assert {shape[key] for key in ("attn_pdrop", "embd_pdrop", "resid_pdrop")} == {0.1}
    with torch.device("meta"):
        small = GPT2LMHeadModel(read_config(root / "model_config_small.json"))
        same = GPT2LMHeadModel(GPT2Config(vocab_size=50005))
    assert small.num_parameters() == same.num_parameters()
    for path in root.glob("*.json"):
        read_config(path)


def test_a_failed_save_leaves_the_old_folder_as_it_was(folder, model, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_lines", full)
    with pytest.raises(OSError, match="No space left"):
        save_model(folder, model, make_tokenizer(), facts={"loss": 0})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []


def test_a_save_replaces_the_whole_folder_and_what_a_killed_run_left(folder, model):
    (folder.parent / ".model.tmp").mkdir()
    (folder.parent / ".model.tmp" / "model.safetensors").write_text("half")
    (folder / "pytorch_model.bin").write_text("of an old model")
    save_model(folder, model, make_tokenizer(), facts={"loss": 0})
    assert not (folder / "pytorch_model.bin").exists()
    assert json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["facts"] == {"loss": 0}
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []


def test_a_run_killed_between_two_renames_loses_no_folder(folder, model, monkeypatch):
    folder.rename(folder.parent / ".model.old")

    def fails(*_: object, **__: object) -> None:
        raise OSError("stop")

    monkeypatch.setattr(checkpoint, "save_file", fails)
    with pytest.raises(OSError, match="stop"):
        save_model(folder, model, make_tokenizer(), facts={})
    assert torch.equal(logits(load_model(folder)[0]), logits(model))


def test_what_is_not_a_model_folder_is_never_replaced(tmp_path, model):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "diary.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("texts", "file"):
        with pytest.raises(FileExistsError, match=f"{name} is there already and is not a model folder"):
            save_model(tmp_path / name, model, make_tokenizer(), facts={})
    assert (tmp_path / "texts" / "diary.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    save_model(tmp_path / "empty", model, make_tokenizer(), facts={})


def test_a_vocabulary_of_another_size_is_not_saved_with_the_model(tmp_path, model):
    with pytest.raises(ValueError, match="vocabulary has 19 tokens, the model 20"):
        save_model(tmp_path / "model", model, make_tokenizer(19), facts={})
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"n_inner": 12, "activation_function": "relu", "scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True, "layer_norm_epsilon": 1e-3},
        {"activation_function": "silu"},
    ],
)
def test_weights_without_transformers_decode_as_its_model_does(tmp_path, shape):
    save_model(tmp_path / "model", make_model(tmp_path / "shape.json", **shape), make_tokenizer(), facts={})
    steps = []
    for load in (load_model, load_weights):
        model, tokenizer = load(tmp_path / "model")
        assert len(tokenizer) == 20
        decoder = Decoder(model, max_num_seqs=2)
        for row in range(2):
            decoder.load_prefill(row, decoder.prefill([2, 7 + row, 9]))
        steps.append(decoder.step([6, 8], [3, 3]))
    assert torch.equal(steps[0], steps[1])


def test_decoding_does_not_wait_for_the_import_of_transformers(folder):
    code = (
        "import sys; from gpt2_chinese.model_folder import load_weights\n"
        "from gpt2_chinese.decoding.engine import Engine\n"
        "with Engine(*load_weights(sys.argv[1]), precision='fp32') as engine:\n"
        "    engine.submit(engine.prompt_from_ids([2, 6, 7], 2), samples=1, length=2).future.result()\n"
        "assert 'transformers' not in sys.modules and 'numba' not in sys.modules or 'compiling' in sys.argv[2]"
    )
    command = [sys.executable, "-c", code, str(folder)]
    subprocess.run([*command, "compiling"], check=True, cwd=ROOT)  # keeps the machine code, if it was not there
    subprocess.run([*command, "compiled"], check=True, cwd=ROOT)
