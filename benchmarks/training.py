"""Training beside nanoGPT, the Hugging Face Trainer and a loop of the reference's kind: speed, memory, time to a loss.

Both sides of every figure run in one run. Peers come from their own packages (the Trainer wants `accelerate`) or from a
checkout whose path is given:

    .venv-train/bin/python benchmarks/training.py throughput --nanogpt ~/nanoGPT
    .venv-train/bin/python benchmarks/training.py memory
    .venv-train/bin/python benchmarks/training.py time-to-loss --tokenized tokenized --ours tokenized_5000 --minutes 20
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from transformers import GPT2Config, GPT2LMHeadModel  # noqa: E402

import train  # noqa: E402
from gpt2_chinese.model_folder import read_config  # noqa: E402
from gpt2_chinese.openmp import SPINS  # noqa: E402
from gpt2_chinese.precision import Precision, is_bf16_fast  # noqa: E402
from gpt2_chinese.text.pieces import read_manifest, text_of_tokens  # noqa: E402
from gpt2_chinese.text.vocabulary import read_vocabulary  # noqa: E402
from gpt2_chinese.text.word_tokenizer import WordTokenizer  # noqa: E402
from gpt2_chinese.training import fused  # noqa: E402
from gpt2_chinese.training.allocator import keep_freed_memory  # noqa: E402
from gpt2_chinese.training.estimates import flops_per_token, peak_flops  # noqa: E402
from gpt2_chinese.training.evaluation import Documents, evaluate  # noqa: E402
from gpt2_chinese.training.loss import WindowLoss, pad_vocabulary, should_compile  # noqa: E402
from gpt2_chinese.training.optimizers import make_optimizer  # noqa: E402
from gpt2_chinese.training.token_cache import read_pieces  # noqa: E402
from gpt2_chinese.training.trainable import PADDED_DEVICES  # noqa: E402
from gpt2_chinese.training.windows import MicroBatch, epoch_order, window_batch, window_starts  # noqa: E402

# layers, width, heads, vocabulary, windows, tokens of a window
SHAPES = {
    "4x256": (4, 256, 4, 23_574, 16, 128),
    "small": (12, 768, 12, 50_005, 2, 512),
    "small-gpu": (12, 768, 12, 50_005, 16, 1024),
    "2x128": (2, 128, 4, 3_000, 8, 128),  # as --minutes takes for small texts
    "3x192": (3, 192, 6, 3_000, 8, 128),
    "tiny": (2, 32, 2, 500, 4, 32),
}
Step = Callable[[torch.Tensor], None]


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def configuration(shape: str, dropout: float) -> GPT2Config:
    layers, width, heads, vocabulary, _, length = SHAPES[shape]
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=length,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        resid_pdrop=dropout,
    )
    config.n_ctx = length
    return config


def batches(shape: str, count: int) -> list[torch.Tensor]:
    """The same random windows for every contender."""
    *_, vocabulary, windows, length = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocabulary, (windows, length), generator=generator).to(device()) for _ in range(count)]


# ---------------------------------------------------------------------------------------------------------------------
# The contenders: each builds its model and gives a function that trains on one batch.


def ours(shape: str, dtype: str, *, recompute: bool = False) -> Step:
    """What train.py does in an update, and before the first one."""
    if device().type == "cpu":
        keep_freed_memory()
    model = GPT2LMHeadModel(configuration(shape, dropout=0.0))
    rows = pad_vocabulary(model) if device().type in PADDED_DEVICES else model.config.vocab_size
    model.to(device()).train()
    window_loss = WindowLoss(model, rows=rows, recompute=recompute)
    *_, windows, length = SHAPES[shape]
    if should_compile("auto", device(), recompute=recompute):
        window_loss.compile_for((windows, length))
    optimizer = make_optimizer(model, 1e-4)
    precision = Precision(dtype, device())

    def step(batch: torch.Tensor) -> None:
        train.train_update(
            window_loss,
            optimizer,
            [MicroBatch(batch)],
            predicted_tokens=batch[:, 1:].numel(),
            precision=precision,
            max_grad_norm=1.0,
        )

    return step


def nanogpt(shape: str, dtype: str, path: str) -> Step:
    """nanoGPT's train.py: its model, compiled, its AdamW, clipping at 1."""
    sys.path.insert(0, path)
    from model import GPT  # type: ignore[import-not-found]
    from model import GPTConfig as NanoConfig

    layers, width, heads, vocabulary, _, length = SHAPES[shape]
    if device().type == "cuda":
        vocabulary += -vocabulary % 64  # as its author does, by hand
    model = GPT(
        NanoConfig(
            block_size=length, vocab_size=vocabulary, n_layer=layers, n_head=heads, n_embd=width, dropout=0.0, bias=True
        )
    )
    model.to(device())
    optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), device().type)
    compiled = torch.compile(model)
    autocast = torch.autocast(device().type, torch.bfloat16) if dtype == "bf16" else contextlib.nullcontext()

    def step(batch: torch.Tensor) -> None:
        with autocast:
            _, loss = compiled(batch, torch.roll(batch, -1, dims=1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def plain_loop(shape: str, _: str) -> Step:
    """The reference's kind: transformers' model in fp32, eager, dropout 0.1, AdamW, clipping at 1."""
    model = GPT2LMHeadModel(configuration(shape, dropout=0.1)).to(device()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, eps=1e-6, weight_decay=0.0)

    def step(batch: torch.Tensor) -> None:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_trainer(model: GPT2LMHeadModel, windows: list[dict[str, torch.Tensor]], folder: str, **more: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=folder,
        optim="adamw_torch_fused",
        max_grad_norm=1.0,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=device().type == "cpu",
        dataloader_pin_memory=device().type == "cuda",
        **more,
    )
    return Trainer(model=model, args=arguments, train_dataset=windows)


def trainer_round(shape: str, dtype: str, folder: str, *, recompute: bool = False) -> Callable[[int], float]:
    """The Trainer, bf16 or fp32, compiled if it does not recompute; the seconds of steps behind two that warm up."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if device().type == "cuda":
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

    model = GPT2LMHeadModel(configuration(shape, dropout=0.0))
    *_, size, _ = SHAPES[shape]

    def run(steps: int) -> float:
        windows = [{"input_ids": row, "labels": row} for batch in batches(shape, steps + 2) for row in batch.cpu()]
        trainer = make_trainer(
            model,
            windows,
            folder,
            per_device_train_batch_size=size,
            max_steps=steps + 2,
            learning_rate=1e-4,
            bf16=dtype == "bf16",
            torch_compile=not recompute,
            gradient_checkpointing=recompute,
        )
        trainer.add_callback(clock := Clock())
        trainer.train()
        return clock.ends[-1] - clock.ends[1]

    return run


def stepping_round(step: Step, shape: str) -> Callable[[int], float]:
    def run(steps: int) -> float:
        data = batches(shape, steps)
        if device().type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for batch in data:
            step(batch)
        if device().type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    return run


def with_a_pool(args: argparse.Namespace) -> Callable[[int], float]:
    """Ours, with a pool of Python's for what is between the products, instead of OpenMP's threads."""
    fused._openmp_works = False
    return stepping_round(ours(args.shape, args.dtype), args.shape)


CONTENDERS = {
    "ours": lambda args: stepping_round(ours(args.shape, args.dtype), args.shape),
    "ours, recomputing": lambda args: stepping_round(ours(args.shape, args.dtype, recompute=True), args.shape),
    "ours, a pool": with_a_pool,
    "nanoGPT": lambda args: stepping_round(nanogpt(args.shape, args.dtype, args.nanogpt), args.shape),
    "Trainer": lambda args: trainer_round(args.shape, args.dtype, tempfile.mkdtemp()),
    "Trainer, recomputing": lambda args: trainer_round(args.shape, args.dtype, tempfile.mkdtemp(), recompute=True),
    "plain fp32 loop": lambda args: stepping_round(plain_loop(args.shape, "fp32"), args.shape),
}


def contend(args: argparse.Namespace) -> None:
    """One contender in its own process: a number of steps comes in, their seconds go out."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    run = CONTENDERS[args.contender](args)
    for line in sys.stdin:
        seconds = run(int(line))
        print(seconds, peak_megabytes(), file=answers, flush=True)


def peak_megabytes() -> float:
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1e3


def start(name: str, shape: str, args: argparse.Namespace) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "contend", "--contender", name, "--shape", shape, "--dtype", args.dtype]
    if args.nanogpt:
        command += ["--nanogpt", args.nanogpt]
    quiet = None if args.verbose else subprocess.DEVNULL
    # As train.py sets it for itself, before it imports torch; what others set is theirs.
    environment = {"GOMP_SPINCOUNT": str(SPINS)} | os.environ if name.startswith("ours") else None
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=quiet, text=True, env=environment
    )


