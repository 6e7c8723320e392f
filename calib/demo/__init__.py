"""Bundled demo model, its tokenizer, and the text that it was trained on, generated from a seed."""

from pathlib import Path


def model_folder() -> Path:
    """Folder of the demo model and its tokenizer, as transformers writes them."""
    return Path(__file__).with_name("model")
