"""Models and tokenizers from folders and the hub."""
