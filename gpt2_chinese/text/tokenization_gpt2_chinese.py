"""The tokenizers of a model folder: `AutoTokenizer.from_pretrained(folder, trust_remote_code=True)`, transformers 5.

A copy of this file and of the modules that it imports relatively lies in the folders of words and of characters, so
that they work where gpt2_chinese is not installed. There the thulac package cuts the words (`pip install
thulac==0.2.2`; its model takes some seconds and a gigabyte, at the first text); where gpt2_chinese can be imported, its
compiled segmenter gives the same words faster. Characters need numpy alone.

`tokenizer(text)` begins with the token that begins a document, as in the training and in generate.py; without it,
`add_special_tokens=False`, a text is the ids that gpt2_chinese's own tokenizer gives. A line break is `[SEP]`. Names
of special tokens within a text are ordinary text, save with `compat`, where the reference reads them.

A `[SEP]` that is a line break is no special token here: vLLM leaves out the special tokens of what a model generates,
and a line break is text.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import lru_cache, partial
from io import StringIO
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizer

from .char_tokenizer import CharTokenizer
from .vocabulary import SPECIAL_TOKENS, read_vocabulary
from .word_tokenizer import WordTokenizer, join_tokens

_VOCABULARY = "vocab.txt"
_SEPARATOR, _END, _BEGIN, _PADDING, _UNKNOWN = SPECIAL_TOKENS
_LONGEST_PIECE = 49_999  # characters that the thulac package takes as they are
_RUN_OF_SPACES = re.compile("[ \u3000]{2,}")


class _ChineseTokenizer(PreTrainedTokenizer):
    """What the tokenizers of words and of characters have in common.

    Args:
        tokenizer: gpt2_chinese's own.
        settings: all that `tokenizer_config.json` keeps.
    """

    vocab_files_names = {"vocab_file": _VOCABULARY}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, tokenizer: WordTokenizer | CharTokenizer, **settings: Any) -> None:
        self._tokenizer = tokenizer
        self._id_of = {token: id_ for id_, token in enumerate(tokenizer.vocabulary)}
        for name in ("cls_token", "sep_token", "mask_token"):  # BERT's; ours are what begins and what ends a document
            settings.pop(name, None)
        defaults = {"pad_token": _PADDING, "unk_token": _UNKNOWN, "padding_side": "left"}
        super().__init__(**(defaults | settings))

    @property
    def vocab_size(self) -> int:
        return len(self._tokenizer)

    def get_vocab(self) -> dict[str, int]:
        return self._id_of | self.added_tokens_encoder

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs: Any
    ) -> list[str]:
        if len(self) > self.vocab_size:  # somebody has added tokens: they are found first, then what is between them
            return list(super().tokenize(text, **kwargs))
        return self._tokenize(text)

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return self._tokenizer.tokenize(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self._id_of.get(token, self._id_of[_UNKNOWN])

    def _convert_id_to_token(self, index: int) -> str:
        if not 0 <= index < self.vocab_size:
            raise ValueError(f"id {index} is not in the vocabulary of {self.vocab_size} tokens")
        return self._tokenizer.vocabulary[index]

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Begin a document: `[MASK]` text; a second text is a second line of it."""
        return [
            self._tokenizer.marks.begin,
            *token_ids_0,
            *([] if token_ids_1 is None else [*self._line_break(), *token_ids_1]),
        ]

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        if already_has_special_tokens:
            return [int(id_ in self.all_special_ids) for id_ in token_ids_0]
        second = [] if token_ids_1 is None else [*self._line_break(), *token_ids_1]
        return [1, *[0] * (len(token_ids_0) + len(second))]

    def _line_break(self) -> list[int]:
        """The token between two lines; nothing where line breaks are white space."""
        id_ = self._tokenizer.marks.line_break
        return [] if id_ is None else [id_]

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **_: Any,
    ) -> str:
        """Give the text of ids; `[CLS]` is a blank line, or nothing if special tokens are skipped; `[SEP]` is text."""
        tokens = self.convert_ids_to_tokens([token_ids] if isinstance(token_ids, int) else list(token_ids))
        if skip_special_tokens:
            end = self._tokenizer.vocabulary[self._tokenizer.marks.end]
            tokens = [_PADDING if token == end else token for token in tokens]
        return self.convert_tokens_to_string(tokens)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        path = Path(save_directory) / (f"{filename_prefix}-{_VOCABULARY}" if filename_prefix else _VOCABULARY)
        lines = "".join(token + "\n" for token in self._tokenizer.vocabulary)
        path.write_text(lines, encoding="utf-8", newline="\n")
        return (str(path),)


