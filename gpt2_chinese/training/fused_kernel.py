"""The compiled part of blocks.py: what a GPT-2 block does between its products, forward and backward.

Importing this module imports Numba; fused.py does so only where the machine code is not cached yet.

An operation goes through rows, and several threads can divide them. What is summed over rows is summed in portions of
`SUM_ROWS` of them, so that no result depends on the number of threads. Numbers in memory are float32 or bf16, those
that are computed with float32.
"""

# mypy: allow-untyped-defs, disable-error-code="call-arg, var-annotated"
# Numba infers the types of the compiled functions from their calls.

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import cfunc, njit, types
from numba.extending import intrinsic

from gpt2_chinese.decoding.decoder_kernel import (
    _pointer_to,
    atomic_fetch_add_one,
    exp,
    float32_at,
    float_from_bits,
    gelu,
    int64_at,
    square_root,
)
from gpt2_chinese.training.fused import SUM_ROWS, TILE, Operation

compiled = njit(error_model="numpy", fastmath={"contract"})
compiled_reassociating = njit(error_model="numpy", fastmath={"contract", "reassoc", "nsz"})
uint16_at = _pointer_to(types.uint16)
TWO_ROOTS, CUBIC = 1.5957691216057308, 0.044715  # 2 sqrt(2 / pi), of GELU's tanh approximation (Hendrycks 2016)


@intrinsic
def bits_of_float(_, x):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


@compiled
def load_bf16(numbers, index):
    return float_from_bits(np.int32(numbers[index]) << np.int32(16))


@compiled
def store_bf16(numbers, index, x):
    """Store the nearest bf16, of two equally near ones the even one."""
    bits = bits_of_float(x)
    odd = (bits >> np.int32(16)) & np.int32(1)
    numbers[index] = np.uint16(np.int32(bits + np.int32(0x7FFF) + odd) >> np.int32(16))


@compiled
def load_float32(numbers, index):
    return numbers[index]


@compiled
def store_float32(numbers, index, x):
    numbers[index] = x


@compiled
def order_of(x):
    """An integer that is the greater, the greater the number: maxima of integers are found many at a time."""
    bits = bits_of_float(x)
    return np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@compiled
def number_of_order(order):
    return float_from_bits(np.int32(order ^ ((order >> np.int32(31)) & np.int32(0x7FFFFFFF))))


@compiled
def kept(index, seed, threshold):
    """1 or 0, by a hash of the number of a unit and a seed (the finalizer of MurmurHash3, Appleby 2011)."""
    x = np.uint32(np.uint32(index) ^ np.uint32(seed))
    x = np.uint32(x * np.uint32(0x9E3779B1)) + np.uint32(seed >> 32)
    x = np.uint32(x)
    x = np.uint32(x ^ (x >> np.uint32(16)))
    x = np.uint32(x * np.uint32(0x85EBCA6B))
    x = np.uint32(x ^ (x >> np.uint32(13)))
    x = np.uint32(x * np.uint32(0xC2B2AE35))
    x = np.uint32(x ^ (x >> np.uint32(16)))
    return np.float32(1) if x >= np.uint32(threshold) else np.float32(0)


@compiled
def end_of_portion(portion, rows):
    return min((portion + 1) * SUM_ROWS, rows)


@compiled
def clear(numbers, begin, count):
    for index in range(begin, begin + count):
        numbers[index] = np.float32(0)


@compiled
def add_context(shares, weight, context, offsets, tokens, of_tokens):
    """Add what follows a context, whose n-grams lie one after the other."""
    offsets, tokens, of_tokens = int64_at(offsets), int64_at(tokens), float32_at(of_tokens)
    for place in range(offsets[context], offsets[context + 1]):
        shares[tokens[place]] += weight * of_tokens[place]


