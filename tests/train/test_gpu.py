"""On a GPU: fp16, bf16, compiled, checkpoints. Skipped where there is none; `pytest -m gpu` runs nothing else."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import assert_same_weights, scalars, weights, write_documents, write_shape

from gpt2_chinese.checkpoint import load_model
from gpt2_chinese.training_state import checkpoints_in

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    # What torch and Triton of other versions warn of while they compile is theirs.
    pytest.mark.filterwarnings("default"),
]

DROPOUT = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
SHAPE = {"n_embd": 64, "n_ctx": 16, "n_positions": 16}


@pytest.fixture(autouse=True)
def files(train):
    write_documents([20] * 30)
    write_shape(**SHAPE)


def run(train, name: str, *flags: str, device: str = "0") -> int:
    """A small run whose files are in a folder of its own."""
    argv = ["--device", device, "--model_config", "shape.json", "--lr", "3e-3", "--epochs", "2", "--batch_size", "4"]
    argv += ["--val_fraction", "0.1", "--stride", "9", "--compile", "off", "--output_dir", name]
    return train.main([*argv, "--writer_dir", f"{name}/tb", *flags])


def losses(name: str) -> list[float]:
    return scalars(f"{name}/tb")["loss"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_fp32_is_the_cpu_s_to_rounding_though_its_rows_are_padded(train, optimizer):
    run(train, "cpu", "--precision", "fp32", "--optimizer", optimizer, device="cpu")
    run(train, "gpu", "--precision", "fp32", "--optimizer", optimizer)
    np.testing.assert_allclose(losses("gpu"), losses("cpu"), rtol=2e-3 if optimizer == "muon" else 1e-4)
    assert load_model("gpu/final_model")[0].config.vocab_size == 35
    measured = [scalars(f"{name}/tb")["validation_bits_per_character"] for name in ("gpu", "cpu")]
    np.testing.assert_allclose(measured[0], measured[1], rtol=2e-3)


@pytest.mark.parametrize("flags", [["--precision", "bf16"], ["--fp16"], ["--fp16", "--fp16_opt_level", "O3"]])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_lower_precision_stays_near_fp32(train, flags, optimizer):
    run(train, "exact", "--precision", "fp32", "--optimizer", optimizer)
    run(train, "low", *flags, "--optimizer", optimizer)
    # fp16's scaler may leave the first updates out, until it has found its scale.
    np.testing.assert_allclose(losses("low"), losses("exact"), rtol=0.05)
    assert all(torch.isfinite(tensor).all() for tensor in weights("low/final_model").values())


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_is_eager_to_rounding(train, capsys, precision):
    run(train, "eager", "--precision", precision)
    run(train, "compiled", "--precision", precision, "--compile", "on")
    assert "compiling" in capsys.readouterr().out
    np.testing.assert_allclose(losses("compiled"), losses("eager"), rtol=1e-4 if precision == "fp32" else 0.02)


@pytest.mark.parametrize(
    "flags",
    [
        ["--precision", "fp32"],
        ["--precision", "bf16"],
        ["--fp16"],
        ["--precision", "bf16", "--optimizer", "muon"],
        ["--precision", "bf16", "--gradient_checkpointing"],
        pytest.param(["--precision", "bf16", "--compile", "on"], marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_to_the_same_bits(train, monkeypatch, flags):
    write_shape(**SHAPE, **DROPOUT)
    deterministic = torch.are_deterministic_algorithms_enabled()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)  # the embedding's gradient is added in any order else
    try:
        run(train, "whole", *flags)
        original, calls = train.train_update, []

        def stopping(*args, **kwargs):
            calls.append(1)
            if len(calls) == 7:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(train, "train_update", stopping)
            assert run(train, "parts", *flags) == 143
        assert checkpoints_in(Path("parts/checkpoints"))[0][0] == 7
        assert run(train, "parts", *flags, "--resume") == 0
    finally:
        torch.use_deterministic_algorithms(deterministic)
    assert losses("parts") == losses("whole")
    assert_same_weights(weights("whole/final_model"), weights("parts/final_model"))


def test_bad_updates_are_left_out_without_waiting_for_the_gpu(train, monkeypatch):
    original, calls = train.WindowLoss.forward, []

    def poisoned(self, input_ids):
        calls.append(1)
        loss = original(self, input_ids)
        return loss * float("nan") if len(calls) in (3, 4) else loss

    monkeypatch.setattr(train.WindowLoss, "forward", poisoned)
    for optimizer in ("adamw", "muon"):
        calls.clear()
        assert run(train, optimizer, "--precision", "fp32", "--optimizer", optimizer, "--log_step", "5") == 0
        assert all(torch.isfinite(tensor).all() for tensor in weights(f"{optimizer}/final_model").values())


def test_out_of_memory_is_said_with_what_was_wanted(train, monkeypatch):
    def greedy(*_, **__):
        return torch.empty(1 << 50, dtype=torch.uint8, device="cuda")

    monkeypatch.setattr(train, "train_update", greedy)
    with pytest.raises(ValueError, match=r"micro-batch of 4 windows of 16 tokens, when [\d.]+ \w+ more were wanted"):
        run(train, "greedy")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU only")
def test_two_gpus_equal_one(train):
    run(train, "one", "--precision", "fp32")
    run(train, "two", "--precision", "fp32", device="0,1")
    np.testing.assert_allclose(losses("two"), losses("one"), rtol=1e-4)
