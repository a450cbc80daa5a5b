"""train.py: its numbers against the reference and transformers, and what a person meets."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from book_order import MARKS
from hypothesis import given
from hypothesis import strategies as st
from small_run import N_CTX, assert_same_weights, run, scalars, weights, write_corpus, write_shape
from transformers import GPT2LMHeadModel, get_linear_schedule_with_warmup

from gpt2_chinese.artifacts import write_lines
from gpt2_chinese.model_folder import load_model, read_config, save_model
from gpt2_chinese.precision import Precision, _cpu_bf16_gain, choose_devices, choose_precision
from gpt2_chinese.text.vocabulary import SPECIAL_TOKENS, read_vocabulary
from gpt2_chinese.text.word_tokenizer import WordTokenizer
from gpt2_chinese.training import blocks, trainable
from gpt2_chinese.training import loss as window_loss
from gpt2_chinese.training.estimates import will_overfit
from gpt2_chinese.training.loss import WindowLoss, pad_vocabulary, unpadded
from gpt2_chinese.training.optimizers import learning_rate_factor, make_optimizer
from gpt2_chinese.training.token_cache import read_pieces
from gpt2_chinese.training.windows import MicroBatch, share_of_rank, window_batch, window_starts

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[3]


def small_model(**changes: object) -> GPT2LMHeadModel:
    write_shape(**changes)
    torch.manual_seed(3)
    return GPT2LMHeadModel(read_config("shape.json", vocab_size=35))


# --- the numbers


def test_losses_and_gradient_norms_are_the_reference_s(script, reference, tmp_path):
    train = script("train")
    trace = json.loads((reference / "training_trace.json").read_text(encoding="utf-8"))
    n_ctx, batch_size = trace["n_ctx"], trace["batch_size"]
    shutil.copytree(reference / "tokenized_full", tmp_path / "tokenized")
    corpus = read_pieces(tmp_path / "tokenized", marks=MARKS, vocab_size=4425)
    tokens = corpus.tokens
    starts = window_starts(corpus.piece_lengths[:1], n_ctx, trace["stride"])
    model, _ = load_model(reference / "checkpoint", vocab_file=reference / "vocab_user.txt")
    window_loss = WindowLoss(model.train())
    optimizer = make_optimizer(model, trace["lr"])
    precision = Precision("fp32", torch.device("cpu"))
    losses, grad_norms, learning_rates = [], [], []
    for step in range(30):
        windows = starts[step * batch_size : (step + 1) * batch_size]
        factor = learning_rate_factor(step, warmup_steps=trace["warmup_steps"], total_steps=trace["t_total"])
        for group in optimizer.param_groups:
            group["lr"] = trace["lr"] * factor
            group["eps"] = 1e-6 / (1 - 0.999 ** (step + 1)) ** 0.5  # the reference adds eps before the correction
        update = train.train_update(
            window_loss,
            optimizer,
            [MicroBatch(window_batch(tokens, windows, n_ctx))],
            predicted_tokens=len(windows) * (n_ctx - 1),
            precision=precision,
            max_grad_norm=trace["max_grad_norm"],
        )
        losses.append(update.loss.item())
        grad_norms.append(update.grad_norm.item())
        learning_rates.append(optimizer.param_groups[0]["lr"])
    np.testing.assert_allclose(losses, trace["losses"], rtol=1e-5)
    np.testing.assert_allclose(grad_norms, trace["grad_norms"], rtol=1e-5)
    np.testing.assert_allclose(learning_rates, trace["lr_used"], rtol=1e-12)


def test_loss_and_gradients_are_those_transformers_computes_with_its_own_mask(train):
    ours, theirs = small_model(), small_model()
    theirs.set_attn_implementation("eager")
    input_ids = torch.randint(5, 35, (3, N_CTX), generator=torch.Generator().manual_seed(0))
    loss = WindowLoss(ours)(input_ids) / (3 * (N_CTX - 1))
    expected = theirs(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), labels=input_ids).loss
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("how", ["padded", "recompute"])
def test_padding_and_recomputing_change_no_figure(train, how):
    """Rows without a token get no gradient, and what is computed twice is the same, dropout and all."""
    changes = {} if how == "padded" else {"resid_pdrop": 0.2}
    plain, other = small_model(**changes), small_model(**changes)
    rows = pad_vocabulary(other) if how == "padded" else 35
    assert other.lm_head.weight is other.transformer.wte.weight and rows == 35
    input_ids = torch.randint(5, 35, (3, N_CTX), generator=torch.Generator().manual_seed(0))
    norms = []
    for model, module in (
        (plain, WindowLoss(plain)),
        (other, WindowLoss(other, rows=rows, recompute=how == "recompute")),
    ):
        torch.manual_seed(1)
        loss = module(input_ids)
        loss.backward()
        norms.append((loss.item(), torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()))
    np.testing.assert_allclose(norms[1], norms[0], rtol=1e-6)
    if how == "padded":
        assert other.transformer.wte.weight.shape == (64, 8)
        assert not other.transformer.wte.weight.grad[35:].any()


def test_a_padded_model_is_saved_without_its_padding(train):
    model = small_model()
    expected = model.transformer.wte.weight.detach().clone()
    rows = pad_vocabulary(model)
    padded = model.transformer.wte.weight
    with unpadded(model, rows):
        save_model("saved", model, WordTokenizer(read_vocabulary("vocab/vocab_user.txt")), facts={})
    assert model.transformer.wte.weight is padded and model.lm_head.weight is padded
    assert torch.equal(load_model("saved")[0].transformer.wte.weight, expected)


def test_padding_is_right_in_a_whole_run(train, monkeypatch):
    run(train, epochs=2, output_dir="plain", writer_dir="plain/tb")
    monkeypatch.setattr(trainable, "PADDED_DEVICES", {"cpu"})
    run(train, "--val_fraction", "0.3", epochs=2, output_dir="measured", writer_dir="measured/tb")
    run(train, epochs=2)
    assert_same_weights(weights("plain/final_model"), weights(), rtol=1e-5, atol=1e-7)


def test_no_attention_mask_is_ever_built(train, monkeypatch):
    seen = []
    original = window_loss.causal_attention
    monkeypatch.setattr(
        window_loss, "causal_attention", lambda *args, **kwargs: (seen.append(args[4]), original(*args, **kwargs))[1]
    )
    WindowLoss(small_model(activation_function="relu"))(torch.full((2, N_CTX), 5))
    assert seen == [None, None]


def test_dropout_is_on_in_training_and_reaches_the_attention_that_is_written_out(train, monkeypatch):
    seen = []

    class Spy(blocks.Attention):
        def __init__(self, *given):
            seen.append(given[-1].threshold / 2**32)
            super().__init__(*given)

    monkeypatch.setattr(blocks, "Attention", Spy)
    write_shape(attn_pdrop=0.25)
    run(train, epochs=1, batch_size=64)
    assert set(seen) == {0.25}


def test_dropout_is_on_in_training_and_reaches_the_attention(train, monkeypatch):
    seen = []
    original = window_loss.causal_attention

    def spy(*args, dropout, **kwargs):
        seen.append(dropout)
        return original(*args, dropout=dropout, **kwargs)

    monkeypatch.setattr(window_loss, "causal_attention", spy)
    write_shape(attn_pdrop=0.25, activation_function="relu")
    run(train, epochs=1, batch_size=64)
    assert set(seen) == {0.25}


@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 10), (5, 40), (10, 10), (1, 2)])
def test_the_schedule_is_transformers_linear_one(train, warmup, total):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = get_linear_schedule_with_warmup(optimizer, warmup, total)
    for step in range(total):
        expected = scheduler.get_last_lr()[0]
        assert learning_rate_factor(step, warmup_steps=warmup, total_steps=total) == pytest.approx(expected)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("schedule", ["linear", "wsd", "cosine"])
def test_every_schedule_rises_in_the_warm_up_stays_in_its_bounds_and_ends_at_zero(train, schedule):
    factors = [
        learning_rate_factor(step, warmup_steps=10, total_steps=100, schedule=schedule, decay_fraction=0.3)
        for step in range(101)
    ]
    assert factors[:11] == [step / 10 for step in range(11)] and factors[100] == pytest.approx(0, abs=1e-12)
    assert all(0 <= later <= earlier <= 1 for earlier, later in zip(factors[10:], factors[11:], strict=False))
    if schedule == "wsd":
        assert factors[10:71] == [1.0] * 61 and factors[85] == pytest.approx(0.5)
    if schedule == "cosine":
        assert factors[55] == pytest.approx(0.5)


def test_the_optimizer_is_the_reference_s(train):
    group = make_optimizer(small_model(), 1.5e-4).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1.5e-4, (0.9, 0.999), 1e-6, 0.0)


def test_defaults_are_the_reference_s(train):
    args = vars(train.parse_args([]))
    expected = {
        "device": "0,1,2,3",
        "model_config": "config/model_config_small.json",
        "tokenized_data_path": "tokenized/",
        "epochs": 5,
        "batch_size": 8,
        "lr": 1.5e-4,
        "log_step": 1,
        "stride": 768,
        "gradient_accumulation": 1,
        "fp16": False,
        "fp16_opt_level": "O1",
        "max_grad_norm": 1.0,
        "output_dir": "model/",
        "pretrained_model": "",
        "writer_dir": "tensorboard_summary/",
        "optimizer": "adamw",
        "schedule": "linear",
    }
    assert args.items() >= expected.items()


@pytest.mark.parametrize(("windows", "expected"), [(79, 7), (100, 10), (10**6, 2000)])
def test_the_warm_up_is_at_most_a_tenth_of_the_run_unless_given(train, windows, expected):
    def steps(*flags: str) -> int:
        args = train.parse_args(["--batch_size", "1", "--epochs", "1", *flags])
        return train.Run(
            args=args,
            devices=[],
            precision="fp32",
            precision_note="",
            vocab_file=Path(),
            config_file=Path(),
            config=None,
            tokenizer=None,
            corpus=None,
            starts=np.arange(windows),
            span_lengths=(),
            stride=1,
        ).warmup_steps

    assert steps() == expected
    assert steps("--warmup_steps", "1500") == 1500
    assert steps("--warmup_steps", "0") == 0


# --- every window, once, whatever the division


@given(st.integers(0, 40), st.integers(1, 5), st.integers(1, 12))
def test_every_window_is_on_exactly_one_rank_in_one_micro_batch(script, count, world_size, batch_size):
    shares = [share_of_rank(np.arange(count), rank, world_size, batch_size) for rank in range(world_size)]
    windows = [window for share in shares for micro_batch in share for window in micro_batch.tolist()]
    assert sorted(windows) == list(range(count))
    assert all(0 < len(micro_batch) <= -(-batch_size // world_size) for share in shares for micro_batch in share)


def test_every_window_of_the_corpus_is_trained_once_an_epoch_in_another_order(train, monkeypatch, capsys):
    pieces = write_corpus([30, 3, 47, 2])
    seen: list[tuple[int, ...]] = []
    original = train.train_update

    def spy(window_loss, optimizer, micro_batches, **kwargs):
        batch = [tuple(window) for micro_batch in micro_batches for window in micro_batch.input_ids.tolist()]
        assert kwargs["predicted_tokens"] == len(batch) * (N_CTX - 1)
        seen.extend(batch)
        return original(window_loss, optimizer, micro_batches, **kwargs)

    monkeypatch.setattr(train, "train_update", spy)
    run(train, epochs=2, batch_size=2, gradient_accumulation=2, stride=5)
    tokens = [id_ for piece in pieces for id_ in piece]
    starts = window_starts([30, 3, 47, 2], N_CTX, 5).tolist()
    expected = sorted(tuple(tokens[start : start + N_CTX]) for start in starts)
    half = len(seen) // 2
    assert sorted(seen[:half]) == expected
    assert sorted(seen[half:]) == expected
    assert seen[:half] != seen[half:] and seen[:half] != expected
    updates = -(-len(expected) // 4)
    assert f"2 epochs of {updates} updates = {2 * updates} updates" in capsys.readouterr().out
    assert len(scalars()["loss"]) == 2 * updates


def test_max_steps_ends_a_run_in_the_middle_of_an_epoch_as_at_its_end(train, capsys):
    run(train, epochs=3, stride=3, batch_size=2, val_fraction=0.1, max_steps=0, output_dir="whole")
    whole = len(scalars()["loss"])
    run(train, epochs=3, stride=3, batch_size=2, val_fraction=0.1, max_steps=whole // 2)
    points = [json.loads(line) for line in Path("model/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [point["step"] for point in points if point["kind"] == "validation"][-1] == whole // 2
    assert [point["step"] for point in points if point["kind"] == "train"][-1] == whole // 2
    assert "--max_steps" in capsys.readouterr().out
    assert_same_weights(weights("model/final_model"), weights("model/model_epoch2"))
    assert not Path("model/model_epoch3").exists()


@pytest.mark.parametrize(
    "flags", [{"batch_size": 4, "gradient_accumulation": 2}, {"batch_size": 1, "gradient_accumulation": 8}]
)
def test_accumulation_equals_a_larger_batch_to_the_last_uneven_update(train, flags):
    run(train, epochs=2, stride=3, batch_size=8, output_dir="whole", writer_dir="whole/tb")
    run(train, epochs=2, stride=3, output_dir="parts", writer_dir="parts/tb", **flags)
    assert_same_weights(weights("whole/final_model"), weights("parts/final_model"), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(scalars("whole/tb")["loss"], scalars("parts/tb")["loss"], rtol=1e-6)


def test_one_accumulated_update_equals_a_larger_batch_to_1e_6(train):
    input_ids = torch.randint(5, 35, (8, N_CTX), generator=torch.Generator().manual_seed(0))
    results = []
    for micro_batches in ([input_ids], list(input_ids.split(2)), list(input_ids.split([5, 3]))):
        model = small_model()
        update = train.train_update(
            WindowLoss(model),
            make_optimizer(model, 1e-2),
            [MicroBatch(windows) for windows in micro_batches],
            predicted_tokens=8 * (N_CTX - 1),
            precision=Precision("fp32", torch.device("cpu")),
            max_grad_norm=1.0,
        )
        results.append((update.loss.item(), update.grad_norm.item()))
    np.testing.assert_allclose(results[1:], [results[0]] * 2, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("switches", [[], ["--document_mask"], ["--optimizer", "muon", "--character_lr", "0.05"]])
def test_two_gloo_ranks_equal_one_process_with_windows_that_do_not_divide(train, capfd, switches):
    write_corpus([37])  # 11 windows: updates of 5, 5 and 1, of which the second rank has 2, 2 and none
    flags = {"epochs": 2, "batch_size": 5, "stride": 3}
    run(train, *switches, output_dir="one", writer_dir="one/tb", **flags)
    assert run(train, *switches, output_dir="two", writer_dir="two/tb", device="cpu,cpu", **flags) == 0
    assert "windows    11 of 8 tokens" in capfd.readouterr().out
    for name in ("model_epoch1", "model_epoch2", "final_model"):
        assert_same_weights(weights(f"one/{name}"), weights(f"two/{name}"), rtol=1e-4, atol=1e-6)
    one, two = scalars("one/tb"), scalars("two/tb")
    for name in ("loss", "gradient_norm", "learning_rate"):
        np.testing.assert_allclose(two[name], one[name], rtol=1e-6)


@pytest.mark.slow
def test_torchrun_starts_the_ranks_and_one_of_them_saves(train, tmp_path):
    run(train, output_dir="one", epochs=1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "train.py"), "--device", "cpu", "--model_config", "shape.json", "--lr", "1e-2"]
    command += ["--epochs", "1", "--output_dir", "two", "--writer_dir", "two/tb", "--precision", "fp32"]
    command += ["--val_fraction", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("two/final_model") == 2, "one line, which names the folder twice, from one rank"
    assert_same_weights(weights("one/final_model"), weights("two/final_model"), rtol=1e-4, atol=1e-6)


# --- what a run leaves behind


def test_a_run_writes_a_folder_each_epoch_and_at_the_end_that_holds_all_a_reader_needs(train, capsys):
    assert run(train, epochs=3, batch_size=4) == 0
    assert sorted(path.name for path in Path("model").iterdir() if path.name[0] != ".") == [
        "checkpoints",
        "final_model",
        "metrics.jsonl",
        "model_epoch1",
        "model_epoch2",
        "model_epoch3",
    ]
    model, tokenizer = load_model("model/final_model")
    assert tokenizer.vocabulary[5] == "一" and tokenizer.compat is False
    assert model.config.n_ctx == N_CTX and model.config.vocab_size == 35
    assert_same_weights(weights("model/model_epoch3"), weights())
    assert not torch.equal(weights("model/model_epoch1")["transformer.wte.weight"], weights()["transformer.wte.weight"])
    losses = [
        json.loads((Path("model") / name / "manifest.json").read_text(encoding="utf-8"))["facts"]["loss"]
        for name in ("model_epoch1", "model_epoch2", "model_epoch3")
    ]
    assert losses[0] > losses[1] > losses[2]
    output = capsys.readouterr().out
    assert output.startswith("settings: ")
    assert f"epoch 3 of 3: loss {losses[2]:.4f}" in output
    assert "35 tokens (instead of the 50,005 of shape.json)" in output
    assert "stride 7 (not 768, which would leave tokens out)" in output


def test_tensorboard_has_loss_rate_norm_and_speed(train):
    run(train, epochs=2, batch_size=4, warmup_steps=2)
    curves = scalars()
    assert curves.keys() == {"loss", "learning_rate", "gradient_norm", "tokens_per_second"}
    updates = len(curves["loss"])
    expected = [1e-2 * learning_rate_factor(step, warmup_steps=2, total_steps=updates) for step in range(updates)]
    np.testing.assert_allclose(curves["learning_rate"], expected, rtol=1e-6)
    assert curves["loss"][0] == pytest.approx(np.log(35), rel=0.05)
    assert min(curves["tokens_per_second"]) > 0


def test_log_step_thins_the_points_out_but_not_the_training(train):
    run(train, output_dir="every", writer_dir="every/tb", batch_size=2)
    run(train, output_dir="third", writer_dir="third/tb", batch_size=2, log_step=3)
    assert_same_weights(weights("every/final_model"), weights("third/final_model"))
    every, third = scalars("every/tb")["loss"], scalars("third/tb")["loss"]
    assert third == [loss for step, loss in enumerate(every, start=1) if step % 3 == 0 or step == len(every)]


def test_the_seed_alone_decides_the_result(train):
    write_shape(resid_pdrop=0.1)
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        torch.manual_seed(99)
        run(train, epochs=1, seed=seed, output_dir=name)
    assert_same_weights(weights("first/final_model"), weights("again/final_model"))
    assert not torch.equal(
        weights("first/final_model")["transformer.wte.weight"], weights("other/final_model")["transformer.wte.weight"]
    )


def test_a_second_run_replaces_the_models_of_the_first_if_that_is_asked_for(train):
    run(train, epochs=1)
    first = weights()
    run(train, "--overwrite", epochs=1, lr=1e-3)
    assert not torch.equal(first["transformer.wte.weight"], weights()["transformer.wte.weight"])


def test_training_goes_on_from_a_model_of_ours(train, capsys):
    run(train, epochs=4)
    run(
        train,
        epochs=1,
        pretrained_model="model/final_model",
        output_dir="more",
        writer_dir="more/tb",
        model_config="none",
    )
    assert scalars("more/tb")["loss"][0] < scalars()["loss"][0] - 0.1
    printed = capsys.readouterr().out
    assert "model/final_model: 2 layers" in printed and "suits models of 100 million" not in printed
    run(train, epochs=1, pretrained_model="model/final_model", output_dir="slow", lr=5e-5, model_config="none")
    assert "note: --lr 5e-05 suits models of 100 million parameters" in capsys.readouterr().out


def test_training_goes_on_from_gpt2_chinese_s_folder_and_pieces(script, reference, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = script("train")
    pieces = tmp_path / "tokenized"
    pieces.mkdir()
    text = (reference / "tokenized_full" / "tokenized_train_0.txt").read_text(encoding="utf-8")
    (pieces / "tokenized_train_0.txt").write_text(" ".join(text.split()[:300]), encoding="utf-8")
    flags = ["--pretrained_model", str(reference / "checkpoint"), "--vocab_file", str(reference / "vocab_user.txt")]
    assert train.main([*flags, "--device", "cpu", "--epochs", "1", "--precision", "fp32", "--writer_dir", "tb"]) == 0
    assert scalars("tb")["loss"][0] == pytest.approx(8.4, abs=0.1)
    model, tokenizer = load_model("model/final_model")
    assert model.config.vocab_size == 4425 and model.config.n_ctx == 64
    assert tokenizer.compat, "the reference's models are asked with the reference's tokens"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_saves_what_there_is_and_says_how_to_resume(train, monkeypatch, capsys, number, status):
    calls = []
    original = train.train_update

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    monkeypatch.setattr(train, "train_update", interrupted)
    before = signal.getsignal(number)
    assert run(train, epochs=5, batch_size=2) == status
    assert signal.getsignal(number) is before
    assert len(calls) == 3
    assert [path.name for path in Path("model/checkpoints").iterdir()] == ["step_3"]
    assert "stopped after update 3 of" in (output := capsys.readouterr().out)
    assert (
        "the checkpoint is model/checkpoints/step_3" in output and "command with --resume continues exactly" in output
    )
    monkeypatch.setattr(train, "train_update", original)
    assert run(train, "--resume", epochs=5, batch_size=2) == 0
    run(train, epochs=5, batch_size=2, output_dir="whole", writer_dir="whole/tb")
    assert_same_weights(weights(), weights("whole/final_model"))
    assert scalars()["loss"] == scalars("whole/tb")["loss"]


def test_a_second_ctrl_c_breaks_off_at_once(train, monkeypatch):
    def impatient(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second signal was ignored")

    monkeypatch.setattr(train, "train_update", impatient)
    with pytest.raises(KeyboardInterrupt):
        run(train)
    assert not Path("model/checkpoints").exists()


# --- precision


@pytest.mark.parametrize(
    ("capabilities", "gain", "expected", "note"),
    [
        ({"avx512_bf16": True}, 1.7, "bf16", ""),
        ({"avx512_bf16": True}, 0.5, "fp32", "this CPU multiplies bf16 more slowly than fp32"),
        ({"avx512_bf16": False}, 1.7, "fp32", "this CPU has no bf16 instructions"),
        ({}, 1.7, "fp32", "this CPU has no bf16 instructions"),
    ],
)
def test_auto_takes_bf16_only_where_the_processor_is_faster_in_it(
    train, monkeypatch, capabilities, gain, expected, note
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr("gpt2_chinese.precision._cpu_bf16_gain", lambda: gain)
    assert choose_precision(train.parse_args([]), torch.device("cpu")) == (expected, note)


def test_a_processor_is_asked_for_its_bf16_once(monkeypatch):
    gain = _cpu_bf16_gain()
    monkeypatch.setattr(torch, "mm", lambda *_: pytest.fail("it is known"))
    assert 0 < gain == _cpu_bf16_gain()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--precision", "bf16"], "bf16"),
        (["--precision", "fp32", "--fp16_opt_level", "O3"], "fp32"),
        (["--fp16"], "fp16"),
        (["--precision", "fp16"], "fp16"),
        (["--fp16", "--fp16_opt_level", "O0"], "fp32"),
        (["--fp16", "--fp16_opt_level", "O1"], "fp16"),
        (["--fp16", "--fp16_opt_level", "O2"], "fp16"),
        (["--fp16", "--fp16_opt_level", "O3"], "fp16-only"),
    ],
)
def test_flags_of_apex_mean_what_torch_can_do(train, flags, expected):
    precision, note = choose_precision(train.parse_args(flags), torch.device("cpu"))
    assert precision == expected
    if "O2" in flags:
        assert "computed as O1" in note


@pytest.mark.parametrize("flags", [["--precision", "bf16"], ["--fp16"], ["--fp16", "--fp16_opt_level", "O3"]])
def test_lower_precision_trains_and_stays_near_fp32(train, flags):
    run(train, epochs=2, output_dir="exact", writer_dir="exact/tb")
    argv = ["--device", "cpu", "--model_config", "shape.json", "--lr", "1e-2", "--epochs", "2", "--writer_dir", "low"]
    argv += ["--val_fraction", "0"]
    assert train.main([*argv, *flags]) == 0
    np.testing.assert_allclose(scalars("low")["loss"], scalars("exact/tb")["loss"], rtol=0.03)
    dtype = torch.float16 if "O3" in flags else torch.float32
    assert weights()["transformer.wte.weight"].dtype == dtype
    assert load_model("model/final_model")[0].dtype == torch.float32


def test_an_update_that_overflows_in_fp16_is_left_out_and_counted_and_the_rate_waits(train, monkeypatch, capsys):
    class Scaler(torch.amp.GradScaler):
        def __init__(self, device, **kwargs):
            super().__init__(device, init_scale=2.0**40, **kwargs)  # overflows until it has been halved often enough

    monkeypatch.setattr(torch.amp, "GradScaler", Scaler)
    argv = ["--device", "cpu", "--model_config", "shape.json", "--fp16", "--epochs", "2", "--stride", "1"]
    argv += ["--val_fraction", "0"]
    assert train.main([*argv, "--batch_size", "1", "--warmup_steps", "1", "--lr", "1e-3"]) == 0
    rates = scalars()["learning_rate"]
    left_out = rates.index(pytest.approx(1e-3)) - 1
    assert left_out > 3
    assert rates[: left_out + 1] == [0.0] * (left_out + 1)
    assert f"skipped {left_out} updates" in capsys.readouterr().out


def test_an_epoch_that_overflows_altogether_is_an_error_and_saves_nothing(train, monkeypatch):
    class Scaler(torch.amp.GradScaler):
        def __init__(self, device, **kwargs):
            super().__init__(device, init_scale=2.0**100, **kwargs)

    monkeypatch.setattr(torch.amp, "GradScaler", Scaler)
    with pytest.raises(ValueError, match=r"every update of epoch 1 overflowed in fp16; take --precision fp32"):
        train.main(["--device", "cpu", "--model_config", "shape.json", "--fp16"])
    assert not Path("model/model_epoch1").exists()


def test_a_loss_that_is_no_number_ends_the_run_before_it_is_saved(train):
    with pytest.raises(ValueError, match=r"update \d+: the loss is .*Take a lower --lr"):
        run(train, lr=1e30, epochs=3, warmup_steps=0, max_grad_norm=1e30)
    assert not Path("model/final_model").exists()


@pytest.mark.parametrize("bad", [2, 3])
def test_bad_updates_are_left_out_and_end_the_run_when_there_are_three_in_a_row(train, monkeypatch, capsys, bad):
    write_corpus([60, 47])
    original, calls = WindowLoss.forward, []

    def poisoned(self, *given):
        calls.append(1)
        loss = original(self, *given)
        return loss * math.nan if 3 <= len(calls) < 3 + bad else loss

    monkeypatch.setattr(WindowLoss, "forward", poisoned)
    flags = {"epochs": 1, "batch_size": 1, "save_steps": 2}
    if bad == 3:
        with pytest.raises(ValueError, match=r"update 5: the loss is nan.* 3 updates in a row. Take a lower --lr"):
            run(train, **flags)
        assert sorted(path.name for path in Path("model/checkpoints").iterdir()) == ["step_2", "step_4"]
        assert not Path("model/final_model").exists()
    else:
        assert run(train, **flags) == 0
        assert "2 updates skipped so far" in capsys.readouterr().out
        assert all(torch.isfinite(tensor).all() for tensor in weights().values())


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0"), "1.50 GiB"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 900 bytes."),
            "900",
        ),
        (MemoryError(), ""),
    ],
)
def test_out_of_memory_names_the_micro_batch_and_the_flags_that_help(train, monkeypatch, error, wanted):
    def greedy(*_, **__):
        raise error

    monkeypatch.setattr(train, "train_update", greedy)
    with pytest.raises(ValueError, match=rf"micro-batch of 4 windows of 8 tokens.*{wanted}.*--gradient_checkpointing"):
        run(train, batch_size=4)


def test_other_errors_are_not_taken_for_a_lack_of_memory(train, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(train, "train_update", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run(train)


def test_a_compiler_that_is_not_there_is_said_and_done_without(train, monkeypatch, capsys):
    run(train, output_dir="plain", writer_dir="plain/tb")
    monkeypatch.setattr(trainable, "compiler_problem", lambda _: "no C++ compiler")
    assert run(train, "--compile", "on") == 0
    assert "note: not compiled: no C++ compiler" in capsys.readouterr().out
    assert_same_weights(weights("plain/final_model"), weights())


def test_auto_compiles_for_gpus_only():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    should_compile = window_loss.should_compile
    assert should_compile("auto", gpu) and not should_compile("auto", cpu)
    assert not should_compile("auto", gpu, recompute=True)
    assert should_compile("on", cpu) and not should_compile("off", gpu)


def test_a_corpus_that_will_be_memorised_is_said_so(train, capsys):
    run(train, epochs=5)
    assert "the model will overfit and memorise the texts" in capsys.readouterr().out
    assert not will_overfit(10**9, 10**8, 10) and not will_overfit(10**5, 10**8, 4)


def test_apex_is_explained_where_it_has_no_amp(train, monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    with pytest.raises(ValueError, match=r"--amp_backend apex: .*removed amp from apex in May 2025"):
        train.main(["--device", "cpu", "--model_config", "shape.json", "--fp16", "--amp_backend", "apex"])
    assert not Path("model").exists()


def test_apex_is_used_where_it_has_amp(train, monkeypatch):
    calls = []
    amp = types.ModuleType("apex.amp")

    def initialize(model, optimizer, opt_level):
        calls.append(opt_level)
        return model, optimizer

    @contextlib.contextmanager
    def scale_loss(loss, optimizer):
        calls.append("scale")
        yield loss

    amp.initialize, amp.scale_loss = initialize, scale_loss
    apex = types.ModuleType("apex")
    apex.amp = amp
    monkeypatch.setitem(sys.modules, "apex", apex)
    monkeypatch.setitem(sys.modules, "apex.amp", amp)
    run(train, epochs=1, output_dir="torch", writer_dir="torch/tb")
    flags = ["--device", "cpu", "--model_config", "shape.json", "--lr", "1e-2", "--epochs", "1", "--fp16"]
    flags += ["--val_fraction", "0"]
    assert train.main([*flags, "--amp_backend", "apex", "--fp16_opt_level", "O2"]) == 0
    assert calls == ["O2"] + ["scale"] * len(scalars()["loss"])
    assert_same_weights(weights("torch/final_model"), weights())  # this apex computes in fp32


# --- devices and mistakes


@pytest.mark.parametrize(
    ("text", "count", "devices", "note"),
    [
        ("cpu", 4, ["cpu"], ""),
        ("cpu,cpu", 0, ["cpu", "cpu"], ""),
        ("0,1,2,3", 0, ["cpu"], "no CUDA GPU is visible: training on the CPU"),
        ("0,1,2,3", 1, ["cuda:0"], "GPU 1, 2, 3 is not there: training on 0"),
        ("1, 0", 2, ["cuda:1", "cuda:0"], ""),
    ],
)
def test_devices_that_are_there_are_used(train, monkeypatch, text, count, devices, note):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    found, said = choose_devices(text)
    assert [str(device) for device in found] == devices
    assert said == note


def spoil_vocabulary() -> None:
    write_lines("vocab/vocab_user.txt", [*SPECIAL_TOKENS, "新"])


def spoil_ids() -> None:
    Path("tokenized/manifest.json").unlink()
    Path("tokenized/tokenized_train_1.txt").write_text("2 5 99 1 ", encoding="utf-8")


def three_short_lines() -> None:
    write_corpus([4, 2, 1])


def no_tokens() -> None:
    Path("tokenized/manifest.json").unlink()
    for path in Path("tokenized").iterdir():
        path.unlink()


def occupy_output() -> None:
    Path("model/model_epoch2").mkdir(parents=True)
    Path("model/model_epoch2/diary.txt").write_text("mine", encoding="utf-8")


def folder_without_weights() -> None:
    save_model("old", small_model(), WordTokenizer(read_vocabulary("vocab/vocab_user.txt")), facts={})
    Path("old/model.safetensors").unlink()


def model_of_another_vocabulary() -> None:
    write_corpus([40, 10], words=20)
    write_shape()
    torch.manual_seed(0)
    model = GPT2LMHeadModel(read_config("shape.json", vocab_size=25))
    save_model("old", model, WordTokenizer(read_vocabulary("vocab/vocab_user.txt")), facts={})
    write_corpus([40, 10], words=30)


def files() -> dict[Path, bytes]:
    """Every file but those that only keep the pieces' ids, and the locks."""
    paths = [path for path in Path(".").rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in paths if not path.name.startswith((".tokens", ".held_out", ".lock"))}


