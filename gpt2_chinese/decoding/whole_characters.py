"""Which tokens may be drawn so that a text has whole characters only, where tokens may be bytes of UTF-8.

A byte-level vocabulary can spell what is no character: a continuation byte without a beginning, an overlong form, half
of a surrogate pair, a beginning at the end of the text. An automaton over the bytes of Unicode's table of well-formed
UTF-8 (The Unicode Standard, table 3-7) says which tokens go on, so that the draw can leave out the others. U+FFFD is
left out too: it stands for bytes that could not be read, and is never what a text means to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

BOUNDARY = 0
"""The state between two characters."""

DEAD = 255
"""In `CharacterMasks.next_state`: the token cannot follow."""

UNREACHABLE = 1 << 20
"""Distance of a state in which the vocabulary cannot complete the character."""

REPLACEMENT = "\ufffd"

MAX_STATE_TOKENS = 16
"""The last tokens of a prompt, among which there is the beginning of a character."""

ONE, TWO, THREE, AFTER_E0, AFTER_ED, AFTER_F0, AFTER_F4, AFTER_EF, AFTER_EF_BF = range(1, 10)
NUM_STATES = 10

# (state, first byte, last byte, next state)
TRANSITIONS = (
    (BOUNDARY, 0x00, 0x7F, BOUNDARY),
    (BOUNDARY, 0xC2, 0xDF, ONE),
    (BOUNDARY, 0xE0, 0xE0, AFTER_E0),
    (BOUNDARY, 0xE1, 0xEC, TWO),
    (BOUNDARY, 0xED, 0xED, AFTER_ED),
    (BOUNDARY, 0xEE, 0xEE, TWO),
    (BOUNDARY, 0xEF, 0xEF, AFTER_EF),
    (BOUNDARY, 0xF0, 0xF0, AFTER_F0),
    (BOUNDARY, 0xF1, 0xF3, THREE),
    (BOUNDARY, 0xF4, 0xF4, AFTER_F4),
    (ONE, 0x80, 0xBF, BOUNDARY),
    (TWO, 0x80, 0xBF, ONE),
    (THREE, 0x80, 0xBF, TWO),
    (AFTER_E0, 0xA0, 0xBF, ONE),
    (AFTER_ED, 0x80, 0x9F, ONE),
    (AFTER_F0, 0x90, 0xBF, TWO),
    (AFTER_F4, 0x80, 0x8F, TWO),
    (AFTER_EF, 0x80, 0xBE, ONE),
    (AFTER_EF, 0xBF, 0xBF, AFTER_EF_BF),
    (AFTER_EF_BF, 0x80, 0xBC, BOUNDARY),
    (AFTER_EF_BF, 0xBE, 0xBF, BOUNDARY),
)
BYTE_TABLE = np.full((NUM_STATES, 256), DEAD, dtype=np.uint8)
"""The next state by state and byte, [NUM_STATES, 256]."""
for _state, _first, _last, _next in TRANSITIONS:
    BYTE_TABLE[_state, _first : _last + 1] = _next


def after_bytes(state: int, data: bytes) -> int:
    """The state after these bytes, DEAD if they cannot follow."""
    for byte in data:
        if state == DEAD:
            return DEAD
        state = int(BYTE_TABLE[state, byte])
    return state


class CharacterMasks:
    """The tokens that may be drawn, by the state within a character and the tokens that may follow.

    A mask has the number `state * (max_distance + 1) + min(tokens that may follow, max_distance)`. It is kept as a list
    of token ids, of those that are left out or, where that is shorter, of those that stay.

    Args:
        token_bytes: what each token adds to the bytes of the text; None for a token that is whole characters and
            stands between characters only, such as a word or a special token.
        vocab_size: logits of a sequence, as many as tokens or more.
        suppressed_ids: tokens that are never drawn.

    Attributes:
        next_state: uint8 [NUM_STATES, vocab_size], DEAD where the token cannot follow.
        has_partial_characters: whether any token may lead to another state than BOUNDARY.
        distance: [NUM_STATES] tokens, at least, to the end of the character.
        begins: int64 [masks + 1], where the list of each mask begins in `ids`.
        ids: int64, all lists.
        allows: int64 [masks], whether the list is of those that stay.
    """

    def __init__(
        self, token_bytes: Sequence[bytes | None], vocab_size: int, suppressed_ids: Iterable[int] = ()
    ) -> None:
        self.vocab_size = vocab_size
        self.has_partial_characters = any(data and _is_partial(data) for data in token_bytes)
        suppressed = np.zeros(vocab_size, dtype=bool)
        suppressed[[*suppressed_ids, *range(len(token_bytes), vocab_size)]] = True
        self.next_state = np.full((NUM_STATES, vocab_size), DEAD, dtype=np.uint8)
        self.next_state[BOUNDARY] = BOUNDARY
        for id_, data in enumerate(token_bytes):
            if not data:
                continue
            self.next_state[BOUNDARY, id_] = after_bytes(BOUNDARY, data) if _is_partial(data) else BOUNDARY
            if 0x80 <= data[0] <= 0xBF:
                for state in range(1, NUM_STATES):
                    self.next_state[state, id_] = after_bytes(state, data)
        self._drawable = np.where(suppressed, DEAD, self.next_state)
        self.distance = self._distances()
        reachable = self.distance[self.distance < UNREACHABLE]
        self.max_distance = int(reachable.max())
        masks = [
            self._allowed(state, following) for state in range(NUM_STATES) for following in range(self.max_distance + 1)
        ]
        self.allows = np.array([2 * mask.sum() < vocab_size for mask in masks], dtype=np.int64)
        lists = [np.flatnonzero(mask if allows else ~mask) for mask, allows in zip(masks, self.allows, strict=True)]
        self.begins = np.cumsum([0, *map(len, lists)], dtype=np.int64)
        self.ids = np.concatenate(lists).astype(np.int64)
        self.default_mask = self.max_distance
        """The mask between characters, with tokens enough to come: nearly every draw's."""

    def _distances(self) -> np.ndarray:
        distance = np.full(NUM_STATES, UNREACHABLE, dtype=np.int64)
        distance[BOUNDARY] = 0
        for _ in range(NUM_STATES):
            for state in range(1, NUM_STATES):
                following = self._drawable[state]
                following = following[following != DEAD]
                if len(following):
                    distance[state] = min(distance[state], 1 + distance[following].min())
        return np.minimum(distance, UNREACHABLE)

    def _allowed(self, state: int, following: int) -> np.ndarray:
        """Whether each token may be drawn in a state with so many tokens to follow it: bool [vocab_size].

        A token must leave a character that can be completed by those that follow. Where the prompt has begun one that
        is too long for that, it must bring it one token nearer to its end.
        """
        targets = self._drawable[state]
        distance = np.append(self.distance, np.full(256 - NUM_STATES, UNREACHABLE + 1))[targets]
        return distance <= max(following, int(self.distance[state]) - 1)

    def mask_numbers(self, states: np.ndarray, following: np.ndarray) -> np.ndarray:
        """The numbers of the masks of sequences: their states [B], and the tokens that may follow the next one [B]."""
        # np.clip would take longer than the rest.
        return states * (self.max_distance + 1) + np.maximum(0, np.minimum(following, self.max_distance))

    def listed(self, mask: int) -> np.ndarray:
        """The list of a mask."""
        return self.ids[self.begins[mask] : self.begins[mask + 1]]

    def banned(self, state: int, following: int) -> np.ndarray:
        """Whether each token is left out in a state, with so many tokens to follow it: bool [vocab_size]."""
        mask = int(self.mask_numbers(np.array(state), np.array(following)))
        banned = np.full(self.vocab_size, bool(self.allows[mask]))
        banned[self.listed(mask)] = not self.allows[mask]
        return banned

    def as_bool(self) -> np.ndarray:
        """Whether a token is left out: bool [masks, vocab_size]."""
        per_state = self.max_distance + 1
        return np.stack([self.banned(mask // per_state, mask % per_state) for mask in range(len(self.allows))])

    def state_after(self, ids: Sequence[int]) -> int:
        """The state after the ids of a prompt; bytes that are no character are passed over."""
        state = BOUNDARY
        for id_ in ids[-MAX_STATE_TOKENS:]:
            following = int(self.next_state[state, id_])
            if following == DEAD:
                following = int(self.next_state[BOUNDARY, id_])
            state = BOUNDARY if following == DEAD else following
        return state if self.distance[state] < UNREACHABLE else BOUNDARY


def _is_partial(data: bytes) -> bool:
    """Whether bytes are more, or less, than whole characters other than U+FFFD."""
    try:
        return REPLACEMENT in data.decode("utf-8")
    except UnicodeDecodeError:
        return True
