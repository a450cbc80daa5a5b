"""The compiled part of compiled_decoder.py: one step of a GPT-2 for many rows, by several threads at once.

Importing this module imports Numba; compiled_decoder.py does so only where the machine code is not cached yet.

A row is one token of a step: the next token of a sequence, or one of a prompt. A step is a list of phases (layer norm,
product with a matrix, attention), and each phase is divided into work items. Every thread goes through all phases,
takes work items as long as there are any, and then waits for those that other threads have taken. So a thread that
starts late, or that the system suspends between two work items, delays no other one.

The result of a row is the same to the bit whatever the other rows are and whichever thread computes it: each output of
a product is one sum in one register, in ascending order of the inputs.

With INT8 weights a product is one of integers: the inputs of a row are quantized to 256 steps between their minimum
and maximum (`quantize_row`), and 8-bit integers are multiplied and added up in 32 bits, exactly, by the instruction
that the CPU has for it. With BF16_PAIRS weights, bf16 in 12 bits, the inputs are rounded to bf16, and an instruction
multiplies two pairs and adds both products to a sum in float32; BF16_FLOATS weights, of 12 bits too, are multiplied in
float32. Keys and values are kept in bf16, but for FP32 weights. All other arithmetic is float32.
"""

# mypy: allow-untyped-defs, disable-error-code="call-arg"
# Numba infers the types of the compiled functions from their calls.

from __future__ import annotations

import platform

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic
from numba.np.unsafe.ndarray import to_fixed_tuple

from gpt2_chinese.decoding.compiled_decoder import COUNTER_BYTES, RELU, Layer, Linear, ModelArgs, Quantization, StepArgs
from gpt2_chinese.decoding.packing import (
    BF16,
    BF16_FLOATS,
    BF16_FORM,
    BF16_PAIRS,
    CACHE_LINE,
    DOT_PRODUCT,
    DOT_PRODUCTS,
    FP32,
    GROUP,
    GROUP_BYTES,
    INT8,
    LANES,
    MAX_BLOCK_ROWS,
    NUM_HIGH_BYTES,
    PANEL_COLUMNS,
)


class BFloat(ir.types.Type):
    """LLVM's type of bf16, which llvmlite has no class for."""

    def _to_string(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, BFloat)

    def __hash__(self):
        return hash(BFloat)


BFLOAT = BFloat()
FLOAT, INT64, INT32, INT16, BYTE = ir.FloatType(), ir.IntType(64), ir.IntType(32), ir.IntType(16), ir.IntType(8)
VECTOR, WORDS = ir.VectorType(FLOAT, LANES), ir.VectorType(INT32, LANES)
PAIRS = ir.VectorType(BFLOAT, 2 * LANES)
SHORTS, BYTES = ir.VectorType(INT16, 2 * LANES), ir.VectorType(BYTE, 4 * LANES)
PAIR = 2  # inputs of BF16_PAIRS that are multiplied at once, in 4 bytes too
PACKED_STEP_BYTES = 3 * 4 * LANES  # of a panel in 12 bits, for two pairs of inputs
MAX_CODE = 255  # of a quantized input
PREFETCH_BYTES = 8192  # ahead in the weights: the CPU's own prefetcher stops at the end of a page
SPINS_BEFORE_YIELD = 2000  # reads of a counter, some tens of microseconds
MAX_PANELS = 8  # of a work item
MAX_PARTS = 8  # of a block's columns; two threads were measured
MAX_VECTORS = 4  # of a head, at once in attention
TO_MLP_INPUTS, TO_QKV, TO_HIDDEN, TO_LOGITS = range(4)  # where the result of a product is stored
MODEL_FIELDS, STEP_FIELDS, LAYER_FIELDS = len(ModelArgs._fields), len(StepArgs._fields), len(Layer._fields)
QUANTIZATION_BYTES, ZERO_POINT_OFFSET = 4 * len(Quantization._fields), 4 * Quantization._fields.index("zero_point")

compiled = njit(error_model="numpy", fastmath={"contract"})
# Here the compiler may reorder sums. It does so once, in the same way for every number of rows.
compiled_reassociating = njit(error_model="numpy", fastmath={"contract", "reassoc", "nsz"})


# LLVM instructions that Python has no words for.


def _pointer(builder, address, kind, offset=0):
    return builder.inttoptr(builder.add(address, INT64(offset)), ir.PointerType(kind))


def _load(builder, address, kind, offset=0, align=4):
    return builder.load(_pointer(builder, address, kind, offset), align=align)


def _constant(kind, value):
    return ir.Constant(kind, [value] * kind.count)


def _intrinsic(builder, name, result, *arguments):
    return builder.module.declare_intrinsic(name, (), ir.FunctionType(result, arguments))


def _broadcast(builder, value):
    """A vector whose elements all are this float or int32."""
    kind = ir.VectorType(value.type, LANES)
    first = builder.insert_element(kind(ir.Undefined), value, INT32(0))
    return builder.shuffle_vector(first, kind(ir.Undefined), _constant(WORDS, 0))


def _store(builder, vectors, address):
    """Store vectors of LANES numbers of 4 bytes, one after the other."""
    for number, value in enumerate(vectors):
        builder.store(value, _pointer(builder, address, value.type, 4 * LANES * number), align=4)


def _pointer_to(kind):
    """A function that turns an address into a pointer to numbers of this type."""

    @intrinsic
    def pointer(_, address):
        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), generate

    return pointer


float32_at, uint32_at, uint16_at, int8_at, uint8_at, int64_at, float64_at = map(
    _pointer_to, (types.float32, types.uint32, types.uint16, types.int8, types.uint8, types.int64, types.float64)
)


@intrinsic
def float_from_bits(_, bits):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], FLOAT)

    return types.float32(types.int32), generate


@intrinsic
def square_root(_, x):
    def generate(context, builder, signature, arguments):
        return builder.call(_intrinsic(builder, "llvm.sqrt.f32", FLOAT, FLOAT), arguments)

    return types.float32(types.float32), generate


@intrinsic
def atomic_fetch_add_one(_, address):
    def generate(context, builder, signature, arguments):
        return builder.atomic_rmw("add", _pointer(builder, arguments[0], INT64), INT64(1), "acq_rel")

    return types.int64(types.int64), generate


@intrinsic
def atomic_load(_, address):
    def generate(context, builder, signature, arguments):
        return builder.load_atomic(_pointer(builder, arguments[0], INT64), "acquire", 8)

    return types.int64(types.int64), generate