def ask(process: subprocess.Popen[str], steps: int) -> tuple[float, float]:
    tell(process, steps)
    return hear(process)


def tell(process: subprocess.Popen[str], steps: int) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{steps}\n")
    process.stdin.flush()


def hear(process: subprocess.Popen[str]) -> tuple[float, float]:
    """The seconds of the steps that a contender was told to make, and its peak of memory."""
    assert process.stdout is not None
    answer = process.stdout.readline().split()
    if not answer:
        raise RuntimeError("the contender ended with an error; see it with --verbose")
    return float(answer[0]), float(answer[1])


def throughput(args: argparse.Namespace) -> None:
    """Tokens per second of all contenders, in turns."""
    names = args.contenders.split(";")
    for shape in args.shapes.split(","):
        *_, windows, length = SHAPES[shape]
        processes = {name: start(name, shape, args) for name in names if name != "nanoGPT" or args.nanogpt}
        rates: dict[str, list[float]] = {}
        for process in processes.values():
            tell(process, 2)  # compiles, all of them at once
        for name, process in list(processes.items()):
            try:
                hear(process)
                rates[name] = []
            except RuntimeError as error:
                print(f"{shape}: {name} is missing: {error}")
                del processes[name]
        for _ in range(args.rounds):
            for name, process in processes.items():
                rates[name].append(args.steps * windows * length / ask(process, args.steps)[0])
        for process in processes.values():
            process.kill()
        print(
            f"{shape}: {windows} x {length} tokens, {args.dtype}, {args.rounds} rounds of {args.steps} updates in turns"
        )
        for name, values in rates.items():
            ratio = ""
            if name != "ours" and "ours" in rates:
                times = statistics.median(a / b for a, b in zip(rates["ours"], values, strict=True))
                ratio = f"; ours is {times:.2f} times as fast"
            print(
                f"  {name:16} {statistics.median(values):10,.0f} tokens/s ({min(values):,.0f} to {max(values):,.0f})"
                + ratio
                + utilisation(shape, statistics.median(values))
            )


