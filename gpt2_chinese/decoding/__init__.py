"""From a prompt to completions: sampling, the decoders with their KV caches, the engine, the engine's process."""
