"""From token IDs to a model: windows, loss, optimizers, ranks, checkpoints, validation, what is printed."""
