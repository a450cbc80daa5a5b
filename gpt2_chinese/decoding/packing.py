"""The forms of weights that compiled_decoder.py multiplies with, as this CPU reads them fastest.

A matrix is divided into panels of PANEL_COLUMNS outputs, whose weights stand in the order in which they are multiplied.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import llvmlite.binding as llvm
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# The last two are bf16 in 12 bits, multiplied as floats or as pairs of bf16.
FP32, BF16, INT8, BF16_FLOATS, BF16_PAIRS = range(5)
CACHE_LINE = 64  # bytes


def _simd_registers() -> tuple[int, int]:
    """Floats in a vector register of this CPU, and rows of a block.

    A block's sums, two vectors a row, stay in registers during a product, and leave some of them for the weights.
    """
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 16, 12
    if features.get("avx2"):
        return 8, 6
    return 4, 12 if features.get("neon") else 6


DOT_PRODUCTS = {"vpdpbusd": 4, "vpmaddwd": 2, "plain": 4}
"""The ways of multiplying 8-bit integers and adding up the products, and the inputs that each multiplies at once."""


def _dot_product(lanes: int) -> str:
    """The fastest of DOT_PRODUCTS on this CPU."""
    features = llvm.get_host_cpu_features()
    if features.get({16: "avx512vnni", 8: "avxvnni"}.get(lanes, "")):
        return "vpdpbusd"
    return "vpmaddwd" if features.get({16: "avx512bw", 8: "avx2", 4: "sse2"}[lanes]) else "plain"


def _multiplies_pairs(lanes: int) -> bool:
    """Whether this CPU multiplies pairs of bf16 and adds up the products in float32, faster than floats.

    Only AMD's Zen 4 was measured: twice as fast. An Intel Xeon with this instruction multiplied bf16 more slowly.
    """
    is_zen = llvm.get_host_cpu_name().startswith("znver")
    return is_zen and lanes == 16 and bool(llvm.get_host_cpu_features().get("avx512bf16"))


def _bf16_form(lanes: int) -> int:
    """The form of bf16 weights that this CPU multiplies fastest.

    Weights of 12 bits are a quarter less to read, and unpacking them takes time: of the CPUs that multiply floats, only
    one with AVX2 and without AVX-512 was measured, AMD's Zen 3.
    """
    if _multiplies_pairs(lanes):
        return BF16_PAIRS
    return BF16_FLOATS if lanes == 8 else BF16


LANES, MAX_BLOCK_ROWS = _simd_registers()
BF16_FORM = _bf16_form(LANES)
PRECISION_CODES = {"fp32": FP32, "bf16": BF16_FORM, "int8": INT8}
DOT_PRODUCT = _dot_product(LANES)
GROUP = DOT_PRODUCTS[DOT_PRODUCT]
"""Inputs of an INT8 product that are multiplied at once."""
GROUP_BYTES = 4
"""Of the codes that stand for a group: 4 of 8 bits, or 2 of 16."""
PANEL_COLUMNS = 2 * LANES
"""Columns of a product that are computed at once; the weights are stored in panels [in_features, PANEL_COLUMNS]."""

NUM_HIGH_BYTES = 16
"""Different high bytes, the sign and most of the exponent, that the weights of a panel may have in 12 bits."""


PACKED_AT_ONCE = 400_000
"""Weights at most that `pack_twelve_bits` gets at a time, so that what it computes with them stays in the cache."""


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A contiguous float32 array."""
    return np.ascontiguousarray(tensor.detach().float().numpy())