@intrinsic
def pause(_):
    """Tell the CPU that this is a spin loop."""

    def generate(context, builder, signature, arguments):
        if platform.machine().lower() in ("x86_64", "amd64"):
            builder.call(_intrinsic(builder, "llvm.x86.sse2.pause", ir.VoidType()), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def call_function(_, address):
    """Call a C function without arguments, and ignore its result."""

    def generate(context, builder, signature, arguments):
        builder.call(builder.inttoptr(arguments[0], ir.PointerType(ir.FunctionType(INT32, []))), [])
        return context.get_dummy_value()

    return types.void(types.int64), generate


# The inner loops, as vector instructions. Each is generated for every number of registers that it may use.


def _loop(builder, name, length, carried, body):
    """`for index in range(length)`, at least once; `body(*values)` returns the next values of what is `carried`.

    Returns:
        The carried values after the loop.
    """
    before = builder.block
    loop, end = builder.append_basic_block(name), builder.append_basic_block(f"{name}_end")
    builder.branch(loop)
    builder.position_at_end(loop)
    carried = [INT64(0), *carried]
    values = [builder.phi(value.type) for value in carried]
    following = [builder.add(values[0], INT64(1)), *body(*values[1:])]
    for value, first, following_value in zip(values, carried, following, strict=True):
        value.add_incoming(first, before)
        value.add_incoming(following_value, builder.block)
    builder.cbranch(builder.icmp_signed("<", following[0], length), loop, end)
    builder.position_at_end(end)
    return following[1:]


def _switch_on_count(builder, count, largest, generate):
    """Generate code for every count from 1 to `largest`, and the switch to that of `count`."""
    entry, end = builder.block, builder.append_basic_block("done")
    cases = []
    for number in range(1, largest + 1):
        cases.append(builder.append_basic_block(f"case{number}"))
        builder.position_at_end(cases[-1])
        generate(number)
        builder.branch(end)
    builder.position_at_end(entry)
    switch = builder.switch(count, end)
    for number, case in enumerate(cases, start=1):
        switch.add_case(INT64(number), case)
    builder.position_at_end(end)


def _load_panel_row(builder, precision, address):
    """The weights of one input in a panel of FP32 or BF16, as two vectors of float."""
    if precision == FP32:
        return [_load(builder, address, VECTOR, 4 * LANES * half) for half in range(2)]
    return _both_halves(builder, _load(builder, address, WORDS))


def _both_halves(builder, words):
    """Words of two bf16, the low half one in the left half of the panel, the high half one in the right half, as two
    vectors of float.
    """
    parts = builder.shl(words, _constant(WORDS, 16)), builder.and_(words, _constant(WORDS, 0xFFFF0000))
    return [builder.bitcast(part, VECTOR) for part in parts]


def _prefetch(builder, pointer):
    """Prefetch a cache line, to be read, into the second cache."""
    kinds = ir.PointerType(BYTE), INT32, INT32, INT32
    function = _intrinsic(builder, "llvm.prefetch.p0", ir.VoidType(), *kinds)
    builder.call(function, [pointer, INT32(0), INT32(2), INT32(1)])


def _panel_loop(builder, input_words, panel, inputs, step_bytes, sums, accumulate):
    """The sums of a block of rows over a panel, two vectors a row.

    `panel` is (address of the weights, number of steps, near, far); `_make_multiply` describes the last two. A step
    takes `step_bytes` of weights and `input_words` words of 4 bytes of inputs; `accumulate(weights, inputs, sums)`
    returns the sums after it.
    """
    weights, length, near, far = panel
    boundary = builder.sub(builder.add(weights, builder.mul(length, INT64(step_bytes))), near)
    to_far = builder.sub(far, boundary)

    def body(weights, inputs, *sums):
        distance = builder.select(builder.icmp_signed("<", weights, boundary), near, to_far)
        for offset in range(0, step_bytes, CACHE_LINE):
            _prefetch(builder, _pointer(builder, builder.add(weights, distance), BYTE, offset))
        new = accumulate(weights, inputs, sums)
        return [builder.add(weights, INT64(step_bytes)), builder.add(inputs, INT64(4 * input_words)), *new]

    return _loop(builder, f"multiply{input_words}", length, [weights, inputs, *sums], body)[2:]


def _multiply_add_floats(builder, inputs, rows, halves, sums):
    """Add to the sums of each row, two vectors, the products of its float32 input with those of each column."""
    multiply_add = _intrinsic(builder, f"llvm.fmuladd.v{LANES}f32", VECTOR, VECTOR, VECTOR, VECTOR)
    new = []
    for row in range(rows):
        value = _broadcast(builder, _load(builder, inputs, FLOAT, 4 * row))
        new += [builder.call(multiply_add, [value, halves[half], sums[2 * row + half]]) for half in range(2)]
    return new


def _make_multiply(precision):
    """`multiply(rows, weights, inputs, length, tile, near, far)`: a block of rows times one panel, in FP32 or BF16.

    `weights` is the address of the panel, `inputs` that of float32 [length, rows], `tile` that of the results, float32
    [rows, PANEL_COLUMNS]. Weights are prefetched from `near` bytes ahead; past the end of the panel, from `far` on.
    """

    @intrinsic
    def multiply(_, rows, weights, inputs, length, tile, near, far):
        def generate(context, builder, signature, arguments):
            rows, weights, inputs, length, tile, near, far = arguments

            def case(count):
                def accumulate(weights, inputs, sums):
                    halves = _load_panel_row(builder, precision, weights)
                    return _multiply_add_floats(builder, inputs, count, halves, sums)

                zeros = [_constant(VECTOR, 0.0)] * (2 * count)
                step_bytes = PANEL_COLUMNS * (4 if precision == FP32 else 2)
                sums = _panel_loop(builder, count, (weights, length, near, far), inputs, step_bytes, zeros, accumulate)
                _store(builder, sums, tile)

            _switch_on_count(builder, rows, MAX_BLOCK_ROWS, case)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    return multiply


multiply_fp32, multiply_bf16 = map(_make_multiply, (FP32, BF16))


def _dot_products(builder, name, codes, weights, sums):
    """Add to each int32 of two vectors the products of the codes (0 to 255) of a group and the weights (-127 to 127) of
    its lane.

    `codes` is an int32 of 4 bytes or 2 words, `weights` are two vectors of as many. `name` is one of DOT_PRODUCTS.
    """
    if name == "vpdpbusd":
        # One instruction: https://www.intel.com/content/www/us/en/docs/intrinsics-guide/, _mm512_dpbusd_epi32.
        dot = _intrinsic(builder, f"llvm.x86.avx512.vpdpbusd.{32 * LANES}", WORDS, WORDS, BYTES, BYTES)
        value = builder.bitcast(_broadcast(builder, codes), BYTES)
        return [builder.call(dot, [total, value, part]) for total, part in zip(sums, weights, strict=True)]
    if name == "vpmaddwd":
        # It multiplies 16-bit integers and adds two products.
        instruction = {4: "sse2.pmadd.wd", 8: "avx2.pmadd.wd", 16: "avx512.pmaddw.d.512"}[LANES]
        dot = _intrinsic(builder, f"llvm.x86.{instruction}", WORDS, SHORTS, SHORTS)
        value = builder.bitcast(_broadcast(builder, codes), SHORTS)
        products = [builder.call(dot, [value, part]) for part in weights]
        return [builder.add(total, product) for total, product in zip(sums, products, strict=True)]
    new = []
    for total, part in zip(sums, weights, strict=True):
        whole = builder.bitcast(part, WORDS)
        for byte in range(4):
            left = _constant(WORDS, 24 - 8 * byte)
            weight = builder.ashr(builder.shl(whole, left), _constant(WORDS, 24))
            value = builder.and_(builder.lshr(codes, INT32(8 * byte)), INT32(0xFF))
            total = builder.add(total, builder.mul(_broadcast(builder, value), weight))
        new.append(total)
    return new


def make_multiply_int8(name):
    """`multiply(rows, weights, codes, groups, tile, near, far, quantizations, scales, weight_sums)`: the same for INT8.

    The panel is int8 [groups, PANEL_COLUMNS, group] with a group as DOT_PRODUCTS says, `codes` uint8 [groups, rows,
    group], or int16 where a group has two inputs. `quantizations` are those of the rows, `scales` (float32) and
    `weight_sums` (int32) are [PANEL_COLUMNS]. An output is

        row's scale * output's scale * (sum of code * weight - zero point * sum of the weights),

    and the bracket is exact. `name` is the instruction that computes it, see `_dot_products`.
    """
    group = DOT_PRODUCTS[name]
    groups_of_step = 4 // group  # so that a step takes whole cache lines with any vectors but the shortest
    group_weights = ir.VectorType(BYTE, group * LANES)  # of half a panel

    @intrinsic
    def multiply(_, rows, weights, codes, groups, tile, near, far, quantizations, scales, weight_sums):
        def generate(context, builder, signature, arguments):
            rows, weights, codes, groups, tile, near, far, quantizations, scales, weight_sums = arguments

            def case(count):
                def accumulate(weights, codes, sums):
                    for number in range(groups_of_step):
                        address = builder.add(weights, INT64(number * group * PANEL_COLUMNS))
                        parts = [_load(builder, address, group_weights, group * LANES * i, align=1) for i in range(2)]
                        if group == 2:
                            parts = [builder.sext(part, SHORTS) for part in parts]
                        new = []
                        for row in range(count):
                            value = _load(builder, codes, INT32, GROUP_BYTES * (number * count + row))
                            new += _dot_products(builder, name, value, parts, sums[2 * row : 2 * row + 2])
                        sums = new
                    return sums

                initial, halves = [], range(2)
                totals = [_load(builder, weight_sums, WORDS, 4 * LANES * half) for half in halves]
                for row in range(count):
                    zero_point = _load(builder, quantizations, INT32, QUANTIZATION_BYTES * row + ZERO_POINT_OFFSET)
                    minus_zero_point = _broadcast(builder, builder.neg(zero_point))
                    initial += [builder.mul(minus_zero_point, totals[half]) for half in halves]
                panel = weights, builder.udiv(groups, INT64(groups_of_step)), near, far
                words = groups_of_step * count
                sums = _panel_loop(builder, words, panel, codes, 4 * PANEL_COLUMNS, initial, accumulate)
                output_scales = [_load(builder, scales, VECTOR, 4 * LANES * half) for half in halves]
                outputs = []
                for row in range(count):
                    scale = _broadcast(builder, _load(builder, quantizations, FLOAT, QUANTIZATION_BYTES * row))
                    for half in halves:
                        exact = builder.sitofp(sums[2 * row + half], VECTOR)
                        outputs.append(builder.fmul(exact, builder.fmul(scale, output_scales[half])))
                _store(builder, outputs, tile)

            _switch_on_count(builder, rows, MAX_BLOCK_ROWS, case)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 10), generate

    return multiply


