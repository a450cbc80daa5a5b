"""What the scripts of the pipeline share; docs/architecture.md has the picture."""