@pytest.mark.parametrize(
    ("spoil", "flags", "error", "message"),
    [
        (no_tokens, [], FileNotFoundError, r"no tokenized_train_0\.txt in tokenized: run make-tokenized\.py first"),
        (None, ["--tokenized_data_path", "absent"], FileNotFoundError, r"no folder absent: run make-tokenized\.py"),
        (None, ["--vocab_file", "absent.txt"], FileNotFoundError, r"no vocabulary absent\.txt"),
        (
            spoil_vocabulary,
            [],
            ValueError,
            r"vocab_user\.txt is not the vocabulary that .*manifest\.json.*make-tokenized",
        ),
        (spoil_ids, [], ValueError, r"tokenized_train_1\.txt, number 3: id 99 is outside the vocabulary of 35 tokens"),
        (
            three_short_lines,
            [],
            ValueError,
            r"has 7 tokens to train on, and one window has 8 \(n_ctx in shape\.json\).*more text",
        ),
        (None, ["--model_config", "absent.json"], FileNotFoundError, r"no model configuration absent\.json"),
        (None, ["--pretrained_model", "absent"], FileNotFoundError, "no model folder absent"),
        (folder_without_weights, ["--pretrained_model", "old"], FileNotFoundError, "old has no weights"),
        (
            model_of_another_vocabulary,
            ["--pretrained_model", "old"],
            ValueError,
            r"vocab_user\.txt, the model was trained with old/vocab\.txt: .* add --vocab_file",
        ),
        (lambda: write_shape(n_ctx=1), [], ValueError, r"shape\.json: n_ctx is 1"),
        (occupy_output, [], FileExistsError, r"model/model_epoch2 is there already and is not a model folder"),
        (None, ["--device", "gpu"], ValueError, "--device gpu: give numbers of GPUs, as 0 or 0,1, or cpu"),
        (None, ["--device", "0,0"], ValueError, "--device 0,0"),
        (None, ["--device", "cpu,cpu", "--batch_size", "1"], ValueError, "--batch_size 1 is less than a window"),
        (None, ["--fp16", "--precision", "bf16"], ValueError, "--fp16 and --precision bf16 contradict"),
        (None, ["--amp_backend", "apex"], ValueError, "--amp_backend apex is for fp16"),
    ],
)
def test_a_mistake_is_named_with_its_mend_and_leaves_every_file_as_it_was(train, spoil, flags, error, message):
    if spoil is not None:
        spoil()
    before = files()
    with pytest.raises(error, match=message):
        run(train, *flags)
    assert files() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epochs", "0"], "--epochs: 0 is not above 0"),
        (["--stride", "0"], "--stride: 0 is not above 0"),
        (["--seed", f"1{'0' * 30}"], f"--seed: 1{'0' * 30} is not from 0 to {2**62}"),
        (["--batch_size", "x"], "--batch_size"),
        (["--lr", "nan"], "--lr: nan is not a number above 0"),
        (["--lr", "-1"], "--lr: -1 is not a number above 0"),
        (["--warmup_steps", "-1"], "--warmup_steps: -1 is below 0"),
        (["--fp16_opt_level", "O4"], "--fp16_opt_level"),
    ],
)
def test_a_flag_out_of_range_is_refused_by_name(train, capsys, flags, message):
    with pytest.raises(SystemExit) as refused:
        train.main(flags)
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--epochs", "--seed"])
def test_the_greatest_number_of_a_flag_takes_neither_memory_nor_time(train, flag):
    assert run(train, flag, str(2**62), "--max_steps", "1") == 0