multiply_int8 = make_multiply_int8(DOT_PRODUCT)


def _interleaved(builder, low, high, half):
    """Bytes of `low` and `high` in turns: of each 16 bytes the first 8 of both (`half` 0), or the last 8 (1); WORDS."""
    order = []
    for lane in range(0, 4 * LANES, 16):
        for byte in range(lane + 8 * half, lane + 8 * half + 8):
            order += [byte, 4 * LANES + byte]
    mixed = builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(INT32, 4 * LANES), order))
    return builder.bitcast(mixed, WORDS)


def _dot_pairs(builder, inputs, rows, halves, sums):
    """Add to the sums of each row, two vectors, the products of a pair of its inputs with that of each column.

    `halves` are two vectors of such pairs, as WORDS.
    """
    # https://www.intel.com/content/www/us/en/docs/intrinsics-guide/, _mm512_dpbf16_ps.
    name = f"llvm.x86.avx512bf16.dpbf16ps.{32 * LANES}"
    dot = _intrinsic(builder, name, VECTOR, VECTOR, PAIRS, PAIRS)
    halves = [builder.bitcast(half, PAIRS) for half in halves]
    new = []
    for row in range(rows):
        value = builder.bitcast(_broadcast(builder, _load(builder, inputs, INT32, 4 * row)), PAIRS)
        new += [builder.call(dot, [sums[2 * row + half], value, halves[half]]) for half in range(2)]
    return new


