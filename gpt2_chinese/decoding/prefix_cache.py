"""Prefix caching: the keys and values of recent contexts, so that one that begins like them computes only what is new.

An input box sends its context again with every keystroke, a token longer each time. The keys and values of a token
depend on it and on the tokens before it, and on nothing else, so those of a common beginning are the same to the bit.

They are kept in blocks of BLOCK_TOKENS tokens, which are the nodes of a tree: the children of a block continue its
tokens. Contexts that begin alike share blocks. Where memory is needed, the block that was used least recently goes.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpt2_chinese.decoding.backend import PrefixCacheState

BLOCK_TOKENS = 16
MIN_REUSED_TOKENS = 2
"""A shorter common beginning is not looked for: every context begins with the same [MASK]."""
MAX_OVERWRITTEN_TOKENS = 4
"""Of a context that is kept, if a new one differs from it in so few tokens at its end; otherwise both are kept.

Typing changes the last tokens again and again. To compute so few takes hardly longer than to compute one.
"""
MIN_BLOCK_TOKENS = MIN_REUSED_TOKENS + MAX_OVERWRITTEN_TOKENS
"""A block begins with so many, so that it is still found when its last tokens are others."""


@dataclass(eq=False)
class _Block:
    """Up to BLOCK_TOKENS tokens that follow those of `parent`, a block that is full.

    Attributes:
        index: of its keys and values; -1 for the root, which has none.
        children: by their first MIN_REUSED_TOKENS tokens.
    """

    index: int
    parent: _Block | None
    tokens: list[int]
    children: dict[tuple[int, ...], list[_Block]] = field(default_factory=dict)

    def best_child(self, ids: list[int]) -> tuple[_Block | None, int]:
        """The child with the longest common beginning with `ids`, and the length of that."""
        siblings = self.children.get(tuple(ids[:MIN_REUSED_TOKENS]), ())
        common = [(common_length(child.tokens, ids), child) for child in siblings]
        length, child = max(common, key=lambda pair: pair[0], default=(0, None))
        return child, length


class BlockTree:
    """The keys and values of contexts, in at most `max_bytes`.

    They come from a slot of the KV cache and go to one. Its keys and its values are
    [n_layer, n_head, n_ctx, head_stride].

    Attributes:
        capacity_bytes: of all blocks; 0 if `max_bytes` has no room for one.
    """

    def __init__(self, n_layer: int, n_head: int, head_stride: int, max_bytes: int, dtype: Any = np.float32) -> None:
        shape = (n_layer, n_head, BLOCK_TOKENS, head_stride)
        self._block_bytes = 2 * np.dtype(dtype).itemsize * math.prod(shape)
        num_blocks = max_bytes // self._block_bytes
        self._keys, self._values = (np.zeros((num_blocks, *shape), dtype) for _ in range(2))
        self._free = list(range(num_blocks))
        self._root = _Block(-1, None, [])
        # The least recently used block first. A path is entered from its end: children come before their parent.
        self._used: OrderedDict[_Block, None] = OrderedDict()
        self.capacity_bytes = num_blocks * self._block_bytes

    @property
    def used_bytes(self) -> int:
        return len(self._used) * self._block_bytes

    def match(self, ids: list[int]) -> int:
        """How many tokens from the beginning of `ids` have their keys and values here."""
        return self._find(ids)[1]

    def load(self, ids: list[int], begin: int, keys: np.ndarray, values: np.ndarray) -> None:
        """Copy the keys and values of `ids`, which must be here, to those of a slot, from position `begin` on."""
        path, length = self._find(ids)
        assert length == len(ids)
        for number in range(begin // BLOCK_TOKENS, len(path)):
            first = number * BLOCK_TOKENS
            inside = slice(max(begin - first, 0), min(length - first, BLOCK_TOKENS))
            place = slice(first + inside.start, first + inside.stop)
            keys[:, :, place] = self._keys[path[number].index, :, :, inside]
            values[:, :, place] = self._values[path[number].index, :, :, inside]
        self._touch(path)

    def store(self, ids: list[int], keys: np.ndarray, values: np.ndarray) -> None:
        """Keep the keys and values of `ids`, those of a slot; of too many, those of the first ones."""
        ids = ids[: len(self._keys) * BLOCK_TOKENS]
        path, length = self._find_to_extend(ids)
        self._touch(path)  # so that nothing of it is evicted now
        while length < len(ids):
            inside = length % BLOCK_TOKENS
            new = ids[length : length - inside + BLOCK_TOKENS]
            if inside:
                path[-1].tokens += new
            elif len(new) >= MIN_BLOCK_TOKENS:
                path.append(self._add_block(path[-1] if path else self._root, new))
            else:
                break
            place, end = slice(inside, inside + len(new)), length + len(new)
            self._keys[path[-1].index, :, :, place] = keys[:, :, length:end]
            self._values[path[-1].index, :, :, place] = values[:, :, length:end]
            length = end
        self._touch(path)

    def _find_to_extend(self, ids: list[int]) -> tuple[list[_Block], int]:
        """As `_find`, but the last block ends there, so that it can take the tokens that follow; or it is left out."""
        path, length = self._find(ids)
        if not path or length == len(ids):
            return path, length
        last, inside = path[-1], length - BLOCK_TOKENS * (len(path) - 1)
        if inside < len(last.tokens):
            if last.children or len(last.tokens) - inside > MAX_OVERWRITTEN_TOKENS:
                return path[:-1], length - inside
            del last.tokens[inside:]
        return path, length

    def _find(self, ids: list[int]) -> tuple[list[_Block], int]:
        """The blocks of the longest known beginning of `ids`, and its length; the last block may be used in part."""
        path: list[_Block] = []
        block, length = self._root, 0
        while length == len(path) * BLOCK_TOKENS:
            child, common = block.best_child(ids[length : length + BLOCK_TOKENS])
            if child is None:
                break
            path.append(child)
            block, length = child, length + common
        return path, length

    def _touch(self, path: Sequence[_Block]) -> None:
        for block in reversed(path):
            self._used.move_to_end(block)

    def _add_block(self, parent: _Block, tokens: list[int]) -> _Block:
        if not self._free:
            self._evict()
        block = _Block(self._free.pop(), parent, tokens)
        parent.children.setdefault(tuple(tokens[:MIN_REUSED_TOKENS]), []).append(block)
        self._used[block] = None
        return block

    def _evict(self) -> None:
        """Forget the least recently used block; it has no children."""
        block, _ = self._used.popitem(last=False)
        assert block.parent is not None and not block.children
        key = tuple(block.tokens[:MIN_REUSED_TOKENS])
        siblings = block.parent.children[key]
        siblings.remove(block)
        if not siblings:
            del block.parent.children[key]
        self._free.append(block.index)


class PrefixCache:
    """Knows which tokens a decoder's slots and a BlockTree hold, and copies keys and values instead of computing them.

    A slot keeps what a sequence that has ended left there, so that the context of a single user who types needs no
    copy, and a completion that was accepted is known. The decoder reports everything that it writes to its KV cache.

    Args:
        key_cache, value_cache: [n_layer, slots, n_head, n_ctx, head_stride], of any type.
        max_bytes: of the BlockTree; it gets no more than the KV cache itself may take.
        min_tokens: a shorter context is neither looked for nor kept: to compute it takes no longer.

    Attributes:
        hits: contexts of which a beginning was reused.
        reused_tokens: tokens of these beginnings.
    """

    def __init__(self, key_cache: np.ndarray, value_cache: np.ndarray, max_bytes: int, min_tokens: int = 0) -> None:
        self._min_tokens = min_tokens
        self._caches = key_cache, value_cache
        n_layer, num_slots, n_head, _, head_stride = key_cache.shape
        max_bytes = min(max_bytes, key_cache.nbytes + value_cache.nbytes)
        self._tree = BlockTree(n_layer, n_head, head_stride, max_bytes, key_cache.dtype)
        self._slots: list[list[int]] = [[] for _ in range(num_slots)]  # the tokens of each
        self.hits = 0
        self.reused_tokens = 0

    def state(self) -> PrefixCacheState:
        return PrefixCacheState(self.hits, self.reused_tokens, self._tree.used_bytes, self._tree.capacity_bytes)

    def match(self, ids: list[int]) -> int:
        """How many tokens from the beginning of a context need not be computed; its last one gives the logits."""
        if len(ids) < self._min_tokens:
            return 0
        reusable = ids[:-1]
        return max(self._tree.match(reusable), self._best_slot(reusable)[0])

    def load(self, slot: int, ids: list[int]) -> int:
        """Bring the longest known beginning of a context into a slot; returns its length, which counts as reused."""
        if len(ids) < self._min_tokens:
            self._slots[slot] = []
            return 0
        reusable = ids[:-1]
        length = self._tree.match(reusable)
        in_slot, source = self._best_slot(reusable)
        if in_slot >= length:
            length = in_slot
            self.copy(source, slot, length)
        else:
            self._tree.load(reusable[:length], common_length(self._slots[slot], reusable), *self._of_slot(slot))
            self._slots[slot] = reusable[:length]
        if length < MIN_REUSED_TOKENS:
            return 0
        self.hits += 1
        self.reused_tokens += length
        return length

    def store(self, slot: int, ids: list[int]) -> None:
        """Keep the keys and values of a context that a slot holds; a short one goes with the slot."""
        if len(ids) < self._min_tokens:
            return
        self._tree.store(ids, *self._of_slot(slot))

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a slot to another one, but for those that it holds already."""
        ids = self._slots[source][:length]
        assert len(ids) == length
        begin = common_length(self._slots[target], ids)
        for cache in self._caches:
            cache[:, target, :, begin:length] = cache[:, source, :, begin:length]
        self._slots[target] = ids

    def set_tokens(self, slot: int, ids: Sequence[int]) -> None:
        """Note that a slot has got the keys and values of these tokens, and no others."""
        self._slots[slot] = list(ids)

    def add_tokens(self, tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int]) -> None:
        """Note that tokens are computed at positions of slots; what a slot holds after them belongs to another text."""
        for token, slot, position in zip(tokens, slots, positions, strict=True):
            ids = self._slots[slot]
            assert len(ids) >= position
            ids[position:] = [token]

    def _of_slot(self, slot: int) -> tuple[np.ndarray, np.ndarray]:
        keys, values = (cache[:, slot] for cache in self._caches)
        return keys, values

    def _best_slot(self, ids: list[int]) -> tuple[int, int]:
        """The length of the longest beginning of `ids` that a slot holds, and the slot."""
        begin = ids[:MIN_REUSED_TOKENS]
        candidates = (
            (common_length(held, ids), slot)
            for slot, held in enumerate(self._slots)
            if held[:MIN_REUSED_TOKENS] == begin
        )
        return max(candidates, default=(0, 0))


def common_length(first: list[int], second: list[int]) -> int:
    """The length of the common beginning of two lists.

    Example:
        >>> common_length([1, 2, 3], [1, 2, 4, 5])
        2
    """
    low, high = 0, min(len(first), len(second))
    if first[:high] == second[:high]:
        return high
    while high - low > 1:  # the first `low` are equal, the first `high` are not
        middle = (low + high) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle
    return low
