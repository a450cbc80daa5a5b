"""Published layouts go through every stage: complete, serve, train on, resume, measure, save, and load elsewhere."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from layouts import CHARACTERS, LAYOUTS, write_layout
from transformers import AutoModelForCausalLM, AutoTokenizer, BertTokenizer
from whole_tokens import greedy_without, partial_tokens

from gpt2_chinese.artifacts import write_json
from gpt2_chinese.decoding.engine import Engine
from gpt2_chinese.model_folder import load_model, load_weights, save_model
from gpt2_chinese.text.tokenizers import Tokenizer

pytest.importorskip("tokenizers")
MARKS = {
    "book": ("[MASK]", "[CLS]"),
    "gpt2_chinese_char": ("[MASK]", "[CLS]"),
    "guwen_order": ("[MASK]", "[CLS]"),
    "uer": ("[CLS]", "[SEP]"),
    "bpe": ("<|endoftext|>", "<|endoftext|>"),
}


def random_texts(count: int, longest: int = 8) -> list[str]:
    source = random.Random(3)
    return ["".join(source.choices(CHARACTERS, k=source.randint(1, longest))) for _ in range(count)]


@pytest.fixture(scope="module", params=LAYOUTS)
def folder(request, tmp_path_factory) -> Path:
    return write_layout(tmp_path_factory.mktemp("published") / request.param, request.param)


def greedy_elsewhere(folder: Path, prompt: list[int], length: int, tokenizer: Tokenizer) -> list[int]:
    end, never = tokenizer.marks.end, [*tokenizer.marks.never_produced, *partial_tokens(tokenizer)]
    model = AutoModelForCausalLM.from_pretrained(folder)
    output = model.generate(
        torch.tensor([prompt]), max_new_tokens=length, do_sample=False, eos_token_id=end, pad_token_id=end,
        suppress_tokens=never, bos_token_id=None,
    )[0, len(prompt) :].tolist()  # fmt: skip
    return output[: output.index(end)] if end in output else output


def test_a_folder_tells_what_marks_a_document(folder):
    _, tokenizer = load_weights(folder)
    marks = tokenizer.marks
    assert (tokenizer.vocabulary[marks.begin], tokenizer.vocabulary[marks.end]) == MARKS[folder.name]


def test_greedy_completions_are_those_of_transformers(folder):
    model, tokenizer = load_weights(folder)
    greedy = greedy_without(partial_tokens(tokenizer))
    if folder.name == "uer":
        bert = BertTokenizer(str(folder / "vocab.txt"))
    texts = random_texts(50)
    with Engine(model, tokenizer, max_num_seqs=16, precision="fp32") as engine:
        prompts = [engine.prompt(text, 12) for text in texts]
        requests = [engine.submit(prompt, samples=1, length=12, sampling_params=greedy) for prompt in prompts]
        for text, prompt, request in zip(texts, prompts, requests, strict=True):
            if folder.name == "uer":  # a text begins with [CLS]; what BertTokenizer adds behind it is left out
                assert list(prompt.ids) == bert(text)["input_ids"][:-1]
            completion = request.future.result(60)[0]
            expected = greedy_elsewhere(folder, list(prompt.ids), 12, tokenizer)
            assert list(completion.ids) == expected
            assert completion.text.startswith(text)


def test_text_has_no_spaces_between_chinese_characters(folder):
    with Engine(*load_weights(folder), max_num_seqs=2, precision="fp32") as engine:
        for text in engine.complete("高血压", samples=4, length=15, seed=1):
            chinese = [c for c in text if "一" <= c <= "鿿"]
            assert len(chinese) >= 3
            assert not any(
                text[i] == " " and text[i - 1] in chinese and text[i + 1 : i + 2] in chinese for i in range(len(text))
            )


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_weights_in_shards_and_output_layers_of_their_own_are_read_and_saved(tmp_path, untied, sharded):
    folder = write_layout(tmp_path / "uer", "uer", untied=untied, sharded=sharded)
    model, tokenizer = load_model(folder)
    assert (model.lm_head.weight is model.transformer.wte.weight) is not untied
    ids = torch.tensor([[101, 105, 107]])
    expected = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    assert torch.equal(model(ids).logits, expected)
    save_model(tmp_path / "saved", model, tokenizer, facts={})
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")(ids).logits, expected)
    for precision in (None, "fp32"):
        with Engine(*load_weights(tmp_path / "saved"), max_num_seqs=2, precision=precision) as engine:
            prompt = engine.prompt_from_ids([101, 105, 107], 5)
            greedy = greedy_without(partial_tokens(tokenizer))
            got = engine.submit(prompt, samples=1, length=5, sampling_params=greedy).future.result(60)[0].ids
        assert list(got) == greedy_elsewhere(folder, [101, 105, 107], 5, tokenizer)


@pytest.fixture
def corpus(folder, script, tmp_path, monkeypatch) -> Path:
    """Pieces made with the folder's tokenizer, in the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "published")
    texts = ["".join(random.Random(n).choices(CHARACTERS, k=40)) + "\nabc 12" for n in range(30)]
    write_json("train.json", texts)
    flags = ["--raw_data_path", "train.json", "--min_length", "0", "--num_pieces", "2", "--workers", "1"]
    script("make-tokenized").main([*flags, "--vocab_filename", "published"])
    return tmp_path