def _make_multiply_packed(precision, keeps):
    """`multiply_packed(rows, weights, inputs, length, tile, near, far, high_bytes, unpacked)`: a block of rows times
    one panel of 12 bits, BF16_FLOATS or BF16_PAIRS; arguments as of `multiply`.

    `inputs` is float32 [length, rows] or, for BF16_PAIRS, bf16 [length / 2, rows, PAIR]; the panel is as
    `pack_twelve_bits` has made it, and `high_bytes` is the address of its table. If it `keeps` the weights, they are
    stored at `unpacked` in 16 bits: as those of BF16, or [length / 2, PANEL_COLUMNS, PAIR].
    """

    @intrinsic
    def multiply_packed(_, rows, weights, inputs, length, tile, near, far, high_bytes, unpacked):
        def generate(context, builder, signature, arguments):
            rows, weights, inputs, length, tile, near, far, high_bytes, unpacked = arguments
            nibble, four = _constant(BYTES, 15), _constant(SHORTS, 4)
            words = 2 if precision == BF16_PAIRS else 4  # of 4 bytes that a row has of four inputs

            def case(count):
                instruction = {8: "avx2.pshuf.b", 16: "avx512.pshuf.b.512"}[LANES]
                look_up = _intrinsic(builder, f"llvm.x86.{instruction}", BYTES, BYTES, BYTES)
                sixteen = _load(builder, high_bytes, ir.VectorType(BYTE, NUM_HIGH_BYTES), align=1)
                everywhere = ir.Constant(ir.VectorType(INT32, 4 * LANES), list(range(16)) * (LANES // 4))
                table = builder.shuffle_vector(sixteen, sixteen, everywhere)

                def accumulate(weights, inputs, carried):
                    *sums, target = carried
                    numbers = _load(builder, weights, BYTES, 2 * 4 * LANES, align=1)
                    shifted = builder.bitcast(builder.lshr(builder.bitcast(numbers, SHORTS), four), BYTES)
                    for pair, part in enumerate((numbers, shifted)):
                        high = builder.call(look_up, [table, builder.and_(part, nibble)])
                        low = _load(builder, weights, BYTES, pair * 4 * LANES, align=1)
                        unpacked_pair = [_interleaved(builder, low, high, half) for half in range(2)]
                        if keeps:
                            _store(builder, unpacked_pair, builder.add(target, INT64(pair * 4 * PANEL_COLUMNS)))
                        address = builder.add(inputs, INT64(4 * words // 2 * pair * count))
                        if precision == BF16_PAIRS:
                            sums = _dot_pairs(builder, address, count, unpacked_pair, sums)
                            continue
                        for number, of_one_input in enumerate(unpacked_pair):
                            of_row = builder.add(address, INT64(4 * number * count))
                            halves = _both_halves(builder, of_one_input)
                            sums = _multiply_add_floats(builder, of_row, count, halves, sums)
                    return [*sums, builder.add(target, INT64(2 * 4 * PANEL_COLUMNS))]

                carried = [_constant(VECTOR, 0.0)] * (2 * count) + [unpacked]
                panel = weights, builder.lshr(length, INT64(2)), near, far
                carried = _panel_loop(builder, words * count, panel, inputs, PACKED_STEP_BYTES, carried, accumulate)
                _store(builder, carried[:-1], tile)

            if precision in (BF16_FLOATS, BF16_PAIRS):
                _switch_on_count(builder, rows, MAX_BLOCK_ROWS, case)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), generate

    return multiply_packed


multiply_packed, multiply_and_keep_packed = (_make_multiply_packed(BF16_FORM, keeps) for keeps in (False, True))


@intrinsic
def multiply_kept_pairs(_, rows, weights, inputs, pairs, tile, near, far):
    """The same with the weights that `multiply_and_keep_packed` has kept, for BF16_PAIRS."""

    def generate(context, builder, signature, arguments):
        rows, weights, inputs, pairs, tile, near, far = arguments

        def case(count):
            def accumulate(weights, inputs, sums):
                halves = [_load(builder, weights, WORDS, 4 * LANES * half) for half in range(2)]
                return _dot_pairs(builder, inputs, count, halves, sums)

            zeros = [_constant(VECTOR, 0.0)] * (2 * count)
            panel = weights, pairs, near, far
            _store(builder, _panel_loop(builder, count, panel, inputs, 4 * PANEL_COLUMNS, zeros, accumulate), tile)

        if BF16_FORM == BF16_PAIRS:
            _switch_on_count(builder, rows, MAX_BLOCK_ROWS, case)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), generate


def _make_panel_operation(operation):
    """A function (target, source) of addresses: the PANEL_COLUMNS float32 at `source`, added to those at `target`
    ("add"), copied there ("copy"), or rounded there to bf16, to the nearest, or of two to the even one ("round").

    Written as vectors, since the compiler does not know that the two do not overlap.
    """

    @intrinsic
    def panel_operation(_, target, source):
        def generate(context, builder, signature, arguments):
            target, source = arguments
            for half in range(2):
                value = _load(builder, source, VECTOR, 4 * LANES * half)
                if operation == "round":
                    bits = builder.bitcast(value, WORDS)
                    even = builder.and_(builder.lshr(bits, _constant(WORDS, 16)), _constant(WORDS, 1))
                    bits = builder.add(builder.add(bits, _constant(WORDS, 0x7FFF)), even)
                    kind = ir.VectorType(INT16, LANES)
                    value = builder.trunc(builder.lshr(bits, _constant(WORDS, 16)), kind)
                    builder.store(value, _pointer(builder, target, kind, 2 * LANES * half), align=2)
                    continue
                if operation == "add":
                    value = builder.fadd(_load(builder, target, VECTOR, 4 * LANES * half), value)
                builder.store(value, _pointer(builder, target, VECTOR, 4 * LANES * half), align=4)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return panel_operation


add_panel, copy_panel, round_panel = map(_make_panel_operation, ("add", "copy", "round"))


@intrinsic
def round_to_pairs(_, numbers, vectors, pairs, stride):
    """Round so many vectors of float32 to bf16; a pair is stored at `pairs`, the next one `stride` bytes further."""

    def generate(context, builder, signature, arguments):
        numbers, vectors, pairs, stride = arguments

        def body(numbers, pairs):
            value = builder.fptrunc(_load(builder, numbers, VECTOR), ir.VectorType(BFLOAT, LANES))
            value = builder.bitcast(value, ir.VectorType(INT32, LANES // PAIR))
            for number in range(LANES // PAIR):
                builder.store(builder.extract_element(value, INT32(number)), _pointer(builder, pairs, INT32), align=4)
                pairs = builder.add(pairs, stride)
            return [builder.add(numbers, INT64(4 * LANES)), pairs]

        if BF16_FORM == BF16_PAIRS:
            _loop(builder, "round", vectors, [numbers, pairs], body)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@intrinsic
def min_max(_, numbers, vectors, target):
    """Store the minimum and the maximum of 0 and so many vectors of float32 at `target`."""

    def generate(context, builder, signature, arguments):
        numbers, vectors, target = arguments
        names = "min", "max"
        minimum, maximum = (
            _intrinsic(builder, f"llvm.{name}num.v{LANES}f32", VECTOR, VECTOR, VECTOR) for name in names
        )

        def body(numbers, low, high):
            value = _load(builder, numbers, VECTOR)
            low, high = builder.call(minimum, [value, low]), builder.call(maximum, [value, high])
            return [builder.add(numbers, INT64(4 * LANES)), low, high]

        zeros = [_constant(VECTOR, 0.0)] * 2
        results = _loop(builder, "min_max", vectors, [numbers, *zeros], body)[1:]
        for number, (name, result) in enumerate(zip(names, results, strict=True)):
            reduce = _intrinsic(builder, f"llvm.vector.reduce.f{name}.v{LANES}f32", FLOAT, VECTOR)
            builder.store(builder.call(reduce, [result]), _pointer(builder, target, FLOAT, 4 * number), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


@intrinsic
def quantize_vectors(_, numbers, vectors, inverse_scale, zero_point, codes, stride):
    """So many vectors of float32 times `inverse_scale`, plus `zero_point`, rounded and clamped to codes from 0 to 255.

    GROUP codes, GROUP_BYTES together, are stored beside each other at `codes`, the next ones `stride` bytes further.
    """

    def generate(context, builder, signature, arguments):
        numbers, vectors, inverse_scale, zero_point, codes, stride = arguments
        multiply_add = _intrinsic(builder, f"llvm.fmuladd.v{LANES}f32", VECTOR, VECTOR, VECTOR, VECTOR)
        # Plus 0.5: the conversion to integers truncates, and what it truncates here is not negative.
        factor = _broadcast(builder, inverse_scale)
        offset = _broadcast(builder, builder.fadd(zero_point, FLOAT(0.5)))
        lowest, highest = _constant(WORDS, 0), _constant(WORDS, MAX_CODE)

        def body(numbers, codes):
            value = builder.call(multiply_add, [_load(builder, numbers, VECTOR), factor, offset])
            value = builder.fptosi(value, WORDS)
            value = builder.select(builder.icmp_signed("<", value, lowest), lowest, value)
            value = builder.select(builder.icmp_signed(">", value, highest), highest, value)
            value = builder.trunc(value, ir.VectorType(ir.IntType(8 * GROUP_BYTES // GROUP), LANES))
            value = builder.bitcast(value, ir.VectorType(INT32, LANES // GROUP))
            for number in range(LANES // GROUP):
                group = builder.extract_element(value, INT32(number))
                builder.store(group, _pointer(builder, codes, INT32), align=4)
                codes = builder.add(codes, stride)
            return [builder.add(numbers, INT64(4 * LANES)), codes]

        _loop(builder, "quantize", vectors, [numbers, codes], body)
        return context.get_dummy_value()

    arguments = types.int64, types.int64, types.float32, types.float32, types.int64, types.int64
    return types.void(*arguments), generate


def _load_cached(builder, precision, address, number):
    """A vector of keys or values of the KV cache, as float32."""
    if precision == FP32:
        return _load(builder, address, VECTOR, 4 * LANES * number)
    half = _load(builder, address, ir.VectorType(INT16, LANES), 2 * LANES * number, align=2)
    return builder.bitcast(builder.shl(builder.zext(half, WORDS), _constant(WORDS, 16)), VECTOR)


def _prefetch_cached(builder, precision, address, vectors):
    """Prefetch so many vectors of keys or values."""
    for offset in range(0, vectors * LANES * (4 if precision == FP32 else 2), CACHE_LINE):
        _prefetch(builder, _pointer(builder, address, BYTE, offset))


def _make_add_scores(precision):
    """`add_scores(vectors, query, keys, stride, length, ahead, scores)`: add to each of the float32 scores [length] the
    dot product of a query and a key, both of so many vectors.

    `stride` is the distance of the keys in bytes, and as many are prefetched from `ahead` bytes after them; the others
    are addresses. Keys are float32 if `precision` is FP32, bf16 otherwise.
    """

    @intrinsic
    def add_scores(_, vectors, query, keys, stride, length, ahead, scores):
        def generate(context, builder, signature, arguments):
            vectors, query, keys, stride, length, ahead, scores = arguments
            multiply_add = _intrinsic(builder, f"llvm.fmuladd.v{LANES}f32", VECTOR, VECTOR, VECTOR, VECTOR)
            reduce = _intrinsic(builder, f"llvm.vector.reduce.fadd.v{LANES}f32", FLOAT, FLOAT, VECTOR)

            def case(count):
                parts = [_load(builder, query, VECTOR, 4 * LANES * i) for i in range(count)]

                def body(keys, scores):
                    _prefetch_cached(builder, precision, builder.add(keys, ahead), count)
                    total = _constant(VECTOR, 0.0)
                    for i, part in enumerate(parts):
                        total = builder.call(multiply_add, [part, _load_cached(builder, precision, keys, i), total])
                    score = builder.call(reduce, [_load(builder, scores, FLOAT), total], fastmath=("reassoc",))
                    builder.store(score, _pointer(builder, scores, FLOAT), align=4)
                    return [builder.add(keys, stride), builder.add(scores, INT64(4))]

                _loop(builder, f"scores{count}", length, [keys, scores], body)

            _switch_on_count(builder, vectors, MAX_VECTORS, case)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    return add_scores


def _make_weighted_sum(precision):
    """`weighted_sum(vectors, weights, values, stride, length, ahead, target)`: the sum of values, of so many vectors
    each, times their float32 weights [length]. Values are as the keys of `add_scores`, and so is the rest.
    """

    @intrinsic
    def weighted_sum(_, vectors, weights, values, stride, length, ahead, target):
        def generate(context, builder, signature, arguments):
            vectors, weights, values, stride, length, ahead, target = arguments
            multiply_add = _intrinsic(builder, f"llvm.fmuladd.v{LANES}f32", VECTOR, VECTOR, VECTOR, VECTOR)

            def case(count):
                def body(weights, values, *sums):
                    _prefetch_cached(builder, precision, builder.add(values, ahead), count)
                    weight = _broadcast(builder, _load(builder, weights, FLOAT))
                    loaded = [_load_cached(builder, precision, values, i) for i in range(count)]
                    new = [builder.call(multiply_add, [weight, loaded[i], sums[i]]) for i in range(count)]
                    return [builder.add(weights, INT64(4)), builder.add(values, stride), *new]

                zeros = [_constant(VECTOR, 0.0)] * count
                sums = _loop(builder, f"weighted{count}", length, [weights, values, *zeros], body)[2:]
                _store(builder, sums, target)

            _switch_on_count(builder, vectors, MAX_VECTORS, case)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    return weighted_sum


add_scores_fp32, add_scores_bf16 = map(_make_add_scores, (FP32, BF16))
weighted_sum_fp32, weighted_sum_bf16 = map(_make_weighted_sum, (FP32, BF16))


# Functions of numbers, and where things are in memory.


@compiled
def exp(x):
    """e to the power of x in float32, to a few units in the last place; x is clamped to -87 to 88."""
    x = min(max(x, np.float32(-87)), np.float32(88))
    power = np.float32(np.int32(x * np.float32(1.4426950408889634) + np.float32(128.5)) - np.int32(128))
    rest = x - power * np.float32(0.693359375) - power * np.float32(-2.12194440e-4)
    series = np.float32(1.9875691500e-4)
    series = series * rest + np.float32(1.3981999507e-3)
    series = series * rest + np.float32(8.3334519073e-3)
    series = series * rest + np.float32(4.1665795894e-2)
    series = series * rest + np.float32(1.6666665459e-1)
    series = series * rest + np.float32(5.0000001201e-1)
    series = series * rest * rest + rest + np.float32(1)
    return series * float_from_bits((np.int32(power) + np.int32(127)) << np.int32(23))


@compiled
def gelu(x):
    """GELU's tanh approximation: 0.5 x (1 + tanh(u)) is x / (1 + exp(-2 u))."""
    return x / (np.float32(1) + exp(-x * (np.float32(1.5957691216057308) + np.float32(0.07135481627159730) * x * x)))


@compiled
def num_blocks(rows):
    return (rows + MAX_BLOCK_ROWS - 1) // MAX_BLOCK_ROWS


@compiled
def block_begin(block, rows):
    """The first row of a block: the rows are divided evenly among as few blocks as possible."""
    return block * rows // num_blocks(rows)


@compiled
def row_offset_and_stride(row, rows, width):
    """Where the inputs of a row begin in an array of blocks [width, rows of the block], and their distance."""
    block = ((row + 1) * num_blocks(rows) - 1) // rows
    begin = block_begin(block, rows)
    return begin * width + row - begin, block_begin(block + 1, rows) - begin


@compiled
def linear_at(address):
    fields = int64_at(address)
    return Linear(fields[0], fields[1], fields[2], fields[3], fields[4], fields[5], fields[6])


@compiled
def layer_at(address):
    fields = int64_at(address)
    return Layer(fields[0], fields[1], fields[2], fields[3], fields[4], fields[5])


@compiled
def round_up(width):
    """The next multiple of LANES: the inputs of a row that is converted, with the zeros that fill its last vector."""
    return (width + LANES - 1) // LANES * LANES


@compiled
def panel_bytes(precision, width):
    """Of a panel of weights for so many inputs."""
    if precision == INT8:
        return round_up(width) * PANEL_COLUMNS
    if precision == BF16_PAIRS or precision == BF16_FLOATS:
        return round_up(width) // (2 * PAIR) * PACKED_STEP_BYTES
    return width * PANEL_COLUMNS * (4 if precision == FP32 else 2)


@compiled
def cached_bytes(model):
    """Of a number in the KV cache."""
    return 4 if model.precision == FP32 else 2


@compiled
def kv_offset(model, layer, slot, head, position):
    """Where the key or value of a position begins in the KV cache, in numbers."""
    return (((layer * model.num_slots + slot) * model.n_head + head) * model.n_ctx + position) * model.head_stride


# The work items.


@compiled
def embed(model, args, row):
    """Store the sum of a row's token and position embeddings in `hidden`."""
    width = model.n_embd
    token = int64_at(args.tokens)[row]
    hidden = carray(float32_at(args.hidden + 4 * row * width), width)
    position = carray(float32_at(model.wpe + 4 * int64_at(args.positions)[row] * width), width)
    wte = linear_at(model.wte)
    panel, column = token // PANEL_COLUMNS, token % PANEL_COLUMNS
    if model.precision == FP32:
        weights = float32_at(wte.weights + 4 * (panel * width * PANEL_COLUMNS + column))
        for index in range(width):
            hidden[index] = weights[index * PANEL_COLUMNS] + position[index]
    elif model.precision == BF16:
        pairs = uint32_at(wte.weights + 4 * (panel * width * LANES + column % LANES))
        shift = np.uint32(16 if column < LANES else 0)
        for index in range(width):
            bits = (pairs[index * LANES] << shift) & np.uint32(0xFFFF0000)
            hidden[index] = float_from_bits(np.int32(bits)) + position[index]
    elif model.precision == BF16_PAIRS or model.precision == BF16_FLOATS:
        weights = uint8_at(wte.weights + panel * panel_bytes(model.precision, width))
        high_bytes = uint8_at(wte.high_bytes + panel * NUM_HIGH_BYTES)
        for index in range(width):
            # Where pack_twelve_bits has put it.
            step, pair, outer, inner = index // (2 * PAIR), index // PAIR % 2, column // LANES, index % PAIR
            if model.precision == BF16_FLOATS:
                outer, inner = inner, outer
            place = column % LANES // 4 * 16 + outer * 8 + column % 4 * 2 + inner
            low = weights[step * PACKED_STEP_BYTES + pair * 4 * LANES + place]
            number = (weights[step * PACKED_STEP_BYTES + 2 * 4 * LANES + place] >> (4 * pair)) & 15
            bits = (np.uint32(high_bytes[number]) << np.uint32(24)) | (np.uint32(low) << np.uint32(16))
            hidden[index] = float_from_bits(np.int32(bits)) + position[index]
    else:
        codes = int8_at(wte.weights + panel * panel_bytes(INT8, width) + column * GROUP)
        scale = float32_at(wte.scales)[token]
        for index in range(width):
            code = codes[index // GROUP * GROUP * PANEL_COLUMNS + index % GROUP]
            hidden[index] = np.float32(code) * scale + position[index]


@compiled_reassociating
def layer_norm(model, args, source, parameters, target):
    """Store the layer norm of row `source` of `hidden` at `target`, with zeros that fill its last vector."""
    width = model.n_embd
    hidden = carray(float32_at(args.hidden + 4 * source * width), width)
    total = np.float32(0)
    for index in range(width):
        total += hidden[index]
    mean = total / np.float32(width)
    squares = np.float32(0)
    for index in range(width):
        squares += (hidden[index] - mean) * (hidden[index] - mean)
    inverse = np.float32(1) / square_root(squares / np.float32(width) + float32_at(model.constants)[0])
    weights = carray(float32_at(parameters), width)
    biases = carray(float32_at(parameters + 4 * width), width)
    results = carray(float32_at(target), round_up(width))
    for index in range(width):
        results[index] = (hidden[index] - mean) * inverse * weights[index] + biases[index]
    for index in range(width, round_up(width)):
        results[index] = np.float32(0)


@compiled
def store_inputs(model, args, numbers, row, rows, width, first, last, scratch):
    """Store part of a row as what the next product multiplies: the columns from `first` to `last`, whole vectors.

    `numbers` is the address of the whole row in float32, with zeros up to a whole vector.
    """
    if model.precision == INT8:
        quantize_row(args, numbers, row, rows, width, first, last, scratch)
    elif model.precision == BF16_PAIRS:
        offset, stride = row_offset_and_stride(row, rows, round_up(width) // PAIR)
        pairs = args.codes + 4 * (offset + first // PAIR * stride)
        round_to_pairs(numbers + 4 * first, (last - first) // LANES, pairs, 4 * stride)
    else:
        offset, stride = row_offset_and_stride(row, rows, width)
        inputs, values = float32_at(args.inputs + 4 * offset), float32_at(numbers)
        for index in range(first, min(last, width)):
            inputs[index * stride] = values[index]


@compiled
def quantize_row(args, numbers, row, rows, width, first, last, scratch):
    """Quantize these columns of a row to codes from 0 to 255; with the first ones, store the row's Quantization.

    The zero point is an integer, so that 0 stays exact.
    """
    min_max(numbers, round_up(width) // LANES, scratch)
    minimum, maximum = float32_at(scratch)[0], float32_at(scratch)[1]
    scale = max((maximum - minimum) / np.float32(MAX_CODE), np.float32(1e-30))
    inverse_scale = np.float32(1) / scale
    zero_point = np.int32(np.float32(0.5) - minimum * inverse_scale)
    offset, stride = row_offset_and_stride(row, rows, round_up(width) // GROUP)
    codes = args.codes + GROUP_BYTES * (offset + first // GROUP * stride)
    vectors = (last - first) // LANES
    quantize_vectors(numbers + 4 * first, vectors, inverse_scale, np.float32(zero_point), codes, GROUP_BYTES * stride)
    if first == 0:
        quantization = args.quantizations + QUANTIZATION_BYTES * row
        float32_at(quantization)[0] = scale
        uint32_at(quantization + ZERO_POINT_OFFSET)[0] = np.uint32(zero_point)


@compiled
def multiply_panel(model, args, layer, linear, panel, rows, inputs, tile, destination, ahead):
    """Multiply all rows with one panel of a matrix, and store the results at their destination.

    The panel that lies so many panels `ahead`, if any, is prefetched meanwhile: its beginning after the end of this
    one, or all of it during the second block of rows, if there is one.
    """
    size_of_panel = panel_bytes(model.precision, linear.in_features)
    weights = linear.weights + panel * size_of_panel
    groups = round_up(linear.in_features) // (GROUP if model.precision == INT8 else PAIR)  # where they are converted
    columns = min(PANEL_COLUMNS, linear.out_features - panel * PANEL_COLUMNS)
    results = carray(float32_at(tile), MAX_BLOCK_ROWS * PANEL_COLUMNS)
    for block in range(num_blocks(rows)):
        begin = block_begin(block, rows)
        size = block_begin(block + 1, rows) - begin
        address = inputs + 4 * begin * linear.in_features
        near, far = min(PREFETCH_BYTES, size_of_panel), weights
        if ahead:
            far = weights + ahead * size_of_panel
            if block == 1:
                near = size_of_panel
        if model.precision == BF16:
            multiply_bf16(size, weights, address, linear.in_features, tile, near, far)
        elif model.precision == FP32:
            multiply_fp32(size, weights, address, linear.in_features, tile, near, far)
        elif model.precision == BF16_PAIRS or model.precision == BF16_FLOATS:
            high_bytes = linear.high_bytes + panel * NUM_HIGH_BYTES
            length, unpacked = round_up(linear.in_features), tile + 4 * MAX_BLOCK_ROWS * PANEL_COLUMNS
            # Kept weights are a third longer than packed ones: with their first quarter nothing is prefetched.
            near_kept = near if ahead and block == 1 else 0
            if model.precision == BF16_PAIRS:
                address = inputs + 4 * begin * groups
            if num_blocks(rows) == 1:
                multiply_packed(size, weights, address, length, tile, near, far, high_bytes, unpacked)
            elif block == 0:
                multiply_and_keep_packed(size, weights, address, length, tile, near, far, high_bytes, unpacked)
            elif model.precision == BF16_FLOATS:
                multiply_bf16(size, unpacked, address, length, tile, near_kept, far)
            else:
                multiply_kept_pairs(size, unpacked, address, groups, tile, near_kept, far)
        else:
            codes = args.codes + GROUP_BYTES * begin * groups
            quantizations = args.quantizations + QUANTIZATION_BYTES * begin
            scales = linear.scales + 4 * panel * PANEL_COLUMNS
            weight_sums = linear.weight_sums + 4 * panel * PANEL_COLUMNS
            multiply_int8(size, weights, codes, groups, tile, near, far, quantizations, scales, weight_sums)
        if linear.bias != 0:
            for row in range(size):
                add_panel(tile + 4 * row * PANEL_COLUMNS, linear.bias + 4 * panel * PANEL_COLUMNS)
        if destination == TO_MLP_INPUTS:
            apply_activation(model, results, size)
            width = round_up(linear.out_features)
            if model.precision == BF16_PAIRS:
                # After the last column are zeros: those of the weights and the bias.
                pairs = args.mlp_inputs + 2 * (begin * width + panel * PANEL_COLUMNS * size)
                count = min(PANEL_COLUMNS, width - panel * PANEL_COLUMNS) // LANES
                for row in range(size):
                    round_to_pairs(tile + 4 * row * PANEL_COLUMNS, count, pairs + 4 * row, 4 * size)
            elif model.precision == INT8:
                for row in range(size):
                    address = args.mlp_inputs + 4 * ((begin + row) * width + panel * PANEL_COLUMNS)
                    copy_floats(address, tile + 4 * row * PANEL_COLUMNS, columns)
            else:
                for row in range(size):
                    offset, stride = row_offset_and_stride(begin + row, rows, linear.out_features)
                    target = float32_at(args.mlp_inputs + 4 * (offset + panel * PANEL_COLUMNS * stride))
                    for column in range(columns):
                        target[column * stride] = results[row * PANEL_COLUMNS + column]
        elif destination == TO_QKV:
            store_qkv(model, args, layer, begin, size, panel * PANEL_COLUMNS, columns, tile)
        elif destination == TO_HIDDEN:
            for row in range(size):
                address = args.hidden + 4 * ((begin + row) * linear.out_features + panel * PANEL_COLUMNS)
                if columns == PANEL_COLUMNS:
                    add_panel(address, tile + 4 * row * PANEL_COLUMNS)
                else:
                    hidden = float32_at(address)
                    for column in range(columns):
                        hidden[column] += results[row * PANEL_COLUMNS + column]
        else:
            for row in range(size):
                address = args.logits + 4 * ((begin + row) * linear.out_features + panel * PANEL_COLUMNS)
                copy_floats(address, tile + 4 * row * PANEL_COLUMNS, columns)


@compiled
def apply_activation(model, results, rows):
    if model.activation == RELU:
        for index in range(rows * PANEL_COLUMNS):
            results[index] = max(results[index], np.float32(0))
    else:
        for index in range(rows * PANEL_COLUMNS):
            results[index] = gelu(results[index])


@compiled
def store_qkv(model, args, layer, begin, rows, first, columns, tile):
    """Store columns of rows' queries, keys and values: in `queries`, or at the row's position in the KV cache."""
    width, size = model.n_embd, model.head_size
    slots, positions = int64_at(args.slots), int64_at(args.positions)
    column = 0
    while column < columns:
        part, place = (first + column) // width, (first + column) % width
        head, offset = place // size, place % size
        count = min(columns - column, size - offset)
        cache = model.key_cache if part == 1 else model.value_cache
        for row in range(rows):
            source = tile + 4 * (row * PANEL_COLUMNS + column)
            at = kv_offset(model, layer, slots[begin + row], head, positions[begin + row]) + offset
            if part == 0:
                target = args.queries + 4 * (((begin + row) * model.n_head + head) * model.head_stride + offset)
                copy_floats(target, source, count)
            elif model.precision == FP32:
                copy_floats(cache + 4 * at, source, count)
            else:
                round_floats(cache + 2 * at, source, count)
        column += count


@compiled
def copy_floats(target, source, count):
    """Copy so many float32 from one address to another."""
    if count == PANEL_COLUMNS:
        copy_panel(target, source)
    else:
        targets, sources = float32_at(target), float32_at(source)
        for index in range(count):
            targets[index] = sources[index]


@compiled
def round_floats(target, source, count):
    """Round so many float32 to bf16."""
    if count == PANEL_COLUMNS:
        round_panel(target, source)
    else:
        targets, sources = uint16_at(target), uint32_at(source)
        for index in range(count):
            bits = sources[index]
            even = (bits >> np.uint32(16)) & np.uint32(1)
            targets[index] = np.uint16((bits + np.uint32(0x7FFF) + even) >> np.uint32(16))


@compiled
def attend(model, args, layer, row, head, rows, begin, ahead, scratch):
    """Attention of one head of a row over the positions up to its own, stored in the inputs of the next product.

    Its keys and values begin at `begin` in the KV cache; those that lie `ahead` of them are prefetched. Both are
    counted in numbers of the cache, not in bytes.
    """
    length = int64_at(args.positions)[row] + 1
    size = cached_bytes(model)
    stride = size * model.head_stride
    query = args.queries + 4 * model.head_stride * (row * model.n_head + head)
    begin, ahead = size * begin, size * ahead
    scores = carray(float32_at(scratch), length)
    for index in range(length):
        scores[index] = np.float32(0)
    for first in range(0, model.head_stride, MAX_VECTORS * LANES):
        vectors = min(MAX_VECTORS, (model.head_stride - first) // LANES)
        keys = model.key_cache + begin + size * first
        if model.precision == FP32:
            add_scores_fp32(vectors, query + 4 * first, keys, stride, length, ahead, scratch)
        else:
            add_scores_bf16(vectors, query + 4 * first, keys, stride, length, ahead, scratch)
    inverse_sum = softmax(scores, length, float32_at(model.constants)[1 + layer])
    mixed = scratch + 4 * model.n_ctx
    for first in range(0, model.head_stride, MAX_VECTORS * LANES):
        vectors = min(MAX_VECTORS, (model.head_stride - first) // LANES)
        values = model.value_cache + begin + size * first
        if model.precision == FP32:
            weighted_sum_fp32(vectors, scratch, values, stride, length, ahead, mixed + 4 * first)
        else:
            weighted_sum_bf16(vectors, scratch, values, stride, length, ahead, mixed + 4 * first)
    results = carray(float32_at(mixed), model.head_size)
    for index in range(model.head_size):
        results[index] *= inverse_sum
    store_attention(model, args, row, head, rows, mixed)


@compiled
def store_attention(model, args, row, head, rows, numbers):
    """Store the results of a head: what the next product multiplies, or for INT8, which needs whole rows, float32."""
    size, results = model.head_size, float32_at(numbers)
    first = head * size
    if model.precision == INT8:
        inputs = float32_at(args.inputs + 4 * (row * round_up(model.n_embd) + first))
        for index in range(size):
            inputs[index] = results[index]
    elif model.precision == BF16_PAIRS:
        # After the last column the layer norm left zeros.
        offset, stride = row_offset_and_stride(row, rows, round_up(model.n_embd) // PAIR)
        codes = args.codes + 4 * offset
        if size % LANES == 0:
            round_to_pairs(numbers, size // LANES, codes + 4 * (first // PAIR) * stride, 4 * stride)
        else:
            for index in range(first, first + size):
                target = codes + 4 * (index // PAIR * stride) + 2 * (index % PAIR)
                round_floats(target, numbers + 4 * (index - first), 1)
    else:
        offset, stride = row_offset_and_stride(row, rows, model.n_embd)
        inputs = float32_at(args.inputs + 4 * (offset + first * stride))
        for index in range(size):
            inputs[index * stride] = results[index]


@compiled_reassociating
def softmax(scores, length, scale):
    """Replace the scores by unnormalized probabilities; returns the inverse of their sum."""
    greatest = scores[0]
    for index in range(length):
        greatest = max(greatest, scores[index])
    for index in range(length):
        scores[index] = exp((scores[index] - greatest) * scale)
    total = np.float32(0)
    for index in range(length):
        total += scores[index]
    return np.float32(1) / total


# The phases: which thread takes which work item, and when all are done.


@compiled
def take_work_item(args, phase):
    """The number of a work item that no thread has taken yet; past the last one if there is none."""
    return atomic_fetch_add_one(args.counters + 2 * COUNTER_BYTES * phase)


@compiled
def finish_work_item(args, phase):
    atomic_fetch_add_one(args.counters + 2 * COUNTER_BYTES * phase + COUNTER_BYTES)


@compiled
def wait_for_phase(args, phase, items):
    """Wait until all work items of a phase are finished; returns the number of the next phase."""
    spins = 0
    while atomic_load(args.counters + 2 * COUNTER_BYTES * phase + COUNTER_BYTES) < items:
        pause()
        spins += 1
        if spins > SPINS_BEFORE_YIELD:
            call_function(args.sched_yield)
    return phase + 1


@compiled
def parts_of_a_block(args, rows, width):
    """Into how many parts the columns of a block of rows are divided, so that the threads have equally many parts.

    The inputs of a product for all rows of a block lie beside each other, and threads that write to the same cache
    lines wait for each other. So each writes a part of the columns. What all columns of a row are needed for (the mean
    and the deviation of a layer norm, the range of INT8) is computed for each part, so there are few of them.
    """
    blocks = num_blocks(rows)
    parts = 1
    while parts * blocks % args.threads and parts < MAX_PARTS:
        parts += 1
    return min(parts, (width + 4 * LANES - 1) // (4 * LANES)) if rows > 1 else 1


@compiled
def part_of_block(item, parts, rows, width):
    """The rows and columns, whole vectors, of a work item: (first row, end of the rows, first column, end)."""
    block, part, vectors = item // parts, item % parts, round_up(width) // LANES
    first, end = part * vectors // parts * LANES, (part + 1) * vectors // parts * LANES
    return block_begin(block, rows), block_begin(block + 1, rows), first, end


@compiled
def inputs_phase(model, args, phase, rows, width, source, parameters, is_final, scratch):
    """Store the inputs of a product: the layer norm of `hidden` with these parameters or, where they are 0, the float32
    [rows, whole vectors] at `source`.

    A work item is a part of the columns of a block of rows.
    """
    parts = parts_of_a_block(args, rows, width)
    items = num_blocks(rows) * parts
    item = take_work_item(args, phase)
    while item < items:
        begin, end, first, last = part_of_block(item, parts, rows, width)
        for row in range(begin, end):
            numbers = source + 4 * row * round_up(width)
            if parameters:
                numbers = scratch
                layer_norm(model, args, int64_at(args.logit_rows)[row] if is_final else row, parameters, numbers)
            store_inputs(model, args, numbers, row, rows, width, first, last, scratch + 4 * round_up(model.n_embd))
        finish_work_item(args, phase)
        item = take_work_item(args, phase)
    return wait_for_phase(args, phase, items)


@compiled
def layer_norm_phase(model, args, phase, rows, parameters, is_final, scratch):
    return inputs_phase(model, args, phase, rows, model.n_embd, np.int64(0), parameters, is_final, scratch)


@compiled
def quantize_phase(model, args, phase, source, rows, width, scratch):
    """For INT8, quantize inputs of which no work item before computes a whole row."""
    if model.precision != INT8:
        return phase
    return inputs_phase(model, args, phase, rows, width, source, np.int64(0), False, scratch)


@compiled
def matmul_phase(model, args, phase, layer, linear, rows, inputs, scratch, destination):
    """A work item is a few consecutive panels, since memory is fastest when it is read in order.

    With more rows than a block has the arithmetic takes longer than the memory. Then the last panels are items of their
    own, so that no thread waits long for another one.
    """
    panels = (linear.out_features + PANEL_COLUMNS - 1) // PANEL_COLUMNS
    size = min(max(panels // (4 * args.threads), 1), MAX_PANELS)
    last_ones = min(size * args.threads, panels) if rows > MAX_BLOCK_ROWS else 0
    large = (panels - last_ones + size - 1) // size
    first_of_last = min(large * size, panels)
    items = large + panels - first_of_last
    item = take_work_item(args, phase)
    while item < items:
        if item < large:
            end = min((item + 1) * size, first_of_last)
            for panel in range(item * size, end):
                ahead = 1 if panel + 1 < end else 0
                multiply_panel(model, args, layer, linear, panel, rows, inputs, scratch, destination, ahead)
        else:
            panel = first_of_last + item - large
            ahead = args.threads if panel + args.threads < panels else 0  # most likely this thread's next one
            multiply_panel(model, args, layer, linear, panel, rows, inputs, scratch, destination, ahead)
        finish_work_item(args, phase)
        item = take_work_item(args, phase)
    return wait_for_phase(args, phase, items)


@compiled
def attention_phase(model, args, phase, layer, rows, scratch):
    """A work item is a head of the rows of a block, or with few heads of some of these rows.

    The results of a head for all rows of a block lie beside each other. While one row is computed, the keys and values
    of the next one are prefetched: the CPU's own prefetcher learns too slowly where each sequence's are.
    """
    heads, blocks = model.n_head, num_blocks(rows)
    parts = 1
    while parts * blocks * heads < 8 * args.threads and parts * blocks < rows:
        parts += 1
    items = parts * blocks * heads
    slots = int64_at(args.slots)
    item = take_work_item(args, phase)
    while item < items:
        head, block, part = item % heads, item // heads // parts, item // heads % parts
        first, size = block_begin(block, rows), block_begin(block + 1, rows) - block_begin(block, rows)
        end = first + (part + 1) * size // parts
        for row in range(first + part * size // parts, end):
            begin, ahead = kv_offset(model, layer, slots[row], head, 0), 0
            if row + 1 < end:
                ahead = kv_offset(model, layer, slots[row + 1], head, 0) - begin
            attend(model, args, layer, row, head, rows, begin, ahead, scratch)
        finish_work_item(args, phase)
        item = take_work_item(args, phase)
    return wait_for_phase(args, phase, items)


@compiled
def forward(model, args, thread):
    """All phases of a step; every thread calls this."""
    rows = args.rows
    scratch = args.scratch + thread * args.scratch_bytes
    phase = 0
    inputs = args.codes if model.precision == BF16_PAIRS else args.inputs
    row = take_work_item(args, phase)
    while row < rows:
        embed(model, args, row)
        finish_work_item(args, phase)
        row = take_work_item(args, phase)
    phase = wait_for_phase(args, phase, rows)
    for index in range(model.n_layer):
        layer = layer_at(model.layers + 8 * index * LAYER_FIELDS)
        phase = layer_norm_phase(model, args, phase, rows, layer.ln_1, False, scratch)
        linear = linear_at(layer.c_attn)
        phase = matmul_phase(model, args, phase, index, linear, rows, inputs, scratch, TO_QKV)
        phase = attention_phase(model, args, phase, index, rows, scratch)
        linear = linear_at(layer.attn_c_proj)
        phase = quantize_phase(model, args, phase, args.inputs, rows, linear.in_features, scratch)
        phase = matmul_phase(model, args, phase, index, linear, rows, inputs, scratch, TO_HIDDEN)
        phase = layer_norm_phase(model, args, phase, rows, layer.ln_2, False, scratch)
        linear = linear_at(layer.c_fc)
        phase = matmul_phase(model, args, phase, index, linear, rows, inputs, scratch, TO_MLP_INPUTS)
        linear = linear_at(layer.mlp_c_proj)
        phase = quantize_phase(model, args, phase, args.mlp_inputs, rows, linear.in_features, scratch)
        phase = matmul_phase(model, args, phase, index, linear, rows, args.mlp_inputs, scratch, TO_HIDDEN)
    rows = args.num_logit_rows
    if rows > 0:
        phase = layer_norm_phase(model, args, phase, rows, model.ln_f, True, scratch)
        matmul_phase(model, args, phase, 0, linear_at(model.lm_head), rows, inputs, scratch, TO_LOGITS)


def step(model_address, step_address, thread):
    """A step's part of one thread, given the addresses of ModelArgs and StepArgs as int64 arrays."""
    model = ModelArgs(*to_fixed_tuple(carray(model_address, MODEL_FIELDS), MODEL_FIELDS))
    args = StepArgs(*to_fixed_tuple(carray(step_address, STEP_FIELDS), STEP_FIELDS))
    forward(model, args, thread)


def compile_entry():
    """Compile step; compiled.py caches the machine code."""
    table = types.CPointer(types.int64)
    return cfunc(types.void(table, table, types.int64))(step)
