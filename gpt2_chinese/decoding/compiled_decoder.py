"""GPT-2 decoding on a CPU, by compiled code over packed weights, limited by the memory bandwidth.

A decode step reads every weight once, whatever the size of the batch, so its time is the size of the weights over the
memory bandwidth. The weights are kept in 32, 16, 12 or 8 bits (packing.py), keys and values in 32 or 16. The arithmetic
is float32, but for two kinds of products, which take far less time for large batches, where the arithmetic is the
limit: the inputs of those with 8-bit weights are quantized to 8 bits too, row by row; and where the CPU multiplies bf16
fast, the inputs of those with bf16 weights are rounded to bf16. The code is in decoder_kernel.py; compiled.py caches
its machine code.
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

import numpy as np
import torch
from torch import Tensor

from gpt2_chinese.command_line import remark
from gpt2_chinese.compiled import is_cached, load_function
from gpt2_chinese.decoding import batch_sampler, sampling
from gpt2_chinese.decoding.decoder import Decoder, PrefilledPrompt, check_model
from gpt2_chinese.decoding.packing import (
    BF16,
    BF16_FLOATS,
    BF16_PAIRS,
    CACHE_LINE,
    GROUP,
    GROUP_BYTES,
    LANES,
    MAX_BLOCK_ROWS,
    PANEL_COLUMNS,
    PRECISION_CODES,
    aligned_zeros,
    pack_weights,
    round_up,
    to_numpy,
)
from gpt2_chinese.decoding.prefix_cache import PrefixCache, common_length
from gpt2_chinese.decoding.sampling import CompiledSampler

GELU, RELU = range(2)
ACTIVATION_CODES = {"gelu_new": GELU, "gelu_pytorch_tanh": GELU, "relu": RELU}


PREFILL_CHUNK = 96
"""Tokens of a chunked prefill that go through the model at once; more would only need more memory."""

MIN_SHARED_TOKENS = 32
"""Of two prompts that are prefilled together, so that the second one waits for the first to copy them.

To wait is to go through the weights once more, which takes as long as to compute half as many tokens.
"""

MIN_PARALLEL_PRODUCTS = 10_000_000
"""Products of weights and activations of a pass that all threads compute together: about a quarter of a millisecond.

With fewer of them the others wake up when the first one is nearly done, and take a processor from the server for it.
"""

MAX_UNCACHED_TOKENS = 8
"""The prefix cache has no contexts that are shorter than this and take fewer products than MIN_PARALLEL_PRODUCTS.

With a small model these are computed in the time that it takes to look for them; with GPT-2 small every token counts.
"""

COUNTER_BYTES = CACHE_LINE  # so that threads do not share one


class Linear(NamedTuple):
    """The shape of a linear layer and the addresses of its parameters; 0 where it has none."""

    weights: int
    bias: int
    scales: int  # of each output, for INT8
    weight_sums: int  # of each output, for INT8
    high_bytes: int  # of each panel, for weights of 12 bits
    in_features: int
    out_features: int


class Layer(NamedTuple):
    """Addresses of a block's layer norms (weights, then biases) and of its Linears, named as transformers does."""

    ln_1: int
    c_attn: int
    attn_c_proj: int
    ln_2: int
    c_fc: int
    mlp_c_proj: int


class Quantization(NamedTuple):
    """How 8-bit codes stand for the inputs of a row: code c is `scale` (c - `zero_point`); float32 and int32."""

    scale: float
    zero_point: int


class ModelArgs(NamedTuple):
    """Sizes and addresses of a model and its KV cache, for the compiled code."""

    n_layer: int
    n_embd: int
    n_head: int
    head_size: int
    head_stride: int  # head_size, rounded up to whole vectors
    n_ctx: int
    num_slots: int
    precision: int
    activation: int
    wte: int
    wpe: int
    layers: int
    ln_f: int
    lm_head: int
    constants: int  # float32: the epsilon of the layer norms, then the attention scale of each layer
    key_cache: int  # [n_layer, num_slots, n_head, n_ctx, head_stride], float32 for FP32 and otherwise bf16
    value_cache: int  # the same