def round_up(count: int) -> int:
    """The next multiple of LANES, which fills whole vectors."""
    return -(-count // LANES) * LANES


class PackedWeights(NamedTuple):
    """A matrix in panels."""

    panels: np.ndarray  # bytes
    scales: np.ndarray  # of each output, float32; 1 but for INT8
    weight_sums: np.ndarray  # of each output's packed weights, int32; 0 but for INT8
    high_bytes: np.ndarray  # [panels, NUM_HIGH_BYTES], uint8; 0 but for weights of 12 bits


def pack_weights(weight: Tensor, precision: int) -> PackedWeights:
    """Pack a matrix (out, in) into panels.

    A panel is [in, PANEL_COLUMNS]; for BF16 [in, LANES, 2], with column i beside column LANES + i; for INT8
    [in / GROUP, PANEL_COLUMNS, GROUP]; for the others see `pack_twelve_bits`. The last panel is padded with zeros, and
    for INT8 and BF16_PAIRS the inputs to whole vectors; BF16_FLOATS needs whole vectors.
    """
    out_features, in_features = weight.shape
    panels = -(-out_features // PANEL_COLUMNS)
    scales = torch.ones(panels * PANEL_COLUMNS)
    weight_sums = torch.zeros(panels * PANEL_COLUMNS, dtype=torch.int32)
    high_bytes = np.zeros((panels, NUM_HIGH_BYTES), dtype=np.uint8)
    if precision == INT8:
        scales[:out_features] = (weight.abs().amax(dim=1).float() / 127).clamp_min(torch.finfo(torch.float32).tiny)
    inputs = round_up(in_features) if precision in (INT8, BF16_PAIRS) else in_features
    panel_bytes = PANEL_COLUMNS * inputs * {FP32: 8, BF16: 4, INT8: 2}.get(precision, 3) // 2
    memory = aligned_zeros((panels, panel_bytes))
    full_panels = out_features // PANEL_COLUMNS

    def pack_panels(first: int, last: int, rows: Tensor) -> None:
        columns = slice(first * PANEL_COLUMNS, last * PANEL_COLUMNS)
        if precision == INT8:
            rows = (rows / scales[columns, None][: len(rows)]).round_()
            weight_sums[columns][: len(rows)] = rows.sum(dim=1)  # exact: below 2^24 for 132,000 inputs
        dtype = {FP32: torch.float32, INT8: torch.int8}.get(precision, torch.bfloat16)
        rows = rows.to(dtype)
        padding = inputs - in_features, -len(rows) % PANEL_COLUMNS
        if any(padding):
            rows = F.pad(rows, (0, padding[0], 0, padding[1]))
        if precision in (BF16_FLOATS, BF16_PAIRS):
            words = rows.contiguous().view(torch.int16).unflatten(0, (last - first, PANEL_COLUMNS))
            chunk = max(1, PACKED_AT_ONCE // (PANEL_COLUMNS * inputs))
            for panel in range(first, last, chunk):
                end = min(panel + chunk, last)
                packed = pack_twelve_bits(words[panel - first : end - first], precision)
                memory[panel:end], high_bytes[panel:end] = packed
            return
        if precision == INT8:
            rows = rows.contiguous().view({2: torch.int16, 4: torch.int32}[GROUP])  # inputs that are moved as one
        order = (0, 3, 2, 1) if precision == BF16 else (0, 3, 1, 2)
        packed = rows.unflatten(0, (last - first, 2, LANES)).permute(order)
        torch.from_numpy(memory[first:last]).view(packed.dtype).view(packed.shape).copy_(packed)

    if full_panels:
        pack_panels(0, full_panels, weight[: full_panels * PANEL_COLUMNS])
    if full_panels < panels:
        pack_panels(full_panels, panels, weight[full_panels * PANEL_COLUMNS :])
    return PackedWeights(memory, scales.numpy(), weight_sums.numpy(), high_bytes)


def pack_twelve_bits(words: Tensor, precision: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack panels of bf16 in 12 bits a weight, which nearly all weights survive to the bit.

    The high byte of a bf16 is the sign and most of the exponent. A panel has few of them, but for tiny weights: a table
    of 16 has those of the greatest weights, of 16 powers of two where they are positive and 14 where they are negative,
    and zero. A weight that is smaller becomes the smallest of those or zero, whichever is nearer: a change of at most
    2^-15 of the greatest weight (negative: 2^-13), where rounding to bf16 has changed that one by up to 2^-9.

    Args:
        words: the bf16 as int16 [panels, PANEL_COLUMNS, inputs], whole vectors of inputs.
        precision: BF16_FLOATS or BF16_PAIRS.

    Returns:
        For each panel and each four inputs, two pairs, three vectors of 4 * LANES bytes: the low bytes of the first
        pair, those of the second one, and the places of their high bytes in the table, of the first pair in the low
        half of a byte. The bytes of a vector stand as the CPU interleaves them with others, 8 at a time. For BF16_PAIRS
        these are both inputs of the columns 0 to 3, of LANES to LANES + 3, of 4 to 7 and so on; for BF16_FLOATS the
        first input of the columns 0, LANES, 1, LANES + 1 up to LANES + 3, the second one of the same, then of the
        columns from 4 on. The second array is the tables, uint8 [panels, NUM_HIGH_BYTES].
    """
    half, four_columns, column, four_inputs, pair, input_of_pair = range(1, 7)
    parts = words.unflatten(2, (-1, 2, 2)).unflatten(1, (2, LANES // 4, 4))
    order = (half, column, input_of_pair) if precision == BF16_PAIRS else (input_of_pair, column, half)
    in_order = parts.permute(0, four_inputs, pair, four_columns, *order).contiguous().numpy().view(np.uint8)
    in_order = in_order.reshape(len(words), -1)
    low, high = in_order[:, 0::2].copy(), in_order[:, 1::2].copy()

    magnitudes = high & np.uint8(0x7F)
    greatest = magnitudes.max(axis=1, keepdims=True)
    below = greatest - magnitudes  # each step is two powers of two
    is_negative = high >> np.uint8(7)
    first_dropped = np.uint8(8) - is_negative
    is_kept = below < first_dropped
    codes = np.where(is_kept, below | is_negative << np.uint8(3), np.uint8(NUM_HIGH_BYTES - 1))
    dropped = np.nonzero(~is_kept)
    # Half of the smallest number that is kept, and more, becomes that one.
    is_rounded_up = (below[dropped] == first_dropped[dropped]) & (low[dropped] >= 0x80)
    codes[dropped] = np.where(is_rounded_up, np.where(is_negative[dropped], 14, 7), NUM_HIGH_BYTES - 1)
    low[dropped] = 0

    tables = np.zeros((len(words), NUM_HIGH_BYTES), dtype=np.uint8)
    tables[:, :8] = np.maximum(greatest.astype(np.int64) - np.arange(8), 0)
    tables[:, 8:15] = tables[:, :7] | np.uint8(0x80)
    low, codes = (part.reshape(len(words), -1, 2, 4 * LANES) for part in (low, codes))
    packed = np.concatenate([low, codes[:, :, :1] | codes[:, :, 1:] << np.uint8(4)], axis=2)
    return packed.reshape(len(words), -1), tables


def aligned_zeros(shape: tuple[int, ...]) -> np.ndarray:
    """Zeros, as bytes, that begin with a cache line.

    NumPy asks Linux for huge pages, PyTorch does not; with small ones reading is a third slower.
    """
    memory = np.zeros(math.prod(shape) + CACHE_LINE, dtype=np.uint8)
    begin = -memory.ctypes.data % CACHE_LINE
    return memory[begin:][: math.prod(shape)].reshape(shape)