def utilisation(shape: str, rate: float) -> str:
    """Model FLOPs utilisation by nanoGPT's formula, on a GPU whose peak is known."""
    if device().type != "cuda" or (peak := peak_flops(torch.cuda.get_device_name())) is None:
        return ""
    config = configuration(shape, 0.0)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in GPT2LMHeadModel(config).parameters())
    return f"; MFU {flops_per_token(config, parameters) * rate / peak:.1%}"


def memory(args: argparse.Namespace) -> None:
    """Peak memory of training GPT-2 small at one window of 1,024 tokens."""
    for name in ("ours", "ours, recomputing", "Trainer", "Trainer, recomputing", "plain fp32 loop"):
        process = start(name, "memory", args)
        _, megabytes = ask(process, 3)
        process.kill()
        print(f"{name:20} {megabytes:8,.0f} MB at the peak, of GPT-2 small at 1 x 1,024 in {args.dtype}", flush=True)


SHAPES["memory"] = (12, 768, 12, 50_005, 1, 1024)


# ---------------------------------------------------------------------------------------------------------------------
# Time to a loss.


def recipe(args: argparse.Namespace) -> None:
    """Train a peer for so many seconds and print what it reaches: lines of seconds and bits per character."""
    began = time.perf_counter()
    folder = Path(args.tokenized)
    manifest = read_manifest(folder)
    assert manifest is not None
    tokenizer = WordTokenizer(read_vocabulary(manifest["vocabulary"]["path"]))
    config = read_config(args.model_config, vocab_size=len(tokenizer))
    dropout = 0.1 if args.contender == "reference" else 0.0
    config.embd_pdrop = config.attn_pdrop = config.resid_pdrop = dropout
    texts = text_of_tokens(tokenizer)
    corpus = read_pieces(folder, vocab_size=len(tokenizer), manifest=manifest, val_fraction=0.01, token_texts=texts)
    documents = Documents(corpus.held_out, config.n_ctx, tokenizer)
    starts = window_starts(corpus.piece_lengths, config.n_ctx, config.n_ctx - 1)
    torch.manual_seed(42)
    model = GPT2LMHeadModel(config).to(device()).train()

    def measure(step: int) -> None:
        figures = evaluate(model, documents, rows=len(tokenizer), batch_size=8, autocast=contextlib.nullcontext)
        seconds = time.perf_counter() - began
        print(f"{json.dumps([seconds, step, figures.bits_per_character])}", flush=True)

    if args.contender == "Trainer":
        from transformers import TrainerCallback

        class Measure(TrainerCallback):
            def on_step_end(self, _: Any, state: Any, control: Any, **__: Any) -> Any:
                if state.global_step % args.every == 0:
                    measure(state.global_step)
                if time.perf_counter() - began > args.seconds:
                    control.should_training_stop = True
                return control

        order = np.concatenate([epoch_order(len(starts), seed=42, epoch=epoch) for epoch in range(20)])
        rows = [
            torch.from_numpy(corpus.tokens[begin : begin + config.n_ctx].astype(np.int64))
            for begin in starts[order[: args.updates * 8]]
        ]
        trainer = make_trainer(
            model,
            [{"input_ids": row, "labels": row} for row in rows],
            tempfile.mkdtemp(),
            per_device_train_batch_size=8,
            max_steps=args.updates,
            learning_rate=args.lr,
            lr_scheduler_type="linear",
            warmup_steps=100,
            torch_compile=True,
            bf16=args.dtype == "bf16",
        )
        trainer.add_callback(Measure())
        trainer.train()
        measure(trainer.state.global_step)
        return

    # The reference's: AdamW, warm-up, a line down to 0 at the end of the time, fp32, eager, batches of 8.
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, eps=1e-6, weight_decay=0.0)
    step = 0
    order = np.empty(0, np.int64)
    while (elapsed := time.perf_counter() - began) < args.seconds:
        if len(order) < 8:
            order = epoch_order(len(starts), seed=42, epoch=step)
        windows, order = starts[order[:8]], order[8:]
        factor = (step + 1) / 100 if step < 100 else 1 - elapsed / args.seconds
        for group in optimizer.param_groups:
            group["lr"] = args.lr * factor
        batch = window_batch(corpus.tokens, windows, config.n_ctx).to(device())
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % args.every == 0:
            measure(step)
    measure(step)


