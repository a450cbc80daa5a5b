"""The compiled part of compiled_decoder.py: one step of a GPT-2 for many rows, by several threads at once.

Importing this module imports Numba; compiled_decoder.py does so only where the machine code is not on disk yet.

A step is a list of phases (a norm, a product with a matrix, attention), and each is cut into chunks. Every thread goes
through all phases, takes chunks as long as there are any, and waits until those that others took are done. So a thread
that comes late, or that the system stops between two chunks, holds nobody up.

The numbers of a row are the same to the bit whatever is beside it and whoever computes them: each output of a product
is one sum in one register, in ascending order of the inputs.

With INT8 weights a product is one of integers: its inputs are rounded to 256 steps between the least and the greatest
of their row (`quantize`), and 8-bit numbers are multiplied and added up in 32 bits, exactly, by the instruction that
the processor has for it. All else is float32.
"""

# mypy: allow-untyped-defs, disable-error-code="call-arg"
# Numba finds the types of the compiled functions from their calls.

from __future__ import annotations

import platform

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic

from gpt2_chinese.decoding.compiled_decoder import (
    BF16,
    COUNTER_BYTES,
    DOT_PRODUCT,
    FP32,
    INT8,
    LANES,
    MAX_ROWS,
    PANEL,
    RELU,
    Call,
    Layer,
    Linear,
    Model,
    Span,
)

FLOAT, INT64, INT32, INT16, BYTE = ir.FloatType(), ir.IntType(64), ir.IntType(32), ir.IntType(16), ir.IntType(8)
VECTOR, WORDS = ir.VectorType(FLOAT, LANES), ir.VectorType(INT32, LANES)
SHORTS, BYTES = ir.VectorType(INT16, 2 * LANES), ir.VectorType(BYTE, 4 * LANES)
GROUP = 4  # inputs of an INT8 product that are multiplied at once: 4 bytes beside each other
STEPS = 255  # between the least and the greatest input of a row
EDGES = "min", "max"
PREFETCH_BYTES = 4096  # ahead in the weights: the processor itself does not look behind the end of a page
CACHE_LINE = 64
SPINS = 2000  # looks at a counter, some tens of microseconds, before the processor is offered to others
MAX_PANELS = 8  # in a chunk
MAX_VECTORS = 4  # of a head, at once in attention
TO_INPUTS, TO_CACHE, TO_HIDDEN, TO_LOGITS = range(4)  # what a product's result is for
MODEL_FIELDS, CALL_FIELDS, LAYER_FIELDS = len(Model._fields), len(Call._fields), len(Layer._fields)
SPAN_BYTES, ZERO_OFFSET = 4 * len(Span._fields), 4 * Span._fields.index("zero")

compiled = njit(error_model="numpy", fastmath={"contract"})
# Here sums may be taken in another order: one that the compiler chooses once, whatever the number of rows.
summing = njit(error_model="numpy", fastmath={"contract", "reassoc", "nsz"})


# What Python has no words for.


def _pointer(builder, address, kind, offset=0):
    return builder.inttoptr(builder.add(address, INT64(offset)), ir.PointerType(kind))


def _load(builder, address, kind, offset=0, align=4):
    return builder.load(_pointer(builder, address, kind, offset), align=align)


def _constant(kind, value):
    return ir.Constant(kind, [value] * kind.count)


def _intrinsic(builder, name, result, *arguments):
    return builder.module.declare_intrinsic(name, (), ir.FunctionType(result, arguments))


def _everywhere(builder, value):
    """A vector of one number, float or int32."""
    kind = ir.VectorType(value.type, LANES)
    first = builder.insert_element(kind(ir.Undefined), value, INT32(0))
    return builder.shuffle_vector(first, kind(ir.Undefined), _constant(WORDS, 0))


def _store(builder, vectors, address):
    """Vectors of LANES numbers of 4 bytes, one behind the other."""
    for number, value in enumerate(vectors):
        builder.store(value, _pointer(builder, address, value.type, 4 * LANES * number), align=4)


def _pointer_to(kind):
    """A function that makes a pointer to numbers of some kind from an address."""

    @intrinsic
    def pointer(_, address):
        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), generate

    return pointer


floats, words, bytes_, integers = map(_pointer_to, (types.float32, types.uint32, types.int8, types.int64))


@intrinsic
def float_of_bits(_, bits):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], FLOAT)

    return types.float32(types.int32), generate


@intrinsic
def square_root(_, x):
    def generate(context, builder, signature, arguments):
        return builder.call(_intrinsic(builder, "llvm.sqrt.f32", FLOAT, FLOAT), arguments)

    return types.float32(types.float32), generate


