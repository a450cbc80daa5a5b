"""Decoding throughput and latency beside transformers, CTranslate2 and a loop without a KV cache like the reference's.

All decode one model in one process, in alternating rounds: GPT-2 small with a vocabulary of 50,005 and random weights,
a prompt of 8 tokens, top-k 30. CTranslate2 is measured if it is installed (`pip install ctranslate2`). On a GPU our
engine uses CUDA graphs, and transformers is measured with its compiled static cache too. Compiling and capturing happen
in a warm-up round:

    .venv-train/bin/python benchmarks/generation.py
    .venv-train/bin/python benchmarks/generation.py --device cuda
    .venv-train/bin/python benchmarks/generation.py --rounds 1 --layers 2 --tokens 5
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


from gpt2_chinese.decoding.completion import Prompt, SamplingParams  # noqa: E402
from gpt2_chinese.decoding.engine import Engine  # noqa: E402
from gpt2_chinese.model_folder import save_model  # noqa: E402
from gpt2_chinese.precision import has_bf16  # noqa: E402
from gpt2_chinese.text.vocabulary import SPECIAL_TOKENS  # noqa: E402
from gpt2_chinese.text.word_tokenizer import WordTokenizer  # noqa: E402

SEP_ID, CLS_ID, MASK_ID, PAD_ID, UNK_ID = range(5)  # as the special tokens stand here
VOCABULARY = [*SPECIAL_TOKENS, *(f"词{number}" for number in range(50_000))]
TOP_K = 30
REFERENCE = "loop without KV cache"
Contender = Callable[[int, int, int], Any]
"""Called with the number of requests, of samples of each, and of tokens of each sample; decodes them."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (%(default)s)")
    parser.add_argument("--layers", type=int, default=12, help="layers of the model; GPT-2 small has 12 (%(default)s)")
    parser.add_argument("--tokens", type=int, default=50, help="tokens of a sample; the latency has 20 (%(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    return parser.parse_args(argv)


def random_model(layers: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(VOCABULARY),
        n_layer=layers,
        bos_token_id=MASK_ID,
        eos_token_id=CLS_ID,
        pad_token_id=PAD_ID,
    )
    config.n_ctx = config.n_positions
    return GPT2LMHeadModel(config).eval()


def prompt_ids() -> list[int]:
    return [MASK_ID, *range(1000, 1007)]


@torch.inference_mode()
def without_kv_cache(model: GPT2LMHeadModel, requests: int, samples: int, tokens: int) -> None:
    """As the reference: one sample after the other, with a forward pass over the whole text for each token."""
    for _ in range(requests * samples):
        ids = torch.tensor([prompt_ids()], device=model.device)
        for _ in range(tokens):
            logits = model(ids, use_cache=False).logits[0, -1]
            best, best_ids = logits.topk(TOP_K)
            index = torch.multinomial(torch.softmax(best, dim=-1), 1)
            ids = torch.cat([ids, best_ids[index][None]], dim=1)
        ids.cpu()  # synchronizes with a GPU


def transformers_contender(model: GPT2LMHeadModel, **options: Any) -> Contender:
    def generate(requests: int, samples: int, tokens: int) -> None:
        inputs = torch.tensor([prompt_ids()] * requests, device=model.device)
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            num_return_sequences=samples,
            do_sample=True,
            top_k=TOP_K,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            **options,
        ).cpu()  # synchronizes with a GPU
        assert output.shape == (requests * samples, len(prompt_ids()) + tokens)

    return generate


def ctranslate2_contender(folder: Path, compute_type: str, threads: int, device: str) -> Contender:
    import ctranslate2

    generator = ctranslate2.Generator(
        str(folder), device=device, compute_type=compute_type, intra_threads=threads, inter_threads=1
    )
    prompt = [VOCABULARY[id_] for id_ in prompt_ids()]

    def generate(requests: int, samples: int, tokens: int) -> None:
        results = generator.generate_batch(
            [prompt] * requests,
            num_hypotheses=samples,
            min_length=tokens,
            max_length=tokens,
            sampling_topk=TOP_K,
            include_prompt_in_result=False,
        )
        assert all(len(ids) == tokens for result in results for ids in result.sequences_ids)

    return generate


def convert_for_ctranslate2(model: GPT2LMHeadModel, folder: Path) -> Path:
    from ctranslate2.converters import TransformersConverter

    save_model(folder / "model", model, WordTokenizer(VOCABULARY), facts={})
    TransformersConverter(str(folder / "model"), trust_remote_code=True).convert(str(folder / "converted"))
    return folder / "converted"