class GPT2ChineseTokenizer(_ChineseTokenizer):
    """THULAC's words, looked up in `vocab.txt` or spelled with its parts.

    Args:
        vocab_file: one token a line, its id is its line number from 0.
        compat: tokenize as GPT2-Chinese did, with its `[UNK]`s.
        rules: the number of the rules by which text is tokenized.
    """

    def __init__(self, vocab_file: str, compat: bool = False, rules: int = 1, **kwargs: Any) -> None:
        segmenter = Thulac(SPECIAL_TOKENS if compat else ())
        vocabulary = read_vocabulary(vocab_file, strict=False)
        tokenizer = WordTokenizer(vocabulary, compat=compat, rules=rules, segmenter=segmenter)
        marks = {"bos_token": _BEGIN, "eos_token": _END}
        super().__init__(tokenizer, compat=compat, rules=rules, **(marks | kwargs))
        self._join = partial(join_tokens, compat=compat, rules=tokenizer.rules)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self._join(tokens)


class GPT2ChineseCharTokenizer(_ChineseTokenizer):
    """BERT's WordPiece over single characters.

    Without `trust_remote_code` a folder of characters gives transformers' BertTokenizer, which begins a text with
    `[CLS]`, ends it with `[SEP]` and writes a space between two characters.

    Args:
        vocab_file: one token a line, its id is its line number from 0.
        do_lower_case: fold case and accents.
        compat: tokenize as GPT2-Chinese did.
        bos_token, eos_token: what begins and what ends a document.
    """

    def __init__(
        self,
        vocab_file: str,
        do_lower_case: bool = True,
        compat: bool = False,
        bos_token: str = "[CLS]",
        eos_token: str = "[SEP]",
        **kwargs: Any,
    ) -> None:
        tokenizer = CharTokenizer(
            read_vocabulary(vocab_file, strict=False),
            lowercase=do_lower_case,
            compat=compat,
            begin=str(bos_token),
            end=str(eos_token),
            line_break=None if str(eos_token) == _SEPARATOR else _SEPARATOR,
        )
        settings = {"do_lower_case": do_lower_case, "compat": compat, "bos_token": bos_token, "eos_token": eos_token}
        super().__init__(tokenizer, **settings, **kwargs)
        self._characters = tokenizer

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        joiner = self._characters.joiner()
        ids = (self._id_of.get(token) for token in tokens)
        return "".join(
            joiner.write(token) if id_ is None else joiner.push(id_) for token, id_ in zip(tokens, ids, strict=True)
        )


class Thulac:
    """THULAC's words, by gpt2_chinese's compiled code or by the thulac package, loaded at the first text.

    Copies and pickles are made anew from the user words: the package's model is a gigabyte of Python objects.
    """

    def __init__(self, user_words: Sequence[str] = ()) -> None:
        self._user_words = tuple(user_words)
        self._cut: Callable[[str], list[str]] | None = None

    def __reduce__(self) -> tuple[type[Thulac], tuple[tuple[str, ...]]]:
        return type(self), (self._user_words,)

    def cut(self, text: str) -> list[str]:
        """The words of one line."""
        if self._cut is None:
            self._cut = _load_cut(self._user_words)
        return self._cut(text)


@lru_cache(maxsize=2)  # the default's and compat's
def _load_cut(user_words: Sequence[str]) -> Callable[[str], list[str]]:
    try:
        from gpt2_chinese.text.segmenter import Segmenter

        return Segmenter(user_words).cut
    except ImportError:  # the folder has travelled to where gpt2_chinese is not
        pass
    try:
        import thulac
    except ImportError as error:
        raise ImportError("this tokenizer cuts words with THULAC: pip install thulac==0.2.2") from error
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):  # it prints that it is ready
        path = Path(folder) / "user_words.txt"
        path.write_text("".join(word + "\n" for word in user_words), encoding="utf-8")
        model = thulac.thulac(seg_only=True, user_dict=str(path) if user_words else None)
    return lambda line: [word for piece in pieces_of_long_line(line) for word in model.cutline(piece)]


def pieces_of_long_line(line: str) -> list[str]:
    """Cut a line after sentence ends, into runs of sentences that the thulac package has room for.

    The package would do so itself, but in a time that grows with the square of the length, and an IndexError ends it
    where a sentence is longer; that one is cut anyhow, as gpt2_chinese.text.segmenter does.
    """
    if len(line) <= _LONGEST_PIECE:
        return [line]
    sentences: list[str] = []
    start = sentence = 0
    for end, character in enumerate(line, start=1):
        if character in "。？！；;!?":
            if end - start > _LONGEST_PIECE:
                sentences.append(line[start:sentence])
                start = sentence
            sentence = end
    if len(line) - start > _LONGEST_PIECE:
        sentences.append(line[start:sentence])
        start = sentence
    sentences.append(line[start:])

    pieces: list[str] = []
    for text in sentences:
        shrunk = _RUN_OF_SPACES.sub(lambda run: run[0][0], text)  # THULAC sees no more of it
        if len(shrunk) <= _LONGEST_PIECE + 1:
            pieces.append(shrunk)
        else:
            pieces += [text[start : start + _LONGEST_PIECE] for start in range(0, len(text), _LONGEST_PIECE)]
    return pieces
