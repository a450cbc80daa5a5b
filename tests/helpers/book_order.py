"""The ids of the special tokens where they stand first in a vocabulary, as make-vocab.py writes them."""

from __future__ import annotations

from gpt2_chinese.text.vocabulary import SPECIAL_TOKENS, find_marks

SEP_ID, CLS_ID, MASK_ID, PAD_ID, UNK_ID = range(5)
NEVER_PRODUCED = (MASK_ID, PAD_ID, UNK_ID)
MARKS = find_marks({token: id_ for id_, token in enumerate(SPECIAL_TOKENS)})
