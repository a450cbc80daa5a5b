"""White space and case that are kept travel in the model folder, for our tokenizers and for AutoTokenizer."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from gpt2_chinese.model_folder import save_model
from gpt2_chinese.text.tokenizers import TokenizerSpec, read_tokenizer
from gpt2_chinese.text.vocabulary import SPECIAL_TOKENS
from gpt2_chinese.text.word_tokenizer import BYTE_TOKENS, KEEP_CASE, KEEP_SPACES, RULES_VERSION, SPACE_TOKEN

TEXT = "明月几时有　把酒问青天\n他用 iPhone 写诗"
KEPT = "明月几时有 把酒问青天\n他用 iPhone 写诗"


@pytest.mark.parametrize("kind", ["word", "char"])
def test_a_model_folder_keeps_what_its_vocabulary_kept(tmp_path, kind):
    if kind == "word":
        vocabulary = (*SPECIAL_TOKENS, *BYTE_TOKENS, SPACE_TOKEN, "明月", "iPhone")
        spec = TokenizerSpec("word", vocabulary, rules=RULES_VERSION + KEEP_CASE + KEEP_SPACES)
    else:
        vocabulary = (
            "[PAD]",
            "[UNK]",
            "[CLS]",
            "[SEP]",
            "[MASK]",
            SPACE_TOKEN,
            "iPhone",
            *"明月几时有把酒问青天他用写诗",
        )
        spec = TokenizerSpec("char", vocabulary, lowercase=False)
    tokenizer = spec.build()
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=16, n_ctx=16, n_embd=8, n_layer=1, n_head=1)
    save_model(tmp_path / "model", GPT2LMHeadModel(config), tokenizer, facts={})
    again = read_tokenizer(tmp_path / "model").build()
    ids = tokenizer.encode(TEXT)
    assert again.encode(TEXT) == ids
    assert again.decode(ids) == tokenizer.decode(ids) == KEPT
    if kind == "word":
        elsewhere = AutoTokenizer.from_pretrained(tmp_path / "model", trust_remote_code=True)
        assert elsewhere.encode(TEXT, add_special_tokens=False) == ids
        assert elsewhere.decode(ids) == KEPT
