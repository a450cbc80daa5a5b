"""GPT-2 decoding on a processor: our own compiled code over weights packed for it, as fast as the memory delivers them.

A step reads every weight once, whatever the number of rows, so its time is the weights' bytes over the memory's
bandwidth. The weights are kept in 32, 16 or 8 bits (`precision`). The arithmetic is float32, but for products with
weights of 8 bits: their inputs are rounded to 8 bits too, row by row, and many rows, where it is the arithmetic that
limits, take far less time. The code is in decoder_kernel.py, and compiled.py keeps what Numba makes of it on disk.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite.binding as llvm
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2_chinese.compiled import is_cached, load_function
from gpt2_chinese.decoding import sampling
from gpt2_chinese.decoding.decoder import Decoder, Prefix, check_model
from gpt2_chinese.decoding.sampling import CompiledDraw

FP32, BF16, INT8 = range(3)
KINDS = {"fp32": FP32, "bf16": BF16, "int8": INT8}
GELU, RELU = range(2)
ACTIVATIONS = {"gelu_new": GELU, "gelu_pytorch_tanh": GELU, "relu": RELU}


def _registers() -> tuple[int, int]:
    """Floats in a vector register of this processor, and how many rows of two vectors leave room for the weights."""
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 16, 12
    if features.get("avx2"):
        return 8, 6
    return 4, 12 if features.get("neon") else 6


DOT_PRODUCTS = ("vpdpbusd", "vpmaddwd", "plain")


def _dot_product(lanes: int) -> str:
    """By which instruction of this processor bytes are multiplied and added: one of DOT_PRODUCTS, the first is best."""
    features = llvm.get_host_cpu_features()
    if features.get({16: "avx512vnni", 8: "avxvnni"}.get(lanes, "")):
        return "vpdpbusd"
    return "vpmaddwd" if features.get({16: "avx512bw", 8: "avx2", 4: "sse2"}[lanes]) else "plain"


LANES, MAX_ROWS = _registers()
DOT_PRODUCT = _dot_product(LANES)
PANEL = 2 * LANES
"""Columns of a matrix that are computed at once; its weights are stored in panels [inputs, PANEL]."""

PREFILL_ROWS = 96
"""Tokens of a prompt that go through the model at once; more only need more memory."""

COUNTER_BYTES = 64  # a counter has a cache line to itself


class Linear(NamedTuple):
    """Addresses of a matrix and what belongs to it (0: it has none), the number of its inputs and of its outputs."""

    weights: int
    bias: int
    scales: int
    totals: int  # of each output's weights, for INT8
    width: int
    outputs: int


class Layer(NamedTuple):
    """Addresses of a layer's norms (weights, then biases) and of its Linears."""

    norm_1: int
    attention_in: int
    attention_out: int
    norm_2: int
    feed_in: int
    feed_out: int


class Span(NamedTuple):
    """What the codes of a row's inputs stand for, for INT8: float32 and int32, code c is `scale` (c - `zero`)."""

    scale: float
    zero: int


class Model(NamedTuple):
    """Numbers and addresses of a model and its key-value buffers, for the compiled code."""

    n_layer: int
    n_embd: int
    n_head: int
    head_size: int
    head_stride: int  # head_size, filled up to whole vectors
    n_ctx: int
    slots: int
    kind: int
    activation: int
    embedding: int
    positions: int
    layers: int
    norm: int
    head: int
    epsilon: int  # behind it the layers' factors of attention
    keys: int
    values: int


class Call(NamedTuple):
    """Numbers and addresses of a step: what goes in, what comes out, and the memory it works in.

    For INT8 the rows of `inputs` and `wide_inputs` are filled up to whole vectors with zeros, which nobody overwrites.
    """

    rows: int
    tokens: int
    slots: int
    positions: int
    wanted: int  # the rows whose logits are wanted
    wanted_rows: int
    hidden: int
    inputs: int
    wide_inputs: int
    codes: int  # the inputs of a product and the rows' Spans, for INT8
    spans: int
    queries: int
    logits: int
    counters: int
    scratch: int
    scratch_bytes: int
    sched_yield: int
    threads: int


