"""From TXT files to token IDs: corpus, segmenter, vocabularies, tokenizers, pieces. No torch, no tensorflow."""