def run_recipe(name: str, args: argparse.Namespace, lr: float, seconds: float, updates: int = 0) -> list[list[float]]:
    command = [sys.executable, __file__, "recipe", "--contender", name, "--lr", str(lr), "--seconds", str(seconds)]
    command += ["--tokenized", args.tokenized, "--dtype", args.dtype, "--updates", str(updates), "--every", "100"]
    command += ["--model_config", args.model_config]
    quiet = None if args.verbose else subprocess.DEVNULL
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=quiet, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


def run_ours(args: argparse.Namespace, goal: float) -> tuple[float, float]:
    """Run train.py; the seconds from its start until a measurement is at the goal, and until its end."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "train.py"), "--tokenized_data_path", args.ours]
        command += [
            "--model_config",
            args.model_config,
            "--output_dir",
            folder,
            "--writer_dir",
            f"{folder}/tensorboard",
        ]
        command += ["--lang", "en", *args.flags.split()]
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        reached = math.inf
        assert process.stdout is not None
        for line in process.stdout:
            if "bits per character" in line:
                value = float(line.split(" bits per character")[0].rsplit(maxsplit=1)[-1])
                print(f"  ours: {time.perf_counter() - began:6.0f} s  {value:.4f}", flush=True)
                if value <= goal:
                    reached = min(reached, time.perf_counter() - began)
        return reached, time.perf_counter() - began


def time_to_loss(args: argparse.Namespace) -> None:
    """Seconds until ours and the Trainer have what the reference's recipe has after `--minutes`."""
    goals = [args.goal] if args.goal else []
    updates = 0
    for lr in [] if args.goal else map(float, args.reference_lrs.split(",")):
        seconds, updates, bits = run_recipe("reference", args, lr, args.minutes * 60)[-1]
        goals.append(bits)
        print(
            f"reference at {lr:g}: {bits:.4f} bits per character after {updates:.0f} updates, {seconds:.0f} s",
            flush=True,
        )
    goal = min(goals)
    reached, whole = run_ours(args, goal)
    if math.isinf(reached):
        print(f"ours: {goal:.4f} not reached in {whole:.0f} s", flush=True)
        return
    print(
        f"ours: {goal:.4f} after {reached:.0f} s of {whole:.0f}, {args.minutes * 60 / reached:.1f} times as fast",
        flush=True,
    )
    for lr in map(float, args.trainer_lrs.split(",") if args.trainer_lrs else []):
        history = run_recipe("Trainer", args, lr, args.minutes * 60, args.trainer_updates or int(updates))
        seconds = next((point[0] for point in history if point[2] <= goal), math.inf)
        print(f"Trainer at {lr:g}: {seconds:.0f} s, {seconds / reached:.1f} times ours; "
              f"{history[-1][2]:.4f} after {history[-1][0]:.0f} s", flush=True)  # fmt: skip