class CompiledDecoder:
    """Like decoder.Decoder, on a processor: the weights of a GPT2LMHeadModel and key-value buffers of `rows` sequences.

    A row's logits are the same to the last bit whatever the other rows hold, however many there are, and whether its
    tokens came by `prefill` or by `step`.

    """

    device = torch.device("cpu")

    def __init__(self, model: Any, rows: int, precision: str = "bf16", threads: int | None = None) -> None:
        """Pack the weights of `model`; it is not needed afterwards.

        Args:
            model: a transformers GPT2LMHeadModel on the CPU.
            rows: sequences at once.
            precision: how the weights are kept: fp32, bf16 (rounded) or int8 (with a factor for each output; the
                inputs of the products are rounded to 8 bits too, each row by itself).
            threads: None takes as many as PyTorch does.

        Raises:
            ValueError: the model has cross-attention, weights that are not finite, or another activation function.
        """
        check_model(model)
        config, body = model.config, model.transformer
        if config.activation_function not in ACTIVATIONS:
            raise ValueError(f"the compiled decoder has no activation function {config.activation_function}")
        self._function = load_step()
        self.rows = rows
        self.n_ctx = min(getattr(config, "n_ctx", config.n_positions), config.n_positions)
        self.vocab_size = model.lm_head.weight.shape[0]
        self.compiled_draw: CompiledDraw | None = CompiledDraw(self.vocab_size)
        self._owned: list[Any] = []  # what the addresses point to
        self.precision = precision
        kind = KINDS[precision]
        n_embd, n_head = config.n_embd, config.n_head
        head_size = n_embd // n_head
        head_stride = round_up(head_size)
        n_inner = config.n_inner or 4 * n_embd

        def kept(array: np.ndarray) -> int:
            self._owned.append(array)
            return int(array.ctypes.data)

        def linear(weight: Tensor, bias: Tensor | None) -> int:
            """`weight` is (out, in)."""
            packed, scales, totals = pack(weight.detach(), kind)
            outputs, width = weight.shape
            padded = np.zeros(-(-outputs // PANEL) * PANEL, dtype=np.float32)
            if bias is not None:
                padded[:outputs] = numbers(bias)
            bias_address = 0 if bias is None else kept(padded)
            fields = Linear(kept(packed), bias_address, kept(scales), kept(totals), width, outputs)
            return kept(np.array(fields, dtype=np.int64))

        def norm(module: Any) -> int:
            return kept(np.concatenate([numbers(module.weight), numbers(module.bias)]))

        def conv(module: Any) -> int:
            return linear(module.weight.t(), module.bias)

        layers = [
            Layer(
                norm(block.ln_1),
                conv(block.attn.c_attn),
                conv(block.attn.c_proj),
                norm(block.ln_2),
                conv(block.mlp.c_fc),
                conv(block.mlp.c_proj),
            )
            for block in body.h
        ]
        head = linear(model.lm_head.weight, None)
        tied = body.wte.weight.data_ptr() == model.lm_head.weight.data_ptr()
        floats = [config.layer_norm_epsilon, *(block.attn.scaling for block in body.h)]
        shape = (len(layers), rows + 1, n_head, self.n_ctx, head_stride)  # the last slot is prefill's
        self.keys, self.values = lazy_zeros(shape), lazy_zeros(shape)
        self._model = np.array(
            Model(
                n_layer=len(layers),
                n_embd=n_embd,
                n_head=n_head,
                head_size=head_size,
                head_stride=head_stride,
                n_ctx=self.n_ctx,
                slots=rows + 1,
                kind=kind,
                activation=ACTIVATIONS[config.activation_function],
                embedding=head if tied else linear(body.wte.weight, None),
                positions=kept(numbers(body.wpe.weight)),
                layers=kept(np.array(layers, dtype=np.int64)),
                norm=norm(body.ln_f),
                head=head,
                epsilon=kept(np.array(floats, dtype=np.float32)),
                keys=kept(self.keys),
                values=kept(self.values),
            ),
            dtype=np.int64,
        )
        threads = threads or torch.get_num_threads()
        most = max(rows, min(PREFILL_ROWS, self.n_ctx))
        scratch = max(MAX_ROWS * PANEL, self.n_ctx + head_stride)
        scratch = -(-scratch // 64) * 64
        self._tokens, self._slots, self._positions, self._wanted = np.zeros((4, most), dtype=np.int64)
        # Claims and results of the phases, then the number of helpers that have left the step.
        self._counters = np.zeros((2 * (3 + 9 * len(layers)) + 1, COUNTER_BYTES // 8), dtype=np.int64)
        self._call = np.array(
            Call(
                rows=0,
                tokens=self._tokens.ctypes.data,
                slots=self._slots.ctypes.data,
                positions=self._positions.ctypes.data,
                wanted=self._wanted.ctypes.data,
                wanted_rows=0,
                hidden=kept(np.zeros((most, n_embd), dtype=np.float32)),
                inputs=kept(np.zeros((most, round_up(n_embd)), dtype=np.float32)),
                wide_inputs=kept(np.zeros((most, round_up(n_inner)), dtype=np.float32)),
                codes=kept(np.zeros((most, round_up(max(n_embd, n_inner))), dtype=np.uint8)),
                spans=kept(np.zeros((most, len(Span._fields)), dtype=np.int32)),
                queries=kept(np.zeros((most, n_head, head_stride), dtype=np.float32)),
                logits=0,
                counters=self._counters.ctypes.data,
                scratch=kept(np.zeros((threads, scratch), dtype=np.float32)),
                scratch_bytes=4 * scratch,
                sched_yield=sched_yield_address(),
                threads=threads,
            ),
            dtype=np.int64,
        )
        self._helpers = ThreadPool(self._work, threads - 1)
        weakref.finalize(self, self._helpers.stop)

    @property
    def _work(self) -> Callable[[int], None]:
        """The step as a function of the thread's number; it does not hold this object."""
        function, model, call, owned = self._function, self._model, self._call, (self._owned, self._counters)
        model_address, call_address = model.ctypes.data, call.ctypes.data

        def work(thread: int, _: Any = (model, call, owned)) -> None:
            function(model_address, call_address, thread)

        return work

    def close(self) -> None:
        """End the helping threads."""
        self._helpers.stop()

    def prefill(self, ids: Sequence[int]) -> Prefix:
        """Run one prompt of 1 to `n_ctx` tokens; the buffers of the rows are not touched."""
        length = len(ids)
        assert 1 <= length <= self.n_ctx
        logits = torch.empty(1, self.vocab_size)
        for start in range(0, length, PREFILL_ROWS):
            stop = min(start + PREFILL_ROWS, length)
            wanted = [stop - start - 1] if stop == length else []
            self._run(ids[start:stop], [self.rows] * (stop - start), range(start, stop), wanted, logits)
        return Prefix(self.keys[:, -1, :, :length].copy(), self.values[:, -1, :, :length].copy(), logits[0], length)

    def prompt_logits(self, ids: Sequence[int]) -> Iterator[Tensor]:
        """The logits behind every token of a prompt, in parts [tokens, V]; the buffers of the rows are not touched."""
        for start in range(0, len(ids), PREFILL_ROWS):
            part = ids[start : start + PREFILL_ROWS]
            logits = torch.empty(len(part), self.vocab_size)
            places = range(len(part))
            self._run(part, [self.rows] * len(part), range(start, start + len(part)), places, logits)
            yield logits

    def prefill_rows(self, prompts: Sequence[tuple[int, Sequence[int]]]) -> Tensor:
        """Run prompts into the buffers of rows, given as (row, ids), all together; give their logits [prompts, V]."""
        tokens = [token for _, ids in prompts for token in ids]
        slots = [row for row, ids in prompts for _ in ids]
        positions = [position for _, ids in prompts for position in range(len(ids))]
        ends = [slot != following for slot, following in zip(slots, [*slots[1:], -1], strict=True)]
        logits = torch.empty(len(prompts), self.vocab_size)
        size = min(PREFILL_ROWS, self.n_ctx)
        done = 0
        for start in range(0, len(tokens), size):
            stop = start + size
            wanted = [place for place, end in enumerate(ends[start:stop]) if end]
            self._run(tokens[start:stop], slots[start:stop], positions[start:stop], wanted, logits[done:])
            done += len(wanted)
        return logits

    def load(self, row: int, prefix: Prefix) -> None:
        """Copy a prefix into a row's buffers."""
        self.keys[:, row, :, : prefix.length] = prefix.keys
        self.values[:, row, :, : prefix.length] = prefix.values

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one row to another."""
        for buffer in (self.keys, self.values):
            buffer[:, target, :, :length] = buffer[:, source, :, :length]

    def step(self, tokens: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Give row i its next token, `tokens[i]`, behind the `lengths[i]` tokens it holds, for the first B rows.

        Returns:
            Logits [B, V] in float32.
        """
        batch = len(tokens)
        assert batch == len(lengths) <= self.rows and max(lengths) < self.n_ctx
        logits = torch.empty(batch, self.vocab_size)
        self._run(tokens, range(batch), lengths, range(batch), logits)
        return logits

    def _run(
        self,
        tokens: Sequence[int],
        slots: Sequence[int],
        positions: Sequence[int],
        wanted: Sequence[int],
        logits: Tensor,
    ) -> None:
        """A step of tokens at positions of slots; the logits of the `wanted` ones go to `logits`."""
        count = len(tokens)
        assert all(0 <= token < self.vocab_size for token in tokens)
        self._helpers.wait_until_idle()
        self._tokens[:count], self._slots[:count], self._positions[:count] = tokens, slots, positions
        self._wanted[: len(wanted)] = wanted
        self._call[Call._fields.index("rows")] = count
        self._call[Call._fields.index("wanted_rows")] = len(wanted)
        self._call[Call._fields.index("logits")] = logits.data_ptr()
        self._counters.fill(0)
        self._helpers.start()
        self._work(0)


class ThreadPool:
    """Threads that take part in every step, and sleep between steps."""

    def __init__(self, work: Callable[[int], None], count: int) -> None:
        self._stopping = False
        self._wake = [threading.Semaphore(0) for _ in range(count)]
        self._busy = [False] * count
        self._threads = [
            threading.Thread(target=self._help, args=(work, number), name=f"decoder-{number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def _help(self, work: Callable[[int], None], number: int) -> None:
        while True:
            self._wake[number].acquire()
            if self._stopping:
                return
            work(number + 1)
            self._busy[number] = False

    def start(self) -> None:
        for number, semaphore in enumerate(self._wake):
            self._busy[number] = True
            semaphore.release()

    def wait_until_idle(self) -> None:
        """A helper that came late may still be looking at the counters of the last step."""
        while any(self._busy):
            time.sleep(0)

    def stop(self) -> None:
        self._stopping = True
        for semaphore in self._wake:
            semaphore.release()
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join()


KERNEL = "gpt2_chinese.decoding.decoder_kernel"
SOURCES = (Path(__file__), Path(__file__).with_name("decoder_kernel.py"))


def load_step() -> Callable[..., None]:
    """The compiled code; see decoder_kernel.step for its arguments."""
    return load_function(KERNEL, SOURCES, arguments=3, keep_lock=False)


def is_decoder_cached() -> bool:
    """Whether the code is on disk already, so that a CompiledDecoder is built without compiling."""
    return is_cached(KERNEL, SOURCES) and is_cached(sampling.KERNEL, sampling.SOURCES)


def fastest_decoder(model: Any, rows: int, precision: str) -> CompiledDecoder | Decoder:
    """A CompiledDecoder, or PyTorch's Decoder in float32 and a note on stderr why.

    Args:
        model: a GPT2LMHeadModel on the CPU.
        rows: sequences at once.
        precision: one of PRECISIONS; "auto" is bf16.

    Raises:
        ValueError: the model has cross-attention, or weights that are not finite.
    """
    check_model(model)
    try:
        return CompiledDecoder(model, rows, "bf16" if precision == "auto" else precision)
    except Exception as error:  # whatever a compiler can come up with: decoding goes on without it, only slower
        print(f"note: decoding with PyTorch in float32, which is slower: {error}", file=sys.stderr)
        return Decoder(model.float(), rows)


def numbers(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().float().numpy())


def lazy_zeros(shape: Sequence[int]) -> np.ndarray:
    """Float32 zeros that take memory, in small pages, only where they are written.

    NumPy's take huge pages: a short text would take the memory of the longest.
    """
    memory = mmap.mmap(-1, 4 * math.prod(shape))
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype=np.float32).reshape(shape)


def round_up(count: int) -> int:
    """To whole vectors."""
    return -(-count // LANES) * LANES


def pack(weight: Tensor, kind: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A matrix (out, in) as panels, the factor of each output (1 but for INT8) and the sum of its packed weights.

    Panels are [inputs, PANEL]; for BF16 as [inputs, LANES, 2]: column i beside column LANES + i; for INT8 as
    [inputs / 4, PANEL, 4]. The last one is filled up with zeros, and so are the inputs to whole vectors for INT8, the
    only kind whose sums (int32) are made.
    """
    outputs, inputs = weight.shape
    panels = -(-outputs // PANEL)
    scales = torch.ones(panels * PANEL)
    totals = torch.zeros(panels * PANEL, dtype=torch.int32)
    if kind == INT8:
        scales[:outputs] = (weight.abs().amax(dim=1).float() / 127).clamp_min(torch.finfo(torch.float32).tiny)
    # Four inputs of INT8 are moved as one number.
    dtype, group = {FP32: (torch.float32, 1), BF16: (torch.bfloat16, 1), INT8: (torch.int32, 4)}[kind]
    groups = round_up(inputs) // group if kind == INT8 else inputs
    # NumPy asks Linux for huge pages, PyTorch does not; with small ones reading is a third slower.
    memory = np.zeros(panels * PANEL * groups * dtype.itemsize, dtype=np.uint8)
    shape = (panels, groups, LANES, 2) if kind == BF16 else (panels, groups, 2, LANES)
    packed = torch.from_numpy(memory).view(dtype).view(shape)
    order = (0, 3, 2, 1) if kind == BF16 else (0, 3, 1, 2)
    whole = outputs // PANEL

    def copy(first: int, last: int, rows: Tensor) -> None:
        if kind == INT8:
            rows = (rows / scales[first * PANEL : last * PANEL, None][: len(rows)]).round_()
            totals[first * PANEL :][: len(rows)] = rows.sum(dim=1)  # exact: below 2^24 for 132,000 inputs
            rows = rows.to(torch.int8).contiguous()
            if inputs % LANES:
                rows = F.pad(rows, (0, groups * group - inputs))
            rows = rows.view(dtype)
        if len(rows) % PANEL:
            rows = torch.cat([rows, rows.new_zeros(-len(rows) % PANEL, groups)])
        packed[first:last] = rows.unflatten(0, (last - first, 2, LANES)).permute(order)

    if whole:
        copy(0, whole, weight[: whole * PANEL])
    if whole < panels:
        copy(whole, panels, weight[whole * PANEL :])
    return memory, scales.numpy(), totals.numpy()


def sched_yield_address() -> int:
    """Address of the system's function that lets another thread run."""
    if sys.platform == "win32":
        function = ctypes.WinDLL("kernel32").SwitchToThread
    else:
        function = ctypes.CDLL(None).sched_yield
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address