@pytest.mark.parametrize("name", ["model_epoch2", "final_model", "best_model"])
def test_only_folders_that_the_run_writes_are_refused(train, name):
    for folder in ("model/model_epoch3", "model/model_epoch02", f"model/{name}"):
        Path(folder).mkdir(parents=True)
        Path(folder, "mine").touch()
    with pytest.raises(FileExistsError, match=f"{name} is there already and is not a model folder"):
        run(train, epochs=2)
    Path("model", name, "mine").unlink()
    assert run(train, epochs=2, max_steps=1) == 0


def test_no_cpu_fallback_happens_silently(train, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    run(train, epochs=1, device="0,1")
    assert "note: no CUDA GPU is visible: training on the CPU" in capsys.readouterr().out


def test_two_runs_do_not_write_into_one_folder(train):
    with train.exclusive_lock("model"), pytest.raises(BlockingIOError, match="another run"):
        run(train)


def test_pieces_that_are_mostly_unknown_are_refused_unless_allowed(train, capsys):
    write_corpus([60, 60])
    write_shape()
    path = Path("tokenized/manifest.json")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    for unknown, allowed in ((2, True), (24, False), (24, True)):
        changed = manifest | {"documents": 2, "tokens": 104, "unknown_tokens": unknown}
        path.write_text(json.dumps(changed), encoding="utf-8")
        if not allowed:
            with pytest.raises(ValueError, match=r"24\.0% of the tokens are \[UNK\].*--allow_unk"):
                run(train, max_steps=1)
            continue
        assert run(train, *(["--allow_unk", "--overwrite"] if unknown == 24 else []), max_steps=1) == 0
        assert f"warning: {unknown}.0% of the tokens are [UNK]" in capsys.readouterr().out