def train(script, *flags: str) -> int:
    argv = ["--device", "cpu", "--precision", "fp32", "--batch_size", "4", "--stride", "20", "--lr", "1e-3"]
    return int(script("train").main([*argv, "--pretrained_model", "published", *flags]))


def test_a_published_model_is_trained_on_resumed_measured_and_loads_elsewhere(corpus, folder, script, capsys):
    flags = ["--epochs", "2", "--max_steps", "8", "--save_steps", "5", "--val_fraction", "0.1"]
    assert train(script, *flags) == 0
    printed = capsys.readouterr().out
    assert "rows found" not in printed, "the vocabulary is the model's own"
    whole = AutoModelForCausalLM.from_pretrained("model/final_model")
    shutil.rmtree("model/final_model")
    shutil.rmtree("model/checkpoints/step_8")
    assert (
        train(script, "--epochs", "2", "--max_steps", "8", "--save_steps", "5", "--val_fraction", "0.1", "--resume")
        == 0
    )
    again = AutoModelForCausalLM.from_pretrained("model/final_model")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))

    capsys.readouterr()
    argv = ["--eval_only", "--pretrained_model", "model/final_model", "--device", "cpu", "--precision", "fp32"]
    assert script("train").main(argv) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["bits_per_character"] > 0

    # what comes out keeps its marks, and other programs load it
    model, tokenizer = load_weights("model/final_model")
    begin, end = MARKS[folder.name]
    assert (tokenizer.vocabulary[tokenizer.marks.begin], tokenizer.vocabulary[tokenizer.marks.end]) == (begin, end)
    elsewhere = AutoTokenizer.from_pretrained("model/final_model", trust_remote_code=folder.name == "book")
    assert (elsewhere.bos_token, elsewhere.eos_token) == (begin, end)
    text = "我们多喝水 abc"
    if folder.name in ("uer", "bpe", "book"):
        assert elsewhere.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    with Engine(model, tokenizer, max_num_seqs=2, precision="fp32") as engine:
        prompt = engine.prompt("我们", 8)
        greedy = greedy_without(partial_tokens(tokenizer))
        got = engine.submit(prompt, samples=1, length=8, sampling_params=greedy).future.result(60)[0].ids
    assert list(got) == greedy_elsewhere(Path("model/final_model"), list(prompt.ids), 8, tokenizer)


@pytest.mark.parametrize("layout", ["uer", "bpe"])
def test_generate_takes_a_published_folder_as_it_is(script, tmp_path, capsys, layout):
    folder = write_layout(tmp_path / "m", layout)
    flags = ["--model_path", str(folder), "--prefix", "我们", "--nsamples", "2", "--length", "8", "--seed", "1"]
    assert script("generate").main([*flags, "--device", "cpu"]) in (0, None)
    assert capsys.readouterr().out.count("我们") >= 2


def test_document_marks_override_those_of_the_folder(tmp_path):
    folder = write_layout(tmp_path / "m", "uer")
    _, tokenizer = load_weights(folder, document_marks=("[MASK]", "[CLS]"))
    assert (tokenizer.marks.begin, tokenizer.marks.end) == (103, 101)
    with pytest.raises(ValueError, match=r"has no \[NO\], which begins"):
        load_weights(folder, document_marks=("[NO]", "[CLS]"))


def no_vocabulary(folder: Path) -> None:
    (folder / "vocab.txt").unlink()


def smaller_embedding(folder: Path) -> None:
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    state["transformer.wte.weight"] = state["lm_head.weight"] = state["transformer.wte.weight"][:50].clone()
    torch.save(state, folder / "pytorch_model.bin")


class Code:
    def __reduce__(self):
        return (print, ("code of the folder ran",))


def pickle_with_code(folder: Path) -> None:
    torch.save({"transformer.wte.weight": Code()}, folder / "pytorch_model.bin")


def tokenizer_json_of_wordpiece(folder: Path) -> None:
    (folder / "vocab.txt").unlink()
    (folder / "tokenizer.json").write_text('{"model": {"type": "WordPiece"}}', encoding="utf-8")


def no_cls(folder: Path) -> None:
    text = (folder / "vocab.txt").read_text(encoding="utf-8")
    (folder / "vocab.txt").write_text(text.replace("[CLS]", "[XLS]"), encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_vocabulary, r"has no vocab\.txt, tokenizer\.json .*--vocab_file"),
        (smaller_embedding, r"the vocabulary has \d+ tokens, but .* only 50; give the vocabulary"),
        (pickle_with_code, r"pytorch_model\.bin is damaged or no weights file: .*copy it again"),
        (tokenizer_json_of_wordpiece, r"tokenizer\.json is a WordPiece tokenizer, .*--tokenizer char"),
        (no_cls, r"vocab\.txt has no \[CLS\], which begins a document.*--document_marks"),
    ],
)
def test_a_bad_folder_is_named_with_the_mend(tmp_path, capsys, spoil, message):
    folder = write_layout(tmp_path / "m", "uer")
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_weights(folder)
    assert "code of the folder ran" not in capsys.readouterr().out