class StepArgs(NamedTuple):
    """Sizes and addresses of a step: its input, its output and its scratch memory. A row is one token.

    For INT8 the rows of `inputs` and `mlp_inputs` are padded to whole vectors with zeros that are never overwritten.
    For BF16_PAIRS `codes` and `mlp_inputs` are bf16, in blocks [pairs, rows of the block, 2], and `inputs` is not used.
    """

    rows: int
    tokens: int
    slots: int
    positions: int
    logit_rows: int  # the rows whose logits are computed
    num_logit_rows: int
    hidden: int  # the residual stream
    inputs: int  # of the next product, n_embd wide
    mlp_inputs: int  # of the MLP's second product, n_inner wide
    codes: int  # the quantized inputs of the next product for INT8; those of width n_embd for BF16_PAIRS
    quantizations: int  # of its rows
    queries: int
    logits: int
    counters: int
    scratch: int
    scratch_bytes: int  # of each thread
    sched_yield: int
    threads: int


class CompiledDecoder:
    """The interface of decoder.Decoder on a CPU: packed weights and a KV cache of `max_num_seqs` batch slots.

    Batch invariance: the logits of a sequence are the same to the bit whatever the other slots hold, however many there
    are, and whether its tokens came by prefill or by decode steps.
    """

    device = torch.device("cpu")

    def __init__(
        self,
        model: Any,
        max_num_seqs: int,
        precision: str = "bf16",
        threads: int | None = None,
        prefix_cache_bytes: int = 0,
    ) -> None:
        """Pack the weights of `model`, which is not needed afterwards.

        Args:
            model: a transformers GPT2LMHeadModel on the CPU.
            max_num_seqs: batch slots.
            precision: of the weights: fp32, bf16 (rounded; in the `BF16_FORM` of this CPU, which may be 12 bits,
                rounded once more as `pack_twelve_bits` says, for BF16_PAIRS with rounded inputs of the products) or
                int8 (with a scale for each output; the inputs of the products are quantized to 8 bits too, each row by
                itself). Keys and values are bf16 but for fp32.
            threads: as many as PyTorch uses if None.
            prefix_cache_bytes: for the keys and values of former prompts; 0 reuses nothing.

        Raises:
            ValueError: the model has cross-attention, weights that are not finite, or another activation function.
        """
        check_model(model)
        config, body = model.config, model.transformer
        self._weights_of_row = config.n_layer * 12 * config.n_embd**2  # about; n_inner may be another one
        self._weights_of_logits = model.lm_head.weight.numel()
        if config.activation_function not in ACTIVATION_CODES:
            raise ValueError(f"the compiled decoder has no activation function {config.activation_function}")
        self._function = load_decoder_kernel()
        batch_sampler.load_logits_kernel()  # now, and not when the first token is drawn
        self.max_num_seqs = max_num_seqs
        self.n_ctx = min(getattr(config, "n_ctx", config.n_positions), config.n_positions)
        self.vocab_size = model.lm_head.weight.shape[0]
        self.compiled_sampler: CompiledSampler | None = CompiledSampler(self.vocab_size)
        self.precision = precision
        self._precision_code = PRECISION_CODES[precision]
        if self._precision_code == BF16_FLOATS and (config.n_embd % LANES or _n_inner(config) % LANES):
            self._precision_code = BF16  # their inputs, which are no whole vectors, would have to be padded
        self._owned: list[np.ndarray] = []  # the arrays that the addresses point to
        self._allocate_kv_cache(config)
        self.prefix_cache: PrefixCache | None = None
        if prefix_cache_bytes:
            min_tokens = min(MAX_UNCACHED_TOKENS, MIN_PARALLEL_PRODUCTS // self._weights_of_row)
            self.prefix_cache = PrefixCache(self.key_cache, self.value_cache, prefix_cache_bytes, min_tokens)
        self._model_args = self._pack_model(config, body, model.lm_head.weight)
        threads = threads or torch.get_num_threads()
        self._num_threads = threads
        self._allocate_step_buffers(config, threads)
        self._work = self._make_work()
        self._threads = ThreadPool(self._work, threads - 1)
        weakref.finalize(self, self._threads.stop)

    def _address(self, array: np.ndarray) -> int:
        """The address of an array, which is kept for as long as the decoder."""
        self._owned.append(array)
        return int(array.ctypes.data)

    def _allocate_kv_cache(self, config: Any) -> None:
        """Keys and values of all layers and slots, and of one more slot for prompts that are prefilled on their own."""
        head_stride = round_up(config.n_embd // config.n_head)
        shape = (config.n_layer, self.max_num_seqs + 1, config.n_head, self.n_ctx, head_stride)
        dtype = np.float32 if self.precision == "fp32" else np.uint16  # bf16, which NumPy has not
        self.key_cache, self.value_cache = lazy_zeros(shape, dtype), lazy_zeros(shape, dtype)

    def _pack_model(self, config: Any, body: Any, lm_head: Tensor) -> np.ndarray:
        """Pack all weights; return the ModelArgs as an array."""
        precision = self._precision_code
        address = self._address

        def linear(weight: Tensor, bias: Tensor | None) -> int:
            """`weight` is (out, in)."""
            packed = pack_weights(weight.detach(), precision)
            out_features, in_features = weight.shape
            bias_address = 0
            if bias is not None:
                padded = np.zeros(-(-out_features // PANEL_COLUMNS) * PANEL_COLUMNS, dtype=np.float32)
                padded[:out_features] = to_numpy(bias)
                bias_address = address(padded)
            fields = Linear(
                weights=address(packed.panels),
                bias=bias_address,
                scales=address(packed.scales),
                weight_sums=address(packed.weight_sums),
                high_bytes=address(packed.high_bytes),
                in_features=in_features,
                out_features=out_features,
            )
            return address(np.array(fields, dtype=np.int64))

        def layer_norm(module: Any) -> int:
            return address(np.concatenate([to_numpy(module.weight), to_numpy(module.bias)]))

        def conv1d(module: Any) -> int:
            return linear(module.weight.t(), module.bias)

        layers = [
            Layer(
                ln_1=layer_norm(block.ln_1),
                c_attn=conv1d(block.attn.c_attn),
                attn_c_proj=conv1d(block.attn.c_proj),
                ln_2=layer_norm(block.ln_2),
                c_fc=conv1d(block.mlp.c_fc),
                mlp_c_proj=conv1d(block.mlp.c_proj),
            )
            for block in body.h
        ]
        lm_head_address = linear(lm_head, None)
        tied = body.wte.weight.data_ptr() == lm_head.data_ptr()
        constants = [config.layer_norm_epsilon, *(block.attn.scaling for block in body.h)]
        head_size = config.n_embd // config.n_head
        args = ModelArgs(
            n_layer=len(layers),
            n_embd=config.n_embd,
            n_head=config.n_head,
            head_size=head_size,
            head_stride=round_up(head_size),
            n_ctx=self.n_ctx,
            num_slots=self.max_num_seqs + 1,
            precision=precision,
            activation=ACTIVATION_CODES[config.activation_function],
            wte=lm_head_address if tied else linear(body.wte.weight, None),
            wpe=address(to_numpy(body.wpe.weight)),
            layers=address(np.array(layers, dtype=np.int64)),
            ln_f=layer_norm(body.ln_f),
            lm_head=lm_head_address,
            constants=address(np.array(constants, dtype=np.float32)),
            key_cache=address(self.key_cache),
            value_cache=address(self.value_cache),
        )
        return np.array(args, dtype=np.int64)

    def _allocate_step_buffers(self, config: Any, threads: int) -> None:
        """The StepArgs as an array, and what they point to."""
        n_embd, n_head = config.n_embd, config.n_head
        n_inner = _n_inner(config)
        head_stride = round_up(n_embd // n_head)
        max_rows = max(self.max_num_seqs, min(PREFILL_CHUNK, self.n_ctx))
        tile = MAX_BLOCK_ROWS * PANEL_COLUMNS
        if self._precision_code in (BF16_FLOATS, BF16_PAIRS):
            tile += round_up(max(n_embd, n_inner)) // 2 * PANEL_COLUMNS  # the weights of a panel, in bf16
        code_bytes = 2 * round_up(n_embd)
        if self._precision_code != BF16_PAIRS:
            code_bytes = round_up(max(n_embd, n_inner)) * GROUP_BYTES // GROUP
        scratch = max(tile, self.n_ctx + head_stride, round_up(n_embd) + LANES)
        scratch = -(-scratch // 64) * 64
        self._tokens, self._slots, self._positions, self._logit_rows = np.zeros((4, max_rows), dtype=np.int64)
        phases = 1 + 9 * config.n_layer + 2  # the embedding, those of each layer, the final layer norm and the logits
        # Two for each phase: work items taken, and work items finished.
        self._counters = aligned_zeros((2 * phases, COUNTER_BYTES)).view(np.int64)

        def zeros(shape: tuple[int, ...], dtype: type) -> int:
            return self._address(aligned_zeros((*shape[:-1], shape[-1] * np.dtype(dtype).itemsize)))

        args = StepArgs(
            rows=0,
            tokens=self._tokens.ctypes.data,
            slots=self._slots.ctypes.data,
            positions=self._positions.ctypes.data,
            logit_rows=self._logit_rows.ctypes.data,
            num_logit_rows=0,
            hidden=zeros((max_rows, n_embd), np.float32),
            inputs=zeros((max_rows, round_up(n_embd)), np.float32),
            mlp_inputs=zeros((max_rows, round_up(n_inner)), np.float32),
            codes=zeros((max_rows, code_bytes), np.uint8),
            quantizations=zeros((max_rows, len(Quantization._fields)), np.int32),
            queries=zeros((max_rows, n_head, head_stride), np.float32),
            logits=0,
            counters=self._counters.ctypes.data,
            scratch=zeros((threads, scratch), np.float32),
            scratch_bytes=4 * scratch,
            sched_yield=sched_yield_address(),
            threads=threads,
        )
        self._step_args = np.array(args, dtype=np.int64)

    def _make_work(self) -> Callable[[int], None]:
        """The step as a function of the thread's number. It has no reference to this object, which can be freed."""
        function, model_args, step_args = self._function, self._model_args, self._step_args
        buffers = (self._owned, self._tokens, self._slots, self._positions, self._logit_rows, self._counters)
        model_address, step_address = model_args.ctypes.data, step_args.ctypes.data

        def work(thread: int, _: Any = (model_args, step_args, buffers)) -> None:
            function(model_address, step_address, thread)

        return work

    def close(self) -> None:
        """End the threads."""
        self._threads.stop()

    def prefill(self, ids: Sequence[int], *, store: bool = True) -> PrefilledPrompt:
        """Prefill one prompt of 1 to `n_ctx` tokens; the slots do not change.

        Args:
            store: whether the prefix cache keeps the prompt.
        """
        length = len(ids)
        assert 1 <= length <= self.n_ctx
        slot = self.max_num_seqs
        logits = self._prefill_group([(slot, list(ids))], store=store)
        keys, values = (cache[:, slot, :, :length].copy() for cache in (self.key_cache, self.value_cache))
        return PrefilledPrompt(keys, values, logits[0], tuple(ids))

    def prompt_logits(self, ids: Sequence[int]) -> Iterator[Tensor]:
        """The logits after every token of a prompt, in chunks [tokens, V]; the slots do not change."""
        assert len(ids) <= self.n_ctx
        for start in range(0, len(ids), PREFILL_CHUNK):
            part = ids[start : start + PREFILL_CHUNK]
            rows = range(len(part))
            logits = torch.empty(len(part), self.vocab_size)
            self._run(part, [self.max_num_seqs] * len(part), range(start, start + len(part)), rows, logits)
            yield logits

    def tokens_to_prefill(self, ids: Sequence[int]) -> int:
        """How many tokens of a prompt have to be computed now."""
        return len(ids) - self.prefix_cache.match(list(ids)) if self.prefix_cache else len(ids)

    def prefill_batch(self, prompts: Sequence[tuple[int, Sequence[int]]]) -> Tensor:
        """Prefill prompts, given as (slot, ids), into their slots, all together; return their logits [prompts, V].

        With a prefix cache, those that begin like others wait until these are computed.
        """
        texts = [(slot, list(ids)) for slot, ids in prompts]
        if self.prefix_cache is None or len(texts) == 1:
            return self._prefill_group(texts)
        logits = torch.empty(len(texts), self.vocab_size)
        waiting = list(range(len(texts)))
        while waiting:
            group, waiting = self._next_group(texts, waiting)
            logits[group] = self._prefill_group([texts[number] for number in group])
        return logits

    def _next_group(self, texts: Sequence[tuple[int, list[int]]], waiting: list[int]) -> tuple[list[int], list[int]]:
        """Divide the prompts of these numbers into those to compute now, and those that wait for what they share."""
        assert self.prefix_cache is not None
        now: list[int] = []
        later: list[int] = []
        for number in waiting:
            ids = texts[number][1]
            least = self.prefix_cache.match(ids) + MIN_SHARED_TOKENS
            waits = len(ids) > least and any(common_length(texts[other][1], ids) >= least for other in now)
            (later if waits else now).append(number)
        return now, later

    def _prefill_group(self, prompts: Sequence[tuple[int, list[int]]], *, store: bool = True) -> Tensor:
        """Prefill prompts of which none waits for another one; `store` says whether the prefix cache keeps them."""
        cache = self.prefix_cache
        begins = [cache.load(slot, ids) if cache else 0 for slot, ids in prompts]
        logits = self._compute_prompts(prompts, begins)
        if cache and store:
            for slot, ids in prompts:
                cache.store(slot, ids)
        return logits

    def _compute_prompts(self, prompts: Sequence[tuple[int, list[int]]], begins: Sequence[int]) -> Tensor:
        """Compute each prompt from its position in `begins` on; the slot holds what is before. Return the logits."""
        rows = [
            (ids[position], slot, position)
            for (slot, ids), begin in zip(prompts, begins, strict=True)
            for position in range(begin, len(ids))
        ]
        tokens, slots, positions = zip(*rows, strict=True)
        is_last = [slot != following for slot, following in zip(slots, [*slots[1:], -1], strict=True)]
        logits = torch.empty(len(prompts), self.vocab_size)
        chunk = min(PREFILL_CHUNK, self.n_ctx)
        done = 0
        for start in range(0, len(tokens), chunk):
            stop = start + chunk
            logit_rows = [row for row, last in enumerate(is_last[start:stop]) if last]
            self._run(tokens[start:stop], slots[start:stop], positions[start:stop], logit_rows, logits[done:])
            done += len(logit_rows)
        return logits

    def load_prefill(self, slot: int, prefilled: PrefilledPrompt) -> None:
        """Copy the keys and values of a prefilled prompt into a slot."""
        self.key_cache[:, slot, :, : prefilled.length] = prefilled.keys
        self.value_cache[:, slot, :, : prefilled.length] = prefilled.values
        if self.prefix_cache:
            self.prefix_cache.set_tokens(slot, prefilled.ids)

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot to another."""
        if self.prefix_cache:
            self.prefix_cache.copy(source, target, length)
            return
        for cache in (self.key_cache, self.value_cache):
            cache[:, target, :, :length] = cache[:, source, :, :length]

    def step(self, tokens: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """A decode step of the first B slots: append `tokens[i]` to the `lengths[i]` tokens of slot i.

        Returns:
            Logits [B, V] in float32.
        """
        batch = len(tokens)
        assert batch == len(lengths) <= self.max_num_seqs and max(lengths) < self.n_ctx
        logits = torch.empty(batch, self.vocab_size)
        self._run(tokens, range(batch), lengths, range(batch), logits)
        return logits

    def _run(
        self,
        tokens: Sequence[int],
        slots: Sequence[int],
        positions: Sequence[int],
        logit_rows: Sequence[int],
        logits: Tensor,
    ) -> None:
        """The forward pass of tokens at positions of slots; writes the logits of `logit_rows` to `logits`."""
        rows = len(tokens)
        assert all(0 <= token < self.vocab_size for token in tokens)
        if self.prefix_cache:
            self.prefix_cache.add_tokens(tokens, slots, positions)
        self._threads.wait_until_idle()
        self._tokens[:rows], self._slots[:rows], self._positions[:rows] = tokens, slots, positions
        self._logit_rows[: len(logit_rows)] = logit_rows
        self._step_args[StepArgs._fields.index("rows")] = rows
        self._step_args[StepArgs._fields.index("num_logit_rows")] = len(logit_rows)
        self._step_args[StepArgs._fields.index("logits")] = logits.data_ptr()
        self._counters.fill(0)
        products = rows * self._weights_of_row + len(logit_rows) * self._weights_of_logits
        is_parallel = products >= MIN_PARALLEL_PRODUCTS
        self._step_args[StepArgs._fields.index("threads")] = self._num_threads if is_parallel else 1
        if is_parallel:
            self._threads.start()
        self._work(0)


class ThreadPool:
    """Threads that take part in every step, and sleep between steps."""

    def __init__(self, work: Callable[[int], None], count: int) -> None:
        self._stopping = False
        self._wake = [threading.Semaphore(0) for _ in range(count)]
        self._busy = [False] * count
        self._threads = [
            threading.Thread(target=self._loop, args=(work, number), name=f"decoder-{number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def _loop(self, work: Callable[[int], None], number: int) -> None:
        while True:
            self._wake[number].acquire()
            if self._stopping:
                return
            work(number + 1)  # the caller's thread is number 0
            self._busy[number] = False

    def start(self) -> None:
        for number, semaphore in enumerate(self._wake):
            self._busy[number] = True
            semaphore.release()

    def wait_until_idle(self) -> None:
        """Wait for threads that started late and may still read the counters of the last step."""
        while any(self._busy):
            time.sleep(0)

    def stop(self) -> None:
        self._stopping = True
        for semaphore in self._wake:
            semaphore.release()
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join()


KERNEL_MODULE = "gpt2_chinese.decoding.decoder_kernel"
KERNEL_SOURCES = tuple(
    Path(__file__).with_name(f"{name}.py") for name in ("compiled_decoder", "decoder_kernel", "packing")
)


def load_decoder_kernel() -> Callable[..., None]:
    """The compiled code; see decoder_kernel.step for its arguments."""
    return load_function(KERNEL_MODULE, KERNEL_SOURCES, arguments=3, keep_lock=False)


def is_decoder_cached() -> bool:
    """Whether the machine code is cached on disk, so that a CompiledDecoder is built without compiling."""
    kernels = [(module.KERNEL_MODULE, module.KERNEL_SOURCES) for module in (batch_sampler, sampling)]
    return all(is_cached(*kernel) for kernel in [(KERNEL_MODULE, KERNEL_SOURCES), *kernels])


def make_cpu_decoder(
    model: Any, max_num_seqs: int, precision: str, prefix_cache_bytes: int = 0
) -> CompiledDecoder | Decoder:
    """A CompiledDecoder or, with the reason on stderr, PyTorch's Decoder in float32.

    Args:
        model: a GPT2LMHeadModel on the CPU.
        max_num_seqs: batch slots.
        precision: one of PRECISIONS; "auto" is bf16.
        prefix_cache_bytes: see CompiledDecoder.

    Raises:
        ValueError: the model has cross-attention, or weights that are not finite.
    """
    check_model(model)
    try:
        precision = "bf16" if precision == "auto" else precision
        return CompiledDecoder(model, max_num_seqs, precision, prefix_cache_bytes=prefix_cache_bytes)
    except Exception as error:  # whatever a compiler raises: decoding works without it, only slower
        remark(f"note: decoding with PyTorch in float32, which is slower: {error}", file=sys.stderr)
        return Decoder(model.float(), max_num_seqs)


def _n_inner(config: Any) -> int:
    """The width between the products of the MLP."""
    return int(config.n_inner or 4 * config.n_embd)


def lazy_zeros(shape: Sequence[int], dtype: type) -> np.ndarray:
    """Zeros that use memory, in small pages, only where they are written.

    NumPy would ask for huge pages, with which a short sequence uses as much memory as the longest one.
    """
    memory = mmap.mmap(-1, np.dtype(dtype).itemsize * math.prod(shape))
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype=dtype).reshape(shape)


def sched_yield_address() -> int:
    """The address of the operating system's function that lets another thread run."""
    if sys.platform == "win32":
        function = ctypes.WinDLL("kernel32").SwitchToThread
    else:
        function = ctypes.CDLL(None).sched_yield
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address
