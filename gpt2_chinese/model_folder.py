"""The model folder: an ordinary Hugging Face GPT-2 with its vocabulary beside it, written and read whole.

| file | what |
|---|---|
| `config.json` | the shape, as transformers writes it, with `n_ctx` |
| `model.safetensors` | the weights; an output layer that is the embedding is not stored twice |
| `generation_config.json` | what begins a document, what ends it, what is never produced |
| `vocab.txt` or `tokenizer.json`, `tokenizer_config.json` | the vocabulary and how text is tokenized |
| `tokenization_gpt2_chinese.py`, … | the code of the tokenizer of words or characters, for AutoTokenizer |
| `manifest.json` | the vocabulary's SHA-256, and facts about the training |

Folders of GPT2-Chinese (transformers 2.1.1) and of the hub are read too. Nothing in a folder is run: weights are read
as tensors alone, and the tokenizer's code is for other programs.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from gpt2_chinese.artifacts import (
    disk_errors,
    flush_file,
    flush_folder,
    has_shape,
    make_folder,
    read_json,
    sha256_of,
    write_json,
    write_lines,
)
from gpt2_chinese.best_model import BEST_MODEL, MANIFEST, note_of_a_better_model
from gpt2_chinese.command_line import remark
from gpt2_chinese.text.char_tokenizer import CharTokenizer
from gpt2_chinese.text.tokenizers import (
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    VOCABULARY,
    HasDefinition,
    Tokenizer,
    read_tokenizer,
    vocabulary_of_folder,
)
from gpt2_chinese.text.vocabulary import Marks
from gpt2_chinese.text.word_tokenizer import WordTokenizer
from gpt2_chinese.weights_file import Shapes, read_weights_file

if TYPE_CHECKING:
    from transformers import GPT2Config, GPT2LMHeadModel

# transformers is imported where a model is built from it: that takes seconds, and to decode a model it is not needed.

__all__ = ["BEST_MODEL", "MANIFEST", "note_of_a_better_model"]  # for those who know them from here
FORMAT = 1
CONFIG = "config.json"
WEIGHTS, OLD_WEIGHTS = "model.safetensors", "pytorch_model.bin"

# transformers before 4.3x stored the causal mask of every layer beside the weights.
_MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
_MEND = "copy the folder again, or train again"
TOKENIZER_CODE = ("tokenization_gpt2_chinese.py", "char_tokenizer.py", "word_tokenizer.py", "vocabulary.py")
_EMBEDDING, _HEAD = "transformer.wte.weight", "lm_head.weight"
_SHAPE_KEYS = (
    "vocab_size",
    "n_positions",
    "n_embd",
    "n_layer",
    "n_head",
    "n_inner",
    "activation_function",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "layer_norm_epsilon",
    "initializer_range",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "reorder_and_upcast_attn",
)
_DEFAULTS = {
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}
"""transformers' defaults of what decides the forward pass and may be left out of a configuration."""


_LARGEST = {
    "n_ctx": 1 << 22,
    "n_positions": 1 << 22,
    "n_embd": 1 << 17,
    "n_head": 1 << 14,
    "n_layer": 1_000,
    "vocab_size": 1 << 26,
    "n_inner": 1 << 20,
}
"""Far above every GPT-2; a configuration beyond is damaged, and would fill the memory."""
_BOOLEANS = (
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "reorder_and_upcast_attn",
    "tie_word_embeddings",
)
_COMPILED_ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh", "relu")


def _short(value: Any) -> str:
    """A value of a file, for a message of one line."""
    try:
        text = repr(value)
    except ValueError:  # a number of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else text[:60] + "…"


def _check_activation(path: Path, name: Any) -> None:
    if name in _COMPILED_ACTIVATIONS:
        return
    from transformers.activations import ACT2FN  # takes seconds, and hardly any model has another

    if not isinstance(name, str) or name not in ACT2FN:
        raise ValueError(f"{path}: activation_function must be one that transformers has, it is {_short(name)}")


def read_config(path: str | Path, *, vocab_size: int | None = None, marks: Marks | None = None) -> GPT2Config:
    """Read a GPT-2's shape from JSON, of `config/`, of a model folder or of GPT2-Chinese.

    `n_ctx` is the length of a training window, `n_positions` the number of position embeddings; one of them is
    enough. `vocab_size` replaces the file's, since the vocabulary decides, and `marks` say what begins and ends a
    document, whatever the file has. Keys that do not shape the model (those
    that old versions of transformers wrote) are ignored.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not JSON, or a value that makes no model; the message names the file and the key.
    """
    return _as_config(_read_shape(path, vocab_size=vocab_size), marks)