@intrinsic
def fetch_and_add_one(_, address):
    def generate(context, builder, signature, arguments):
        return builder.atomic_rmw("add", _pointer(builder, arguments[0], INT64), INT64(1), "acq_rel")

    return types.int64(types.int64), generate


@intrinsic
def fetch(_, address):
    def generate(context, builder, signature, arguments):
        return builder.load_atomic(_pointer(builder, arguments[0], INT64), "acquire", 8)

    return types.int64(types.int64), generate


@intrinsic
def pause(_):
    """Tell the processor that this is a loop that waits."""

    def generate(context, builder, signature, arguments):
        if platform.machine().lower() in ("x86_64", "amd64"):
            builder.call(_intrinsic(builder, "llvm.x86.sse2.pause", ir.VoidType()), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def call_function(_, address):
    """Call a C function without arguments; its result is not looked at."""

    def generate(context, builder, signature, arguments):
        builder.call(builder.inttoptr(arguments[0], ir.PointerType(ir.FunctionType(INT32, []))), [])
        return context.get_dummy_value()

    return types.void(types.int64), generate


# The inner loops, as vector instructions. Each is generated for every number of registers it may take.


def _loop(builder, name, length, carried, body):
    """`for index in range(length)`, at least once; `body(*values)` gives the next values of what is `carried`.

    Returns:
        What is carried, behind the loop.
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


def _for_each_count(builder, count, most, generate):
    """Code for every count from 1 to `most`, and the jump to the one that `count` says."""
    entry, end = builder.block, builder.append_basic_block("done")
    cases = []
    for number in range(1, most + 1):
        cases.append(builder.append_basic_block(f"case{number}"))
        builder.position_at_end(cases[-1])
        generate(number)
        builder.branch(end)
    builder.position_at_end(entry)
    switch = builder.switch(count, end)
    for number, case in enumerate(cases, start=1):
        switch.add_case(INT64(number), case)
    builder.position_at_end(end)


def _panel_row(builder, kind, address):
    """The PANEL weights of one input, as two vectors of float."""
    if kind == FP32:
        return [_load(builder, address, VECTOR, 4 * LANES * half) for half in range(2)]
    # The low half of a word is a weight in the left half of the panel, the high half one in the right half.
    both = _load(builder, address, WORDS)
    parts = builder.shl(both, _constant(WORDS, 16)), builder.and_(both, _constant(WORDS, 0xFFFF0000))
    return [builder.bitcast(part, VECTOR) for part in parts]


def _panel_loop(builder, rows, panel, inputs, step_bytes, sums, add):
    """The sums of so many rows over a panel, two vectors a row; `add(weights, inputs, sums)` gives them one step on.

    `panel` is (weights, length, near, far): the panel's address, its steps of `step_bytes`, and what is fetched
    meanwhile, see `_multiplication`. A step takes 4 bytes of each row's inputs.
    """
    weights, length, near, far = panel
    turn = builder.sub(builder.add(weights, builder.mul(length, INT64(step_bytes))), near)
    to_far = builder.sub(far, turn)
    byte_pointer = ir.PointerType(BYTE)
    prefetch = _intrinsic(builder, "llvm.prefetch.p0", ir.VoidType(), byte_pointer, INT32, INT32, INT32)

    def body(weights, inputs, *sums):
        distance = builder.select(builder.icmp_signed("<", weights, turn), near, to_far)
        for offset in range(0, step_bytes, CACHE_LINE):
            ahead = _pointer(builder, builder.add(weights, distance), BYTE, offset)
            builder.call(prefetch, [ahead, INT32(0), INT32(2), INT32(1)])
        new = add(weights, inputs, sums)
        return [builder.add(weights, INT64(step_bytes)), builder.add(inputs, INT64(4 * rows)), *new]

    return _loop(builder, f"multiply{rows}", length, [weights, inputs, *sums], body)[2:]


def _multiplication(kind):
    """`multiply(rows, weights, inputs, length, tile, near, far)`: up to MAX_ROWS rows times one panel.

    `weights` is the panel's address, `inputs` that of float32 [length, rows], `tile` that of float32 [rows, PANEL].
    Meanwhile the panel's memory from `near` bytes ahead is fetched, and what would be behind its end, from `far` on.
    """

    @intrinsic
    def multiply(_, rows, weights, inputs, length, tile, near, far):
        def generate(context, builder, signature, arguments):
            rows, weights, inputs, length, tile, near, far = arguments
            multiply_add = _intrinsic(builder, f"llvm.fmuladd.v{LANES}f32", VECTOR, VECTOR, VECTOR, VECTOR)

            def case(count):
                def add(weights, inputs, sums):
                    halves = _panel_row(builder, kind, weights)
                    new = []
                    for row in range(count):
                        value = _everywhere(builder, _load(builder, inputs, FLOAT, 4 * row))
                        new += [builder.call(multiply_add, [value, halves[i], sums[2 * row + i]]) for i in range(2)]
                    return new

                zeros = [_constant(VECTOR, 0.0)] * (2 * count)
                step_bytes = PANEL * (4 if kind == FP32 else 2)
                sums = _panel_loop(builder, count, (weights, length, near, far), inputs, step_bytes, zeros, add)
                _store(builder, sums, tile)

            _for_each_count(builder, rows, MAX_ROWS, case)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    return multiply


multiply_fp32, multiply_bf16 = map(_multiplication, (FP32, BF16))


def _dot_products(builder, name, codes, weights, sums):
    """Add to each int32 of two vectors the products of 4 codes (0 to 255) and the 4 weights (-127 to 127) of its lane.

    `codes` is an int32 of 4 bytes, `weights` are two vectors of bytes. `name` is one of DOT_PRODUCTS.
    """
    if name == "vpdpbusd":
        # One instruction: https://www.intel.com/content/www/us/en/docs/intrinsics-guide/, _mm512_dpbusd_epi32.
        dot = _intrinsic(builder, f"llvm.x86.avx512.vpdpbusd.{32 * LANES}", WORDS, WORDS, BYTES, BYTES)
        value = builder.bitcast(_everywhere(builder, codes), BYTES)
        return [builder.call(dot, [total, value, part]) for total, part in zip(sums, weights, strict=True)]
    new = []
    for total, part in zip(sums, weights, strict=True):
        if name == "vpmaddwd":
            # Products of 16 bits, two of them added: the even bytes, then the odd ones.
            instruction = {4: "sse2.pmadd.wd", 8: "avx2.pmadd.wd", 16: "avx512.pmaddw.d.512"}[LANES]
            pairs = _intrinsic(builder, f"llvm.x86.{instruction}", WORDS, SHORTS, SHORTS)
            eight = _constant(SHORTS, 8)
            both = builder.bitcast(part, SHORTS)
            even, odd = builder.ashr(builder.shl(both, eight), eight), builder.ashr(both, eight)
            for shift, weight in ((0, even), (8, odd)):
                value = builder.and_(builder.lshr(codes, INT32(shift)), INT32(0x00FF00FF))
                value = builder.bitcast(_everywhere(builder, value), SHORTS)
                total = builder.add(total, builder.call(pairs, [value, weight]))
        else:
            whole = builder.bitcast(part, WORDS)
            for byte in range(GROUP):
                left = _constant(WORDS, 24 - 8 * byte)
                weight = builder.ashr(builder.shl(whole, left), _constant(WORDS, 24))
                value = builder.and_(builder.lshr(codes, INT32(8 * byte)), INT32(0xFF))
                total = builder.add(total, builder.mul(_everywhere(builder, value), weight))
        new.append(total)
    return new


def integer_multiplication(name):
    """`multiply(rows, weights, codes, groups, tile, near, far, spans, scales, totals)`: INT8's `_multiplication`.

    The panel is int8 [groups, PANEL, GROUP], `codes` uint8 [groups, rows, GROUP]. A code c of a row with a Span stands
    for scale (c - zero), a weight w of an output for its factor in `scales` [PANEL] times w, and an output is

        scale factor (sum of c w - zero sum of w),

    of which the bracket is exact; `totals` [PANEL] are the sums of w, int32. `name` says by which instruction, see
    `_dot_products`.
    """

    @intrinsic
    def multiply(_, rows, weights, codes, groups, tile, near, far, spans, scales, totals):
        def generate(context, builder, signature, arguments):
            rows, weights, codes, groups, tile, near, far, spans, scales, totals = arguments

            def case(count):
                def add(weights, codes, sums):
                    parts = [_load(builder, weights, BYTES, GROUP * LANES * half, align=1) for half in range(2)]
                    new = []
                    for row in range(count):
                        value = _load(builder, codes, INT32, GROUP * row)
                        new += _dot_products(builder, name, value, parts, sums[2 * row : 2 * row + 2])
                    return new

                firsts, halves = [], range(2)
                weight_sums = [_load(builder, totals, WORDS, 4 * LANES * half) for half in halves]
                for row in range(count):
                    zero = _load(builder, spans, INT32, SPAN_BYTES * row + ZERO_OFFSET)
                    minus_zero = _everywhere(builder, builder.neg(zero))
                    firsts += [builder.mul(minus_zero, weight_sums[half]) for half in halves]
                panel = weights, groups, near, far
                sums = _panel_loop(builder, count, panel, codes, GROUP * PANEL, firsts, add)
                factors = [_load(builder, scales, VECTOR, 4 * LANES * half) for half in halves]
                outputs = []
                for row in range(count):
                    scale = _everywhere(builder, _load(builder, spans, FLOAT, SPAN_BYTES * row))
                    for half in halves:
                        exact = builder.sitofp(sums[2 * row + half], VECTOR)
                        outputs.append(builder.fmul(exact, builder.fmul(scale, factors[half])))
                _store(builder, outputs, tile)

            _for_each_count(builder, rows, MAX_ROWS, case)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 10), generate

    return multiply


multiply_int8 = integer_multiplication(DOT_PRODUCT)


@intrinsic
def extent(_, numbers, vectors, least_and_greatest):
    """The least and the greatest of so many vectors of float32 and 0, both to an address."""

    def generate(context, builder, signature, arguments):
        numbers, vectors, target = arguments
        least, greatest = (_intrinsic(builder, f"llvm.{name}num.v{LANES}f32", VECTOR, VECTOR, VECTOR) for name in EDGES)

        def body(numbers, low, high):
            value = _load(builder, numbers, VECTOR)
            low, high = builder.call(least, [value, low]), builder.call(greatest, [value, high])
            return [builder.add(numbers, INT64(4 * LANES)), low, high]

        zeros = [_constant(VECTOR, 0.0)] * 2
        edges = _loop(builder, "extent", vectors, [numbers, *zeros], body)[1:]
        for number, (name, edge) in enumerate(zip(EDGES, edges, strict=True)):
            reduce = _intrinsic(builder, f"llvm.vector.reduce.f{name}.v{LANES}f32", FLOAT, VECTOR)
            builder.store(builder.call(reduce, [edge]), _pointer(builder, target, FLOAT, 4 * number), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


@intrinsic
def encode(_, numbers, vectors, inverse, zero, codes, apart):
    """So many vectors of float32 times `inverse`, plus `zero`, rounded and cut to codes from 0 to 255.

    GROUP codes stand beside each other at `codes`, the next ones `apart` bytes behind.
    """

    def generate(context, builder, signature, arguments):
        numbers, vectors, inverse, zero, codes, apart = arguments
        multiply_add = _intrinsic(builder, f"llvm.fmuladd.v{LANES}f32", VECTOR, VECTOR, VECTOR, VECTOR)
        # Rounded to the nearest: what conversion cuts off is not negative.
        factor, offset = _everywhere(builder, inverse), _everywhere(builder, builder.fadd(zero, FLOAT(0.5)))
        lowest, highest = _constant(WORDS, 0), _constant(WORDS, STEPS)

        def body(numbers, codes):
            value = builder.call(multiply_add, [_load(builder, numbers, VECTOR), factor, offset])
            value = builder.fptosi(value, WORDS)
            value = builder.select(builder.icmp_signed("<", value, lowest), lowest, value)
            value = builder.select(builder.icmp_signed(">", value, highest), highest, value)
            value = builder.trunc(value, ir.VectorType(BYTE, LANES))
            value = builder.bitcast(value, ir.VectorType(INT32, LANES // GROUP))
            for number in range(LANES // GROUP):
                group = builder.extract_element(value, INT32(number))
                builder.store(group, _pointer(builder, codes, INT32), align=4)
                codes = builder.add(codes, apart)
            return [builder.add(numbers, INT64(4 * LANES)), codes]

        _loop(builder, "encode", vectors, [numbers, codes], body)
        return context.get_dummy_value()

    arguments = types.int64, types.int64, types.float32, types.float32, types.int64, types.int64
    return types.void(*arguments), generate


@intrinsic
def add_scores(_, vectors, query, keys, stride, length, scores):
    """Add to each of the float32 scores [length] the product of a query and a key, of so many vectors each.

    `stride` is the distance of the keys in bytes, the others are addresses.
    """

    def generate(context, builder, signature, arguments):
        vectors, query, keys, stride, length, scores = arguments
        multiply_add = _intrinsic(builder, f"llvm.fmuladd.v{LANES}f32", VECTOR, VECTOR, VECTOR, VECTOR)
        reduce = _intrinsic(builder, f"llvm.vector.reduce.fadd.v{LANES}f32", FLOAT, FLOAT, VECTOR)

        def case(count):
            parts = [_load(builder, query, VECTOR, 4 * LANES * i) for i in range(count)]

            def body(keys, scores):
                total = _constant(VECTOR, 0.0)
                for i, part in enumerate(parts):
                    total = builder.call(multiply_add, [part, _load(builder, keys, VECTOR, 4 * LANES * i), total])
                score = builder.call(reduce, [_load(builder, scores, FLOAT), total], fastmath=("reassoc",))
                builder.store(score, _pointer(builder, scores, FLOAT), align=4)
                return [builder.add(keys, stride), builder.add(scores, INT64(4))]

            _loop(builder, f"scores{count}", length, [keys, scores], body)

        _for_each_count(builder, vectors, MAX_VECTORS, case)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate


@intrinsic
def weighted_sum(_, vectors, weights, values, stride, length, target):
    """The sum of values, of so many vectors each, times their float32 weights [length]; addresses but for `stride`."""

    def generate(context, builder, signature, arguments):
        vectors, weights, values, stride, length, target = arguments
        multiply_add = _intrinsic(builder, f"llvm.fmuladd.v{LANES}f32", VECTOR, VECTOR, VECTOR, VECTOR)

        def case(count):
            def body(weights, values, *sums):
                weight = _everywhere(builder, _load(builder, weights, FLOAT))
                loaded = [_load(builder, values, VECTOR, 4 * LANES * i) for i in range(count)]
                new = [builder.call(multiply_add, [weight, loaded[i], sums[i]]) for i in range(count)]
                return [builder.add(weights, INT64(4)), builder.add(values, stride), *new]

            zeros = [_constant(VECTOR, 0.0)] * count
            sums = _loop(builder, f"weighted{count}", length, [weights, values, *zeros], body)[2:]
            _store(builder, sums, target)

        _for_each_count(builder, vectors, MAX_VECTORS, case)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate


# Small functions of numbers.


@compiled
def exp(x):
    """e to the power of x in float32, to a few units in the last place; x is taken as -87 to 88."""
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
    return series * float_of_bits((np.int32(power) + np.int32(127)) << np.int32(23))


@compiled
def gelu(x):
    """GELU's tanh approximation: 0.5 x (1 + tanh(u)) is x / (1 + exp(-2 u))."""
    return x / (np.float32(1) + exp(-x * (np.float32(1.5957691216057308) + np.float32(0.07135481627159730) * x * x)))


@compiled
def start_of(block, rows):
    """The first row of a block: `rows` rows stand in as few blocks as possible, spread evenly."""
    return block * rows // blocks_of(rows)


@compiled
def blocks_of(rows):
    return (rows + MAX_ROWS - 1) // MAX_ROWS


@compiled
def place_of(row, rows, width):
    """Where the inputs of a row begin in an array of blocks [width, rows of the block], and how far apart they are."""
    block = ((row + 1) * blocks_of(rows) - 1) // rows
    start = start_of(block, rows)
    return start * width + row - start, start_of(block + 1, rows) - start


@compiled
def linear_at(address):
    table = integers(address)
    return Linear(table[0], table[1], table[2], table[3], table[4], table[5])


@compiled
def padded(width):
    """Inputs of a row with the zeros that fill up its last vector, for INT8."""
    return (width + LANES - 1) // LANES * LANES


@compiled
def bytes_of_panel(kind, width):
    """Of the memory that a panel of weights for so many inputs takes."""
    if kind == INT8:
        return padded(width) * PANEL
    return width * PANEL * (4 if kind == FP32 else 2)


# The chunks.


@compiled
def embed(model, call, row):
    """The embedding of a row's token and of its position, into `hidden`."""
    width = model.n_embd
    token = integers(call.tokens)[row]
    hidden = carray(floats(call.hidden + 4 * row * width), width)
    position = carray(floats(model.positions + 4 * integers(call.positions)[row] * width), width)
    head = linear_at(model.embedding)
    panel, column = token // PANEL, token % PANEL
    if model.kind == FP32:
        weights = floats(head.weights + 4 * (panel * width * PANEL + column))
        for index in range(width):
            hidden[index] = weights[index * PANEL] + position[index]
    elif model.kind == BF16:
        pairs = words(head.weights + 4 * (panel * width * LANES + column % LANES))
        shift = np.uint32(16 if column < LANES else 0)
        for index in range(width):
            bits = (pairs[index * LANES] << shift) & np.uint32(0xFFFF0000)
            hidden[index] = float_of_bits(np.int32(bits)) + position[index]
    else:
        steps = bytes_(head.weights + panel * bytes_of_panel(INT8, width) + column * GROUP)
        scale = floats(head.scales)[token]
        for index in range(width):
            step = steps[index // GROUP * GROUP * PANEL + index % GROUP]
            hidden[index] = np.float32(step) * scale + position[index]


@summing
def normalise(model, call, source, row, rows, norm):
    """LayerNorm of row `source` of `hidden` into the inputs of the next product, as its row `row` of `rows`."""
    width = model.n_embd
    hidden = carray(floats(call.hidden + 4 * source * width), width)
    total = np.float32(0)
    for index in range(width):
        total += hidden[index]
    mean = total / np.float32(width)
    squares = np.float32(0)
    for index in range(width):
        squares += (hidden[index] - mean) * (hidden[index] - mean)
    inverse = np.float32(1) / square_root(squares / np.float32(width) + floats(model.epsilon)[0])
    weights, biases = carray(floats(norm), width), carray(floats(norm + 4 * width), width)
    place, apart = place_of_input(model, row, rows, width)
    inputs = floats(call.inputs + 4 * place)
    for index in range(width):
        inputs[index * apart] = (hidden[index] - mean) * inverse * weights[index] + biases[index]
    if model.kind == INT8:
        quantize(call, call.inputs, row, rows, width)


@compiled
def place_of_input(model, row, rows, width):
    """Where the float inputs of a row begin, and how far apart they are: INT8 takes them by the row, to quantize."""
    if model.kind == INT8:
        return row * padded(width), 1
    return place_of(row, rows, width)


@compiled
def quantize(call, source, row, rows, width):
    """A row of float32 [rows, width] as codes from 0 to 255 and the Span that they stand for, for the next product.

    The code of 0 is a whole number, so 0 stays exact.
    """
    numbers, vectors = source + 4 * row * padded(width), padded(width) // LANES
    span = call.spans + SPAN_BYTES * row
    extent(numbers, vectors, span)
    edges = floats(span)
    least, greatest = edges[0], edges[1]
    scale = max((greatest - least) / np.float32(STEPS), np.float32(1e-30))
    inverse = np.float32(1) / scale
    zero = np.int32(np.float32(0.5) - least * inverse)
    place, apart = place_of(row, rows, padded(width) // GROUP)
    encode(numbers, vectors, inverse, np.float32(zero), call.codes + GROUP * place, GROUP * apart)
    floats(span)[0] = scale
    words(span + ZERO_OFFSET)[0] = np.uint32(zero)


@compiled
def product(model, call, number, linear, panel, rows, inputs, tile, use, is_last):
    """All rows times one panel of a matrix, and the results to where they belong.

    Unless it `is_last`, the next panel is fetched meanwhile: its beginning behind this one's end, or all of it during
    the second block of rows where there is one.
    """
    size_of_panel = bytes_of_panel(model.kind, linear.width)
    weights = linear.weights + panel * size_of_panel
    groups = padded(linear.width) // GROUP
    columns = min(PANEL, linear.outputs - panel * PANEL)
    results = carray(floats(tile), MAX_ROWS * PANEL)
    for block in range(blocks_of(rows)):
        start = start_of(block, rows)
        size = start_of(block + 1, rows) - start
        address = inputs + 4 * start * linear.width
        near, far = min(PREFETCH_BYTES, size_of_panel), weights
        if not is_last:
            far = weights + size_of_panel
            if block == 1:
                near = size_of_panel
        if model.kind == BF16:
            multiply_bf16(size, weights, address, linear.width, tile, near, far)
        elif model.kind == FP32:
            multiply_fp32(size, weights, address, linear.width, tile, near, far)
        else:
            codes, spans = call.codes + start * groups * GROUP, call.spans + SPAN_BYTES * start
            scales, totals = linear.scales + 4 * panel * PANEL, linear.totals + 4 * panel * PANEL
            multiply_int8(size, weights, codes, groups, tile, near, far, spans, scales, totals)
        if linear.bias != 0:
            bias = carray(floats(linear.bias + 4 * panel * PANEL), PANEL)
            for row in range(size):
                for column in range(PANEL):
                    results[row * PANEL + column] += bias[column]
        if use == TO_INPUTS:
            activate(model, results, size)
            for row in range(size):
                place, apart = place_of_input(model, start + row, rows, linear.outputs)
                target = floats(call.wide_inputs + 4 * (place + panel * PANEL * apart))
                for column in range(columns):
                    target[column * apart] = results[row * PANEL + column]
        elif use == TO_CACHE:
            for row in range(size):
                spread(model, call, number, start + row, panel * PANEL, columns, tile + 4 * row * PANEL)
        elif use == TO_HIDDEN:
            for row in range(size):
                hidden = floats(call.hidden + 4 * ((start + row) * linear.outputs + panel * PANEL))
                for column in range(columns):
                    hidden[column] += results[row * PANEL + column]
        else:
            for row in range(size):
                logits = floats(call.logits + 4 * ((start + row) * linear.outputs + panel * PANEL))
                for column in range(columns):
                    logits[column] = results[row * PANEL + column]


@compiled
def activate(model, results, rows):
    if model.activation == RELU:
        for index in range(rows * PANEL):
            results[index] = max(results[index], np.float32(0))
    else:
        for index in range(rows * PANEL):
            results[index] = gelu(results[index])


@compiled
def spread(model, call, number, row, first, columns, source):
    """Columns of a row's queries, keys and values to `queries` and to the place of its position in the buffers."""
    width, size = model.n_embd, model.head_size
    slot, position = integers(call.slots)[row], integers(call.positions)[row]
    column = 0
    while column < columns:
        part, place = (first + column) // width, (first + column) % width
        head, offset = place // size, place % size
        count = min(columns - column, size - offset)
        if part == 0:
            target = call.queries + 4 * ((row * model.n_head + head) * model.head_stride + offset)
        else:
            buffer = model.keys if part == 1 else model.values
            target = buffer + 4 * (kv_place(model, number, slot, head, position) + offset)
        targets, sources = floats(target), floats(source + 4 * column)
        for index in range(count):
            targets[index] = sources[index]
        column += count


@compiled
def kv_place(model, number, slot, head, position):
    return (((number * model.slots + slot) * model.n_head + head) * model.n_ctx + position) * model.head_stride


@compiled
def attend(model, call, number, row, head, rows, scratch):
    """One head's attention of a row over the positions up to its own, into the inputs of the next product."""
    slot, length = integers(call.slots)[row], integers(call.positions)[row] + 1
    stride = 4 * model.head_stride
    query = call.queries + stride * (row * model.n_head + head)
    start = 4 * kv_place(model, number, slot, head, np.int64(0))
    scores = carray(floats(scratch), length)
    for index in range(length):
        scores[index] = np.float32(0)
    for first in range(0, model.head_stride, MAX_VECTORS * LANES):
        vectors = min(MAX_VECTORS, (model.head_stride - first) // LANES)
        add_scores(vectors, query + 4 * first, model.keys + start + 4 * first, stride, length, scratch)
    inverse = soften(scores, length, floats(model.epsilon)[1 + number])
    place, apart = place_of_input(model, row, rows, model.n_embd)
    inputs = floats(call.inputs + 4 * (place + head * model.head_size * apart))
    mixed = scratch + 4 * model.n_ctx
    for first in range(0, model.head_stride, MAX_VECTORS * LANES):
        vectors = min(MAX_VECTORS, (model.head_stride - first) // LANES)
        weighted_sum(vectors, scratch, model.values + start + 4 * first, stride, length, mixed + 4 * first)
    results = floats(mixed)
    for index in range(model.head_size):
        inputs[index * apart] = results[index] * inverse


@summing
def soften(scores, length, scale):
    """Scores to unnormalised probabilities; gives what makes their sum 1."""
    greatest = scores[0]
    for index in range(length):
        greatest = max(greatest, scores[index])
    for index in range(length):
        scores[index] = exp((scores[index] - greatest) * scale)
    total = np.float32(0)
    for index in range(length):
        total += scores[index]
    return np.float32(1) / total


# The phases: who takes which chunk, and when all are done.


@compiled
def take(call, phase):
    """The number of a chunk that nobody has taken yet; past the last one where there is none."""
    return fetch_and_add_one(call.counters + 2 * COUNTER_BYTES * phase)


@compiled
def finish(call, phase):
    fetch_and_add_one(call.counters + 2 * COUNTER_BYTES * phase + COUNTER_BYTES)


@compiled
def wait(call, phase, chunks):
    """Wait until every chunk of a phase is done; gives the number of the next phase."""
    spins = 0
    while fetch(call.counters + 2 * COUNTER_BYTES * phase + COUNTER_BYTES) < chunks:
        pause()
        spins += 1
        if spins > SPINS:
            call_function(call.sched_yield)
    return phase + 1


@compiled
def norm_phase(model, call, phase, rows, norm, final):
    row = take(call, phase)
    while row < rows:
        source = integers(call.wanted)[row] if final else row
        normalise(model, call, source, row, rows, norm)
        finish(call, phase)
        row = take(call, phase)
    return wait(call, phase, rows)


@compiled
def product_phase(model, call, phase, number, linear, rows, inputs, scratch, use):
    """The chunks are some panels that follow each other, for the processor likes to read memory in order."""
    panels = (linear.outputs + PANEL - 1) // PANEL
    size = min(max(panels // (4 * call.threads), 1), MAX_PANELS)
    chunks = (panels + size - 1) // size
    chunk = take(call, phase)
    while chunk < chunks:
        last = min((chunk + 1) * size, panels) - 1
        for panel in range(chunk * size, last + 1):
            product(model, call, number, linear, panel, rows, inputs, scratch, use, panel == last)
        finish(call, phase)
        chunk = take(call, phase)
    return wait(call, phase, chunks)


@compiled
def attention_phase(model, call, phase, number, rows, scratch):
    heads = model.n_head
    chunk = take(call, phase)
    while chunk < rows * heads:
        attend(model, call, number, chunk // heads, chunk % heads, rows, scratch)
        finish(call, phase)
        chunk = take(call, phase)
    return wait(call, phase, rows * heads)


@compiled
def quantize_phase(model, call, phase, source, rows, width):
    """What is no product's inputs yet: a row is quantised when all of it is there. Nothing but for INT8."""
    if model.kind != INT8:
        return phase
    row = take(call, phase)
    while row < rows:
        quantize(call, source, row, rows, width)
        finish(call, phase)
        row = take(call, phase)
    return wait(call, phase, rows)


@compiled
def run(model, call, thread):
    """All phases of a step; each of the threads that take part calls this."""
    rows = call.rows
    scratch = call.scratch + thread * call.scratch_bytes
    phase = 0
    row = take(call, phase)
    while row < rows:
        embed(model, call, row)
        finish(call, phase)
        row = take(call, phase)
    phase = wait(call, phase, rows)
    for number in range(model.n_layer):
        table = integers(model.layers + 8 * number * LAYER_FIELDS)
        layer = Layer(table[0], table[1], table[2], table[3], table[4], table[5])
        inputs = call.inputs
        phase = norm_phase(model, call, phase, rows, layer.norm_1, False)
        linear = linear_at(layer.attention_in)
        phase = product_phase(model, call, phase, number, linear, rows, inputs, scratch, TO_CACHE)
        phase = attention_phase(model, call, phase, number, rows, scratch)
        linear = linear_at(layer.attention_out)
        phase = quantize_phase(model, call, phase, inputs, rows, linear.width)
        phase = product_phase(model, call, phase, number, linear, rows, inputs, scratch, TO_HIDDEN)
        phase = norm_phase(model, call, phase, rows, layer.norm_2, False)
        linear = linear_at(layer.feed_in)
        phase = product_phase(model, call, phase, number, linear, rows, inputs, scratch, TO_INPUTS)
        linear = linear_at(layer.feed_out)
        phase = quantize_phase(model, call, phase, call.wide_inputs, rows, linear.width)
        phase = product_phase(model, call, phase, number, linear, rows, call.wide_inputs, scratch, TO_HIDDEN)
    rows = call.wanted_rows
    if rows > 0:
        phase = norm_phase(model, call, phase, rows, model.norm, True)
        product_phase(model, call, phase, 0, linear_at(model.head), rows, call.inputs, scratch, TO_LOGITS)


def step(model_table, call_table, thread):
    """run() for a caller that has addresses: of the Model and the Call as int64 arrays."""
    m = carray(model_table, MODEL_FIELDS)
    c = carray(call_table, CALL_FIELDS)
    model = Model(
        m[0],
        m[1],
        m[2],
        m[3],
        m[4],
        m[5],
        m[6],
        m[7],
        m[8],
        m[9],
        m[10],
        m[11],
        m[12],
        m[13],
        m[14],
        m[15],
        m[16],
    )
    call = Call(
        c[0],
        c[1],
        c[2],
        c[3],
        c[4],
        c[5],
        c[6],
        c[7],
        c[8],
        c[9],
        c[10],
        c[11],
        c[12],
        c[13],
        c[14],
        c[15],
        c[16],
        c[17],
    )
    run(model, call, thread)


def compile_entry():
    """Compile step; compiled.py keeps the machine code."""
    table = types.CPointer(types.int64)
    return cfunc(types.void(table, table, types.int64))(step)
