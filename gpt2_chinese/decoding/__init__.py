"""From a prompt to completions: sampling, decoders, the engine and its process."""