def _as_config(shape: Mapping[str, Any], marks: Marks | None) -> GPT2Config:
    from transformers import GPT2Config

    config = GPT2Config(
        **{key: shape[key] for key in _SHAPE_KEYS if key in shape},
        tie_word_embeddings=shape.get("tie_word_embeddings", True),
        bos_token_id=None if marks is None else marks.begin,
        eos_token_id=None if marks is None else marks.end,
        pad_token_id=None if marks is None else marks.padding,
    )
    config.n_ctx = shape["n_ctx"]  # no field of transformers 5, but other programs look for it
    return config


def _read_shape(path: str | Path, *, vocab_size: int | None = None) -> dict[str, Any]:
    """Read a configuration and check it; errors as in `read_config`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no model configuration {path}; config/ has some to choose from")
    shape = read_json(path)
    if not isinstance(shape, dict):
        raise ValueError(f"{path}: a model configuration is a JSON object, this is a {type(shape).__name__}")
    if vocab_size is not None:
        shape["vocab_size"] = vocab_size
    for key, other in (("n_ctx", "n_positions"), ("n_positions", "n_ctx")):
        shape.setdefault(key, shape.get(other))
    for key, most in _LARGEST.items():
        value = shape.get(key)
        if key == "n_inner" and value is None:
            continue
        if type(value) is not int or value < 1:
            raise ValueError(f"{path}: {key} must be a whole number above 0, it is {_short(value)}")
        if value > most:
            raise ValueError(f"{path}: {key} must be at most {most}, it is {_short(value)}")
    for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        value = shape.get(key, 0.1)
        if type(value) not in (int, float) or not 0 <= value < 1:
            raise ValueError(f"{path}: {key} must be a number from 0 to below 1, it is {_short(value)}")
    for key, value in (
        ("layer_norm_epsilon", shape.get("layer_norm_epsilon", 1e-5)),
        ("initializer_range", shape.get("initializer_range", 0.02)),
    ):
        if type(value) not in (int, float) or not 0 <= value <= 1 or (key == "layer_norm_epsilon" and value == 0):
            raise ValueError(f"{path}: {key} must be a number above 0, at most 1, it is {_short(value)}")
    for key in _BOOLEANS:
        if type(shape.get(key, True)) is not bool:
            raise ValueError(f"{path}: {key} must be true or false, it is {_short(shape[key])}")
    _check_activation(path, shape.get("activation_function", "gelu_new"))
    if shape["n_embd"] % shape["n_head"]:
        raise ValueError(f"{path}: n_embd {shape['n_embd']} is not a multiple of n_head {shape['n_head']}")
    if shape["n_ctx"] > shape["n_positions"]:
        raise ValueError(f"{path}: n_ctx {shape['n_ctx']} is more than n_positions {shape['n_positions']}")
    return dict(shape)


def save_model(
    folder: str | Path,
    model: GPT2LMHeadModel,
    tokenizer: Tokenizer,
    *,
    facts: Mapping[str, Any],
) -> None:
    """Write a model folder; one of that name is replaced when the new one is complete.

    Args:
        folder: where; its parents are made.
        model: the bare model, not one wrapped by DistributedDataParallel.
        tokenizer: its vocabulary has as many tokens as the model has rows.
        facts: what the manifest shall tell about the model, JSON values.

    Raises:
        FileExistsError: there is something of that name that is not a model folder.
        OSError: the disk is full, or the place cannot be written.
    """
    config, marks = model.config, tokenizer.marks
    if len(tokenizer) != config.vocab_size:
        raise ValueError(f"the vocabulary has {len(tokenizer)} tokens, the model {config.vocab_size}")
    tied = model.lm_head.weight is model.transformer.wte.weight
    state = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if name != _HEAD or not tied
    }
    ids = {"bos_token_id": marks.begin, "eos_token_id": marks.end, "pad_token_id": marks.padding}
    saved = config.to_diff_dict() | {
        "architectures": ["GPT2LMHeadModel"],
        "n_ctx": getattr(config, "n_ctx", config.n_positions),
        "dtype": str(state[_EMBEDDING].dtype).removeprefix("torch."),
        "tie_word_embeddings": tied,
        **ids,
    }
    with atomic_write_folder(folder) as new:
        with disk_errors(folder):
            save_file(state, str(new / WEIGHTS), metadata={"format": "pt"})
        write_json(new / CONFIG, dict(sorted(saved.items())))
        generation = {"suppress_tokens": list(marks.never_produced)}
        generation["transformers_version"] = saved["transformers_version"]
        write_json(new / "generation_config.json", ids | generation)
        vocabulary = write_tokenizer_files(new, tokenizer, n_ctx=saved["n_ctx"])
        write_json(
            new / MANIFEST,
            {
                "format": FORMAT,
                "vocabulary": {
                    "file": vocabulary,
                    "sha256": sha256_of(new / vocabulary),
                    "size": len(tokenizer),
                },
                "files": {WEIGHTS: {"bytes": (new / WEIGHTS).stat().st_size, "sha256": sha256_of(new / WEIGHTS)}},
                "tokenizer": tokenizer.kind,
                "compat": tokenizer.compat,
                "facts": dict(facts),
            },
        )


def load_model(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    vocab_file: str | Path | None = None,
    document_marks: tuple[str, str] | None = None,
) -> tuple[GPT2LMHeadModel, Tokenizer]:
    """Read a model folder, of ours, of GPT2-Chinese or of the hub, in evaluation mode.

    Args:
        folder: with `config.json` and `model.safetensors` or `pytorch_model.bin`, in one file or several.
        device: where the model goes.
        dtype: of its weights.
        vocab_file: the vocabulary, for folders that have none, as GPT2-Chinese's.
        document_marks: the tokens that begin and end a document, instead of those that the folder tells.

    A vocabulary with fewer tokens than the model has rows (GPT2-Chinese trains 50,005 whatever the vocabulary) cuts
    the rows that no token uses. That and the old causal masks left out are told on stderr.

    Raises:
        FileNotFoundError: the folder, or one of its files, is not there.
        ValueError: a file is damaged, does not fit the others, or is not a GPT-2; the message names it.
    """
    from transformers import GPT2LMHeadModel

    shape, state, tokenizer = _read_model_files(Path(folder), vocab_file, document_marks)
    with torch.device("meta"):  # no time is spent on random weights
        model = GPT2LMHeadModel(_as_config(shape, tokenizer.marks))
    state = {name: tensor.to(device=device, dtype=dtype, copy=True) for name, tensor in state.items()}
    tied = _HEAD not in state
    state.setdefault(_HEAD, state[_EMBEDDING])
    model.load_state_dict(state, assign=True)
    if tied:
        model.tie_weights()
    return model.eval(), tokenizer


def load_weights(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    vocab_file: str | Path | None = None,
    document_marks: tuple[str, str] | None = None,
) -> tuple[Any, Tokenizer]:
    """Read a model folder for decoding, without transformers, whose import takes longer than all the rest.

    Arguments and errors are those of `load_model`. What it gives for a model has its weights and what of its
    configuration decides the forward pass under the same names, in float32, and cannot be called.
    """
    shape, state, tokenizer = _read_model_files(Path(folder), vocab_file, document_marks)
    shape = _DEFAULTS | shape
    if shape["activation_function"] not in _COMPILED_ACTIVATIONS:
        # transformers has the function
        return load_model(folder, device=device, vocab_file=vocab_file, document_marks=document_marks)
    state = {name: tensor.to(device=device, dtype=torch.float32) for name, tensor in state.items()}
    state.setdefault(_HEAD, state[_EMBEDDING])
    model = SimpleNamespace(
        config=SimpleNamespace(**shape | {"add_cross_attention": False}),
        device=torch.device(device),
        named_parameters=lambda: iter(state.items()),
    )
    model.float = lambda: model
    for name, tensor in state.items():
        *path, last = name.split(".")
        module = model
        for part in path:
            if not hasattr(module, part):
                setattr(module, part, SimpleNamespace())
            module = getattr(module, part)
        setattr(module, last, tensor)
    model.transformer.h = [getattr(model.transformer.h, str(number)) for number in range(shape["n_layer"])]
    for number, block in enumerate(model.transformer.h):
        block.attn.scaling = (shape["n_embd"] // shape["n_head"]) ** -0.5 if shape["scale_attn_weights"] else 1.0
        if shape["scale_attn_by_inverse_layer_idx"]:
            block.attn.scaling /= number + 1
        block.mlp.act = torch.relu
    return model, tokenizer


def _read_model_files(
    folder: Path, vocab_file: str | Path | None, document_marks: tuple[str, str] | None
) -> tuple[dict[str, Any], dict[str, torch.Tensor], Tokenizer]:
    """The shape, the weights (the head only where it is not the embedding), and the tokenizer, which fit each other."""
    config_file = find_config(folder)
    tokenizer = _read_tokenizer(folder, vocab_file, document_marks)
    shape = _read_shape(config_file, vocab_size=1)

    def check(shapes: Shapes) -> None:
        """Compare what a file has with the configuration, as far as that says it: the vocabulary decides the rest."""
        bare = {_bare(name): value for name, value in _weight_shapes(shape | {"tie_word_embeddings": True}).items()}
        del bare["wte.weight"]  # the rows of the vocabulary
        wrong = {name: value for name, value in shapes.items() if bare.get(_bare(name), value) != value}
        if wrong:
            _check_shapes(folder, {name: bare[_bare(name)] for name in wrong}, wrong)

    stated = StatedHashes(folder)
    state = _read_weights(folder, check, stated)
    embedding = state[_EMBEDDING]
    if embedding.dim() != 2:
        raise ValueError(f"{folder}: {_EMBEDDING} is {list(embedding.shape)} and should be a matrix; {_MEND}")
    shape["vocab_size"] = len(embedding)
    if len(tokenizer) > len(embedding):
        raise ValueError(
            f"the vocabulary has {len(tokenizer)} tokens, but {folder} knows only {len(embedding)}; "
            "give the vocabulary that it was trained with"
        )
    if len(tokenizer) < len(embedding):
        _note(f"{folder} has {len(embedding)} rows for {len(tokenizer)} tokens: the other rows are cut off")
        shape["vocab_size"] = len(tokenizer)
        for name in {_EMBEDDING, _HEAD} & state.keys():
            state[name] = state[name][: len(tokenizer)]
    shape["tie_word_embeddings"] = _HEAD not in state
    _check_shapes(folder, _weight_shapes(shape), {name: tuple(tensor.shape) for name, tensor in state.items()})
    stated.compare()
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise ValueError(f"the weights in {folder}: {name} is of {tensor.dtype}, not of fractions; {_MEND}")
    return shape, state, tokenizer


def _bare(name: str) -> str:
    return name.removeprefix("transformer.")


def _weight_shapes(shape: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The names of a GPT-2's weights, save the head, and their shapes."""
    width = shape["n_embd"]
    inner = shape.get("n_inner") or 4 * width

    def pair(name: str, *size: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": size, f"{name}.bias": size[-1:]}

    shapes: dict[str, tuple[int, ...]] = {_EMBEDDING: (shape["vocab_size"], width)}
    if not shape["tie_word_embeddings"]:
        shapes[_HEAD] = (shape["vocab_size"], width)
    shapes["transformer.wpe.weight"] = (shape["n_positions"], width)
    for number in range(shape["n_layer"]):
        block = f"transformer.h.{number}"
        shapes |= pair(f"{block}.ln_1", width) | pair(f"{block}.ln_2", width)
        shapes |= pair(f"{block}.attn.c_attn", width, 3 * width) | pair(f"{block}.attn.c_proj", width, width)
        shapes |= pair(f"{block}.mlp.c_fc", width, inner) | pair(f"{block}.mlp.c_proj", inner, width)
    return shapes | pair("transformer.ln_f", width)


def find_config(folder: str | Path) -> Path:
    """The configuration of a model folder.

    Raises:
        FileNotFoundError: there is no such folder, or it is not a model folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no model folder {folder}; train.py writes one, model/final_model by default")
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} is not a model folder: it has no {CONFIG}")
    return folder / CONFIG


def _read_tokenizer(folder: Path, vocab_file: str | Path | None, document_marks: tuple[str, str] | None) -> Tokenizer:
    """Read the folder's tokenizer, or that of the vocabulary given; one that tells nothing is the reference's."""
    own, manifest = vocabulary_of_folder(folder), folder / MANIFEST
    facts = read_json(manifest) if manifest.is_file() else {}
    if not isinstance(facts, dict):
        raise ValueError(f"{manifest}: a manifest is a JSON object, this is a {type(facts).__name__}")
    described = facts.get("vocabulary")
    described = described if isinstance(described, dict) else {}
    if own is not None and described.get("file") == own.name and described.get("sha256") != sha256_of(own):
        raise ValueError(
            f"{own} is not the file that {manifest} describes: it has been changed since train.py wrote it; "
            "put the old one back, or train again"
        )
    if vocab_file is not None and own is not None and not _same_file(own, Path(vocab_file)):
        raise ValueError(
            f"{vocab_file} and {own} disagree: the model was trained with the latter; "
            "leave out --vocab_file, or name a model of the other vocabulary"
        )
    if own is None and vocab_file is not None:
        spec = read_tokenizer(vocab_file, compat=True)
    else:
        spec = read_tokenizer(folder)
    return (spec if document_marks is None else spec.with_marks(*document_marks)).build()


def _same_file(one: Path, other: Path) -> bool:
    """Whether two vocabulary files have the same tokens, if they differ in the ends of their lines."""
    if not other.is_file():
        raise FileNotFoundError(f"there is no vocabulary {other}; name the file with --vocab_file")
    return one.read_bytes().split() == other.read_bytes().split()


def write_tokenizer_files(folder: Path, tokenizer: Tokenizer, *, n_ctx: int) -> str:
    """Write what other programs need of the tokenizer into a model folder; gives the name of the vocabulary's file."""
    names = {
        key: None if id_ is None else tokenizer.vocabulary[id_]
        for key, id_ in (
            ("bos_token", tokenizer.marks.begin),
            ("eos_token", tokenizer.marks.end),
            ("pad_token", tokenizer.marks.padding),
            ("unk_token", tokenizer.marks.unknown),
        )
    }
    names = {key: name for key, name in names.items() if name is not None}
    common = {
        "model_max_length": n_ctx,
        "padding_side": "left",  # to complete a batch, every text has to end where the new tokens begin
    }
    if isinstance(tokenizer, HasDefinition):
        (folder / TOKENIZER_JSON).write_text(tokenizer.definition, encoding="utf-8", newline="\n")
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        write_json(folder / TOKENIZER_CONFIG, names | common | settings)
        return TOKENIZER_JSON
    write_lines(folder / VOCABULARY, tokenizer.vocabulary)
    for name in TOKENIZER_CODE:
        shutil.copyfile(Path(__file__).parent / "text" / name, folder / name)
    if isinstance(tokenizer, CharTokenizer):
        names |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
        names = {key: name for key, name in names.items() if name in tokenizer.vocabulary}
        write_json(folder / "special_tokens_map.json", names)
        # transformers reads such a folder without its code too, with its own BertTokenizer.
        settings = {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": tokenizer.lowercase,
            "compat": tokenizer.compat,
        }
        settings |= _tokenizer_code("GPT2ChineseCharTokenizer")
        write_json(folder / TOKENIZER_CONFIG, names | common | settings)
        return VOCABULARY
    assert isinstance(tokenizer, WordTokenizer)
    settings = {
        "compat": tokenizer.compat,
        "rules": tokenizer.rules.number,
        "tokenizer_class": "GPT2ChineseTokenizer",
    }
    write_json(folder / TOKENIZER_CONFIG, names | common | settings | _tokenizer_code("GPT2ChineseTokenizer"))
    return VOCABULARY


def _tokenizer_code(name: str) -> dict[str, Any]:
    """What names the class of a tokenizer whose code lies in the folder."""
    return {"auto_map": {"AutoTokenizer": [f"tokenization_gpt2_chinese.{name}", None]}}


def _read_weights(folder: Path, check: Callable[[Shapes], None], stated: StatedHashes) -> dict[str, torch.Tensor]:
    """Read the weights under today's names, without the old causal masks; the head only if it is another matrix."""
    path, state = _read_weights_files(folder, check, stated)
    weights: dict[str, torch.Tensor] = {}
    masks = 0
    for name, tensor in state.items():
        bare = name.removeprefix("transformer.")
        if _MASK_BUFFER.fullmatch(bare):
            masks += 1
        elif name == _HEAD:
            weights[_HEAD] = tensor
        else:
            weights["transformer." + bare] = tensor
    if masks:
        _note(f"{path}: {masks} causal masks of an old transformers are not needed and left out")
    if _EMBEDDING not in weights:
        raise ValueError(f"{path} has no {_EMBEDDING}: these are not the weights of a GPT-2")
    if _HEAD in weights and torch.equal(weights[_HEAD], weights[_EMBEDDING]):
        del weights[_HEAD]
    return weights


def _read_weights_files(
    folder: Path, check: Callable[[Shapes], None], stated: StatedHashes
) -> tuple[Path, dict[str, torch.Tensor]]:
    """The tensors of a folder by name, of one file or of the shards that an index names; and the file to speak of."""
    for name in (WEIGHTS, WEIGHTS + ".index.json", OLD_WEIGHTS, OLD_WEIGHTS + ".index.json"):
        path = folder / name
        if not path.is_file():
            continue
        if path.suffix != ".json":
            return path, read_weights_file(path, check=check, digest=stated.digest_of(name))
        index = read_json(path)
        shards = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise ValueError(f"{path} has no weight_map, which says in which file each weight is; copy it again")
        state: dict[str, torch.Tensor] = {}
        for shard in sorted(set(shards.values())):
            if Path(shard).name != shard or not (folder / shard).is_file():
                raise FileNotFoundError(f"{path} names {shard}, which is not in {folder}; copy it there")
            state |= read_weights_file(folder / shard, check=check, digest=stated.digest_of(shard))
        return path, state
    raise FileNotFoundError(f"{folder} has no weights: neither {WEIGHTS} nor {OLD_WEIGHTS}, nor an index of shards")


class StatedHashes:
    """The SHA-256 that the manifest of a folder states of its weights, and those of the bytes that were read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        manifest = folder / MANIFEST
        stated = read_json(manifest) if manifest.is_file() else {}
        self._stated = stated["files"] if has_shape(stated, {"files": dict}) else {}
        self._digests: dict[str, Any] = {}

    def digest_of(self, name: str) -> Any:
        """What is to be told the bytes of a file; None where the manifest states no hash."""
        stated = self._stated.get(name)
        if (
            not isinstance(stated, dict)
            or not isinstance(stated.get("sha256"), str)
            or not name.endswith("safetensors")
        ):
            return None
        return self._digests.setdefault(name, hashlib.sha256())

    def compare(self) -> None:
        """Refuse files that are not those that were written.

        Raises:
            ValueError: a file has been changed, or has been read while it was written.
        """
        for name, digest in self._digests.items():
            if digest.hexdigest() != self._stated[name]["sha256"]:
                raise ValueError(
                    f"{self._folder / name} is not the file that {self._folder / MANIFEST} describes: it is damaged or "
                    f"another program has written it; copy it again, or delete {MANIFEST} if it is what you want"
                )


def _check_shapes(folder: Path, shapes: Shapes, found: Shapes) -> None:
    """Compare names and shapes with those that there should be, and name what does not fit."""
    problems = [f"{name} is missing" for name in sorted(shapes.keys() - found.keys())]
    problems += [f"{name} is not part of the model" for name in sorted(found.keys() - shapes.keys())]
    problems += [
        f"{name} is {list(found[name])} and should be {list(shapes[name])}"
        for name in sorted(shapes.keys() & found.keys())
        if shapes[name] != found[name]
    ]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"the weights in {folder} do not fit its {CONFIG}: {'; '.join(problems[:3])}{more}")


@contextmanager
def atomic_write_folder(folder: str | Path) -> Iterator[Path]:
    """Give an empty folder that takes the place of `folder` when the block ends without an error.

    What a killed run has left half written is written over.

    Raises:
        FileExistsError: `folder` is a file, or holds files but no `config.json` (it is not one of ours to replace).
    """
    folder = Path(folder)
    new, old = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():
        os.replace(old, folder)  # the run was killed between the two renames below
    check_replaceable(folder)
    shutil.rmtree(new, ignore_errors=True)
    make_folder(folder.parent)
    new.mkdir()
    try:
        yield new
        for path in new.iterdir():
            flush_file(path)
        flush_folder(new)
        if folder.exists():
            # A folder that is not empty cannot be replaced in one step; between the two there is none, never half.
            os.replace(folder, old)
        try:
            os.replace(new, folder)
        except OSError:
            if old.exists():
                os.replace(old, folder)
            raise
        flush_folder(folder.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def check_replaceable(folder: str | Path) -> None:
    """Refuse to replace what is not a model folder; train.py asks before it spends hours.

    Raises:
        FileExistsError: `folder` is a file, or holds files but no `config.json`.
    """
    folder = Path(folder)
    if not folder.exists():
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / CONFIG).is_file()):
        raise FileExistsError(f"{folder} is there already and is not a model folder; move it away, or save elsewhere")


def _note(message: str) -> None:
    remark(f"note: {message}", file=sys.stderr)