@compiled
def add_cache(shares, weight, last, seen, tokens):
    """Add what the `seen` tokens up to the place `last` say about the next one (ngram_teacher.py has the formula)."""
    first = last - seen + 1
    times = 0
    for place in range(first + 1, last + 1):
        times += tokens[place - 1] == tokens[last]
    share = weight / np.float32(times + 1)
    of_one = share / np.float32(seen)
    for place in range(first, last + 1):
        follows = place > first and tokens[place - 1] == tokens[last]
        shares[tokens[place]] += of_one + (share if follows else np.float32(0))


def _operations(at, load, store):
    """The operations on numbers of one type: `entry(operation, args, begin, end)`."""

    @compiled_reassociating
    def normalize(args, begin, end):
        """Add what a branch gives to the residual stream, with its bias and dropout, and normalize the sum."""
        hidden, width = float32_at(args[0]), args[1]
        has_branch, branch, branch_bias = args[2] != 0, at(args[2]), float32_at(args[3])
        total, weight, bias = float32_at(args[4]), float32_at(args[5]), float32_at(args[6])
        normal, means, inverses = at(args[7]), float32_at(args[8]), float32_at(args[9])
        epsilon, seed, threshold, scale = float32_at(args[10])[0], args[11], args[12], float32_at(args[10])[1]
        for row in range(begin, end):
            first = row * width
            if has_branch:
                if threshold:
                    for column in range(width):
                        mask = kept(first + column, seed, threshold) * scale
                        total[first + column] = hidden[first + column] + mask * (
                            load(branch, first + column) + branch_bias[column]
                        )
                else:
                    for column in range(width):
                        total[first + column] = (
                            hidden[first + column] + load(branch, first + column) + branch_bias[column]
                        )
            source = total if has_branch else hidden
            mean = np.float32(0)
            for column in range(width):
                mean += source[first + column]
            mean /= np.float32(width)
            square = np.float32(0)
            for column in range(width):
                square += (source[first + column] - mean) * (source[first + column] - mean)
            inverse = np.float32(1) / square_root(square / np.float32(width) + epsilon)
            means[row], inverses[row] = mean, inverse
            for column in range(width):
                store(
                    normal,
                    first + column,
                    (source[first + column] - mean) * inverse * weight[column] + bias[column],
                )

    @compiled_reassociating
    def normalize_backward(args, begin, end):
        """Gradient of what was normalized, added to the stream's; and that of the branch before, dropped out."""
        outer, width, hidden = at(args[0]), args[1], float32_at(args[2])
        weight, means, inverses = float32_at(args[3]), float32_at(args[4]), float32_at(args[5])
        has_stream, stream, result = args[6] != 0, float32_at(args[6]), float32_at(args[7])
        to_weight, to_bias, rows = float32_at(args[8]), float32_at(args[9]), args[10]
        has_branch, branch, seed, threshold, scale = (
            args[11] != 0,
            at(args[11]),
            args[12],
            args[13],
            float32_at(args[14])[0],
        )
        for portion in range(begin, end):
            sums = portion * width
            clear(to_weight, sums, width)
            clear(to_bias, sums, width)
            for row in range(portion * SUM_ROWS, end_of_portion(portion, rows)):
                first = row * width
                mean, inverse = means[row], inverses[row]
                total, projected = np.float32(0), np.float32(0)
                for column in range(width):
                    gradient = load(outer, first + column)
                    normal = (hidden[first + column] - mean) * inverse
                    to_weight[sums + column] += gradient * normal
                    to_bias[sums + column] += gradient
                    total += gradient * weight[column]
                    projected += gradient * weight[column] * normal
                total /= np.float32(width)
                projected /= np.float32(width)
                for column in range(width):
                    normal = (hidden[first + column] - mean) * inverse
                    own = inverse * (load(outer, first + column) * weight[column] - total - normal * projected)
                    result[first + column] = own + stream[first + column] if has_stream else own
                if has_branch:
                    if threshold:
                        for column in range(width):
                            place = first + column
                            store(branch, place, result[place] * (kept(place, seed, threshold) * scale))
                    else:
                        for column in range(width):
                            store(branch, first + column, result[first + column])

    @compiled
    def sum_rows(args, begin, end):
        """Sums of the columns of each portion of rows."""
        numbers, width, sums, rows = at(args[0]), args[1], float32_at(args[2]), args[3]
        for portion in range(begin, end):
            own = portion * width
            clear(sums, own, width)
            for row in range(portion * SUM_ROWS, end_of_portion(portion, rows)):
                first = row * width
                for column in range(width):
                    sums[own + column] += load(numbers, first + column)

    @compiled
    def activate(args, begin, end):
        """GELU of numbers and their bias."""
        inputs, width, bias, outputs = at(args[0]), args[1], float32_at(args[2]), at(args[3])
        for row in range(begin, end):
            first = row * width
            for column in range(width):
                store(outputs, first + column, gelu(load(inputs, first + column) + bias[column]))

    @compiled
    def activate_backward(args, begin, end):
        """The gradient in the place of `outer`, its sums over portions of rows, and the outputs once more."""
        inputs, width, bias, outer = at(args[0]), args[1], float32_at(args[2]), at(args[3])
        sums, rows, outputs = float32_at(args[4]), args[5], at(args[6])
        for portion in range(begin, end):
            own = portion * width
            clear(sums, own, width)
            for row in range(portion * SUM_ROWS, end_of_portion(portion, rows)):
                first = row * width
                for column in range(width):
                    x = load(inputs, first + column) + bias[column]
                    twice = x * (np.float32(TWO_ROOTS) + np.float32(TWO_ROOTS * CUBIC) * x * x)
                    share = np.float32(1) / (np.float32(1) + exp(-twice))
                    slope = np.float32(TWO_ROOTS) + np.float32(3 * TWO_ROOTS * CUBIC) * x * x
                    gradient = (
                        load(outer, first + column) * share * (np.float32(1) + x * (np.float32(1) - share) * slope)
                    )
                    store(outer, first + column, gradient)
                    store(outputs, first + column, x * share)
                    sums[own + column] += gradient

    @compiled
    def split_heads(args, begin, end):
        """Parts [count, B, heads, T, size] of numbers [B, T, count, heads, size], with a bias; the first one scaled."""
        joined, has_bias, bias, parts = at(args[0]), args[1] != 0, float32_at(args[1]), at(args[2])
        count, windows, heads, length, size, scale = args[3], args[4], args[5], args[6], args[7], float32_at(args[8])[0]
        width = heads * size
        for row in range(begin, end):
            window, place = row // length, row % length
            for part in range(count):
                factor = scale if part == 0 else np.float32(1)
                for head in range(heads):
                    source, column = (row * count + part) * width + head * size, part * width + head * size
                    target = (((part * windows + window) * heads + head) * length + place) * size
                    if has_bias:
                        for index in range(size):
                            x = load(joined, source + index) + bias[column + index]
                            store(parts, target + index, factor * x)
                    else:
                        for index in range(size):
                            store(parts, target + index, factor * load(joined, source + index))

    @compiled
    def join_heads(args, begin, end):
        """The other way round, without a bias."""
        parts, joined = at(args[0]), at(args[1])
        count, windows, heads, length, size, scale = args[2], args[3], args[4], args[5], args[6], float32_at(args[7])[0]
        width = heads * size
        for row in range(begin, end):
            window, place = row // length, row % length
            for part in range(count):
                factor = scale if part == 0 else np.float32(1)
                for head in range(heads):
                    source = (((part * windows + window) * heads + head) * length + place) * size
                    target = (row * count + part) * width + head * size
                    for index in range(size):
                        store(joined, target + index, factor * load(parts, source + index))

    @compiled_reassociating
    def softmax(args, begin, end):
        """The weights of a block's queries in the place of their scores [B heads, size, last]; and those kept."""
        scores, size, last, heads, length = at(args[0]), args[1], args[2], args[3], args[4]
        has_first, first_keys = args[5] != 0, int64_at(args[5])
        dropped, seed, threshold = at(args[6]), args[7], args[8]
        for row in range(begin, end):
            for number in range(size):
                query = last - size + number
                place = (row * size + number) * last
                low = first_keys[row // heads * length + query] if has_first else 0
                greatest = order_of(np.float32(-np.inf))
                for key in range(low, query + 1):
                    greatest = max(greatest, order_of(load(scores, place + key)))
                maximum = number_of_order(greatest)
                total = np.float32(0)
                for key in range(low, query + 1):
                    total += exp(load(scores, place + key) - maximum)
                share = np.float32(1) / total
                for key in range(low):
                    store(scores, place + key, np.float32(0))
                for key in range(low, query + 1):
                    store(scores, place + key, exp(load(scores, place + key) - maximum) * share)
                for key in range(query + 1, last):
                    store(scores, place + key, np.float32(0))
                if threshold:
                    unit = (row * length + query) * length
                    for key in range(last):
                        store(dropped, place + key, load(scores, place + key) * kept(unit + key, seed, threshold))

    @compiled_reassociating
    def softmax_backward(args, begin, end):
        """Gradients of the scores in the place of those of the weights that were kept; and these weights."""
        outer, size, last, length = at(args[0]), args[1], args[2], args[4]
        weights, dropped, seed, threshold = at(args[5]), at(args[6]), args[7], args[8]
        heads, has_first, first_keys = args[3], args[9] != 0, int64_at(args[9])
        for row in range(begin, end):
            for number in range(size):
                query = last - size + number
                place, unit = (row * size + number) * last, (row * length + query) * length
                low = first_keys[row // heads * length + query] if has_first else 0
                if threshold:
                    for key in range(last):
                        mask = kept(unit + key, seed, threshold)
                        store(dropped, place + key, load(weights, place + key) * mask)
                        store(outer, place + key, load(outer, place + key) * mask)
                total = np.float32(0)
                for key in range(low, query + 1):
                    total += load(weights, place + key) * load(outer, place + key)
                for key in range(low):
                    store(outer, place + key, np.float32(0))
                for key in range(low, query + 1):
                    store(outer, place + key, load(weights, place + key) * (load(outer, place + key) - total))
                for key in range(query + 1, last):
                    store(outer, place + key, np.float32(0))

    @compiled_reassociating
    def cross_entropy(args, begin, end):
        """The losses of portions of rows of logits, and in their place their gradient: softmax less what is wanted.

        Wanted is the target, or it and a distribution in shares.
        """
        logits, columns, targets, losses = at(args[0]), args[1], int64_at(args[2]), float32_at(args[3])
        rows, room, is_taught, taught = args[5], args[4], args[6] != 0, at(args[6])
        of_taught = float32_at(args[7])[0]
        for portion in range(begin, end):
            exponentials = float32_at(room + 4 * columns * portion)
            for row in range(portion * SUM_ROWS, end_of_portion(portion, rows)):
                first = row * columns
                greatest, poison = order_of(load(logits, first)), np.float32(0)
                for column in range(columns):
                    x = load(logits, first + column)
                    greatest = max(greatest, order_of(x))
                    poison += x * np.float32(0)  # nan, if any number is no finite one
                maximum = number_of_order(greatest)
                target, total = targets[row], np.float32(0)
                for column in range(columns):
                    exponentials[column] = exp(load(logits, first + column) - maximum)
                # In a loop of its own: one that also stores is not vectorised where two short rows lie close to each
                # other in memory, and adds up in another order there.
                for column in range(columns):
                    total += exponentials[column]
                losses[row] = np.float32(math.log(total)) + maximum - load(logits, first + target) + poison
                share = np.float32(1) / total + poison
                of_target = exponentials[target] * share - (np.float32(1) - of_taught)
                if is_taught:
                    for column in range(columns):
                        wanted = of_taught * load(taught, first + column)
                        store(logits, first + column, exponentials[column] * share - wanted)
                    of_target -= of_taught * load(taught, first + target)
                else:
                    for column in range(columns):
                        store(logits, first + column, exponentials[column] * share)
                store(logits, first + target, of_target)

    @compiled_reassociating
    def add_softmax(args, begin, end):
        """Add the softmax of portions of rows of logits, times a factor, to distributions."""
        logits, columns, distributions, room = at(args[0]), args[1], at(args[2]), args[3]
        rows, factor = args[4], float32_at(args[5])[0]
        for portion in range(begin, end):
            exponentials = float32_at(room + 4 * columns * portion)
            for row in range(portion * SUM_ROWS, end_of_portion(portion, rows)):
                first = row * columns
                greatest = order_of(load(logits, first))
                for column in range(columns):
                    greatest = max(greatest, order_of(load(logits, first + column)))
                maximum, total = number_of_order(greatest), np.float32(0)
                for column in range(columns):
                    exponentials[column] = exp(load(logits, first + column) - maximum)
                # in a loop of its own: see cross_entropy
                for column in range(columns):
                    total += exponentials[column]
                share = factor / total
                for column in range(columns):
                    place = first + column
                    store(distributions, place, load(distributions, place) + exponentials[column] * share)

    @compiled
    def write_ngrams(args, begin, end):
        """The distributions of a trigram: the unigram in its weight, and what bigrams, trigrams and a cache add."""
        distributions, columns, room, rows = at(args[0]), args[1], args[2], args[3]
        unigram, weight = float32_at(args[4]), float32_at(args[5])[0]
        bigram_of, trigram_of, certain = int64_at(args[6]), int64_at(args[7]), int64_at(args[8])
        seen, tokens, first = int64_at(args[9]), int64_at(args[19]), args[20]
        of_unigram, of_bigrams, of_cache = float32_at(args[10]), float32_at(args[11]), float32_at(args[12])
        for portion in range(begin, end):
            shares = float32_at(room + 4 * columns * portion)
            for row in range(portion * SUM_ROWS, end_of_portion(portion, rows)):
                share = weight * of_unigram[row]
                for column in range(columns):
                    shares[column] = share * unigram[column]
                if certain[row] >= 0:
                    shares[certain[row]] += weight
                else:
                    add_context(shares, weight * of_bigrams[row], bigram_of[row], args[13], args[14], args[15])
                    if trigram_of[row] >= 0:
                        of_trigrams = weight * (np.float32(1) - of_cache[row])
                        add_context(shares, of_trigrams, trigram_of[row], args[16], args[17], args[18])
                    if of_cache[row] > 0:
                        add_cache(shares, weight * of_cache[row], first + row, seen[row], tokens)
                for column in range(columns):
                    store(distributions, row * columns + column, shares[column])

    @compiled
    def update_momentum(args, begin, end):
        """Muon's momentum and the decay of its weights, tiles of rows; and Nesterov's direction, lying on its side."""
        gradients, momentum, weights = float32_at(args[0]), float32_at(args[1]), float32_at(args[2])
        height, width, parts, is_tall, directions = args[3], args[4], args[5], args[6], at(args[7])
        beta, keep = float32_at(args[8])[0], float32_at(args[8])[1]
        new = np.float32(1) - beta
        for tile in range(begin, end):
            top, bottom = tile * TILE, min((tile + 1) * TILE, height)
            for row in range(top, bottom):
                for place in range(row * parts * width, (row + 1) * parts * width):
                    weights[place] *= keep
                    momentum[place] += new * (gradients[place] - momentum[place])
            for part in range(parts):
                base = part * height * width
                if is_tall:
                    for left in range(0, width, TILE):
                        for column in range(left, min(left + TILE, width)):
                            for row in range(top, bottom):
                                place = (row * parts + part) * width + column
                                direction = gradients[place] + beta * (momentum[place] - gradients[place])
                                store(directions, base + column * height + row, direction)
                else:
                    for row in range(top, bottom):
                        first = (row * parts + part) * width
                        for column in range(width):
                            own = gradients[first + column]
                            direction = own + beta * (momentum[first + column] - own)
                            store(directions, base + row * width + column, direction)

    @compiled
    def add_steps(args, begin, end):
        """Steps of `update_momentum`'s form, times a factor, added to the weights."""
        weights, height, width, parts, is_tall = float32_at(args[0]), args[1], args[2], args[3], args[4]
        steps, factor = at(args[5]), float32_at(args[6])[0]
        for tile in range(begin, end):
            top, bottom = tile * TILE, min((tile + 1) * TILE, height)
            for part in range(parts):
                base = part * height * width
                if is_tall:
                    for left in range(0, width, TILE):
                        for row in range(top, bottom):
                            first = (row * parts + part) * width
                            for column in range(left, min(left + TILE, width)):
                                weights[first + column] += factor * load(steps, base + column * height + row)
                else:
                    for row in range(top, bottom):
                        first, source = (row * parts + part) * width, base + row * width
                        for column in range(width):
                            weights[first + column] += factor * load(steps, source + column)

    @compiled
    def run(operation, args, begin, end):
        if operation == NORMALIZE:
            normalize(args, begin, end)
        elif operation == NORMALIZE_BACKWARD:
            normalize_backward(args, begin, end)
        elif operation == SUM_OF_ROWS:
            sum_rows(args, begin, end)
        elif operation == GELU:
            activate(args, begin, end)
        elif operation == GELU_BACKWARD:
            activate_backward(args, begin, end)
        elif operation == SPLIT_HEADS:
            split_heads(args, begin, end)
        elif operation == JOIN_HEADS:
            join_heads(args, begin, end)
        elif operation == SOFTMAX:
            softmax(args, begin, end)
        elif operation == SOFTMAX_BACKWARD:
            softmax_backward(args, begin, end)
        elif operation == CROSS_ENTROPY:
            cross_entropy(args, begin, end)
        elif operation == ADD_SOFTMAX:
            add_softmax(args, begin, end)
        elif operation == WRITE_NGRAMS:
            write_ngrams(args, begin, end)
        elif operation == MOMENTUM:
            update_momentum(args, begin, end)
        else:
            add_steps(args, begin, end)

    return run


(
    NORMALIZE,
    NORMALIZE_BACKWARD,
    SUM_OF_ROWS,
    GELU,
    GELU_BACKWARD,
    SPLIT_HEADS,
    JOIN_HEADS,
    SOFTMAX,
    SOFTMAX_BACKWARD,
    CROSS_ENTROPY,
    ADD_SOFTMAX,
    WRITE_NGRAMS,
    MOMENTUM,
    ADD_STEPS,
) = map(int, Operation)
_run_bf16 = _operations(uint16_at, load_bf16, store_bf16)
_run_float32 = _operations(float32_at, load_float32, store_float32)


@compiled
def run(task):
    """Run the parts of an operation that no other thread has begun; every thread gets the same `task` of fused.py."""
    args, operation, is_bf16, rows, parts = int64_at(task[0]), task[1], task[2], task[3], task[4]
    while True:
        part = atomic_fetch_add_one(task[5])
        if part >= parts:
            return
        begin, end = part * rows // parts, (part + 1) * rows // parts
        if is_bf16:
            _run_bf16(operation, args, begin, end)
        else:
            _run_float32(operation, args, begin, end)


def compile_entry():
    """Compile `run`; compiled.py caches the machine code."""

    def entry(task):
        run(task)

    return cfunc(types.void(types.CPointer(types.int64)), error_model="numpy")(entry)
