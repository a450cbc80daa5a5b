"""A model's layers under another vocabulary: which rows are kept, composed and drawn."""

from __future__ import annotations

import pytest
import torch
from layouts import write_layout

from gpt2_chinese.artifacts import write_json, write_lines
from gpt2_chinese.model_folder import load_model
from gpt2_chinese.text.tokenizers import read_tokenizer
from gpt2_chinese.text.vocabulary import SPECIAL_TOKENS
from gpt2_chinese.training.vocabulary_transfer import transfer_vocabulary

pytest.importorskip("tokenizers")
NEW = [*SPECIAL_TOKENS, "我们", "高血压", "血", "龘", "龘靐"]


def new_tokenizer(tmp_path):
    write_lines(tmp_path / "new.txt", NEW)
    return read_tokenizer(tmp_path / "new.txt", kind="word").build()


@pytest.mark.parametrize("untied", [False, True])
def test_rows_are_found_composed_and_new(tmp_path, untied):
    model, old = load_model(write_layout(tmp_path / "uer", "uer", untied=untied))
    before = {"wte": model.transformer.wte.weight.detach().clone(), "head": model.lm_head.weight.detach().clone()}
    layers = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".h." in name}
    new = new_tokenizer(tmp_path)
    state = torch.get_rng_state()
    report = transfer_vocabulary(model, old, new, seed=1)
    assert torch.equal(torch.get_rng_state(), state)

    ids = {token: id_ for id_, token in enumerate(old.vocabulary)}
    row = {token: id_ for id_, token in enumerate(NEW)}
    for name, rows in (("wte", model.transformer.wte.weight.detach()), ("head", model.lm_head.weight.detach())):
        assert rows.shape == (len(NEW), before[name].shape[1])
        # found: by text, and by what a mark is for: [CLS] begins a document there and [SEP] ends it
        assert torch.equal(rows[row["血"]], before[name][ids["血"]])
        assert torch.equal(rows[row["[MASK]"]], before[name][old.marks.begin])
        assert torch.equal(rows[row["[CLS]"]], before[name][old.marks.end])
        # composed: the direction of the mean, the length that rows have
        mean = before[name][[ids["高"], ids["血"], ids["压"]]].mean(0)
        composed = rows[row["高血压"]]
        assert torch.cosine_similarity(composed, mean, dim=0) > 0.9999
        assert float(composed.norm()) == pytest.approx(float(before[name].norm(dim=1).median()), rel=1e-5)
        # new: as spread as the old rows
        assert float(rows[row["龘"]].std()) == pytest.approx(float(before[name].std()), rel=0.5)
    assert (model.lm_head.weight is model.transformer.wte.weight) is not untied
    # new are the two rare characters and the line break, which a published vocabulary does not have
    assert (report.found, report.composed, report.new) == (len(NEW) - 5, 2, 3)
    assert all(torch.equal(tensor, layers[name]) for name, tensor in model.state_dict().items() if name in layers)
    assert (model.config.vocab_size, model.config.bos_token_id) == (len(NEW), new.marks.begin)


def test_train_puts_a_new_vocabulary_under_old_layers_and_says_how_many_rows_it_found(
    script, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    write_layout(tmp_path / "published", "uer")
    write_lines("mine.txt", [*NEW, *"高压我们多喝水吃饭"])
    write_json("train.json", ["我们多喝水吃饭高血压" * 8] * 12)
    flags = ["--raw_data_path", "train.json", "--vocab_filename", "mine.txt", "--num_pieces", "1", "--min_length", "0"]
    script("make-tokenized").main([*flags, "--workers", "1"])
    flags = ["--device", "cpu", "--precision", "fp32", "--epochs", "1", "--stride", "16", "--batch_size", "2"]
    capsys.readouterr()
    assert script("train").main([*flags, "--pretrained_model", "published", "--vocab_file", "mine.txt"]) == 0
    said = capsys.readouterr().out
    assert "rows found" in said and "composed" in said and "new" in said
    model, tokenizer = load_model(tmp_path / "model/final_model")
    assert tokenizer.vocabulary[:10] == NEW and model.transformer.wte.weight.shape[0] == len(tokenizer)