def engine_contender(engine: Engine) -> Contender:
    prompt = Prompt("", tuple(prompt_ids()), 0)
    params = SamplingParams(ignore_eos=True)  # here all samples have the same length

    def generate(requests: int, samples: int, tokens: int) -> None:
        submitted = [
            engine.submit(prompt, samples=samples, length=tokens, sampling_params=params, seed=seed)
            for seed in range(requests)
        ]
        for request in submitted:
            completions = request.future.result()
            assert all(len(completion.ids) == tokens for completion in completions)
            assert not {id_ for completion in completions for id_ in completion.ids} & {MASK_ID, PAD_ID, UNK_ID, CLS_ID}

    return generate


def measure(contenders: dict[str, Contender], rounds: int, work: tuple[int, int, int]) -> dict[str, list[float]]:
    """Seconds of each contender in each round, after a warm-up round; in a round each contender runs once."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, contender in contenders.items():
            if number == 0 and name == REFERENCE:
                continue
            begin = time.perf_counter()
            contender(*work)
            if number:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def show(title: str, seconds: dict[str, list[float]], tokens: int) -> None:
    print(f"\n{title}\n{'':42}{'best':>9}{'median':>9}{'tokens/s':>10}")
    for name, times in seconds.items():
        best, median = min(times), statistics.median(times)
        print(f"{name:42}{best:8.3f}s{median:8.3f}s{tokens / median:10.0f}")
    ours = {name: statistics.median(times) for name, times in seconds.items() if name.startswith("ours")}
    theirs = {name: statistics.median(times) for name, times in seconds.items() if name not in ours}
    fastest = min((name for name in theirs if name != REFERENCE), key=theirs.__getitem__)
    for name, median in ours.items():
        line = f"{name}: {theirs[fastest] / median:.2f} times the fastest of the others ({fastest})"
        if REFERENCE in theirs:
            line += f", {theirs[REFERENCE] / median:.1f} times the {REFERENCE}"
        print(line)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    transformers.logging.set_verbosity_error()
    model = random_model(args.layers)
    tokenizer = WordTokenizer(VOCABULARY)
    threads = torch.get_num_threads()
    device = args.device if args.device == "cpu" else torch.cuda.get_device_name(torch.device(args.device))
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {threads} threads, {device}")
    contenders: dict[str, Contender] = {}
    with tempfile.TemporaryDirectory() as folder:
        if importlib.util.find_spec("ctranslate2") is not None:
            converted = convert_for_ctranslate2(model, Path(folder))
            for compute_type in ("float32", "int8"):
                contenders[f"CTranslate2, {compute_type}"] = ctranslate2_contender(
                    converted, compute_type, threads, args.device
                )
        else:
            print("CTranslate2 is not measured: it is not installed")
        model.to(args.device)
        if args.device == "cpu":
            precisions = ["bf16", "int8", "fp32"]
        else:
            precisions = ["bf16", "fp32"] if has_bf16(model.device) else ["fp32"]
        engines = [Engine(model, tokenizer, max_num_seqs=32, precision=precision) for precision in precisions]
        contenders["transformers generate, fp32"] = transformers_contender(model)
        models = {"fp32": model}
        if has_bf16(model.device):
            models["bf16"] = random_model(args.layers).to(args.device, torch.bfloat16)
            contenders["transformers generate, bf16"] = transformers_contender(models["bf16"])
        else:
            print("transformers in bf16 is not measured: this device has no bf16 instructions and is slower with it")
        if args.device != "cpu":  # compiles for each size, hence only with the faster precision
            name = "bf16" if "bf16" in models else "fp32"
            contenders[f"transformers generate, {name}, static"] = transformers_contender(
                models[name], cache_implementation="static"
            )
        for engine, precision in zip(engines, precisions, strict=True):
            engine.__enter__()
            contenders[f"ours, {precision}"] = engine_contender(engine)
        slow = {REFERENCE: lambda *work: without_kv_cache(model, *work)}
        for title, work, others in (
            (f"5 samples of {args.tokens}", (1, 5, args.tokens), slow),
            (f"32 requests at once, {args.tokens} each", (32, 1, args.tokens), {}),
            ("latency: one sample of 20", (1, 1, 20), slow),
        ):
            requests, samples, tokens = work
            # What is compiled anew for each batch size takes a minute for it, and is left out of the last.
            chosen = {name: one for name, one in contenders.items() if tokens > 20 or not name.endswith("static")}
            show(title, measure({**others, **chosen}, args.rounds, work), requests * samples * tokens)
        for engine in engines:
            engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