def main() -> None:
    native = "bf16" if is_bf16_fast(device()) else "fp32"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["throughput", "memory", "time-to-loss", "contend", "recipe"])
    parser.add_argument("--nanogpt", default="", help="a checkout of nanoGPT")
    parser.add_argument("--shapes", default="small-gpu" if device().type == "cuda" else "4x256,small")
    peers = "ours;nanoGPT;Trainer;plain fp32 loop"
    parser.add_argument("--contenders", default=peers, help=f"of throughput, among {'; '.join(CONTENDERS)}")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default=native, help="of all but the plain loop")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="updates of a round")
    parser.add_argument("--verbose", action="store_true", help="show what the contenders print")
    # time-to-loss
    parser.add_argument("--tokenized", default="tokenized", help="of the reference and the Trainer")
    parser.add_argument("--ours", default="tokenized", help="of train.py; the same documents")
    parser.add_argument("--flags", default="", help="of train.py")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--model_config", default=str(ROOT / "config" / "model_config_mini.json"))
    parser.add_argument("--goal", type=float, default=0.0, help="bits per character, instead of the reference's run")
    parser.add_argument("--reference_lrs", default="5e-4,1e-3,2e-3")
    parser.add_argument("--trainer_lrs", default="5e-4,1e-3,2e-3")
    parser.add_argument("--trainer_updates", type=int, default=0, help="default: as many as the reference made")
    # of the processes that this starts
    parser.add_argument("--contender", default="")
    parser.add_argument("--shape", default="")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--updates", type=int, default=0)
    parser.add_argument("--every", type=int, default=100)
    args = parser.parse_args()
    if unknown := set(args.contenders.split(";")) - set(CONTENDERS):
        parser.error(f"--contenders: there is no {', '.join(sorted(unknown))}, only {'; '.join(CONTENDERS)}")
    functions = {"throughput": throughput, "memory": memory, "time-to-loss": time_to_loss}
    {**functions, "contend": contend, "recipe": recipe}[args.what](args)


if __name__ == "__main__":
    main()
